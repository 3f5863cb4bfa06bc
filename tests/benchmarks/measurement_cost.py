"""What one measurement costs, as a share of the training steps it is spread over, at the shapes of a 160M Llama.

python -m tests.benchmarks.measurement_cost [--json]

    percent = 100 * seconds of one measurement on the busiest rank / (F * seconds of one training step)

Eight data-parallel ranks, each with one micro-batch of 16 samples of 2048 tokens. The step is not run: its matrix
products are timed in the same run, at the model's own shapes, forward and backward, for one sample, and counted 16
times; attention is added at the rate of those products, causal; everything else in a step (norms, softmax, rotations,
the optimizer, communication) counts as free, which makes the percents larger than they are.

Both sides run on one core in float32 and are timed in CPU seconds, so that other work on the machine changes little;
medians of interleaved repetitions. Each distinct shape is timed once per repetition and multiplied by its count.
Communication is counted in bytes, not in the percents.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gns_controller.core.contract import Estimator, Geometry
from trainer_hooks.distributed.collectives import RankGroup
from trainer_hooks.distributed.layout import DataParallel, Layout
from trainer_hooks.estimators import choose_patterns, spectral
from trainer_hooks.estimators.spectral import SpectralNorms
from trainer_hooks.measurement.capture.accumulators import SignedAccumulator, SpreadAccumulator
from trainer_hooks.measurement.capture.captured_step import CapturedStep, Counts, Dealing
from trainer_hooks.measurement.group_reader import GroupReader
from trainer_hooks.measurement.groups import MeasuredGroup
from trainer_hooks.measurement.sums_row import Measured

WIDTH, LAYERS, FEED_FORWARD, VOCABULARY, CONTEXT = 768, 12, 3072, 32_000, 2048
RANKS, SAMPLES_PER_RANK, REPETITIONS, INTERVALS = 8, 16, 5, (25, 100)

HIDDEN = {
    (WIDTH, WIDTH): 4 * LAYERS,  # query, key, value, out
    (FEED_FORWARD, WIDTH): 2 * LAYERS,  # gate, up
    (WIDTH, FEED_FORWARD): LAYERS,  # down
}
"""Shape -> count of the matrices the spectral geometry measures."""
HEAD = (VOCABULARY, WIDTH)
NUM_HIDDEN = sum(rows * columns * count for (rows, columns), count in HIDDEN.items())
NUM_PARAMETERS = NUM_HIDDEN + 2 * VOCABULARY * WIDTH + (2 * LAYERS + 1) * WIDTH
"""Hidden matrices, embedding and head (untied), norms."""

Timings = dict[str, list[float]]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Counts the bytes of tensors made while it is on and still alive; scratch inside an operator is not seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nor this
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._seen.add(given.untyped_storage())
        result = func(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage() not in self._seen:
                storage = made.untyped_storage()
                self._seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, num_bytes: int) -> None:
        self.now -= num_bytes


# ------------------------------------------------------------------ the training step


def layer_products(shape: tuple[int, int]) -> Callable[[], Any]:
    """One sample through one layer: Y = X W^T, dX = dY W, dW = dY^T X."""
    rows, columns = shape
    weight, inputs, grad = torch.randn(rows, columns), torch.randn(CONTEXT, columns), torch.randn(CONTEXT, rows)
    return lambda: (inputs @ weight.mT, grad @ weight, grad.mT @ inputs)


def step_seconds_and_rate(seconds: dict[str, float]) -> tuple[float, float]:
    """Of one rank's 16 samples, and floating-point operations per second of the layers' products.

    6 * parameters in products * tokens, and 6 * tokens * context * width * layers for causal attention, forward and
    backward.
    """
    layers = sum(count * seconds[f"products {shape}"] for shape, count in (HIDDEN | {HEAD: 1}).items())
    rate = 6 * (NUM_HIDDEN + VOCABULARY * WIDTH) * CONTEXT / layers
    attention = 6 * CONTEXT * CONTEXT * WIDTH * LAYERS / rate
    return SAMPLES_PER_RANK * (layers + attention), rate


# ------------------------------------------------------------------ what a measurement does


def capture_signed(grad: Tensor) -> None:
    """Split: a new buffer, and the one micro-batch's local gradient into it."""
    SignedAccumulator([grad], num_patterns=1, keep_sum=False).add(0, grad, signs=[-1])


def capture_spread(grad: Tensor, mean_grad: Tensor) -> Tensor:
    """rank_variance: new buffers, the micro-batch into them, and the spread around the mean over ranks."""
    is_matrix = grad.ndim == 2
    spread = SpreadAccumulator([grad], spectral=[is_matrix], entrywise=[not is_matrix])
    spread.add(0, grad, num_samples=SAMPLES_PER_RANK)
    spread.recentre(0, mean_grad)
    return (spread.covariance if is_matrix else spread.variance)(0, num_groups=RANKS)


