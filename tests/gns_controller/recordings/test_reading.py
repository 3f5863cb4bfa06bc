"""Formats told by name and content, and what is no recording."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

from gns_controller.core.errors import InvalidInputError
from gns_controller.recordings import Format, ImportDefaults, read_recording
from gns_controller.recordings.columns import ALIASES


def refused(path: object, **how: Any) -> str:
    with pytest.raises(InvalidInputError) as caught:
        read_recording(path, **how)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_file_without_a_telling_name_is_known_by_its_content(tmp_path: Path) -> None:
    table = tmp_path / "table"
    table.write_bytes(b"\xef\xbb\xbfstep,bsz\n1,8\n")
    assert read_recording(table).measurements[0].global_batch_size == 8
    lines = tmp_path / "history.log"
    lines.write_text('\n{"step": 1, "bsz": 8}\n')
    assert read_recording(str(lines)).measurements[0].global_batch_size == 8
    assert read_recording(table, format="csv").run_id == "table"


def test_what_is_no_recording_is_refused_in_one_sentence(tmp_path: Path) -> None:
    prose = tmp_path / "prose.txt"
    prose.write_text("Dear all\n")
    assert "in no format that we recognise" in refused(prose)
    assert "is no format of recordings" in refused(prose, format="pickle")
    assert "does not exist" in refused(tmp_path / "absent.csv")
    assert "neither a .wandb file nor" in refused(tmp_path)
    assert "is a folder" in refused(tmp_path, format="csv")
    os.mkfifo(tmp_path / "pipe.csv")
    assert "neither a file nor a folder" in refused(tmp_path / "pipe.csv")
    assert "wandb:ENTITY/PROJECT/RUN" in refused("wandb:only/two")


GUIDE = Path(__file__).parents[3] / "docs" / "guide" / "recordings.md"


def test_the_guide_names_every_column_default_and_format() -> None:
    rows = re.findall(r"^\| (`[a-z_]+`(?:, `[a-z_]+`)*) \|", GUIDE.read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)} | {"progress"}
    assert named == {*ALIASES, *(field.name for field in fields(ImportDefaults))}
    assert set(re.findall(r"^\| [^`|]*\| `([a-z_]+)` \|", GUIDE.read_text(), re.MULTILINE)) == set(get_args(Format))


def test_the_lines_of_the_guide_replay_a_run(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    [block] = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("run.csv").write_text("step,batch_size,gns\n100,64,50\n200,64,60\n")
    exec(compile(block, "recordings.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "100 64 -> 128 samples" in printed
    assert "noise_scale from 'gns'" in printed
