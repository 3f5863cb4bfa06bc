"""Optimizer coupling: learning rates follow the plan and, on request, the memory of optimizers' averages.

Everything is written anew from base values, so that writing twice is writing once, and a resume, another world size or
a repeated call finds the same numbers from the plan alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gns_controller.core.batch_arithmetic import BatchRules, LearningRateCoupling
from gns_controller.core.contract import BatchPlan, Geometry
from gns_controller.core.coupling import coupled
from gns_controller.core.errors import CouplingError, InvalidInputError
from gns_controller.core.policies import AnyPolicyConfig, RunFacts, check_gains, check_policy
from trainer_hooks.optim.known_optimizers import OptimizerFacts, facts_of
from trainer_hooks.optim.protocols import class_name_of

_LARGEST_BETA = math.nextafter(1.0, 0.0)

_ALL_NOISE = 1e30
"""A noise scale, samples, at which gains are the whole powers B / B0 and (B / B0)^(1/2)."""

Betas = dict[str, tuple[float, ...]]
"""Setting of a param group -> its values, one for a number."""


def find_couplings(
    given: LearningRateCoupling | Mapping[str, LearningRateCoupling] | None, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[LearningRateCoupling, dict[str, LearningRateCoupling]]:
    """Return the rule of the first optimizer, and those of the others that differ, by class name.

    Args:
        given: one rule for all; rules by class name, the rest by default; or None: all by default.
        optimizers: of the session.

    Raises:
        CouplingError: no rule is known to be sound for an optimizer, or there is none of that name.
    """
    facts = {class_name_of(optimizer): facts_of(optimizer) for optimizer in optimizers}
    if given is None:
        return default_couplings(facts)
    chosen = dict.fromkeys(facts, given) if isinstance(given, str) else dict(given)
    absent = sorted(set(chosen) - set(facts))
    if absent:
        raise CouplingError(
            f"CouplingOptions(learning_rate=...) names {absent}, and the optimizers are {', '.join(facts)}."
        )
    return _first_and_others(
        {name: chosen[name] if name in chosen else _default_coupling(name, row) for name, row in facts.items()}
    )


def default_couplings(
    facts: Mapping[str, OptimizerFacts],
) -> tuple[LearningRateCoupling, dict[str, LearningRateCoupling]]:
    """Return the rule of the first optimizer, and those of the others that differ, by class name.

    Args:
        facts: class name -> row of the table of known optimizers.

    Raises:
        CouplingError: no rule is known to be sound for one of them.
    """
    return _first_and_others({name: _default_coupling(name, row) for name, row in facts.items()})


def _default_coupling(class_name: str, facts: OptimizerFacts) -> LearningRateCoupling:
    if facts.learning_rate_coupling is None:
        raise CouplingError(
            f"no rule for the learning rate of {class_name} is known to be sound when the batch changes: "
            f"{facts.no_coupling_because}. Use CouplingOptions(learning_rate='none') or another rule if you know "
            "better."
        )
    return facts.learning_rate_coupling


def _first_and_others(
    rules: Mapping[str, LearningRateCoupling],
) -> tuple[LearningRateCoupling, dict[str, LearningRateCoupling]]:
    first: LearningRateCoupling = next(iter(rules.values()), "none")
    return first, {name: rule for name, rule in rules.items() if rule != first}


def check_steppable(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Check that a session can end a step with these optimizers.

    Raises:
        InvalidInputError: an optimizer evaluates the loss itself.
    """
    for optimizer in optimizers:
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise InvalidInputError(
                f"{type(optimizer).__name__} evaluates the loss itself (its step needs a closure): a step of several "
                "micro-batches on several ranks cannot give it one."
            )


def check_couplings(policy: AnyPolicyConfig, facts: RunFacts, geometries: Sequence[Geometry]) -> None:
    """Check that policy and couplings go together.

    Args:
        policy: the policy that steers the run.
        facts: facts of the run.
        geometries: geometries of the measured groups.

    Raises:
        CouplingError: adascale by a noise scale that is not the euclidean one.
        InvalidInputError: the policy cannot steer this run.
    """
    check_policy(policy, facts)
    check_gains(policy, facts, geometries)


