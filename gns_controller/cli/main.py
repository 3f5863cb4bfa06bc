"""The commands. The only place that reads the environment and builds real objects.

Heavy imports live inside commands, so that --help is quick and a missing extra is one sentence. To add a command,
write one function below and decorate it.

Exit codes: 0 done, 1 something is wrong (doctor, db check, an answer of the controller), 2 wrong usage or settings,
3 the port is taken, 4 the database cannot be used, 5 a dependency is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gns_controller.cli.console import EXIT_WRONG, AsJson, print_json, sentences
from gns_controller.cli.runs import replay, run
from gns_controller.core.errors import InvalidInputError

if TYPE_CHECKING:
    from gns_controller.service.settings import Settings

app = typer.Typer(
    help="Batch-size plans for training runs, from measured gradient noise scales.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
db = typer.Typer(help="The database: bring it to this version, or check it.", no_args_is_help=True)
token = typer.Typer(help="Bearer tokens.", no_args_is_help=True)
config = typer.Typer(help="Settings.", no_args_is_help=True)
for name, group in (("db", db), ("token", token), ("run", run), ("config", config)):
    app.add_typer(group, name=name)
app.command()(replay)

DatabaseUrl = Annotated[
    str | None,
    typer.Option(help="Database, instead of GNS_DATABASE_URL. [default: sqlite:///gns.db]", show_default=False),
]


def main() -> None:
    """Run the command line with the arguments of this process."""
    app()


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        print(f"gns-controller {version('gns-controller')}")
        raise typer.Exit


@app.callback()
def options_of_all_commands(
    _version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


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
    with sentences():
        settings = _settings(host=host, port=port, database_url=database_url, log_level=log_level)
        from gns_controller.cli.server import serve_forever

        serve_forever(settings, ready_file=ready_file)


@app.command()
def doctor(
    database_url: DatabaseUrl = None,
    url: Annotated[str | None, typer.Option(help="Also check that a controller answers here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check versions, settings, database and, with --url, a running controller. Exit code 1 if something is wrong."""
    with sentences():
        from gns_controller.cli.doctor import examine

        findings = examine(lambda: _settings(database_url=database_url), url=url)
    if as_json:
        print_json([finding._asdict() for finding in findings])
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
    with sentences():
        from rich.console import Console

        from gns_controller.experiments.demo import DemoSettings, run_demo

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
        print_json(rows)


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
    with sentences():
        from rich.console import Console

        from gns_controller.experiments.calibration import BaseRun, CalibrationSettings, run_calibration

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
        print_json(report)


@db.command("upgrade")
def db_upgrade(database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Bring the database to the schema of this version; `serve` does it, too. Back up first."""
    with sentences():
        from gns_controller.store import administration

        before, after = administration.upgrade_database(_settings(database_url=database_url).database_url)
    if as_json:
        print_json({"revision_before": before, "revision": after})
    else:
        print(f"Schema revision {after} (was {before or 'empty'}).")


@db.command("check")
def db_check(database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Read the whole database and say whether it is sound and of this version. Exit code 1 if it is not."""
    with sentences():
        from gns_controller.store import administration

        report = administration.check_database(_settings(database_url=database_url).database_url)
    if as_json:
        print_json(report._asdict())
    else:
        print(report.detail)
    if not report.ok:
        raise typer.Exit(EXIT_WRONG)


@token.command("create")
def token_create(as_json: AsJson = False) -> None:
    """Make a random 256-bit token. It is shown once; put its hash into GNS_TOKEN_HASHES."""
    from gns_controller.service.tokens import hash_token, new_token

    secret = new_token()
    sha256 = hash_token(secret)
    if as_json:
        print_json({"token": secret, "sha256": sha256})
    else:
        print(f"Token, shown once:          {secret}")
        print(f"Hash for GNS_TOKEN_HASHES:  {sha256}")


@config.command("show")
def config_show(as_json: AsJson = False) -> None:
    """Print every setting as it would be used, secrets hidden."""
    with sentences():
        shown = _shown(_settings())
    if as_json:
        print_json(shown)
    else:
        for key, value in shown.items():
            print(f"GNS_{key.upper()}={value}")


def _settings(**options: object) -> Settings:
    from pydantic import ValidationError

    from gns_controller.service.settings import Settings

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