def capture_gram_float32(grad: Tensor, mean_grad: Tensor) -> Tensor:
    """The published way: the (S, S) float32 Gram of the local gradient's deviation."""
    deviation = spectral.wide(grad - mean_grad)
    return deviation @ deviation.mT


def norms_of(
    geometry: Geometry,
    mean_grad: Tensor,
    *,
    signed: Tensor | None = None,
    spread: Tensor | None = None,
    norms: SpectralNorms = "exact",
) -> Callable[[], Any]:
    """The project's own way from reduced buffers to a reading, for one tensor that this rank owns."""
    parameter = nn.Parameter(torch.empty(mean_grad.shape))
    group = MeasuredGroup("measured", geometry, "any", (parameter,), ({"lr": 1.0},))
    alone = RankGroup(0, 1, torch.device("cpu"), None)
    estimator: Estimator = "split" if signed is not None else "rank_variance"
    layout = Layout("owner", alone, DataParallel(0, 1), 1, ())
    reader = GroupReader([group], [], layout, Measured((estimator,), spectral_norms=norms))
    captured = CapturedStep(
        counts=EQUAL_HALVES,
        dealing=Dealing(choose_patterns(1, num_ranks=RANKS, num_micro_batches=1), 1, 1),
        mean=[mean_grad],
        signed=[] if signed is None else [[signed]],
        variance=None if spread is None else lambda index: spread,
        covariance=None if spread is None else lambda index: spread,
    )
    return lambda: reader.read(captured)


EQUAL_HALVES = Counts(
    num_samples=RANKS * SAMPLES_PER_RANK,
    num_samples_a=(RANKS * SAMPLES_PER_RANK / 2,),
    num_groups=RANKS,
    num_spread_groups=RANKS,
    num_misweighted=0,
    same_samples=(),
)


def owned(num_ranks: int) -> list[dict[tuple[int, int], int]]:
    """Rank -> shape -> count: the matrices in order of falling cost, each to the rank with the least so far."""
    loads = [(0, rank) for rank in range(num_ranks)]
    shares: list[dict[tuple[int, int], int]] = [defaultdict(int) for _ in range(num_ranks)]
    matrices = [shape for shape, count in HIDDEN.items() for _ in range(count)]
    for shape in sorted(matrices, key=lambda s: -s[0] * s[1] * min(s)):
        load, rank = heapq.heappop(loads)
        shares[rank][shape] += 1
        heapq.heappush(loads, (load + shape[0] * shape[1] * min(shape), rank))
    return shares


