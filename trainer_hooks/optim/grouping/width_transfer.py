"""Transfer of settings that were tuned on a small model to a wide or deep one (muP), tensor by tensor.

Pure functions of shapes. "Relative" below means the model's size over the base model's. dout and din are the sizes of
a matrix's outputs and inputs, n_out and n_in the numbers of blocks on these sides, N the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from gns_controller.core.errors import GeometryError, InvalidInputError
from trainer_hooks.optim.engine.update_scale import Scale, update_scale
from trainer_hooks.optim.grouping.roles import MATRIX_ROLES, Role, find_roles
from trainer_hooks.optim.known_optimizers import TransferRule


def sides(role: Role, shape: Sequence[int]) -> tuple[int, int]:
    """Return (dout, din) of a parameter, the sides that grow with the width.

    An embedding's din is 1, whatever the number of its entries: a one-hot vector picks one row. Vectors have din 1.

    Raises:
        GeometryError: "tensor", whose sides are not known.
    """
    if role in ("embedding", "tied"):
        return shape[-1], 1
    if role in ("norm", "bias", "vector", "scalar"):
        return math.prod(shape), 1
    if role == "transposed_conv":
        return math.prod(shape[1:]), shape[0]
    if role == "expert":
        return shape[-2], shape[-1]
    if role == "tensor":
        raise GeometryError(
            f"outputs and inputs of a tensor of shape {tuple(shape)} are not known; give it a role that has them."
        )
    return shape[0], math.prod(shape[1:])


def matrix_shape(role: Role, shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of the matrix that an optimizer sees: trailing dims flattened, of a stack one expert."""
    return (shape[-2], shape[-1]) if role == "expert" else (shape[0], math.prod(shape[1:]))


def learning_rate_multiplier(
    rule: TransferRule,
    *,
    role: Role,
    shape: Sequence[int],
    base_shape: Sequence[int],
    depth: int = 1,
    base_depth: int = 1,
) -> float:
    """Return the factor on a learning rate that was tuned at the base shape.

        adam, grafted_shampoo   1 / din                                      of embeddings and vectors din is 1
        muon                    sqrt(dout / din)
        shampoo                 N^(1 - 2E) (dout / din)^(1 - E) (n_in n_out)^(-E)    E: k times sides preconditioned
        soap   both sides       sqrt(dout / din) (n_in n_out)^(-1/2)
               inputs only      (din n_in)^(-1/2)
               outputs only     sqrt(dout / n_out) / din
        sgd                     N dout / din
        spectral                1

    All sizes relative. The result is divided by the relative factor that the optimizer itself puts on its update
    (`rule.scale`). Depth counts under the assumption that residual branches carry `residual_multiplier`.

    Args:
        rule: of the optimizer.
        role: of the parameter.
        shape: of the parameter; of one piece, if it is orthogonalized in pieces.
        base_shape: the same parameter's where the rate was tuned.
        depth: layers in the stack that it belongs to; 1 if it belongs to none.
        base_depth: the same where the rate was tuned.

    Raises:
        GeometryError: a matrix rule on a vector, or a tensor whose sides are not known.
        InvalidInputError: other sides are preconditioned than at the base, or `scale` is "rms_match".

    Source: arXiv:2512.05620v2 and its code; the division by `rule.scale` is ours.
    """
    # The table above, but for the rules that precondition.
    dout, din = _relative_sides(role, shape, base_shape)
    layers = depth / base_depth
    if rule.name == "spectral":
        return 1.0
    if rule.name == "sgd":
        return layers * dout / din
    if rule.name in ("adam", "grafted_shampoo"):
        multiplier = 1 / din
    elif role not in (*MATRIX_ROLES, "head", "embedding", "tied", "grouped_conv", "transposed_conv"):
        raise GeometryError(
            f"the transfer rule {rule.name!r} is for matrices, got role {role!r}, shape {tuple(shape)}."
        )
    elif rule.name == "muon":
        multiplier = math.sqrt(dout / din)
    else:
        multiplier = _preconditioned_multiplier(rule, role, shape, base_shape, layers=layers)
    return multiplier * _inverse_own_scale(rule, role, shape, base_shape)


def _inverse_own_scale(rule: TransferRule, role: Role, shape: Sequence[int], base_shape: Sequence[int]) -> float:
    """Return one over the relative factor that the optimizer puts on its update by itself."""
    if rule.scale == "none":
        return 1.0
    if rule.scale == "rms_match":
        raise InvalidInputError(
            "rms_match and transfer over width exclude each other: the spectral norm of updates of fixed RMS grows "
            "with sqrt(width), and transfer needs it constant. Take scale='spectral' or 'shape', of Shampoo another "
            "grafting, with base_shapes; or rms_match without them."
        )
    own, base = (
        update_scale(rule.scale, rows=rows, columns=columns)
        for rows, columns in (matrix_shape(role, shape), matrix_shape(role, base_shape))
    )
    return base / own


def _relative_sides(role: Role, shape: Sequence[int], base_shape: Sequence[int]) -> tuple[float, float]:
    """Return (dout, din) over those of the base shape."""
    if tuple(shape) == tuple(base_shape):
        return 1.0, 1.0
    if len(shape) != len(base_shape):
        raise InvalidInputError(f"shape {tuple(shape)} and base shape {tuple(base_shape)} differ in dimensions.")
    (dout, din), (base_dout, base_din) = sides(role, shape), sides(role, base_shape)
    return dout / base_dout, din / base_din


