"""Branches of the example job go on exactly where the checkpoint stood, with the rate that belongs to the batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer_hooks.examples.checkpoints import described, read_checkpoint
from trainer_hooks.examples.options import parse_arguments
from trainer_hooks.examples.train_lm import Job

pytestmark = pytest.mark.slow

TEXT = Path(__file__).parents[4] / "gns_controller"
TINY = [
    *("--corpus", str(TEXT), "--budget-samples", "1600", "--width", "16", "--layers", "1", "--heads", "2"),
    *("--validation-samples", "64", "--evaluate-at-samples", "448,576", "--estimators", "split,rank_variance"),
    *("--measurement-interval-samples", "48", "--num-sign-patterns", "3", "--record-readings"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(folder: Path, name: str, *arguments: str) -> tuple[Job, list[dict[str, Any]]]:
    output = folder / f"{name}.jsonl"
    job = Job(parse_arguments([*TINY, "--output", str(output), *arguments]))
    job.run()
    job.close()
    return job, [json.loads(line) for line in output.read_text().splitlines()]


def of_kind(records: list[dict[str, Any]], kind: str, *, after: int) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if key != "training_seconds"}
        for record in records
        if record["kind"] == kind and record["samples"] > after
    ]


def test_a_branch_with_the_same_batch_repeats_the_uninterrupted_run_bit_for_bit(tmp_path: Path) -> None:
    base = ["--checkpoint", str(tmp_path / "base.pt"), "--save-at-samples", "320", "--stop-at-samples", "576"]
    _, uninterrupted = train(tmp_path, "base", *base)
    branch = ["--resume-from", str(tmp_path / "base-320.pt"), "--stop-at-samples", "576"]
    _, same = train(tmp_path, "same", *branch, "--resume-batch-size", "16")
    for kind in ("evaluation", "readings"):
        expected = of_kind(uninterrupted, kind, after=320)
        assert len(expected) >= 2
        assert of_kind(same, kind, after=320) == expected
    _, other = train(tmp_path, "other", *branch, "--resume-batch-size", "32")
    assert of_kind(other, "evaluation", after=320) != of_kind(uninterrupted, "evaluation", after=320)


def test_the_rate_follows_from_the_batch_at_the_start_however_often_the_batch_has_changed(tmp_path: Path) -> None:
    base = ["--checkpoint", str(tmp_path / "base.pt"), "--stop-at-samples", "64"]
    train(tmp_path, "base", *base)
    fourfold = ["--resume-from", str(tmp_path / "base.pt"), "--checkpoint", str(tmp_path / "fourfold.pt")]
    job, records = train(tmp_path, "fourfold", *fourfold, "--resume-batch-size", "64", "--stop-at-samples", "192")
    assert job.session.learning_rate_factor == 2.0
    assert records[-1]["optimizer_steps"] == 4 + 2
    again = ["--resume-from", str(tmp_path / "fourfold.pt"), "--resume-batch-size", "256", "--stop-at-samples", "448"]
    job, records = train(tmp_path, "again", *again)
    assert job.session.learning_rate_factor == 4.0
    assert records[-1]["optimizer_steps"] == 4 + 2 + 1
    # The schedule is that of the whole budget: 448 of 1600 samples, warmup over 240.
    [group, *_] = job.optimizers[0].param_groups
    assert 0 < group["lr"] < 0.016 * 4


def test_a_checkpoint_says_what_run_it_is_of(tmp_path: Path) -> None:
    train(tmp_path, "base", "--checkpoint", str(tmp_path / "base.pt"), "--stop-at-samples", "100", "--seed", "3")
    found = described(read_checkpoint(tmp_path / "base.pt"), tmp_path / "base.pt")
    assert (found["samples_seen"], found["optimizer_step"], found["global_batch_size"]) == (112, 7, 16)
    assert found["job"]["learning_rate"] == 0.016
    assert (found["job"]["seed"], found["job"]["corpus"]) == (3, str(TEXT))
