"""Bearer tokens: 256 random bits, of which we know only the hash."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence


def new_token() -> str:
    """A token nobody can guess."""
    return secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """SHA-256 in hex. A token of 256 random bits needs no slow hash: there is nothing to guess."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def is_accepted(authorization: str, *, token_hashes: Sequence[str]) -> bool:
    """Whether an Authorization header holds one of the tokens; takes as long for each of them."""
    scheme, _, token = authorization.partition(" ")
    found = hash_token(token.strip())
    matches = [hmac.compare_digest(found, known) for known in token_hashes]
    return scheme.lower() == "bearer" and any(matches)