def operations() -> dict[str, Callable[[], Any]]:
    """Everything that is timed, by name."""
    share = -(-NUM_PARAMETERS // RANKS)
    grad, buffer = torch.randn(NUM_PARAMETERS), torch.randn(NUM_PARAMETERS)
    named: dict[str, Callable[[], Any]] = {f"products {shape}": layer_products(shape) for shape in (*HIDDEN, HEAD)}
    named["capture signed, all"] = lambda: capture_signed(grad)
    named["capture signed, hidden"] = lambda: capture_signed(grad[:NUM_HIDDEN])
    named["sums split sign"] = norms_of("sign", grad[:share], signed=buffer[:share])
    named["capture spread, all"] = lambda: capture_spread(grad, buffer)
    variance = buffer[:share].square()
    named["sums spread sign"] = norms_of("sign", grad[:share], spread=variance)
    for shape in HIDDEN:
        named |= matrix_operations(shape)
    return named


def matrix_operations(shape: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """Of one matrix."""
    mean_grad, signed = torch.randn(shape), torch.randn(shape)
    gram = capture_spread(mean_grad, signed)
    gram_float32 = gram.float()
    return {
        f"sums split polar_express {shape}": norms_of("spectral", mean_grad, signed=signed, norms="polar_express"),
        f"sums split exact {shape}": norms_of("spectral", mean_grad, signed=signed),
        f"capture gram float64 {shape}": lambda: capture_spread(signed, mean_grad),
        f"capture gram float32 {shape}": lambda: capture_gram_float32(signed, mean_grad),
        f"sums spread exact {shape}": norms_of("spectral", mean_grad, spread=gram),
        f"sums spread polar_express {shape}": norms_of("spectral", mean_grad, spread=gram, norms="polar_express"),
        f"sums spread full {shape}": lambda: (torch.linalg.eigh(gram_float32), spectral.nuclear_norm(mean_grad)),
    }


def measure(named: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, int]]:
    """Name -> median CPU seconds, and name -> peak bytes of what it allocates."""
    timings: Timings = defaultdict(list)
    peaks = {}
    for name, operation in named.items():
        with LiveBytes() as live:
            operation()
        peaks[name] = live.peak
    for _ in range(REPETITIONS):
        for name, operation in named.items():
            began = time.process_time()
            operation()
            timings[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in timings.items()}, peaks


# ------------------------------------------------------------------ the table


def rows(seconds: dict[str, float], peaks: dict[str, int], *, step_seconds: float) -> list[dict[str, Any]]:
    """One per way of measuring."""

    def row(
        what: tuple[str, str, str], *, capture: float, sums: float, buffer: float, temporary: float, reduced: float
    ) -> dict[str, Any]:
        estimator, geometry, way = what
        return {
            "estimator": estimator,
            "geometry": geometry,
            "way": way,
            "capture_seconds": capture,
            "sums_seconds": sums,
            **{f"percent_at_{every}": 100 * (capture + sums) / (every * step_seconds) for every in INTERVALS},
            "buffer_mib": buffer / 2**20,
            "temporary_mib": temporary / 2**20,
            "reduced_mib": reduced / 2**20,
        }

    def busiest(name: str) -> float:
        return max(sum(count * seconds[f"{name} {shape}"] for shape, count in rank.items()) for rank in owned(RANKS))

    def all_hidden(name: str) -> float:
        return sum(count * seconds[f"{name} {shape}"] for shape, count in HIDDEN.items())

    def largest(*names: str) -> int:
        return max(peaks[f"{name} {shape}"] for name in names for shape in HIDDEN)

    gram_bytes = sum(8 * min(shape) ** 2 * count for shape, count in HIDDEN.items())
    found = [
        row(
            ("split", "sign", "each rank its share"),
            capture=seconds["capture signed, all"],
            sums=seconds["sums split sign"],
            buffer=4 * NUM_PARAMETERS,
            temporary=peaks["sums split sign"],
            reduced=4 * NUM_PARAMETERS,
        ),
        row(
            ("rank_variance", "sign", "each rank its share"),
            capture=seconds["capture spread, all"],
            sums=seconds["sums spread sign"],
            buffer=8 * NUM_PARAMETERS,
            temporary=peaks["sums spread sign"],
            reduced=4 * NUM_PARAMETERS,
        ),
    ]
    found += [
        row(
            ("split", "spectral", f"{norms}, one owner per matrix"),
            capture=seconds["capture signed, hidden"],
            sums=busiest(f"sums split {norms}"),
            buffer=4 * NUM_HIDDEN,
            temporary=largest(f"sums split {norms}"),
            reduced=4 * NUM_HIDDEN,
        )
        for norms in ("polar_express", "exact")
    ]
    found += [
        row(
            ("rank_variance", "spectral", f"eigenvalues, mean {norms}, one owner per matrix"),
            capture=all_hidden("capture gram float64"),
            sums=busiest(f"sums spread {norms}"),
            buffer=gram_bytes + 4 * NUM_HIDDEN,
            temporary=largest("capture gram float64", f"sums spread {norms}"),
            reduced=gram_bytes,
        )
        for norms in ("exact", "polar_express")
    ]
    found.append(
        row(
            ("rank_variance", "spectral", "as published: eigenvectors too, float32, every matrix on every rank"),
            capture=all_hidden("capture gram float32"),
            sums=all_hidden("sums spread full"),
            buffer=gram_bytes // 2,
            temporary=largest("capture gram float32", "sums spread full"),
            reduced=gram_bytes // 2,
        )
    )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    from tests.benchmarks.report import environment, show

    torch.set_num_threads(1)
    torch.manual_seed(0)
    seconds, peaks = measure(operations())
    step_seconds, rate = step_seconds_and_rate(seconds)
    table = rows(seconds, peaks, step_seconds=step_seconds)
    split_sign, published_sign, split_spectral, _, published_spectral, *_ = (row["percent_at_100"] for row in table)
    summary = {
        "split_spectral_percent_at_100": split_spectral,
        "split_sign_percent_at_100": split_sign,
        "published_spectral_percent_at_100": published_spectral,
        "published_sign_percent_at_100": published_sign,
    }
    more = {
        "torch": torch.__version__,
        "threads": 1,
        "parameters": NUM_PARAMETERS,
        "hidden": {str(shape): count for shape, count in HIDDEN.items()},
        "head": str(HEAD),
        "ranks": RANKS,
        "samples_per_rank": SAMPLES_PER_RANK,
        "context": CONTEXT,
        "repetitions": REPETITIONS,
        "step_seconds": step_seconds,
        "float32_gflop_per_second": rate / 1e9,
    }
    show({"environment": environment(**more), "rows": table, "summary": summary}, as_json=options.json)


if __name__ == "__main__":
    main()
