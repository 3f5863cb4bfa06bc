"""Experiments that a command runs as jobs: the demonstration and the calibration of a policy."""
