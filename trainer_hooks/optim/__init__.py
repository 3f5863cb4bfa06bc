"""Optimizers whose geometry the hooks measure, and the sorting of a model's parameters into them."""

from trainer_hooks.optim.adamw import AdamW
from trainer_hooks.optim.asgo import ASGO
from trainer_hooks.optim.eshampoo import EShampoo
from trainer_hooks.optim.grouping.parameter_groups import ParameterGroups, parameter_groups
from trainer_hooks.optim.grouping.roles import check_ownership
from trainer_hooks.optim.grouping.width_transfer import base_shapes_of
from trainer_hooks.optim.known_optimizers import TransferRule
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
    "ParameterGroups",
    "Scion",
    "Shampoo",
    "SignSGD",
    "Signum",
    "SinkGD",
    "SpecSGD",
    "TransferRule",
    "base_shapes_of",
    "check_ownership",
    "parameter_groups",
]
