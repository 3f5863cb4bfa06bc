"""Which steps a session measures, how finely, on which layers; on a clock that the test turns."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gns_controller.core.contract import NoiseScaleMeasurement, Span
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import HoldPolicyConfig
from tests.attaching import attach_arguments
from trainer_hooks import AdaptiveBatch
from trainer_hooks.estimators.by_geometry import SPLIT_SUMS
from trainer_hooks.measurement import scheduler as measuring
from trainer_hooks.measurement.group_reader import GroupReader
from trainer_hooks.optim import Muon, Signum
from trainer_hooks.session import timing as reporting


class Rows:
    """Eight inputs, one target."""

    def __init__(self) -> None:
        self.rows = torch.randn(512, 9, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


def deep_network() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [nn.Linear(8, 8, bias=False) for _ in range(8)]
    return nn.Sequential(*hidden, nn.Linear(8, 1, bias=False))


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return (model(rows[:, :8]) - rows[:, 8:]).square().mean()


def attach(model: nn.Module, **changes: Any) -> AdaptiveBatch:
    settings: dict[str, Any] = {
        "run": "measuring",
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "budget_samples": 8 * 4000,
        "policy": HoldPolicyConfig(),
        **changes,
    }
    optimizer = settings.pop("optimizer", None) or Muon(model.parameters(), lr=1e-3)
    return AdaptiveBatch.attach(model, optimizer, **attach_arguments(settings))


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, norm_seconds: Callable[[GroupReader], float]) -> None:
        self.now = 0.0
        for module in (reporting, measuring):
            monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        read = GroupReader.read

        def slow_read(reader: GroupReader, captured: Any) -> Any:
            self.now += norm_seconds(reader)
            return read(reader, captured)

        monkeypatch.setattr(GroupReader, "read", slow_read)


def measured_steps(session: AdaptiveBatch, clock: Clock, *, steps: int, step_seconds: float = 1.0) -> list[int]:
    """Numbers of the measured steps among the next ones."""
    found = []
    for step in session.steps(Rows()):
        if session.is_measured:
            found.append(session.optimizer_step)
        for rows in step:
            step.backward(loss_of(session.model, rows))
        clock.now += step_seconds
        step.apply()
        if session.optimizer_step >= steps:
            break
    return found


def test_without_an_interval_measuring_takes_one_percent_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, norm_seconds=lambda reader: 0.5)
    session = attach(deep_network())
    found = measured_steps(session, clock, steps=1000)
    # Half a second per measurement is 1 % of 50 steps; the first, after 10 steps, is caught up with.
    distances = [later - earlier for earlier, later in pairwise(found[1:])]
    assert found[0] == 10
    assert set(distances) <= {49, 50, 51}
    assert len(found) == 20
    assert session.measurement_share is not None
    assert 0.008 < session.measurement_share <= 0.0101


def test_with_both_the_interval_is_the_shortest_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, norm_seconds=lambda reader: 0.5)
    cheap = attach(deep_network(), measurement_interval=Span(samples=800), measurement_budget=0.02)
    assert measured_steps(cheap, clock, steps=400) == [0, 100, 200, 300]
    dear = attach(deep_network(), measurement_interval=Span(samples=80), measurement_budget=0.01)
    found = measured_steps(dear, clock, steps=400)
    assert min(later - earlier for earlier, later in pairwise(found[1:])) >= 49


def test_an_interval_alone_is_kept_whatever_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, norm_seconds=lambda reader: 10.0)
    session = attach(deep_network(), measurement_interval=Span(steps=5))
    assert measured_steps(session, clock, steps=30) == [0, 4, 9, 14, 19, 24, 29]
    assert session.measurement_share is None


@pytest.mark.slow
def test_where_the_budget_is_too_small_fewer_layers_are_measured_and_the_group_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(monkeypatch, norm_seconds=lambda reader: 0.4 * len(reader.parameters))
    session = attach(deep_network())
    names: list[str] = []
    read = session._scheduler.read
    monkeypatch.setattr(session._scheduler, "read", lambda: [names.append(found.group) or found for found in read()])
    with caplog.at_level(logging.INFO):
        found = measured_steps(session, clock, steps=2500)
    # 3.6 s for 9 layers, and 1 % of 200 steps allows 2 s: four of the eight equal layers, and the last one.
    # The first measurement pays for what is done once, so it is not judged by.
    assert names[:2] == ["matrices", "matrices"]
    assert set(names[2:]) == {"matrices (5 of 9)"}
    assert "layer_share=0.5" in caplog.text
    assert found[-1] - found[-2] in (198, 199)
    assert session.measurement_share is not None
    assert session.measurement_share <= 0.0101


@pytest.mark.slow
def test_cheap_norms_are_repeated_over_sign_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    # 0.9 s of a measured step do not depend on the number of patterns, 0.1 s per pattern does: sqrt(9) = 3.
    seen: list[int | None] = []
    clock = Clock(monkeypatch, norm_seconds=lambda reader: 0.1 * session._scheduler.num_patterns)
    session = attach(deep_network(), global_batch_size=32, micro_batch_size=4)
    for step in session.steps(Rows()):
        for rows in step:
            step.backward(loss_of(session.model, rows))
        clock.now += 1.9 if session.is_measured else 1.0
        measured = session.is_measured
        step.apply()
        if measured:
            seen.append(session.last_readings[0].num_sign_patterns)
        if session.optimizer_step > 900:
            break
    assert seen[:2] == [1, 1]
    assert set(seen[2:]) == {3}


def test_a_resumed_run_goes_on_with_its_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, norm_seconds=lambda reader: 0.5)
    straight = attach(deep_network())
    expected = measured_steps(straight, clock, steps=400)

    first = attach(deep_network())
    before = measured_steps(first, clock, steps=205)
    second = attach(deep_network(), state=first.state_dict())
    after = measured_steps(second, clock, steps=400)
    # The steps between the last measured one and the checkpoint are not booked: it measures later, never earlier.
    assert before == expected[: len(before)]
    assert all(one >= other for one, other in zip(before + after, expected, strict=False))
    assert len(expected) - len(before + after) <= 1


def test_what_measuring_cost_goes_along_with_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[NoiseScaleMeasurement] = []
    clock = Clock(monkeypatch, norm_seconds=lambda reader: 0.25)
    session = attach(deep_network(), measurement_interval=Span(steps=5))
    assert session._client is not None
    report = session._client.report
    monkeypatch.setattr(session._client, "report", lambda found: (reported.append(found), report(found))[1])
    measured_steps(session, clock, steps=10)
    assert [found.measurement_seconds for found in reported] == [None, 0.25, 0.25]


def test_sign_patterns_come_with_standard_errors_and_a_progress_curve() -> None:
    session = attach(
        deep_network(),
        global_batch_size=32,
        micro_batch_size=4,
        measurement_interval=Span(steps=1),
        num_sign_patterns=7,
        progress_curve=True,
    )
    step = next(session.steps(Rows()))
    for rows in step:
        step.backward(loss_of(session.model, rows))
    [reading] = session.measure()
    assert (reading.num_sign_patterns, reading.num_groups) == (7, 8)
    assert [point.samples for point in reading.progress_curve] == [4, 8, 16]
    assert reading.noise_standard_error is not None
    assert reading.progress_standard_error is not None
    assert reading.ceiling is not None


def test_both_directions_are_told_apart_and_a_first_step_has_no_momentum_yet() -> None:
    model = deep_network()
    signum = Signum(model.parameters(), lr=1e-3, momentum=0.9)
    session = attach(model, optimizer=signum, measurement_interval=Span(steps=1), directions=["gradient", "update"])
    step = next(session.steps(Rows()))
    for rows in step:
        step.backward(loss_of(session.model, rows))
    gradient, update = session.measure()
    assert (gradient.direction, update.direction) == ("gradient", "update")
    # u = 0.1 g: noise and signal a tenth, and the same signs judged by the same gradients.
    assert update.noise == pytest.approx(0.1 * gradient.noise)
    assert update.signal == pytest.approx(0.1 * gradient.signal)
    assert update.progress == pytest.approx(gradient.progress)
    assert update.progress_standard_error is None


def test_what_measuring_cannot_do_is_said_at_attach() -> None:
    model = deep_network()
    with pytest.raises(InvalidInputError, match=r"budget=2.0 is not a share of time between 0 and 1"):
        attach(model, measurement_budget=2.0)
    with pytest.raises(InvalidInputError, match="num_sign_patterns=0 is not between 1 and 63"):
        attach(model, num_sign_patterns=0)
    with pytest.raises(InvalidInputError, match="the momentum of optimizer Adagrad is not known"):
        attach(
            model,
            optimizer=torch.optim.Adagrad(model.parameters()),
            geometries={"Adagrad": "sign"},
            learning_rate_coupling="none",
            policy=HoldPolicyConfig(direction="update"),
        )
    with pytest.raises(InvalidInputError, match=r"directions=\['gradient'\] does not measure it"):
        attach(model, policy=HoldPolicyConfig(direction="update"), directions=["gradient"])
    with pytest.raises(InvalidInputError, match="measured by the split estimator only"):
        attach(model, policy=HoldPolicyConfig(estimator="rank_variance", direction="update"))
    with pytest.raises(InvalidInputError, match=r"directions \['sideways'\] do not exist; there are gradient, update"):
        attach(model, directions=["sideways"])


@pytest.mark.parametrize(
    ("settings", "step_seconds", "norm_seconds"),
    [
        ({}, 0.15, 0.0001),
        pytest.param({"measurement_budget": 0.3}, 1.0, 0.01, marks=pytest.mark.slow),
        ({"measurement_interval": Span(steps=1), "measurement_budget": 0.01}, 1.0, 0.5),
    ],
)
def test_a_budget_never_ends_in_measuring_every_step(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], step_seconds: float, norm_seconds: float
) -> None:
    clock = Clock(monkeypatch, norm_seconds=lambda reader: norm_seconds)
    session = attach(deep_network(), **settings)
    found = measured_steps(session, clock, steps=300, step_seconds=step_seconds)
    share = norm_seconds * len(found) / (300 * step_seconds)
    budget = settings.get("measurement_budget", 0.01)
    assert share <= budget * 1.5  # the first ones are booked after they were spent
    assert session.measurement_share is not None
    assert session.measurement_share <= budget


def test_a_run_resumed_on_a_measured_step_knows_its_costs_again_before_it_measures_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch, norm_seconds=lambda reader: 0.5)
    first = attach(deep_network())
    measured_steps(first, clock, steps=10)
    second = attach(deep_network(), state=first.state_dict())
    assert second.is_measured
    found = measured_steps(second, clock, steps=210)
    assert found[:2] == [10, 21]
    assert len(found) <= 5


def test_a_checkpoint_that_counted_in_samples_is_resumed_in_steps() -> None:
    first = attach(deep_network(), measurement_interval=Span(samples=80_000))
    saved = first.state_dict()
    saved["measuring"]["next"] = 10**9
    second = attach(deep_network(), state=saved)
    assert second._scheduler._next == 10


def test_a_step_that_was_not_read_reports_no_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[NoiseScaleMeasurement] = []
    model = deep_network()
    session = attach(model, measurement_interval=Span(steps=1))
    assert session._client is not None
    report = session._client.report
    monkeypatch.setattr(session._client, "report", lambda found: (reported.append(found), report(found))[1])
    rows = Rows().rows[:8]
    for is_read in (True, False, True):
        for piece in rows.chunk(2):
            with session.measured(num_samples=4, loss_factor=0.5):
                (0.5 * loss_of(model, piece)).backward()
        if is_read:
            session.measure()
        model.zero_grad()
        session.advance(num_samples=8)
    assert [len(found.readings) for found in reported] == [1, 0, 1]


@pytest.mark.parametrize("geometry", ["sign", "spectral"])
def test_norms_that_fail_for_any_reason_are_a_reading_that_is_not_finite(
    monkeypatch: pytest.MonkeyPatch, geometry: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(SPLIT_SUMS, geometry, fail)
    model = deep_network()
    optimizer = Signum(model.parameters()) if geometry == "sign" else Muon(model.parameters())
    session = attach(model, optimizer=optimizer, measurement_interval=Span(steps=1))
    for rows in (step := next(session.steps(Rows()))):
        step.backward(loss_of(model, rows))
    [reading] = session.measure()
    assert math.isnan(reading.noise)


def test_rows_that_a_cell_never_saw_make_no_progress_of_rounding() -> None:
    # 512 embedding rows, of which an eighth of 64 samples sees few: float32 must read what float64 does.
    readings = []
    tokens = torch.randint(0, 512, (64, 4), generator=torch.Generator().manual_seed(3))
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(512, 8), nn.Flatten(), nn.Linear(32, 1)).to(dtype)
        session = attach(
            model,
            optimizer=Signum(model.parameters()),
            global_batch_size=64,
            measurement_interval=Span(steps=1),
            num_sign_patterns=7,
            progress_curve=True,
        )
        for rows in (step := next(session.steps(tokens))):
            step.backward((model(rows) - 1.0).square().mean())
        readings.append(session.measure()[0])
    single, double = readings
    for found, expected in zip(single.progress_curve, double.progress_curve, strict=True):
        assert found.progress == pytest.approx(expected.progress, abs=1e-4 * double.signal)


class Patched(nn.Module):
    """A forward of its own on the instance, as some libraries put there."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 1, bias=False)
        self.forward = self.inner.forward  # type: ignore[method-assign]


