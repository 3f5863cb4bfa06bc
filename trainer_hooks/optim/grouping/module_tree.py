"""Locations of parameters in the module tree, under the names that the author gave: without wrappers' prefixes."""

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
    """Location of a parameter in the module tree; a tied parameter has several."""

    name: str
    path: tuple[str, ...]
    """Names on the way to the module."""
    module: nn.Module
    """The module that holds it; of a parametrized or pruned weight, the one whose weight it is."""
    local: str
    """Its name in the module; of a parametrized or pruned weight, that of the weight."""

    @property
    def words(self) -> tuple[str, ...]:
        """Names of its module, and its own unless that is just weight; qkv_weight is called qkv."""
        return self.path if self.local == "weight" else (*self.path, _SUFFIX.sub("", self.local))

    @property
    def noun(self) -> str:
        """The last word that is not a number."""
        return next((word for word in reversed(self.words) if not word.isdigit()), "")


def locations_of(model: nn.Module) -> dict[nn.Parameter, list[ParameterLocation]]:
    """Return the locations of every parameter, in the order of named_parameters.

    Raises:
        InvalidInputError: a parameter without a shape yet.
    """
    locations: dict[nn.Parameter, list[ParameterLocation]] = {}
    # A module that hangs in several places is met once with each path, and its parameters get a location for each.
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
            # A parametrized weight belongs to the module above the two that torch puts in between; flat parts of it,
            # such as the sizes of weight_norm, are parameters by themselves.
            is_flat = sum(side != 1 for side in parameter.shape) < 2
            if isinstance(module, ParametrizationList) and not (is_flat and local != "original"):
                location = ParameterLocation(name, path[:-2], modules[path[:-2]], path[-1])
            locations.setdefault(parameter, []).append(location)
    return locations


def _of_which(module: nn.Module, local: str) -> str:
    """Return the weight behind weight_orig (pruning, spectral_norm) or behind weight_v, if weight_g is its norm."""
    weight = local.removesuffix("_orig").removesuffix("_v")
    return local if local.endswith("_v") and f"{weight}_g" not in module._parameters else weight


def _modules(
    module: nn.Module, path: tuple[str, ...], above: frozenset[int]
) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """Yield every module with every path to it, wrappers left out of the path."""
    yield path, module
    for name, child in module._modules.items():
        if child is None or id(child) in above:
            continue  # a module that holds its own parent would be walked forever
        is_wrapper = name in _WRAPPERS or (
            name == "module" and isinstance(module, DataParallel | DistributedDataParallel)
        )
        yield from _modules(child, path if is_wrapper else (*path, name), above | {id(module)})
