"""The trainer's own fold follows the control in force, also through an outage."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from gns_controller.core.contract import Override
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import HoldPolicyConfig, NoiseScalePolicyConfig
from gns_controller.core.runs import Control
from tests.gns_controller.core.measurements import measurement, reading
from tests.gns_controller.running_service import Service
from tests.trainer_hooks.client.test_http import Wire, client_for, refuse, specification
from trainer_hooks.client import HttpController, control_from, saved_control

PIN = {"kind": "pin", "global_batch_size": 128, "note": ""}
HOLD = HoldPolicyConfig().model_dump(mode="json")


@pytest.fixture
def service(tmp_path: Path) -> Any:
    service = Service(f"sqlite:///{tmp_path / 'gns.db'}")
    yield service
    service.close()


def answering(service: Any, **control: Any) -> Any:
    """The application's answers, as if an operator had changed the control."""

    def answer(request: httpx.Request) -> httpx.Response:
        response = service.transport.handle_request(request)
        body = {**json.loads(response.content), **control}
        return httpx.Response(response.status_code, json=body, request=request)

    return answer


def decided_locally(client: HttpController, step: int) -> Any:
    client.report(measurement(step, reading(noise_scale=8.0)))
    verdict = client.verdict(optimizer_step=step, deadline_seconds=3600)
    assert verdict.source == "local"
    return verdict.decision


def test_pin_holds_through_an_outage_and_its_release_comes_with_the_next_answer(service: Any, tmp_path: Path) -> None:
    wire = Wire(service.transport)
    wire.instead = answering(service, policy=HOLD, policy_revision=2, override=PIN)
    client = client_for(wire, tmp_path)
    client.wait_registered(deadline_seconds=10)
    client.report(measurement(100, reading(noise_scale=8.0)))
    client.verdict(optimizer_step=100, deadline_seconds=10)
    wire.instead = refuse
    for step in (200, 300):
        # The outage is noticed with the first report: a deadline of an hour shows that nothing waits for more.
        decision = decided_locally(client, step)
        assert (decision.reason, decision.policy_revision, decision.policy) == ("override", 2, "hold")
        assert decision.plan.global_batch_size == 128
    wire.instead = answering(service, policy=HOLD, policy_revision=3, override=None)
    client.close(deadline_seconds=10)
    assert client.control == Control(policy=HoldPolicyConfig(), policy_revision=3, override=None)


def test_reply_to_the_registration_already_carries_the_control(service: Any, tmp_path: Path) -> None:
    wire = Wire(service.transport)
    wire.instead = answering(service, policy=HOLD, policy_revision=4, override=PIN)
    client = client_for(wire, tmp_path)
    client.wait_registered(deadline_seconds=10)
    wire.instead = refuse
    assert decided_locally(client, 100).reason == "override"
    client.close(deadline_seconds=10)


def test_without_operator_commands_the_policy_of_the_specification_stays(service: Any, tmp_path: Path) -> None:
    client = client_for(Wire(service.transport), tmp_path)
    client.wait_registered(deadline_seconds=10)
    client.report(measurement(100, reading(noise_scale=8.0)))
    client.verdict(optimizer_step=100, deadline_seconds=10)
    assert client.control == Control.initial(specification().policy)
    client.close(deadline_seconds=10)


def test_resume_without_an_answer_follows_the_control_of_the_checkpoint(tmp_path: Path) -> None:
    pin = Override(kind="pin", global_batch_size=128)
    control = Control(policy=HoldPolicyConfig(), policy_revision=5, override=pin)
    kept = json.loads(json.dumps({"orders": saved_control(control)}))
    client = client_for(Wire(httpx.MockTransport(refuse)), tmp_path, control=control_from(kept))
    decision = decided_locally(client, 100)
    assert (decision.reason, decision.policy_revision, decision.plan.global_batch_size) == ("override", 5, 128)
    client.close(deadline_seconds=10)


def test_checkpoint_without_operator_commands_changes_nothing() -> None:
    assert saved_control(Control.initial(HoldPolicyConfig())) is None
    assert control_from(None) is control_from({}) is control_from({"orders": None}) is None


