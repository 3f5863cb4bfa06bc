"""Where gradients are seen: before averaging or as shards, before clipping, on measured steps only."""

from trainer_hooks.distributed.layout import DataParallel, Layout, find_layout
from trainer_hooks.measurement.capture.captured_step import Counts, Dealing, GradientCapture
from trainer_hooks.measurement.capture.ddp import DdpCapture
from trainer_hooks.measurement.capture.fsdp2 import Fsdp2Capture, check_spread_seam
from trainer_hooks.measurement.group_reader import GroupReader
from trainer_hooks.measurement.groups import DEFAULT_EXCLUDE, MeasuredGroup, find_groups
from trainer_hooks.measurement.sums_row import Measured

__all__ = [
    "DEFAULT_EXCLUDE",
    "Counts",
    "DataParallel",
    "DdpCapture",
    "Dealing",
    "Fsdp2Capture",
    "GradientCapture",
    "GroupReader",
    "Layout",
    "Measured",
    "MeasuredGroup",
    "check_spread_seam",
    "find_groups",
    "find_layout",
]
