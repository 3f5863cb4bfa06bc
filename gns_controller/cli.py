"""The commands. The only place that reads the environment and builds real objects.

Heavy imports live inside commands, so that --help is quick and a missing extra is one sentence. To add a command,
write one function below and decorate it.

Exit codes: 0 done, 1 something is wrong (doctor, db check, an answer of the controller), 2 wrong usage or settings,
3 the port is taken, 4 the database cannot be used, 5 a dependency is missing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from gns_controller.core.errors import GnsError, InvalidInputError, MissingDependencyError, StoreError

if TYPE_CHECKING:
    from gns_controller.core.policies import AnyPolicyConfig
    from gns_controller.settings import Settings

try:
    import typer
except ImportError:  # the bare install has the console script, too
    print("gns-controller needs its service dependencies: pip install 'gns-controller[service]'", file=sys.stderr)
    raise SystemExit(5) from None

EXIT_WRONG = 1
EXIT_USAGE = 2
EXIT_PORT = 3
EXIT_DATABASE = 4
EXIT_DEPENDENCY = 5

app = typer.Typer(
    help="Batch-size plans for training runs, from measured gradient noise scales.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
db = typer.Typer(help="The database: bring it to this version, or check it.", no_args_is_help=True)
token = typer.Typer(help="Bearer tokens.", no_args_is_help=True)
run = typer.Typer(help="Runs of a controller, over HTTP.", no_args_is_help=True)
config = typer.Typer(help="Settings.", no_args_is_help=True)
for name, group in (("db", db), ("token", token), ("run", run), ("config", config)):
    app.add_typer(group, name=name)

DatabaseUrl = Annotated[
    str | None,
    typer.Option(help="Database, instead of GNS_DATABASE_URL. [default: sqlite:///gns.db]", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Url = Annotated[str, typer.Option(help="Address of the controller, with scheme.")]
Token = Annotated[
    str, typer.Option(envvar="GNS_TOKEN", help="Bearer token, if the controller asks for one.", show_default=False)
]
RunId = Annotated[str, typer.Argument(help="Name of the run.")]
Note = Annotated[str, typer.Option(help="Why, for the next person who looks; 500 characters.")]


def main() -> None:
    """Console script."""
    app()


@app.command()
def serve(
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on; anything but loopback needs GNS_TOKEN_HASHES. [default: 127.0.0.1]"),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="TCP port; 0 takes a free one. [default: 8000]")
    ] = None,
    database_url: DatabaseUrl = None,
    log_level: Annotated[
        str | None, typer.Option(help="Least severe line to log: debug, info, warning, error. [default: info]")
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="Write the controller's address into this file once it listens.")
    ] = None,
) -> None:
    """Run the controller until SIGTERM or Ctrl-C. Migrates the database first. One process is the unit."""
    with _sentences():
        settings = _settings(host=host, port=port, database_url=database_url, log_level=log_level)
        from gns_controller.serving import serve_forever

        serve_forever(settings, ready_file=ready_file)


@app.command()
def doctor(
    database_url: DatabaseUrl = None,
    url: Annotated[str | None, typer.Option(help="Also check that a controller answers here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check versions, settings, database and, with --url, a running controller. Exit code 1 if something is wrong."""
    with _sentences():
        from gns_controller.doctor import examine

        findings = examine(lambda: _settings(database_url=database_url), url=url)
    if as_json:
        _print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            print(f"{'ok   ' if finding.ok else 'WRONG'}  {finding.name}: {finding.detail}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(EXIT_WRONG)


@app.command()
def demo(
    optimizer: Annotated[str, typer.Option(help="muon, adamw or signum.")] = "muon",
    budget_samples: Annotated[
        int, typer.Option(min=2_000, help="Samples of 32 bytes per run; five runs. 16000 is a smoke test.")
    ] = 96_000,
    seed: Annotated[int, typer.Option(help="Of weights and of the order of samples.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the table, the plot, logs and the database.")] = Path(
        "demo-output"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the live page; 0 takes a free one.")] = 0,
    exit_at_end: Annotated[
        bool, typer.Option("--exit", help="End when the table is printed, instead of keeping the page up until Ctrl-C.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train one small model in five ways, watch it live, and compare: needs torch and matplotlib. Takes minutes."""
    if optimizer not in ("muon", "adamw", "signum"):
        raise typer.BadParameter(f"{optimizer!r} is not one of muon, adamw, signum.", param_hint="--optimizer")
    with _sentences():
        from rich.console import Console

        from gns_controller.demo import DemoSettings, run_demo

        settings = DemoSettings(
            optimizer=optimizer,
            budget_samples=budget_samples,
            seed=seed,
            output=output,
            port=port,
            exit_at_end=exit_at_end,
        )
        try:
            rows = run_demo(settings, Console(stderr=as_json))
        except KeyboardInterrupt:
            print("\nInterrupted; every process of the demonstration has ended.", file=sys.stderr)
            raise typer.Exit(130) from None
    if as_json:
        _print_json(rows)


@app.command()
def calibrate(
    checkpoint: Annotated[
        list[Path] | None, typer.Option(help="Branch from this checkpoint of the example job; may be repeated.")
    ] = None,
    at_samples: Annotated[
        str | None,
        typer.Option(
            help="Instead: train the example job and branch at these points, like 4800,12000.", metavar="LIST"
        ),
    ] = None,
    multiples: Annotated[
        str | None,
        typer.Option(help="Batches of the branches over the checkpoint's. [default: 1,2,4,8]", metavar="LIST"),
    ] = None,
    branch_samples: Annotated[
        int | None, typer.Option(help="Samples that every branch trains. [default: a tenth of the budget]")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Nats that a larger batch may lose. [default: 0.01]")
    ] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Validation points of a branch; losses are averaged.")] = 8,
    price: Annotated[
        bool, typer.Option("--price", help="Only what a step saved by doubling the batch costs: branches at B and 2 B.")
    ] = False,
    optimizer: Annotated[
        str | None, typer.Option(help="With --at-samples: muon, adamw or signum. [default: muon]")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="With --at-samples: at --batch-size. [default: the example job's]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="With --at-samples: samples per step up to there. [default: 16]")
    ] = None,
    budget_samples: Annotated[
        int | None, typer.Option(min=1, help="With --at-samples: of the whole schedule. [default: 48000]")
    ] = None,
    width: Annotated[int | None, typer.Option(min=4, help="With --at-samples: model width. [default: 32]")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="With --at-samples: decoder blocks. [default: 2]")] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="With --at-samples; may be repeated: checkpoints for each. [default: 0]")
    ] = None,
    coupling: Annotated[
        str | None,
        typer.Option(help="Learning rate against batch: sqrt, linear (SGD), none. [default: the checkpoint's, sqrt]"),
    ] = None,
    num_ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes of every job. [default: the checkpoint's, 1]")
    ] = None,
    num_threads: Annotated[int, typer.Option(min=1, help="CPU threads of every process; small models want one.")] = 1,
    measurement_interval_samples: Annotated[
        int | None, typer.Option(min=1, help="Samples between measurements. [default: three steps]")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for everything. Finished jobs of the same settings in it are not run again.")
    ] = Path("calibration-output"),
    plot: Annotated[bool, typer.Option("--plot", help="Also write calibration.png; needs matplotlib.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the critical batch size: short branches of the example job from one point, with several batches.

    Compares it with the noise scale read there and writes a policy. Needs torch. Takes minutes to hours.
    """
    for name, value, known in (
        ("--optimizer", optimizer or "muon", ("muon", "adamw", "signum")),
        ("--coupling", coupling or "sqrt", ("sqrt", "linear", "none")),
    ):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}.", param_hint=name)
    run_options = {
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "budget_samples": budget_samples,
        "width": width,
        "layers": layers,
    }
    base: dict[str, Any] = {key: value for key, value in run_options.items() if value is not None}
    with _sentences():
        from rich.console import Console

        from gns_controller.calibration import BaseRun, CalibrationSettings, run_calibration

        if checkpoint and (base or seed):
            names = ", ".join(f"--{key.replace('_', '-')}" for key in [*base, *(["seed"] if seed else [])])
            raise InvalidInputError(f"{names}: only with --at-samples; a checkpoint knows the settings of its run.")
        if price and (multiples is not None or tolerance is not None):
            raise InvalidInputError("--price compares B with 2 B: it takes no --multiples and no --tolerance.")
        settings = CalibrationSettings(
            checkpoints=tuple(checkpoint or ()),
            at_samples=_numbers("--at-samples", at_samples) if at_samples is not None else (),
            base=BaseRun(**base),
            seeds=tuple(seed or [0]),
            multiples=(1, 2) if price else _numbers("--multiples", multiples or "1,2,4,8"),
            branch_samples=branch_samples,
            tolerance=0.01 if tolerance is None else tolerance,
            num_evaluations=evaluations,
            price=price,
            coupling=coupling,
            num_ranks=num_ranks,
            num_threads=num_threads,
            measurement_interval_samples=measurement_interval_samples,
            output=output,
            plot=plot,
        )
        try:
            report = run_calibration(settings, Console(stderr=as_json))
        except KeyboardInterrupt:
            print("\nInterrupted; every job has ended. Finished branches are kept.", file=sys.stderr)
            raise typer.Exit(130) from None
    if as_json:
        _print_json(report)


@app.command()
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
    url: Url = "http://127.0.0.1:8000",
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Fold a policy over what was recorded: what it did, or what another one would have done.

    Exit code 1 if what ran is not repeated bit for bit.
    """
    with _sentences():
        asked = None if policy is None else _policy(policy)
        from gns_controller.replaying import BatchOptions, is_recording, replay_file, replay_run, table_of

        options = BatchOptions(batch_size, micro_batch_size, data_parallel_size, budget_samples, tokens_per_sample)
        if is_recording(recording):
            report, notes = replay_file(
                recording,
                format=format,
                columns=_columns(columns),
                policy=asked,
                options=options,
                follow_trainer=follow_trainer,
            )
        else:
            if any(value is not None for value in (*options, format, columns)):
                raise InvalidInputError(
                    f"{recording!r} is no file, so it names a run, and a run says itself what the options would say."
                )
            report, notes = replay_run(recording, url=url, token=token, policy=asked, follow_trainer=follow_trainer)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        for line in table_of(report, compared=policy is None):
            print(line)
    if policy is None and follow_trainer is None and report.num_equal != report.num_compared:
        _exit(EXIT_WRONG, "what ran is not repeated: another version of this program decided, or the log was changed.")


def _columns(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours.strip() and equals for ours, equals, _ in pairs):
        raise InvalidInputError(f"--columns wants ours=theirs,... and got {text!r}.")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


@db.command("upgrade")
def db_upgrade(database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Bring the database to the schema of this version; `serve` does it, too. Back up first."""
    with _sentences():
        from gns_controller.store import administration

        before, after = administration.upgrade_database(_settings(database_url=database_url).database_url)
    if as_json:
        _print_json({"revision_before": before, "revision": after})
    else:
        print(f"Schema revision {after} (was {before or 'empty'}).")


@db.command("check")
def db_check(database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Read the whole database and say whether it is sound and of this version. Exit code 1 if it is not."""
    with _sentences():
        from gns_controller.store import administration

        report = administration.check_database(_settings(database_url=database_url).database_url)
    if as_json:
        _print_json(report._asdict())
    else:
        print(report.detail)
    if not report.ok:
        raise typer.Exit(EXIT_WRONG)


@token.command("create")
def token_create(as_json: AsJson = False) -> None:
    """Make a random 256-bit token. It is shown once; put its hash into GNS_TOKEN_HASHES."""
    from gns_controller.tokens import hash_token, new_token

    secret = new_token()
    sha256 = hash_token(secret)
    if as_json:
        _print_json({"token": secret, "sha256": sha256})
    else:
        print(f"Token, shown once:          {secret}")
        print(f"Hash for GNS_TOKEN_HASHES:  {sha256}")


@run.command("ls")
def run_ls(
    url: Url = "http://127.0.0.1:8000",
    token: Token = "",
    limit: Annotated[int, typer.Option(min=1, max=200, help="Most runs, newest first.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first."""
    with _sentences():
        from gns_controller.remote import Remote

        with Remote(url, token) as remote:
            page = remote.get("/api/v1/runs", limit=limit)
        if as_json:
            _print_json(page["items"])
            return
        print(f"{'run':<32} {'state':<10} {'step':>9} {'samples':>12} {'batch':>8}  last decision")
        for item in page["items"]:
            reason = (item["last_decision"] or {}).get("reason", "-")
            batch = item["plan"]["global_batch_size"]
            print(
                f"{item['run_id']:<32} {item['state']:<10} {item['optimizer_step']:>9} {item['samples_seen']:>12} "
                f"{batch:>8}  {reason}"
            )


@run.command("export")
def run_export(run_id: RunId, url: Url = "http://127.0.0.1:8000", token: Token = "") -> None:
    """Print a run as JSON lines, for `replay` and for keeping: specification, measurements, decisions, controls."""
    with _sentences():
        from gns_controller.remote import Remote, exported

        try:
            with Remote(url, token) as remote:
                for line in exported(remote, run_id):
                    sys.stdout.write(line)
                sys.stdout.flush()
        except BrokenPipeError:  # whoever reads has seen enough
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
            "--set", help="Change one field, like noise_tolerance=0.7 or dwell.samples=5000; may be repeated."
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
    with _sentences():
        from gns_controller.remote import Remote, run_path

        patch = _assigned(assignments or []) if file is None else _replacement(_policy(file))
        with Remote(url, token) as remote:
            if patch:
                before = remote.get(f"{run_path(run_id)}/policy")["policy"]
                view = remote.speak("PATCH", run_id, "policy", note=note, body=patch)
                if file is not None or view["policy"]["policy"] != before["policy"]:
                    lost = _no_longer_set(before, view["policy"])
                    if lost:
                        print(f"no longer set: {', '.join(lost)}", file=sys.stderr)
            else:
                view = remote.get(f"{run_path(run_id)}/policy")
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
    """Put a batch above a run's policy from the next measurement on, or give the word back to the policy."""
    if (pin is not None) + hold + release != 1:
        raise typer.BadParameter("give exactly one of --pin, --hold and --release.")
    with _sentences():
        from gns_controller.remote import Remote

        with Remote(url, token) as remote:
            if release:
                view = remote.speak("DELETE", run_id, "override", note=note)
            else:
                body = {"kind": "hold"} if pin is None else {"kind": "pin", "global_batch_size": pin}
                view = remote.speak("POST", run_id, "override", body={**body, "note": note})
    _show_policy(view, as_json=as_json)


def _show_policy(view: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        _print_json(view)
        return
    with _sentences():
        override = view["override"]
        said = "none"
        if override is not None:
            said = "hold" if override["kind"] == "hold" else f"pin {override['global_batch_size']} samples"
            said += f" ({_printable(override['note'])})" if override["note"] else ""
        print(f"{'run':<22} {view['run_id']}")
        print(f"{'revision':<22} {view['policy_revision']}, {view['changed_at'] or 'as registered'}")
        print(f"{'override':<22} {said}")
        for name, value in view["policy"].items():
            if value is not None:
                print(f"{name:<22} {value if isinstance(value, str) else json.dumps(value)}")


def _printable(text: str) -> str:
    """What somebody else wrote, without the characters that a terminal obeys."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _policy(text_or_file: str) -> AnyPolicyConfig:
    from gns_controller.core.policies.documents import read_policy, suggested_for

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
    """Guards of the policy before that the one after leaves at their defaults, as they were."""
    from gns_controller.core.policies.documents import read_policy
    from gns_controller.core.policies.frame import Guards

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


def _replacement(policy: AnyPolicyConfig) -> dict[str, Any]:
    """Merge patch that leaves nothing of the policy before. Null in it means a field's default."""
    document = policy.model_dump(mode="json")
    for name, field in type(policy).model_fields.items():
        if document[name] is None and field.default is not None:
            raise InvalidInputError(f"{name} cannot be emptied by a patch: give a number that is never reached.")
    return document


def _assigned(assignments: list[str]) -> dict[str, Any]:
    """Merge patch of key=value; values are JSON where they can be read as such, else text."""
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
    with _sentences():
        from gns_controller.remote import Remote, run_path

        with Remote(url, token) as remote:
            view = remote.get(run_path(run_id))
    if as_json:
        _print_json(view)
        return
    decision = view["last_decision"] or {}
    rows = {
        "run": view["run_id"],
        "state": view["state"],
        "attempt": view["attempt"],
        "optimizer steps": view["optimizer_step"],
        "samples": f"{view['samples_seen']} of {view['specification']['budget_samples']}",
        "batch": f"{view['plan']['global_batch_size']} samples (plan {view['plan']['version']})",
        "policy": f"{view['policy']['policy']} (revision {view['policy_revision']})",
        "override": json.dumps(view["override"]) if view["override"] else "-",
        "steps saved": _savings_text(view["savings"]),
        "noise scale": _noise_scale_text(decision),
        "last decision": decision.get("explanation", "-"),
    }
    for key, value in rows.items():
        print(f"{key:<16} {value}")


def _savings_text(savings: dict[str, Any] | None) -> str:
    if savings is None:
        return "-"
    against = f"{savings['steps_saved']} of {savings['constant_steps']} at {savings['constant_batch_size']} samples"
    seconds = savings["seconds_saved"]
    return against if seconds is None else f"{against}, {round(seconds)} seconds"


def _noise_scale_text(decision: dict[str, Any]) -> str:
    value, low, high = (decision.get(name) for name in ("noise_scale", "noise_scale_low", "noise_scale_high"))
    shown = "-" if value is None else f"{value:.4g} samples"
    if low is not None:
        shown += f" ({low:.4g} or more)" if high is None else f" ({low:.4g} to {high:.4g})"
    return shown + (", unresolved" if decision.get("unresolved") else "")


@config.command("show")
def config_show(as_json: AsJson = False) -> None:
    """Print every setting as it would be used, secrets hidden."""
    with _sentences():
        shown = _shown(_settings())
    if as_json:
        _print_json(shown)
    else:
        for key, value in shown.items():
            print(f"GNS_{key.upper()}={value}")


@contextmanager
def _sentences() -> Iterator[None]:
    """Turn what can be expected to go wrong into one sentence and an exit code."""
    try:
        yield
    except MissingDependencyError as error:
        _exit(EXIT_DEPENDENCY, str(error))
    except ImportError as error:
        if (error.name or "").startswith("gns_controller"):
            raise
        _exit(EXIT_DEPENDENCY, f"{error.name} is not installed: pip install 'gns-controller[service]'")
    except StoreError as error:
        _exit(EXIT_DATABASE, str(error))
    except InvalidInputError as error:
        _exit(EXIT_USAGE, str(error))
    except GnsError as error:
        _exit(EXIT_PORT if type(error).__name__ == "PortTakenError" else EXIT_WRONG, str(error))


def _exit(code: int, sentence: str) -> NoReturn:
    print(f"gns-controller: {sentence}", file=sys.stderr)
    raise typer.Exit(code)


def _settings(**options: object) -> Settings:
    from pydantic import ValidationError

    from gns_controller.settings import Settings

    try:
        return Settings(**{key: value for key, value in options.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        faults = (f"GNS_{'_'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors())
        raise InvalidInputError("settings cannot be used. " + "; ".join(faults)) from None


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise InvalidInputError(f"{option} {text!r} is not a list of whole numbers with commas.") from None


def _shown(settings: Settings) -> dict[str, Any]:
    from gns_controller.store.administration import hide_password

    shown = settings.model_dump(mode="json")
    shown["database_url"] = hide_password(settings.database_url)
    shown["token_hashes"] = f"{len(settings.token_hashes)} hidden" if settings.token_hashes else "none"
    return shown


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))
