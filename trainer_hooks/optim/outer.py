"""Optimizers around an optimizer: every few steps the weights are pulled along, or back, the way they have come."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.optim.engine.merged_state import MergedStates
from trainer_hooks.optim.engine.optimizer import OPTIMIZER_CLASS, BaseOptimizer, check_class
from trainer_hooks.optim.engine.update import blocks_of, check_settings, chunks_of, refuse_sharded, state_block
from trainer_hooks.optim.protocols import NotifiedOfBatchChange

_BUFFERS = ("outer_slow", "outer_momentum")
_COUNTS = ("outer_num_steps", "outer_interval")
_SETTINGS = ("interval", "lr", "momentum", "batch_exponent")
_OF_THE_INNER_ONE = ("averages", "owns_state", "supply_halves", "wants_halves")


class SNOO(torch.optim.Optimizer):
    """Step-K Nesterov outer optimizer: momentum on the way that K inner steps went.

    SNOO lets another optimizer take K steps, looks at how far the weights have come since the last time, and treats
    that way as a gradient of its own: it moves the weights from where they were along an average of such ways. Steps
    that went back and forth cancel, and steady ones add up, so that the weights which a model is evaluated with are
    smoother than those of the inner optimizer.

    After every K-th inner step, with slow and fast weights, equal at the start:

        s = slow - fast        b <- mu b + s        slow <- slow - lr (mu b + s)        fast <- slow

    momentum=0 is Lookahead. Groups are those of the inner optimizer, so schedulers and anything else that writes
    group["lr"] act on inner steps; so do weight decay and clipping. Gradients are never written. Several inner
    optimizers (Muon and AdamW) get one wrapper each, with the same interval, and are then at a boundary at the same
    steps. A first step at rate 0, which moves nothing, is not counted; a session counts it.

    Args:
        optimizer: the inner one, of any kind. Its parameters may be DTensors.
        interval: K, inner steps.
        lr: of the outer step.
        momentum: mu in [0, 1), of a sum. A steady drift comes out lr / (1 - mu) times as long.
        batch_exponent: at a batch change b is multiplied by (batch / previous batch)^batch_exponent, so that it keeps
            the units of s. 0 leaves it alone; 1/2 goes with learning rates that follow the root of the batch, 1 with
            linear ones.

    Raises:
        InvalidInputError: a setting out of range.

    Source: arXiv:2510.15830. Defaults: modded-nanogpt's, around Adam and Muon; the paper has K=100, lr=0.8, mu=0.75 for
        125M parameters. Ours: the first outer step comes after K inner steps, not after the first one.
    """

    inner: torch.optim.Optimizer

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        interval: int = 28,
        lr: float = 0.68,
        momentum: float = 0.37,
        batch_exponent: float = 0.0,
    ) -> None:
        # Settings in range, around an optimizer that is built.
        kind, infinity = type(self).__name__, float("inf")
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, SNOO):
            raise InvalidInputError(
                f"{kind} wraps an optimizer that is built, and no outer one, as {kind}(Muon(matrices))."
            )
        if not isinstance(interval, int) or isinstance(interval, bool):
            raise InvalidInputError(f"{kind} needs a whole number of steps, got interval={interval!r}.")
        check_settings(kind, interval=(interval, 1, infinity), momentum=(momentum, 0, 1))
        check_settings(kind, lr=(lr, 0, infinity), batch_exponent=(batch_exponent, 0, infinity))
        self.interval, self.lr, self.momentum, self.batch_exponent = interval, lr, momentum, batch_exponent
        self._num_steps = 0
        self._is_swapped = False
        # Groups are the inner optimizer's, so torch's constructor, which makes its own, is not called.
        self.__setstate__({"inner": optimizer, "defaults": dict(optimizer.defaults), "_outer": defaultdict(dict)})
        self._complete()

    def __getattr__(self, name: str) -> Any:
        """Return abilities of the inner optimizer, which exist here if they exist there."""
        if name in _OF_THE_INNER_ONE:
            return getattr(self.inner, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Groups of the inner optimizer itself."""
        return self.inner.param_groups

    @property
    def state(self) -> MutableMapping[Tensor, dict[str, Any]]:  # type: ignore[override]
        """State of the inner optimizer and of the outer one, parameter by parameter, as in state_dict.

        What is written goes to the one that it belongs to; the counts are this optimizer's own and stay.
        """
        return MergedStates(self.inner.state, self._outer, buffers=_BUFFERS, counts=self._counts())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the inner optimizer. Their slow weights begin where they are at the next step."""
        self.inner.add_param_group(param_group)

    @property
    def at_boundary(self) -> bool:
        """True if fast and slow weights are equal now. Change the batch only then, so that s mixes no two batches."""
        return self._num_steps == 0

    @property
    def num_steps(self) -> int:
        """Steps counted since the last boundary: those of the run, modulo interval."""
        return self._num_steps

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one inner step, and after every interval-th one an outer step."""
        self._check_not_swapped("step")
        # torch.distributed.checkpoint makes state by a step at rate 0 on gradients of zeros. The rates alone decide, as
        # all ranks have them: in a step of the run, too, one rank's blocks of the gradients may be zeros.
        is_counted = bool(self._outer) or any(group["lr"] != 0 for group in self.param_groups)
        self._begin()
        loss = self.inner.step(closure)
        if is_counted:
            self._count()
        return loss

    @torch.no_grad()
    def count_skipped_step(self) -> None:
        """Count a step that a gradient scaler left out, so that boundaries stay the run's; a session does it."""
        self._check_not_swapped("count_skipped_step")
        self._begin()
        self._count()

    def _begin(self) -> None:
        """Make the outer state of every parameter, and begin an interval where the weights are."""
        for parameter in self._trained():
            state = self._outer[parameter]
            if "outer_slow" not in state:
                state["outer_slow"] = parameter.detach().clone()
            if self.momentum:  # now, not at the boundary: a distributed checkpoint loads into what is there
                state_block(state, "outer_momentum", parameter)
        if self.at_boundary:  # weights may have been loaded since the outer step
            for parameters in chunks_of(self._trained()):
                torch._foreach_copy_(self._slow(parameters), blocks_of(parameters))

    @torch.no_grad()
    def _complete(self) -> None:
        """Make the state that a distributed checkpoint loads into, where torch finds some and so makes none."""
        if self.inner.state:
            self._begin()

    def _count(self) -> None:
        """Count an inner step, and take the outer step when the interval is full."""
        self._num_steps += 1
        if self._num_steps >= self.interval:
            for parameters in chunks_of(self._trained()):
                self._outer_step(parameters)
            self._num_steps = 0

    def _outer_step(self, parameters: Sequence[Tensor]) -> None:
        """Move slow weights, and fast ones with them: entry by entry, so every rank steps the blocks that it holds."""
        # Products are rounded before they are added: the same on every device, and momentum 0 is exactly Lookahead.
        fast, slow = blocks_of(parameters), self._slow(parameters)
        moves = list(torch._foreach_sub(slow, fast))
        if self.momentum:
            momenta = [state_block(self._outer[parameter], "outer_momentum", parameter) for parameter in parameters]
            torch._foreach_mul_(momenta, self.momentum)
            torch._foreach_add_(momenta, moves)
            torch._foreach_add_(moves, list(torch._foreach_mul(momenta, self.momentum)))
        torch._foreach_mul_(moves, self.lr)
        torch._foreach_sub_(slow, moves)
        torch._foreach_copy_(fast, slow)

    @contextmanager
    def slow_weights(self, *modules: nn.Module) -> Iterator[None]:
        """Put the slow weights into the parameters, for an evaluation between boundaries, and the fast ones back after.

        Args:
            modules: the model, if fully_shard was applied to it or its parameters are DTensors. After a forward pass
                FSDP2 may keep gathered copies of the weights; they are dropped on the way in and out.

        Raises:
            InvalidInputError: a parameter is a DTensor of no given module, or step or state_dict is called meanwhile.
        """
        # DTensors only with the model that gathers them, whose gathered copies are dropped.
        self._check_not_swapped("slow_weights")
        _reshard(modules)
        held = {parameter for module in modules for parameter in module.parameters()}
        if any(isinstance(parameter, DTensor) and parameter not in held for parameter in self._trained()):
            raise InvalidInputError(
                f"{type(self).__name__}.slow_weights got {len(modules)} modules, and parameters of the optimizer are "
                "DTensors of none of them; give the model that fully_shard was applied to: slow_weights(model)."
            )
        # Slow weights in, and fast ones back whatever the evaluation does.
        self._swap()
        self._is_swapped = True
        try:
            yield
        finally:
            _reshard(modules)
            self._swap()
            self._is_swapped = False

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange fast and slow weights in place; at a boundary they are equal."""
        if self.at_boundary:
            return
        for parameters in chunks_of([parameter for parameter in self._trained() if parameter in self._outer]):
            fast, slow = blocks_of(parameters), self._slow(parameters)
            copies = [block.clone() for block in fast]
            torch._foreach_copy_(fast, slow)
            torch._foreach_copy_(slow, copies)

    def on_batch_change(self, *, global_batch_size: int, previous: int) -> None:
        """Rescale the outer momentum by batch_exponent, and notify the inner optimizer.

        Raises:
            InvalidInputError: called between boundaries.
        """
        if not self.at_boundary:
            raise InvalidInputError(
                f"the batch changed from {previous} to {global_batch_size} samples {self._num_steps} steps after "
                f"{type(self).__name__}'s last boundary; change it only when at_boundary, every {self.interval} steps."
            )
        # The momentum is a sum of ways, which are as long as the learning rate makes them at a batch.
        if self.batch_exponent:
            factor = (global_batch_size / previous) ** self.batch_exponent
            for state in self._outer.values():
                if "outer_momentum" in state:
                    state["outer_momentum"].mul_(factor)
        if isinstance(self.inner, NotifiedOfBatchChange):
            self.inner.on_batch_change(global_batch_size=global_batch_size, previous=previous)

    def __getstate__(self) -> dict[str, Any]:
        """Return what deepcopy and pickle take: the inner optimizer whole, slow weights, momentum and settings."""
        self._check_not_swapped("__getstate__")
        names = ("inner", "defaults", "_outer", "_num_steps", "_is_swapped", *_SETTINGS)
        return {name: self.__dict__[name] for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state_dict, with slow weights, outer momentum and counts beside each state."""
        self._check_not_swapped("state_dict")
        return self._with_outer(self.inner.state_dict())

    def consolidated_state_dict(self) -> dict[str, Any]:
        """Return state_dict with the matrices of every rank, if the inner optimizer divides them. Every rank calls it.

        Raises:
            InvalidInputError: parameters are sharded, so that one file cannot hold their blocks. On every rank.
        """
        self._check_not_swapped("consolidated_state_dict")
        refuse_sharded([parameter for group in self.param_groups for parameter in group["params"]])
        consolidated = getattr(self.inner, "consolidated_state_dict", self.inner.state_dict)
        return self._with_outer(consolidated())

    def _with_outer(self, inner: dict[str, Any]) -> dict[str, Any]:
        """Return an inner state_dict with the outer entries beside each parameter's own."""
        states = dict(inner["state"])
        for group, packed in zip(self.param_groups, inner["param_groups"], strict=True):
            for parameter, number in zip(group["params"], packed["params"], strict=True):
                if parameter in self._outer:
                    states[number] = {**states.get(number, {}), **self._outer[parameter], **self._counts()}
        return {**inner, "state": states}

    def _counts(self) -> dict[str, Tensor]:
        """Return the counts that lie beside each parameter's state: a flat distributed checkpoint keeps them there."""
        return dict(zip(_COUNTS, map(torch.tensor, (self._num_steps, self.interval)), strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load both optimizers. A checkpoint of the inner one alone starts at a boundary, from the present weights.

        The first checkpoints counted in groups, and had no interval: it is taken to be the present one.

        Raises:
            InvalidInputError: it was saved between boundaries of another interval or around another optimizer, or is
                not whole. Nothing is loaded.
        """
        self._check_not_swapped("load_state_dict")
        if OPTIMIZER_CLASS in state_dict and not isinstance(self.inner, BaseOptimizer):  # which checks it itself
            check_class(type(self.inner), state_dict)
        # Outer entries by parameter. Of a flat checkpoint torch gives an empty dict for what is not in it.
        outer = {
            number: {name: state[name] for name in (*_BUFFERS, *_COUNTS) if isinstance(state.get(name), Tensor)}
            for number, state in state_dict["state"].items()
        }
        # The first checkpoints counted in groups: their count goes beside each parameter of the group.
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group in groups:
            num_steps = group.pop("outer_num_steps", None)
            for number in group["params"] if num_steps is not None else ():
                counts = map(torch.tensor, (num_steps, self.interval))
                outer[number] = {**dict(zip(_COUNTS, counts, strict=True)), **outer.get(number, {})}
        # Checks of the outer entries come first, and the inner optimizer's next, so that nothing is loaded by halves.
        num_steps = self._saved_num_steps([saved for saved in outer.values() if "outer_slow" in saved])
        inner = {
            number: {name: value for name, value in state.items() if name not in (*_BUFFERS, *_COUNTS)}
            for number, state in state_dict["state"].items()
        }
        inner = {number: state for number, state in inner.items() if state}
        self.inner.load_state_dict({**state_dict, "state": inner, "param_groups": groups})
        # Outer entries, in the dtype and on the device of their parameters.
        self._num_steps = num_steps
        self._outer.clear()
        for group, packed in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, number in zip(group["params"], packed["params"], strict=True):
                for name in _BUFFERS:
                    if name in outer.get(number, {}):
                        self._outer[parameter][name] = outer[number][name].detach().to(parameter, copy=True)
        self._complete()

    def _saved_num_steps(self, states: Sequence[Mapping[str, Tensor]]) -> int:
        """Return the steps since a boundary that all parameters agree on, 0 without slow weights."""
        kind = type(self).__name__
        missing = sorted({name for state in states for name in _COUNTS if name not in state})
        if missing:
            raise InvalidInputError(
                f"the checkpoint has {kind}'s slow weights and no {' and no '.join(missing)}; load a whole state_dict."
            )
        # One wrapper steps all of its parameters together, so all have one count.
        counts = sorted({(int(state["outer_num_steps"]), int(state["outer_interval"])) for state in states})
        if len(counts) > 1:
            listed = " and ".join(f"{num_steps} of {interval} steps" for num_steps, interval in counts)
            raise InvalidInputError(
                f"the checkpoint's parameters have counted {listed} since a boundary, and those of one {kind} count "
                "alike; give each its own optimizer's."
            )
        num_steps, interval = counts[0] if counts else (0, self.interval)
        if num_steps and interval != self.interval:
            raise InvalidInputError(
                f"the checkpoint was saved {num_steps} steps after a boundary of interval={interval}, and this {kind} "
                f"has interval={self.interval}: build it with interval={interval}, or take a checkpoint of a boundary."
            )
        return num_steps

    def _slow(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        return [state_block(self._outer[parameter], "outer_slow", parameter) for parameter in parameters]

    def _trained(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"] if parameter.requires_grad]

    def _check_not_swapped(self, what: str) -> None:
        if self._is_swapped:
            raise InvalidInputError(
                f"{type(self).__name__}.{what} was called while its slow weights are in the parameters; leave "
                "slow_weights() first."
            )


def _reshard(modules: Sequence[nn.Module]) -> None:
    """Drop the gathered copies of weights that FSDP2 may keep after a forward pass."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


class Lookahead(SNOO):
    """Every K inner steps the slow weights go a part of the way to the fast ones, which go back to them.

    Lookahead lets another optimizer explore for K steps, and then goes only a part of that way. The exploring steps may
    be large and noisy; the weights that stay are an average of where they ended.

        slow <- slow + pull (fast - slow)        fast <- slow

    All else is SNOO's, with lr=pull and momentum=0.

    Args:
        optimizer: the inner one, of any kind.
        interval: K, inner steps.
        pull: in (0, 1]; 1 is the inner optimizer alone.

    Raises:
        InvalidInputError: a setting out of range.

    Source: Zhang et al. 2019, arXiv:1907.08610.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, interval: int = 5, pull: float = 0.5) -> None:
        if not 0 < pull <= 1:
            raise InvalidInputError(f"Lookahead needs 0 < pull <= 1, got {pull=!r}.")
        super().__init__(optimizer, interval=interval, lr=pull, momentum=0.0)
