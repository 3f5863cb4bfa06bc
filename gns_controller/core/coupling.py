"""What a batch change does to the optimizer: to its learning rate and to the memory of its averages.

Everything is a function of the present batch, the batch of the start and, for AdaScale, the noise scale: it multiplies
base values, so applying it twice is applying it once, and a resume finds the right values from the plan alone.
"""

from __future__ import annotations

import math

from gns_controller.core.batch_arithmetic import BatchRules, LearningRateCoupling
from gns_controller.core.contract import BatchPlan


def gain(*, noise_scale: float, global_batch_size: int, initial_batch_size: int) -> float:
    """AdaScale's gain: progress of one step of the present batch in steps of the first one.

        r = (V + S) / (V / k + S) = (N / B0 + 1) / (N / B + 1),    k = B / B0,  V = noise_sq / B0,  S = signal_sq

    Between 1 and k. Source: arXiv:2007.05105; AdaptDL's adascale rule.
    """
    measured = (noise_scale / initial_batch_size + 1) / (noise_scale / global_batch_size + 1)
    return _between_one_and(global_batch_size / initial_batch_size, measured)


def _between_one_and(end: float, value: float) -> float:
    return min(max(value, min(end, 1.0)), max(end, 1.0))


def learning_rate_factor(
    coupling: LearningRateCoupling,
    *,
    global_batch_size: int,
    initial_batch_size: int,
    noise_scale: float | None = None,
    previous_factor: float = 1.0,
) -> float:
    """Factor on the base learning rate.

        sqrt, seesaw: (B / B0)^(1/2)     linear: B / B0     adascale: gain     adamscale: gain^(1/2)     none: 1

    Args:
        coupling: the rule. seesaw is sqrt, for batches that grow because the schedule decays: lr0 d (B/B0)^(1/2) with
            B = B0 / d is lr0 d^(1/2), so the rate must not be divided a second time.
        global_batch_size: B, samples.
        initial_batch_size: B0, samples; the base rate is tuned for it.
        noise_scale: samples; the gains need it.
        previous_factor: what a gain answers as long as no noise scale is resolved, as far as it lies between 1 and k
            (adamscale: k^(1/2)) at this batch, where every gain lies.

    Source: sqrt, arXiv:2602.03001 algorithm 1 and common practice for sign-like optimizers; linear, arXiv:1706.02677
    (SGD); none, the published GPT-3, Llama 3 and DeepSeek-V3 ramps; seesaw, arXiv:2510.14717; the gains, AdaptDL.
    """
    ratio = global_batch_size / initial_batch_size
    match coupling:
        case "sqrt" | "seesaw":
            return math.sqrt(ratio)
        case "linear":
            return ratio
        case "none":
            return 1.0
    if noise_scale is None:
        return _between_one_and(ratio if coupling == "adascale" else math.sqrt(ratio), previous_factor)
    measured = gain(noise_scale=noise_scale, global_batch_size=global_batch_size, initial_batch_size=initial_batch_size)
    return measured if coupling == "adascale" else math.sqrt(measured)


def beta_exponent(rules: BatchRules, *, global_batch_size: int) -> float:
    """Power to which every beta of the start is raised: B / B0 keeps half-lives in samples.

        beta^(B / B0) per step of B samples forgets as much per sample as beta per step of B0.

    Source: AdaptDL's theta^(B / B0); 1 - beta ~ B / t_half.
    """
    return global_batch_size / rules.global_batch_size if rules.beta_coupling == "half_life" else 1.0


def coupled(
    rules: BatchRules, *, global_batch_size: int, noise_scale: float | None, previous: BatchPlan | None
) -> tuple[float, dict[str, float], float]:
    """learning_rate_factor, optimizer_factors and beta_exponent of a plan with this batch."""

    def factor(rule: LearningRateCoupling, previous_factor: float) -> float:
        return learning_rate_factor(
            rule,
            global_batch_size=global_batch_size,
            initial_batch_size=rules.global_batch_size,
            noise_scale=noise_scale,
            previous_factor=previous_factor,
        )

    before = previous.learning_rate_factor if previous else 1.0
    factors_before = previous.optimizer_factors if previous else {}
    return (
        factor(rules.learning_rate_coupling, before),
        {name: factor(rule, factors_before.get(name, 1.0)) for name, rule in rules.optimizer_couplings.items()},
        beta_exponent(rules, global_batch_size=global_batch_size),
    )
