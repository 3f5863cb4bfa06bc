"""Start a controller, run the example job once per method, report the results.

Every process started here is in a session of its own and is ended on every way out, one Ctrl-C included.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gns_controller.core.errors import DemoError, MissingDependencyError
from gns_controller.experiments.demo.methods import Method, closed_methods, open_loop_twin
from gns_controller.experiments.demo.plot import plot_results
from gns_controller.experiments.demo.results import RunResult, markdown_report, number_text, steps_text, summarize
from gns_controller.experiments.progress import progress_bars
from gns_controller.experiments.subprocesses import child, end_on_signals


@dataclass(frozen=True)
class DemoSettings:
    """What to run, and where the results go."""

    optimizer: str = "muon"
    budget_samples: int = 96_000
    seed: int = 0
    num_ranks: int = 2
    output: Path = Path("demo-output")
    port: int = 0
    exit_at_end: bool = False


def run_demo(settings: DemoSettings, console: Console) -> list[dict[str, Any]]:
    """Everything, from starting the controller to the table. Returns the table's rows.

    Raises:
        MissingDependencyError: torch or matplotlib is missing.
        DemoError: the controller or a job failed.
    """
    for module in ("torch", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(f"the demonstration needs {module}: pip install 'gns-controller[demo]'.")
    end_on_signals()
    settings.output.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    with _controller(settings) as url:
        console.print(f"Controller listening, watch the runs live: [bold]{url}[/bold]")
        results = _run_methods(settings, url, stamp, console)
        rows = summarize(results)
        subtitle = (
            f"{settings.optimizer} on {settings.num_ranks} ranks, {settings.budget_samples} samples of 32 bytes, "
            f"seed {settings.seed}: one run per method"
        )
        plot_path = settings.output / "demo.png"
        plot_results(results, plot_path, subtitle=subtitle)
        summary = {"settings": subtitle, "corpus_sha256": results[0].start["corpus_sha256"], "rows": rows}
        (settings.output / "demo.json").write_text(json.dumps(summary, indent=2) + "\n")
        machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
        report = markdown_report(rows, settings=subtitle, start=results[0].start, machine=machine)
        (settings.output / "demo.md").write_text(report)
        _print_results(rows, subtitle, results[0].start, console)
        console.print(f"Plot: {plot_path}    Numbers: {settings.output / 'demo.json'}")
        if not settings.exit_at_end:
            console.print(f"Live page: [bold]{url}[/bold]    Ctrl-C ends.")
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)
    return rows


def _run_methods(settings: DemoSettings, url: str, stamp: str, console: Console) -> list[RunResult]:
    results: list[RunResult] = []
    with progress_bars(console) as progress:
        methods = closed_methods(settings.optimizer, budget_samples=settings.budget_samples)
        whole = progress.add_task("all methods", total=(len(methods) + 1) * settings.budget_samples, state="")
        for number in range(len(methods) + 1):
            if number < len(methods):
                method = methods[number]
            else:
                steps = results[-1].steps
                method = open_loop_twin(settings.optimizer, budget_samples=settings.budget_samples, steps=steps)
            task = progress.add_task(method.title, total=settings.budget_samples, state="")
            result_path = settings.output / f"{method.name}.jsonl"
            for samples, state in _follow_job(settings, method, url, stamp, result_path):
                progress.update(task, completed=samples, state=state)
                progress.update(whole, completed=number * settings.budget_samples + samples)
            results.append(RunResult.read(result_path, name=method.name, title=method.title))
            progress.update(task, completed=settings.budget_samples, state=f"loss {results[-1].final_loss:.4f}")
            if not progress.console.is_terminal:
                console.print(f"{method.title}: loss {results[-1].final_loss:.4f} in {results[-1].steps} steps")
    return results


def _follow_job(
    settings: DemoSettings, method: Method, url: str, stamp: str, result_path: Path
) -> Iterator[tuple[int, str]]:
    """Run one job to its end; yields samples seen and a word on the state."""
    result_path.unlink(missing_ok=True)
    log_path = result_path.with_suffix(".log")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={settings.num_ranks}"),
        *("-m", "trainer_hooks.examples.train_lm", "--controller", url),
        *("--run-id", f"demo-{stamp}-{settings.optimizer}-{method.name}"),
        *("--optimizer", settings.optimizer, "--seed", str(settings.seed)),
        *("--budget-samples", str(settings.budget_samples), "--output", str(result_path)),
        *("--spool-directory", str(settings.output / "spool")),
        *method.arguments(),
    ]
    with log_path.open("w") as log, child(command, stdout=log) as job:
        read, samples, state = 0, 0, ""
        while True:
            status = job.poll()
            if result_path.exists():
                with result_path.open() as file:
                    file.seek(read)
                    fresh = file.read()
                whole_lines = fresh[: fresh.rfind("\n") + 1]
                read += len(whole_lines.encode())
                for line in whole_lines.splitlines():
                    entry = json.loads(line)
                    samples = entry.get("samples_seen", entry.get("samples", samples))
                    if entry["kind"] == "decision":
                        state = f"batch {entry['plan']['global_batch_size']}"
            yield samples, state
            if status is not None:
                break
            time.sleep(0.3)
    if status != 0:
        tail = "\n".join(log_path.read_text().splitlines()[-15:])
        raise DemoError(f"the job of {method.title!r} ended with status {status}; its log {log_path} ends:\n{tail}")


@contextlib.contextmanager
def _controller(settings: DemoSettings) -> Iterator[str]:
    ready, log_path = settings.output / "controller.url", settings.output / "controller.log"
    ready.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "gns_controller", "serve", "--host", "127.0.0.1", "--port", str(settings.port)),
        *("--database-url", f"sqlite:///{(settings.output / 'demo.db').resolve()}", "--ready-file", str(ready)),
    ]
    with log_path.open("w") as log, child(command, stdout=log) as process:
        deadline = time.monotonic() + 60
        while not ready.exists() or not ready.read_text().strip():
            if process.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"the controller did not start:\n{log_path.read_text()[-2000:]}")
            time.sleep(0.05)
        yield ready.read_text().strip()


def _print_results(rows: list[dict[str, Any]], subtitle: str, start: dict[str, Any], console: Console) -> None:
    results = Table(title=subtitle, title_justify="left", title_style="bold")
    results.add_column("method")
    for heading in ("validation loss", "steps", "of baseline's", "samples", "seconds"):
        results.add_column(heading, justify="right")
    targets = Table(title="Steps to the baseline's best loss, and what was measured", title_justify="left")
    targets.add_column("method")
    for heading in ("strictly", "within 0.5 %", "resolution", "unresolved"):
        targets.add_column(heading, justify="right")
    for row in rows:
        results.add_row(
            row["title"],
            f"{row['validation_loss']:.4f}",
            str(row["optimizer_steps"]),
            f"{row['total_steps_ratio']:.1%}",
            str(row["samples"]),
            f"{row['seconds']:.0f}",
        )
        targets.add_row(
            row["title"],
            steps_text(row["steps_to_baseline_best"], row["steps_saved_strict"]),
            steps_text(row["steps_to_within_half_percent"], row["steps_saved_near"]),
            number_text(row["median_resolution"], "{:.2f}"),
            number_text(row["unresolved_share"], "{:.0%}"),
        )
    console.print(results)
    console.print(targets)
    console.print(
        f"Text: {start['train_bytes']} bytes to train on, {start['validation_bytes']} to validate, "
        f"sha256 {start['corpus_sha256']}"
    )
    console.print(
        "Losses in nats per byte, one seed at toy scale: seeds differ by up to 0.05. Seconds hardly move on two cores; "
        "fewer steps pay where a step has a fixed cost. Resolution, in the median: noise scale over the largest that "
        "could be told from noise. A published reading above 0.7 says 'at least'; a split reading above 1 holds the "
        "batch. The published rule acts on unresolved readings, the split rule does not."
    )
