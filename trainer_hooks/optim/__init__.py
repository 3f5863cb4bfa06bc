"""Optimizers whose geometry the hooks measure: sign-like and spectral."""

from trainer_hooks.optim.adamw import AdamW
from trainer_hooks.optim.asgo import ASGO
from trainer_hooks.optim.eshampoo import EShampoo
from trainer_hooks.optim.muon import Muon
from trainer_hooks.optim.outer import SNOO, Lookahead
from trainer_hooks.optim.scion import Scion
from trainer_hooks.optim.shampoo import Shampoo
from trainer_hooks.optim.signum import SignSGD, Signum
from trainer_hooks.optim.sinkgd import SinkGD
from trainer_hooks.optim.soap import SOAP
from trainer_hooks.optim.specsgd import SpecSGD

__all__ = [
    "ASGO",
    "SNOO",
    "SOAP",
    "AdamW",
    "EShampoo",
    "Lookahead",
    "Muon",
    "Scion",
    "Shampoo",
    "SignSGD",
    "Signum",
    "SinkGD",
    "SpecSGD",
]
