"""Real text that every machine with Python has: the bytes of the standard library's source files.

Deterministic for one Python patch version: files in order of name, split by the hash of each file, one sha256 of all.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gns_controller.core.errors import InvalidInputError

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
_VALIDATION_SHARE = 0.11


class Corpus(NamedTuple):
    """Byte strings as (n,) uint8 tensors."""

    train: Tensor
    validation: Tensor
    sha256: str


def read_standard_library(root: Path | None = None) -> Corpus:
    """Every .py file of the standard library but its tests.

    Raises:
        InvalidInputError: no source files there.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not _LEFT_OUT.intersection(path.relative_to(root).parts))
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        file_hash = hashlib.sha256(content).digest()
        digest.update(file_hash)
        parts[int.from_bytes(file_hash[:8], "big") / 2**64 < _VALIDATION_SHARE].append(content)
    if not all(parts.values()):
        raise InvalidInputError(f"no Python source files found under {root}; pass --corpus with a folder of .py files.")
    train, validation = (torch.from_numpy(np.frombuffer(b"".join(parts[p]), np.uint8).copy()) for p in (False, True))
    return Corpus(train, validation, digest.hexdigest())


class ByteSequences:
    """Non-overlapping windows of `context` bytes and the byte that follows each position.

    Sample: (context + 1,) uint8. `__getitems__` gives a whole micro-batch at once: (n, context + 1).
    """

    def __init__(self, data: Tensor, *, context: int) -> None:
        count = (len(data) - 1) // context
        if count < 1:
            raise InvalidInputError(f"{len(data)} bytes are too few for one window of {context} bytes.")
        self._windows = data.unfold(0, context + 1, context)[:count]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Tensor:
        return self._windows[index]

    def __getitems__(self, indices: list[int]) -> Tensor:
        """(n, context + 1) uint8."""
        return self._windows[torch.as_tensor(indices)]
