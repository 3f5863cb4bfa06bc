"""The phases of attach: arguments, groups and rules, measurement, specification, connection.

Each phase gives the same answer on every rank, errors included, so that no rank waits in a collective that another one
never reaches.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import Decision, RunId
from gns_controller.core.errors import InvalidInputError, TooFewGroupsError
from gns_controller.core.policies import AnyPolicyConfig, PolicyState, RunFacts
from gns_controller.core.policies.base import PolicyConfig
from gns_controller.core.policies.parsing import policy_of, read_policy, suggested_for
from gns_controller.core.runs import Registration, RunSpecification
from trainer_hooks.client import DecisionClient, connect, control_from
from trainer_hooks.client.connect import SavedDecisions
from trainer_hooks.client.options import ConnectionOptions
from trainer_hooks.data.lr_schedule import LearningRateSchedule, sampled
from trainer_hooks.distributed.collectives import RankGroup
from trainer_hooks.distributed.layout import Layout
from trainer_hooks.measurement.groups import MeasuredGroup, find_groups
from trainer_hooks.measurement.options import MeasurementOptions
from trainer_hooks.measurement.requirements import requirements_of
from trainer_hooks.measurement.scheduler import MeasurementScheduler
from trainer_hooks.optim.engine.matrix_optimizer import MatrixOptimizer
from trainer_hooks.optim.protocols import boundary_interval, check_boundaries, class_name_of, innermost
from trainer_hooks.session.checkpoint import check_same_state, check_state
from trainer_hooks.session.optimizer_coupling import check_couplings, check_steppable, find_couplings
from trainer_hooks.session.options import CouplingOptions
from trainer_hooks.session.step import GradientScaler

PolicyGiven = AnyPolicyConfig | Mapping[str, Any] | str | os.PathLike[str]
"""A policy; its JSON object; JSON as text; or the path of a JSON or TOML file."""


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """Everything that attach has checked and built, from which a session is made."""

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    layout: Layout
    scheduler: MeasurementScheduler
    run_id: str
    specification: RunSpecification
    client: DecisionClient | None
    """The client on rank 0, None elsewhere."""
    policy_state: PolicyState
    learning_rate_schedule: LearningRateSchedule
    max_grad_norm: float | None
    grad_scaler: GradientScaler | None
    connection: ConnectionOptions


# ---------------------------------------------------------------- arguments


def check_arguments(
    *,
    run: str,
    optimizers: Sequence[torch.optim.Optimizer],
    state: Mapping[str, Any] | None,
    max_grad_norm: float | None,
    ranks: RankGroup,
) -> None:
    """Check the run's name, the checkpoint, and that a session can step these optimizers. Call it on every rank.

    Raises:
        InvalidInputError: the first of these that does not hold; raised on every rank.
    """
    try:
        TypeAdapter(RunId).validate_python(run)
    except ValidationError:
        raise InvalidInputError(
            f"run={run!r} is not a name: 1 to 128 letters, digits, dots, underscores and hyphens, "
            "a letter or digit first."
        ) from None
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise InvalidInputError(f"max_grad_norm={max_grad_norm!r} is not above 0; None switches clipping off.")
    check_same_state(state, ranks)
    if state is not None:
        check_state(state, optimizers)
    check_steppable(optimizers)
    check_boundaries(optimizers, optimizer_step=int(state["optimizer_step"]) if state else 0)


def as_optimizers(optimizer: object) -> list[torch.optim.Optimizer]:
    """Return one optimizer, or several, as a list.

    Raises:
        InvalidInputError: the argument is neither.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return [optimizer]
    what, holder = f"a {type(optimizer).__name__}", optimizer
    if isinstance(optimizer, Sequence):
        others = [item for item in optimizer if not isinstance(item, torch.optim.Optimizer)]
        if optimizer and not others:
            return list(optimizer)
        holder = others[0] if others else None
        what = f"a list with a {type(holder).__name__}" if others else "an empty list"
    hint = "; give its .optimizers" if hasattr(holder, "optimizers") else ""
    raise InvalidInputError(f"optimizer: {what} is neither an optimizer nor a list of optimizers{hint}.")


