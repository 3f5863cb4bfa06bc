"""One rank: measure through the session, then compute every micro-batch gradient again without it.

Rank 0 prints one JSON line per reading: what the ranks measured, and the eager reference on the gathered full
gradients of a copy of the model that knows nothing of ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gns_controller.core.contract import GroupReading, Span
from gns_controller.core.policies import (
    AnyPolicyConfig,
    HoldPolicyConfig,
    InnerProductTestPolicyConfig,
    NormTestPolicyConfig,
)
from tests.torchrun import end_rank
from trainer_hooks import AdaptiveBatch, MeasurementOptions
from trainer_hooks.estimators import (
    choose_patterns,
    inner_product_variance,
    progress_curve,
    rank_variance,
    split_over_patterns,
)
from trainer_hooks.optim import Muon, Signum

WIDTH, VOCABULARY = 12, 21


class Model(nn.Module):
    """Tall, wide and square matrices, a bias, a scalar gate that most ranks hold no part of, and on request: a tied
    head, a branch that no step uses, an expert that only some ranks' tokens reach, recomputed activations."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self.case = case
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)
        self.tall = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.branch = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 1, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if case.get("tied"):
            self.head.weight = self.embed.weight

    def block(self, x: Tensor) -> Tensor:
        return x + self.tall(torch.tanh(self.wide(x)))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = checkpoint(self.block, x, use_reentrant=False) if self.case.get("checkpoint") else self.block(x)
        reached = not self.case.get("expert") or int(tokens[0, 0]) % 2 == 0
        if reached and not self.case.get("unused"):
            x = x + self.branch(x)
        return self.head(x * torch.sigmoid(self.gate(x)))


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


def wrapped(model: Model, case: dict[str, Any]) -> nn.Module:
    size = dist.get_world_size()
    layout = case.get("layout", "ddp")
    if layout == "ddp":
        if size == 1:
            return model
        return DistributedDataParallel(model, find_unused_parameters=bool(case.get("unused") or case.get("expert")))
    options: dict[str, Any] = {"reshard_after_forward": case.get("reshard", True)}
    if case.get("mixed"):
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if layout == "fsdp2":
        mesh = init_device_mesh("cpu", (size,))
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    elif layout == "tp-alone":
        mesh = init_device_mesh("cpu", (size,))
        return parallelize_module(model, mesh, {"wide": ColwiseParallel(), "tall": RowwiseParallel()})
    else:
        both = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
        plan = {"wide": ColwiseParallel(), "tall": RowwiseParallel()}
        parallelize_module(model, both["tensor"], plan)
        mesh = both["data"]
    for module in (model.wide, model.tall):
        fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def optimizers_for(model: nn.Module, case: dict[str, Any]) -> tuple[list[torch.optim.Optimizer], dict[str, Any]]:
    name = case["optimizer"]
    if name == "sgd":
        return [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)], {}
    if name == "signum":
        return [Signum(model.parameters(), lr=1e-3)], {}
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and n.split(".")[-2] in ("wide", "tall", "branch")]
    others = [p for p in model.parameters() if all(p is not h for h in hidden)]
    if name == "muon":
        return [Muon(hidden, lr=0.02), torch.optim.AdamW(others, lr=1e-3)], {}
    # A stand-in for a sharded spectral optimizer: what is measured does not depend on the step that is taken.
    return [torch.optim.SGD(hidden, lr=0.02, momentum=0.9), torch.optim.AdamW(others, lr=1e-3)], {"SGD": "spectral"}


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def policy_of(case: dict[str, Any]) -> AnyPolicyConfig:
    """None of them changes the batch."""
    never = Span(samples=10**9)
    if case.get("policy") == "inner_product_test":
        return InnerProductTestPolicyConfig(warmup=never)
    if case.get("policy") == "norm_test":
        return NormTestPolicyConfig(warmup=never)
    return HoldPolicyConfig(estimator=case["estimators"][0], direction=case.get("directions", ["gradient"])[0])


