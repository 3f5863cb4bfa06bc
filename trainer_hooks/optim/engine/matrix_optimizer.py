"""Base of optimizers of whole matrices: one step for one process, DDP, FSDP2 and HSDP.

State of the parameter's own shape lies beside the parameter, in its layout, on every rank that holds a block. State of
matrices (factors, bases) lies on the one rank that computes the update, the matrix's owner.

M = rows, N = columns, B = matrices of one shape.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gns_controller.core.errors import GeometryError, InvalidInputError
from trainer_hooks.optim.engine.exchange import Exchange, layout_key
from trainer_hooks.optim.engine.matrices import CUTS, OWNED, MatrixState, is_of_owner, lacks_matrices, matrices_of
from trainer_hooks.optim.engine.optimizer import BaseOptimizer
from trainer_hooks.optim.engine.options import DecayOptions, MatrixOptions, settings_of
from trainer_hooks.optim.engine.update import blocks_of, descend, gradient_of, refuse_sharded
from trainer_hooks.optim.engine.update_scale import normalized_updates

_MAX_BATCH_NUMEL = 2**25
"""Entries of one batch of matrices: bounds the memory that an update takes besides the state."""


class _Member(NamedTuple):
    """One parameter of an exchange."""

    parameter: Tensor
    group: int
    """Number of its group, not the group itself: load_state_dict makes new ones."""


class _Item(NamedTuple):
    """One matrix of one parameter, on its owner."""

    matrix: Tensor
    state: MatrixState
    update: Tensor
    """View of the parameter's update that the matrix's own goes into."""


class MatrixOptimizer(BaseOptimizer):
    """Base of optimizers whose update of a matrix needs the whole matrix. One without entries gets no update.

    Args:
        params: parameters or groups. A group may set split_sizes, num_heads and batched (see matrices_of), and where
            owners keep state spectral_normalization: updates then have spectral norm (M / N)^(1/2), whatever the width.
        defaults: lr, weight_decay and the optimizer's own settings.
        options: see MatrixOptions. Without process_group every rank does all of the work; DTensors (FSDP2, HSDP) need
            none, because their mesh has the ranks that hold blocks.

    Raises:
        GeometryError: a parameter is not a matrix.
        InvalidInputError: a setting out of range.
        TypeError: an option that does not exist.
    """

    _allowed_options: ClassVar[type[MatrixOptions]] = DecayOptions
    _not_copied: ClassVar[tuple[str, ...]] = ("_exchanges", "_process_group")
    owns_state: ClassVar[bool] = False
    """True if owners keep state of matrices. Checkpoints then need every rank: see consolidated_state_dict."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], options: MatrixOptions) -> None:
        settings = settings_of(type(self), options, allowed=self._allowed_options)
        self._process_group = options.get("process_group")
        self._exchanges: list[tuple[Exchange, list[_Member]]] = []
        self._unchecked = False
        defaults = {"split_sizes": None, "num_heads": None, "batched": False, **settings, **defaults}
        super().__init__(params, defaults)

    @property
    def divides_work(self) -> bool:
        """True if a process group was given, to share the work on plain parameters. DTensors bring their own."""
        return self._process_group is not None

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for parameter in group["params"]:
            self._check_parameter(parameter, group)
        if group.get("spectral_normalization"):
            self._check_normalizable(group)

    def _check_parameter(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Refuse a parameter that this optimizer does not take."""
        try:
            matrices_of(torch.empty(parameter.shape, device="meta"), group)
        except GeometryError as error:
            raise GeometryError(f"{type(self).__name__}: {error}") from None

    def _check_normalizable(self, group: dict[str, Any]) -> None:
        """Refuse spectral_normalization where no state is kept, or where matrices are cut into blocks."""
        if not self.owns_state:
            raise InvalidInputError(f"{type(self).__name__} has no spectral_normalization; leave it out of the group.")
        for parameter in group["params"]:
            whole = torch.empty(parameter.shape, device="meta")
            if len(self._pieces(whole, group)) != len(matrices_of(whole, group)):
                raise InvalidInputError(
                    f"{type(self).__name__} cuts a parameter of shape {tuple(parameter.shape)} into blocks, and "
                    "spectral_normalization is of whole matrices: raise max_preconditioner_dim, or leave it out."
                )

    def _step(self) -> None:
        """Step every matrix on its owner.

        Every rank reaches every exchange: which there are follows from the parameters alone, a failure before one sends
        zeros in place of directions, and the first failure is raised after the last exchange.
        """
        failure: Exception | None = None
        for exchange, members in self._divided():
            self._count_step(exchange, members)
            try:
                outgoing = self._outgoing(members)
            except Exception as error:
                failure = failure or error
                outgoing = [torch.zeros_like(block) for block in blocks_of([member.parameter for member in members])]
            # To the owners, which compute whole updates, and back as blocks, along which every rank moves.
            try:
                self._move(members, exchange.run(outgoing, partial(self._owned_updates, members)))
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _move(self, members: Sequence[_Member], updates: Sequence[Tensor]) -> None:
        """Move this rank's blocks of parameters that have a gradient, group by group."""
        for number, group in enumerate(self.param_groups):
            moving = [
                (member.parameter, update)
                for member, update in zip(members, updates, strict=True)
                if member.group == number and member.parameter.grad is not None
            ]
            self._apply([parameter for parameter, _ in moving], [update for _, update in moving], group)

    @abstractmethod
    def _updates(self, matrices_BMN: Tensor, states: Sequence[MatrixState], group: dict[str, Any], step: int) -> Tensor:
        """Return updates of matrices of one shape, on their owner, before scale and learning rate: (B, M, N).

        Args:
            matrices_BMN: the result of _directions, whole; may be overwritten.
            states: of each matrix.
            group: the settings.
            step: of this parameter, from 1; only if owns_state.
        """

    def _directions(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Return what owners need of each parameter: this rank's blocks, in the parameters' layout. Not to be kept."""
        return [gradient_of(parameter, group) for parameter in parameters]

    def _cost(self, parameter: Tensor, group: dict[str, Any]) -> float:
        """Return the cost of one update, in products, by which the work is divided."""
        matrices = matrices_of(torch.empty(parameter.shape, device="meta"), group)
        return float(sum(matrix.numel() * min(matrix.shape) for matrix in matrices))

    def _scale(self, rows: int, columns: int, group: dict[str, Any]) -> float:
        """Return the factor on the update of a (rows, columns) matrix."""
        return 1.0

    def _block_size(self, group: dict[str, Any]) -> int | None:
        """Return the longest side of a piece that is preconditioned by itself; None: matrices are not cut."""
        return None

    def _pieces(self, whole: Tensor, group: dict[str, Any]) -> list[Tensor]:
        """Return views of a whole parameter, one per matrix that is updated by itself."""
        return matrices_of(whole, group, block_size=self._block_size(group))

    def _needs_whole(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Return whether an update needs the whole parameter; equal on every rank. The others are the subclass's."""
        return True

    def _apply(self, parameters: Sequence[Tensor], updates: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Decay and move this rank's blocks."""
        descend(blocks_of(parameters), updates, group)

    def _divided(self) -> list[tuple[Exchange, list[_Member]]]:
        """Return the exchanges and their members: a function of the parameters alone, made when a step first has them.

        Parameters of groups that were added later are divided by themselves, so that nothing changes its owner.
        """
        # Parameters without an exchange, by layout: one exchange takes one dtype, on one device or mesh.
        known = {id(member.parameter) for _, members in self._exchanges for member in members}
        fresh: dict[Any, list[_Member]] = {}
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if id(parameter) not in known and self._needs_whole(parameter, group):
                    fresh.setdefault(layout_key(parameter), []).append(_Member(parameter, number))
        # Each rank makes the same exchanges in the same order, because making one communicates.
        for members in fresh.values():
            for portion in self._portions(members):
                costs = [self._cost(member.parameter, self.param_groups[member.group]) for member in portion]
                exchange = Exchange([member.parameter for member in portion], costs, self._process_group)
                self._exchanges.append((exchange, portion))
        # Loaded state is checked once. Members are new on every rank alike, whether it has loaded a checkpoint or not.
        self._unchecked |= bool(fresh)
        if self._unchecked and self.owns_state:
            self._check_owned()
            self._forget_what_others_own()
        self._unchecked = False
        return self._exchanges

    def _portions(self, members: list[_Member]) -> list[list[_Member]]:
        """Cut members into portions whose temporaries are bounded, equal shapes together."""
        # Ranks that exchange bound them by buckets.
        if self._process_group is not None or isinstance(members[0].parameter, DTensor):
            return [members]
        portions: list[list[_Member]] = []
        room = 0
        for member in sorted(members, key=lambda member: tuple(member.parameter.shape)):
            if not portions or member.parameter.numel() > room:
                portions.append([])
                room = max(_MAX_BATCH_NUMEL, member.parameter.numel())
            portions[-1].append(member)
            room -= member.parameter.numel()
        return portions

    def _outgoing(self, members: Sequence[_Member]) -> list[Tensor]:
        """Return this rank's blocks of what owners need, zeros for parameters without a gradient."""
        directions: dict[int, Tensor] = {}
        for number, group in enumerate(self.param_groups):
            ready = [m.parameter for m in members if m.group == number and m.parameter.grad is not None]
            directions.update(zip(map(id, ready), self._directions(ready, group) if ready else [], strict=True))
        blocks = blocks_of([member.parameter for member in members])
        pairs = [(directions.get(id(m.parameter)), block) for m, block in zip(members, blocks, strict=True)]
        return [torch.zeros_like(block) if d is None else d.to(block.dtype) for d, block in pairs]

    def _owned_updates(
        self, members: Sequence[_Member], indexes: Sequence[int], whole: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return whole updates of parameters that this rank owns, computed in batches of one shape."""
        results = [torch.zeros_like(matrix, memory_format=torch.contiguous_format) for matrix in whole]
        # Cut parameters into matrices, and gather those of one group, step and shape.
        batches: dict[Any, list[_Item]] = {}
        for index, matrix, result in zip(indexes, whole, results, strict=True):
            parameter, number = members[index]
            if parameter.grad is None:
                continue
            group = self.param_groups[number]
            state, step = self.state[parameter], 0
            if self.owns_state:
                step = int(state["step"])
            pieces = self._pieces(matrix.contiguous(), group)
            targets = self._pieces(result, group)
            for position, (piece, target) in enumerate(zip(pieces, targets, strict=True)):
                if piece.numel():
                    key = (number, step, tuple(piece.shape))
                    batches.setdefault(key, []).append(_Item(piece, MatrixState(state, position), target))
        # Update as many at once as bounds temporaries. Results are written through views into the whole updates.
        for (number, step, shape), items in batches.items():
            at_once = max(_MAX_BATCH_NUMEL // math.prod(shape), 1)
            for start in range(0, len(items), at_once):
                self._update_batch(items[start : start + at_once], self.param_groups[number], step)
        return results

    def _update_batch(self, items: Sequence[_Item], group: dict[str, Any], step: int) -> None:
        """Update matrices of one shape: the optimizer's own rule, then the size of the update."""
        matrices_BMN = torch.stack([item.matrix for item in items])
        updates_BMN = self._updates(matrices_BMN, [item.state for item in items], group, step)
        rows, columns = updates_BMN.shape[1:]
        if group.get("spectral_normalization"):
            updates_BMN = normalized_updates(updates_BMN, [item.state for item in items], step)
        scale = self._scale(rows, columns, group)
        if scale != 1:
            updates_BMN = updates_BMN * scale
        torch._foreach_copy_([item.update for item in items], list(updates_BMN.unbind()))

    def _count_step(self, exchange: Exchange, members: Sequence[_Member]) -> None:
        """Count the step of every parameter on every rank, so that every rank's checkpoint has every parameter.

        Owners mark theirs with it, at every step: the step itself may fail, and the run go on.
        """
        for index, member in enumerate(members):
            if member.parameter.grad is not None:
                state = self.state[member.parameter]
                if self.owns_state:
                    state.setdefault("step", torch.tensor(0.0))
                    state["step"] += 1
                    if exchange.is_mine(index):
                        if OWNED not in state:
                            state[OWNED] = torch.tensor(0.0)
                        state[OWNED].fill_(float(state["step"] > 1))

    def _check_owned(self) -> None:
        """Check that loaded state has the matrices that each rank owns.

        Every rank reaches the gathering, and all raise if any of them lacks some.

        Raises:
            InvalidInputError: names the shape of a parameter whose matrices are missing.
        """
        owned = [
            member.parameter
            for exchange, members in self._exchanges
            for index, member in enumerate(members)
            if exchange.is_mine(index)
        ]
        lacking = next((tuple(p.shape) for p in owned if lacks_matrices(self.state.get(p, {}))), None)
        shapes = [shape for exchange, _ in self._exchanges for shape in exchange.gather_objects(lacking) if shape]
        if shapes:
            raise InvalidInputError(
                f"the checkpoint has no {type(self).__name__} state for a parameter of shape {shapes[0]}: each rank "
                "holds only the matrices it owns, and full_state_dict=True or torch.save keep those of one rank. Save "
                "with torch.distributed.checkpoint on every rank, without full_state_dict, or save "
                "consolidated_state_dict()."
            )

    def _forget_what_others_own(self) -> None:
        """Drop matrices of other ranks, which a consolidated checkpoint brings along."""
        for exchange, members in self._exchanges:
            for index, member in enumerate(members):
                state = self.state.get(member.parameter, {})
                if not exchange.is_mine(index) and "step" in state:
                    self.state[member.parameter] = {"step": state["step"]}

    def consolidated_state_dict(self) -> dict[str, Any]:
        """Return state_dict with the matrices of every rank, on the CPU. Every rank calls it and gets all.

        For torch.save from one rank of DDP. torch.distributed.checkpoint saves each rank's own share and needs no such.

        Raises:
            InvalidInputError: parameters are sharded, so that one file cannot hold their blocks. On every rank.
        """
        refuse_sharded([parameter for group in self.param_groups for parameter in group["params"]])
        consolidated = self.state_dict()
        if not self.owns_state:
            return consolidated
        # Copies of the parameters' entries, and the number of each parameter in the checkpoint.
        consolidated["state"] = {number: dict(state) for number, state in consolidated["state"].items()}
        numbers: dict[int, int] = {}
        for group, packed in zip(self.param_groups, consolidated["param_groups"], strict=True):
            numbers.update(zip(map(id, group["params"]), packed["params"], strict=True))
        # Every rank reaches every gathering: the exchanges are the same on all of them.
        for exchange, members in self._divided():
            owned = {
                numbers[id(member.parameter)]: {
                    name: value.cpu() if isinstance(value, Tensor) else value
                    for name, value in self.state[member.parameter].items()
                }
                for index, member in enumerate(members)
                if exchange.is_mine(index) and member.parameter in self.state
            }
            for share in exchange.gather_objects(owned):
                assert isinstance(share, dict)
                for number, state in share.items():
                    consolidated["state"].setdefault(number, {}).update(state)
        return consolidated

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, on every rank: what lies beside parameters in their dtype, owners' matrices in float32 or better.

        Parameters stay cut as they were built: where no state is of matrices, the checkpoint may have another cut.

        Raises:
            InvalidInputError: the checkpoint is another optimizer's, or its state is of other matrices. If it lacks
                what a rank owns, the next step raises, on every rank.
        """
        # torch loads settings and what lies beside parameters; the cut stays as it was built.
        cuts = [{name: group[name] for name in CUTS} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, cut in zip(self.param_groups, cuts, strict=True):
            group.update(cut)
        # torch cast the owners' matrices to the parameters' dtype: load them again, in float32 or better.
        for group, packed in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, number in zip(group["params"], packed["params"], strict=True):
                for name, saved in state_dict["state"].get(number, {}).items():
                    if is_of_owner(name) and isinstance(saved, Tensor):
                        wide = torch.promote_types(parameter.dtype, torch.float32)
                        dtype = wide if saved.is_floating_point() else saved.dtype
                        device = torch.device("cpu") if name == OWNED else parameter.device
                        self.state[parameter][name] = saved.detach().to(device, dtype, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a copy's or a checkpoint's. A copy has no process group, and lacks what other ranks own."""
        super().__setstate__(state)
        vars(self).setdefault("_exchanges", [])
        vars(self).setdefault("_process_group", None)
        self._unchecked = True

    def _check_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Refuse also parameters that were cut into other matrices, if the checkpoint's state is of those."""
        super()._check_checkpoint(state_dict)
        if not self.owns_state:
            return
        for number, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            for name in CUTS:
                cuts = (settings.get(name) for settings in (group, saved))
                # Sizes as a list, as checkpoints may bring them back.
                here, there = (list(cut) if isinstance(cut, Sequence) else cut for cut in cuts)
                if name in saved and here != there:
                    raise InvalidInputError(
                        f"group {number} was built with {name}={here!r}, and the checkpoint has {name}={there!r}; "
                        "build the groups as they were when it was saved."
                    )
