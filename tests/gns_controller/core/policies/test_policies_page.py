"""The pages about policies: every field with its default, every reason, every example."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from gns_controller.core.batch_arithmetic import LearningRateCoupling
from gns_controller.core.contract import Reason
from gns_controller.core.policies import POLICIES, NoiseScalePolicyConfig
from gns_controller.core.policies.base import Guards, PolicyConfig
from gns_controller.core.policies.parsing import read_policy

DOCS = Path(__file__).parents[4] / "docs"
PAGES = (
    "guide/choosing-a-policy.md",
    *(f"reference/{name}.md" for name in ("policies", "open-loop-policies", "closed-loop-policies", "couplings")),
    "reference/projection-and-replay.md",
)
TEXT = "\n".join((DOCS / page).read_text() for page in PAGES)


def section(title: str) -> str:
    [found] = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^#{{1,2}} |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return str(found)


def fields(text: str) -> dict[str, str]:
    """Field -> default of the tables whose columns are `field` and `default`, guards' with a number before them."""
    return dict(re.findall(r"^\|(?: \d* ?\|)? `([a-z_]+)` \| ([^|]*?) \|", text, re.MULTILINE))


def shown(default: Any) -> tuple[str, ...]:
    if isinstance(default, str):
        return (f"`{default}`",)
    return (json.dumps(default), f"{default:g}") if isinstance(default, float) else (json.dumps(default),)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_has_its_own_fields_its_defaults_and_an_example(policy: type[PolicyConfig]) -> None:
    name = policy.model_fields["policy"].default
    text = section(f"`{name}`")
    table = fields(text)
    inherited = PolicyConfig.model_fields
    own = {
        field: info
        for field, info in policy.model_fields.items()
        if field != "policy" and (field not in inherited or info.default != inherited[field].default)
    }
    assert set(own) <= set(table)
    for field, default in table.items():
        info = policy.model_fields[field]
        assert default in (("required",) if info.is_required() else shown(info.default)), field
    examples = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert examples
    for example in examples:
        assert isinstance(read_policy(example), policy)
    assert name in section("Which one?") or name == "hold"


def test_every_shared_field_is_there_with_its_default() -> None:
    guards, shared = fields(section("Guards")), fields(section("All policies").split("###")[0])
    assert set(guards) == set(Guards.model_fields)
    assert {*guards, *shared} >= set(PolicyConfig.model_fields)
    for field, info in PolicyConfig.model_fields.items():
        assert (guards | shared)[field] in shown(info.default), field
    [example] = re.findall(r"```json\n(.*?)```", section("Guards"), re.DOTALL)
    read_policy(example)


def test_the_page_for_plug_ins_names_everything_that_a_policy_declares() -> None:
    page = (Path(__file__).parents[4] / "docs" / "guide" / "policy-plug-in.md").read_text()
    [table] = re.findall(r"^## What a policy may do\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)
    declared = {name for name in vars(PolicyConfig) if not name.startswith("_")} - {"model_config"}
    assert set(re.findall(r"^\| `([a-z_]+)", table, re.MULTILINE)) == {"policy", *declared}


def test_every_reason_and_every_coupling_is_there_and_no_other() -> None:
    rows = re.findall(r"^\| `([a-z_]+)` \|", section("Reasons"), re.MULTILINE)
    assert sorted(rows) == sorted(get_args(Reason))
    named = set(re.findall(r"`([a-z_]+)`", section("Guards")))
    assert {reason for reason in get_args(Reason) if reason.startswith("capped")} <= named
    text = section("Learning rate and betas")
    rules = re.findall(r"^\| `([a-z]+)`[^|]*\| [^|]* \| [^|]* \|", text, re.MULTILINE)
    assert sorted(rules) == sorted(get_args(LearningRateCoupling))


def test_the_example_of_replay_prints_what_the_page_says() -> None:
    found = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", section("Replay"), re.DOTALL)
    assert found is not None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(found.group(1), {})
    assert printed.getvalue() == found.group(2)


def test_the_recommended_policy_is_the_one_on_the_page() -> None:
    examples = [read_policy(text) for text in re.findall(r"```json\n(.*?)```", section("`noise_scale`"), re.DOTALL)]
    assert NoiseScalePolicyConfig.recommended(budget_samples=1_000_000) in examples
