"""Which rank computes what, and how the blocks of a sharded matrix reach the rank that takes its norm."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gns_controller.core.contract import Geometry
from trainer_hooks.distributed.layout import Layout
from trainer_hooks.distributed.sharding import Piece, balanced, piece_of


class Owners:
    """A fixed division of the norms over ranks. Make it on every rank, at attach: where parameters are sharded it
    collects everybody's blocks once.

    Matrices of spectral groups have one owner rank each, balanced by numel * shorter side. Entries of other groups are
    summed where they lie; of several identical copies one counts.
    """

    def __init__(self, parameters: Sequence[Tensor], geometries: Sequence[Geometry], layout: Layout) -> None:
        ranks = layout.ranks
        self.rank, self.size = ranks.rank, ranks.size
        self._ranks = ranks
        mine = [piece_of(parameter, rank=ranks.rank) for parameter in parameters]
        self.sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
        if self.sharded:
            self._pieces: list[list[Piece]] = ranks.gather_objects(mine)
        else:
            self._pieces = [[piece._replace(copy=(rank, 0)) for piece in mine] for rank in range(ranks.size)]
        self.spectral = [index for index, geometry in enumerate(geometries) if geometry == "spectral"]
        costs = [float(parameters[i].numel()) * min(parameters[i].shape) for i in self.spectral]
        self.owner_of = dict(zip(self.spectral, balanced(costs, size=ranks.size), strict=True))
        entrywise = [index for index in range(len(parameters)) if index not in self.owner_of]
        copies_of = {i: sorted({pieces[i].copy for pieces in self._pieces}) for i in entrywise}
        self._counts_here: set[int] = set()
        for num_copies in {len(copies) for copies in copies_of.values()}:
            alike = [index for index in entrywise if len(copies_of[index]) == num_copies]
            chosen = balanced([float(parameters[i].numel()) for i in alike], size=num_copies)
            self._counts_here |= {
                i for i, number in zip(alike, chosen, strict=True) if copies_of[i][number] == mine[i].copy
            }
        self._shapes = [tuple(parameter.shape) for parameter in parameters]

    @property
    def owned(self) -> list[int]:
        """Matrices whose norms this rank takes."""
        return [index for index in self.spectral if self.owner_of[index] == self.rank]

    def counts_here(self, index: int) -> bool:
        """Whether this rank's block of an entrywise parameter is the one that counts."""
        return index in self._counts_here

    def gather(self, quantities: Sequence[Sequence[Tensor]]) -> dict[int, list[Tensor]]:
        """Whole matrices of every quantity, on their owners: {index: [(M, N) per quantity]}.

        Args:
            quantities: lists over parameters of this rank's blocks, one dtype. Every rank passes as many.

        One all-to-all where parameters are sharded; nothing is sent elsewhere, because every rank has them whole.
        """
        if not self.sharded:
            return {index: [blocks[index] for blocks in quantities] for index in self.owned}
        outgoing, send_sizes = [], []
        for destination in range(self.size):
            blocks = [
                quantity[index].reshape(-1)
                for index in self._sent_by(self.rank, destination)
                for quantity in quantities
            ]
            outgoing += blocks
            send_sizes.append(sum(block.numel() for block in blocks))
        receive_sizes = [
            len(quantities) * sum(prod(self._pieces[source][i].shape) for i in self._sent_by(source, self.rank))
            for source in range(self.size)
        ]
        flat = torch.cat(outgoing) if outgoing else quantities[0][0].new_empty(0)
        incoming = self._ranks.exchange(flat, send_sizes=send_sizes, receive_sizes=receive_sizes)
        whole = {index: [incoming.new_zeros(self._shapes[index]) for _ in quantities] for index in self.owned}
        position = 0
        for source in range(self.size):
            for index in self._sent_by(source, self.rank):
                piece = self._pieces[source][index]
                (row, column), (num_rows, num_columns) = piece.offset, piece.shape
                for matrix in whole[index]:
                    block = incoming[position : position + prod(piece.shape)].view(piece.shape)
                    matrix[row : row + num_rows, column : column + num_columns] = block
                    position += block.numel()
        return whole

    def _sent_by(self, source: int, destination: int) -> list[int]:
        """Matrices of which `source` sends its block to `destination`: those it owns, from the copy it is part of."""
        return [
            index
            for index in self.spectral
            if self.owner_of[index] == destination
            and self._pieces[source][index].copy == self._pieces[destination][index].copy
        ]
