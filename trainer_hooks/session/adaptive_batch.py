"""The one object a training loop holds.

It knows which steps are measured and what every rank's micro-batches are. It ends each optimizer step: read, clip,
step, learning rate, report, agree on the next plan. Long, because the public object with its documented arguments is
one thing to read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from gns_controller.core.batch_arithmetic import BatchRules, BetaCoupling, LearningRateCoupling
from gns_controller.core.contract import (
    BatchPlan,
    Decision,
    Direction,
    Estimator,
    Geometry,
    GroupReading,
    NoiseScaleMeasurement,
    Span,
)
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import NoiseScalePolicyConfig, PolicyState, RunFacts
from gns_controller.core.runs import RunSpecification
from trainer_hooks.client import Controller, connect, orders_from
from trainer_hooks.data import SampleStream
from trainer_hooks.data.lr_schedule import LearningRateSchedule, sampled
from trainer_hooks.distributed.layout import Layout, find_layout
from trainer_hooks.estimators.spectral import SpectralNorms
from trainer_hooks.measurement.budget import MeasurementCost
from trainer_hooks.measurement.groups import DEFAULT_EXCLUDE, MeasuredGroup, find_groups
from trainer_hooks.measurement.requirements import needs_of
from trainer_hooks.measurement.scheduler import Measuring
from trainer_hooks.optim.protocols import (
    boundary_interval,
    check_boundaries,
    class_name_of,
    count_skipped_steps,
    halves_user,
)
from trainer_hooks.session.checks import (
    STATE_VERSION,
    PolicyGiven,
    agreed_policy,
    as_optimizers,
    check_measurable,
    check_measuring,
    check_names,
    check_same_state,
    check_state,
    first_state,
    undivided,
)
from trainer_hooks.session.optimizer_coupling import (
    CoupledOptimizers,
    check_couplings,
    check_steppable,
    factor_for,
    find_couplings,
    for_fewer_samples,
)
from trainer_hooks.session.plan_agreement import Agreement
from trainer_hooks.session.step import GradientScaler, Step
from trainer_hooks.session.timing import Stopwatch

logger = logging.getLogger(__name__)

DEFAULT_SPOOL_DIRECTORY = ".gns/spool"

DEFAULT_BUDGET = 0.01
"""Of the run's time."""