def as_policy(policy: PolicyGiven | None) -> AnyPolicyConfig | None:
    """Return a policy's configuration, also from its JSON object or a file with its document, JSON or TOML.

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
    """Return rank 0's policy on every rank: its file may be another one by the time that another rank would read it.

    Call it on every rank; only rank 0 looks at its argument.

    Raises:
        InvalidInputError: as `as_policy` on rank 0, the same on every rank.
    """
    document, problem = None, None
    if ranks.rank == 0:
        try:
            parsed = as_policy(policy)
            document = None if parsed is None else parsed.model_dump_json()
        except Exception as error:  # whatever it is, the other ranks wait in the broadcast below
            problem = str(error) or type(error).__name__
    document, problem = ranks.broadcast_object((document, problem))
    if problem is not None:
        raise InvalidInputError(problem)
    return None if document is None else read_policy(document)


# ---------------------------------------------------------------- groups and rules


def groups_and_rules(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    global_batch_size: int,
    micro_batch_size: int,
    micro_batch_granularity: int,
    measurement: MeasurementOptions,
    coupling: CouplingOptions,
    connection: ConnectionOptions,
) -> tuple[list[MeasuredGroup], BatchRules]:
    """Find what is measured together, and the rules that batches and couplings follow.

    Raises:
        CouplingError: no rule is known to be sound for an optimizer.
        GeometryError: an optimizer of unknown geometry.
    """
    learning_rate_coupling, optimizer_couplings = find_couplings(coupling.learning_rate, optimizers)
    groups = find_groups(model, optimizers, geometries=measurement.geometries, exclude=measurement.exclude)
    rules = BatchRules(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        micro_batch_granularity=micro_batch_granularity,
        learning_rate_coupling=learning_rate_coupling,
        optimizer_couplings=optimizer_couplings,
        beta_coupling=coupling.betas,
        decision_delay_steps=connection.decision_delay_steps,
        plan_interval_steps=boundary_interval(optimizers),
    )
    return groups, rules


# ---------------------------------------------------------------- measurement


def build_scheduler(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    policy: AnyPolicyConfig,
    options: MeasurementOptions,
    groups: Sequence[MeasuredGroup],
    facts: RunFacts,
    layout: Layout,
) -> MeasurementScheduler:
    """Return the measurement scheduler, after the self-test of the model's backward path. Call it on every rank.

    Raises:
        CouplingError: policy and couplings do not go together.
        GeometryError: the policy follows a geometry that no group has.
        TooFewGroupsError: there is nothing to compare.
        SelfTestError: gradients do not come out as measuring relies on.
    """
    global_batch_size = facts.rules.global_batch_size
    if layout.data_parallel.size == 1 and global_batch_size < 2:
        raise TooFewGroupsError(
            "one rank with one sample per step has nothing to compare: raise global_batch_size to 2 or more "
            "(a measured step is then split into two micro-batches), or use two ranks."
        )
    requirements = requirements_of(policy, options, groups=groups, layout=layout)
    check_couplings(policy, facts, [group.geometry for group in groups])
    scheduler = MeasurementScheduler(
        groups=groups,
        optimizers=optimizers,
        layout=layout,
        requirements=requirements,
        interval=options.interval,
        budget=options.effective_budget,
        micro_batch_size=facts.rules.micro_batch_size,
    )
    scheduler.check(global_batch_size)
    if options.self_test:
        scheduler.self_test(model)
    return scheduler


# ---------------------------------------------------------------- specification and connection


def specify(
    *,
    policy: AnyPolicyConfig,
    rules: BatchRules,
    budget_samples: int,
    tokens_per_sample: int | None,
    optimizers: Sequence[torch.optim.Optimizer],
    scheduler: MeasurementScheduler,
    options: MeasurementOptions,
    data_parallel_size: int,
    learning_rate_schedule: LearningRateSchedule | None,
    mode: Literal["active", "shadow"],
    description: str,
) -> RunSpecification:
    """Return the specification under which the run is registered."""
    return RunSpecification(
        batch=rules,
        data_parallel_size=data_parallel_size,
        budget_samples=budget_samples,
        tokens_per_sample=tokens_per_sample,
        optimizer=" + ".join(dict.fromkeys(map(class_name_of, optimizers))),
        parameter_groups=tuple(group.description() for group in scheduler.described_groups),
        measurement_interval=options.interval,
        measurement_budget=options.effective_budget,
        policy=policy,
        mode=mode,
        description=description,
        schedule=sampled(learning_rate_schedule, budget_samples=budget_samples) if learning_rate_schedule else (),
    )


def open_client(
    run_id: str,
    specification: RunSpecification,
    *,
    url: str | None,
    state: Mapping[str, Any] | None,
    policy_state: PolicyState,
    connection: ConnectionOptions,
    ranks: RankGroup,
) -> DecisionClient | None:
    """Return rank 0's client, None on the others, with what the checkpoint saved of earlier decisions. Every rank.

    Raises:
        RunConflictError, InvalidInputError: the controller refuses this run; raised on every rank.
    """
    pending = state["pending"] if state else {}
    return connect(
        run_id=run_id,
        registration=Registration(
            specification=specification,
            incarnation=secrets.token_hex(16),
            resume_step=int(state["optimizer_step"]) if state else 0,
        ),
        saved=SavedDecisions(
            policy_state=policy_state,
            pending={int(step): Decision.model_validate(decision) for step, decision in pending.items()},
            control=control_from(state),
        ),
        url=url,
        options=connection,
        ranks=ranks,
    )


def undivided(optimizers: Sequence[torch.optim.Optimizer], layout: Layout) -> list[str]:
    """Return class names of matrix optimizers whose work every rank repeats, because none of them got the group."""
    if layout.name != "DDP" or layout.ranks.size == 1:
        return []
    matrix_optimizers = [inner for inner in map(innermost, optimizers) if isinstance(inner, MatrixOptimizer)]
    return list(
        dict.fromkeys(class_name_of(optimizer) for optimizer in matrix_optimizers if not optimizer.divides_work)
    )
