"""A policy as one document, JSON or TOML; and the faults of a document, in sentences of this project."""

from __future__ import annotations

import json
import tomllib
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies.any_policy import AnyPolicyConfig, policy_names

_POLICY: TypeAdapter[AnyPolicyConfig] = TypeAdapter(AnyPolicyConfig)


def suggested_for(text: str) -> str:
    """Return what to write instead of a policy's bare name, to end a sentence with; empty for any other text."""
    return f'; write \'{{"policy": "{text}"}}\'' if text in policy_names() else ""


def read_policy(text: str) -> AnyPolicyConfig:
    """Read a policy from text: JSON if it begins with a brace, else TOML.

    Raises:
        InvalidInputError: the text is neither, or not a policy; every wrong field is named.
    """
    is_json = text.lstrip().startswith("{")
    try:
        document = json.loads(text) if is_json else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # besides its own faults: too many digits, nested too deeply
        kind = "JSON" if is_json else "TOML"
        raise InvalidInputError(f"the policy is no {kind} document: {error}.") from None
    return policy_of(document)


def policy_of(document: object) -> AnyPolicyConfig:
    """Return the policy of a parsed document.

    Raises:
        InvalidInputError: the document is not a policy; every wrong field is named.
    """
    try:
        return _POLICY.validate_python(document)
    except ValidationError as error:
        wrong = "; ".join(_named(fault) for fault in faults_of(error))
        raise InvalidInputError(f"the policy document is not a policy: {wrong}.") from None


class Fault(NamedTuple):
    """One thing that is wrong with a document."""

    location: tuple[int | str, ...]
    """As pydantic tells it: the chosen policy of a union is a part of it."""
    is_missing: bool
    """The last part of the location is what is missing."""
    sentence: str
    """Without what was sent, and without a full stop."""


def faults_of(error: ValidationError) -> list[Fault]:
    """What is wrong, each once: an object is not found wanting because of what is wrong inside of it."""
    details = error.errors(include_url=False, include_input=False)
    inner = {found["loc"][:depth] for found in details for depth in range(len(found["loc"]))}
    return [
        Fault(found["loc"], found["type"] == "missing", _sentence(found["type"], found["msg"], found.get("ctx", {})))
        for found in details
        if found["loc"] not in inner
    ]


def _sentence(kind: str, message: str, context: dict[str, Any]) -> str:
    match kind:
        case "union_tag_invalid":
            return f"The field {context['discriminator']} should be one of {context['expected_tags']}"
        case "union_tag_not_found":
            return f"Needs the field {context['discriminator']}"
        case "extra_forbidden":
            return "Unknown field"
        case "value_error":
            return str(context["error"]).removesuffix(".")
    return message


def _named(fault: Fault) -> str:
    where = ".".join(str(part) for part in fault.location[1:])  # the first part is the policy that was chosen
    return f"{where}: {fault.sentence}" if where else fault.sentence
