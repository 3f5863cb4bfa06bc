"""Parts of a step that every optimizer here has around its own rule: checks, gradients, buffers, decay, descent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.distributed.sharding import local_tensor

Decay = Literal["decoupled", "independent"]
"""w <- w (1 - d weight_decay): d = lr (decoupled), or lr over the first lr (independent).

The first lr is the group's initial_lr if it has one, as learning-rate schedulers write it, else its lr at construction.
"""

_CHUNK_NUMEL = 2**26
"""Entries of this rank's blocks: 256 MiB per temporary list in float32, and kernels long past launch-bound."""


def check_settings(kind: str, **bounds: tuple[float, float, float]) -> None:
    """Refuse settings out of range: name=(value, least, bound), bound excluded.

    Raises:
        InvalidInputError: names the setting, its value and its range.
    """
    for name, (value, least, bound) in bounds.items():
        if not least <= value < bound:
            raise InvalidInputError(f"{kind} needs {least:g} <= {name} < {bound:g}, got {name}={value!r}.")


def check_decay(kind: str, decay: str) -> None:
    """Refuse a decay that does not exist.

    Raises:
        InvalidInputError: the decay does not exist.
    """
    if decay not in get_args(Decay):
        raise InvalidInputError(f"{kind} has no decay={decay!r}; there are {', '.join(get_args(Decay))}.")


def gradient_of(parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return this rank's block of the direction of ascent: the gradient, negated if the group maximizes.

    Raises:
        InvalidInputError: the gradient is sparse.
    """
    grad = parameter.grad
    assert grad is not None
    if grad.is_sparse:
        raise InvalidInputError("sparse gradients are not supported; make the embedding with sparse=False.")
    block = local_tensor(grad, parameter)
    return -block if group["maximize"] else block


def blocks_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's blocks, which share memory with the parameters."""
    return [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in parameters]


def chunks_of(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the parameters in lists of one device and dtype, plain ones and DTensors together, of bounded size."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        alike.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    for same_dtype in alike.values():
        chunk: list[Tensor] = []
        numel = 0
        for parameter in same_dtype:
            chunk.append(parameter)
            numel += (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
            if numel >= _CHUNK_NUMEL:
                yield chunk
                chunk, numel = [], 0
        if chunk:
            yield chunk


def state_block(state: dict[str, Any], name: str, parameter: Tensor) -> Tensor:
    """Return this rank's block of a buffer laid out like its parameter, made of zeros if there is none yet."""
    if name not in state:
        state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    buffer: Tensor = state[name]
    return buffer.to_local() if isinstance(buffer, DTensor) else buffer


def remember_peak(group: dict[str, Any]) -> None:
    """Keep the first learning rate, over which independent decay is measured.

    Raises:
        InvalidInputError: it is 0, and the group's decay is independent.
    """
    group.setdefault("peak_lr", group.get("initial_lr", group["lr"]))
    if group["decay"] == "independent" and not group["peak_lr"]:
        raise InvalidInputError(
            "decay='independent' is measured in parts of the first learning rate, got lr=0; build the optimizer with "
            "the rate after warm-up, or give the group initial_lr."
        )


def descend(blocks: Sequence[Tensor], updates: Sequence[Tensor], group: Mapping[str, Any]) -> None:
    """Decay the weights, then step, in place.

        w <- w (1 - d weight_decay) - lr u          cautious: entries where w u < 0 are not decayed

    Args:
        blocks: of the parameters.
        updates: of the same shapes and dtypes.
        group: lr, weight_decay, decay, peak_lr, and cautious if the optimizer has it.
    """
    if not blocks:
        return
    # Weight decay, of all entries or (cautious) of those that the update moves towards zero.
    rate = group["lr"]
    scale = rate
    if group["decay"] == "independent":
        scale = rate / group["peak_lr"] if group["peak_lr"] else 0.0
    shrinkage = scale * group["weight_decay"]
    if shrinkage and group.get("cautious"):
        for block, update in zip(blocks, updates, strict=True):
            block.sub_(torch.where(block * update >= 0, shrinkage * block, 0))
    elif shrinkage:
        torch._foreach_mul_(list(blocks), 1 - shrinkage)
    # The step itself.
    torch._foreach_add_(list(blocks), list(updates), alpha=-rate)


def safe_rms(tensor: Tensor, *, dim: int | tuple[int, ...]) -> Tensor:
    """Compute the root mean square along dims, also where squares would overflow or vanish.

        s (mean (x / s)^2)^(1/2)        s = max |x|

    Divide by it, where it is not 0. It lies between s / n^(1/2) and s, n entries, and so within the range of x, which a
    norm may leave; so may its inverse.

    Args:
        tensor: floating, computed in float32, or in float64 if it is that.
        dim: these dims stay, with size 1.

    Returns:
        In the dtype it was computed in: 0 of zeros and of no entries, NaN where x is not finite.
    """
    entries = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if not entries.numel():
        return entries.sum(dim, keepdim=True)
    # Entries over the largest one, whose squares are between 0 and 1.
    largest = entries.abs().amax(dim, keepdim=True)
    scaled = entries / torch.where(largest == 0, 1, largest)
    norm = torch.linalg.vector_norm(scaled, dim=dim, keepdim=True)
    rms: Tensor = largest * (norm / math.sqrt(entries.numel() / norm.numel()))
    return rms


def refuse_sharded(parameters: Sequence[Tensor]) -> None:
    """Refuse sharded parameters where state is to be one file.

    Raises:
        InvalidInputError: a parameter is sharded.
    """
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise InvalidInputError(
            "consolidated_state_dict is for plain parameters; of sharded ones every rank holds blocks. Save with "
            "torch.distributed.checkpoint."
        )
