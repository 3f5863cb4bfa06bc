from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest

from gns_controller.core.errors import InvalidInputError
from gns_controller.recordings import ImportDefaults, Limits, Recording, read_recording


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(header: list[str], *rows: list[object], name: str = "run.csv", **dialect: Any) -> Path:
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, **dialect).writerows([header, *rows])
        return path

    return write


def read(
    path: Path, *, columns: dict[str, str] | None = None, limits: Limits | None = None, **defaults: Any
) -> Recording:
    return read_recording(path, columns=columns, defaults=ImportDefaults(**defaults), limits=limits)


def refused(path: Path, **how: Any) -> str:
    with pytest.raises(InvalidInputError) as caught:
        read(path, **how)
    return str(caught.value)


def test_common_names_are_guessed_and_said(write: Any) -> None:
    path = write(
        ["trainer/global_step", "train/loss", "eval/loss", "lr", "train_batch_size", "consumed-train-samples", "GNS"],
        [10, 3.5, "", 0.01, 32, 320, 50.0],
        [20, 3.25, 3.75, 0.02, 64, 960, 98.0],
    )
    recording = read(path, data_parallel_size=4, micro_batch_size=4, geometry="euclidean")
    first, second = recording.measurements
    assert (first.optimizer_step, first.samples_seen, first.global_batch_size) == (10, 320, 32)
    assert (second.loss, second.validation_loss, first.validation_loss) == (3.25, 3.75, None)
    # 64 samples over 4 ranks are 16 each: 4 passes of 4.
    assert (second.micro_batch_size, second.gradient_accumulation_steps, second.data_parallel_size) == (4, 4, 4)
    [reading] = second.readings
    assert reading.noise_scale == pytest.approx(98.0)
    assert (reading.geometry, reading.estimator, reading.learning_rate) == ("euclidean", "rank_variance", 0.02)
    assert (reading.num_groups, reading.samples_per_group) == (4, 16.0)
    assert recording.is_averaged
    assert "validation_loss from 'eval/loss'" in recording.notes[0]


def test_a_map_wins_over_a_guess_and_can_say_that_a_column_is_absent(write: Any) -> None:
    path = write(["step", "loss", "my loss", "gns", "bs"], [1, 9.0, 2.0, 5.0, 16])
    recording = read(path, columns={"loss": "my loss", "global_batch_size": "bs", "noise_scale": ""})
    assert recording.measurements[0].loss == 2.0
    assert recording.measurements[0].readings == ()
    assert not recording.is_averaged


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_and_quoted_cells_are_recognised(write: Any, delimiter: str) -> None:
    path = write(["step", "batch_size", "comment"], [1, 8, f'a "word"{delimiter} more'], delimiter=delimiter)
    assert read(path).measurements[0].global_batch_size == 8


def test_norms_and_progress_make_split_readings(write: Any) -> None:
    path = write(["step", "batch_size", "noise", "signal", "progress"], [1, 8, 6.0, 2.0, -0.5], [2, 8, 6.0, 2.0, ""])
    first, second = read(path).measurements
    [reading] = first.readings
    assert (reading.estimator, reading.noise, reading.signal, reading.progress) == ("split", 6.0, 2.0, -0.5)
    assert second.readings == ()


def test_squares_become_norms_and_a_debiased_signal_keeps_its_sign(write: Any) -> None:
    path = write(
        ["step", "batch_size", "noise_sq", "signal_sq"], [1, 8, 36.0, 4.0], [2, 8, 25.0, -4.0], [3, 8, -1.0, 1.0]
    )
    plain = read(path)
    assert [(m.readings[0].noise, m.readings[0].signal) for m in plain.measurements[:1]] == [(6.0, 2.0)]
    assert math.isnan(plain.measurements[1].readings[0].signal)
    assert any(note.startswith("2 values are negative") for note in plain.notes)
    assert not plain.is_averaged
    signed = read(path, estimator="split").measurements
    assert [m.readings[0].signal_sq for m in signed] == [4.0, -4.0, 1.0]
    assert math.isnan(signed[2].readings[0].noise)


