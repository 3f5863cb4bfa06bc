"""Where every parameter of a model hangs, under the names that its author gave: without wrappers' prefixes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from gns_controller.core.errors import InvalidInputError

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_SUFFIX = re.compile(r"_(w|weight)$", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class ParameterLocation:
    """Where a parameter hangs in the module tree; a tied one hangs in several locations."""

    name: str
    path: tuple[str, ...]
    """Of the module."""
    module: nn.Module
    """Of a parametrized or pruned weight, the one whose weight it is."""
    local: str
    """Its name in the module; of a parametrized or pruned weight, that of the weight."""

    @property
    def words(self) -> tuple[str, ...]:
        """What it is called: its module's names, and its own unless that is just weight. Of qkv_weight, qkv."""
        return self.path if self.local == "weight" else (*self.path, _SUFFIX.sub("", self.local))

    @property
    def noun(self) -> str:
        """The last word that is no number."""
        return next((word for word in reversed(self.words) if not word.isdigit()), "")


def locations_of(model: nn.Module) -> dict[nn.Parameter, list[ParameterLocation]]:
    """The locations of every parameter, in the order of named_parameters.

    Raises:
        InvalidInputError: a parameter without a shape yet.
    """
    locations: dict[nn.Parameter, list[ParameterLocation]] = {}
    modules: dict[tuple[str, ...], nn.Module] = {}
    for path, module in _modules(model, (), frozenset()):
        modules[path] = module
        for local, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = ".".join((*path, local))
            if is_lazy(parameter):
                raise InvalidInputError(f"{name} has no shape yet: run the model on one batch first.")
            location = ParameterLocation(name, path, module, _of_which(module, local))
            is_flat = sum(side != 1 for side in parameter.shape) < 2
            if isinstance(module, ParametrizationList) and not (is_flat and local != "original"):
                location = ParameterLocation(name, path[:-2], modules[path[:-2]], path[-1])
            locations.setdefault(parameter, []).append(location)
    return locations


def _of_which(module: nn.Module, local: str) -> str:
    """The weight behind weight_orig (pruning, spectral_norm) or behind weight_v, if weight_g is its norm."""
    weight = local.removesuffix("_orig").removesuffix("_v")
    return local if local.endswith("_v") and f"{weight}_g" not in module._parameters else weight


def _modules(
    module: nn.Module, path: tuple[str, ...], above: frozenset[int]
) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """Every module at every location it hangs, wrappers left out of the path."""
    yield path, module
    for name, child in module._modules.items():
        if child is None or id(child) in above:
            continue
        is_wrapper = name in _WRAPPERS or (
            name == "module" and isinstance(module, DataParallel | DistributedDataParallel)
        )
        yield from _modules(child, path if is_wrapper else (*path, name), above | {id(module)})
