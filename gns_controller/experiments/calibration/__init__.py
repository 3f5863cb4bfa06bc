"""Calibration by branched training: from one checkpoint several batches, to see which of them keep the loss."""

from gns_controller.experiments.calibration.probe import BaseRun, CalibrationSettings, run_calibration

__all__ = ["BaseRun", "CalibrationSettings", "run_calibration"]
