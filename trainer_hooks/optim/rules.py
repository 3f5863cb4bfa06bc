"""By which rule the settings of an optimizer follow the width, as far as we know it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer_hooks.optim.engine.update_scale import Scale
from trainer_hooks.optim.grouping.width_transfer import RuleName, TransferRule

_RULES: dict[str, RuleName] = {
    **dict.fromkeys(("Adam", "AdamW", "NAdam", "RAdam", "Lion", "SignSGD", "Signum"), "adam"),
    **dict.fromkeys(("Muon", "SpecSGD"), "muon"),
    **dict.fromkeys(("Shampoo", "DistributedShampoo"), "shampoo"),
    **dict.fromkeys(("EShampoo", "SOAP"), "soap"),
    "Scion": "spectral",
    "SGD": "sgd",
}
"""By class name, so that nothing has to be imported."""


def own_rule(kind: str, settings: Mapping[str, Any], *, scale: Scale) -> TransferRule | None:
    """The rule of an optimizer without spectral_normalization, or None if nobody knows it.

    Args:
        kind: its class name.
        settings: its defaults.
        scale: the factor that it puts on its updates.
    """
    name = _RULES.get(kind)
    grafting = settings.get("grafting", "none")
    if name == "shampoo" and grafting == "adam":
        name = "grafted_shampoo"
    is_whitened = settings.get("factors") == "kl" and grafting == "none"
    if name is None or is_whitened or settings.get("scale_by_nuclear_norm"):
        return None
    side = "largest_side" if kind == "SOAP" else "block_size"
    return TransferRule(
        name,
        scale="rms_match" if grafting == "rms_match" else scale,
        exponent=settings.get("exponent", 0.25),
        **{side: settings.get("max_preconditioner_dim")},
    )
