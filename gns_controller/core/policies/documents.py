"""A policy as one document, JSON or TOML."""

from __future__ import annotations

import json
import tomllib
from typing import get_args

from pydantic import TypeAdapter, ValidationError

from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import AnyPolicyConfig

_POLICY: TypeAdapter[AnyPolicyConfig] = TypeAdapter(AnyPolicyConfig)
_NAMES = frozenset(model.model_fields["policy"].default for model in get_args(get_args(AnyPolicyConfig)[0]))


def suggested_for(text: str) -> str:
    """What to write instead of a policy's bare name, to end a sentence with; empty for any other text."""
    return f'; write \'{{"policy": "{text}"}}\'' if text in _NAMES else ""


def read_policy(text: str) -> AnyPolicyConfig:
    """JSON if it begins with a brace, else TOML.

    Raises:
        InvalidInputError: it is neither, or no policy; every wrong field is named.
    """
    is_json = text.lstrip().startswith("{")
    try:
        document = json.loads(text) if is_json else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # besides its own faults: too many digits, nested too deeply
        kind = "JSON" if is_json else "TOML"
        raise InvalidInputError(f"the policy is no {kind} document: {error}.") from None
    try:
        return _POLICY.validate_python(document, strict=False)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in found['loc'][1:]) or 'policy'}: {found['msg']}"
            for found in error.errors()
        )
        raise InvalidInputError(f"the policy document is not a policy: {wrong}.") from None
