"""A controller over HTTP, from a background thread, that training never waits for beyond a deadline.

The training thread hands measurements over and folds them with the local policy. One thread puts them on disk, another
registers and posts what is on disk, in order. A silent network does not keep measurements from the disk; a slow disk
delays answers, and then, as on any silence, the local verdict stands. After one silence nothing waits until the
controller has answered within the deadline. Every answer carries the control in force; the local fold uses the newest.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from gns_controller.core.contract import Decision, NoiseScaleMeasurement
from gns_controller.core.errors import GnsError, InvalidInputError, RunConflictError, StaleAttemptError
from gns_controller.core.policies import KEEP_UNKNOWN, PolicyState, UnavailablePolicyConfig
from gns_controller.core.runs import Control, IngestReply, Registration, RegistrationReply
from trainer_hooks.client.local import LocalController
from trainer_hooks.client.protocol import Verdict
from trainer_hooks.client.spool import Spool, leftovers

logger = logging.getLogger(__name__)

_PROBLEM_PREFIX = "urn:gns-controller:problem:"
_MAX_PER_REQUEST = 100
_FIRST_RETRY_SECONDS = 0.5
_LONGEST_RETRY_SECONDS = 30.0


class _RefusedError(Exception):
    """The controller understood and said no: trying again as it is would not help."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        super().__init__(f"HTTP {status}: {problem.get('detail') or problem.get('title') or 'no reason given'}")
        self.status = status
        self.problem = problem


