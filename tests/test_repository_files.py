"""The files that a forge and its tools read agree with the project."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FORGE = "https://github.com/gns-controller/gns-controller"


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


# ---------------------------------------------------------------- CITATION.cff


def test_the_citation_has_what_its_schema_requires_and_the_projects_version_and_licence() -> None:
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"].split(" AND ")[0]
    assert citation["repository-code"] == PROJECT["urls"]["Source"]


def test_the_citation_refers_to_the_paper_of_the_published_estimator() -> None:
    [paper] = read_yaml("CITATION.cff")["references"]
    assert {"type", "title", "authors"} <= set(paper)
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Naganuma", "Gupta", "Briki", "Mitliagkas", "Rish", "Raman", "Shi"]
    assert paper["identifiers"][0]["value"] == "arXiv:2602.03001"
    assert paper["year"] == 2026


# ---------------------------------------------------------------- package metadata


def test_every_address_of_the_package_is_on_one_forge_and_every_page_exists() -> None:
    assert set(PROJECT["urls"]) == {"Homepage", "Documentation", "Source", "Issues", "Changelog"}
    for address in PROJECT["urls"].values():
        assert address.startswith(FORGE)
        _, found, page = address.partition("/blob/main/")
        assert not found or (ROOT / page).is_file(), page


def test_every_vendored_part_has_its_licence_in_the_package() -> None:
    vendored = {
        path.name.split(".")[0] for path in ROOT.glob("gns_controller/**/vendor/*") if not path.name.endswith("LICENSE")
    }
    licences = {Path(name).name.split(".")[0] for name in PROJECT["license-files"]}
    assert vendored
    assert vendored <= licences
    for name in PROJECT["license-files"]:
        assert (ROOT / name).is_file()


def test_both_packages_are_marked_as_typed() -> None:
    assert all((ROOT / package / "py.typed").is_file() for package in ("gns_controller", "trainer_hooks"))


# ---------------------------------------------------------------- .github and pre-commit


def test_the_workflow_runs_what_ci_runs_with_the_oldest_python_and_every_tool() -> None:
    [job] = read_yaml(".github/workflows/test.yml")["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[-1] == ".ci/run"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    tools = next(command for command in commands if "install-test-tools.sh" in command)
    assert (ROOT / tools.split()[-1]).is_file()
    assert job["container"].startswith(f"python:{PROJECT['requires-python'].removeprefix('>=')}-")
    assert job["steps"][-1]["if"] == "failure()"


@pytest.mark.parametrize("form", ["bug", "reading"])
def test_an_issue_form_asks_for_what_is_needed_to_repeat_a_fault(form: str) -> None:
    described = read_yaml(f".github/ISSUE_TEMPLATE/{form}.yml")
    assert {"name", "description", "body"} <= set(described)
    fields = [field for field in described["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    labels = " ".join(field["attributes"]["label"] for field in fields)
    assert "`gns-controller doctor --json`" in labels
    assert "`attach`" in labels
    assert form == "bug" or "Measurements, as JSON" in labels


def test_hooks_before_a_commit_run_the_commands_of_make_check() -> None:
    [local] = [
        repository for repository in read_yaml(".pre-commit-config.yaml")["repos"] if repository["repo"] == "local"
    ]
    programs = {hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude") for hook in local["hooks"]}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    checks = set(re.findall(r"^\t\$\(BIN\)/((?:ruff|mypy).*)$", makefile, re.MULTILINE))
    assert programs == {check.removesuffix(" .").removesuffix(" --check") for check in checks}


# ---------------------------------------------------------------- changelog


def test_the_changelog_has_dated_versions_and_the_groups_of_its_form() -> None:
    text = (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")
    unreleased, *released = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert unreleased == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", version) for version in released)
    groups = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert set(groups) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert f"will be {PROJECT['version']}" in text or f"## {PROJECT['version']} - " in text
