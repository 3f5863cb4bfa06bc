"""Where one rank's gradient is seen: before averaging, before clipping, on measured steps only."""

from trainer_hooks.capture.accumulators import SignedAccumulator, SpreadAccumulator
from trainer_hooks.capture.ddp import GradientCapture
from trainer_hooks.capture.groups import DEFAULT_EXCLUDE, MeasuredGroup, find_groups
from trainer_hooks.capture.readings import Counts, read_groups

__all__ = [
    "DEFAULT_EXCLUDE",
    "Counts",
    "GradientCapture",
    "MeasuredGroup",
    "SignedAccumulator",
    "SpreadAccumulator",
    "find_groups",
    "read_groups",
]
