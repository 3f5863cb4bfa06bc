"""One rank: measure through the hooks, then compute every micro-batch gradient again without them.

Rank 0 prints one JSON line per case: the hooks' readings, and the eager reference on the gathered gradients.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gns_controller.core.contract import Span
from gns_controller.core.policies import HoldPolicyConfig
from trainer_hooks import AdaptiveBatch
from trainer_hooks.estimators import rank_variance, split
from trainer_hooks.optim import Muon, Signum

WIDTH, VOCABULARY = 12, 20


class Model(nn.Module):
    """Tall, wide and square matrices, a bias, and on request a tied head and a branch that some steps do not use."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)
        self.tall = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.branch = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.use_branch = True

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.tall(torch.tanh(self.wide(x)))
        if self.use_branch:
            x = x + self.branch(x)
        return self.head(x)


class Dataset:
    def __init__(self) -> None:
        self.tokens = torch.randint(0, VOCABULARY, (512, 6), generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index]


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def optimizers_for(model: nn.Module, name: str) -> list[torch.optim.Optimizer]:
    if name == "sgd":
        return [torch.optim.SGD(model.parameters(), lr=0.05)]
    if name == "signum":
        return [Signum(model.parameters(), lr=1e-3)]
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and n.split(".")[0] in ("wide", "tall", "branch")]
    others = [p for p in model.parameters() if all(p is not h for h in hidden)]
    return [Muon(hidden, lr=0.02), torch.optim.AdamW(others, lr=1e-3)]


def run_case(name: str, case: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Model(tied=case.get("tied", False)).to(getattr(torch, case.get("dtype", "float32")))
    model.use_branch = not case.get("unused", False)
    world_size = dist.get_world_size()
    wrapped: nn.Module = model
    if world_size > 1:
        wrapped = DistributedDataParallel(model, find_unused_parameters=case.get("unused", False))
    forward = torch.compile(wrapped) if case.get("compile") else wrapped
    session = AdaptiveBatch.attach(
        wrapped,
        optimizers_for(model, case["optimizer"]),
        run=name,
        global_batch_size=case["batch"],
        micro_batch_size=case["micro"],
        budget_samples=4 * case["batch"],
        policy=HoldPolicyConfig(),
        measurement_interval=Span(steps=2),
        estimators=["split", "rank_variance"],
        min_sample_groups=case.get("min_groups", 2),
        max_grad_norm=0.1,
    )
    for step in session.steps(Dataset(), seed=3):
        grads, sizes = [], []
        for tokens in step:
            copy = Model(tied=case.get("tied", False)).to(getattr(torch, case.get("dtype", "float32")))
            copy.load_state_dict(model.state_dict())
            copy.use_branch = model.use_branch
            if session.is_measured:
                loss_of(copy, tokens).backward()
                by_name = {n: p.grad for n, p in copy.named_parameters()}
                grads.append(by_name)
                sizes.append(len(tokens))
            step.backward(loss_of(forward, tokens))
        measured = session.is_measured
        step.apply()
        if measured:
            compare(name, session, model, grads, sizes)


def compare(name: str, session: AdaptiveBatch, model: nn.Module, grads: list[Any], sizes: list[int]) -> None:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (grads, sizes))
    if dist.get_rank() != 0:
        return
    names = {id(p): n for n, p in model.named_parameters()}
    for group in session.groups:
        wanted = [names[id(parameter)] for parameter in group.parameters]
        halves: dict[int, tuple[list[Any], list[int]]] = {0: ([], []), 1: ([], [])}
        for rank, (rank_grads, rank_sizes) in enumerate(gathered):
            for index, (by_name, size) in enumerate(zip(rank_grads, rank_sizes, strict=True)):
                half_grads, half_sizes = halves[(rank + index) % 2]
                half_grads.append([None if by_name[n] is None else by_name[n].double() for n in wanted])
                half_sizes.append(size)
        (groups_a, sizes_a), (groups_b, sizes_b) = halves[0], halves[1]
        published = rank_variance([*groups_a, *groups_b], [*sizes_a, *sizes_b], geometry=group.geometry)
        ours = split(groups_a, groups_b, sizes_a, sizes_b, geometry=group.geometry)
        for reading in session.last_readings:
            if reading.group != group.name:
                continue
            reference = published if reading.estimator == "rank_variance" else ours
            line = {
                "case": name,
                "step": session.optimizer_step,
                "group": group.name,
                "geometry": group.geometry,
                "estimator": reading.estimator,
                "num_groups": reading.num_groups,
                "tensors": len(group.parameters),
                "measured": [reading.noise, reading.signal, reading.progress or 0.0, reading.noise_sq],
                "reference": [
                    float(reference.noise),
                    float(reference.signal),
                    float(reference.progress) if reference.progress is not None else 0.0,
                    float(reference.noise_sq),
                ],
            }
            print("CASE " + json.dumps(line), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases = json.loads(os.environ["CASES"])
    for name, case in cases.items():
        run_case(name, case)
        dist.barrier()
    dist.destroy_process_group()


main()
