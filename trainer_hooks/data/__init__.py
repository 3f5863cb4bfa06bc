"""Data of a run: the order of samples, micro-batches, and learning-rate schedules over samples."""

from trainer_hooks.data.lr_schedule import warmup_cosine
from trainer_hooks.data.micro_batches import cut_micro_batches
from trainer_hooks.data.sampler import SampleStream

__all__ = ["SampleStream", "cut_micro_batches", "warmup_cosine"]
