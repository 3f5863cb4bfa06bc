"""docs/contributing.md names paths, commands and code that exist, and the floors that the import test holds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.test_import_floors import PLAN

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "contributing.md"
TEXT = PAGE.read_text(encoding="utf-8")

PROGRAMS = {"make", "ruff", "mypy", "pip", "pre-commit", ".venv/bin/python", "python", "import"}
"""First words of code that is typed and not read."""

MADE = {".venv"}
"""Paths that exist once something was made."""


def code_spans(text: str) -> list[str]:
    """Code in backticks. Of the table of words, not what is never written."""
    begin, end = text.index("\n## Words\n"), text.index("\nUnits are suffixes")
    words = [line.rsplit("|", 2)[0] if line.startswith("| `") else line for line in text[begin:end].split("\n")]
    return sorted(set(re.findall(r"`([^`]+)`", text[:begin] + "\n".join(words) + text[end:])))


def is_path(span: str) -> bool:
    return " " not in span and ("/" in span or span.startswith(".") or bool(re.search(r"\.(py|md|toml|yaml)$", span)))


SPANS = [span for span in code_spans(TEXT) if span.split()[0] not in PROGRAMS and span not in MADE]
PATHS = [span for span in SPANS if is_path(span)]
NAMES = sorted({name for span in SPANS if not is_path(span) for name in re.findall(r"[A-Za-z_]\w+(?:\.\w+)*", span)})


@pytest.fixture(scope="module")
def source() -> str:
    files = [path for folder in ("gns_controller", "trainer_hooks") for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(path.read_text(encoding="utf-8") for path in (*files, ROOT / "pyproject.toml", ROOT / "Makefile"))


@pytest.mark.parametrize("path", PATHS)
def test_every_path_in_the_page_exists(path: str) -> None:
    in_rules = ROOT / "gns_controller" / "core" / "policies" / "rules"
    assert any((folder / path).exists() for folder in (ROOT, in_rules)), path


@pytest.mark.parametrize("name", NAMES)
def test_every_name_in_the_page_is_in_the_code(name: str, source: str) -> None:
    begin = r"\w" if name.startswith("_") and not name.startswith("__") else r"(?<!\w)"  # a suffix, like _seconds
    end = r"\w" if name.endswith("_") and not name.endswith("__") else r"(?!\w)"  # a prefix, like num_
    module = ROOT / Path(*name.split("."))
    is_module = module.is_dir() or module.with_suffix(".py").is_file()
    assert is_module or re.search(begin + re.escape(name) + end, source), f"no {name} in the code"


def test_every_command_in_the_page_has_its_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    commands = [span.split()[1:] for span in code_spans(TEXT) if span.startswith("make ")]
    assert len(commands) >= 4
    for words in commands:
        target = next(word for word in words if "=" not in word)
        assert target in targets
    for module in re.findall(r"`python -m ([\w.]+)", TEXT):
        assert (ROOT / Path(*module.split("."))).with_suffix(".py").is_file()


def test_the_tables_of_rooms_are_the_plan_of_the_import_test() -> None:
    rows = re.findall(r"^\| (\d) \| `([\w.]+)` \| [^|]+ \| ([^|]*) \|$", TEXT, re.MULTILINE)
    tables = {room: (int(floor), set(packages.replace(" ", "").split(",")) - {""}) for floor, room, packages in rows}
    assert tables == {room: row for room, row in PLAN.items() if room != "gns_controller"}


def test_every_extra_in_the_page_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = set(re.findall(r"`\[(\w+)\]`", TEXT))
    assert len(named) >= 5
    assert named <= set(extras)


def test_every_metric_marker_and_target_named_is_found_by_this_test() -> None:
    """The lists above are not empty because a pattern stopped matching."""
    assert {"GnsError", "POLICIES", "noise_sq", "_seconds", "num_", "gns_controller.policies"} <= set(NAMES)
    assert "tests/test_import_floors.py" in PATHS
