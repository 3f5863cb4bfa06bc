from __future__ import annotations

import json
from typing import Any

import pytest

from gns_controller.core.contract import Span
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import NoiseScalePolicyConfig, Stage, StagesPolicyConfig
from gns_controller.core.policies.parsing import read_policy


def test_json_and_toml_read_alike() -> None:
    expected = NoiseScalePolicyConfig(noise_tolerance=2, warmup=Span(samples=1600), growth_cap=2.0)
    document = {"policy": "noise_scale", "noise_tolerance": 2, "warmup": {"samples": 1600}, "growth_cap": 2}
    assert read_policy(f"\n  {json.dumps(document)}") == expected
    toml = 'policy = "noise_scale"\nnoise_tolerance = 2\ngrowth_cap = 2.0\n[warmup]\nsamples = 1600\n'
    assert read_policy(toml) == expected
    stages = 'policy = "stages"\n[[stages]]\nfrom_samples = 100\nglobal_batch_size = 32\n'
    assert read_policy(stages) == StagesPolicyConfig(stages=(Stage(from_samples=100, global_batch_size=32),))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "no JSON document"),
        ("policy = ", "no TOML document"),
        ("", "policy"),
        ("{}", "policy"),
        (f'{{"policy": "hold", "maximum_batch_size": {"9" * 5000}}}', "no JSON document"),
        (f'policy = "hold"\nmaximum_batch_size = {"9" * 5000}', "no TOML document"),
        ('{"a":' * 100_000, "no JSON document"),
        ('{"policy": "fastest"}', "policy: .*noise_scale"),
        ('{"policy": "noise_scale", "theta": 1}', "theta: Unknown field"),
        ('{"policy": "noise_scale", "noise_tolerance": 0, "growth_cap": 1}', "growth_cap: .*; noise_tolerance: "),
        ('{"policy": "noise_scale", "growth_cap": NaN}', "growth_cap"),
        ('{"policy": "noise_scale", "noise_tolerance": 1e-200}', "noise_tolerance"),  # its square is 0
        ('{"policy": "norm_test", "theta": 1e-200}', "theta"),
        ('{"policy": "inner_product_test", "theta": 1e-200}', "theta"),
        ('{"policy": "inner_product_test", "nu": 1e-200}', "nu"),
        ('{"policy": "stages", "stages": [{"from_samples": 1}]}', "stages.0: .*global_batch_size"),
        ('{"policy": "linear_ramp", "global_batch_size": 8}', "exactly one of them"),
    ],
)
def test_what_is_wrong_is_named(text: str, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        read_policy(text)


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"policy": "noise_scale", "theta": 1}, "theta: Unknown field."),
        ({"policy": "hold", "warmup": {"step": 3}, "theta": 1}, "warmup.step: Unknown field; theta: Unknown field."),
        ({}, "Needs the field 'policy'."),
        (
            {"policy": "stages", "stages": [{"from_sample": 1, "global_batch_size": 2}]},
            "stages.0.from_sample: Unknown field.",
        ),
        (
            {"policy": "stages", "stages": [{"from_samples": 1}]},
            "stages.0: give either global_batch_size or global_batch_tokens, exactly one of them.",
        ),
        (
            {"policy": "linear_ramp", "global_batch_size": 8},
            "give either ramp_samples or ramp_tokens, exactly one of them.",
        ),
        ({"policy": "stages", "stages": []}, "stages: Tuple should have at least 1 item after validation, not 0."),
        ({"policy": "stages"}, "stages: Field required."),
    ],
)
def test_the_sentence_about_it_says_each_fault_once(document: Any, told: str) -> None:
    with pytest.raises(InvalidInputError) as raised:
        read_policy(json.dumps(document))
    assert str(raised.value) == f"the policy document is not a policy: {told}"


def test_an_unknown_policy_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(InvalidInputError) as raised:
        read_policy('policy = "fastest"')
    sentence = str(raised.value)
    assert sentence.startswith(
        "the policy document is not a policy: The field 'policy' should be one of 'hold', 'stages', "
    )
    assert sentence.endswith("'goodput'.")
