"""Polynomials that move singular values towards 1, the norms they start from, and where they were published.

What each keeps of its promise in float32 and bfloat16 is measured in docs/reference/kernels.md.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Coefficients = tuple[tuple[float, float, float], ...]


class OrthogonalizationSchedule(NamedTuple):
    """Odd quintic polynomials X <- a X + (b A + c A^2) X, A = X X^T, applied one after another to X = G / f."""

    coefficients: Coefficients
    """Coefficients (a, b, c) of each step. An empty tuple: a singular value decomposition."""
    source: str
    """Publication of the coefficients, and the interval that singular values come to."""
    normalization: Literal["frobenius", "gram"] = "frobenius"
    """Norm that G is divided by: f = norm_margin * ||G||_F, or norm_margin * ||G G^T||_F^(1/2), the Schatten-4 norm,
    which is closer to the largest singular value."""
    norm_margin: float = 1.0
    """Part of the same fit as the coefficients, as is the normalization: never change one alone."""


def _with_safety(coefficients: Coefficients, factor: float) -> Coefficients:
    """Put p(x / factor) in place of p(x) for all but the last, so that rounding stays in the interval of the next."""
    *earlier, last = coefficients
    return (*((a / factor, b / factor**3, c / factor**5) for a, b, c in earlier), last)


NEWTON_SCHULZ_5 = OrthogonalizationSchedule(
    coefficients=((3.4445, -4.7750, 2.0315),) * 5,
    source="Jordan et al. 2024, Muon: slope at zero maximal, so singular values land in about [0.7, 1.2], not at 1",
)

POLAR_EXPRESS_4 = OrthogonalizationSchedule(
    coefficients=(
        (8.333434, -24.364762, 17.878703),
        (4.010066, -2.957489, 0.554448),
        (3.450431, -2.560292, 0.509697),
        (2.447009, -1.797395, 0.432790),
    ),
    source="method of arXiv:2505.16932; minimax for s/f in [3.2e-3, 1], safety 1.005: values land in [0.81, 1.19]; "
    "below, p(s/f) is at least 250 s/f",
    normalization="gram",
    norm_margin=1.01,
)

POLAR_EXPRESS_5 = OrthogonalizationSchedule(
    coefficients=(
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    source="arXiv:2505.16932; num_iters=5, safety_factor=2e-2, cushion=2: values land in [0.86, 1.14] for "
    "s/f in [1e-3, 1]",
    norm_margin=1.02,
)

POLAR_EXPRESS_7 = OrthogonalizationSchedule(
    coefficients=(
        (8.237334, -23.157829, 16.680627),
        (4.081925, -2.892924, 0.525306),
        (3.922399, -2.853827, 0.531994),
        (3.277661, -2.409529, 0.484654),
        (2.271060, -1.613822, 0.397845),
        (1.871895, -1.229972, 0.358444),
        (1.875001, -1.25, 0.374999),
    ),
    source="method of arXiv:2505.16932; minimax for s/f in [1e-3, 1], where |p(s/f) - 1| <= 4e-7; "
    "below, s (1 - p(s/f)) is in [0, 8e-5 f]",
    normalization="gram",
    norm_margin=1.01,
)

POLAR_EXPRESS_8 = OrthogonalizationSchedule(
    coefficients=_with_safety(
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            (1.875, -1.25, 0.375),
        ),
        1.01,
    ),
    source="arXiv:2505.16932, the published list with its safety of 1.01: converged for s/f in [1e-3, 1]",
    norm_margin=1.01,
)

DEEPSEEK_10 = OrthogonalizationSchedule(
    coefficients=((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2,
    source="DeepSeek-V4: eight steps of Jordan et al. and two that converge; values land in [0.999, 1.001] for "
    "s/f in [1e-3, 1]",
)

EXACT = OrthogonalizationSchedule(
    coefficients=(),
    source="singular value decomposition, the reference; a singular value that is rounding gives 0, not 1",
)