def _preconditioned_multiplier(
    rule: TransferRule, role: Role, shape: Sequence[int], base_shape: Sequence[int], *, layers: float
) -> float:
    """Return the factor of the rules shampoo and soap, by the sides that are preconditioned."""
    dout, din = _relative_sides(role, shape, base_shape)
    (n_out, n_in), (is_out, is_in) = _blocks(rule, role, shape, base_shape)
    if rule.name == "shampoo":
        total = rule.exponent * (is_out + is_in)
        return math.pow(layers, 1 - 2 * total) * math.pow(dout / din, 1 - total) * math.pow(n_in * n_out, -total)
    # soap, by the sides that are rotated.
    if is_out and is_in:
        return math.sqrt(dout / din / (n_in * n_out))
    if is_in:
        return 1 / math.sqrt(din * n_in)
    if is_out:
        return math.sqrt(dout / n_out) / din
    return 1 / din


def _blocks(
    rule: TransferRule, role: Role, shape: Sequence[int], base_shape: Sequence[int]
) -> tuple[tuple[float, float], tuple[bool, bool]]:
    """Return relative numbers of blocks (n_out, n_in), 1 on a side that is not preconditioned; and which sides are."""
    # Both models have to precondition the same sides.
    own, base = _stored_sides(role, shape), _stored_sides(role, base_shape)
    active = tuple(rule.largest_side is None or side <= rule.largest_side for side in own)
    if active != tuple(rule.largest_side is None or side <= rule.largest_side for side in base):
        raise InvalidInputError(
            f"shape {tuple(shape)} and base shape {tuple(base_shape)} do not have the same sides above "
            f"{rule.largest_side}, so they are preconditioned on different sides and no rule connects them. Take "
            "another base, or another limit."
        )
    # Blocks along each side, over those of the base.
    counts = [
        math.ceil(side / rule.block_size) / math.ceil(other / rule.block_size) if rule.block_size and is_active else 1.0
        for side, other, is_active in zip(own, base, active, strict=True)
    ]
    return (counts[0], counts[1]), (active[0], active[1])


def _stored_sides(role: Role, shape: Sequence[int]) -> tuple[int, int]:
    """Return `sides`, but with the entries of an embedding, which are a side to an optimizer."""
    return (shape[-1], shape[0]) if role in ("embedding", "tied") else sides(role, shape)


def scale_in_words(scale: Scale, matrices: Sequence[tuple[int, int]]) -> str:
    """Describe an optimizer's own factor on its updates of matrices, such as "rms_match 0.2*sqrt(768)=5.54"."""
    if scale == "none" or not matrices:
        return "-"
    shapes = dict.fromkeys(matrices)
    values = "/".join(dict.fromkeys(f"{update_scale(scale, rows=m, columns=n):.2f}" for m, n in shapes))
    if scale != "rms_match":
        return f"{scale} {values}"
    return f"rms_match 0.2*sqrt({'/'.join(dict.fromkeys(str(max(shape)) for shape in shapes))})={values}"


def weight_decay_multiplier(
    *, role: Role, shape: Sequence[int], base_shape: Sequence[int], learning_rate_multiplier: float
) -> float:
    """Return the factor on a decoupled weight decay, which is applied times the learning rate.

        lr weight_decay  ~  1 / width        so        weight_decay *= 1 / (width learning_rate_multiplier)

    The decay per step then falls with the width and follows the schedule, but not the rate's own multiplier. The width
    is that of the two sides whose relative size is farther from 1.

    Source: arXiv:2512.05620v2: independent decay, c / width.
    """
    # The side that changed most is the width.
    ratios = _relative_sides(role, shape, base_shape)
    width = max(ratios, key=lambda ratio: abs(math.log(ratio)))
    return 1 / (width * learning_rate_multiplier)


def epsilon_multiplier(
    rule: TransferRule,
    *,
    role: Role,
    shape: Sequence[int],
    base_shape: Sequence[int],
    depth: int = 1,
    base_depth: int = 1,
) -> float:
    """Return the factor on the epsilon beside a root of squared gradients: it follows the size of those gradients.

        soap   both sides       sqrt(din / (dout n_in n_out)) / N
               inputs only      sqrt(din / n_in) / dout / N
               outputs only     1 / sqrt(dout n_out) / N
        adam, grafted_shampoo   1 / dout / N                           of the latter, the epsilon of the grafting
        others                  1                                       their epsilon is relative, or they have none

    Args:
        rule: of the optimizer.
        role: of the parameter.
        shape: of the parameter.
        base_shape: the same parameter's where epsilon was tuned.
        depth: layers in the stack that it belongs to.
        base_depth: the same where epsilon was tuned.

    Source: arXiv:2512.05620v2 and its code for soap; adam is its limit without a rotation.
    """
    # Gradients of a deeper model are smaller by the number of layers, whatever the rule.
    if rule.name not in ("adam", "grafted_shampoo", "soap"):
        return 1.0
    layers = depth / base_depth
    dout, din = _relative_sides(role, shape, base_shape)
    if rule.name != "soap":
        return 1 / (dout * layers)
    (n_out, n_in), (is_out, is_in) = _blocks(rule, role, shape, base_shape)
    if is_out and is_in:
        return math.sqrt(din / (dout * n_in * n_out)) / layers
    if is_in:
        return math.sqrt(din / n_in) / dout / layers
    if is_out:
        return 1 / math.sqrt(dout * n_out) / layers
    return 1 / (dout * layers)


def residual_multiplier(*, depth: int, base_depth: int) -> float:
    """Return base_N / N, the factor on the output of every residual branch, in the model's forward.

    Source: arXiv:2512.05620v2: exponent 1, not the 1/2 of depth-muP.
    """
    return base_depth / depth


def base_shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every parameter of the model that settings were tuned on. It may be on the meta device.

    The names carry no wrappers' prefixes. Plain data: `json.dumps` keeps it.
    """
    return {row.name: tuple(row.parameter.shape) for row in find_roles(model)}
