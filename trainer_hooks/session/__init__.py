"""The session: what a training loop holds."""

from trainer_hooks.session.adaptive_batch import AdaptiveBatch

__all__ = ["AdaptiveBatch"]
