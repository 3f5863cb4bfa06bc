"""The three installs are real: bare, [service] without torch, [trainer] without FastAPI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

NO_INDEX = "connection broken by"
"""What pip says when nobody answers. Its other failures are ours: versions that disagree, a broken build."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SERVICE_SCRIPT = """
import json, pathlib, subprocess, sys, time, urllib.request
for absent in ("torch", "numpy", "trainer_hooks.session.adaptive_batch"):
    try:
        __import__(absent)
    except ImportError:
        continue
    raise SystemExit(f"{absent} is importable")
ready = pathlib.Path("ready")
serve = subprocess.Popen([sys.executable, "-m", "gns_controller", "serve", "--port", "0", "--ready-file", str(ready)])
try:
    while not ready.exists():
        assert serve.poll() is None
        time.sleep(0.05)
    url = ready.read_text().strip()

    def ask(method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers, method=method)) as answer:
            return answer.read()

    batch = {"global_batch_size": 16, "micro_batch_size": 8}
    specification = {"batch": batch, "data_parallel_size": 2, "budget_samples": 1000}
    ask("PUT", "/api/v1/runs/installed", {"specification": specification, "incarnation": "incarnation-0"})
    step = {
        "run_id": "installed", "attempt": 0, "optimizer_step": 1, "samples_seen": 16, "plan_version": 0,
        "global_batch_size": 16, "micro_batch_size": 8, "gradient_accumulation_steps": 1, "data_parallel_size": 2,
    }
    reply = json.loads(ask("POST", "/api/v1/runs/installed/measurements", {"measurements": [step]}))
    assert reply["accepted"] == 1
    assert json.loads(ask("GET", "/api/v1/runs/installed"))["state"] == "running"
    for path in ("/", "/static/app.js", "/static/style.css", "/static/vendor/uPlot.iife.min.js"):
        assert len(ask("GET", path)) > 100, path
finally:
    serve.terminate()
    serve.wait(15)
"""

TRAINER_SCRIPT = """
import pathlib
for absent in ("fastapi", "sqlalchemy", "typer"):
    try:
        __import__(absent)
    except ImportError:
        continue
    raise SystemExit(f"{absent} is importable")
import torch
from trainer_hooks import AdaptiveBatch, ConnectionOptions
from trainer_hooks.optim import Signum

for number, controller in enumerate((None, "http://127.0.0.1:9")):
    model = torch.nn.Linear(4, 1)
    session = AdaptiveBatch.attach(
        model, Signum(model.parameters(), lr=0.01), run=f"installed-{number}", controller=controller,
        global_batch_size=8, micro_batch_size=8, budget_samples=160,
        connection=ConnectionOptions(spool_directory="spool"),
    )
    for step in session.steps(torch.randn(64, 5)):
        for rows in step:
            step.backward((model(rows[:, :4]) - rows[:, 4:]).square().mean())
        step.apply()
    session.close()
    assert session.samples_seen == 160
assert list(pathlib.Path("spool/installed-1").glob("*.jsonl"))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, because a build leaves folders behind."""
    copy = tmp_path_factory.mktemp("source") / "project"
    copy.mkdir()
    for name in ("gns_controller", "trainer_hooks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


class Environment:
    """A fresh virtual environment with one of the installs."""

    def __init__(self, folder: Path, source: Path, extra: str) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        self.bin = folder / "venv" / "bin"
        constraints = ROOT / "deploy" / "constraints.txt"
        target = f"{source}[{extra}]" if extra else str(source)
        command = [self.bin / "python", "-m", "pip", "install", "--quiet", "--constraint", constraints, target]
        installed = subprocess.run(command, capture_output=True, text=True, check=False)
        if installed.returncode != 0:
            reason = f"pip could not install [{extra}]: {installed.stderr.strip()[-500:]}"
            if NO_INDEX in installed.stderr and os.environ.get("REQUIRE_ALL") != "1":
                pytest.skip(reason)
            pytest.fail(reason)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("GNS_", "PYTHON", "VIRTUAL_ENV"))
        }
        return subprocess.run(
            [str(self.bin / arguments[0]), *arguments[1:]],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def python(self, script: str) -> None:
        done = self.run("python", "-c", script)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_bare_install_is_the_core_and_pydantic(tmp_path: Path, source: Path) -> None:
    bare = Environment(tmp_path, source, "")
    bare.python("import gns_controller.core.replay")
    listed = bare.run("python", "-m", "pip", "list", "--format", "freeze").stdout.lower()
    names = {line.split("==")[0].replace("_", "-") for line in listed.split()}
    pydantic = {"annotated-types", "pydantic", "pydantic-core", "typing-extensions", "typing-inspection"}
    assert names - {"pip", "setuptools"} == {"gns-controller"} | pydantic
    trainer = bare.run("python", "-c", "import trainer_hooks")
    assert "MissingDependencyError" in trainer.stderr
    assert "pip install 'gns-controller[trainer]'" in trainer.stderr
    command = bare.run("gns-controller", "serve")
    assert command.returncode == 5
    assert "pip install 'gns-controller[service]'" in command.stderr


def test_the_service_install_serves_without_torch(tmp_path: Path, source: Path) -> None:
    service = Environment(tmp_path, source, "service")
    service.python(SERVICE_SCRIPT)
    demo = service.run("gns-controller", "demo", "--exit")
    assert demo.returncode == 5
    assert "needs torch: pip install 'gns-controller[demo]'" in demo.stderr


def test_the_trainer_install_trains_without_fastapi(tmp_path: Path, source: Path) -> None:
    Environment(tmp_path, source, "trainer").python(TRAINER_SCRIPT)