class AdaptiveBatch:
    """Measures, reports and applies batch plans. Make one with `attach`, on every rank."""

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        layout: Layout,
        measuring: Measuring,
        run_id: str,
        specification: RunSpecification,
        controller: Controller | None,
        state: PolicyState,
        learning_rate_schedule: LearningRateSchedule,
        max_grad_norm: float | None,
        grad_scaler: GradientScaler | None,
        decision_deadline_seconds: float,
        on_decision: Callable[[Decision, str], None] | None,
    ) -> None:
        self.model = model
        self.optimizers = tuple(optimizers)
        self.layout = layout
        self.data_parallel = layout.data_parallel
        """My place among the ranks that see different samples."""
        self.ranks = layout.ranks
        """Everybody who holds a part or a copy of the model."""
        self.run_id = run_id
        self.specification = specification
        self.optimizer_step = 0
        self.samples_seen = 0
        self.last_readings: list[GroupReading] = []
        """Of the latest measured step, the same on every rank."""
        self._controller = controller
        self._measuring = measuring
        self._schedule = learning_rate_schedule
        self.max_grad_norm = max_grad_norm
        self.grad_scaler = grad_scaler
        self._agreement = Agreement(
            run_id=run_id,
            specification=specification,
            ranks=self.ranks,
            data_parallel_size=self.data_parallel.size,
            controller=controller,
            optimizers=self.optimizers,
            plan=state.plan,
            deadline_seconds=decision_deadline_seconds,
            on_decision=on_decision,
        )
        self._coupled = CoupledOptimizers(
            self.optimizers, couples_betas=specification.batch.beta_coupling == "half_life"
        )
        self._stopwatch = Stopwatch(self.ranks)
        self._unreported: list[GroupReading] = []
        self._reported_step = 0
        self._arm()

    # ---------------------------------------------------------------- attach

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        run: str,
        global_batch_size: int,
        micro_batch_size: int,
        budget_samples: int,
        controller: str | None = None,
        policy: PolicyGiven | None = None,
        measurement_interval: Span | None = None,
        measurement_budget: float | None = None,
        num_sign_patterns: int | None = None,
        estimators: Sequence[Estimator] | None = None,
        directions: Sequence[Direction] | None = None,
        spectral_norms: SpectralNorms | None = None,
        progress_curve: bool = False,
        background_eigenvalues: bool = False,
        geometries: Mapping[str, Geometry] | None = None,
        exclude: str = DEFAULT_EXCLUDE,
        min_sample_groups: int = 2,
        micro_batch_granularity: int = 1,
        learning_rate_coupling: LearningRateCoupling | Mapping[str, LearningRateCoupling] | None = None,
        beta_coupling: BetaCoupling = "none",
        learning_rate_schedule: LearningRateSchedule | None = None,
        max_grad_norm: float | None = None,
        grad_scaler: GradientScaler | None = None,
        self_test: bool = True,
        mode: Literal["active", "shadow"] = "active",
        tokens_per_sample: int | None = None,
        description: str = "",
        token: str | None = None,
        decision_delay_steps: int = 1,
        decision_deadline_seconds: float = 2.0,
        spool_directory: str | os.PathLike[str] = DEFAULT_SPOOL_DIRECTORY,
        state: Mapping[str, Any] | None = None,
        process_group: Any = None,
        on_decision: Callable[[Decision, str], None] | None = None,
    ) -> Self:
        """Attach to a model and its optimizers. Call it on every rank, with the same arguments.

        Args:
            model: plain, wrapped in DistributedDataParallel, or with fully_shard applied (1-D or 2-D mesh, with a
                tensor-parallel axis or without).
            optimizer: one, or several (Muon for the matrices, AdamW for the rest). Their lr is the base learning rate
                at `global_batch_size`.
            run: name of the run: letters, digits, dots, underscores, hyphens.
            global_batch_size: samples per optimizer step at the start.
            micro_batch_size: most samples per rank per backward pass.
            budget_samples: samples after which training ends.
            controller: URL, or None to decide in this process.
            policy: its configuration, that as a mapping, or the path of a JSON or TOML file. Rank 0's counts. Default:
                grow by the split noise scale, see `NoiseScalePolicyConfig.recommended`.
            measurement_interval: distance between measured steps. Default: as the budget allows.
            measurement_budget: largest share of the run's time that measuring may take; the interval, the number of
                sign patterns and, if need be, the measured layers follow from measured costs. Default 0.01, or no
                budget if an interval is given. With both, the interval is the shortest distance.
            num_sign_patterns: pairs of halves per measurement, each with a buffer of the gradient's size. Default: 1,
                or what the budget finds best.
            estimators: what to measure; default: what the policy follows.
            directions: "gradient", "update" (momentum included), or both; default: what the policy follows.
            spectral_norms: "exact" (eigenvalues in float64) or "polar_express" (matrix products alone; low by less than
                0.1 % on ordinary layers). Default: polar_express on CUDA, exact elsewhere: neither is faster there.
            progress_curve: also measure progress at quarters, eighths, ... of the batch, as far as sign patterns go.
            background_eigenvalues: rank_variance of matrices takes its eigenvalues on the CPU, in a thread, while
                training goes on; its readings come one measurement late.
            geometries: optimizer class name -> geometry, for optimizers we do not know.
            exclude: regular expression; parameters whose name it finds are not measured beside a spectral group.
                Default: embeddings and heads.
            min_sample_groups: cut measured steps into at least this many micro-batches over all ranks.
            micro_batch_granularity: below one full pass micro-batches shrink in multiples of this.
            learning_rate_coupling: what a batch change does to learning rates: "sqrt", "linear", "adascale",
                "adamscale", "seesaw" or "none", for all or by optimizer class name. Default: by optimizer, linear for
                SGD, sqrt for those whose step does not grow with the gradient.
            beta_coupling: "half_life" keeps the optimizers' averages (betas, Muon's and Signum's momentum) as long in
                samples as they are at the start; see CoupledOptimizers.set_betas. "none" as long in steps.
            learning_rate_schedule: samples seen -> factor; see `warmup_cosine`. Default constant.
            max_grad_norm: clip here, after measuring.
            grad_scaler: torch.amp.GradScaler; gradients are unscaled before they are measured and clipped.
            self_test: send known gradients through the real backward path first.
            mode: "active", or "shadow" to report and record and change nothing.
            tokens_per_sample: for axes in tokens.
            description: free text on the page.
            token: bearer token of the controller. Default: environment variable GNS_TOKEN.
            decision_delay_steps: steps between a measurement and its plan.
            decision_deadline_seconds: longest wait for the controller, once per measured step; not during an outage.
            spool_directory: where measurements wait during an outage.
            state: what `state_dict` returned, to resume.
            process_group: data-parallel group of a DDP model. Default: the wrapper's. Sharded models know theirs.
            on_decision: called on rank 0 with each decision and who made it ("controller" or "local").

        Raises:
            BatchShapeError: these ranks cannot make this batch; the message names the nearest that they can.
            CouplingError: no rule is known to be sound for an optimizer, its momentum or this policy.
            GeometryError: an optimizer of unknown geometry, or a policy that follows a geometry no group has.
            TooFewGroupsError: one rank, one sample: nothing to compare.
            SelfTestError: gradients are not averaged over ranks as measuring relies on; parameters are named.
            RunConflictError: the controller knows this run with another specification.
            InvalidInputError: anything else that cannot be.
        """
        layout = find_layout(model, process_group)
        policy = agreed_policy(policy, layout.ranks)
        check_names(run, estimators or [], directions or [], policy)
        optimizers = as_optimizers(optimizer)
        check_same_state(state, layout.ranks)
        if state is not None:
            check_state(state, optimizers)
        data_parallel = layout.data_parallel
        check_steppable(optimizers, beta_coupling)
        check_boundaries(optimizers, optimizer_step=int(state["optimizer_step"]) if state else 0)
        coupling, optimizer_couplings = find_couplings(learning_rate_coupling, optimizers)
        groups = find_groups(model, optimizers, geometries=geometries, exclude=exclude)
        rules = BatchRules(
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            micro_batch_granularity=micro_batch_granularity,
            learning_rate_coupling=coupling,
            optimizer_couplings=optimizer_couplings,
            beta_coupling=beta_coupling,
            decision_delay_steps=decision_delay_steps,
            plan_interval_steps=boundary_interval(optimizers),
        )
        policy = policy or NoiseScalePolicyConfig.recommended(budget_samples=budget_samples)
        check_measurable(global_batch_size=global_batch_size, data_parallel_size=data_parallel.size)
        needs = needs_of(
            policy,
            groups=groups,
            layout=layout,
            estimators=estimators,
            directions=directions,
            spectral_norms=spectral_norms,
            progress_curve=progress_curve,
            background_eigenvalues=background_eigenvalues,
            num_sign_patterns=num_sign_patterns,
            min_sample_groups=min_sample_groups,
        )
        facts = RunFacts(rules, budget_samples, tokens_per_sample)
        check_couplings(policy, facts, [group.geometry for group in groups])
        if measurement_interval is None and measurement_budget is None:
            measurement_budget = DEFAULT_BUDGET
        check_measuring(
            interval=measurement_interval,
            budget=measurement_budget,
            num_sign_patterns=num_sign_patterns,
            spectral_norms=spectral_norms,
            max_grad_norm=max_grad_norm,
        )
        measuring = Measuring(
            groups=groups,
            optimizers=optimizers,
            layout=layout,
            measured=needs.measured,
            interval=measurement_interval,
            budget=measurement_budget,
            num_sign_patterns=needs.num_sign_patterns,
            min_sample_groups=needs.min_sample_groups,
            micro_batch_size=micro_batch_size,
        )
        measuring.check(global_batch_size)
        if self_test:
            measuring.self_test(model)
        policy_state = first_state(state, rules, data_parallel_size=data_parallel.size)
        specification = RunSpecification(
            batch=rules,
            data_parallel_size=int(state["data_parallel_size"]) if state else data_parallel.size,
            budget_samples=budget_samples,
            tokens_per_sample=tokens_per_sample,
            optimizer=" + ".join(dict.fromkeys(map(class_name_of, optimizers))),
            parameter_groups=tuple(group.description() for group in measuring.described_groups),
            measurement_interval=measurement_interval,
            measurement_budget=measurement_budget,
            policy=policy,
            mode=mode,
            description=description,
            schedule=sampled(learning_rate_schedule, budget_samples=budget_samples) if learning_rate_schedule else (),
        )
        saved_decisions = state["pending"] if state else {}
        client = connect(
            run_id=run,
            specification=specification,
            policy_state=policy_state,
            pending={int(step): Decision.model_validate(found) for step, found in saved_decisions.items()},
            orders=orders_from(state),
            url=controller,
            token=token or os.environ.get("GNS_TOKEN"),
            spool_directory=Path(spool_directory),
            resume_step=int(state["optimizer_step"]) if state else 0,
            ranks=layout.ranks,
            decision_deadline_seconds=decision_deadline_seconds,
        )
        session = cls(
            model=model,
            optimizers=optimizers,
            layout=layout,
            measuring=measuring,
            run_id=run,
            specification=specification,
            controller=client,
            state=policy_state,
            learning_rate_schedule=learning_rate_schedule or (lambda samples_seen: 1.0),
            max_grad_norm=max_grad_norm,
            grad_scaler=grad_scaler,
            decision_deadline_seconds=decision_deadline_seconds,
            on_decision=on_decision,
        )
        if state:
            session._load(state)
        if layout.ranks.rank == 0:
            logger.info("attached: %s", session.describe())
            for name in undivided(optimizers, layout):
                logger.info("%s: every rank computes every matrix; process_group=... shares the work", name)
        return session

    def describe(self) -> str:
        """One line on what was found: layout, groups, plan."""
        groups = ", ".join(
            f"{group.name} ({group.optimizer} -> {group.geometry}, {len(group.parameters)} tensors)"
            for group in self.groups
        )
        interval = self.specification.batch.plan_interval_steps
        outer = f" plan_interval_steps={interval}" if interval > 1 else ""
        return (
            f"run={self.run_id} layout={self.layout.name} data_parallel_size={self.data_parallel.size} "
            f"groups=[{groups}] {self._measuring.describe()} policy={self.specification.policy.policy} "
            f"global_batch_size={self.plan.global_batch_size}{outer} mode={self.specification.mode}"
        )

    # ---------------------------------------------------------------- a whole loop

    def steps(
        self, dataset: Any, *, collate_fn: Callable[[list[Any]], Any] = default_collate, seed: int = 0
    ) -> Iterator[Step]:
        """Optimizer steps until the budget is used up: sampler, accumulation and resume inside.

        The order of samples depends on `seed` alone, not on batch sizes, ranks or restarts. The last step shrinks to
        what is left of the budget, and takes the learning rates and betas of so many samples.

        Args:
            dataset: map-style: len() and [index], or __getitems__(list of indices).
            collate_fn: list of samples -> micro-batch.
            seed: of the order.
        """
        stream = SampleStream(len(dataset), seed=seed)
        while True:
            left = self.specification.budget_samples - self.samples_seen
            batch_size = min(self.plan.global_batch_size, left // self.data_parallel.size * self.data_parallel.size)
            if batch_size < 1:
                self.report_progress()
                return
            step = Step(self, stream, dataset, collate_fn, batch_size)
            yield step
            if not step.applied:
                raise InvalidInputError("call step.apply() at the end of every step.")

    # ---------------------------------------------------------------- parts

    @property
    def plan(self) -> BatchPlan:
        """In force for the next step, the same on every rank."""
        return self._agreement.plan

    @property
    def groups(self) -> tuple[MeasuredGroup, ...]:
        """What is measured together, spectral groups first."""
        return self._measuring.groups

    @property
    def is_measured(self) -> bool:
        """Whether the step that runs now is a measured one."""
        return self._measuring.is_armed

    @property
    def learning_rate_factor(self) -> float:
        """What the plan multiplies the scheduled learning rate of the first optimizer with."""
        return self.learning_rate_factor_of(self.optimizers[0])

    def learning_rate_factor_of(self, optimizer: torch.optim.Optimizer) -> float:
        """What the plan multiplies the scheduled learning rate of one optimizer with."""
        return factor_for(optimizer, self._followed_plan)

    @property
    def _followed_plan(self) -> BatchPlan | None:
        return self.plan if self.specification.mode == "active" else None

    @property
    def min_micro_batches(self) -> int:
        """Micro-batches per rank that the present step needs: more than one only on measured steps."""
        return self._measuring.min_micro_batches if self.is_measured else 1

    @property
    def measurement_share(self) -> float | None:
        """Share of the time so far that measuring took, over ranks; None without a budget."""
        return self._measuring.share_of_time

    def measured(
        self, *, num_samples: int, loss_factor: float, gradient_scale: float = 1.0
    ) -> AbstractContextManager[None]:
        """Around one backward pass of a loop that keeps its own sampler.

        Args:
            num_samples: n_j, samples of this rank in this backward pass.
            loss_factor: what the mean loss over those samples was multiplied with before backward. The averaged
                gradient must be a mean over samples: R n_j / B, which is 1 / accumulation steps for equal pieces.
            gradient_scale: what a gradient scaler multiplied the loss with besides; unscale before `measure`.
        """
        return self._measuring.micro_batch(
            num_samples=num_samples, loss_factor=loss_factor, gradient_scale=gradient_scale
        )

    def observe_loss(self, loss: Tensor, *, num_samples: int) -> None:
        """Add to the mean loss of the next report. No host synchronisation."""
        self._measuring.observe_loss(loss)
        self._stopwatch.observe_loss(loss, num_samples=num_samples)

    def measure(self) -> list[GroupReading]:
        """End of the last backward pass, before clipping: the readings of a measured step, else nothing. Every rank."""
        readings = self._measuring.read()
        if self.is_measured:
            self.last_readings = self._unreported = readings
        return readings

    def supply_halves(self, *, gradient_scale: Tensor | float = 1.0) -> None:
        """Between `measure` and optimizer.step, for optimizers with update_bias_correction; else nothing happens.

        Once per measured step of the split estimator they get the difference of the two halves of the batch, for that
        step alone: `advance` drops what a step skipped by a gradient scaler has left.

        Args:
            gradient_scale: what gradients were multiplied with since `measure`, by clipping.
        """
        differences = self._measuring.differences
        for optimizer in self.optimizers:
            user = halves_user(optimizer)
            if user is not None:
                parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                user.supply_halves(
                    {each: differences.pop(each) * gradient_scale for each in parameters if each in differences}
                )
        differences.clear()

    def set_learning_rates(self, *, num_samples: int | None = None) -> None:
        """Base learning rate x schedule(samples seen) x plan factor, into every param group; and betas.

        Args:
            num_samples: of this step over all ranks, where they are fewer than the plan's batch: rates and betas are
                then coupled to them.
        """
        plan = self._followed_plan
        if plan is not None and num_samples is not None and num_samples < plan.global_batch_size:
            plan = for_fewer_samples(plan, self.specification.batch, num_samples=num_samples)
        self._coupled.set_learning_rates(self._schedule(self.samples_seen), plan)
        self._coupled.set_betas(plan)

    def set_betas(self) -> None:
        """With beta_coupling: base beta ^ plan.beta_exponent, into every param group. For schedulers of your own."""
        self._coupled.set_betas(self._followed_plan)

    def observe_validation_loss(self, value: float) -> None:
        """Goes along with the next report."""
        self._stopwatch.validation_loss = value

    def advance(self, *, num_samples: int) -> None:
        """After optimizer.step: count, report, agree on the next plan. Every rank, once per optimizer step.

        A step that a gradient scaler skipped counts, here and in outer optimizers.

        Args:
            num_samples: samples of this step over all ranks.
        """
        schedule_factor = self._schedule(self.samples_seen)
        was_measured = self.is_measured
        self.optimizer_step += 1
        self.samples_seen += num_samples
        count_skipped_steps(self.optimizers, optimizer_step=self.optimizer_step)
        self._measuring.differences.clear()
        self.supply_halves()
        seconds = self._stopwatch.end_step(was_measured=was_measured)
        if was_measured:
            readings, self._unreported = self._unreported, []
            if num_samples != self.plan.global_batch_size:
                readings = []  # another batch than the plan's: its readings would be taken for the plan's
            cost = self._report(readings, schedule_factor=schedule_factor, measured_seconds=seconds)
            self._agreement.expect(self.optimizer_step)
            self._measuring.settle(
                cost,
                optimizer_step=self.optimizer_step,
                samples_seen=self.samples_seen,
                batch_size=self.plan.global_batch_size,
            )
        self._agreement.settle(self.optimizer_step)
        self._arm()

    def report_progress(self) -> None:
        """Report step, losses and speed without readings, unless this step has been reported. Every rank.

        `steps` does it at the end of the budget, so that the controller knows the run as finished.
        """
        if self.optimizer_step != self._reported_step:
            self._report([], schedule_factor=self._schedule(self.samples_seen))

    def close(self, *, deadline_seconds: float = 5.0) -> None:
        """Send what is left, within the deadline. Local to each rank: no collective."""
        if self._controller is not None:
            self._controller.close(deadline_seconds=deadline_seconds)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint, the same on every rank: save it beside model and optimizers. Every rank."""
        return {
            "version": STATE_VERSION,
            "data_parallel_size": self.specification.data_parallel_size,
            "optimizer_step": self.optimizer_step,
            "samples_seen": self.samples_seen,
            **self._agreement.state_dict(),
            **self._coupled.state_dict(),
            "measuring": self._measuring.state_dict(),
        }

    # ---------------------------------------------------------------- inside

    def _load(self, state: Mapping[str, Any]) -> None:
        self.optimizer_step = int(state["optimizer_step"])
        self.samples_seen = int(state["samples_seen"])
        self._coupled.load_state_dict(state)
        self._agreement.load_state_dict(state)
        self._measuring.load_state_dict(
            state["measuring"], optimizer_step=self.optimizer_step, samples_seen=self.samples_seen
        )
        self._arm()

    def _arm(self) -> None:
        self._measuring.arm(optimizer_step=self.optimizer_step, samples_seen=self.samples_seen, plan=self.plan)

    def _report(
        self, readings: Sequence[GroupReading], *, schedule_factor: float, measured_seconds: float | None = None
    ) -> MeasurementCost | None:
        """Reduce losses and costs (every rank), then hand the measurement to rank 0's client."""
        interval = self._stopwatch.report(norm_seconds=self._measuring.norm_seconds, measured_seconds=measured_seconds)
        cost, step_seconds = interval.cost, interval.step_seconds
        self._reported_step = self.optimizer_step
        if self._controller is None:
            return cost
        plan = self.plan
        try:
            self._controller.report(
                NoiseScaleMeasurement(
                    run_id=self.run_id,
                    attempt=0,
                    optimizer_step=self.optimizer_step,
                    samples_seen=self.samples_seen,
                    plan_version=plan.version,
                    global_batch_size=plan.global_batch_size,
                    micro_batch_size=plan.micro_batch_size,
                    gradient_accumulation_steps=plan.gradient_accumulation_steps,
                    data_parallel_size=self.data_parallel.size,
                    schedule_factor=schedule_factor,
                    step_seconds=step_seconds,
                    samples_per_second=plan.global_batch_size / step_seconds if step_seconds else None,
                    measurement_seconds=cost.extra_seconds if cost else None,
                    loss=interval.loss,
                    validation_loss=interval.validation_loss,
                    readings=tuple(readings),
                )
            )
        except Exception:
            # Only rank 0 is here: raising would leave the others waiting.
            logger.exception("measurement lost, training goes on: run_id=%s step=%d", self.run_id, self.optimizer_step)
        return cost
