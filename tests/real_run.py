"""A real torchrun job that trains the example model and reports to a real controller."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from tests.running import ControllerProcess
from tests.torchrun import environment_with, torchrun_command

POLICY = {
    "policy": "noise_scale",
    "estimator": "rank_variance",
    "act_on_unresolved": True,
    "noise_tolerance": 0.8,
    "warmup": {"samples": 480},
}
"""The published rule: its readings are saturated at this size, so the batch surely grows."""
JOB_SECONDS = 120


class RealRun:
    """Two gloo ranks, started on construction; the batch grows from 16."""

    def __init__(
        self,
        controller: ControllerProcess,
        directory: Path,
        *,
        run_id: str,
        budget_samples: int = 3200,
        pace_seconds: float = 0.0,
    ) -> None:
        self.run_id = run_id
        self._controller = controller
        self.budget_samples = budget_samples
        self._log = directory / f"{run_id}.log"
        arguments = [
            *("--controller", controller.url, "--run-id", run_id, "--budget-samples", str(budget_samples)),
            *("--measurement-interval-steps", "5", "--estimators", "split,rank_variance"),
            *("--policy", json.dumps(POLICY), "--evaluations", "8", "--validation-samples", "64"),
            *("--spool-directory", str(directory / "spool"), "--pace-seconds", str(pace_seconds)),
        ]
        token = {"GNS_TOKEN": controller.token} if controller.token else {}
        with self._log.open("w") as log:
            self._job = subprocess.Popen(
                torchrun_command("trainer_hooks.examples.train_lm", *arguments, num_ranks=2),
                env=environment_with(token),
                stdout=log,
                stderr=log,
            )

    def until_registered(self) -> None:
        """Past the ranks' imports, which say nothing about whoever watches the run."""
        deadline = time.monotonic() + JOB_SECONDS
        with self._controller.client() as client:
            while client.get(f"/api/v1/runs/{self.run_id}").status_code == 404:
                ended = self._job.poll() is not None or time.monotonic() > deadline
                assert not ended, self._log.read_text()[-4000:]
                time.sleep(0.05)

    def is_training(self) -> bool:
        return self._job.poll() is None

    def wait(self) -> None:
        """To the end of the budget."""
        status = self._job.wait(JOB_SECONDS)
        assert status == 0, self._log.read_text()[-4000:]

    def stop(self) -> None:
        """Whatever state it is in."""
        self._job.terminate()
        self._job.wait(JOB_SECONDS)
