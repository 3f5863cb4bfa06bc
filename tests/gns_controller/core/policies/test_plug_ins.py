"""Policies of other packages: really installed, beside a broken package, and gone again."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.gns_controller.running_service import Server, registration, report, run_cli

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[4]
PAGE = (ROOT / "docs" / "guide" / "policy-plug-in.md").read_text()
POLICY = {"policy": "noise_share", "estimator": "rank_variance", "share": 1.0}
RUN = "/api/v1/runs/run"

BROKEN = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools>=61"]
build-backend = "setuptools.build_meta"

[project]
name = "broken-policies"
version = "0.2"

[project.entry-points."gns_controller.policies"]
crashes = "broken_policies:Crashes"
returns_nothing = "broken_policies:ReturnsNothing"
refuses_nothing = "broken_policies:ChecksBadly"
idle = "broken_policies:Idle"
renamed = "broken_policies:Crashes"
not_a_policy = "broken_policies:NotAPolicy"
not_there = "broken_policies:Missing"
not_importable = "broken_import:Policy"
not_describable = "broken_policies:NotDescribable"
noise_scale = "broken_policies:Idle"

[tool.setuptools]
py-modules = ["broken_policies", "broken_import"]
""",
    "broken_import.py": "raise RuntimeError('/home/somebody/secret')\n",
    "broken_policies.py": """
from collections.abc import Callable
from typing import Literal

from gns_controller.core.policies import PolicyConfig

class NotAPolicy:
    pass

class Crashes(PolicyConfig):
    policy: Literal["crashes"] = "crashes"

    def propose(self, situation):
        raise KeyError("/home/somebody/secret")

class ReturnsNothing(PolicyConfig):
    policy: Literal["returns_nothing"] = "returns_nothing"

    def propose(self, situation):
        return None

class ChecksBadly(PolicyConfig):
    policy: Literal["refuses_nothing"] = "refuses_nothing"

    def check(self, facts):
        raise KeyError("/home/somebody/secret")

    def propose(self, situation):
        return None

class Idle(PolicyConfig):
    policy: Literal["idle"] = "idle"

class NotDescribable(PolicyConfig):
    policy: Literal["not_describable"] = "not_describable"
    rule: Callable[[], int] = int

    def propose(self, situation):
        return None
""",
}


class Site(NamedTuple):
    """A folder that packages were installed into."""

    folder: Path

    def path(self, *others: Site) -> str:
        """PYTHONPATH with this project and these packages."""
        return os.pathsep.join(map(str, (ROOT, self.folder, *(other.folder for other in others))))


