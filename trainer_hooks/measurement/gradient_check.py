"""Known gradients through the real backward path of the real model: is what measuring relies on true here?

Every rank gives every parameter a constant gradient of its own, twice, through the wrapper's own forward and backward,
and looks at what `parameter.grad` and the capture made of it. Module code does not run: `forward` is replaced by a sum
over parameters for the time of the test. Weights, optimizer states, buffers and random numbers are not touched.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from gns_controller.core.errors import SelfTestError
from trainer_hooks.distributed.layout import Layout, parameter_groups_of
from trainer_hooks.distributed.sharding import local_tensor
from trainer_hooks.estimators import choose_patterns
from trainer_hooks.measurement.capture.captured_step import Dealing, GradientCapture

logger = logging.getLogger(__name__)

_NUM_PASSES = 2
_NAMES_SHOWN = 4
_TOLERANCE = 2e-2
"""Reductions may be in bfloat16, whatever dtype comes out of them; faults are factors of two and more."""


def check_gradients(
    model: nn.Module,
    layout: Layout,
    measured: Sequence[Tensor],
    make_capture: Callable[[Dealing], GradientCapture],
) -> None:
    """Run the test. Call it on every rank; the outcome is the same on every rank.

    Args:
        model: as it is trained, wrapped.
        layout: what was found out about it.
        measured: parameters that the capture watches.
        make_capture: a fresh capture of them.

    Raises:
        SelfTestError: gradients are summed instead of averaged, stay local, have another factor, or are not seen by the
            hook; the message names parameters. Also where the test itself stops on an error.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper would compile the test
    reason = _reason_to_skip(model)
    if reason is not None:
        if layout.ranks.rank == 0:
            logger.info("self-test of gradients left out: %s", reason)
        return
    parameters: dict[str, Tensor] = {
        name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad
    }
    saved = {name: parameter.grad for name, parameter in parameters.items()}
    sync_flags = [
        (group, group.reduce_grads, group.all_reduce_grads)
        for module in layout.sharded_modules
        for group in parameter_groups_of(module)
    ]
    for parameter in parameters.values():
        parameter.grad = None
    try:
        problems = _faults(model, layout, parameters, measured, make_capture)
    except Exception as error:
        # Not passed over: what a wrapper is left with after it was interrupted may train nothing without a word.
        problems = [f"it could not be run to the end: {error!r}"]
    finally:
        for name, parameter in parameters.items():
            parameter.grad = saved[name]
        for group, reduce_grads, all_reduce_grads in sync_flags:
            group.reduce_grads, group.all_reduce_grads = reduce_grads, all_reduce_grads
    everybody = layout.ranks.gather_objects(problems)
    found = next(((rank, faults) for rank, faults in enumerate(everybody) if faults), None)
    if found is not None:
        raise SelfTestError(
            f"self-test of gradients failed on rank {found[0]} of {layout.ranks.size} ({layout.name}): "
            f"{'; '.join(found[1])}. MeasurementOptions(self_test=False) leaves the test out."
        )


def _reason_to_skip(model: nn.Module) -> str | None:
    if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in model.parameters()):
        return "parameters have post-accumulate hooks, which may step an optimizer"
    if isinstance(model, DistributedDataParallel) and model.static_graph:
        return "DistributedDataParallel(static_graph=True) learns its graph from the first backward pass"
    if isinstance(model, DistributedDataParallel) and any(getattr(m, "sparse", False) for m in model.modules()):
        return "DistributedDataParallel takes nothing but sparse gradients for embeddings with sparse=True"
    return None


def _faults(
    model: nn.Module,
    layout: Layout,
    parameters: dict[str, Tensor],
    measured: Sequence[Tensor],
    make_capture: Callable[[Dealing], GradientCapture],
) -> list[str]:
    size, rank = layout.data_parallel.size, layout.data_parallel.rank
    in_time_only = layout.averages_in_backward
    patterns = choose_patterns(
        1 if in_time_only or size == 1 else 3,
        num_ranks=size,
        num_micro_batches=_NUM_PASSES,
        over_ranks=not in_time_only,
    )
    dealing = Dealing(patterns, num_chunks=_NUM_PASSES, num_micro_batches=_NUM_PASSES)
    constants = {id(p): _constants(index, size) for index, p in enumerate(parameters.values())}
    capture = make_capture(dealing)
    for number in range(_NUM_PASSES):
        is_last = number == _NUM_PASSES - 1
        weights = {key: _loss_factor(number) * found[rank] for key, found in constants.items()}
        for module in layout.sharded_modules:
            module.set_requires_gradient_sync(is_last, recurse=False)
        postponed = model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext()
        with ExitStack() as stack:
            stack.enter_context(_sum_instead_of_forward(model, weights))
            stack.enter_context(postponed)
            total = _call(model)
            with capture.micro_batch(num_samples=1, loss_factor=1 / _NUM_PASSES):
                torch.autograd.backward(total)
    captured = capture.finish(torch.zeros(2, dtype=torch.float64, device=layout.ranks.device))
    faults: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        if parameter._backward_hooks:
            continue  # somebody's own hook may change this gradient on purpose
        fault = _fault_of_mean(parameter, constants[id(parameter)], rank)
        if fault is not None:
            faults.setdefault(fault, []).append(name)
    names = {id(parameter): name for name, parameter in parameters.items()}
    for index, parameter in enumerate(measured):
        measured_name = names.get(id(parameter))
        if (
            measured_name is None
            or parameter._backward_hooks
            or any(measured_name in listed for listed in faults.values())
        ):
            continue
        for pattern, signed in zip(patterns, captured.signed, strict=False):
            expected = sum(
                pattern.sign(rank=r, micro_batch=n) * _loss_factor(n) * constant
                for r, constant in enumerate(constants[id(parameter)])
                for n in range(_NUM_PASSES)
            )
            if not _is_constant(signed[index], expected / size):
                faults.setdefault("the measuring hook misses gradients of", []).append(measured_name)
                break
    return [f"{fault} {_listed(listed)}" for fault, listed in faults.items()]