def test_the_self_test_leaves_the_model_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model = Patched()
    model.inner.weight.register_hook(lambda grad: 0.5 * grad)  # type: ignore[no-untyped-call]
    model.inner.weight.grad = kept = torch.full((1, 8), 3.0)
    before = model.inner.weight.detach().clone()
    state = torch.get_rng_state()
    attach(model, optimizer=Signum(model.parameters()))
    assert model.forward == model.inner.forward
    assert model.inner.weight.grad is kept
    assert torch.equal(model.inner.weight, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert "self-test" not in caplog.text
    compiled = torch.compile(nn.Linear(8, 1, bias=False), backend="eager")
    attach(compiled, optimizer=Signum(compiled.parameters()))  # type: ignore[arg-type,attr-defined]
    assert "self-test" not in caplog.text


def test_eigenvalues_in_the_background_are_the_same_numbers_one_measurement_late() -> None:
    found: dict[bool, list[Any]] = {}
    for background in (False, True):
        session = attach(
            deep_network(),
            policy=HoldPolicyConfig(estimator="rank_variance"),
            estimators=["split", "rank_variance"],
            measurement_interval=Span(steps=1),
            min_sample_groups=4,
            background_eigenvalues=background,
        )
        readings = []
        for step in session.steps(Rows()):
            for rows in step:
                step.backward(loss_of(session.model, rows))
            step.apply()
            readings.append({reading.estimator: reading for reading in session.last_readings})
            if session.optimizer_step == 4:
                break
        found[background] = readings
    now, late = found[False], found[True]
    assert "rank_variance" not in late[0]
    for step in range(1, 4):
        # Eigenvalues one by one instead of in a batch: the last bits differ.
        delayed, prompt = late[step]["rank_variance"], now[step - 1]["rank_variance"]
        assert delayed.noise == pytest.approx(prompt.noise, rel=1e-12)
        assert delayed.model_copy(update={"noise": prompt.noise}) == prompt
        assert late[step]["split"] == now[step]["split"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"measurement_interval": 16}, "interval=16 is not a Span"),
        ({"measurement_budget": "1%"}, "budget='1%' is not a share of time"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 is not above 0"),
        ({"spectral_norms": "ns"}, "spectral_norms='ns' does not exist; there are exact, polar_express"),
        ({"estimators": "split"}, "is not a list of names"),
        ({"exclude": "("}, r"exclude='\(' is not a regular expression"),
        ({"geometries": {"Adamw": "sign"}}, r"geometries names \['Adamw'\], and the optimizers are Muon"),
        ({"geometries": {"Muon": "cubic"}}, r"geometries \['cubic'\] do not exist"),
        ({"policy": {"policy": "noise_scale", "theta": 1}}, "not a policy: theta: Unknown field"),
    ],
)
def test_an_argument_that_is_wrong_is_named_with_what_would_be_right(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInputError, match=told):
        attach(deep_network(), **changes)


