"""Options that optimizers of matrices share: taken, documented, and refused under any other name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.trainer_hooks.optim.matrix_streams import start
from trainer_hooks.optim import ASGO, SOAP, EShampoo, Muon, Scion, Shampoo, SinkGD, SpecSGD
from trainer_hooks.optim.engine.options import DecayOptions, FactorOptions, MatrixOptions

OPTIONS: dict[Any, type[MatrixOptions]] = {
    Scion: MatrixOptions,
    **dict.fromkeys((Muon, SinkGD, SpecSGD), DecayOptions),
    **dict.fromkeys((ASGO, EShampoo, SOAP, Shampoo), FactorOptions),
}
OTHERS = {"maximize": True, "decay": "independent", "cautious": True, "spectral_normalization": True}


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_option_becomes_a_setting_of_the_groups(kind: Any) -> None:
    taken = {name: value for name, value in OTHERS.items() if name in OPTIONS[kind].__annotations__}
    (group,) = kind([start(6, 9)], lr=0.1, process_group=None, **taken).param_groups
    assert {name: group[name] for name in taken} == taken
    (group,) = kind([start(6, 9)], lr=0.1).param_groups
    defaults = {"maximize": False, "decay": "decoupled", "cautious": False, "spectral_normalization": False}
    assert {name: group[name] for name in taken} == {name: defaults[name] for name in taken}
    assert "process_group" not in group


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_docstring_names_every_option_and_where_it_is_documented(kind: Any) -> None:
    [(names, home)] = re.findall(r"^        options: (.*); see (\w+)\.$", kind.__doc__, re.MULTILINE)
    assert home == OPTIONS[kind].__name__
    assert set(re.split(r", | and ", names)) == OPTIONS[kind].__annotations__.keys()


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        (Muon, "cautios", r"Muon.__init__\(\) got an unexpected keyword argument 'cautios'. Did you mean 'cautious'\?"),
        (Muon, "momentm", r"unexpected keyword argument 'momentm'. Did you mean 'momentum'\?"),
        (Muon, "spectral_normalization", "unexpected keyword argument 'spectral_normalization'"),
        (Scion, "decay", "unexpected keyword argument 'decay'"),
        (Scion, "cautious", "unexpected keyword argument 'cautious'"),
        (SOAP, "epsilom", r"SOAP.* 'epsilom'. Did you mean 'epsilon'\?"),
        (Shampoo, "update_bias", "unexpected keyword argument 'update_bias'"),
    ],
)
def test_a_misspelt_option_is_a_type_error_that_names_the_closest_one(kind: Any, option: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        kind([start(6, 9)], **{option: True})
