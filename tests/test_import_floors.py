"""The plan of the house: a module imports downward only, and only the third-party packages named beside it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# module (or package) -> (floor, third-party packages). A package's line holds for modules without their own.
SERVICE = {
    "gns_controller": (0, set()),
    "gns_controller.core": (0, set()),
    "gns_controller.core.errors": (0, set()),
    "gns_controller.core.few_groups": (0, set()),
    "gns_controller.core.contract": (1, {"pydantic"}),
    "gns_controller.core.batch_arithmetic": (2, {"pydantic"}),
    "gns_controller.core.smoothing": (2, set()),
    "gns_controller.core.aggregation": (3, set()),
    "gns_controller.core.coupling": (3, set()),
    "gns_controller.core.policies.frame": (4, {"pydantic"}),
    "gns_controller.core.policies.lengths": (4.2, {"pydantic"}),
    "gns_controller.core.policies.observing": (4.2, set()),
    "gns_controller.core.policies.guards": (4.2, set()),
    "gns_controller.core.policies.concluding": (4.2, set()),
    "gns_controller.core.policies.hold": (5, set()),
    "gns_controller.core.policies.stages": (5, {"pydantic"}),
    "gns_controller.core.policies.linear_ramp": (5, {"pydantic"}),
    "gns_controller.core.policies.grow_once": (5, {"pydantic"}),
    "gns_controller.core.policies.decay_to_ramp": (5, {"pydantic"}),
    "gns_controller.core.policies.critical_batch_table": (5, {"pydantic"}),
    "gns_controller.core.policies.noise_scale": (5, {"pydantic"}),
    "gns_controller.core.policies.progress": (5, {"pydantic"}),
    "gns_controller.core.policies.norm_test": (5, {"pydantic"}),
    "gns_controller.core.policies.inner_product_test": (5, {"pydantic"}),
    "gns_controller.core.policies.goodput": (5.2, {"pydantic"}),
    "gns_controller.core.policies": (6, {"pydantic"}),
    "gns_controller.core.policies.documents": (6.2, {"pydantic"}),
    "gns_controller.core.projection": (6.5, set()),
    "gns_controller.core.runs": (7, {"pydantic"}),
    "gns_controller.core.replay": (8, set()),
    "gns_controller.store": (10, {"sqlalchemy", "alembic", "pydantic", "pydantic_core"}),
    "gns_controller.recordings": (10, {"pydantic", "tensorboard", "wandb", "google"}),
    "gns_controller.metrics": (10, {"prometheus_client"}),
    "gns_controller.settings": (10, {"pydantic", "pydantic_settings"}),
    "gns_controller.tokens": (10, set()),
    "gns_controller.listeners": (10, set()),
    "gns_controller.projections": (11, set()),
    "gns_controller.controls": (11, {"pydantic"}),
    "gns_controller.views": (11, set()),
    "gns_controller.controller": (12, set()),
    "gns_controller.web": (13, {"fastapi", "starlette", "pydantic", "pydantic_core", "prometheus_client"}),
    "gns_controller.calibration": (14, {"rich", "matplotlib"}),
    "gns_controller.children": (13, set()),
    "gns_controller.demo": (14, {"httpx", "rich", "matplotlib"}),
    "gns_controller.serving": (14, {"uvicorn", "fastapi", "prometheus_client"}),
    "gns_controller.doctor": (14, {"httpx"}),
    "gns_controller.remote": (14, {"httpx", "pydantic"}),
    "gns_controller.replaying": (14.5, {"pydantic"}),
    "gns_controller.terminal": (14.5, {"typer"}),
    "gns_controller.cli_runs": (14.7, {"typer", "rich", "pydantic"}),
    "gns_controller.cli": (15, {"typer", "uvicorn", "rich", "httpx", "pydantic"}),
    "gns_controller.__main__": (16, {"typer"}),
}
TRAINER = {
    "trainer_hooks.kernels": (0, {"torch", "triton"}),
    "trainer_hooks.distributed": (0, {"torch"}),
    "trainer_hooks.estimators": (1, {"torch"}),
    "trainer_hooks.data": (1, {"torch"}),
    "trainer_hooks.optim": (2, {"torch"}),
    "trainer_hooks.client": (2, {"httpx", "pydantic"}),
    "trainer_hooks.measurement": (3, {"torch"}),
    "trainer_hooks.session": (4, {"torch", "pydantic"}),
    "trainer_hooks": (5, {"torch"}),
    "trainer_hooks.examples": (6, {"torch", "numpy", "pydantic"}),
}
PLAN = SERVICE | TRAINER


def _modules() -> list[tuple[str, Path]]:
    found = []
    for package in ("gns_controller", "trainer_hooks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def _planned(module: str) -> str:
    while module not in PLAN:
        module, dot, _ = module.rpartition(".")
        assert dot, f"{module} is not in the plan"
    return module


def _imports(module: str, path: Path) -> list[str]:
    names = []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], base]).rstrip(".")
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize(("module", "path"), _modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_imports_downward_only(module: str, path: Path) -> None:
    home = _planned(module)
    floor, third_party = PLAN[home]
    known = {name for name, _ in _modules()}
    for name in _imports(module, path):
        root = name.split(".")[0]
        if root in sys.stdlib_module_names:
            continue
        if root not in ("gns_controller", "trainer_hooks"):
            assert root in third_party, f"{module} imports {root}, which its floor does not list"
            continue
        target = name if name in known else name.rpartition(".")[0]
        other = _planned(target)
        if other == home:
            continue
        if home in TRAINER and other in SERVICE:
            assert other.startswith("gns_controller.core"), f"{module} enters {other}: only gns_controller.core is open"
            continue
        assert other in (SERVICE if home in SERVICE else TRAINER), f"{module} imports {target}"
        assert PLAN[other][0] < floor, f"{module} (floor {floor}) imports {target} (floor {PLAN[other][0]})"