@pytest.mark.parametrize("form", ["mapping", "json", "json file", "toml file", "path"])
def test_a_policy_may_be_given_as_its_document(form: str, tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text('{"policy": "hold", "estimator": "rank_variance"}')
    (tmp_path / "policy.toml").write_text('policy = "hold"\nestimator = "rank_variance"\n')
    given: Any = {
        "mapping": {"policy": "hold", "estimator": "rank_variance"},
        "json": ' {"policy": "hold", "estimator": "rank_variance"}',
        "json file": str(tmp_path / "policy.json"),
        "toml file": str(tmp_path / "policy.toml"),
        "path": tmp_path / "policy.toml",
    }[form]
    session = attach(deep_network(), policy=given)
    assert session.specification.policy == HoldPolicyConfig(estimator="rank_variance")


def test_a_policy_document_that_is_none_is_told_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"neither JSON nor the path of a .*write '{\"policy\": \"hold\"}'"):
        attach(deep_network(), policy="hold")
    with pytest.raises(InvalidInputError, match=r"missing.toml cannot be read: .*No such file"):
        attach(deep_network(), policy=tmp_path / "missing.toml")
    (tmp_path / "wrong.toml").write_text('policy = "noise_scale"\ntheta = 1\n')
    with pytest.raises(InvalidInputError, match=r"wrong.toml: the policy document is not a policy: .*theta"):
        attach(deep_network(), policy=str(tmp_path / "wrong.toml"))
