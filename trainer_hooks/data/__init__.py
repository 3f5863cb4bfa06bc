"""Which samples a step consumes, how they are cut into micro-batches, and the learning rate at a sample count."""

from trainer_hooks.data.lr_schedule import warmup_cosine
from trainer_hooks.data.micro_batches import cut_micro_batches
from trainer_hooks.data.sampler import SampleStream

__all__ = ["SampleStream", "cut_micro_batches", "warmup_cosine"]
