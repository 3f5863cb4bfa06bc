"""Starting real torchrun ranks from tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent


def torchrun_command(target: Path | str, *arguments: str, num_ranks: int) -> list[str]:
    """Command line; a string target is a module."""
    start = ["-m", target] if isinstance(target, str) else [str(target)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return [*launcher, *start, *arguments]


def environment_with(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with the checkout importable and one thread per rank."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(extra or {})}


def torchrun(
    target: Path | str,
    *arguments: str,
    num_ranks: int,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 240,
    expect_status: Sequence[int] = (0,),
) -> subprocess.CompletedProcess[str]:
    """Run to the end; the ranks' output is in the failure."""
    result = subprocess.run(
        torchrun_command(target, *arguments, num_ranks=num_ranks),
        env=environment_with(environment),
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    assert result.returncode in expect_status, f"{result.stdout[-4000:]}\n{result.stderr[-6000:]}"
    return result


def end_rank() -> NoReturn:
    """The end of a worker that has passed its last barrier: status 0 without the interpreter's own way out.

    With gloo groups of torch 2.13 that way now and then aborts ("terminate called without an active exception"), about
    once in ten runs, after everything has been said. Loops that end before this still fail.
    """
    import torch.distributed as dist

    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
