"""The policies, in this process, under the control that operators have left."""

from __future__ import annotations

from collections.abc import Mapping

from gns_controller.core.contract import Decision, NoiseScaleMeasurement
from gns_controller.core.policies import PolicyState, decide
from gns_controller.core.runs import Control, RunSpecification
from trainer_hooks.client.protocol import Verdict


class LocalController:
    """Folds every measurement with the policy of the specification, or an operator's; nothing leaves the process.

    Args:
        specification: of the run.
        state: where the fold starts.
        pending: decisions of a checkpoint that are not in force yet, by optimizer_step.
        control: of a checkpoint; None: the policy of the specification.
    """

    def __init__(
        self,
        specification: RunSpecification,
        state: PolicyState,
        pending: Mapping[int, Decision] | None = None,
        control: Control | None = None,
    ) -> None:
        self._specification = specification
        self.control = control or Control.initial(specification.policy)
        """Policy and override of the next fold. Any thread may replace it; a fold reads it once."""
        self._state = state
        self._decisions = dict(pending or {})

    @property
    def state(self) -> PolicyState:
        """Memory of the policy."""
        return self._state

    @state.setter
    def state(self, state: PolicyState) -> None:
        self._state = state

    @property
    def pending(self) -> dict[int, Decision]:
        """Decisions whose verdict was not taken yet."""
        return dict(self._decisions)

    def wait_registered(self, *, deadline_seconds: float) -> None:
        """Nothing to wait for."""

    def report(self, measurement: NoiseScaleMeasurement) -> None:
        """Apply the policy to one measurement."""
        control = self.control
        self._state, decision = decide(
            control.policy,
            self._state,
            measurement,
            facts=self._specification.facts,
            policy_revision=control.policy_revision,
            follow_trainer=self._specification.mode == "active",
            override=control.override,
        )
        self._decisions[measurement.optimizer_step] = decision

    def verdict(self, *, optimizer_step: int, deadline_seconds: float) -> Verdict:
        """The plan after the measurement of that step. Older ones are forgotten."""
        self._decisions = {step: kept for step, kept in self._decisions.items() if step >= optimizer_step}
        decision = self._decisions.pop(optimizer_step)
        return Verdict(decision.plan, "local", decision)

    def close(self, *, deadline_seconds: float) -> None:
        """Nothing is left open."""
