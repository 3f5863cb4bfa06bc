"""Keyword arguments that optimizers of matrices share, documented once.

A constructor ends in **options: Unpack[...] with one of the classes below: type checkers and editors know the names and
types, and `settings_of` rejects a name that does not exist, as Python does for a constructor's own parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypedDict

import torch.distributed as dist

from trainer_hooks.optim.engine.update import Decay


class MatrixOptions(TypedDict, total=False):
    """Options of every optimizer of matrices."""

    maximize: bool
    """Ascend instead of descend. Default: False."""
    process_group: dist.ProcessGroup | None
    """Ranks that hold copies of the same plain parameters (DDP) and share the work; DTensors need none. Default: None:
    every rank does all of the work on plain parameters."""


class DecayOptions(MatrixOptions, total=False):
    """Options of optimizers whose weight decay is not part of their step: all but Scion."""

    decay: Decay
    """Factor on weight_decay: "decoupled", lr, or "independent", lr over the first lr. Default: "decoupled"."""
    cautious: bool
    """Decay only entries that the update moves towards zero. Default: False."""


class FactorOptions(DecayOptions, total=False):
    """Options of the Shampoo family, whose owners keep state of matrices."""

    spectral_normalization: bool
    """Give every update a spectral norm of (M / N)^(1/2), so that lr transfers over widths. Default: False."""


_DEFAULTS = {"maximize": False, "decay": "decoupled", "cautious": False, "spectral_normalization": False}


def settings_of(optimizer: type, options: Mapping[str, Any], *, allowed: type[MatrixOptions]) -> dict[str, Any]:
    """Return the group settings that options of a constructor stand for, with the defaults of those that are missing.

    Args:
        optimizer: the class that was called, for errors.
        options: as given. process_group is not a setting and is left out.
        allowed: class above that has the options of this optimizer.

    Raises:
        TypeError: an option that does not exist; the message names it and the closest one that does.
    """
    names = allowed.__annotations__.keys()  # those of its bases, too
    for name in options:
        if name not in names:
            known = [*names, *inspect.signature(optimizer).parameters]
            similar = get_close_matches(name, known, n=1)
            hint = f" Did you mean {similar[0]!r}?" if similar else ""
            raise TypeError(f"{optimizer.__name__}.__init__() got an unexpected keyword argument {name!r}.{hint}")
    return {name: options.get(name, default) for name, default in _DEFAULTS.items() if name in names}
