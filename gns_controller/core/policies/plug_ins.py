"""Policies that other packages add, by an entry point of their distribution.

    [project.entry-points."gns_controller.policies"]
    my_policy = "my_package.policies:MyPolicyConfig"        # the name of the policy, and its config class

Packages are looked at when a policy is named that is not built in, or when all policies are listed; each is imported
once. A plug-in that cannot be used has a problem, one sentence that names its distribution; built-in policies never
depend on one.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple, get_args

from pydantic import TypeAdapter

from gns_controller.core.errors import PolicyPlugInError
from gns_controller.core.policies.base import PolicyConfig
from gns_controller.core.policies.rules import BUILT_IN_NAMES

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "gns_controller.policies"


class PlugIn(NamedTuple):
    """A policy that an installed package adds, or the reason why it cannot be used."""

    name: str
    distribution: str
    """Name and version of the package."""
    config: type[PolicyConfig] | None
    problem: str | None = None
    """One sentence; None where the policy can be used."""
    cause: str | None = None
    """The exception behind the problem, for people who can see this machine."""


def plug_ins() -> list[PlugIn]:
    """Return every policy that an installed package adds, by name. Loads all of them."""
    return [_loaded(name) for name in plug_in_names()]


def plug_in_names() -> list[str]:
    """Return the names of the policies that installed packages add, without importing one."""
    return sorted(_entry_points())


def plug_in_named(name: str) -> PlugIn | None:
    """Return the policy of this name that an installed package adds; None where no package does."""
    return _loaded(name) if name in _entry_points() else None


@cache
def _entry_points() -> dict[str, list[EntryPoint]]:
    by_name: dict[str, list[EntryPoint]] = {}
    try:
        for entry_point in entry_points(group=ENTRY_POINT_GROUP):
            by_name.setdefault(entry_point.name, []).append(entry_point)
    except Exception as error:  # the metadata of some package is damaged, which may have nothing to do with policies
        logger.warning("policy plug-ins cannot be listed: error=%s: %s", type(error).__name__, error)
    return by_name


@cache
def _loaded(name: str) -> PlugIn:
    """Load a plug-in, once; a problem is logged, once."""
    candidates = _entry_points()[name]
    distributions = " and ".join(map(_distribution_of, candidates))
    plug_in = PlugIn(name, distributions, None)
    if name in BUILT_IN_NAMES:
        problem = (
            f"{distributions} adds a policy {name!r}, which is the name of a built-in policy, and that one is used. "
            "Rename the policy of the package."
        )
        plug_in = plug_in._replace(problem=problem)
    elif len(candidates) > 1:
        problem = f"{distributions} both add a policy {name!r}, so neither is used. Uninstall one of them."
        plug_in = plug_in._replace(problem=problem)
    else:
        try:
            plug_in = plug_in._replace(config=_checked(candidates[0]))
        except PolicyPlugInError as error:
            plug_in = plug_in._replace(problem=f"the policy {name!r} of {distributions} cannot be used: {error}.")
        except Exception as error:  # whatever the code of another package raises
            problem = f"the policy {name!r} of {distributions} cannot be loaded: {type(error).__name__} in its code."
            plug_in = plug_in._replace(problem=problem, cause=f"{type(error).__name__}: {error}")
    if plug_in.problem is not None:
        logger.warning("policy plug-in is not used: %s cause=%s", plug_in.problem, plug_in.cause)
    return plug_in


def _distribution_of(entry_point: EntryPoint) -> str:
    distribution = entry_point.dist
    return "a package" if distribution is None else f"{distribution.name} {distribution.version}"


def _checked(entry_point: EntryPoint) -> type[PolicyConfig]:
    """Import a plug-in's class and check that it is a policy of the entry point's name."""
    config = entry_point.load()
    if not (isinstance(config, type) and issubclass(config, PolicyConfig)):
        raise PolicyPlugInError(f"{entry_point.value} is not a class derived from PolicyConfig")
    field = config.model_fields.get("policy")
    if field is None or get_args(field.annotation) != (entry_point.name,) or field.default != entry_point.name:
        raise PolicyPlugInError(
            f"{entry_point.value} needs the field policy: Literal[{entry_point.name!r}] = {entry_point.name!r}, the "
            "name of its entry point"
        )
    if config.propose is PolicyConfig.propose:
        raise PolicyPlugInError(f"{entry_point.value} does not implement propose")
    TypeAdapter(config).json_schema()  # fields that pydantic cannot validate or describe are found here
    return config
