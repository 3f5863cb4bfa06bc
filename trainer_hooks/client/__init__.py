"""Rank 0's way to decisions: the same policies in process, or a controller over HTTP with those as its fallback."""

from trainer_hooks.client.connect import connect
from trainer_hooks.client.http import HttpController
from trainer_hooks.client.local import LocalController
from trainer_hooks.client.protocol import Controller, DecisionSource, Orders, Verdict, orders_from, saved_orders

__all__ = [
    "Controller",
    "DecisionSource",
    "HttpController",
    "LocalController",
    "Orders",
    "Verdict",
    "connect",
    "orders_from",
    "saved_orders",
]
