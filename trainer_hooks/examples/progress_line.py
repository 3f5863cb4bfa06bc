"""Progress of a job, as one line on the terminal that is written again and again."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from trainer_hooks import AdaptiveBatch


@contextlib.contextmanager
def progress_line(session: AdaptiveBatch, *, enabled: bool) -> Iterator[Any]:
    """Show a line on the terminal: share of the budget, batch, loss, time left."""
    started_at, first_sample, shown_at = time.perf_counter(), session.samples_seen, 0.0
    budget = session.specification.budget_samples

    def show(loss: float | None) -> None:
        nonlocal shown_at
        now = time.perf_counter()
        if not enabled or now - shown_at < 0.2:
            return
        shown_at = now
        done = session.samples_seen - first_sample
        seconds_left = (budget - session.samples_seen) * (now - started_at) / max(done, 1)
        text = "" if loss is None else f"  loss {loss:.3f}"
        sys.stderr.write(
            f"\r{session.samples_seen / budget:6.1%}  step {session.optimizer_step}"
            f"  batch {session.plan.global_batch_size}{text}  {seconds_left:5.0f} s left   "
        )
        sys.stderr.flush()

    try:
        yield show
    finally:
        if enabled:
            sys.stderr.write("\n")
