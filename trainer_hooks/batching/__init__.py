"""Which samples a step consumes, how they are cut into micro-batches, and the learning rate at a sample count."""

from trainer_hooks.batching.micro_batches import cut_micro_batches
from trainer_hooks.batching.sampler import SampleStream
from trainer_hooks.batching.schedule import warmup_cosine

__all__ = ["SampleStream", "cut_micro_batches", "warmup_cosine"]
