"""The example job, with every rank writing down the plan of every step it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from trainer_hooks.examples import train_lm


class RecordingJob(train_lm.Job):
    """Writes `rank<r>.steps`: one line per optimizer step."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        session = self.session
        file = (Path(options.output).parent / f"rank{self.rank}.steps").open("w")
        advance = session.advance

        def advance_and_record(*, num_samples: int) -> None:
            plan = session.plan
            learning_rate = self.optimizers[0].param_groups[0]["lr"]
            file.write(f"{session.optimizer_step} {num_samples} {plan.version} {learning_rate!r}\n")
            file.flush()
            advance(num_samples=num_samples)

        session.advance = advance_and_record  # type: ignore[method-assign]


train_lm.Job = RecordingJob  # type: ignore[misc]
sys.exit(train_lm.main())
