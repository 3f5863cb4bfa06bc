"""A text corpus that comes with Python: the bytes of the standard library's source files.

It is the same for every installation of one Python patch version: files are read in order of name, the hash of its
content puts a file into the training or the validation part, and one sha256 identifies the whole.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer_hooks import InvalidInputError

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
_VALIDATION_SHARE = 0.11


class Corpus(NamedTuple):
    """Training and validation text as (n,) uint8 tensors, and the sha256 of all files."""

    train: Tensor
    validation: Tensor
    sha256: str


def read_standard_library(root: Path | None = None) -> Corpus:
    """Read every .py file under a folder, tests left out. Default: the standard library.

    Raises:
        InvalidInputError: the folder holds no source files.
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
    """Data set of non-overlapping windows: `context` bytes, and one more as the last target.

    A sample is (context + 1,) uint8. `__getitems__` returns a whole micro-batch at once: (n, context + 1).
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
        """Return the windows of these indices as (n, context + 1) uint8."""
        return self._windows[torch.as_tensor(indices)]
