"""The documentation can be read and followed: links, lengths, snippets, quoted messages, tables of arguments."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch.distributed as dist

from trainer_hooks import AdaptiveBatch, ConnectionOptions, CouplingOptions, MeasurementOptions

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
INDEX = DOCS / "README.md"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), *sorted((ROOT / ".github").rglob("*.md"))]
GUIDES = sorted((DOCS / "guide").glob("*.md"))
READING = [*GUIDES, *sorted((DOCS / "reference").glob("*.md"))]
"""Pages of guide and reference, each short enough for one sitting."""

MOST_LINES, MOST_COLUMNS = 250, 120

RUNNABLE = ("quickstart.md", "attach-parts.md", "layouts.md", "checkpoint-and-resume.md")
"""Guides whose code runs as it is written, block after block."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    """Text with fenced blocks blanked, line for line."""
    return re.sub(r"^ *```.*?^ *```", lambda m: "\n" * m.group(0).count("\n"), text, flags=re.MULTILINE | re.DOTALL)


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def links_of(page: Path) -> list[str]:
    """Targets of all links that stay within the repository."""
    text = without_code(page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if "://" not in target and not target.startswith("mailto:")]


@cache
def anchors_of(page: Path) -> frozenset[str]:
    """Anchors of a page's headings, as the forge makes them."""
    headings = re.findall(r"^#{1,6} (.*)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return frozenset(re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_resolves_to_a_file_and_an_anchor(page: Path) -> None:
    for target in links_of(page):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors_of(linked), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", READING, ids=name_of)
def test_page_can_be_finished_in_one_sitting(page: Path) -> None:
    assert page.read_text(encoding="utf-8").count("\n") < MOST_LINES
    prose = enumerate(without_code(page.read_text(encoding="utf-8")).split("\n"), start=1)
    too_long = [number for number, line in prose if len(line) > MOST_COLUMNS and not line.lstrip().startswith("|")]
    assert not too_long, f"lines over {MOST_COLUMNS} columns: {too_long}"


@pytest.mark.parametrize("page", READING, ids=name_of)
def test_page_is_listed_in_the_index_and_links_to_the_glossary(page: Path) -> None:
    assert str(page.relative_to(DOCS)) in links_of(INDEX)
    glossary = DOCS / "reference" / "glossary.md"
    linked = {(page.parent / target.partition("#")[0]).resolve() for target in links_of(page)}
    assert page == glossary or glossary in linked


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_snippets_compile_and_import_names_that_exist(page: Path) -> None:
    for block in code_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(("gns_", "trainer_hooks")):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{name_of(page)}: {node.module}.{alias.name}"


@pytest.mark.parametrize("name", RUNNABLE)
def test_guide_runs_as_it_is_written(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    try:
        for block in code_blocks(DOCS / "guide" / name):
            exec(compile(block, name, "exec"), names)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    session = names["session"]
    assert isinstance(session, AdaptiveBatch)
    assert session.samples_seen == session.specification.budget_samples


# ---------------------------------------------------------------------------- messages


@cache
def literals() -> tuple[str, ...]:
    """String literals of both packages; what varies in an f-string or a log line is a zero byte."""
    texts = []
    for package in ("gns_controller", "trainer_hooks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(re.sub(r"%\.?\d*[a-z]", "\0", node.value))
    return tuple(texts)


def quoted_messages(page: Path) -> Iterator[str]:
    """Messages in the first columns of the tables under a heading cell `message` or `log line`."""
    in_table = False
    for line in page.read_text(encoding="utf-8").split("\n"):
        if not line.startswith("|"):
            in_table = False
        elif re.match(r"\| (message|log line) ", line):
            in_table = True
        elif in_table and not line.startswith("|---"):
            yield from re.findall(r"`([^`]+)`", line.split(" | ")[0])


MESSAGES = [
    (page.name, message)
    for page in (DOCS / "guide" / "errors-at-attach.md", DOCS / "guide" / "troubleshooting.md")
    for message in quoted_messages(page)
    if " " in message
]


@pytest.mark.parametrize(("page", "message"), MESSAGES)
def test_quoted_message_is_one_that_the_packages_raise_or_log(page: str, message: str) -> None:
    parts = [re.escape(part) for part in message.split("...")]
    pattern = re.compile(r"[\s\S]*".join(parts))
    assert any(pattern.search(text) for text in literals()), f"{page} quotes {message!r}"


# ---------------------------------------------------------------------------- arguments


def rows_of(heading: str) -> dict[str, str]:
    """Name -> default of the table under a heading of the reference of attach."""
    text = (DOCS / "reference" / "attach.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", section, re.MULTILINE))


def test_reference_names_every_argument_of_attach_with_its_default() -> None:
    parameters = inspect.signature(AdaptiveBatch.attach).parameters
    rows = rows_of("Arguments")
    assert list(rows) == list(parameters)
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty:
            assert rows[name] == "required"
        elif name != "policy":
            assert rows[name].strip("`").replace('"', "'") == repr(parameter.default)


@pytest.mark.parametrize("options", [MeasurementOptions, CouplingOptions, ConnectionOptions])
def test_reference_names_every_option_with_its_default(options: type) -> None:
    rows = rows_of(options.__name__)
    fields = {field.name: field.default for field in dataclasses.fields(options)}
    assert list(rows) == list(fields)
    for name, default in fields.items():
        if name != "exclude":
            assert rows[name].strip("`").replace('"', "'") == repr(default)
