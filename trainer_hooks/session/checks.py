"""What attach finds wrong before anything is opened: the same answer on every rank."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import TypeAdapter, ValidationError

from gns_controller.core.batch_arithmetic import BatchRules, floor_to_reachable
from gns_controller.core.contract import BatchPlan, Direction, Estimator, RunId, Span
from gns_controller.core.errors import InvalidInputError, TooFewGroupsError
from gns_controller.core.policies import AnyPolicyConfig, PolicyState, initial_state, plan_for
from gns_controller.core.policies.base import PolicyConfig
from gns_controller.core.policies.parsing import policy_of, read_policy, suggested_for
from trainer_hooks.distributed.collectives import RankGroup
from trainer_hooks.distributed.layout import Layout
from trainer_hooks.estimators.spectral import SpectralNorms
from trainer_hooks.optim.engine.matrix_optimizer import MatrixOptimizer
from trainer_hooks.optim.protocols import class_name_of, innermost

MOST_SIGN_PATTERNS = 63

STATE_VERSION = 2
"""Of what `state_dict` returns. Version 1 had no betas and no operators' orders."""

PolicyGiven = AnyPolicyConfig | Mapping[str, Any] | str | os.PathLike[str]
"""A policy; its JSON object; JSON as text; or the path of a JSON or TOML file."""


def as_policy(policy: PolicyGiven | None) -> AnyPolicyConfig | None:
    """A policy's configuration, also from its JSON object or a file with its document, JSON or TOML.

    Text is JSON if it begins with a brace, else a path that ends in .json or .toml; any path may be a `Path`.

    Raises:
        InvalidInputError: no policy has these settings, or the file cannot be read.
    """
    if policy is None or isinstance(policy, PolicyConfig):
        return policy
    if isinstance(policy, str) and policy.lstrip().startswith("{"):
        return read_policy(policy)
    if isinstance(policy, str) and not policy.endswith((".json", ".toml")):
        raise InvalidInputError(
            f"policy={policy!r} is neither JSON nor the path of a .json or .toml file{suggested_for(policy)}."
        )
    if isinstance(policy, str | os.PathLike):
        try:
            text = Path(policy).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(f"the policy {os.fspath(policy)} cannot be read: {error}.") from None
        try:
            return read_policy(text)
        except InvalidInputError as error:
            raise InvalidInputError(f"{os.fspath(policy)}: {error}") from None
    return policy_of(policy)


def agreed_policy(policy: PolicyGiven | None, ranks: RankGroup) -> AnyPolicyConfig | None:
    """Rank 0's policy on every rank: its file may be another one by the time that another rank would read it.

    Call it on every rank; only rank 0 looks at its argument.

    Raises:
        InvalidInputError: as `as_policy` on rank 0, the same on every rank.
    """
    document, problem = None, None
    if ranks.rank == 0:
        try:
            found = as_policy(policy)
            document = None if found is None else found.model_dump_json()
        except Exception as error:  # whatever it is, the other ranks wait in the broadcast below
            problem = str(error) or type(error).__name__
    document, problem = ranks.broadcast_object((document, problem))
    if problem is not None:
        raise InvalidInputError(problem)
    return None if document is None else read_policy(document)


def as_optimizers(given: object) -> list[torch.optim.Optimizer]:
    """One optimizer, or several, as a list.

    Raises:
        InvalidInputError: neither.
    """
    found = [given] if isinstance(given, torch.optim.Optimizer) else given
    if isinstance(found, Sequence) and found and all(isinstance(each, torch.optim.Optimizer) for each in found):
        return list(found)
    what, holder = f"a {type(given).__name__}", given
    if isinstance(found, Sequence):
        holder = next((each for each in found if not isinstance(each, torch.optim.Optimizer)), None)
        what = f"a list with a {type(holder).__name__}" if found else "an empty list"
    hint = "; give its .optimizers" if hasattr(holder, "optimizers") else ""
    raise InvalidInputError(f"optimizer: {what} is neither an optimizer nor a list of optimizers{hint}.")


def undivided(optimizers: Sequence[torch.optim.Optimizer], layout: Layout) -> list[str]:
    """Class names of the optimizers of matrices whose work every rank repeats, because none of them got the group."""
    if layout.name != "DDP" or layout.ranks.size == 1:
        return []
    found = [each for each in map(innermost, optimizers) if isinstance(each, MatrixOptimizer)]
    return list(dict.fromkeys(class_name_of(each) for each in found if not each.divides_work))


def check_same_state(state: Mapping[str, Any] | None, ranks: RankGroup) -> None:
    """All ranks resume from one checkpoint, or none does. Call it on every rank, before anything else sees the state.

    Raises:
        InvalidInputError: they do not; on every rank.
    """
    marks = ranks.gather_objects(_mark_of(state))
    strange = next((rank for rank, mark in enumerate(marks) if isinstance(mark, str)), None)
    if strange is not None:
        raise InvalidInputError(f"state: what rank {strange} gave is not what state_dict returned: {marks[strange]}.")
    other = next((rank for rank, mark in enumerate(marks) if mark != marks[0]), None)
    if other is not None:
        first, second = ("none" if marks[rank][0] is None else f"step {marks[rank][0]}" for rank in (0, other))
        raise InvalidInputError(
            f"ranks resume from different checkpoints: rank 0 from {first}, rank {other} from {second}. Give each of "
            "them what state_dict returned, as rank 0 saved it."
        )