def test_norms_are_preferred_to_an_averaged_noise_scale(write: Any) -> None:
    path = write(["step", "batch_size", "gns", "noise", "signal"], [1, 8, 5.0, 6.0, 2.0])
    recording = read(path)
    assert recording.measurements[0].readings[0].noise == 6.0
    assert not recording.is_averaged
    averaged = read(path, columns={"noise_scale": "gns"})
    assert averaged.measurements[0].readings[0].noise_sq == pytest.approx(5.0)


def test_not_a_number_and_infinity_are_what_happened(write: Any) -> None:
    path = write(["step", "batch_size", "loss", "gns"], [1, 8, "NaN", "inf"], [2, 8, "-Infinity", "nan"], [3, 8, 1, ""])
    first, second, third = read(path).measurements
    assert math.isnan(first.loss or 0.0)
    assert first.readings[0].noise == math.inf
    assert second.loss == -math.inf
    assert math.isnan(second.readings[0].noise)
    assert third.readings == ()


def test_samples_are_the_batch_integrated_over_steps_where_no_column_has_them(write: Any) -> None:
    path = write(["step", "batch_size"], [0, ""], [10, 8], [20, ""], [25, 32])
    assert [(m.global_batch_size, m.samples_seen) for m in read(path).measurements] == [
        (8, 0),
        (8, 80),
        (8, 160),
        (32, 320),
    ]


def test_the_batch_is_the_mean_where_no_column_has_it(write: Any) -> None:
    path = write(["step", "tokens"], [0, 0], [10, 10 * 8 * 128], [20, 30 * 8 * 128 + 5])
    recording = read(path, tokens_per_sample=128)
    assert [(m.global_batch_size, m.samples_seen) for m in recording.measurements] == [(8, 0), (8, 80), (16, 240)]
    assert "1 rows count tokens that are no whole samples: rounded down." in recording.notes
    assert [m.global_batch_size for m in read(path, tokens_per_sample=128, global_batch_size=12).measurements] == [
        12
    ] * 3


def test_rows_of_one_step_become_one_measurement(write: Any) -> None:
    path = write(
        ["step", "batch_size", "loss", "val_loss"], [1, 8, 3.0, ""], [1, "", "", 4.0], [2, 8, 2.0, ""], [2, 8, 1.0, ""]
    )
    recording = read(path)
    assert [(m.loss, m.validation_loss) for m in recording.measurements] == [(3.0, 4.0), (1.0, None)]
    assert any(note.startswith("1 rows repeat the step") for note in recording.notes)


def test_going_back_begins_another_attempt_that_resumes_the_samples(write: Any) -> None:
    path = write(["step", "batch_size"], [10, 8], [20, 8], [30, 8], [20, 16], [30, 16])
    recording = read(path)
    assert [(m.attempt, m.optimizer_step, m.samples_seen) for m in recording.measurements] == [
        (0, 10, 80),
        (0, 20, 160),
        (0, 30, 240),
        (1, 20, 80 + 160),
        (1, 30, 80 + 320),
    ]
    assert recording.notes[-1] == "optimizer_step goes back 1 times: each begins another attempt."


def test_a_table_in_no_order_is_refused(write: Any) -> None:
    assert "goes back for the 101th time" in refused(
        write(["step", "batch_size"], *[[1000 - k, 8] for k in range(200)])
    )


def test_an_attempt_column_is_taken_at_its_word(write: Any) -> None:
    path = write(["step", "batch_size", "attempt"], [10, 8, 2], [5, 8, 3])
    assert [(m.attempt, m.optimizer_step) for m in read(path).measurements] == [(2, 10), (3, 5)]
    back = write(["step", "batch_size", "attempt"], [10, 8, 2], [5, 8, 2], name="back.csv")
    assert "line 3: attempt 2, optimizer_step 5 comes after attempt 2, optimizer_step 10" in refused(back)


def test_a_row_without_a_step_is_left_out_and_counted(write: Any) -> None:
    recording = read(write(["step", "batch_size"], ["", 8], [1, 8]))
    assert len(recording.measurements) == 1
    assert "1 rows have no optimizer_step and are left out." in recording.notes


@pytest.mark.parametrize(
    ("cell", "column"),
    [("abc", "loss"), ("1_000", "loss"), ("1.5", "batch_size"), ("0", "batch_size"), ("-3", "step"), ("1e30", "step")],
)
def test_an_unreadable_number_is_named_with_its_line_and_column(write: Any, cell: str, column: str) -> None:
    good = {"step": "2", "batch_size": "8", "loss": "1.0"}
    path = write([*good], [1, 8, 2.0], [*(good | {column: cell}).values()])
    message = refused(path)
    assert f"line 3, column '{column}': '{cell}' is not" in message


