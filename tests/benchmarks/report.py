"""How every benchmark prints: one object with environment, rows and summary, or the same as a table."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def environment(**more: Any) -> dict[str, Any]:
    """What the figures depend on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "device": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        **more,
    }


def show(result: dict[str, Any], *, as_json: bool) -> None:
    """Print."""
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print("  ".join(f"{name}={value}" for name, value in result["environment"].items()))
    for _, rows in groupby(result["rows"], key=list):
        _table(list(rows))
    for name, value in result["summary"].items():
        print(f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}")


def _table(rows: Sequence[dict[str, Any]]) -> None:
    names = list(rows[0])
    cells = [[f"{row[n]:.4g}" if isinstance(row[n], float) else str(row[n]) for n in names] for row in rows]
    widths = [max(len(n), *(len(line[i]) for line in cells)) for i, n in enumerate(names)]
    for line in [names, *cells]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