def _mark_of(state: Mapping[str, Any] | None) -> tuple[int | None, int] | str:
    """Step and digest of a checkpoint, or what is wrong with it: told, not raised, because other ranks wait for it."""
    if state is None:
        return None, 0
    try:
        return int(state.get("optimizer_step", 0)), zlib.crc32(json.dumps(state, sort_keys=True, default=str).encode())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def check_state(state: Mapping[str, Any], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """The checkpoint is of this version and of these optimizers."""
    if state.get("version") not in (1, STATE_VERSION):
        raise InvalidInputError(
            f"session state of version {state.get('version')!r}; this program reads versions 1 and {STATE_VERSION}."
        )
    saved = [len(rates) for rates in state["base_learning_rates"]]
    present = [len(optimizer.param_groups) for optimizer in optimizers]
    if saved != present:
        raise InvalidInputError(
            f"the checkpoint's optimizers have {saved} parameter groups, these have {present}: not the same optimizers."
        )


def first_state(state: Mapping[str, Any] | None, rules: BatchRules, *, data_parallel_size: int) -> PolicyState:
    """What the policy remembers at attach: the checkpoint's memory as it is, or nothing.

    Its plan may be one that these ranks cannot make. A service remembers the same, and both take the batch in force
    from the first report, so that they go on remembering the same; until then the session cuts what it is told.
    """
    if not state:
        return initial_state(rules, data_parallel_size=data_parallel_size)
    return PolicyState.model_validate(state["policy_state"])


def reachable_plan(
    plan: BatchPlan, rules: BatchRules, policy_state: PolicyState, *, data_parallel_size: int
) -> BatchPlan:
    """A plan cut for this number of ranks: the nearest reachable batch below, if its own is not. Else the same plan.

    Gains by the noise scale are computed again only for another batch; else they stay what they were.
    """
    batch_size = floor_to_reachable(
        plan.global_batch_size,
        micro_batch_size=rules.micro_batch_size,
        data_parallel_size=data_parallel_size,
        micro_batch_granularity=rules.micro_batch_granularity,
    )
    noise_scale = None
    if batch_size != plan.global_batch_size:
        judged = policy_state.smoothed.judged() if policy_state.smoothed else None
        noise_scale = None if judged is None or judged.unresolved else judged.noise_scale
    return plan_for(
        rules,
        batch_size,
        data_parallel_size=data_parallel_size,
        version=plan.version,
        effective_step=plan.effective_step,
        noise_scale=noise_scale,
        previous=plan,
    )


def check_names(run: str, estimators: Sequence[str], directions: Sequence[str], policy: AnyPolicyConfig | None) -> None:
    """The run has a name, estimators and directions exist, and the policy's are among them."""
    try:
        TypeAdapter(RunId).validate_python(run)
    except ValidationError:
        raise InvalidInputError(
            f"run={run!r} is not a name: 1 to 128 letters, digits, dots, underscores and hyphens, "
            "a letter or digit first."
        ) from None
    if isinstance(estimators, str) or isinstance(directions, str):
        raise InvalidInputError("estimators and directions are lists of names, like ['split'] and ['gradient'].")
    unknown = sorted(set(estimators) - set(get_args(Estimator)))
    if unknown:
        raise InvalidInputError(f"estimators {unknown} do not exist; there are {', '.join(get_args(Estimator))}.")
    strange = sorted(set(directions) - set(get_args(Direction)))
    if strange:
        raise InvalidInputError(f"directions {strange} do not exist; there are {', '.join(get_args(Direction))}.")
    if policy is None:
        return
    if directions and policy.direction not in directions:
        raise InvalidInputError(
            f"the policy follows the {policy.direction}, and directions={list(directions)} does not measure it."
        )
    if policy.estimator == "rank_variance" and policy.direction == "update":
        raise InvalidInputError("the update direction is measured by the split estimator only.")
    if estimators and policy.estimator not in estimators:
        raise InvalidInputError(
            f"the policy follows {policy.estimator}, and estimators={list(estimators)} does not measure it."
        )


def check_measurable(*, global_batch_size: int, data_parallel_size: int) -> None:
    """There is something to compare."""
    if data_parallel_size == 1 and global_batch_size < 2:
        raise TooFewGroupsError(
            "one rank with one sample per step has nothing to compare: raise global_batch_size to 2 or more "
            "(a measured step is then split into two micro-batches), or use two ranks."
        )


def check_measuring(
    *,
    interval: Span | None,
    budget: float | None,
    num_sign_patterns: int | None,
    spectral_norms: str | None,
    max_grad_norm: float | None,
) -> None:
    """How often, how finely and how norms are measured, and where gradients are clipped: each in its range."""
    if interval is not None and not isinstance(interval, Span):
        raise InvalidInputError(f"measurement_interval={interval!r}: give Span(steps=...) or Span(samples=...).")
    if budget is not None and (not isinstance(budget, int | float) or not 0 < budget < 1):
        raise InvalidInputError(f"measurement_budget={budget!r} must be a share of time between 0 and 1, like 0.01.")
    if spectral_norms not in (None, *get_args(SpectralNorms)):
        raise InvalidInputError(f"spectral_norms={spectral_norms!r}; there are {', '.join(get_args(SpectralNorms))}.")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise InvalidInputError(f"max_grad_norm={max_grad_norm!r} must be above 0, or None for no clipping.")
    if num_sign_patterns is not None and not 1 <= num_sign_patterns <= MOST_SIGN_PATTERNS:
        raise InvalidInputError(
            f"num_sign_patterns={num_sign_patterns} must be between 1 and {MOST_SIGN_PATTERNS}: each needs a buffer of "
            "the gradient's size."
        )
