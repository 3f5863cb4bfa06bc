"""What a batch change does to the optimizer: today, to its learning rate."""

from __future__ import annotations

import math

from gns_controller.core.batch_arithmetic import LearningRateCoupling


def learning_rate_factor(coupling: LearningRateCoupling, *, global_batch_size: int, initial_batch_size: int) -> float:
    """Factor on the base learning rate, a function of the batch alone: applying it twice is applying it once.

        sqrt: (B / B0)^(1/2)        linear: B / B0        none: 1

    Source: sqrt, arXiv:2602.03001 algorithm 1 and common practice for sign-like optimizers; linear, arXiv:1706.02677
    (SGD); none, the published GPT-3, Llama 3 and DeepSeek-V3 ramps.
    """
    ratio = global_batch_size / initial_batch_size
    if coupling == "sqrt":
        return math.sqrt(ratio)
    return ratio if coupling == "linear" else 1.0
