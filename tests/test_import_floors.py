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
    "gns_controller.core": (0, {"pydantic"}),
    "gns_controller.store": (1, {"sqlalchemy", "alembic", "pydantic", "pydantic_core"}),
    "gns_controller.recordings": (1, {"pydantic", "tensorboard", "wandb", "google"}),
    "gns_controller.service": (2, {"prometheus_client", "pydantic", "pydantic_settings"}),
    "gns_controller.web": (3, {"fastapi", "starlette", "pydantic", "pydantic_core", "prometheus_client"}),
    "gns_controller.experiments": (3, {"httpx", "rich", "matplotlib"}),
    "gns_controller.cli": (4, {"typer", "uvicorn", "fastapi", "rich", "httpx", "pydantic", "prometheus_client"}),
    "gns_controller.__main__": (5, {"typer"}),
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
