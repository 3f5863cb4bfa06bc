"""Where gradients are seen: before averaging or as shards, before clipping, on measured steps only."""

from trainer_hooks.capture.columns import Measured
from trainer_hooks.capture.ddp import DdpCapture
from trainer_hooks.capture.fsdp2 import Fsdp2Capture, check_spread_seam
from trainer_hooks.capture.groups import DEFAULT_EXCLUDE, MeasuredGroup, find_groups
from trainer_hooks.capture.layout import DataParallel, Layout, find_layout
from trainer_hooks.capture.readings import GroupReader
from trainer_hooks.capture.step import Counts, Dealing, GradientCapture

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