class CoupledOptimizers:
    """The optimizers of one session, with the values that their settings have at the batch of the start.

    Args:
        optimizers: as given to attach. A group's base rate is its initial_lr, else its lr.
        couples_betas: whether betas follow the plan, too.

    Raises:
        CouplingError: betas are to follow, and a momentum is not an average.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], *, couples_betas: bool) -> None:
        self._optimizers = tuple(optimizers)
        self.base_learning_rates = [
            [float(group.setdefault("initial_lr", group["lr"])) for group in optimizer.param_groups]
            for optimizer in optimizers
        ]
        self.base_betas: list[list[Betas]] | None = None
        if couples_betas:
            self.base_betas = [
                [averages_of(class_name_of(o), group, facts_of(o, group)) for group in o.param_groups]
                for o in optimizers
            ]

    def set_learning_rates(self, schedule_factor: float, plan: BatchPlan | None) -> None:
        """Write base rate x schedule x the plan's factor for that optimizer's class. No plan: the batch of the start.

        Raises:
            InvalidInputError: an optimizer has other parameter groups than at attach.
        """
        present = [len(optimizer.param_groups) for optimizer in self._optimizers]
        if present != [len(rates) for rates in self.base_learning_rates]:
            raise InvalidInputError(
                "an optimizer got other parameter groups after attach: attach again, so that their rates are known."
            )
        for optimizer, base_rates in zip(self._optimizers, self.base_learning_rates, strict=True):
            factor = schedule_factor * factor_for(optimizer, plan)
            for group, base in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = base * factor

    def set_betas(self, plan: BatchPlan | None) -> None:
        """Write every base beta to the power of the plan's beta_exponent, if betas follow. No plan: the base values.

        An average of m samples per step with beta^k forgets as much per sample as one of m / k with beta. What has been
        averaged already is kept. Adam divides its averages by 1 - beta^step with the present beta, while their true
        weight is one minus the product of the betas so far, which is less. So if the batch grows by k within the first
        1 / (1 - beta) steps, its averages come out too small, at once by (1 - beta^step) / (1 - beta^(k step)): too
        short steps for the first moment, too long ones for the second, until the averages have filled up.
        """
        if self.base_betas is None:
            return
        exponent = plan.beta_exponent if plan is not None else 1.0
        for optimizer, of_groups in zip(self._optimizers, self.base_betas, strict=True):
            for group, betas in zip(optimizer.param_groups, of_groups, strict=True):
                for name, values in betas.items():
                    powers = tuple(_power(value, exponent) for value in values)
                    group[name] = powers if name == "betas" else powers[0]

    def state_dict(self) -> dict[str, Any]:
        """Return the base values, for the session's checkpoint."""
        return {"base_learning_rates": self.base_learning_rates, "base_betas": self.base_betas}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the checkpoint's base values. One from before betas followed has none: the present ones are kept."""
        self.base_learning_rates = [list(rates) for rates in state["base_learning_rates"]]
        saved = state.get("base_betas")
        if saved is None:
            return
        follows = self.base_betas is not None
        self.base_betas = [
            [{name: tuple(values) for name, values in betas.items()} for betas in of_groups] for of_groups in saved
        ]
        if not follows:  # they followed once, and the optimizers' own checkpoints hold what they were last
            self.set_betas(None)
            self.base_betas = None


def factor_for(optimizer: torch.optim.Optimizer, plan: BatchPlan | None) -> float:
    """Return the plan's factor on the scheduled rate of an optimizer; 1 without a plan."""
    return 1.0 if plan is None else _factor_of(class_name_of(optimizer), plan)


def _factor_of(name: str, plan: BatchPlan) -> float:
    """Return the plan's factor on the rates of this class of optimizers."""
    return plan.optimizer_factors.get(name, plan.learning_rate_factor)


def for_fewer_samples(plan: BatchPlan, rules: BatchRules, *, num_samples: int) -> BatchPlan:
    """Return the plan with rates and betas of a step of only so many samples, never larger rates than its own.

    A gain stays what it was, but for what is above n / B0 (adamscale: its root) at n samples: no more is taken without
    asking for the noise scale, which rank 0 alone has.
    """
    factor, factors, exponent = coupled(rules, global_batch_size=num_samples, noise_scale=_ALL_NOISE, previous=plan)
    return plan.model_copy(
        update={
            "learning_rate_factor": min(factor, plan.learning_rate_factor),
            "optimizer_factors": {name: min(f, _factor_of(name, plan)) for name, f in factors.items()},
            "beta_exponent": exponent,
        }
    )


def averages_of(class_name: str, group: Mapping[str, Any], facts: OptimizerFacts) -> Betas:
    """Return the settings of a param group that are weights of the past in an exponential average.

    Args:
        class_name: of the optimizer, for errors.
        group: one of its param groups.
        facts: its row of the table of known optimizers, for this group.

    Raises:
        CouplingError: a momentum that is a sum, one that is not known, or an average that forgets nothing.
    """
    if group.get("momentum") and "momentum" not in facts.averaged_settings and not facts.declares_averages:
        if facts.momentum != "sum":
            raise CouplingError(
                f"whether the momentum of {class_name} is a sum or an average is not known; "
                "use CouplingOptions(betas='none')."
            )
        hint = " (give SGD dampening=momentum, which makes it an average, and a learning rate for that)"
        raise CouplingError(
            f"the momentum of {class_name} is a sum and not an average: another momentum would be another learning "
            f"rate. Use CouplingOptions(betas='none'){hint if 'dampening' in group else ''}."
        )
    return {name: _numbers(class_name, name, group[name]) for name in facts.averaged_settings if group.get(name)}


def _numbers(class_name: str, name: str, given: Any) -> tuple[float, ...]:
    values = tuple(given) if isinstance(given, tuple | list) else (given,)
    if any(isinstance(value, Tensor) for value in values):
        raise CouplingError(f"{name} of {class_name} is a tensor; give numbers, or use CouplingOptions(betas='none').")
    if any(value >= 1 for value in values):
        raise CouplingError(
            f"{name}={given!r} of {class_name} never forgets, whatever the batch is; use CouplingOptions(betas='none')."
        )
    return tuple(float(value) for value in values)


def _power(base: float, exponent: float) -> float:
    """0, and the negative values that some optimizers take for "as another beta", stay what they are."""
    return min(base**exponent, _LARGEST_BETA) if base > 0 else base
