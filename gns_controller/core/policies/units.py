"""Points and sizes that people state in samples or in tokens."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from gns_controller.core.contract import Count, FrozenModel, PositiveCount
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies.base import RunFacts


def in_samples(samples: int | None, tokens: int | None, facts: RunFacts) -> float:
    """The one that is given, in samples.

    Raises:
        InvalidInputError: tokens, and the run does not say how many make a sample.
    """
    if samples is not None:
        return samples
    if facts.tokens_per_sample is None:
        raise InvalidInputError("the policy counts tokens: the run has to say its tokens_per_sample.")
    return (tokens or 0) / facts.tokens_per_sample


class Start(FrozenModel):
    """A point of the run, in samples or in tokens."""

    from_samples: Count | None = None
    from_tokens: Count | None = None

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.from_samples is None) == (self.from_tokens is None):
            raise ValueError("give either from_samples or from_tokens, exactly one of them.")
        return self

    def begins_at(self, facts: RunFacts) -> float:
        """Samples seen where it begins."""
        return in_samples(self.from_samples, self.from_tokens, facts)


class BatchAim(FrozenModel):
    """A batch, in samples or in tokens."""

    global_batch_size: PositiveCount | None = None
    global_batch_tokens: PositiveCount | None = None

    @model_validator(mode="after")
    def _one_batch(self) -> Self:
        if (self.global_batch_size is None) == (self.global_batch_tokens is None):
            raise ValueError("give either global_batch_size or global_batch_tokens, exactly one of them.")
        return self

    def batch_size(self, facts: RunFacts) -> float:
        """Samples per optimizer step."""
        return in_samples(self.global_batch_size, self.global_batch_tokens, facts)


def counts_tokens(policy: object) -> bool:
    """Whether any length of this policy is stated in tokens."""
    if isinstance(policy, FrozenModel):
        return any((name.endswith("_tokens") and value is not None) or counts_tokens(value) for name, value in policy)
    return isinstance(policy, tuple) and any(counts_tokens(part) for part in policy)
