"""Test problems whose noise and signal are known without any estimator, for tests and benchmarks.

Truth is written in NumPy, from closed forms, or simulated as it is defined; nothing here imports an estimator.

    signal          ||grad L||_*
    textbook noise  l1: sum_i sigma_i    S1: tr C^(1/2), C on the shorter side    l2: sqrt(tr C)
    step noise      sqrt(B) E||gbar - grad L||_*, by which a step of B samples really errs; l2: sqrt(tr C)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gns_controller.core.contract import Geometry

GEOMETRIES: tuple[Geometry, ...] = ("euclidean", "sign", "spectral")
Array = NDArray[np.float64]


class Problem(Protocol):
    """Per-sample gradients of a known distribution."""

    gradient: list[Tensor]
    """grad L, (M, N) float64 tensors."""

    def groups(self, num_readings: int, num_groups: int, size: int) -> list[Tensor]:
        """Mean gradients of fresh groups of `size` samples: (num_readings, num_groups, M, N) float64 per tensor."""
        ...

    def standard_deviations(self) -> list[Array]:
        """Of each entry of one sample's gradient."""
        ...

    def covariances(self) -> list[Array]:
        """Of one sample's gradient, on the shorter side of each matrix."""
        ...


class GaussianNoise:
    """grad L plus independent normal noise of one standard deviation per sample."""

    def __init__(self, gradient: Tensor, *, scale: float = 1.0, seed: int = 0) -> None:
        self.gradient = [gradient.double()]
        self.scale = scale
        self.generator = torch.Generator().manual_seed(seed)

    def groups(self, num_readings: int, num_groups: int, size: int) -> list[Tensor]:
        (mean,) = self.gradient
        dims = (num_readings, num_groups, *mean.shape)
        noise = torch.randn(dims, generator=self.generator, dtype=torch.float64)
        return [mean + noise * (self.scale / math.sqrt(size))]

    def standard_deviations(self) -> list[Array]:
        return [np.full(self.gradient[0].shape, self.scale)]

    def covariances(self) -> list[Array]:
        short, long = sorted(self.gradient[0].shape)
        return [self.scale**2 * long * np.eye(short)]


class LinearRegression:
    """y = W* x + e, x ~ N(0, I_n), e ~ N(0, s^2 I_m), loss |Wx - y|^2 / 2, D = W - W*: everything is known.

    grad L = D;  Var(G_ij) = |D_i|^2 + s^2 + D_ij^2;  C_row = (n+1) D D^T + n s^2 I_m (m <= n).
    """

    def __init__(self, difference: Tensor, *, noise: float, seed: int = 0) -> None:
        assert difference.shape[0] <= difference.shape[1]
        self.gradient = [difference.double()]
        self.noise = noise
        self.generator = torch.Generator().manual_seed(seed)

    def groups(self, num_readings: int, num_groups: int, size: int) -> list[Tensor]:
        (D,) = self.gradient
        if size >= D.shape[1]:
            return [self._from_moments(num_readings, num_groups, size)]
        dims = (num_readings, num_groups, size)
        x = torch.randn(*dims, D.shape[1], generator=self.generator, dtype=torch.float64)
        e = torch.randn(*dims, D.shape[0], generator=self.generator, dtype=torch.float64)
        return [(x @ D.mT - self.noise * e).mT @ x / size]

    def _from_moments(self, num_readings: int, num_groups: int, size: int) -> Tensor:
        """The same distribution without the samples: x^T x = T T^T (Bartlett), e^T x = Z T^T, Z standard normal."""
        (D,) = self.gradient
        dims, (rows, columns) = (num_readings, num_groups), D.shape
        normal = torch.randn(*dims, columns + rows, columns, generator=self.generator, dtype=torch.float64)
        degrees = (size - torch.arange(columns, dtype=torch.float64)).expand(*dims, columns)
        chi = (2 * torch._standard_gamma(degrees / 2, generator=self.generator)).sqrt()
        T, Z = normal[..., :columns, :].tril(-1) + torch.diag_embed(chi), normal[..., columns:, :]
        return (D @ T - self.noise * Z) @ T.mT / size

    def standard_deviations(self) -> list[Array]:
        D = self.gradient[0].numpy()
        return [np.sqrt((D**2).sum(1, keepdims=True) + self.noise**2 + D**2)]

    def covariances(self) -> list[Array]:
        D = self.gradient[0].numpy()
        rows, columns = D.shape
        return [(columns + 1) * D @ D.T + columns * self.noise**2 * np.eye(rows)]


