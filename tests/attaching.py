"""Flat settings of tests, sorted into the option objects of `AdaptiveBatch.attach`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from trainer_hooks import ConnectionOptions, CouplingOptions, MeasurementOptions

_COUPLINGS = {"learning_rate_coupling": "learning_rate", "beta_coupling": "betas"}
_MEASUREMENT = {
    **{field.name: field.name for field in fields(MeasurementOptions)},
    "measurement_interval": "interval",
    "measurement_budget": "budget",
}
_CONNECTION = {field.name for field in fields(ConnectionOptions)}


def attach_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of attach, from settings named as the options are, or by longer names where the option's is short."""
    measurement = {_MEASUREMENT[name]: value for name, value in settings.items() if name in _MEASUREMENT}
    connection = {name: value for name, value in settings.items() if name in _CONNECTION}
    coupling = {_COUPLINGS[name]: value for name, value in settings.items() if name in _COUPLINGS}
    sorted_out = {*_MEASUREMENT, *connection, *_COUPLINGS}
    return {
        **{name: value for name, value in settings.items() if name not in sorted_out},
        "measurement": MeasurementOptions(**measurement),
        "coupling": CouplingOptions(**coupling),
        "connection": ConnectionOptions(**connection),
    }
