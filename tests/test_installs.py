"""What a release uploads is whole, and its installs are real.

The sdist holds the project and no junk, and its tests run. The wheel is built from it and is typed. Installed it is one
of three: bare, [service] without torch, [trainer] without FastAPI.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

NO_INDEX = "connection broken by"
"""What pip prints when no index answers. Its other failures are ours: versions that disagree, a broken build."""

JUNK = ("gns.db", ".gns/spool/run/report.jsonl", "gns_controller/__pycache__/old.pyc", "notes.txt", ".venv/pyvenv.cfg")
"""Files of a working tree that no distribution may hold."""

QUICK_TESTS = (
    *("tests/test_import_floors.py", "tests/test_readme.py", "tests/test_repository_files.py", "tests/deploy"),
    *("tests/gns_controller/core", "tests/gns_controller/test_reference.py", "tests/trainer_hooks/data"),
)
"""A part of the suite that reads the packages, the documents and the deployment files."""

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


USER_SCRIPT = '''"""A training script of a user, and a look at what another policy would have done."""

import torch
from torch import nn

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import NoiseScaleMeasurement
from gns_controller.core.replay import replay
from gns_controller.core.runs import RunSpecification
from gns_controller.recordings import read_recording
from trainer_hooks import (
    AdaptiveBatch,
    BatchShapeError,
    ConnectionOptions,
    Decision,
    GnsError,
    MeasurementOptions,
    NoiseScalePolicyConfig,
    Span,
    Stage,
    StagesPolicyConfig,
    cut_micro_batches,
    warmup_cosine,
)
from trainer_hooks.optim import Muon, parameter_groups

decisions: list[tuple[int, str]] = []


def on_decision(decision: Decision, source: str) -> None:
    decisions.append((decision.plan.global_batch_size, source))


def train(model: nn.Module, rows: torch.Tensor, *, budget_samples: int) -> int:
    groups = parameter_groups(model, hidden=Muon, hidden_options={"lr": 0.02}, fallback_options={"lr": 3e-3})
    session = AdaptiveBatch.attach(
        model,
        groups.optimizers,
        run="typed",
        global_batch_size=16,
        micro_batch_size=8,
        budget_samples=budget_samples,
        policy=NoiseScalePolicyConfig(maximum_batch_size=256, warmup=Span(samples=1200)),
        measurement=MeasurementOptions(interval=Span(steps=5)),
        connection=ConnectionOptions(on_decision=on_decision),
        learning_rate_schedule=warmup_cosine(budget_samples=budget_samples, warmup_samples=100),
    )
    for step in session.steps(rows, seed=1):
        for batch in step:
            step.backward(model(batch).square().mean())
        step.apply()
    session.close()
    sizes: list[int] = cut_micro_batches(16, micro_batch_size=8, min_pieces=2)
    return session.plan.global_batch_size + sum(sizes)


def compare(measurements: list[NoiseScaleMeasurement]) -> list[Decision]:
    ramp = StagesPolicyConfig(stages=(Stage(from_samples=100, global_batch_size=64),))
    rules = BatchRules(global_batch_size=16, micro_batch_size=8)
    specification = RunSpecification(batch=rules, data_parallel_size=2, budget_samples=10_000, policy=ramp)
    return replay(specification, measurements)


try:
    batch_size: int = train(nn.Linear(4, 1), torch.randn(64, 4), budget_samples=1600)
except BatchShapeError as error:
    print(error)
except GnsError:
    raise
notes: tuple[str, ...] = read_recording("run.csv").notes
'''


class Distributions(NamedTuple):
    """What a release uploads, and the source that the sdist unpacks to."""

    sdist: Path
    wheel: Path
    unpacked: Path


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """The sdist of a copy with junk in it, and the wheel of the unpacked sdist: built as pip and `build` do it."""
    folder = tmp_path_factory.mktemp("distributions")
    source = folder / "source"
    for name in _project_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    for name in JUNK:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("left by a person or a program")
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    builder = Environment(folder / "builder", *requires)
    sdist = builder.build("sdist", source, folder / "dist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    [unpacked] = (folder / "unpacked").iterdir()
    return Distributions(sdist, builder.build("wheel", unpacked, folder / "dist"), unpacked)


def _project_files() -> list[str]:
    """Files under version control, and new ones in their folders; in an unpacked sdist, which has no history, all."""
    tracked = _git_files("--cached")
    if not tracked:
        files = (path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return [str(path.relative_to(ROOT)) for path in files]
    folders = {name.split("/")[0] for name in tracked if "/" in name}
    new = [name for name in _git_files("--others", "--exclude-standard") if name.split("/")[0] in folders]
    return [name for name in (*tracked, *new) if (ROOT / name).is_file()]


def _git_files(*options: str) -> list[str]:
    command = ["git", "ls-files", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()


class Environment:
    """A fresh virtual environment in which pip has installed something."""

    def __init__(self, folder: Path, *requirements: str) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        self.bin = folder / "venv" / "bin"
        constraints = ROOT / "deploy" / "constraints.txt"
        command = [self.bin / "python", "-m", "pip", "install", "--quiet", "--constraint", constraints, *requirements]
        installed = subprocess.run(command, capture_output=True, text=True, check=False)
        if installed.returncode != 0:
            reason = f"pip could not install {' '.join(requirements)}: {installed.stderr.strip()[-500:]}"
            if NO_INDEX in installed.stderr and os.environ.get("REQUIRE_ALL") != "1":
                pytest.skip(reason)
            pytest.fail(reason)

    def build(self, kind: str, source: Path, target: Path) -> Path:
        """Call the build backend that the source names, in the source, as PEP 517 says."""
        backend = tomllib.loads((source / "pyproject.toml").read_text())["build-system"]["build-backend"]
        script = f"import {backend} as backend; print(backend.build_{kind}({str(target)!r}))"
        built = subprocess.run(
            [self.bin / "python", "-c", script], cwd=source, capture_output=True, text=True, check=False
        )
        assert built.returncode == 0, built.stderr
        return target / built.stdout.splitlines()[-1]

    def run(self, *arguments: str, seconds: float = 180) -> subprocess.CompletedProcess[str]:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("GNS_", "PYTHON", "VIRTUAL_ENV"))
        }
        return subprocess.run(
            [str(self.bin / arguments[0]), *arguments[1:]],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def python(self, script: str) -> None:
        done = self.run("python", "-c", script)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_sdist_holds_the_project_and_no_junk(distributions: Distributions) -> None:
    with tarfile.open(distributions.sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()} - {"PKG-INFO"}
    assert held == set(_project_files())


def test_the_wheel_holds_both_packages_their_data_and_all_licences(distributions: Distributions) -> None:
    with zipfile.ZipFile(distributions.wheel) as archive:
        held = set(archive.namelist())
        [metadata] = [archive.read(name).decode() for name in held if name.endswith("/METADATA")]
    packages = {name for name in _project_files() if name.startswith(("gns_controller/", "trainer_hooks/"))}
    assert {name for name in held if ".dist-info/" not in name} == packages
    message = email.message_from_string(metadata)
    assert message["License-Expression"] == "Apache-2.0 AND MIT"
    licences = {"LICENSE", "gns_controller/web/page/vendor/uPlot.LICENSE"}
    assert set(message.get_all("License-File", [])) == licences
    assert {name.partition("/licenses/")[2] for name in held if "/licenses/" in name} == licences
    targets = re.findall(r"\]\(([^)]+)\)", message.get_payload())
    assert len(targets) > 10
    assert all(target.startswith("https://") for target in targets), "a relative link leads nowhere on PyPI"


@pytest.mark.parametrize("missing", [None, "gns_controller", "trainer_hooks"])
def test_mypy_strict_accepts_a_script_of_a_user_while_both_packages_are_typed(
    tmp_path: Path, distributions: Distributions, missing: str | None
) -> None:
    # Everything else comes from the environment of the tests: torch takes minutes to install.
    environment = Environment(tmp_path, "--no-deps", str(distributions.wheel))
    [packages] = (tmp_path / "venv" / "lib").glob("*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (tmp_path / "script.py").write_text(USER_SCRIPT)
    if missing is not None:
        (packages / missing / "py.typed").unlink()
    cache = distributions.sdist.parent / "mypy"  # of torch, which is the same for all three
    checked = environment.run("python", "-m", "mypy", "--strict", f"--cache-dir={cache}", "script.py", seconds=500)
    if missing is None:
        assert checked.stdout.startswith("Success"), checked.stdout + checked.stderr
    else:
        assert checked.returncode == 1
        assert "module is installed, but missing library stubs or py.typed marker" in checked.stdout
        assert f'Skipping analyzing "{missing}' in checked.stdout


def test_the_tests_of_the_sdist_run(tmp_path: Path, distributions: Distributions) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GNS_", "PYTEST_"))}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            "-m",
            "not slow",
            f"--basetemp={tmp_path / 'tests'}",
            *QUICK_TESTS,
        ],
        cwd=distributions.unpacked,
        env={**environment, "PYTHONPATH": str(distributions.unpacked)},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"\b[2-9]\d\d passed", done.stdout), done.stdout[-300:]


def test_the_bare_install_is_the_core_and_pydantic(tmp_path: Path, distributions: Distributions) -> None:
    bare = Environment(tmp_path, str(distributions.wheel))
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
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert bare.run("gns-controller", "--version").stdout == f"gns-controller {version}\n"
    shown = bare.run("gns-controller", "--help")
    assert shown.returncode == 0
    assert "pip install 'gns-controller[service]'  serve, doctor" in shown.stdout
    assert "pip install 'gns-controller[demo]'" in shown.stdout


def test_the_service_install_serves_without_torch(tmp_path: Path, distributions: Distributions) -> None:
    service = Environment(tmp_path, f"{distributions.wheel}[service]")
    service.python(SERVICE_SCRIPT)
    demo = service.run("gns-controller", "demo", "--exit")
    assert demo.returncode == 5
    assert "needs torch: pip install 'gns-controller[demo]'" in demo.stderr


def test_the_trainer_install_trains_without_fastapi(tmp_path: Path, distributions: Distributions) -> None:
    Environment(tmp_path, f"{distributions.wheel}[trainer]").python(TRAINER_SCRIPT)
