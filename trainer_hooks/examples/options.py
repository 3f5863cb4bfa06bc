"""Command line of the example job."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from trainer_hooks import BetaCoupling, LearningRateCoupling

DEFAULT_LEARNING_RATES = {"muon": 0.016, "adamw": 0.008, "signum": 0.001}
"""Base learning rates by optimizer, tuned at batch 16 on the demo's model and budget."""

BY_OPTIMIZER = "by-optimizer"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Options that contradict each other end the program with status 2."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 2 -m trainer_hooks.examples.train_lm",
        description="Train a byte-level Llama on the standard library's source text and follow a batch plan.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_run_options(parser)
    _add_measurement_options(parser)
    _add_model_options(parser)
    _add_evaluation_options(parser)
    _add_checkpoint_options(parser)
    options = parser.parse_args(arguments)
    _check(parser, options)
    return options


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run-id", default="train-lm", help="name of the run")
    add("--controller", default=None, help="URL of the controller; without it the policy runs in this process")
    add("--optimizer", choices=sorted(DEFAULT_LEARNING_RATES), default="muon", help="muon: matrices; AdamW: the rest")
    add("--learning-rate", type=float, default=None, help="at --batch-size; default depends on the optimizer")
    add("--momentum", type=float, default=None, help="of Muon or Signum; default: 0.95, 0.9")
    add("--batch-size", type=int, default=16, help="global batch at the start, samples per optimizer step")
    add("--micro-batch-size", type=int, default=64, help="most samples per rank per backward pass")
    add("--budget-samples", type=int, default=144_000, help="samples after which training ends")
    add("--policy", default='{"policy": "hold"}', help="policy as JSON, or the path of a JSON or TOML file")


def _add_measurement_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--measurement-interval-steps", type=int, default=None, help="optimizer steps between measurements")
    add("--measurement-interval-samples", type=int, default=None, help="samples between measurements; default 400")
    add(
        "--measurement-budget",
        type=float,
        default=None,
        help="largest share of the time that measuring may take; without an interval the interval follows from it",
    )
    add("--num-sign-patterns", type=int, default=None, help="pairs of halves per measurement; default: 1")
    add("--estimators", default=None, help="comma-separated: split, rank_variance; default: the policy's")
    add("--min-sample-groups", type=int, default=4, help="micro-batches of a measured step, over all ranks, at least")
    add(
        "--coupling",
        choices=[BY_OPTIMIZER, *get_args(LearningRateCoupling)],
        default=BY_OPTIMIZER,
        help="what a batch change does to learning rates",
    )
    add(
        "--beta-coupling",
        choices=get_args(BetaCoupling),
        default="none",
        help="half_life: the optimizers' averages forget per sample, not per step",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--width", type=int, default=32, help="model width")
    add("--layers", type=int, default=2, help="decoder blocks")
    add("--heads", type=int, default=4, help="attention heads")
    add("--context", type=int, default=32, help="bytes per sample")
    add("--clip", type=float, default=None, help="largest gradient norm; default: none")
    add("--seed", type=int, default=0, help="of weights and of the order of samples")
    add("--num-threads", type=int, default=None, help="CPU threads per rank; default: cores over ranks")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--fully-shard", action="store_true", help="FSDP2 instead of DDP; no checkpoints")
    add("--shadow", action="store_true", help="report and record decisions, change nothing")


def _add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--evaluations", type=int, default=40, help="validation points over the run")
    add("--evaluate-at-samples", type=sample_counts, default=None, help="validation points, instead of --evaluations")
    add("--validation-samples", type=int, default=1024, help="fixed windows behind each validation loss")
    add("--corpus", type=Path, default=None, help="folder of .py files; default: the standard library")
    add("--output", type=Path, default=None, help="JSON-lines file with losses and decisions, written by rank 0")


def _add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        default=None,
        help="save here, and resume from here if it exists",
    )
    add("--checkpoint-steps", type=int, default=0, help="optimizer steps between checkpoints; 0: at the end only")
    add(
        "--save-at-samples",
        type=sample_counts,
        default=None,
        help="comma-separated: keep copies of these points beside --checkpoint, job.pt as job-4800.pt",
    )
    add("--resume-from", type=Path, default=None, help="start from this checkpoint, unless --checkpoint exists")
    add(
        "--resume-batch-size",
        type=int,
        default=None,
        help="global batch to go on with after --resume-from, its learning rate coupled; default: the checkpoint's",
    )
    add(
        "--stop-at-samples",
        type=int,
        default=None,
        help="stop here; the learning-rate schedule stays that of --budget-samples",
    )
    add("--record-readings", action="store_true", help="write the readings of every measured step into --output")
    add(
        "--describe-checkpoint",
        type=Path,
        default=None,
        help="print what this checkpoint is of, as JSON, and train nothing",
    )
    add("--spool-directory", type=Path, default=Path(".gns/spool"), help="where measurements wait during an outage")
    add(
        "--pace-seconds",
        type=float,
        default=0.0,
        help="sleep per step, to imitate a larger model",
    )


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.measurement_interval_steps and options.measurement_interval_samples:
        parser.error("give --measurement-interval-steps or --measurement-interval-samples, not both.")
    if options.momentum is not None and options.optimizer == "adamw":
        parser.error("--momentum is for muon and signum; adamw has betas of its own.")
    if options.fully_shard and options.checkpoint:
        parser.error("--fully-shard does not write checkpoints in this example.")
    if options.fully_shard and options.resume_from:
        parser.error("--fully-shard does not read checkpoints in this example.")
    if options.save_at_samples and not options.checkpoint:
        parser.error("--save-at-samples needs --checkpoint, beside which it writes.")
    if options.resume_batch_size and not options.resume_from:
        parser.error("--resume-batch-size needs --resume-from.")


def sample_counts(text: str) -> list[int]:
    """Parse sample counts like "4800,12000", and return them in ascending order."""
    counts = sorted({int(part) for part in text.split(",")})
    if counts[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: sample counts begin at 1.")
    return counts


def coupling_of(options: argparse.Namespace) -> LearningRateCoupling | None:
    """Return --coupling in the form that attach takes: None for the rule of each optimizer's class."""
    rule: LearningRateCoupling = options.coupling
    return None if options.coupling == BY_OPTIMIZER else rule