def install(folder: Path, files: dict[str, str]) -> Site:
    """Build and install a distribution, as a user does."""
    source, site = folder / "source", folder / "site"
    source.mkdir()
    for name, text in files.items():
        (source / name).write_text(text)
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    options = ["--quiet", "--no-deps", "--disable-pip-version-check", *isolation, "--target", str(site)]
    command = [sys.executable, "-m", "pip", "install", *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return Site(site)


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The package of the page, word for word."""
    [pyproject] = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    [module] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return install(tmp_path_factory.mktemp("acme"), {"pyproject.toml": pyproject, "acme_policies.py": module})


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return install(tmp_path_factory.mktemp("broken"), BROKEN)


def serving(folder: Path, *, pythonpath: str = str(ROOT)) -> Server:
    server = Server(folder)
    server.environment["PYTHONPATH"] = pythonpath
    return server.start()


def send(server: Server, step: int, **changes: Any) -> Any:
    body = {"measurements": [report(step, **{"noise_scale": 64.0, "samples": step * 16, **changes})]}
    return server.http.post(f"{RUN}/measurements", json=body)


def problem_of(response: Any) -> tuple[int, str, str]:
    body = response.json()
    return response.status_code, body["type"].rpartition(":")[2], body["detail"]


def python(script: str, *, pythonpath: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": pythonpath}
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_plug_in_decides_shows_and_replays_like_a_built_in_policy(acme: Site, tmp_path: Path) -> None:
    server = serving(tmp_path, pythonpath=acme.path())
    try:
        assert server.http.put(RUN, json=registration(policy=POLICY)).status_code == 201
        reply = send(server, 10).json()
        assert (reply["decision"]["policy"], reply["decision"]["reason"]) == ("noise_share", "grow")
        assert reply["plan"]["global_batch_size"] == 64
        view = server.http.get(RUN).json()
        assert view["policy"].items() >= {**POLICY, "warmup": None, "monotone": True}.items()
        assert view["specification"]["policy"] == view["policy"]
        changed = server.http.patch(f"{RUN}/policy", json={"share": 0.5}, headers={"If-Match": "*"})
        assert changed.json()["policy"]["share"] == 0.5
        refused = server.http.patch(f"{RUN}/policy", json={"share": 3, "tide": 1}, headers={"If-Match": "*"})
        assert {error["pointer"] for error in refused.json()["errors"]} == {"/share", "/tide"}
        unknown = server.http.put(f"{RUN}/policy", json={"policy": "tide"}, headers={"If-Match": "*"}).json()
        assert unknown["errors"][0]["detail"].endswith("'goodput', 'noise_share'")
        send(server, 20, noise_scale=500.0, samples=1000, batch=64, plan_version=1, micro_batch_size=32)
        assert server.http.get(f"{RUN}/schedule").json()["projection"]["stages"]
        again = server.http.post(f"{RUN}/replay", json={}).json()
        assert (again["num_equal"], again["num_compared"]) == (2, 2)
        body = {"policy": {**POLICY, "share": 0.75}}
        assert server.http.post(f"{RUN}/replay", json=body).json()["rows"][0]["replayed_batch_size"] == 48
        document = server.http.get("/openapi.json")
        schemas = document.json()["components"]["schemas"]
        named = set(re.findall(r'"#/components/schemas/([^"]+)"', document.text))
        assert named <= set(schemas)
        union = schemas["RunSpecification-Input"]["properties"]["policy"]
        reference = "#/components/schemas/NoiseSharePolicyConfig-Input"
        assert union["discriminator"]["mapping"]["noise_share"] == reference
        assert {"$ref": reference} in union["oneOf"]
        assert "share" in schemas["NoiseSharePolicyConfig-Input"]["properties"]
    finally:
        server.stop()
    assert "policy plug-in: policy=noise_share distribution=acme-policies 1.0" in log_of(server)


def log_of(server: Server) -> str:
    return (server.directory / "controller.log").read_text()


def test_runs_of_a_package_that_is_gone_are_shown_and_nothing_is_decided_or_lost(acme: Site, tmp_path: Path) -> None:
    server = serving(tmp_path, pythonpath=acme.path())
    server.http.put(RUN, json=registration(policy=POLICY))
    server.http.put("/api/v1/runs/other", json=registration())
    send(server, 10)
    server.http.patch(f"{RUN}/policy", json={"share": 0.5}, headers={"If-Match": "*"})
    before = {path: server.http.get(RUN + path).json() for path in ("", "/policy", "/controls", "/decisions")}
    server.stop()

    server = serving(tmp_path)
    try:
        # Everything is shown as it was.
        for path, answer in before.items():
            assert server.http.get(RUN + path).json() == answer, path
        assert {run["run_id"] for run in server.http.get("/api/v1/runs").json()["items"]} == {"run", "other"}
        assert server.http.get(f"{RUN}/schedule").json()["projection"] is None
        assert 'gns_global_batch_size_samples{run_id="run"}' in server.http.get("/metrics").text
        # Nothing is decided: a trainer takes a 503 for an outage, and keeps the measurement.
        answer = send(server, 20)
        sentence = (
            "the policy 'noise_share' is not built in, and no package installed here adds it. Install the one that "
            "does, or choose another policy."
        )
        assert problem_of(answer) == (503, "policy-unavailable", sentence)
        assert "Retry-After" in answer.headers
        assert send(server, 20).status_code == 503
        assert log_of(server).count("measurements wait") == 1
        assert problem_of(server.http.post(f"{RUN}/replay", json={}))[:2] == (503, "policy-unavailable")
        held = server.http.post(f"{RUN}/replay", json={"policy": {"policy": "hold"}}).json()
        assert held["rows"][0]["replayed_batch_size"] == 16
        # What comes from outside is refused, also the registration that was accepted before.
        refused = server.http.put(RUN, json=registration(policy=POLICY, incarnation="incarnation-1"))
        assert refused.json()["errors"][0]["pointer"] == "/specification/policy"
        conflict = server.http.put(RUN, json=registration(incarnation="incarnation-1")).json()
        assert conflict["registered"]["policy"] == before[""]["specification"]["policy"]
        # Exports hold the whole run, and replay with another policy.
        code, exported, _ = run_cli("run", "export", "run", "--url", server.url, folder=tmp_path)
        assert code == 0
        (tmp_path / "run.jsonl").write_text(exported)
        assert run_cli("replay", "run.jsonl", "--policy", '{"policy": "hold"}', folder=tmp_path)[0] == 0
        code, _, errors = run_cli("replay", "run.jsonl", folder=tmp_path)
        assert (code, errors) == (1, f"gns-controller: {sentence}\n")
        # The other run goes on, and this one, once another policy decides.
        other = server.http.post("/api/v1/runs/other/measurements", json={"measurements": [report(10, run_id="other")]})
        assert other.status_code == 200
        changed = server.http.put(f"{RUN}/policy", json={"policy": "hold"}, headers={"If-Match": "*"})
        assert changed.status_code == 200
        assert send(server, 20).json()["decision"]["policy"] == "hold"
    finally:
        server.stop()

    code, output, _ = run_cli("replay", "run.jsonl", folder=tmp_path, PYTHONPATH=acme.path())
    assert code == 0
    assert "1 of 1 as recorded, bit for bit" in output
    server = serving(tmp_path, pythonpath=acme.path())
    try:
        again = server.http.post(f"{RUN}/replay", json={}).json()
        assert (again["num_equal"], again["num_compared"]) == (2, 2)
    finally:
        server.stop()


def test_broken_package_is_named_and_breaks_no_built_in_policy(acme: Site, broken: Site, tmp_path: Path) -> None:
    server = serving(tmp_path, pythonpath=acme.path(broken))
    try:
        assert server.http.put("/api/v1/runs/other", json=registration()).status_code == 201
        for name, sentence in {
            "idle": "cannot be used: broken_policies:Idle does not implement propose",
            "renamed": "cannot be used: broken_policies:Crashes needs the field policy: Literal['renamed'] = "
            "'renamed', the name of its entry point",
            "not_a_policy": "cannot be used: broken_policies:NotAPolicy is not a class derived from PolicyConfig",
            "not_there": "cannot be loaded: AttributeError in its code",
            "not_importable": "cannot be loaded: RuntimeError in its code",
            "not_describable": "cannot be loaded: PydanticInvalidForJsonSchema in its code",
        }.items():
            refused = server.http.put(RUN, json=registration(policy={"policy": name}))
            assert refused.status_code == 422
            [error] = refused.json()["errors"]
            assert error["pointer"] == "/specification/policy"
            assert error["detail"] == f"the policy {name!r} of broken-policies 0.2 {sentence}"
        refused = server.http.put(RUN, json=registration(policy={"policy": "refuses_nothing"})).json()
        assert refused["errors"][0]["detail"] == (
            "the policy 'refuses_nothing' of broken-policies 0.2 failed where it checks a run: KeyError"
        )
        assert server.http.put(RUN, json=registration(policy=POLICY)).status_code == 201  # another package's
        for name, sentence in {
            "crashes": "the policy 'crashes' of broken-policies 0.2 failed where it proposes a batch.",
            "returns_nothing": "the policy 'returns_nothing' of broken-policies 0.2 did not return a Proposal",
        }.items():
            server.http.put(
                f"{RUN}/policy", json={"policy": name, "estimator": "rank_variance"}, headers={"If-Match": "*"}
            )
            status, kind, detail = problem_of(send(server, 10))
            assert (status, kind) == (503, "policy-unavailable")
            assert detail.startswith(sentence)
            assert "secret" not in detail
        for path in (RUN, f"{RUN}/schedule", "/metrics", "/openapi.json"):
            assert server.http.get(path).status_code == 200, path
        body = {"measurements": [report(10, run_id="other")]}
        assert server.http.post("/api/v1/runs/other/measurements", json=body).status_code == 200
    finally:
        server.stop()
    assert "KeyError: '/home/somebody/secret'" in log_of(server)


def test_doctor_lists_the_policies_of_other_packages_and_what_is_wrong_with_them(
    acme: Site, broken: Site, tmp_path: Path
) -> None:
    def finding(pythonpath: str) -> dict[str, Any]:
        _, output, errors = run_cli("doctor", "--json", folder=tmp_path, PYTHONPATH=pythonpath)
        assert "Traceback" not in errors
        [found] = [entry for entry in json.loads(output) if entry["name"] == "policies"]
        return dict(found)

    assert finding(str(ROOT)) == {
        "name": "policies",
        "ok": True,
        "detail": "11 built in, from other packages: none",
    }
    assert finding(acme.path())["detail"].endswith("from other packages: noise_share (acme-policies 1.0)")
    worse = finding(acme.path(broken))
    assert not worse["ok"]
    for part in (
        "noise_share (acme-policies 1.0)",
        "broken-policies 0.2 adds a policy 'noise_scale', which is the name of a built-in policy",
        "the policy 'not_importable' of broken-policies 0.2 cannot be loaded: RuntimeError in its code. "
        "RuntimeError: /home/somebody/secret",
    ):
        assert part in worse["detail"]


def test_two_packages_with_one_name_are_both_left_out(acme: Site, tmp_path: Path) -> None:
    copy = BROKEN["pyproject.toml"].replace("broken-policies", "more-policies").replace("crashes =", "noise_share =")
    more = install(tmp_path, {**BROKEN, "pyproject.toml": copy})
    script = """
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies.parsing import read_policy
try:
    read_policy('{"policy": "noise_share"}')
except InvalidInputError as error:
    print(error)
print(read_policy('{"policy": "noise_scale"}').policy)
"""
    output = python(script, pythonpath=acme.path(more), folder=tmp_path)
    assert "acme-policies 1.0 and more-policies 0.2 both add a policy 'noise_share', so neither is used" in output
    assert output.endswith("\nnoise_scale\n")


def test_trainer_folds_a_plug_in_that_is_loaded_once_it_is_named(acme: Site, tmp_path: Path) -> None:
    script = """
import sys
import torch
from gns_controller.core.policies.parsing import read_policy
from gns_controller.core.runs import RunSpecification
from trainer_hooks import AdaptiveBatch, ConnectionOptions
read_policy('{"policy": "hold"}')
assert "acme_policies" not in sys.modules

torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
decisions = []
session = AdaptiveBatch.attach(
    model, torch.optim.SGD(model.parameters(), lr=1e-3), run="run", global_batch_size=8, micro_batch_size=4,
    budget_samples=800, policy={"policy": "noise_share", "share": 0.9},
    connection=ConnectionOptions(on_decision=lambda decision, source: decisions.append(decision)),
)
assert type(session.specification.policy).__module__ == "acme_policies"
for step in session.steps(torch.randn(64, 5)):
    for rows in step:
        step.backward((model(rows[:, :4]) - rows[:, 4:]).square().mean())
    step.apply()
assert {decision.policy for decision in decisions} == {"noise_share"}
own = ("of the noise scale", "the noise scale is not resolved yet")
print(any(sentence in decision.explanation for decision in decisions for sentence in own))
"""
    assert python(script, pythonpath=acme.path(), folder=tmp_path) == "True\n"