def test_a_fold_never_sees_half_an_answer(service: Any, tmp_path: Path) -> None:
    """Answers come in as fast as they can while the training thread folds: each decision goes by one of them whole."""
    policies = {1: HoldPolicyConfig(), 2: NoiseScalePolicyConfig(monotone=False)}
    client = client_for(Wire(httpx.MockTransport(refuse)), tmp_path)
    ended = threading.Event()

    def command() -> None:
        while not ended.is_set():
            for revision, policy in policies.items():
                override = Override(kind="pin", global_batch_size=64 * revision)
                client._local.control = Control(policy=policy, policy_revision=revision, override=override)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    commander = threading.Thread(target=command)
    commander.start()
    try:
        seen = set()
        for step in range(100, 40_100, 100):
            decision = decided_locally(client, step)
            if decision.policy_revision:
                seen.add(decision.policy_revision)
                assert decision.policy == policies[decision.policy_revision].policy
                assert decision.plan.global_batch_size == 64 * decision.policy_revision
        assert seen == {1, 2}
    finally:
        sys.setswitchinterval(switch)
        ended.set()
        commander.join()
        client.close(deadline_seconds=10)


def test_policy_that_is_not_installed_leaves_local_decisions_to_the_one_before(
    service: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator may set a policy of a package that the controller has and this trainer has not."""
    wire = Wire(service.transport)
    wire.instead = answering(service, policy={"policy": "tide", "phase": 1}, policy_revision=2, override=PIN)
    client = client_for(wire, tmp_path)
    client.wait_registered(deadline_seconds=10)
    client.report(measurement(100, reading(noise_scale=8.0)))
    assert client.verdict(optimizer_step=100, deadline_seconds=10).source == "controller"
    pin = Override(kind="pin", global_batch_size=128)
    assert client.control == Control(policy=specification().policy, policy_revision=2, override=pin)
    wire.instead = answering(service, policy={"policy": "tide", "phase": 1}, policy_revision=3, override=None)
    client.report(measurement(200, reading(noise_scale=8.0)))
    client.verdict(optimizer_step=200, deadline_seconds=10)
    wire.instead = refuse
    decision = decided_locally(client, 300)
    assert (decision.policy, decision.policy_revision) == (specification().policy.policy, 3)
    client.close(deadline_seconds=10)
    assert caplog.text.count("local decisions keep the policy before") == 2
    with pytest.raises(InvalidInputError, match="The field 'policy' should be one of"):
        control_from({"orders": {"policy": {"policy": "tide"}, "policy_revision": 2, "override": None}})


def test_service_and_trainer_fold_alike_after_operator_commands(service: Any, tmp_path: Path) -> None:
    """The real routes: what the trainer decides alone after the pin is what the service decides from its spool."""
    wire = Wire(service.transport)
    client = client_for(wire, tmp_path)
    client.wait_registered(deadline_seconds=10)
    path = "/api/v1/runs/run"
    etag = service.client.get(f"{path}/policy").headers["etag"]
    changed = service.client.patch(f"{path}/policy", json={"noise_tolerance": 0.25}, headers={"If-Match": etag})
    assert changed.status_code == 200
    pinned = service.client.post(f"{path}/override", json=PIN, headers={"If-Match": changed.headers["etag"]})
    assert pinned.status_code == 200
    client.report(measurement(100, reading(noise_scale=8.0)))
    assert client.verdict(optimizer_step=100, deadline_seconds=10).decision.reason == "override"
    assert client.control.policy_revision == 2
    wire.instead = refuse
    local = [decided_locally(client, step) for step in (200, 300)]
    wire.instead = None
    client.close(deadline_seconds=10)
    items = service.client.get(f"{path}/decisions").json()["items"]
    decided = {item["decision"]["optimizer_step"]: item["decision"] for item in items}
    for decision in local:
        expected = json.loads(decision.model_dump_json())
        assert decided[decision.optimizer_step] == expected
