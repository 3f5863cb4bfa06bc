"""What the README shows works as it is written."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gns_controller.__main__ import COMMANDS_BY_EXTRA
from tests.gns_controller.running_service import Service, registration, report

ROOT = Path(__file__).parent.parent


def test_the_lines_to_attach_train_a_model_to_the_end_of_its_budget(monkeypatch: Any, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    block, groups = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    block = block.replace("1_562_500", "1_280").replace("234_375", "192")
    # No controller runs: what is measured goes to the spool, training goes on.
    monkeypatch.chdir(tmp_path)
    block = block.replace("127.0.0.1:8000", "127.0.0.1:9")
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    rows = torch.randn(256, 5, generator=torch.Generator().manual_seed(0))

    def loss_of(network: nn.Module, batch: Tensor) -> Tensor:
        return (network(batch[:, :4]) - batch[:, 4:]).square().mean()

    names: dict[str, Any] = {"model": model, "dataset": rows, "loss_of": loss_of}
    exec(compile(groups, "README.md", "exec"), names)
    exec(compile(block, "README.md", "exec"), names)
    assert names["session"].samples_seen == 1280
    assert list((tmp_path / ".gns" / "spool" / "llama-160m").glob("*.jsonl"))


def test_every_link_of_the_readme_is_absolute_in_the_package_and_leads_to_a_file_of_the_repository() -> None:
    text = (ROOT / "README.md").read_text()
    relative = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    for substitution in hook["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    absolute = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "gns-controller/gns-controller" in target]
    assert len(absolute) == len(relative) > 10
    for before, after in zip(relative, absolute, strict=True):
        assert re.fullmatch(r"https://[^/]+/gns-controller/gns-controller/(blob/)?main/" + re.escape(before), after)
        assert ("raw.githubusercontent.com" in after) == before.endswith(".png")


def test_the_table_of_the_readme_is_that_of_the_evidence() -> None:
    readme, evidence = (ROOT / "README.md").read_text(), (ROOT / "docs" / "evidence" / "demo.md").read_text()
    assert "<!--" not in readme
    shown = [line for line in readme.splitlines() if line.startswith("| ")]
    measured = {line.split("|")[1].strip(): line for line in evidence.splitlines() if line.startswith("| ")}
    methods = [line.split("|")[1].strip() for line in shown[1:]]
    assert len(methods) == 5
    for line, method in zip(shown[1:], methods, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        recorded = [cell.strip() for cell in measured[method].strip("|").split("|")]
        assert set(cells) <= set(recorded), method


def test_every_command_and_address_of_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    made = set(re.findall(r"\bmake ([a-z-]+)", text))
    assert made == {"demo", "test", "serve"}
    assert made <= set(targets)
    installed = set(re.findall(r"pip install '[\w.-]+\[(\w+)\]'", text))
    assert installed == {"trainer", "service"}
    assert installed <= set(project["optional-dependencies"])
    commands = {command for group in COMMANDS_BY_EXTRA.values() for command in group}
    called = set(re.findall(r"&& gns-controller ([a-z-]+)", text))
    assert called == {"serve"}
    assert called <= commands
    assert not any(word.startswith("-") and word != "-s" for word in re.findall(r"curl (\S+)", text))


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    running = Service(f"sqlite:///{tmp_path}/gns.db")
    yield running
    running.close()


def test_every_question_of_the_readme_has_an_answer_of_the_shown_form(service: Service) -> None:
    text = (ROOT / "README.md").read_text()
    name = re.findall(r"/runs/([\w-]+)/", text)[0]
    service.client.put(f"/api/v1/runs/{name}", json=registration())
    service.client.post(f"/api/v1/runs/{name}/measurements", json={"measurements": [report(1, run_id=name)]})
    addresses = re.findall(r"curl -s '?http://127\.0\.0\.1:8000([^\s']+)", text)
    assert len(addresses) == 3
    decisions, schedule, metrics = (service.client.get(address) for address in addresses)
    for item in decisions.json()["items"]:
        assert {"plan", "previous_batch_size", "explanation"} <= set(item["decision"])
    assert len(decisions.json()["items"]) == 1
    shown = json.loads(re.findall(r"^(\{.*\})$", text, flags=re.MULTILINE)[0])
    assert set(schedule.json()["savings"]) == set(shown)
    for metric in re.findall(r"^(gns_\w+)\{", text, flags=re.MULTILINE):
        assert f"# TYPE {metric} " in metrics.text