def run_case(name: str, case: dict[str, Any]) -> None:
    torch.manual_seed(0)
    dtype = getattr(torch, case.get("dtype", "float32"))
    model = Model(case).to(dtype)
    if case.get("frozen"):
        model.gate.requires_grad_(False)
    trained = wrapped(model, case)
    forward = torch.compile(trained) if case.get("compile") else trained
    optimizers, geometries = optimizers_for(model, case)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if case.get("scaler") else None
    session = AdaptiveBatch.attach(
        trained,
        optimizers,
        run=name,
        global_batch_size=case["batch"],
        micro_batch_size=case["micro"],
        budget_samples=case.get("steps", 4) * case["batch"],
        policy=policy_of(case),
        measurement=MeasurementOptions(
            interval=Span(steps=2),
            estimators=case["estimators"],
            directions=case.get("directions", ["gradient"]),
            num_sign_patterns=case.get("patterns"),
            spectral_norms=case.get("norms", "exact"),
            progress_curve=case.get("curve", False),
            geometries=geometries,
            min_sample_groups=case.get("min_groups", 2),
        ),
        max_grad_norm=0.1,
        grad_scaler=scaler,
    )
    reference_dtype = torch.bfloat16 if case.get("mixed") else dtype
    for step in session.steps(Dataset(), seed=3):
        grads, sizes = [], []
        weights = {n: full(p.detach()).to(reference_dtype) for n, p in model.named_parameters()}
        momenta = momenta_of(model, optimizers)
        for tokens in step:
            if session.is_measured:
                copy = Model({**case, "checkpoint": False}).to(reference_dtype)
                copy.load_state_dict(weights, strict=not case.get("tied"))
                loss_of(copy, tokens).backward()
                grads.append({n: p.grad for n, p in copy.named_parameters()})
                sizes.append(len(tokens))
            step.backward(loss_of(forward, tokens))
        measured = session.is_measured
        step.apply()
        if measured:
            compare(name, case, session, model, grads, sizes, momenta)


