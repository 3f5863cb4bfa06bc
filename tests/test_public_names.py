"""Documentation and the example job use public names only, and a training script needs one package."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import trainer_hooks

ROOT = Path(__file__).parent.parent

FACES = ("trainer_hooks", "trainer_hooks.optim", "trainer_hooks.kernels", "trainer_hooks.estimators")
"""Packages of the trainer whose __all__ is public."""

TRAINING = ("trainer_hooks", "trainer_hooks.optim")
"""The packages that README and guides import from to train."""

DOCUMENTED = {"trainer_hooks.kernels.symmetric": {"TRITON_FROM_SIDE"}}
"""Names that one reference page documents with their module."""

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
EXAMPLES = sorted((ROOT / "trainer_hooks" / "examples").glob("*.py"))


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def imports(code: str) -> list[tuple[str, str]]:
    """Pairs of module and name; an empty name for a module that is imported whole."""
    pairs = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            pairs += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            pairs += [(alias.name, "") for alias in node.names]
    return [(module, name) for module, name in pairs if module.split(".")[0] in ("gns_controller", "trainer_hooks")]


def is_public(module: str, name: str) -> bool:
    if name in DOCUMENTED.get(module, ()):
        return True
    if module.startswith("trainer_hooks") and module not in FACES:
        return False
    if not module.startswith(("trainer_hooks", "gns_controller.core.", "gns_controller.recordings")):
        return False
    if not name:
        return True
    exported = getattr(importlib.import_module(module), "__all__", None)
    return name in exported if exported is not None else not name.startswith("_")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documentation_imports_public_names_only(page: Path) -> None:
    for block in python_blocks(page):
        for module, name in imports(block):
            assert is_public(module, name), f"{module}.{name} is not public"
            assert not name or hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
def test_readme_and_guides_train_with_the_names_of_one_package_and_its_optimizers(page: Path) -> None:
    used = {module for block in python_blocks(page) for module, _ in imports(block)}
    if any(module.startswith("trainer_hooks") for module in used):
        assert used <= set(TRAINING)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_import_public_names_only(path: Path) -> None:
    for module, name in imports(path.read_text(encoding="utf-8")):
        if not module.startswith("trainer_hooks.examples"):
            assert module in FACES, f"{module} is internal"
            assert is_public(module, name), f"{module}.{name} is not public"


@pytest.mark.parametrize("face", FACES)
def test_every_exported_name_exists_once_and_in_order(face: str) -> None:
    module = importlib.import_module(face)
    assert all(hasattr(module, name) for name in module.__all__)
    assert len(module.__all__) == len(set(module.__all__))


def test_every_policy_and_its_parts_come_from_the_face() -> None:
    policies = importlib.import_module("gns_controller.core.policies")
    not_built_in = {"AnyPolicyConfig", "PolicyConfig", "UnavailablePolicyConfig"}
    configs = {name for name in policies.__all__ if name.endswith("PolicyConfig")} - not_built_in
    assert configs <= set(trainer_hooks.__all__)
