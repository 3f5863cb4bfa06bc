"""Any policy: the discriminated union of built-in policies, open for those that other packages add.

A document of a policy that was accepted elsewhere, in a log, a spool, an answer or a file, is kept as it was written
where this process cannot run the policy; see `KEEP_UNKNOWN`. Every other document of such a policy is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, Union

from pydantic import (
    Field,
    GetJsonSchemaHandler,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
)
from pydantic.json_schema import JsonSchemaValue

from gns_controller.core.errors import PolicyPlugInError
from gns_controller.core.policies.base import PolicyConfig, Proposal, Situation
from gns_controller.core.policies.plug_ins import plug_in_named, plug_in_names, plug_ins
from gns_controller.core.policies.rules import BUILT_IN_NAMES, POLICIES

KEEP_UNKNOWN = {"unknown_policies": "keep"}
"""Context of a pydantic validation: a policy that cannot be run here becomes an `UnavailablePolicyConfig`."""


class UnavailablePolicyConfig(PolicyConfig):
    """A policy that was accepted elsewhere and cannot be run here: its package is missing, broken or another version.

    It is shown and written as it came, and decides nothing.
    """

    policy: str
    document: dict[str, Any]
    """The policy's JSON object, as it was written."""
    reason: str
    """One sentence: why the policy cannot be run, and what to do."""

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return self.document

    def propose(self, situation: Situation) -> Proposal:
        """Refuse: nothing decides in the place of a policy that cannot be run.

        Raises:
            PolicyPlugInError: always.
        """
        raise PolicyPlugInError(self.reason)


def policy_names() -> list[str]:
    """Return the names of all policies, built-in ones first."""
    return list(dict.fromkeys([*BUILT_IN_NAMES, *plug_in_names()]))


def _union_of(policies: tuple[type[PolicyConfig], ...]) -> Any:
    return Union[policies]  # noqa: UP007 - made of a tuple


@cache
def _with_plug_ins() -> TypeAdapter[PolicyConfig]:
    """Return the validator of all policies that can be run here."""
    usable = tuple(plug_in.config for plug_in in plug_ins() if plug_in.config is not None)
    union: Any = Annotated[_union_of((*POLICIES, *usable)), Field(discriminator="policy")]
    return TypeAdapter(union)


def _validated(value: Any, built_in: ValidatorFunctionWrapHandler, info: ValidationInfo) -> PolicyConfig:
    """Validate a policy, by the union of built-in policies or by that of all."""
    if isinstance(value, UnavailablePolicyConfig):
        return value
    name = value.get("policy") if isinstance(value, dict) else getattr(value, "policy", None)
    if not isinstance(name, str) or name in BUILT_IN_NAMES:
        policy: PolicyConfig = built_in(value)
        return policy
    plug_in = plug_in_named(name)
    try:
        if plug_in is not None and plug_in.problem is not None:
            raise ValueError(plug_in.problem)
        return _with_plug_ins().validate_python(value)
    except ValueError as error:  # of pydantic, too
        if not (isinstance(value, dict) and isinstance(info.context, Mapping)):
            raise
        if info.context.get("unknown_policies") != "keep":
            raise
        return UnavailablePolicyConfig(policy=name, document=value, reason=_reason(name, error))


def _reason(name: str, error: ValueError) -> str:
    plug_in = plug_in_named(name)
    if plug_in is None:
        return (
            f"the policy {name!r} is not built in, and no package installed here adds it. Install the one that does, "
            "or choose another policy."
        )
    if isinstance(error, ValidationError):
        faults = "; ".join(fault["msg"] for fault in error.errors(include_url=False, include_input=False))
        return (
            f"{plug_in.distribution} does not accept these settings of its policy {name!r}, which may be of another "
            f"version: {faults}."
        )
    return str(error)


class _WithPlugInsInSchema:
    """Annotation: a JSON schema also describes the plug-ins that can be run where it is made."""

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        union = handler(schema)
        for plug_in in plug_ins():
            if plug_in.config is not None:
                reference = handler(plug_in.config.__pydantic_core_schema__)
                union["oneOf"].append(reference)
                union["discriminator"]["mapping"][plug_in.name] = reference["$ref"]
        return union


if TYPE_CHECKING:
    AnyPolicyConfig: TypeAlias = PolicyConfig
else:
    AnyPolicyConfig = Annotated[
        _union_of(POLICIES),
        Field(discriminator="policy"),
        WrapValidator(_validated),
        SerializeAsAny(),
        _WithPlugInsInSchema(),
    ]
"""Any policy, chosen by its field `policy`."""