def momenta_of(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    names = {id(p): n for n, p in model.named_parameters()}
    found = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key in ("momentum", "momentum_buffer", "exp_avg"):
                if key in state and state[key] is not None:
                    found[names[id(parameter)]] = full(state[key]).double().clone()
    return found


def compare(
    name: str,
    case: dict[str, Any],
    session: AdaptiveBatch,
    model: nn.Module,
    grads: list[Any],
    sizes: list[int],
    momenta: dict[str, Tensor],
) -> None:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (session.data_parallel.rank, grads, sizes))
    if dist.get_rank() != 0:
        return
    by_rank = {rank: (rank_grads, rank_sizes) for rank, rank_grads, rank_sizes in gathered}
    names = {id(p): n for n, p in model.named_parameters()}
    in_time_only = case.get("layout", "ddp") != "ddp"
    num_micro_batches = len(sizes)
    num_chunks = min(1 << case.get("patterns", 1).bit_length(), 1 << (num_micro_batches.bit_length() - 1))
    patterns = ()
    if "split" in case["estimators"]:
        patterns = choose_patterns(
            case.get("patterns", 1),
            num_ranks=len(by_rank),
            num_micro_batches=num_chunks,
            over_ranks=not in_time_only,
        )
    for group in session.groups:
        wanted = [names[id(parameter)] for parameter in group.parameters]
        all_grads, all_sizes, cells = [], [], []
        for rank, (rank_grads, rank_sizes) in sorted(by_rank.items()):
            for index, (by_name, size) in enumerate(zip(rank_grads, rank_sizes, strict=True)):
                all_grads.append([None if by_name[n] is None else by_name[n].double() for n in wanted])
                all_sizes.append(size)
                cells.append((rank, index * num_chunks // num_micro_batches))
        signs = [[p.sign(rank=rank, micro_batch=chunk) for rank, chunk in cells] for p in patterns]
        for reading in session.last_readings:
            if reading.group not in (group.name, f"{group.name}, euclidean"):
                continue
            line = {
                "case": name,
                "step": session.optimizer_step,
                "group": reading.group,
                "geometry": reading.geometry,
                "estimator": reading.estimator,
                "direction": reading.direction,
                "num_groups": reading.num_groups,
                "patterns": reading.num_sign_patterns,
                "measured": values_of(reading),
                "reference": reference(reading, all_grads, all_sizes, signs, wanted, momenta, case),
            }
            if reading.progress_curve:
                order = sorted(range(len(cells)), key=lambda k: [row[k] for row in signs])
                curve = progress_curve(
                    [all_grads[k] for k in order], [all_sizes[k] for k in order], geometry=reading.geometry
                )
                smallest = reading.progress_curve[0]
                line["measured"].append(smallest.progress)
                line["reference"].append(float(next(p for n, p in curve if n == smallest.samples)))
            print("CASE " + json.dumps(line), flush=True)


def values_of(reading: GroupReading) -> list[float]:
    errors = (reading.noise_standard_error, reading.progress_standard_error)
    fields = (reading.noise, reading.signal, reading.inner_product_variance, reading.progress, *errors)
    return [value for value in fields if value is not None]


def reference(
    reading: GroupReading,
    grads: list[Any],
    sizes: list[int],
    signs: list[list[int]],
    names: list[str],
    momenta: dict[str, Tensor],
    case: dict[str, Any],
) -> list[float]:
    geometry = reading.geometry
    if reading.estimator == "rank_variance":
        found = rank_variance(grads, sizes, geometry=geometry)
        asked = case.get("policy") == "inner_product_test" and geometry == "euclidean"
        inner = [float(inner_product_variance(grads, sizes))] if asked else []
        return [float(found.noise), float(found.signal), *inner]
    if reading.direction == "update":
        return update_reference(geometry, grads, sizes, signs[0], names, momenta, case)
    found = split_over_patterns(grads, sizes, signs, geometry=geometry)
    fields = (found.noise, found.signal, found.progress, found.noise_standard_error, found.progress_standard_error)
    return [float(value) for value in fields if value is not None]


def update_reference(
    geometry: str,
    grads: list[Any],
    sizes: list[int],
    signs: list[int],
    names: list[str],
    momenta: dict[str, Tensor],
    case: dict[str, Any],
) -> list[float]:
    """Written out: u = past m + fresh g of each half, judged by the other half's gradient."""
    is_adamw = case["optimizer"] != "sgd" and case["optimizer"] != "signum" and geometry == "sign"
    past, fresh = {
        "sgd": (0.9, 1.0),
        "stand-in": (0.9, 1.0),
        "signum": (0.9, 0.1),
        "muon": (0.95**2, 1 - 0.95**2),
    }[case["optimizer"]]
    if is_adamw:
        past, fresh = 0.9, 0.1
    n_a = sum(n for n, s in zip(sizes, signs, strict=True) if s > 0)
    n_b = sum(sizes) - n_a

    def mean(half: int, total: int) -> list[Tensor]:
        chosen = [(g, n) for g, n, s in zip(grads, sizes, signs, strict=True) if s == half]
        return [sum(n / total * g[t] for g, n in chosen) for t in range(len(names))]

    g_a, g_b = mean(1, n_a), mean(-1, n_b)
    zeros = torch.zeros(())
    u_a = [past * momenta.get(n, zeros) + fresh * g for n, g in zip(names, g_a, strict=True)]
    u_b = [past * momenta.get(n, zeros) + fresh * g for n, g in zip(names, g_b, strict=True)]

    def norm(tensors: list[Tensor]) -> float:
        if geometry == "euclidean":
            return float(sum(t.square().sum() for t in tensors).sqrt())
        if geometry == "sign":
            return float(sum(t.abs().sum() for t in tensors))
        return float(sum(torch.linalg.svdvals(t).sum() for t in tensors))

    def progress(direction: list[Tensor], target: list[Tensor]) -> float:
        if geometry == "euclidean":
            return float(sum((d * t).sum() for d, t in zip(direction, target, strict=True))) / norm(direction)
        if geometry == "sign":
            return float(sum((d.sign() * t).sum() for d, t in zip(direction, target, strict=True)))
        total = 0.0
        for d, t in zip(direction, target, strict=True):
            left, _, right = torch.linalg.svd(d, full_matrices=False)
            total += float(((left @ right) * t).sum())
        return total

    noise = norm([a - b for a, b in zip(u_a, u_b, strict=True)]) / (1 / n_a + 1 / n_b) ** 0.5
    return [noise, 0.5 * (norm(u_a) + norm(u_b)), 0.5 * (progress(u_a, g_b) + progress(u_b, g_a))]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases = json.loads(os.environ["CASES"])
    for name, case in cases.items():
        run_case(name, case)
        dist.barrier()
    end_rank()


main()
