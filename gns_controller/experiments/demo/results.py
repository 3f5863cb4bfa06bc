"""What a run wrote, and what the table says about it."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEAR_SHARE = 0.005
"""Within 0.5 % of the baseline's best loss."""


@dataclass
class RunResult:
    """One finished run."""

    name: str
    title: str
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    start: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, *, name: str, title: str) -> RunResult:
        """From the JSON-lines file of the example job; unfinished lines are left out."""
        result = cls(name, title)
        for line in path.read_text().split("\n")[:-1]:
            entry = json.loads(line)
            kind = entry.pop("kind")
            if kind == "evaluation":
                result.evaluations.append(entry)
            elif kind == "decision":
                result.decisions.append(entry)
            else:
                setattr(result, kind, entry)
        return result

    @property
    def final_loss(self) -> float:
        """Nats per byte."""
        return float(self.evaluations[-1]["validation_loss"])

    @property
    def best_loss(self) -> float:
        """Nats per byte."""
        return min(float(entry["validation_loss"]) for entry in self.evaluations)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return int(self.end["optimizer_steps"])

    @property
    def median_resolution(self) -> float | None:
        """noise scale over its ceiling, in the median over decisions that have one."""
        found = [entry["resolution"] for entry in self.decisions if entry["resolution"] is not None]
        return statistics.median(found) if found else None

    @property
    def unresolved_share(self) -> float | None:
        """Share of decisions whose reading could not be told from noise."""
        return sum(entry["unresolved"] for entry in self.decisions) / len(self.decisions) if self.decisions else None

    def steps_to(self, loss: float) -> int | None:
        """Optimizer steps at the first evaluation that reaches this loss."""
        for entry in self.evaluations:
            if entry["validation_loss"] <= loss:
                return int(entry["optimizer_step"])
        return None


def summarize(results: list[RunResult]) -> list[dict[str, Any]]:
    """One row per run; the first run is the baseline. Three ways of counting saved steps, kept apart."""
    baseline = results[0]
    strict, near = baseline.best_loss, baseline.best_loss * (1 + NEAR_SHARE)
    return [
        {
            "name": result.name,
            "title": result.title,
            "validation_loss": result.final_loss,
            "optimizer_steps": result.steps,
            "samples": int(result.end["samples"]),
            "seconds": float(result.end["training_seconds"]),
            "steps_to_baseline_best": result.steps_to(strict),
            "steps_saved_strict": _saved(result.steps_to(strict), baseline.steps_to(strict)),
            "steps_to_within_half_percent": result.steps_to(near),
            "steps_saved_near": _saved(result.steps_to(near), baseline.steps_to(near)),
            "total_steps_ratio": result.steps / baseline.steps,
            "median_resolution": result.median_resolution,
            "unresolved_share": result.unresolved_share,
        }
        for result in results
    ]


def markdown_report(rows: list[dict[str, Any]], *, settings: str, start: dict[str, Any], machine: str) -> str:
    """The table and what it was measured on, for docs."""
    lines = [
        f"{settings}. Machine: {machine}. Text: {start['train_bytes']} bytes to train on, "
        f"{start['validation_bytes']} to validate, sha256 `{start['corpus_sha256']}`.",
        "",
        "| method | validation loss | steps | of baseline's | samples | seconds | steps to baseline's best, strictly "
        "| within 0.5 % | resolution | unresolved |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["title"],
            f"{row['validation_loss']:.4f}",
            row["optimizer_steps"],
            f"{row['total_steps_ratio']:.1%}",
            row["samples"],
            f"{row['seconds']:.0f}",
            steps_text(row["steps_to_baseline_best"], row["steps_saved_strict"]),
            steps_text(row["steps_to_within_half_percent"], row["steps_saved_near"]),
            number_text(row["median_resolution"], "{:.2f}"),
            number_text(row["unresolved_share"], "{:.0%}"),
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def steps_text(steps: int | None, saved: float | None) -> str:
    """Steps and the share saved, or that they were not enough."""
    if steps is None or saved is None:
        return "not reached"
    return f"{steps} ({0.0 - 100 * saved:+.0f} %)"


def number_text(value: float | None, form: str) -> str:
    """A number, or a dash."""
    return "-" if value is None else form.format(value)


def _saved(steps: int | None, baseline_steps: int | None) -> float | None:
    return None if steps is None or not baseline_steps else 1 - steps / baseline_steps