class HttpController:
    """Reports to a controller and follows its plans; decides alone when it does not answer in time.

    Args:
        url: of the controller, with scheme: http://127.0.0.1:8000.
        run_id: name of the run.
        registration: specification and incarnation.
        state: where the fold starts.
        spool_directory: measurements wait here while the controller is away.
        pending: decisions of a checkpoint that are not in force yet, by optimizer_step.
        control: of the checkpoint, until the controller answers.
        token: bearer token, if the controller asks for one.
        decision_deadline_seconds: an answer slower than this does not make anybody wait again.
        timeout_seconds: for one request of the background thread.
        transport: for tests: how requests travel.

    Raises:
        InvalidInputError: the URL has no http scheme or no host.
    """

    def __init__(
        self,
        *,
        url: str,
        run_id: str,
        registration: Registration,
        state: PolicyState,
        spool_directory: Path,
        pending: Mapping[int, Decision] | None = None,
        control: Control | None = None,
        token: str | None = None,
        decision_deadline_seconds: float = 2.0,
        timeout_seconds: float = 10.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise InvalidInputError(f"controller={url!r} is not an address: {error}.") from None
        if address.scheme not in ("http", "https") or not address.host:
            raise InvalidInputError(f"controller={url!r} is not an address like http://127.0.0.1:8000.")
        token = (token or "").strip()
        if not (token.isascii() and token.isprintable()):
            raise InvalidInputError("the controller's token holds characters that no token has.")
        self._run_id = run_id
        self._registration = registration
        self._local = LocalController(registration.specification, state, pending, control)
        self._resumed_steps = frozenset(pending or ())
        self._spool_directory = spool_directory
        self._deadline_seconds = decision_deadline_seconds
        self._http = httpx.Client(
            base_url=url.rstrip("/"),
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=timeout_seconds,
            transport=transport,
            trust_env=False,
        )
        if (requests := logging.getLogger("httpx")).level == logging.NOTSET:
            requests.setLevel(logging.WARNING)  # at INFO it writes a line for each request into the job's log
        self._spool = Spool(spool_directory, run_id=run_id, registration=registration)
        self._changed = threading.Condition()
        self._unspooled: deque[NoiseScaleMeasurement] = deque()
        self._unsent: deque[NoiseScaleMeasurement] = deque()
        self._num_sent = 0
        self._replies: dict[int, IngestReply] = {}
        self._answered_step = -1
        self._attempt: int | None = None
        self._refusal: GnsError | None = None
        self._away = False
        self._slow = False
        self._closing = False
        self._all_spooled = False
        self._retry_at = 0.0
        self._retry_seconds = _FIRST_RETRY_SECONDS
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._spool_forever, "gns-spool"), (self._send_forever, "gns-sender"))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def state(self) -> PolicyState:
        """Memory of the local policy."""
        return self._local.state

    @property
    def pending(self) -> dict[int, Decision]:
        """Local decisions whose verdict was not taken yet."""
        return self._local.pending

    @property
    def control(self) -> Control:
        """Policy and override of the local fold."""
        return self._local.control

    def wait_registered(self, *, deadline_seconds: float) -> None:
        """Wait for the first answer, a refusal included; silence is not an error.

        Raises:
            RunConflictError: the name is taken by another specification.
            InvalidInputError: the controller refuses this specification or token.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._attempt is not None or self._refusal is not None or self._away, deadline_seconds
            )
            if self._refusal is not None:
                raise self._refusal

    def report(self, measurement: NoiseScaleMeasurement) -> None:
        """Fold locally, hand over to the sender."""
        try:
            self._local.report(measurement)
        except Exception:
            # A policy with extreme numbers costs this process its decision; the measurement goes its way all the same.
            logger.exception("no local decision: run_id=%s optimizer_step=%d", self._run_id, measurement.optimizer_step)
        with self._changed:
            self._unspooled.append(measurement)
            self._changed.notify_all()

    def verdict(self, *, optimizer_step: int, deadline_seconds: float) -> Verdict:
        """The controller's plan if its answer to that step is here in time, else the local one."""
        local = self._local.verdict(optimizer_step=optimizer_step, deadline_seconds=0)
        if optimizer_step in self._resumed_steps:
            return local  # measured before the checkpoint: this incarnation never sent it
        with self._changed:
            in_time = self._changed.wait_for(
                lambda: self._answered_step >= optimizer_step or self._away or self._refusal is not None,
                0 if self._slow else deadline_seconds,
            )
            if not in_time and not self._slow:
                self._slow = True
                logger.warning(
                    "controller slow, deciding locally until it answers in time: run_id=%s deadline_seconds=%.1f",
                    self._run_id,
                    deadline_seconds,
                )
            reply = self._replies.pop(optimizer_step, None)
            self._replies = {step: kept for step, kept in self._replies.items() if step > optimizer_step}
        if reply is None or reply.decision is None:
            return local
        if reply.plan != local.plan:
            self._local.state = self._local.state.model_copy(update={"plan": reply.plan})
        return Verdict(reply.plan, "controller", reply.decision)

    def close(self, *, deadline_seconds: float) -> None:
        """Flush, then end the threads. What could not be sent stays in the spool for the next incarnation."""
        give_up_at = time.monotonic() + deadline_seconds
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(give_up_at - time.monotonic(), 0.0))
        left = len(self._unspooled) + len(self._unsent)
        if left:
            logger.warning(
                "measurements stay in the spool until this run is attached again: run_id=%s count=%d directory=%s",
                self._run_id,
                left,
                self._spool_directory,
            )

    def _spool_forever(self) -> None:
        self._spool.open()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._unspooled)
                fresh, closing = list(self._unspooled), self._closing
            for measurement in fresh:
                self._spool.append(measurement)
            with self._changed:
                for measurement in fresh:
                    self._unspooled.popleft()
                    self._unsent.append(measurement)
                self._all_spooled = closing
                self._changed.notify_all()
            if closing:
                return

    def _send_forever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work, self._seconds_until_retry())
                last_round = self._all_spooled
            if self._refusal is None and (last_round or time.monotonic() >= self._retry_at):
                self._try_to_send()
            if last_round:
                self._spool.close(everything_sent=not self._unsent)
                return

    def _has_work(self) -> bool:
        owing = self._refusal is None and (self._attempt is None or bool(self._unsent))
        return self._all_spooled or (owing and time.monotonic() >= self._retry_at)

    def _seconds_until_retry(self) -> float | None:
        if self._refusal is not None or (self._attempt is not None and not self._unsent):
            return None
        return max(self._retry_at - time.monotonic(), 0.0)

    def _try_to_send(self) -> None:
        try:
            if self._attempt is None:
                self._send_leftovers()
                registered = self._register(self._registration)
                self._take_control(registered)
                self._set_attempt(registered.attempt)
            while self._unsent:
                batch = [self._unsent[i] for i in range(min(len(self._unsent), _MAX_PER_REQUEST))]
                assert self._attempt is not None
                began = time.monotonic()
                reply = self._post(batch, attempt=self._attempt)
                slow = time.monotonic() - began > self._deadline_seconds
                for _ in batch:
                    self._unsent.popleft()
                self._num_sent += len(batch)
                self._take_reply(reply, optimizer_step=batch[-1].optimizer_step, slow=slow)
                self._spool.mark_sent(self._num_sent)
        except _RefusedError as refusal:
            self._take_refusal(refusal)
        except (httpx.HTTPError, ValueError, OSError) as error:
            self._note_away(error)
        except Exception as error:
            logger.exception("sending failed in a way that we did not foresee: run_id=%s", self._run_id)
            self._note_away(error)
        else:
            self._note_back()

    def _send_leftovers(self) -> None:
        for leftover in leftovers(
            self._spool_directory, run_id=self._run_id, except_incarnation=self._registration.incarnation
        ):
            refused = False
            try:
                attempt = self._register(leftover.registration).attempt
                measurements = leftover.measurements
                for start in range(0, len(measurements), _MAX_PER_REQUEST):
                    self._post(measurements[start : start + _MAX_PER_REQUEST], attempt=attempt)
            except _RefusedError as refusal:
                if refusal.status != 409:
                    raise
                logger.warning("controller refuses an old spool: path=%s reason=%s", leftover.path, refusal)
                refused = True
            try:
                leftover.dispose(refused=refused)
            except OSError as error:
                logger.warning("old spool cannot be removed: path=%s error=%s", leftover.path, error)

    def _register(self, registration: Registration) -> RegistrationReply:
        response = self._http.put(
            f"/api/v1/runs/{self._run_id}",
            content=registration.model_dump_json(),
            headers={"Content-Type": "application/json"},
        )
        _raise_unless_accepted(response)
        return RegistrationReply.model_validate_json(response.content, context=KEEP_UNKNOWN)

    def _post(self, batch: Sequence[NoiseScaleMeasurement], *, attempt: int) -> IngestReply | None:
        """Send measurements in order; a single one that the controller cannot take is left out with a log line."""
        lines = [m.model_copy(update={"attempt": attempt}).model_dump_json() for m in batch]
        response = self._http.post(
            f"/api/v1/runs/{self._run_id}/measurements",
            content=f'{{"measurements":[{",".join(lines)}]}}',
            headers={"Content-Type": "application/json"},
        )
        try:
            _raise_unless_accepted(response)
        except _RefusedError as refusal:
            if refusal.status not in (400, 413, 422):
                raise
            if len(batch) > 1:
                middle = len(batch) // 2
                first = self._post(batch[:middle], attempt=attempt)
                return self._post(batch[middle:], attempt=attempt) or first
            logger.error(
                "controller cannot take this measurement, set aside: run_id=%s optimizer_step=%d reason=%s",
                self._run_id,
                batch[0].optimizer_step,
                refusal,
            )
            self._spool.set_aside(batch[0])
            return None
        return IngestReply.model_validate_json(response.content, context=KEEP_UNKNOWN)

    def _set_attempt(self, attempt: int) -> None:
        with self._changed:
            self._attempt = attempt
            self._changed.notify_all()

    def _take_control(self, reply: RegistrationReply | IngestReply) -> None:
        """Let the local fold follow the control in force; until an operator changes it, that of the specification.

        Where the policy cannot be run in this process, the local fold keeps the policy before.
        """
        before = self._local.control
        policy = reply.policy or self._registration.specification.policy
        missing = policy if isinstance(policy, UnavailablePolicyConfig) else None
        control = Control(
            policy=before.policy if missing else policy,
            policy_revision=reply.policy_revision,
            override=reply.override,
        )
        if control == before:
            return
        if missing and control.policy_revision != before.policy_revision:
            logger.warning(
                "local decisions keep the policy before: run_id=%s policy=%s reason=%s",
                self._run_id,
                before.policy.policy,
                missing.reason,
            )
        self._local.control = control
        if control.policy_revision != before.policy_revision:
            logger.info(
                "an operator changed the control: run_id=%s policy_revision=%d policy=%s override=%s",
                self._run_id,
                control.policy_revision,
                policy.policy,
                control.override.kind if control.override else "none",
            )

    def _take_reply(self, reply: IngestReply | None, *, optimizer_step: int, slow: bool) -> None:
        if reply is not None:
            self._take_control(reply)
        with self._changed:
            self._slow = slow
            self._answered_step = optimizer_step
            if reply is not None and reply.decision is not None:
                self._replies[reply.decision.optimizer_step] = reply
            self._changed.notify_all()

    def _take_refusal(self, refusal: _RefusedError) -> None:
        if refusal.status == 404:
            self._attempt = None
            self._note_away(refusal)
            return
        with self._changed:
            self._refusal = _error_for(refusal, run_id=self._run_id, attempt=self._attempt)
            self._changed.notify_all()
        logger.error("controller refuses this run, deciding locally from now on: %s", self._refusal)

    def _note_away(self, error: Exception) -> None:
        if not self._away:
            logger.warning(
                "controller away, deciding locally and spooling: run_id=%s url=%s error=%s",
                self._run_id,
                self._http.base_url,
                error or type(error).__name__,
            )
        with self._changed:
            self._away = True
            pause = max(self._retry_seconds * random.uniform(0.5, 1.0), _retry_after_seconds(error))
            self._retry_at = time.monotonic() + pause
            self._retry_seconds = min(2 * self._retry_seconds, _LONGEST_RETRY_SECONDS)
            self._changed.notify_all()

    def _note_back(self) -> None:
        if self._away:
            logger.warning("controller back, spool sent: run_id=%s", self._run_id)
        with self._changed:
            self._away, self._retry_at, self._retry_seconds = False, 0.0, _FIRST_RETRY_SECONDS


