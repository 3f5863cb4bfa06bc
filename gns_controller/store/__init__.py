"""Durable and ordered: one log of all runs, one writer with group commit, SQLite or PostgreSQL."""

from gns_controller.store.bodies import (
    ControlBody,
    MeasurementBody,
    control_of,
    measurement_of,
    registration_of,
)
from gns_controller.store.protocol import EntryKind, LogEntry, NewEntry, RunHead, Store, Transaction
from gns_controller.store.sql import SqlStore

__all__ = [
    "ControlBody",
    "EntryKind",
    "LogEntry",
    "MeasurementBody",
    "NewEntry",
    "RunHead",
    "SqlStore",
    "Store",
    "Transaction",
    "control_of",
    "measurement_of",
    "registration_of",
]
