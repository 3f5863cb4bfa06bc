"""Train a small language model on the standard library's source text, with or without batch ramps.

torchrun --nproc-per-node 2 -m trainer_hooks.examples.train_lm --help
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trainer_hooks import (
    AdaptiveBatch,
    ConnectionOptions,
    CouplingOptions,
    Decision,
    GnsError,
    InvalidInputError,
    MeasurementOptions,
    Span,
    Step,
    branch_state,
    warmup_cosine,
)
from trainer_hooks.examples.checkpoints import described, read_checkpoint, settings_of, write_checkpoint
from trainer_hooks.examples.corpus import ByteSequences, read_standard_library
from trainer_hooks.examples.llama import Llama, LlamaConfig, next_token_loss
from trainer_hooks.examples.options import DEFAULT_LEARNING_RATES, coupling_of, parse_arguments
from trainer_hooks.examples.progress_line import progress_line
from trainer_hooks.kernels import NEWTON_SCHULZ_5
from trainer_hooks.optim import Muon, Signum


def build_optimizers(
    model: nn.Module, name: str, learning_rate: float, momentum: float | None = None
) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for the rest, or one optimizer for all parameters."""
    if name == "signum":
        return [Signum(model.parameters(), lr=learning_rate, momentum=0.9 if momentum is None else momentum)]
    if name == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)]
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "blocks." in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "blocks." not in n]
    return [
        Muon(
            hidden,
            lr=learning_rate,
            momentum=0.95 if momentum is None else momentum,
            schedule=NEWTON_SCHULZ_5,  # as published, and as everything recorded with this job
            dtype=None,
        ),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Job:
    """One training run on one rank."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.coupling = CouplingOptions(learning_rate=coupling_of(options), betas=options.beta_coupling)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")

        # Data: the same corpus on every rank; each rank validates on its own share of the windows.
        corpus = read_standard_library(options.corpus)
        self.train = ByteSequences(corpus.train, context=options.context)
        validation = ByteSequences(corpus.validation, context=options.context)
        count = min(options.validation_samples, len(validation))
        windows = torch.linspace(0, len(validation) - 1, count).long()[self.rank :: self.world_size]
        self.validation = validation.__getitems__(windows.tolist()).to(self.device)

        # Model: sharded before the optimizers are built, wrapped in DDP after.
        torch.manual_seed(options.seed)
        config = LlamaConfig(
            width=options.width, num_layers=options.layers, num_heads=options.heads, context=options.context
        )
        llama = Llama(config).to(self.device)
        model: nn.Module = llama
        self.learning_rate = options.learning_rate or DEFAULT_LEARNING_RATES[options.optimizer]
        if options.fully_shard:
            if not dist.is_initialized():
                raise InvalidInputError("--fully-shard needs torchrun, with one process or more.")
            mesh = init_device_mesh(self.device.type, (self.world_size,))
            for block in llama.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        self.optimizers = build_optimizers(model, options.optimizer, self.learning_rate, options.momentum)
        self.plain_model: nn.Module = model
        if self.world_size > 1 and not options.fully_shard:
            model = DistributedDataParallel(model)
        self.model = torch.compile(model) if options.compile else model
        self.ddp_model = model

        # Session: from the checkpoint, if there is one.
        self.started_at = time.perf_counter()
        self.training_seconds = 0.0
        is_resumed = options.checkpoint is not None and options.checkpoint.exists()
        checkpoint = self._find_checkpoint()
        self.output = None
        if options.output and self.rank == 0:
            self.output = options.output.open("a" if is_resumed else "w")
        self.session = self._attach(checkpoint)
        self.record(
            "start",
            run=options.run_id,
            corpus_sha256=corpus.sha256,
            train_bytes=len(corpus.train),
            validation_bytes=len(corpus.validation),
            parameters=sum(p.numel() for p in self.plain_model.parameters()),
            world_size=self.world_size,
            attached=self.session.describe(),
        )

    def _attach(self, checkpoint: dict[str, Any] | None) -> AdaptiveBatch:
        options = self.options
        # Without an interval and a budget, a measurement every 400 samples.
        interval: Span | None = None
        if options.measurement_interval_steps:
            interval = Span(steps=options.measurement_interval_steps)
        elif options.measurement_interval_samples or options.measurement_budget is None:
            interval = Span(samples=options.measurement_interval_samples or 400)
        # Model and optimizers are loaded first: attach notifies optimizers of a batch that had to be cut.
        if checkpoint:
            self.plain_model.load_state_dict(checkpoint["model"])
            for optimizer, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        return AdaptiveBatch.attach(
            self.ddp_model,
            self.optimizers,
            run=options.run_id,
            controller=options.controller,
            global_batch_size=options.batch_size,
            micro_batch_size=options.micro_batch_size,
            budget_samples=options.budget_samples,
            policy=options.policy if options.policy.lstrip().startswith("{") else Path(options.policy),
            measurement=MeasurementOptions(
                interval=interval,
                budget=options.measurement_budget,
                num_sign_patterns=options.num_sign_patterns,
                estimators=options.estimators.split(",") if options.estimators else None,
                min_sample_groups=options.min_sample_groups,
            ),
            coupling=self.coupling,
            connection=ConnectionOptions(spool_directory=options.spool_directory, on_decision=self._record_decision),
            learning_rate_schedule=warmup_cosine(
                budget_samples=options.budget_samples, warmup_samples=max(int(0.15 * options.budget_samples), 1)
            ),
            max_grad_norm=options.clip,
            mode="shadow" if options.shadow else "active",
            tokens_per_sample=options.context,
            description=f"byte-level Llama, width {options.width}, {options.layers} layers, seed {options.seed}",
            state=checkpoint["session"] if checkpoint else None,
        )

    def run(self) -> None:
        """Train to the end of the budget."""
        # Points of the run, in samples, at which something happens once.
        options, session = self.options, self.session
        every = options.budget_samples / max(options.evaluations, 1)
        evaluations = options.evaluate_at_samples or [every * (n + 1) for n in range(max(options.evaluations, 1))]
        evaluate_at = SamplePoints(evaluations, after=session.samples_seen)
        save_at = SamplePoints(options.save_at_samples or [], after=session.samples_seen)
        train_loss: float | None = None
        with progress_line(session, enabled=self.rank == 0 and sys.stderr.isatty()) as show:
            for step in self._steps():
                # One optimizer step. Validation and checkpoints are left out of the training time.
                is_measured = session.is_measured
                began = time.perf_counter()
                for windows in step:
                    loss = next_token_loss(self.model, windows.to(self.device))
                    step.backward(loss)
                step.apply()
                if options.pace_seconds:
                    time.sleep(options.pace_seconds)
                self.training_seconds += time.perf_counter() - began

                # Records, validation and checkpoints of the step that ended.
                if is_measured and options.record_readings:
                    self._record_readings()
                ended = session.samples_seen + session.data_parallel.size > options.budget_samples or self._is_stopped
                if evaluate_at.reached(session.samples_seen) or ended:
                    train_loss = float(loss.detach())
                    self._evaluate(train_loss)
                if options.checkpoint_steps and session.optimizer_step % options.checkpoint_steps == 0:
                    self._save_checkpoint(options.checkpoint)
                for samples in save_at.reached(session.samples_seen):
                    path = options.checkpoint
                    self._save_checkpoint(path.with_name(f"{path.stem}-{samples}{path.suffix}"))
                show(train_loss)
        self._save_checkpoint(options.checkpoint)
        self.record(
            "end",
            optimizer_steps=session.optimizer_step,
            samples=session.samples_seen,
            training_seconds=self.training_seconds,
            seconds=time.perf_counter() - self.started_at,
            measurement_share=session.measurement_share,
        )

    @property
    def _is_stopped(self) -> bool:
        stop = self.options.stop_at_samples
        return stop is not None and self.session.samples_seen >= stop

    def _steps(self) -> Iterator[Step]:
        """Yield the session's steps up to the end of the budget or to --stop-at-samples. Every rank."""
        if not self._is_stopped:
            for step in self.session.steps(self.train, collate_fn=as_batch, seed=self.options.seed):
                yield step
                if self._is_stopped:
                    break
        self.session.report_progress()

    def _evaluate(self, train_loss: float) -> None:
        """Record the validation loss over all ranks. Every rank: the sum below is a collective."""
        with torch.no_grad():
            loss = next_token_loss(self.plain_model, self.validation).double()
        # (2,) float64: sum of the losses of this rank's windows, and their number.
        weighted = torch.stack([loss * len(self.validation), torch.tensor(float(len(self.validation))).to(loss)])
        if self.world_size > 1:
            dist.all_reduce(weighted)
        value = float(weighted[0] / weighted[1])
        self.session.observe_validation_loss(value)
        self.record(
            "evaluation",
            optimizer_step=self.session.optimizer_step,
            samples=self.session.samples_seen,
            validation_loss=value,
            train_loss=train_loss,
            global_batch_size=self.session.plan.global_batch_size,
            learning_rate_factor=self.session.learning_rate_factor,
            training_seconds=self.training_seconds,
        )

    def _record_decision(self, decision: Decision, source: str) -> None:
        self.record("decision", source=source, **decision.model_dump(mode="json"))

    def _record_readings(self) -> None:
        self.record(
            "readings",
            optimizer_step=self.session.optimizer_step,
            samples=self.session.samples_seen,
            readings=[reading.model_dump(mode="json") for reading in self.session.last_readings],
        )

    def record(self, kind: str, **fields: Any) -> None:
        """Write one line to the output file; print the first and the last line of a run."""
        if self.output is not None:
            self.output.write(json.dumps({"kind": kind, **fields}) + "\n")
            self.output.flush()
        if self.rank == 0 and kind in ("start", "end"):
            print(f"{kind}: " + " ".join(f"{name}={value}" for name, value in fields.items()), flush=True)

    def _find_checkpoint(self) -> dict[str, Any] | None:
        """Return this job's own checkpoint, if an earlier incarnation left one; else that of --resume-from."""
        options = self.options
        if options.checkpoint is not None and options.checkpoint.exists():
            return read_checkpoint(options.checkpoint, device=self.device)
        if options.resume_from is None:
            return None
        checkpoint = read_checkpoint(options.resume_from, device=self.device)
        if options.resume_batch_size:
            checkpoint["session"] = branch_state(
                checkpoint["session"],
                self.optimizers,
                global_batch_size=options.resume_batch_size,
                initial_batch_size=options.batch_size,
                micro_batch_size=options.micro_batch_size,
                data_parallel_size=self.world_size,
                coupling=self.coupling,
            )
        return checkpoint

    def _save_checkpoint(self, path: Path | None) -> None:
        if path is None:
            return
        state = self.session.state_dict()  # every rank: it contains a collective
        if self.rank == 0:
            job = {**settings_of(self.options), "learning_rate": self.learning_rate, "num_ranks": self.world_size}
            optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
            write_checkpoint(path, model=self.plain_model.state_dict(), optimizers=optimizers, session=state, job=job)

    def close(self) -> None:
        """Send the reports that are left, and close the output file."""
        self.session.close()
        if self.output is not None:
            self.output.close()


class SamplePoints:
    """Points of a run, in samples, each of which is reached once.

    Args:
        points: in ascending order.
        after: samples seen when the run is resumed; points up to here are left out.
    """

    def __init__(self, points: Sequence[float], *, after: int) -> None:
        self._left = [point for point in points if point > after]

    def reached(self, samples_seen: int) -> list[float]:
        """Return the points that were passed since the last call."""
        passed = [point for point in self._left if point <= samples_seen]
        self._left = self._left[len(passed) :]
        return passed


def as_batch(samples: Any) -> Tensor:
    """Return the samples as they are: `ByteSequences.__getitems__` makes whole micro-batches already."""
    batch: Tensor = samples
    return batch


def describe(path: Path) -> int:
    """Print a checkpoint's position and settings as JSON, and return the exit status as `main` does."""
    try:
        print(json.dumps(described(read_checkpoint(path), path)))
    except (GnsError, OSError) as error:
        print(f"train_lm: {error}", file=sys.stderr)
        return 2
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return its exit status: 0; 2 for a request that cannot be served; 130 after Ctrl-C."""
    options = parse_arguments(arguments)
    if options.describe_checkpoint:
        return describe(options.describe_checkpoint)

    # Logging, threads, process group.
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per request would drown ours
    share = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(options.num_threads or share)
    if "RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    # Expected failures become one sentence; defects keep their traceback.
    try:
        job = Job(options)
        try:
            job.run()
        finally:
            job.close()
        if dist.is_initialized():
            dist.barrier()  # every rank comes here, or torchrun ends them all: none leaves while others are at work
    except (GnsError, ValidationError, OSError) as error:
        print(f"train_lm: rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
