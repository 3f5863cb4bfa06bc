"""Optimizers whose geometry the hooks measure: sign-like and spectral."""

from trainer_hooks.optim.muon import Muon
from trainer_hooks.optim.signum import SignSGD, Signum

__all__ = ["Muon", "SignSGD", "Signum"]
