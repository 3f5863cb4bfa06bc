"""Replay of tables: what is assumed is said, a policy that can read nothing is refused, and nothing reads as a loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from gns_controller.cli.main import app
from gns_controller.cli.replay import BatchOptions, Replayed, replay_file, replay_recording, table_of
from gns_controller.core.contract import Estimator, Geometry, GroupReading, NoiseScaleMeasurement
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import AnyPolicyConfig, NoiseScalePolicyConfig
from gns_controller.core.policies.parsing import read_policy
from gns_controller.core.replay import ReplayReport
from gns_controller.recordings import Recording

AVERAGED = ["step,batch_size,gns", *(f"{10 * row},16,{100 + row}" for row in range(1, 30))]
"""Noise scales that another tool averaged: rank_variance in a geometry that nobody states."""
SQUARES = ["step,batch_size,noise_sq,signal_sq", *(f"{10 * row},16,{100 + row},1" for row in range(1, 30))]

Ask = Callable[..., Replayed]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    def ask(rows: list[str], policy: str, **options: object) -> Replayed:
        path = tmp_path / "history.csv"
        path.write_text("\n".join(rows))
        asked = BatchOptions(**options)  # type: ignore[arg-type]
        return replay_file(
            str(path), format=None, columns=None, policy=read_policy(policy), options=asked, follow_trainer=None
        )

    return ask


def typed(folder: Path, rows: list[str], *arguments: str) -> tuple[int, str, str]:
    path = folder / "typed.csv"
    path.write_text("\n".join(rows))
    done = CliRunner().invoke(app, ["replay", str(path), *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_what_a_table_does_not_say_of_its_readings_is_assumed_aloud_or_stated(ask: Ask, tmp_path: Path) -> None:
    policy = '{"policy": "noise_scale"}'
    notes = " ".join(ask(AVERAGED, policy).notes)
    assert "assumed: geometry spectral, estimator rank_variance, num_groups 2." in notes
    stated = ["--geometry", "sign", "--estimator", "rank_variance", "--num-groups", "8"]
    code, output, errors = typed(tmp_path, AVERAGED, "--policy", policy, *stated, "--json")
    assert (code, "assumed" in errors) == (0, False)
    # 101 / 0.6^2 = 280.6 samples, and at most four times 16 at once: a table without betas is not averaged again.
    assert json.loads(output)["rows"][0]["replayed_batch_size"] == 64
    # Eight groups instead of two in the sign geometry: c4 = 0.9650 of control charts, instead of sqrt(2 / pi).
    corrected = '{"policy": "noise_scale", "correct_few_groups": true, "growth_cap": null}'
    answers = [ask(AVERAGED, corrected, geometry="sign", num_groups=groups).report for groups in (2, 8)]
    assert [answer.rows[0].replayed_batch_size for answer in answers] == [
        int(101 / 0.36 / factor) // 16 * 16 for factor in (2 / 3.14159265, 0.9650**2)
    ]


def test_every_geometry_and_estimator_can_be_stated(tmp_path: Path) -> None:
    for option, values in (("--geometry", get_args(Geometry)), ("--estimator", get_args(Estimator))):
        for value in values:
            assert typed(tmp_path, AVERAGED, "--policy", '{"policy": "hold"}', option, value)[0] == 0


@pytest.mark.parametrize(
    "option", [("--geometry", "cubic"), ("--estimator", "exact"), ("--num-groups", "1"), ("--num-groups", "x")]
)
def test_readings_that_cannot_be_are_wrong_usage(tmp_path: Path, option: tuple[str, str]) -> None:
    code, _, errors = typed(tmp_path, AVERAGED, "--policy", '{"policy": "hold"}', *option)
    assert code == 2
    assert option[0] in errors


@pytest.mark.parametrize(
    ("rows", "policy", "why"),
    [
        (AVERAGED, '{"policy": "progress"}', "estimator"),
        (AVERAGED, '{"policy": "inner_product_test"}', "inner products"),
        (AVERAGED, '{"policy": "noise_scale", "bound": "low"}', "no interval"),
        (AVERAGED, '{"policy": "noise_scale", "estimator": "split"}', "rank_variance of the gradient, spectral"),
        (SQUARES, '{"policy": "norm_test", "geometry": "sign"}', "rank_variance of the gradient, spectral"),
        (SQUARES, '{"policy": "noise_scale", "direction": "update"}', "rank_variance of the gradient, spectral"),
    ],
)
def test_a_policy_that_can_read_nothing_is_refused(ask: Ask, rows: list[str], policy: str, why: str) -> None:
    with pytest.raises(InvalidInputError, match="has no readings this policy can use") as caught:
        ask(rows, policy)
    assert why in str(caught.value)


def test_split_readings_without_a_curve_are_none_for_progress(ask: Ask) -> None:
    rows = ["step,batch_size,noise,signal,progress", "1,8,6,2,1", "2,8,6,2,1"]
    with pytest.raises(InvalidInputError, match="progress at two sub-batches"):
        ask(rows, '{"policy": "progress"}')


def test_averages_read_as_split_readings_have_no_standard_error(ask: Ask) -> None:
    for policy in ('{"policy": "noise_scale"}', '{"policy": "goodput", "step_overhead_samples": 8}'):
        with pytest.raises(InvalidInputError, match="no interval"):
            ask(AVERAGED, policy, estimator="split")
    acting = ask(AVERAGED, '{"policy": "noise_scale", "act_on_unresolved": true}', estimator="split")
    assert acting.report.rows[0].replayed_batch_size == 64


def test_an_adapted_policy_is_valid_and_acts_on_the_only_geometry_there_is(ask: Ask) -> None:
    """theta 0.5 and a noise scale of 101 ask for 404 samples, at most four times 16 at once."""
    report, notes, _ = ask(AVERAGED, '{"policy": "norm_test"}')
    assert report.rows[0].replayed_batch_size == 64
    assert report.policy.geometry is None
    assert any("geometry spectral, the only one" in note for note in notes)
    assert ReplayReport.model_validate_json(report.model_dump_json()) == report


def test_betas_that_are_given_make_an_interval_of_averages_and_a_note_about_it(ask: Ask) -> None:
    policy = '{"policy": "noise_scale", "bound": "low", "noise_beta": 0.9, "signal_beta": 0.9}'
    report, notes, _ = ask(AVERAGED, policy)
    assert {row.replayed_reason for row in report.rows[:4]} == {"hold_unresolved"}
    assert report.rows[-1].replayed_batch_size > 16
    assert any("spread less than readings" in note for note in notes)


@pytest.mark.parametrize("policy", ['{"policy": "decay_to_ramp"}', '{"policy": "noise_scale", "decay": "freeze"}'])
def test_a_decay_that_is_not_seen_is_told(ask: Ask, policy: str) -> None:
    rows = ["step,batch_size,gns,lr", *(f"{10 * row},16,{100 + row},{1 / row}" for row in range(1, 9))]
    notes = ask(rows, policy).notes
    assert any("no schedule_factor column" in note and "decay is not seen" in note for note in notes)
    seen = ["step,batch_size,gns,schedule_factor", "10,16,100,1", "20,16,100,0.5", "30,16,100,0.25"]
    report, notes, _ = ask(seen, policy)
    assert not any("decay is not seen" in note for note in notes)
    if "ramp" in policy:
        assert [row.replayed_batch_size for row in report.rows] == [16, 32, 64], "16 over the share of the peak"


def unread(num_read: int, num_rows: int) -> tuple[Recording, AnyPolicyConfig]:
    """A job that grew to 64 by itself; only the first few of its reports hold readings of the policy's estimator."""
    reading = GroupReading(
        group="all",
        geometry="sign",
        estimator="rank_variance",
        noise=4.0,
        signal=1.0,
        num_groups=2,
        samples_per_group=8.0,
        learning_rate=0.1,
    )
    measurements = tuple(
        NoiseScaleMeasurement(
            run_id="job",
            attempt=0,
            optimizer_step=step,
            samples_seen=64 * step,
            plan_version=0,
            global_batch_size=64,
            micro_batch_size=64,
            gradient_accumulation_steps=1,
            data_parallel_size=1,
            readings=(reading,) if step <= num_read else (),
        )
        for step in range(1, num_rows + 1)
    )
    return Recording(source="job", run_id="job", measurements=measurements), NoiseScalePolicyConfig(
        estimator="rank_variance"
    )


