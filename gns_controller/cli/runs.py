"""The commands about runs: over HTTP, but for replays of recordings."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gns_controller.cli.console import (
    EXIT_WRONG,
    AsJson,
    ahead_text,
    batch_in_force,
    leave,
    noise_scale_text,
    override_text,
    print_json,
    savings_text,
    sentences,
)
from gns_controller.core.errors import InvalidInputError

if TYPE_CHECKING:
    from gns_controller.core.policies import AnyPolicyConfig

run = typer.Typer(help="Runs of a controller, over HTTP.", no_args_is_help=True)

Url = Annotated[str, typer.Option(help="Address of the controller, with scheme.")]
Token = Annotated[
    str, typer.Option(envvar="GNS_TOKEN", help="Bearer token, if the controller asks for one.", show_default=False)
]
RunId = Annotated[str, typer.Argument(help="Name of the run.")]
Note = Annotated[str, typer.Option(help="Why, for the next person who looks; 500 characters.")]


@run.command("ls")
def run_ls(
    url: Url = "http://127.0.0.1:8000",
    token: Token = "",
    limit: Annotated[int, typer.Option(min=1, max=200, help="Most runs, newest first.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first."""
    with sentences():
        from gns_controller.cli.api_client import ControllerClient

        with ControllerClient(url, token) as client:
            page = client.get("/api/v1/runs", limit=limit)
        if as_json:
            print_json(page["items"])
            return
        print(f"{'run':<32} {'state':<10} {'step':>9} {'samples':>12} {'batch':>8}  last decision")
        for item in page["items"]:
            reason = (item["last_decision"] or {}).get("reason", "-")
            if item["state"] == "finished" and reason == "hold_no_reading":  # of the report at the end of the run
                reason = "-"
            batch = batch_in_force(item)
            print(
                f"{item['run_id']:<32} {item['state']:<10} {item['optimizer_step']:>9} {item['samples_seen']:>12} "
                f"{batch:>8}  {reason}"
            )


@run.command("export")
def run_export(run_id: RunId, url: Url = "http://127.0.0.1:8000", token: Token = "") -> None:
    """Print a run as JSON lines, for `replay` and for keeping: specification, measurements, decisions, controls."""
    with sentences():
        from gns_controller.cli.api_client import ControllerClient, exported

        try:
            with ControllerClient(url, token) as client:
                for line in exported(client, run_id):
                    sys.stdout.write(line)
                sys.stdout.flush()
        except BrokenPipeError:  # the reader has closed the pipe
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - so that the interpreter's last flush does not fail


