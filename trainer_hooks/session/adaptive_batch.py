"""The session: the one object that a training loop holds.

It hands out optimizer steps, ends each of them (read, clip, step, learning rate, report) and puts the agreed plan in
force. Long, because the public object with its documented arguments is one thing to read.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from gns_controller.core.contract import BatchPlan, GroupReading, NoiseScaleMeasurement
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import NoiseScalePolicyConfig, RunFacts
from trainer_hooks.client.options import ConnectionOptions
from trainer_hooks.data import SampleStream, cut_micro_batches
from trainer_hooks.data.lr_schedule import LearningRateSchedule
from trainer_hooks.distributed.clipping import clip_grad_norm
from trainer_hooks.distributed.layout import find_layout
from trainer_hooks.measurement.budget import MeasurementCost
from trainer_hooks.measurement.groups import MeasuredGroup
from trainer_hooks.measurement.options import MeasurementOptions
from trainer_hooks.optim.protocols import count_skipped_steps, halves_user
from trainer_hooks.session import attach as phases
from trainer_hooks.session.attach import Attachment, PolicyGiven
from trainer_hooks.session.checkpoint import STATE_VERSION, first_state
from trainer_hooks.session.optimizer_coupling import CoupledOptimizers, factor_for, for_fewer_samples
from trainer_hooks.session.options import CouplingOptions
from trainer_hooks.session.plan_agreement import PlanAgreement
from trainer_hooks.session.step import GradientScaler, MicroBatch, Step, StepContext
from trainer_hooks.session.timing import Stopwatch

logger = logging.getLogger(__name__)


class AdaptiveBatch:
    """Session of one training run: measures, reports and applies batch plans. Make one with `attach`, on every rank."""

    def __init__(self, attachment: Attachment) -> None:
        self.model = attachment.model
        self.optimizers = attachment.optimizers
        self.layout = attachment.layout
        self.data_parallel = self.layout.data_parallel
        """Place of this rank among the ranks that see different samples."""
        self.ranks = self.layout.ranks
        """All ranks that hold a part or a copy of the model."""
        self.run_id = attachment.run_id
        self.specification = attachment.specification
        self.max_grad_norm = attachment.max_grad_norm
        self.grad_scaler = attachment.grad_scaler
        self.optimizer_step = 0
        self.samples_seen = 0
        self.last_readings: list[GroupReading] = []
        """Readings of the latest measured step, the same on every rank."""
        self._client = attachment.client
        self._scheduler = attachment.scheduler
        self._schedule = attachment.learning_rate_schedule
        self._agreement = PlanAgreement(
            run_id=self.run_id,
            specification=self.specification,
            layout=self.layout,
            controller=self._client,
            optimizers=self.optimizers,
            plan=attachment.policy_state.plan,
            connection=attachment.connection,
        )
        self._coupled = CoupledOptimizers(
            self.optimizers, couples_betas=self.specification.batch.beta_coupling == "half_life"
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
        mode: Literal["active", "shadow"] = "active",
        measurement: MeasurementOptions | None = None,
        coupling: CouplingOptions | None = None,
        connection: ConnectionOptions | None = None,
        learning_rate_schedule: LearningRateSchedule | None = None,
        max_grad_norm: float | None = None,
        grad_scaler: GradientScaler | None = None,
        micro_batch_granularity: int = 1,
        tokens_per_sample: int | None = None,
        description: str = "",
        process_group: Any = None,
        state: Mapping[str, Any] | None = None,
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
            mode: "active", or "shadow" to report and record and change nothing.
            measurement: what is measured, how often and how finely. Default: as the policy and a budget of 1 % ask.
            coupling: what a batch change does to learning rates and averages. Default: the sound rule per optimizer.
            connection: token, deadlines, spool folder, callback for decisions.
            learning_rate_schedule: samples seen -> factor; see `warmup_cosine`. Default constant.
            max_grad_norm: clip gradients to this l2 norm, after measuring.
            grad_scaler: torch.amp.GradScaler; gradients are unscaled before they are measured and clipped.
            micro_batch_granularity: below one full pass micro-batches shrink in multiples of this.
            tokens_per_sample: for policies and axes in tokens.
            description: free text on the page.
            process_group: data-parallel group of a DDP model. Default: the wrapper's. Sharded models bring their own.
            state: what `state_dict` returned, to resume.

        Raises:
            BatchShapeError: these ranks cannot make this batch; the message names the nearest that they can.
            CouplingError: no rule is known to be sound for an optimizer, its momentum or this policy.
            GeometryError: an optimizer of unknown geometry, or a policy that follows a geometry no group has.
            TooFewGroupsError: one rank, one sample: nothing to compare.
            SelfTestError: gradients are not averaged over ranks as measuring relies on; parameters are named.
            RunConflictError: the controller has this run with another specification.
            InvalidInputError: any other argument that cannot be used.
        """
        measurement, coupling = measurement or MeasurementOptions(), coupling or CouplingOptions()
        connection = connection or ConnectionOptions()

        # Arguments, the same on every rank.
        layout = find_layout(model, process_group)
        policy = phases.agreed_policy(policy, layout.ranks) or NoiseScalePolicyConfig.recommended(
            budget_samples=budget_samples
        )
        optimizers = phases.as_optimizers(optimizer)
        phases.check_arguments(
            run=run, optimizers=optimizers, state=state, max_grad_norm=max_grad_norm, ranks=layout.ranks
        )

        # Groups and rules.
        groups, rules = phases.groups_and_rules(
            model,
            optimizers,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            micro_batch_granularity=micro_batch_granularity,
            measurement=measurement,
            coupling=coupling,
            connection=connection,
        )
        facts = RunFacts(rules=rules, budget_samples=budget_samples, tokens_per_sample=tokens_per_sample)

        # Measurement, with the self-test.
        scheduler = phases.build_scheduler(
            model, optimizers, policy=policy, options=measurement, groups=groups, facts=facts, layout=layout
        )

        # Specification and connection.
        data_parallel_size = layout.data_parallel.size
        policy_state = first_state(state, rules, data_parallel_size=data_parallel_size)
        specification = phases.specify(
            policy=policy,
            rules=rules,
            budget_samples=budget_samples,
            tokens_per_sample=tokens_per_sample,
            optimizers=optimizers,
            scheduler=scheduler,
            options=measurement,
            data_parallel_size=int(state["data_parallel_size"]) if state else data_parallel_size,
            learning_rate_schedule=learning_rate_schedule,
            mode=mode,
            description=description,
        )
        client = phases.open_client(
            run,
            specification,
            url=controller,
            state=state,
            policy_state=policy_state,
            connection=connection,
            ranks=layout.ranks,
        )

        # The session itself.
        session = cls(
            Attachment(
                model=model,
                optimizers=tuple(optimizers),
                layout=layout,
                scheduler=scheduler,
                run_id=run,
                specification=specification,
                client=client,
                policy_state=policy_state,
                learning_rate_schedule=learning_rate_schedule or (lambda samples_seen: 1.0),
                max_grad_norm=max_grad_norm,
                grad_scaler=grad_scaler,
                connection=connection,
            )
        )
        if state:
            session._load(state)
        if layout.ranks.rank == 0:
            logger.info("attached: %s", session.describe())
            for name in phases.undivided(optimizers, layout):
                logger.info("%s: every rank computes every matrix; process_group=... shares the work", name)
        return session

    def describe(self) -> str:
        """Return one line on what was found: layout, groups, plan."""
        groups = ", ".join(
            f"{group.name} ({group.optimizer} -> {group.geometry}, {len(group.parameters)} tensors)"
            for group in self.groups
        )
        interval = self.specification.batch.plan_interval_steps
        outer = f" plan_interval_steps={interval}" if interval > 1 else ""
        return (
            f"run={self.run_id} layout={self.layout.name} data_parallel_size={self.data_parallel.size} "
            f"groups=[{groups}] {self._scheduler.describe()} policy={self.specification.policy.policy} "
            f"global_batch_size={self.plan.global_batch_size}{outer} mode={self.specification.mode}"
        )

    # ---------------------------------------------------------------- a whole loop

    def steps(
        self, dataset: Any, *, collate_fn: Callable[[list[Any]], Any] = default_collate, seed: int = 0
    ) -> Iterator[Step]:
        """Yield optimizer steps until the budget is used up: sampler, accumulation and resume inside.

        The order of samples depends on `seed` alone, not on batch sizes, ranks or restarts. The last step shrinks to
        what is left of the budget, and takes the learning rates and betas of so many samples.

        Args:
            dataset: map-style: len() and [index], or __getitems__(list of indices).
            collate_fn: list of samples -> micro-batch.
            seed: seed of the order.
        """
        stream = SampleStream(len(dataset), seed=seed)
        context = StepContext(
            model=self.model,
            layout=self.layout,
            scheduler=self._scheduler,
            grad_scaler=self.grad_scaler,
            fetch=lambda indices: collate_fn(_fetch(dataset, indices)),
            observe_loss=lambda loss, num_samples: self.observe_loss(loss, num_samples=num_samples),
            finish=self._finish_step,
        )
        size = self.data_parallel.size
        while True:
            left = self.specification.budget_samples - self.samples_seen
            batch_size = min(self.plan.global_batch_size, left // size * size)
            if batch_size < 1:
                self.report_progress()
                return
            step = Step(self._micro_batches(stream, batch_size), global_batch_size=batch_size, context=context)
            yield step
            if not step.applied:
                raise InvalidInputError("call step.apply() at the end of every step.")

    def _micro_batches(self, stream: SampleStream, batch_size: int) -> list[MicroBatch]:
        """Cut this rank's part of a step into micro-batches: equally many on every rank."""
        per_rank = batch_size // self.data_parallel.size
        sizes = cut_micro_batches(
            per_rank,
            micro_batch_size=self.specification.batch.micro_batch_size,
            min_pieces=self.min_micro_batches,
        )
        position = self.samples_seen + self.data_parallel.rank * per_rank
        starts = itertools.accumulate(sizes, initial=position)
        return [MicroBatch(stream.positions(start, size).tolist()) for start, size in zip(starts, sizes, strict=False)]

    def _finish_step(self, num_samples: int) -> None:
        """End an optimizer step of so many samples over all ranks: measure, clip, step, zero, report. Every rank."""
        self.set_learning_rates(num_samples=num_samples)

        # Measure the whole gradient, unscaled and not yet clipped.
        scaler = self.grad_scaler
        if scaler is not None:
            for optimizer in self.optimizers:
                scaler.unscale_(optimizer)
        self.measure()

        # Clip all parameters by their common norm; the halves of a measured step are scaled alike.
        clipped: Tensor | float = 1.0
        if self.max_grad_norm is not None:
            trained = [p for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]]
            norm = clip_grad_norm(trained, self.max_grad_norm, self.layout)
            clipped = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.supply_halves(gradient_scale=clipped)

        # Step. A scaler skips optimizers whose gradients are not finite; the step counts all the same.
        for optimizer in self.optimizers:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()
        self.advance(num_samples=num_samples)

    # ---------------------------------------------------------------- parts

    @property
    def plan(self) -> BatchPlan:
        """The plan in force for the next step, the same on every rank."""
        return self._agreement.plan

    @property
    def groups(self) -> tuple[MeasuredGroup, ...]:
        """Groups of parameters that are measured together, spectral ones first."""
        return self._scheduler.groups

    @property
    def is_measured(self) -> bool:
        """True while the step that runs now is a measured one."""
        return self._scheduler.is_armed

    @property
    def learning_rate_factor(self) -> float:
        """The plan's factor on the scheduled learning rate of the first optimizer."""
        return self.learning_rate_factor_of(self.optimizers[0])

    def learning_rate_factor_of(self, optimizer: torch.optim.Optimizer) -> float:
        """Return the plan's factor on the scheduled learning rate of one optimizer."""
        return factor_for(optimizer, self._followed_plan)

    @property
    def _followed_plan(self) -> BatchPlan | None:
        return self.plan if self.specification.mode == "active" else None

    @property
    def min_micro_batches(self) -> int:
        """Micro-batches per rank that the present step needs: more than one only on measured steps."""
        return self._scheduler.min_micro_batches if self.is_measured else 1

    @property
    def measurement_share(self) -> float | None:
        """Share of the time so far that measuring took, over ranks; None without a budget."""
        return self._scheduler.share_of_time

    def measured(
        self, *, num_samples: int, loss_factor: float, gradient_scale: float = 1.0
    ) -> AbstractContextManager[None]:
        """Return the context around one backward pass of a loop that keeps its own sampler.

        Args:
            num_samples: n_j, samples of this rank in this backward pass.
            loss_factor: the factor on the mean loss over those samples before backward. The averaged gradient must be a
                mean over samples: R n_j / B, which is 1 / accumulation steps for equal pieces.
            gradient_scale: the factor of a gradient scaler besides; unscale before `measure`.
        """
        return self._scheduler.micro_batch(
            num_samples=num_samples, loss_factor=loss_factor, gradient_scale=gradient_scale
        )

    def observe_loss(self, loss: Tensor, *, num_samples: int) -> None:
        """Add a mean loss over so many samples to the next report. No host synchronisation."""
        self._scheduler.observe_loss(loss)
        self._stopwatch.observe_loss(loss, num_samples=num_samples)

    def measure(self) -> list[GroupReading]:
        """Return the readings of a measured step, else an empty list. After the last backward pass, on every rank.

        Gradients are unscaled and not yet clipped.
        """
        readings = self._scheduler.read()
        if self.is_measured:
            self.last_readings = self._unreported = readings
        return readings

    def supply_halves(self, *, gradient_scale: Tensor | float = 1.0) -> None:
        """Hand optimizers with update_bias_correction the difference of the two halves of the batch.

        Call it between `measure` and optimizer.step. They get it once per measured step of the split estimator, for
        that step alone: `advance` drops what a step skipped by a gradient scaler has left.

        Args:
            gradient_scale: the factor on gradients since `measure`, by clipping.
        """
        differences = self._scheduler.differences
        for optimizer in self.optimizers:
            user = halves_user(optimizer)
            if user is not None:
                parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                user.supply_halves({p: differences.pop(p) * gradient_scale for p in parameters if p in differences})
        differences.clear()

    def set_learning_rates(self, *, num_samples: int | None = None) -> None:
        """Write base learning rate x schedule(samples seen) x plan factor into every param group; and betas.

        Args:
            num_samples: samples of this step over all ranks, where they are fewer than the plan's batch: rates and
                betas are then coupled to them.
        """
        plan = self._followed_plan
        if plan is not None and num_samples is not None and num_samples < plan.global_batch_size:
            plan = for_fewer_samples(plan, self.specification.batch, num_samples=num_samples)
        self._coupled.set_learning_rates(self._schedule(self.samples_seen), plan)
        self._coupled.set_betas(plan)

    def set_betas(self) -> None:
        """Write base beta ^ plan.beta_exponent into every param group, if betas are coupled.

        For loops that write learning rates themselves.
        """
        self._coupled.set_betas(self._followed_plan)

    def observe_validation_loss(self, value: float) -> None:
        """Add a validation loss to the next report."""
        self._stopwatch.validation_loss = value

    def advance(self, *, num_samples: int) -> None:
        """Count an optimizer step, report it, agree on the next plan. Every rank, once after each optimizer.step.

        A step that a gradient scaler skipped counts, here and in outer optimizers.

        Args:
            num_samples: samples of this step over all ranks.
        """
        # Count, and drop halves that no optimizer took.
        schedule_factor = self._schedule(self.samples_seen)
        was_measured = self.is_measured
        self.optimizer_step += 1
        self.samples_seen += num_samples
        count_skipped_steps(self.optimizers, optimizer_step=self.optimizer_step)
        self._scheduler.differences.clear()
        self.supply_halves()
        seconds = self._stopwatch.end_step(was_measured=was_measured)

        # Report a measured step, and plan the next one. All ranks agree on what was measured: counters decide it.
        if was_measured:
            readings, self._unreported = self._unreported, []
            if num_samples != self.plan.global_batch_size:
                readings = []  # another batch than the plan's: its readings would be taken for the plan's
            cost = self._report(readings, schedule_factor=schedule_factor, measured_seconds=seconds)
            self._agreement.expect(self.optimizer_step)
            self._scheduler.settle(
                cost,
                optimizer_step=self.optimizer_step,
                samples_seen=self.samples_seen,
                batch_size=self.plan.global_batch_size,
            )

        # The plan of the next step.
        self._agreement.settle(self.optimizer_step)
        self._arm()

    def report_progress(self) -> None:
        """Report step, losses and speed without readings, unless this step has been reported. Every rank.

        `steps` does it at the end of the budget, so that the controller counts the run as finished.
        """
        if self.optimizer_step != self._reported_step:
            self._report([], schedule_factor=self._schedule(self.samples_seen))

    def close(self, *, deadline_seconds: float = 5.0) -> None:
        """Send what is left, within the deadline. Local to each rank: no collective."""
        if self._client is not None:
            self._client.close(deadline_seconds=deadline_seconds)

    def state_dict(self) -> dict[str, Any]:
        """Return the checkpoint, the same on every rank: save it beside model and optimizers. Every rank."""
        return {
            "version": STATE_VERSION,
            "data_parallel_size": self.specification.data_parallel_size,
            "optimizer_step": self.optimizer_step,
            "samples_seen": self.samples_seen,
            **self._agreement.state_dict(),
            **self._coupled.state_dict(),
            "measuring": self._scheduler.state_dict(),
        }

    # ---------------------------------------------------------------- inside

    def _load(self, state: Mapping[str, Any]) -> None:
        self.optimizer_step = int(state["optimizer_step"])
        self.samples_seen = int(state["samples_seen"])
        self._coupled.load_state_dict(state)
        self._agreement.load_state_dict(state)
        self._scheduler.load_state_dict(
            state["measuring"], optimizer_step=self.optimizer_step, samples_seen=self.samples_seen
        )
        self._arm()

    def _arm(self) -> None:
        self._scheduler.arm(optimizer_step=self.optimizer_step, samples_seen=self.samples_seen, plan=self.plan)

    def _report(
        self, readings: Sequence[GroupReading], *, schedule_factor: float, measured_seconds: float | None = None
    ) -> MeasurementCost | None:
        """Reduce losses and costs over ranks, then hand the measurement to rank 0's client. Every rank."""
        interval = self._stopwatch.report(norm_seconds=self._scheduler.norm_seconds, measured_seconds=measured_seconds)
        cost, step_seconds = interval.cost, interval.step_seconds
        self._reported_step = self.optimizer_step
        if self._client is None:
            return cost
        plan = self.plan
        try:
            self._client.report(
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


def _fetch(dataset: Any, indices: Sequence[int]) -> list[Any]:
    if hasattr(dataset, "__getitems__"):
        samples: list[Any] = dataset.__getitems__(indices)
        return samples
    return [dataset[index] for index in indices]
