"""Commands that speak to a running controller, and replay of what they exported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from gns_controller.cli.console import ahead_text, savings_text
from gns_controller.cli.main import app
from gns_controller.core.policies import NoiseScalePolicyConfig
from gns_controller.recordings import read_recording
from tests.gns_controller.running_service import Server, registration, report

pytestmark = pytest.mark.slow

STAGES = {"policy": "stages", "stages": [{"from_samples": 100, "global_batch_size": 64}]}


def cli(server: Server, *arguments: str) -> tuple[int, str, str]:
    return typed(*arguments, "--url", server.url)


def typed(*arguments: str) -> tuple[int, str, str]:
    """As a person types it, in this process: exit code, standard output, standard error."""
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.stdout, done.stderr


def register(server: Server, **changes: Any) -> None:
    server.http.put("/api/v1/runs/run", json=registration(**changes)).raise_for_status()


def post(server: Server, *reports: dict[str, Any]) -> None:
    server.http.post("/api/v1/runs/run/measurements", json={"measurements": list(reports)}).raise_for_status()


def test_an_operator_pins_holds_and_releases(server: Server) -> None:
    register(server)
    code, output, _ = cli(server, "run", "override", "run", "--pin", "32", "--note", "no memory", "--json")
    view = json.loads(output)
    assert (code, view["policy_revision"]) == (0, 1)
    assert view["override"] == {"kind": "pin", "global_batch_size": 32, "note": "no memory"}
    code, output, _ = cli(server, "run", "policy", "run")
    assert code == 0
    assert "pin 32 samples (no memory)" in output
    cli(server, "run", "override", "run", "--hold", "--note", "\x1b]0;owned\x07 größer \x9b2J")
    assert "hold (\\x1b]0;owned\\x07 größer \\x9b2J)" in cli(server, "run", "policy", "run")[1]
    assert cli(server, "run", "override", "run", "--hold")[0] == 0
    assert cli(server, "run", "override", "run", "--release", "--note", "done")[0] == 0
    items = server.http.get("/api/v1/runs/run/controls").json()["items"]
    assert [item["action"] for item in items] == ["registered", "override", "override", "override", "release"]
    assert items[-1]["note"] == "done"
    code, _, errors = cli(server, "run", "override", "run", "--release")
    assert (code, errors.count("\n")) == (1, 1)
    assert "no override" in errors
    code, _, errors = cli(server, "run", "override", "run", "--pin", "17")
    assert code == 1
    assert "Nearest reachable: 16 or 18" in errors


@pytest.mark.parametrize("options", [[], ["--hold", "--release"], ["--pin", "4", "--hold"], ["--pin", "0"]])
def test_an_override_is_exactly_one_thing(options: list[str]) -> None:
    assert CliRunner().invoke(app, ["run", "override", "run", *options]).exit_code == 2


def test_an_operator_changes_fields_and_whole_policies(server: Server) -> None:
    register(server)
    changed = ["--set", "noise_tolerance=0.25", "--set", "dwell.samples=500", "--set", "decay=freeze"]
    code, output, _ = cli(server, "run", "policy", "run", *changed, "--set", "growth_cap=9", "--json")
    policy = json.loads(output)["policy"]
    assert code == 0
    assert (policy["noise_tolerance"], policy["dwell"]["samples"], policy["decay"]) == (0.25, 500, "freeze")
    assert policy["growth_cap"] == 9

    (server.directory / "policy.toml").write_text('policy = "noise_scale"\nestimator = "rank_variance"\n')
    code, output, _ = cli(server, "run", "policy", "run", "--file", str(server.directory / "policy.toml"), "--json")
    policy = json.loads(output)["policy"]
    assert (policy["noise_tolerance"], policy["dwell"], policy["growth_cap"]) == (
        NoiseScalePolicyConfig().noise_tolerance,
        None,
        4.0,
    )

    code, output, _ = cli(server, "run", "policy", "run", "--file", json.dumps(STAGES), "--note", "by hand")
    assert code == 0
    assert "stages" in output
    for wrong, sentence in (
        (["--set", "deadband=7"], "/deadband"),
        (["--set", "deadband"], "field=value"),
        (["--file", "nowhere.toml"], "cannot be read"),
        (["--file", '{"policy": "nothing"}'], "not a policy"),
        (["--set", "policy=grow_up"], "'policy' should be one of 'hold', 'stages', 'linear_ramp'"),
        (["--set", "policy=linear_ramp"], "global_batch_size"),
        (["--set", "policy=linear_ramp", "--set", "global_batch_size=64"], "give either ramp_samples or ramp_tokens"),
    ):
        code, _, errors = cli(server, "run", "policy", "run", *wrong)
        assert code in (1, 2)
        assert sentence in errors
        assert errors.count("\n") == 1


def test_null_is_null_in_a_file_and_the_default_in_a_change(server: Server) -> None:
    """The published rule as docs/reference/closed-loop-policies.md prints it."""
    register(server)
    page = (Path(__file__).parents[3] / "docs/reference/closed-loop-policies.md").read_text()
    [printed] = re.findall(r'```json\n(.*"growth_cap": null.*)\n```', page)
    code, output, errors = cli(server, "run", "policy", "run", "--file", printed, "--json")
    assert (code, errors) == (0, "")
    assert json.loads(output)["policy"] == NoiseScalePolicyConfig.published().model_dump(mode="json")
    changes = ["--set", "growth_cap=null", "--set", "dwell=null"]
    code, output, errors = cli(server, "run", "policy", "run", *changes, "--json")
    assert code == 0
    assert errors == "growth_cap is back at its default, 4.0\ndwell is back at its default, none\n"
    assert json.loads(output)["policy"]["growth_cap"] == 4.0


def test_a_mistyped_pin_is_told_what_is_left(server: Server) -> None:
    register(server, budget_samples=12_000)
    code, _, errors = cli(server, "run", "override", "run", "--pin", "102400")
    assert (code, errors.count("\n")) == (1, 1)
    assert "102400" in errors
    assert "12000" in errors


def test_guards_that_another_policy_leaves_out_are_named(server: Server) -> None:
    """Not those that were at their defaults, like the growth_cap of noise_scale, and not those that are set again."""
    register(server)
    guards = ["maximum_batch_size=128", "dwell.samples=500", "decay=freeze", "minimum_batch_size=4", "deadband=0.25"]
    code, _, errors = cli(server, "run", "policy", "run", *(word for guard in guards for word in ("--set", guard)))
    assert (code, errors) == (0, "")
    document = json.dumps({**STAGES, "minimum_batch_size": 8})
    code, _, errors = cli(server, "run", "policy", "run", "--file", document, "--json")
    assert code == 0
    named = 'dwell {"steps": null, "samples": 500}, deadband 0.25, maximum_batch_size 128, decay freeze'
    assert errors == f"no longer set: {named}\n"
    code, _, errors = cli(server, "run", "policy", "run", "--set", "policy=hold")
    assert (code, errors) == (0, "no longer set: minimum_batch_size 8\n")


@pytest.mark.parametrize("command", [["replay", "history.csv", "--policy"], ["run", "policy", "run", "--file"]])
def test_the_bare_name_of_a_policy_is_told_what_to_write(command: list[str]) -> None:
    code, _, errors = typed(*command, "grow_once")
    assert (code, errors.count("\n")) == (2, 1)
    assert """'grow_once' is neither JSON nor a file; write '{"policy": "grow_once"}'.""" in errors
    assert typed(*command, "fastest")[2].endswith("'fastest' is neither JSON nor a file.\n")


@pytest.mark.parametrize("url", ["127.0.0.1:8123", "localhost:8123", "", "http://", "ftp://127.0.0.1"])
def test_an_address_without_its_scheme_is_one_sentence(url: str) -> None:
    code, _, errors = typed("run", "ls", "--url", url)
    assert (code, errors.count("\n")) == (2, 1)
    assert "is not an address like http://127.0.0.1:8000" in errors


def test_a_run_is_shown_as_an_operator_reads_it(server: Server) -> None:
    """1024 samples are left: 64 steps of the present 16, 16 of the 64 that the stage at 512 samples begins."""
    register(
        server, budget_samples=1536, policy={**STAGES, "stages": [{"from_samples": 1024, "global_batch_size": 64}]}
    )
    assert "steps left       -" in cli(server, "run", "show", "run")[1]
    post(server, report(32, samples=512))
    code, output, _ = cli(server, "run", "show", "run")
    schedule = server.http.get("/api/v1/runs/run/schedule").json()["projection"]
    left, stage = schedule["steps_left"], schedule["stages"][-1]
    assert (code, stage["global_batch_size"]) == (0, 64)
    assert f"steps left       {left['expected']}\n" in output
    assert f"ahead            64 samples from {stage['samples_seen']} on\n" in output
    cli(server, "run", "override", "run", "--pin", "32", "--note", "try \x1b[2J")
    output = cli(server, "run", "show", "run")[1]
    assert "override         pin 32 samples (try \\x1b[2J)\n" in output


def test_the_ramp_ahead_names_its_interval_and_its_ends() -> None:
    def stage(samples: int, batch: int, low: int) -> dict[str, int]:
        return {"samples_seen": samples, "global_batch_size": batch, "low": low, "high": 9000}

    doubling = [stage(100 * n, 16 * 2**n, 16) for n in range(8)]
    widened = [stage(0, 16, 16), stage(50, 16, 8), *doubling[1:]]
    steps = {"expected": 196, "least": 196, "most": 240}
    left, ahead = ahead_text({"steps_left": steps, "stages": widened})
    assert left == "196 (196 to 240)"
    assert ahead == "32 samples from 100 on, 64 from 200, 128 from 300, 256 from 400, ... 2048 from 700"
    assert ahead_text({"steps_left": {**steps, "most": 196}, "stages": doubling[:1]}) == ("196", "no change")
    assert ahead_text(None) == ("-", "-")


def test_the_last_decision_of_a_finished_run_is_about_a_measurement(server: Server) -> None:
    """The report at the end of a run holds no reading, and what is decided on it says only that."""
    register(server, budget_samples=1600)
    post(server, report(50, samples=800, noise_scale=1.0), {**report(100, samples=1600), "readings": []})
    decisions = [item["decision"] for item in server.http.get("/api/v1/runs/run/decisions").json()["items"]]
    assert [decision["reason"] for decision in decisions][1] == "hold_no_reading"
    assert cli(server, "run", "ls")[1].splitlines()[1].split()[-2:] == ["16", "-"]
    output = cli(server, "run", "show", "run")[1]
    assert f"last decision    {decisions[0]['explanation']}\n" in output
    assert "steps left       0\n" in output
    said = "this run is finished: it holds for its next attempt\n"
    for word in (["override", "run", "--pin", "32"], ["policy", "run", "--set", "deadband=0.5"]):
        code, output, errors = cli(server, "run", *word)
        assert (code, errors) == (0, said), word
    assert cli(server, "run", "policy", "run")[2] == "", "nothing was said"


def test_replay_of_what_ran_counts_the_operator_commands(server: Server) -> None:
    register(server)
    post(server, report(1, noise_scale=1.0))
    path = server.directory / "run.jsonl"
    for num_commands, commands in enumerate(("no operator commands", "1 operator command", "2 operator commands")):
        if num_commands:
            cli(server, "run", "policy", "run", "--set", f"deadband=0.{num_commands}")
            post(server, report(1 + num_commands, noise_scale=1.0))
        path.write_text(cli(server, "run", "export", "run")[1])
        for code, output, _ in (cli(server, "replay", "run"), typed("replay", str(path))):
            assert code == 0
            assert (f", as it ran, {commands}\n" in output) == (num_commands > 0)
    asked = cli(server, "replay", "run", "--policy", '{"policy": "hold"}')[1]
    assert "operators" not in asked, "left out of what another policy is asked"


def test_no_time_saved_has_no_sign() -> None:
    savings = {"steps_saved": 0, "constant_steps": 5, "constant_batch_size": 16, "seconds_saved": -0.3}
    assert savings_text(savings) == "0 of 5 at 16 samples, 0 seconds"


def test_an_exported_run_is_replayed_elsewhere_as_its_controller_replays_it(server: Server) -> None:
    register(server, policy={"policy": "noise_scale", "estimator": "rank_variance", "monotone": False})
    post(server, *(report(step, noise_scale=3.0 * step, loss=float("nan")) for step in range(1, 8)))
    cli(server, "run", "override", "run", "--pin", "64")
    batch = {"batch": 64, "micro_batch_size": 32}
    post(server, report(8, samples=128), report(9, samples=192, **batch))
    register(server, policy={"policy": "noise_scale", "estimator": "rank_variance", "monotone": False},
             incarnation="incarnation-1", resume_step=4)  # fmt: skip
    cli(server, "run", "override", "run", "--release")
    post(server, report(5, attempt=1, noise_scale=2.0), report(6, attempt=1, noise_scale=2.0))
    cli(server, "run", "policy", "run", "--set", "deadband=0.5")

    code, exported, _ = cli(server, "run", "export", "run")
    assert code == 0
    path = server.directory / "run.jsonl"
    path.write_text(exported)
    assert read_recording(path).policy_revision == 3
    asked = json.dumps(STAGES)
    for options in ([], ["--policy", asked], ["--policy", asked, "--follow-trainer"]):
        here = typed("replay", str(path), *options, "--json")
        there = cli(server, "replay", "run", *options, "--json")
        assert here[0] == there[0] == 0
        assert json.loads(here[1]) == json.loads(there[1])
        if not options:
            answer = json.loads(here[1])
            assert (answer["num_compared"], answer["num_equal"]) == (11, 11)

    code, table, _ = typed("replay", str(path), "--policy", asked)
    assert code == 0
    assert "happened  replayed  reason" in table
    assert "saved" in table
    assert "as recorded" not in table, "another policy was asked"
    assert "11 of 11 as recorded, bit for bit" in typed("replay", str(path))[1]

    lines = exported.splitlines()
    lines[3] = lines[3].replace('"reason":"', '"reason":"hold","explanation":"altered","reason":"', 1)
    altered = json.loads(lines[3])
    altered["decision"]["explanation"] = "altered"
    lines[3] = json.dumps(altered)
    path.write_text("\n".join(lines))
    code, _, errors = typed("replay", str(path))
    assert code == 1
    assert "not repeated" in errors
    code, _, errors = typed("replay", str(path), "--batch-size", "32")
    assert code == 2
    assert "specification of its own" in errors


def table(folder: Path) -> None:
    rows = ["step,samples,batch_size,gns"]
    rows += [f"{step},{64 * step},64,{10.0 * step}" for step in range(10, 110, 10)]
    (folder / "history.csv").write_text("\n".join(rows))


def test_a_table_is_replayed_with_what_its_first_rows_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """noise_scale / 0.25 = 40 * step samples: 400 at the first row, floored to whole passes of 64."""
    table(tmp_path)
    monkeypatch.chdir(tmp_path)
    policy = '{"policy": "noise_scale", "noise_tolerance": 0.5, "growth_cap": null}'
    columns = "optimizer_step=step,samples_seen=samples,global_batch_size=batch_size,noise_scale=gns"
    arguments = ["replay", "history.csv", "--policy", policy, "--columns", columns, "--format", "csv"]
    code, output, errors = typed(*arguments, "--json")
    assert code == 0, errors
    answer = json.loads(output)
    assert [row["replayed_batch_size"] for row in answer["rows"]] == [400 * k // 64 * 64 for k in range(1, 11)]
    assert answer["policy"]["noise_beta"] == answer["policy"]["signal_beta"] == 0
    assert answer["policy"]["estimator"] == "rank_variance"
    assert errors.count("holds averages") == 1
    assert answer["num_compared"] == 0
    assert answer["happened_steps"] == 100

    kept = '{"policy": "noise_scale", "noise_beta": 0.5, "signal_beta": 0.5}'
    answer = json.loads(typed("replay", "history.csv", "--policy", kept, "--json")[1])
    assert answer["policy"]["noise_beta"] == 0.5

    options = ["--batch-size", "32", "--micro-batch-size", "8", "--data-parallel-size", "2", "--budget-samples", "9999"]
    code, output, _ = typed(*arguments, *options)
    assert code == 0
    assert "none were recorded" in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["history.csv"], "give --policy"),
        (["history.csv", "--policy", "{"], "no JSON document"),
        (["history.csv", "--policy", '{"policy": "hold"}', "--columns", "step"], "ours=theirs"),
        (["history.csv", "--policy", '{"policy": "hold"}', "--format", "excel"], "no format"),
        (["history.csv", "--policy", '{"policy": "hold"}', "--batch-size", "65"], "Nearest reachable"),
        (["history.csv", "--policy", '{"policy": "hold", "geometry": "sign", "deadband": -1}'], "deadband"),
        (["nowhere.csv", "--policy", '{"policy": "hold"}'], "does not exist"),
        (["nobody", "--batch-size", "8"], "names a run"),
    ],
)
def test_what_cannot_be_replayed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    table(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["replay", *arguments])
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_run_of_nobodys_controller_is_one_sentence() -> None:
    code, _, errors = typed("replay", "nobody", "--url", "http://127.0.0.1:1")
    assert (code, errors.count("\n")) == (1, 1)
    assert "no controller answers" in errors


def test_an_export_follows_its_pages(server: Server) -> None:
    """More measurements than a page holds, and a control between them."""
    register(server)
    for first in range(1, 1101, 100):
        post(server, *(report(step, noise_scale=1.0) for step in range(first, first + 100)))
        if first == 1001:
            cli(server, "run", "override", "run", "--hold")
    code, exported, _ = cli(server, "run", "export", "run")
    assert code == 0
    lines = [json.loads(line) for line in exported.splitlines()]
    assert [line["kind"] for line in lines] == ["run", "control"] + ["measurement"] * 1100 + ["control"]
    assert [line["sequence"] for line in lines[1:]] == sorted(line["sequence"] for line in lines[1:])


def test_a_controller_of_another_version_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = httpx.Response(200, json={"items": [], "next_cursor": None, "rows": "none"})
    monkeypatch.setattr(httpx.Client, "request", lambda *_, **__: answer)
    code, _, errors = typed("replay", "run")
    assert (code, errors.count("\n")) == (1, 1)
    assert "another version" in errors


@pytest.mark.parametrize(
    "command", [["run", "ls"], ["run", "policy", "r"], ["run", "export", "r"], ["replay", "r" * 999]]
)
def test_a_server_of_somebody_else_is_one_sentence(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setattr(httpx.Client, "request", lambda *_, **__: httpx.Response(200, json={"hello": [{}]}))
    code, _, errors = typed(*command)
    assert (code, errors.count("\n")) == (1, 1)
    assert "another version" in errors