@run.command("policy")
def run_policy(
    run_id: RunId,
    file: Annotated[
        str | None, typer.Option(help="Replace it with this document: a JSON or TOML file, or JSON itself.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change one field, like noise_tolerance=0.7 or dwell.samples=5000; null: its default; repeatable.",
        ),
    ] = None,
    note: Note = "",
    url: Url = "http://127.0.0.1:8000",
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Show a run's policy, or change it from the next measurement on."""
    if file is not None and assignments:
        raise typer.BadParameter("give either --file or --set, not both.")
    with sentences():
        from gns_controller.cli.api_client import ControllerClient, run_path

        method = "PATCH" if file is None else "PUT"
        body = _assigned(assignments or []) if file is None else _policy(file).model_dump(mode="json")
        with ControllerClient(url, token) as client:
            if body:
                before = client.get(f"{run_path(run_id)}/policy")["policy"]
                view = client.change(method, run_id, "policy", note=note, body=body)
                notes = _back_at_default(body, view["policy"]) if file is None else []
                if file is not None or view["policy"]["policy"] != before["policy"]:
                    lost = _no_longer_set(before, view["policy"])
                    notes += [f"no longer set: {', '.join(lost)}"] if lost else []
                _print_notes(notes, view)
            else:
                view = client.get(f"{run_path(run_id)}/policy")
    _show_policy(view, as_json=as_json)


@run.command("override")
def run_override(
    run_id: RunId,
    pin: Annotated[int | None, typer.Option(min=1, help="Run with this batch, in samples.")] = None,
    hold: Annotated[bool, typer.Option("--hold", help="Keep whatever batch is in force.")] = False,
    release: Annotated[bool, typer.Option("--release", help="Let the policy decide again.")] = False,
    note: Note = "",
    url: Url = "http://127.0.0.1:8000",
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Put a batch above a run's policy from the next measurement on, or release it to the policy."""
    if (pin is not None) + hold + release != 1:
        raise typer.BadParameter("give exactly one of --pin, --hold and --release.")
    with sentences():
        from gns_controller.cli.api_client import ControllerClient

        with ControllerClient(url, token) as client:
            if release:
                view = client.change("DELETE", run_id, "override", note=note)
            else:
                body = {"kind": "hold"} if pin is None else {"kind": "pin", "global_batch_size": pin}
                view = client.change("POST", run_id, "override", body={**body, "note": note})
        _print_notes([], view)
    _show_policy(view, as_json=as_json)


def _print_notes(lines: list[str], view: dict[str, Any]) -> None:
    """Print what the operator who sent a command should know, on stderr."""
    if view["state"] == "finished":
        lines = [*lines, "this run is finished: it holds for its next attempt"]
    for line in lines:
        print(line, file=sys.stderr)


def _show_policy(view: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(view)
        return
    with sentences():
        print(f"{'run':<22} {view['run_id']}")
        print(f"{'revision':<22} {view['policy_revision']}, {view['changed_at'] or 'as registered'}")
        print(f"{'override':<22} {override_text(view['override'])}")
        for name, value in view["policy"].items():
            if value is not None:
                print(f"{name:<22} {value if isinstance(value, str) else json.dumps(value)}")


def _policy(text_or_file: str) -> AnyPolicyConfig:
    from gns_controller.core.policies.parsing import read_policy, suggested_for

    if text_or_file.lstrip().startswith("{"):
        return read_policy(text_or_file)
    try:
        return read_policy(Path(text_or_file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if text_or_file.endswith((".json", ".toml")):
            raise InvalidInputError(f"the policy file {text_or_file!r} cannot be read: it does not exist.") from None
        raise InvalidInputError(
            f"the policy {text_or_file!r} is neither JSON nor a file{suggested_for(text_or_file)}."
        ) from None
    except OSError as error:
        raise InvalidInputError(f"the policy file cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise InvalidInputError("the policy file is not UTF-8 text.") from None


def _no_longer_set(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name the guards of the policy before that the one after leaves at their defaults, with their values."""
    from gns_controller.core.policies.base import Guards
    from gns_controller.core.policies.parsing import read_policy

    try:
        old, new = read_policy(json.dumps(before)), read_policy(json.dumps(after))
    except InvalidInputError:  # of another version, with fields that we do not know
        return []
    lost = []
    for name in Guards.model_fields:
        was, now = getattr(old, name), getattr(new, name)
        defaults = [type(policy).model_fields[name].default for policy in (old, new)]
        if was != now and was != defaults[0] and now == defaults[1]:
            value = before[name]
            lost.append(f"{name} {value if isinstance(value, str) else json.dumps(value)}")
    return lost


def _back_at_default(patch: dict[str, Any], policy: dict[str, Any]) -> list[str]:
    """Name the fields that a null took back to their default, which need not be null."""
    return [
        f"{name} is back at its default, {'none' if policy[name] is None else json.dumps(policy[name])}"
        for name, value in patch.items()
        if value is None and name in policy
    ]


def _assigned(assignments: list[str]) -> dict[str, Any]:
    """Return key=value arguments as a merge patch; values are JSON where they can be read as such, else text."""
    patch: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not all(key.split(".")):
            raise InvalidInputError(f"--set wants field=value, got {assignment!r}.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *outer, last = key.split(".")
        here = patch
        for part in outer:
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                raise InvalidInputError(f"--set {key} goes into a field that is set as a whole.")
        here[last] = value
    return patch


@run.command("show")
def run_show(
    run_id: RunId,
    url: Url = "http://127.0.0.1:8000",
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Show one run with its last decision."""
    with sentences():
        from gns_controller.cli.api_client import ControllerClient, decision_shown, run_path

        with ControllerClient(url, token) as client:
            view = client.get(run_path(run_id))
            if as_json:
                print_json(view)
                return
            projection = client.get(f"{run_path(run_id)}/schedule")["projection"]
            decision = decision_shown(client, view)
        steps_left, ahead = ("0", "-") if view["state"] == "finished" else ahead_text(projection)
    rows = {
        "run": view["run_id"],
        "state": view["state"],
        "attempt": view["attempt"],
        "optimizer steps": view["optimizer_step"],
        "samples": f"{view['samples_seen']} of {view['specification']['budget_samples']}",
        "batch": f"{batch_in_force(view)} samples (plan {view['plan']['version']})",
        "policy": f"{view['policy']['policy']} (revision {view['policy_revision']})",
        "override": override_text(view["override"]),
        "steps left": steps_left,
        "ahead": ahead,
        "steps saved": savings_text(view["savings"]),
        "noise scale": noise_scale_text(decision),
        "last decision": decision.get("explanation", "-"),
    }
    for key, value in rows.items():
        print(f"{key:<16} {value}")


def replay(
    recording: Annotated[
        str,
        typer.Argument(
            help="A file or folder: our export, CSV, JSON lines, TensorBoard, Weights & Biases; or "
            "wandb:ENTITY/PROJECT/RUN; or the name of a run, which its controller replays."
        ),
    ],
    policy: Annotated[
        str | None,
        typer.Option(help="Ask this one: a JSON or TOML file, or JSON itself. [default: what ran, operators included]"),
    ] = None,
    follow_trainer: Annotated[
        bool | None,
        typer.Option(
            "--follow-trainer/--no-follow-trainer",
            help="Take the batch in force from each measurement. [default: as it was for what ran, no for --policy]",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="json_lines, csv, tensorboard or wandb. [default: told by name and first bytes]"),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Where the guess would be wrong: ours=theirs,... as in the guide to recordings."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples at the start. [default: of the first measurement]")
    ] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples per rank per backward pass. [default: of the first measurement]")
    ] = None,
    data_parallel_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks that see different samples. [default: of the first measurement]")
    ] = None,
    budget_samples: Annotated[
        int | None, typer.Option(min=1, help="Samples after which the run ends. [default: where the recording ends]")
    ] = None,
    tokens_per_sample: Annotated[int | None, typer.Option(min=1, help="For tables and policies in tokens.")] = None,
    geometry: Annotated[
        Literal["euclidean", "sign", "spectral"] | None,
        typer.Option(help="Norm of an imported noise scale. [default: spectral]", show_default=False),
    ] = None,
    estimator: Annotated[
        Literal["rank_variance", "split"] | None,
        typer.Option(
            help="How an imported noise scale was obtained. [default: split with progress, else rank_variance]",
            show_default=False,
        ),
    ] = None,
    num_groups: Annotated[
        int | None,
        typer.Option(min=2, help="Sample groups behind an imported reading. [default: ranks, at least 2]"),
    ] = None,
    url: Url = "http://127.0.0.1:8000",
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Fold a policy over what was recorded: what it did, or what another one would have done.

    Exit code 1 if what ran is not repeated bit for bit.
    """
    with sentences():
        given = None if policy is None else _policy(policy)
        from gns_controller.cli.replay import BatchOptions, is_recording, replay_file, replay_run, table_of, unread

        options = BatchOptions(
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            data_parallel_size=data_parallel_size,
            budget_samples=budget_samples,
            tokens_per_sample=tokens_per_sample,
            geometry=geometry,
            estimator=estimator,
            num_groups=num_groups,
        )
        if is_recording(recording):
            report, notes, num_commands = replay_file(
                recording,
                format=format,
                columns=_columns(columns),
                policy=given,
                options=options,
                follow_trainer=follow_trainer,
            )
        else:
            if any(value is not None for value in (*options, format, columns)):
                raise InvalidInputError(
                    f"{recording!r} is no file, so it names a run, and a run says itself what the options would say."
                )
            report, notes, num_commands = replay_run(
                recording, url=url, token=token, policy=given, follow_trainer=follow_trainer
            )
        if as_json and (nothing := unread(report)):
            notes = [*notes, nothing]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        for line in table_of(report, compared=policy is None, num_commands=num_commands):
            print(line)
    if policy is None and follow_trainer is None and report.num_equal != report.num_compared:
        leave(EXIT_WRONG, "what ran is not repeated: another version of this program decided, or the log was changed.")


def _columns(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours.strip() and equals for ours, equals, _ in pairs):
        raise InvalidInputError(f"--columns wants ours=theirs,... and got {text!r}.")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
