"""In which norm an optimizer descends, by its class's name, so that nothing has to be imported for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gns_controller.core.contract import Geometry

_GEOMETRY_OF_KIND: dict[str, Geometry] = {
    **dict.fromkeys(("Muon", "SpecSGD", "Scion", "Dion", "NorMuon"), "spectral"),
    **dict.fromkeys(("Shampoo", "DistributedShampoo", "EShampoo", "SOAP", "ASGO"), "spectral"),
    **dict.fromkeys(("SignSGD", "Signum", "Lion", "Adam", "AdamW", "NAdam", "RAdam"), "sign"),
    "SGD": "euclidean",
}


def geometry_of(kind: str, group: Mapping[str, Any]) -> Geometry | None:
    """The geometry of a parameter group, or None if nobody knows the optimizer.

    Scion's groups descend in norms of their own: only norm="spectral" is spectral. Its "sign" is sign exactly; "row",
    "column" and "bias_rms" move all entries by about as much, and of the geometries there are, sign is the closest.

    Args:
        kind: the optimizer's class name.
        group: its settings.
    """
    if kind == "Scion" and group.get("norm", "spectral") != "spectral":
        return "sign"
    return _GEOMETRY_OF_KIND.get(kind)