def _retry_after_seconds(error: Exception) -> float:
    """What a 429 or 503 asks for, within reason."""
    if not isinstance(error, httpx.HTTPStatusError):
        return 0.0
    asked = error.response.headers.get("retry-after", "")
    return min(float(asked), _LONGEST_RETRY_SECONDS) if asked.isdigit() else 0.0


def _raise_unless_accepted(response: httpx.Response) -> None:
    """Our service's word is final below 500; anything else, a proxy's page included, is an outage."""
    if response.is_success:
        return
    if response.status_code < 500 and response.status_code != 429:
        problem = _problem_of(response)
        if problem is not None:
            raise _RefusedError(response.status_code, problem)
    response.raise_for_status()
    raise httpx.HTTPError(f"unexpected answer {response.status_code}")


def _problem_of(response: httpx.Response) -> dict[str, Any] | None:
    """Our service's problem details; None for anybody else's answer."""
    if not response.headers.get("content-type", "").startswith("application/problem+json"):
        return None
    try:
        problem = response.json()
    except ValueError:
        return None
    return problem if isinstance(problem, dict) and str(problem.get("type")).startswith(_PROBLEM_PREFIX) else None


def _error_for(refusal: _RefusedError, *, run_id: str, attempt: int | None) -> GnsError:
    problem = refusal.problem
    if isinstance(problem.get("registered"), dict) and isinstance(problem.get("requested"), dict):
        return RunConflictError(run_id, registered=problem["registered"], requested=problem["requested"])
    if refusal.status == 409:
        return StaleAttemptError(run_id, attempt=attempt or 0, current_attempt=problem.get("current_attempt", 0))
    errors = [error for error in problem.get("errors") or [] if isinstance(error, dict)]
    pointers = "; ".join(f"{error.get('pointer')}: {error.get('detail')}" for error in errors)
    return InvalidInputError(
        f"the controller refuses run {run_id!r}: {refusal}{' (' + pointers + ')' if pointers else ''}"
    )