def _constants(index: int, size: int) -> list[float]:
    """Every rank's constant for one parameter: small integers, exact in bfloat16, not equal over ranks."""
    return [float((1 + rank % 5) * (1 + index % 3)) for rank in range(size)]


def _loss_factor(number: int) -> float:
    """The second pass has twice the gradient of the first, so that one cannot stand for the other."""
    return (1 + number) / _NUM_PASSES


def _fault_of_mean(parameter: Tensor, constants: Sequence[float], rank: int) -> str | None:
    total = sum(_loss_factor(number) for number in range(_NUM_PASSES))
    if parameter.grad is None:
        return "no gradient reaches"
    block = local_tensor(parameter.grad, like=parameter)
    expected = total * sum(constants) / len(constants)
    if _is_constant(block, expected):
        return None
    if _is_constant(block, total * sum(constants)):
        return (
            f"gradients are summed over {len(constants)} ranks instead of averaged (divide factor 1 instead of "
            f"{len(constants)}) for"
        )
    if _is_constant(block, total * constants[rank]):
        return "gradients stay local to each rank instead of being averaged for"
    ratio = float(block.double().mean()) / expected
    return f"gradients come out {ratio:.4g} times their mean over ranks (wrong divide factor?) for"


def _is_constant(block: Tensor, expected: float) -> bool:
    limit = _TOLERANCE * max(abs(expected), 0.5)
    return block.numel() == 0 or bool((block.double() - expected).abs().max() <= limit)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _call(model: nn.Module) -> Tensor:
    """The wrapper's real __call__, hooks and all; a plain model around sharded parts has its parts called."""
    start = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)
    total: Tensor = model(start)
    return total


@contextmanager
def _sum_instead_of_forward(model: nn.Module, weights: dict[int, float]) -> Iterator[None]:
    """For the time being, forward of the model and of each sharded module is sum of (parameter * weight)."""
    root = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(root, nn.Module)
    replaced: list[nn.Module] = [root]
    replaced += [module for module in root.modules() if _is_sharded(module) and module is not root]
    weight_at = {
        (id(owner), key): weights[id(parameter)]
        for owner in root.modules()
        for key, parameter in owner.named_parameters(recurse=False)
        if id(parameter) in weights
    }
    before = [{name: getattr(module, name) for name in _SET_ASIDE} for module in replaced]
    own_forward = [module.__dict__.get("forward") for module in replaced]
    for module in replaced:
        module.__dict__["forward"] = _SumOfParameters(module, weight_at)
        module._compiled_call_impl = None
        for name in _SET_ASIDE[1:]:
            hooks: OrderedDict[int, Any] = getattr(module, name)
            setattr(module, name, OrderedDict((key, hook) for key, hook in hooks.items() if _is_of_fsdp(hook)))
    try:
        yield
    finally:
        for module, attributes, forward in zip(replaced, before, own_forward, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward
            for name, value in attributes.items():
                setattr(module, name, value)


_SET_ASIDE = (
    "_compiled_call_impl",
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
"""Of torch modules: compiled calls and hooks of others (tensor-parallel plans, users) do not know our forward."""


def _is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def _is_of_fsdp(hook: Any) -> bool:
    home = type(hook.__self__).__module__ if hasattr(hook, "__self__") else getattr(hook, "__module__", "")
    return str(home).startswith("torch.distributed.fsdp")


class _SumOfParameters:
    """Sum over a module's own parameters of parameter * weight, after its sharded parts have had their turn."""

    def __init__(self, module: nn.Module, weight_at: dict[tuple[int, str], float]) -> None:
        self._own: list[tuple[nn.Module, str, float]] = []
        self._parts: list[nn.Module] = []
        seen: set[int] = set()
        waiting = [module]
        while waiting:
            owner = waiting.pop(0)
            for key, parameter in owner.named_parameters(recurse=False):
                if (id(owner), key) in weight_at and id(parameter) not in seen:
                    seen.add(id(parameter))
                    self._own.append((owner, key, weight_at[id(owner), key]))
            # Depth first, in the order of registration: DDP lays its buckets by the first backward pass it sees.
            waiting[:0] = [child for child in owner.children() if not isinstance(child, FSDPModule)]
            self._parts += [child for child in owner.children() if isinstance(child, FSDPModule)]

    def __call__(self, start: Tensor) -> Tensor:
        total = start
        for part in self._parts:
            total = part(total)
        for owner, key, weight in self._own:
            parameter: Tensor = getattr(owner, key)
            total = total + (local_tensor(parameter) * weight).sum().to(total.dtype)
        return total
