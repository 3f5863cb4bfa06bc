"""Rank 0's way to decisions: the same policies in process, or a controller over HTTP with those as its fallback."""

from trainer_hooks.client.connect import connect
from trainer_hooks.client.http import HttpController
from trainer_hooks.client.local import LocalController
from trainer_hooks.client.protocol import DecisionClient, DecisionSource, Verdict, control_from, saved_control

__all__ = [
    "DecisionClient",
    "DecisionSource",
    "HttpController",
    "LocalController",
    "Verdict",
    "connect",
    "control_from",
    "saved_control",
]
