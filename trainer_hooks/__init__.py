"""Measure the gradient noise scale of a torchrun job in its optimizer's norm, and follow the plan it leads to."""

from gns_controller.core.errors import MissingDependencyError

try:
    import torch as _torch  # noqa: F401
except ImportError:
    raise MissingDependencyError(
        "trainer_hooks needs PyTorch: pip install 'gns-controller[trainer]' (on CPU: pip install torch==2.13.0)."
    ) from None

from gns_controller.core.contract import Span
from trainer_hooks.client.options import ConnectionOptions
from trainer_hooks.data import warmup_cosine
from trainer_hooks.measurement.options import MeasurementOptions
from trainer_hooks.session.adaptive_batch import AdaptiveBatch
from trainer_hooks.session.options import CouplingOptions

__all__ = ["AdaptiveBatch", "ConnectionOptions", "CouplingOptions", "MeasurementOptions", "Span", "warmup_cosine"]