def test_foreign_text_is_cut_and_escaped_in_errors(write: Any) -> None:
    message = refused(write(["step", "batch_size"], [1, "\x1b[31m" + "x" * 500]))
    assert "\x1b" not in message
    assert "x" * 56 not in message
    assert "\\x1b[31m" in message


def test_missing_columns_are_named_beside_those_of_the_file(write: Any) -> None:
    message = refused(write(["time", "value"], [1, 2]))
    assert "optimizer_step, nor for global_batch_size (or samples_seen, or tokens_seen)" in message
    assert "it has 'time', 'value'" in message
    assert "tokens_per_sample" in refused(write(["step", "tokens"], [1, 2]))
    assert "'nope'" in refused(write(["step", "bsz"], [1, 2]), columns={"loss": "nope"})
    assert "'lost'" in refused(write(["step", "bsz"], [1, 2]), columns={"lost": "bsz"})
    lone = refused(write(["step", "bsz", "n"], [1, 2, 3]), columns={"noise": "n"})
    assert "noise is mapped and signal is not" in lone
    assert "split readings need progress" in refused(
        write(["step", "bsz", "noise", "signal"], [1, 2, 3, 4]), estimator="split"
    )


def test_half_a_reading_that_was_only_guessed_is_no_reading(write: Any) -> None:
    [measurement] = read(write(["step", "bsz", "signal"], [1, 2, 3])).measurements
    assert measurement.readings == ()


def test_what_is_no_table_is_refused_in_one_sentence(write: Any, tmp_path: Path) -> None:
    assert "2 cells, and the header names 3 columns" in refused(write(["step", "bsz", "loss"], [1, 2]))
    assert "several columns called 'bsz'" in refused(write(["step", "bsz", "bsz"], [1, 2, 3]))
    assert "no row with an optimizer_step" in refused(write(["step", "bsz"]))
    empty = tmp_path / "empty.csv"
    empty.touch()
    assert "is empty" in refused(empty)
    utf16 = tmp_path / "wide.csv"
    utf16.write_bytes("step,bsz\n1,2\n".encode("utf-16"))
    assert "not UTF-8" in refused(utf16)


def test_input_beyond_a_limit_is_refused(write: Any) -> None:
    path = write(["step", "bsz"], *[[k, 2] for k in range(1, 12)])
    assert "more than 10 rows" in refused(path, limits=Limits(num_rows=10))
    assert len(read(path, limits=Limits(num_rows=11)).measurements) == 11
    assert "more than 1 columns" in refused(path, limits=Limits(num_columns=1))
    assert "longer than 5 bytes" in refused(path, limits=Limits(line_bytes=5))
    assert "not readable as CSV" in refused(write(["step", "bsz"], [1, "9" * 200_000]))


def test_defaults_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="num_groups=1 is too small: give 2 or more"):
        ImportDefaults(num_groups=1)


def test_the_run_is_named_after_the_file_unless_told(write: Any) -> None:
    path = write(["step", "bsz"], [1, 2], name="my run (3).csv")
    assert read(path).run_id == "my-run--3-"
    assert read(path, run_id="mine").measurements[0].run_id == "mine"


@pytest.mark.parametrize("column", ["samples_seen", "tokens_seen"])
def test_samples_that_go_back_within_an_attempt_are_refused_with_their_line(write: Any, column: str) -> None:
    header = ["step", "attempt", column, "batch_size"]
    write(header, [1, 0, 800, 8], [2, 0, "", 8], [1, 1, 400, 8])
    read(write(header, [1, 0, 800, 8], [2, 0, 808, 8], [1, 1, 400, 8]), tokens_per_sample=8)
    told = refused(write(header, [1, 0, 800, 8], [2, 0, "", 8], [3, 0, 799, 8]), tokens_per_sample=8)
    assert f"line 4: {column} goes back from 800 to 799" in told


def test_a_name_twice_among_very_many_is_refused(write: Any) -> None:
    assert "several columns called 'loss'" in refused(
        write(["step", "loss", *map(str, range(1200)), "loss"], [1] * 1203)
    )