class Population:
    """A finite population of per-sample gradients, drawn from with replacement."""

    def __init__(self, samples: Sequence[Tensor], *, seed: int = 0) -> None:
        """`samples`: per tensor (num_samples, M, N)."""
        self.samples = [tensor.double() for tensor in samples]
        self.gradient = [tensor.mean(0) for tensor in self.samples]
        self.generator = torch.Generator().manual_seed(seed)

    def groups(self, num_readings: int, num_groups: int, size: int) -> list[Tensor]:
        count = len(self.samples[0])
        drawn = torch.randint(count, (num_readings * num_groups, size), generator=self.generator)
        shares = torch.zeros(len(drawn), count, dtype=torch.float64)
        shares.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / size, dtype=torch.float64))
        return [
            (shares @ tensor.flatten(1)).view(num_readings, num_groups, *tensor.shape[1:]) for tensor in self.samples
        ]

    def standard_deviations(self) -> list[Array]:
        return [tensor.numpy().std(axis=0) for tensor in self.samples]

    def covariances(self) -> list[Array]:
        found = []
        for tensor in self.samples:
            deviations = (tensor - tensor.mean(0)).numpy()
            if deviations.shape[1] > deviations.shape[2]:
                deviations = deviations.transpose(0, 2, 1)
            found.append(np.einsum("smn,skn->mk", deviations, deviations) / len(deviations))
        return found


def dual_norm(tensors: Sequence[Array], geometry: Geometry) -> float:
    """l2 over all tensors, l1, or the sum of singular values."""
    if geometry == "euclidean":
        return math.sqrt(sum(float((tensor**2).sum()) for tensor in tensors))
    if geometry == "sign":
        return sum(float(np.abs(tensor).sum()) for tensor in tensors)
    return sum(float(np.linalg.norm(tensor, "nuc")) for tensor in tensors)


def signal(problem: Problem, geometry: Geometry) -> float:
    return dual_norm([tensor.numpy() for tensor in problem.gradient], geometry)


def textbook_noise(problem: Problem, geometry: Geometry) -> float:
    """What `rank_variance` is meant to estimate."""
    if geometry == "spectral":
        roots = [np.sqrt(np.linalg.eigvalsh(covariance).clip(0)).sum() for covariance in problem.covariances()]
        return float(sum(roots))
    return dual_norm(problem.standard_deviations(), geometry)


def step_noise(problem: Problem, geometry: Geometry, *, batch: int, num_draws: int = 2000) -> float:
    """What `split` is meant to estimate: the mean over fresh batches; l2 in closed form, from its square."""
    if geometry == "euclidean":
        return textbook_noise(problem, geometry)
    total, chunk = 0.0, 100
    for _ in range(num_draws // chunk):
        drawn = problem.groups(chunk, 1, batch)
        errors = [(d[:, 0] - mean).numpy() for d, mean in zip(drawn, problem.gradient, strict=True)]
        if geometry == "sign":
            total += sum(float(np.abs(error).sum()) for error in errors)
        else:
            total += sum(float(np.linalg.svd(error, compute_uv=False).sum()) for error in errors)
    return math.sqrt(batch) * total / (num_draws // chunk * chunk)


def byte_llama_gradients(*, num_samples: int, train_steps: int, tensors: Sequence[str], seed: int = 0) -> list[Tensor]:
    """Per-sample gradients of a small byte-level Llama on this Python's own source files, (num_samples, M, N) each.

    Trained for `train_steps` steps of AdamW on 16 sequences of 32 bytes, so that gradients are neither those of a
    random network nor near zero.
    """
    from trainer_hooks.examples.corpus import ByteSequences, read_standard_library
    from trainer_hooks.examples.llama import Llama, LlamaConfig, next_token_loss

    torch.manual_seed(seed)
    config = LlamaConfig()
    model = Llama(config)
    sequences = ByteSequences(read_standard_library().train, context=config.context)
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed)).tolist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(train_steps):
        loss = next_token_loss(model, sequences.__getitems__(order[16 * step : 16 * step + 16]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    chosen: dict[str, Any] = dict(model.named_parameters())
    rows: list[list[Tensor]] = [[] for _ in tensors]
    for index in order[-num_samples:]:
        loss = next_token_loss(model, sequences.__getitems__([index]))
        for row, grad in zip(rows, torch.autograd.grad(loss, [chosen[name] for name in tensors]), strict=True):
            row.append(grad)
    return [torch.stack(row) for row in rows]
