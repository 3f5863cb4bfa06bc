"""What the README shows works as it is written."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target and not target.startswith("mailto:"):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


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
