"""Output that commands share: exit codes, one sentence for what goes wrong, and the parts of a run in one line each.

Runs arrive as the JSON of an answer.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from gns_controller.core.errors import GnsError, InvalidInputError, MissingDependencyError, PortTakenError, StoreError

EXIT_WRONG = 1
EXIT_USAGE = 2
EXIT_PORT = 3
EXIT_DATABASE = 4
EXIT_DEPENDENCY = 5

_MOST_STAGES = 5
"""Batches ahead in one line; of more, the first ones and the last."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@contextmanager
def sentences() -> Iterator[None]:
    """Turn what can be expected to go wrong into one sentence and an exit code."""
    try:
        yield
    except MissingDependencyError as error:
        leave(EXIT_DEPENDENCY, str(error))
    except ImportError as error:
        if (error.name or "").startswith("gns_controller"):
            raise
        leave(EXIT_DEPENDENCY, f"{error.name} is not installed: pip install 'gns-controller[service]'")
    except StoreError as error:
        leave(EXIT_DATABASE, str(error))
    except InvalidInputError as error:
        leave(EXIT_USAGE, str(error))
    except PortTakenError as error:
        leave(EXIT_PORT, str(error))
    except GnsError as error:
        leave(EXIT_WRONG, str(error))


def leave(code: int, sentence: str) -> NoReturn:
    """End the command with one sentence on stderr."""
    print(f"gns-controller: {sentence}", file=sys.stderr)
    raise typer.Exit(code)


def batch_in_force(view: dict[str, Any]) -> int:
    """Return the trainer's batch: the plan's, except in shadow mode, where plans change nothing."""
    if view["specification"]["mode"] != "shadow":
        return int(view["plan"]["global_batch_size"])
    return int((view["last_measurement"] or view["specification"]["batch"])["global_batch_size"])


def print_json(value: object) -> None:
    """Print a value as --json asks for it."""
    print(json.dumps(value, indent=2))


def printable(text: str) -> str:
    """Return foreign text without the characters that control a terminal."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def override_text(override: dict[str, Any] | None) -> str:
    """Return an override with its note, in words."""
    if override is None:
        return "none"
    kind = "hold" if override["kind"] == "hold" else f"pin {override['global_batch_size']} samples"
    return f"{kind} ({printable(override['note'])})" if override["note"] else kind


def ahead_text(projection: dict[str, Any] | None) -> tuple[str, str]:
    """Return the steps left with their interval, and the batches that are expected, in words."""
    if projection is None:
        return "-", "-"
    left = projection["steps_left"]
    interval = "" if left["least"] == left["most"] else f" ({left['least']} to {left['most']})"
    stages, changes = projection["stages"], []
    for before, stage in itertools.pairwise(stages):
        if stage["global_batch_size"] != before["global_batch_size"]:
            changes.append((stage["global_batch_size"], stage["samples_seen"]))
    batches = [f"{batch} from {samples}" for batch, samples in changes]
    if len(batches) > _MOST_STAGES:
        batches = [*batches[: _MOST_STAGES - 1], f"... {batches[-1]}"]
    if not batches:
        return f"{left['expected']}{interval}", "no change"
    batch, samples = changes[0]
    batches[0] = f"{batch} samples from {samples} on"
    return f"{left['expected']}{interval}", ", ".join(batches)


def savings_text(savings: dict[str, Any] | None) -> str:
    """Return what the ramp so far has saved, in words."""
    if savings is None:
        return "-"
    against = f"{savings['steps_saved']} of {savings['constant_steps']} at {savings['constant_batch_size']} samples"
    seconds = savings["seconds_saved"]
    return against if seconds is None else f"{against}, {round(seconds)} seconds"


def noise_scale_text(decision: dict[str, Any]) -> str:
    """Return the noise scale of a decision and its interval, in words."""
    value, low, high = (decision.get(name) for name in ("noise_scale", "noise_scale_low", "noise_scale_high"))
    shown = "-" if value is None else f"{value:.4g} samples"
    if low is not None:
        shown += f" ({low:.4g} or more)" if high is None else f" ({low:.4g} to {high:.4g})"
    return shown + (", unresolved" if decision.get("unresolved") else "")