def test_a_replay_without_readings_is_no_loss(tmp_path: Path) -> None:
    """5 * 64 samples take 20 steps of 16: 15 more than the 5 that happened, and no reason to say so."""
    recording, policy = unread(0, 5)
    report, *_ = replay_recording(recording, policy=policy, options=BatchOptions(batch_size=16))
    table = "\n".join(table_of(report))
    assert "none of 5 measurements holds a rank_variance reading that the policy follows: this says nothing" in table
    assert "saved" not in table
    # Loss is logged more often than gradients are measured.
    recording, policy = unread(1, 5)
    report, *_ = replay_recording(recording, policy=policy, options=BatchOptions(batch_size=16))
    table = "\n".join(table_of(report))
    assert "says nothing" not in table
    assert "saved" in table

    rows = ["step,batch_size", "1,64", "2,64"]
    code, _, errors = typed(tmp_path, rows, "--policy", '{"policy": "noise_scale"}', "--json")
    assert code == 0
    assert "none of 2 measurements holds a split reading" in errors


def test_options_that_are_missing_are_named_as_they_are_typed(tmp_path: Path) -> None:
    rows = ["step,gns,tokens_seen", "100,81.9,3276800", "200,92.7,6553600"]
    code, _, errors = typed(tmp_path, rows, "--policy", '{"policy": "hold"}')
    assert (code, errors.count("\n")) == (2, 1)
    assert "--tokens-per-sample" in errors
    assert typed(tmp_path, rows, "--policy", '{"policy": "hold"}', "--tokens-per-sample", "1024")[0] == 0
