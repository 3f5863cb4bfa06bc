"""A policy whose package is not installed: kept where it was accepted before, refused where it comes from outside."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from gns_controller.core.errors import InvalidInputError, PolicyPlugInError
from gns_controller.core.policies import (
    KEEP_UNKNOWN,
    HoldPolicyConfig,
    UnavailablePolicyConfig,
    check_policy,
    decide,
    initial_state,
)
from gns_controller.core.policies.parsing import read_policy
from gns_controller.core.replay import replay
from gns_controller.core.runs import Control, RunSpecification
from tests.gns_controller.core.measurements import measurement, reading

DOCUMENT = {"policy": "tide", "estimator": "split", "phase": [1, 2.5, None], "warmup": {"samples": 3, "steps": None}}
RUN = {"batch": {"global_batch_size": 16, "micro_batch_size": 8}, "data_parallel_size": 2, "budget_samples": 1000}


def stored(**changes: Any) -> RunSpecification:
    text = json.dumps({**RUN, "policy": DOCUMENT, **changes})
    return RunSpecification.model_validate_json(text, context=KEEP_UNKNOWN)


def test_what_comes_from_outside_is_refused_with_the_policies_there_are() -> None:
    with pytest.raises(InvalidInputError, match=r"The field 'policy' should be one of 'hold', .*'goodput'\.$"):
        read_policy(json.dumps(DOCUMENT))
    with pytest.raises(ValidationError, match="expected tags: 'hold'"):
        RunSpecification.model_validate({**RUN, "policy": DOCUMENT})
    with pytest.raises(ValidationError, match="Extra inputs"):
        stored(policy={"policy": "hold", "phase": 1})  # a built-in policy is never kept as it came


def test_what_was_accepted_before_is_written_as_it_came() -> None:
    run = stored()
    assert isinstance(run.policy, UnavailablePolicyConfig)
    assert json.loads(run.model_dump_json())["policy"] == DOCUMENT
    assert json.loads(run.policy.model_dump_json()) == DOCUMENT
    assert run.policy.model_dump(mode="json") == DOCUMENT
    assert list(json.loads(run.policy.model_dump_json())) == list(DOCUMENT)
    assert stored() == run
    assert stored(policy={**DOCUMENT, "phase": []}) != run
    control = Control(policy=run.policy, policy_revision=3, override=None)
    assert Control.model_validate_json(control.model_dump_json(), context=KEEP_UNKNOWN) == control


def test_no_limit_of_a_policy_is_checked_where_the_policy_is_not_there() -> None:
    coupled = {**RUN["batch"], "learning_rate_coupling": "seesaw"}  # type: ignore[dict-item]
    check_policy(stored(batch=coupled).policy, stored().facts)
    check_policy(stored(batch={**RUN["batch"], "learning_rate_coupling": "adascale"}).policy, stored().facts)  # type: ignore[dict-item]


def test_nothing_decides_in_its_place() -> None:
    run = stored()
    state = initial_state(run.batch, data_parallel_size=2)
    one = measurement(10, reading(noise_scale=9.0))
    with pytest.raises(PolicyPlugInError, match=r"policy 'tide' is not built in.* Install the one that does"):
        decide(run.policy, state, one, facts=run.facts)
    with pytest.raises(PolicyPlugInError):
        replay(run, [one])
    assert [decision.policy for decision in replay(run, [one], policy=HoldPolicyConfig())] == ["hold"]
