"""Recordings of runs: our own export, CSV, TensorBoard, Weights & Biases. What `replay` reads."""

from gns_controller.recordings.json_lines import (
    ExportedMeasurement,
    ExportedRun,
    export_lines,
    export_recording,
    read_export,
)
from gns_controller.recordings.reading import Format, read_recording
from gns_controller.recordings.recording import ImportDefaults, Limits, Recording

__all__ = [
    "ExportedMeasurement",
    "ExportedRun",
    "Format",
    "ImportDefaults",
    "Limits",
    "Recording",
    "export_lines",
    "export_recording",
    "read_export",
    "read_recording",
]
