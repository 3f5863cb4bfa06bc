"""What a step of each optimizer costs, against torch's, PyPI's and AdamW's training step.

python -m tests.benchmarks.optimizers [--json] [--layers 1] [--rounds 7] [--tokens 131072]

Both sides of every row step the same matrices with the same gradients, one after the other in every round; figures are
medians of rounds and ratios of medians. Muon is compared at equal or better accuracy of the orthogonal factor: the
accuracy rows hold the mean distance of singular values from 1 and the cosine to the exact factor, from the benchmark's
own float64 SVD. With torch's polynomials ours is a row of its own. The two-rank comparison runs under torchrun, one
thread per rank: torch's Muon repeats the work on every rank, ours divides it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.benchmarks.report import environment, show
from tests.torchrun import environment_with, torchrun_command
from trainer_hooks.examples.llama import Llama, LlamaConfig
from trainer_hooks.kernels import NEWTON_SCHULZ_5, POLAR_EXPRESS_4
from trainer_hooks.optim import ASGO, SOAP, AdamW, EShampoo, Muon, Scion, Shampoo, Signum, SinkGD, SpecSGD

LLAMA_160M_LAYER = ((768, 768),) * 4 + ((2048, 768),) * 2 + ((768, 2048),)
DEMO_SIZE = LlamaConfig()
TOKENS_AT_ONCE = 2048
NUM_STEPS = len(POLAR_EXPRESS_4.coefficients)
"""Of Muon's own schedule."""
Shapes = Sequence[tuple[int, ...]]
RATE = 1e-30
"""Moves nothing that float32 holds, and is no rate of 0, which some take for a step that does not count."""
Optimizers = dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]

OURS: Optimizers = {
    "Muon": lambda p: Muon(p, lr=RATE),
    "Signum": lambda p: Signum(p, lr=RATE),
    "AdamW": lambda p: AdamW(p, lr=RATE),
    "Shampoo": lambda p: Shampoo(p, lr=RATE),
    "EShampoo": lambda p: EShampoo(p, lr=RATE),
    "SOAP": lambda p: SOAP(p, lr=RATE),
    "ASGO": lambda p: ASGO(p, lr=RATE),
    "Scion": lambda p: Scion(p, lr=RATE),
    "SinkGD": lambda p: SinkGD(p, lr=RATE),
    "SpecSGD": lambda p: SpecSGD(p, lr=RATE),
}
TORCHS: Optimizers = {
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=RATE),
    "torch Muon": lambda p: torch.optim.Muon(p, lr=RATE, weight_decay=0.0),
}


def peers() -> Optimizers:
    """Of PyPI, as far as they are installed."""
    found: Optimizers = {}
    try:
        import pytorch_optimizer

        found["pytorch_optimizer Muon"] = lambda p: pytorch_optimizer.Muon(
            [{"params": p, "use_muon": True}], lr=RATE, weight_decay=0.0
        )
        found["pytorch_optimizer SOAP"] = lambda p: pytorch_optimizer.SOAP(p, lr=RATE, weight_decay=0.0)
    except ImportError:
        pass
    try:
        import heavyball

        found["heavyball Muon"] = lambda p: heavyball.Muon(p, lr=RATE, weight_decay=0.0)
    except ImportError:
        pass
    return found


def parameters_of(shapes: Shapes) -> list[nn.Parameter]:
    """Matrices with gradients like those of a network: low rank and noise."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for rows, columns in shapes:
        parameter = nn.Parameter(torch.randn(rows, columns, generator=generator) * 0.02)
        left, right = (torch.randn(side, 32, generator=generator) for side in (rows, columns))
        parameter.grad = left @ right.mT + torch.randn(rows, columns, generator=generator)
        found.append(parameter)
    return found


def stepping(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> Callable[[], object]:
    """Steps with the same gradients again, which some optimizers use up."""
    grads = [parameter.grad for parameter in parameters]

    def run() -> None:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()

    return run


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors in its state."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def interleaved(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in seconds.items()}


def step_rows(shapes: Shapes, size: str, rounds: int) -> list[dict[str, Any]]:
    """A step of every optimizer. Medians leave out roots and bases that are renewed in fewer than half of the steps."""
    built = {}
    for name, build in (OURS | TORCHS | peers()).items():
        parameters = parameters_of(shapes)
        built[name] = (build(parameters), parameters)
    seconds = interleaved({name: stepping(*both) for name, both in built.items()}, rounds)
    weights = sum(rows * columns for rows, columns in shapes) * 4
    return [
        {
            "case": f"step, {size}",
            "optimizer": name,
            "seconds": seconds[name],
            "over_torch_adamw": seconds[name] / seconds["torch AdamW"],
            "state_over_weights": state_bytes(optimizer) / weights,
        }
        for name, (optimizer, _) in built.items()
    ]


def accuracy_rows(shapes: Shapes) -> list[dict[str, Any]]:
    """How near the updates of both sides are to the exact factor, on the same gradients."""
    builds: Optimizers = {
        "Muon": lambda p: Muon(p, lr=1.0, momentum=0.0, nesterov=False, scale="none"),
        "torch Muon": lambda p: torch.optim.Muon(p, lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0),
    }
    found = []
    for name, build in builds.items():
        parameters = parameters_of(shapes)
        before = [parameter.detach().double().clone() for parameter in parameters]
        build(parameters).step()
        distances, cosines = [], []
        for parameter, start in zip(parameters, before, strict=True):
            update = start - parameter.detach().double()
            if name == "torch Muon":
                update /= max(1.0, update.shape[0] / update.shape[1]) ** 0.5
            assert parameter.grad is not None
            left, _, right = torch.linalg.svd(parameter.grad.double(), full_matrices=False)
            distances.append(float((torch.linalg.svdvals(update) - 1).abs().mean()))
            cosines.append(float((update * (left @ right)).sum() / update.norm() / min(update.shape) ** 0.5))
        found.append(
            {
                "case": "accuracy",
                "optimizer": name,
                "mean_distance_from_1": statistics.mean(distances),
                "cosine": statistics.mean(cosines),
            }
        )
    return found


def product_flops(shapes: Shapes, num_steps: int) -> float:
    """Of a quintic iteration, evaluated directly: X X^T, A A and (b A + c A A) X in every step."""
    return float(sum(num_steps * (4 * min(shape) ** 2 * max(shape) + 2 * min(shape) ** 3) for shape in shapes))


def matmul_steps(shapes: Shapes, num_steps: int) -> Callable[[], object]:
    """The products of a quintic iteration and nothing else, in bfloat16."""
    matrices = [torch.randn(min(shape), max(shape)).bfloat16() for shape in shapes]

    def run() -> None:
        for matrix in matrices:
            gram = torch.empty(len(matrix), len(matrix), dtype=torch.bfloat16)
            out, square = torch.empty_like(matrix), torch.empty_like(gram)
            for _ in range(num_steps):
                torch.mm(matrix, matrix.mT, out=gram)
                torch.mm(gram, gram, out=square)
                torch.mm(square, matrix, out=out)

    return run


def muon_against_torch(shapes: Shapes, rounds: int) -> dict[str, float]:
    """Seconds of a step, one process."""
    sides: Optimizers = {"ours": OURS["Muon"], "torch": TORCHS["torch Muon"]}
    sides |= {name: build for name, build in peers().items() if "Muon" in name}
    steps: dict[str, Callable[[], object]] = {}
    for name, build in sides.items():
        parameters = parameters_of(shapes)
        steps[name] = stepping(build(parameters), parameters)
    steps["products of our schedule"] = matmul_steps(shapes, NUM_STEPS)
    steps["Muon, Newton-Schulz 5"] = _with_newton_schulz(shapes)
    return interleaved(steps, rounds)


def _with_newton_schulz(shapes: Shapes) -> Callable[[], object]:
    """Ours with torch's polynomials: the same products, without what the schedule saves."""
    parameters = parameters_of(shapes)
    return stepping(Muon(parameters, lr=RATE, schedule=NEWTON_SCHULZ_5), parameters)


def two_ranks(layers: int, rounds: int) -> dict[str, float]:
    """Seconds of a step under torchrun."""
    arguments = ("--worker", "--layers", str(layers), "--rounds", str(rounds))
    done = subprocess.run(
        torchrun_command("tests.benchmarks.optimizers", *arguments, num_ranks=2),
        env=environment_with(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def worker(layers: int, rounds: int) -> None:
    """One of two ranks, both sides."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    shapes = LLAMA_160M_LAYER * layers
    ours = Muon(parameters_of(shapes), lr=RATE, process_group=dist.group.WORLD)
    torchs = torch.optim.Muon(parameters_of(shapes), lr=RATE, weight_decay=0.0)

    def together(step: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            dist.barrier()
            step()
            dist.barrier()

        return run

    seconds = interleaved({"ours": together(ours.step), "torch": together(torchs.step)}, rounds)
    if dist.get_rank() == 0:
        print(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def training_rows(tokens: int, rounds: int) -> tuple[list[dict[str, Any]], float]:
    """Percent that Shampoo's step, refreshes included, adds to a training step with AdamW: one Llama-160M layer.

    Forward and backward are measured on 2048 tokens and taken as proportional to them; a step does not depend on them.
    """
    torch.manual_seed(0)
    config = LlamaConfig(vocabulary_size=256, width=768, num_layers=1, num_heads=12, context=TOKENS_AT_ONCE)
    model = Llama(config)
    inputs = torch.randint(256, (1, TOKENS_AT_ONCE))

    def backward() -> None:
        logits = model(inputs)
        nn.functional.cross_entropy(logits.flatten(0, 1), inputs.flatten()).backward()

    backward_seconds = interleaved({"backward": backward}, rounds)["backward"]
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks." in name]
    for parameter in matrices:
        assert parameter.grad is not None
    adamw, shampoo = torch.optim.AdamW(matrices, lr=RATE), Shampoo(matrices, lr=RATE)
    frequency = int(shampoo.param_groups[0]["precondition_frequency"])
    shampoo.step()
    plain = interleaved({"adamw": adamw.step, "shampoo": shampoo.step}, min(rounds, frequency - 2))
    refresh = []
    for _ in range(2):
        shampoo.on_batch_change(global_batch_size=2, previous=1)
        begin = time.perf_counter()
        shampoo.step()
        refresh.append(time.perf_counter() - begin)
    refreshing = statistics.median(refresh) - plain["shampoo"]
    extra = plain["shampoo"] + refreshing / frequency - plain["adamw"]

    def percent(num_tokens: int) -> float:
        return 100 * extra / (backward_seconds * num_tokens / TOKENS_AT_ONCE + plain["adamw"])

    rows = [
        {
            "case": f"training step, one layer, {num_tokens} tokens",
            "optimizer": "Shampoo",
            "backward_seconds_per_2048_tokens": backward_seconds,
            "adamw_seconds": plain["adamw"],
            "seconds": plain["shampoo"],
            "refresh_seconds": refreshing,
            "refresh_every_steps": frequency,
            "percent_over_adamw_training_step": percent(num_tokens),
        }
        for num_tokens in sorted({4096, 8192, 16384, tokens})
    ]
    return rows, percent(tokens)


def demo_shapes() -> list[tuple[int, ...]]:
    """The matrices of the demo's model."""
    return [tuple(p.shape) for n, p in Llama(DEMO_SIZE).named_parameters() if p.ndim == 2 and "blocks." in n]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything."""
    shapes = LLAMA_160M_LAYER * arguments.layers
    alone = muon_against_torch(shapes, arguments.rounds)
    both = two_ranks(arguments.layers, arguments.rounds)
    training, percent = training_rows(arguments.tokens, arguments.rounds)
    rows = [{"case": "Muon, one process", **alone}, {"case": "Muon, two ranks", **both}]
    rows += accuracy_rows(LLAMA_160M_LAYER) + training
    rows += step_rows(shapes, f"{arguments.layers} layers of Llama-160M", arguments.rounds)
    rows += step_rows(demo_shapes(), "demo size", 10 * arguments.rounds)
    products = alone["products of our schedule"]
    best_peer = min(value for name, value in alone.items() if name == "torch" or name.endswith(" Muon"))
    return {
        "environment": environment(torch=torch.__version__, threads=torch.get_num_threads()),
        "rows": rows,
        "summary": {
            "muon_speedup_over_torch": alone["torch"] / alone["ours"],
            "muon_speedup_over_torch_ddp2": both["torch"] / both["ours"],
            "muon_share_of_matmul_rate": products / alone["ours"],
            "muon_speedup_over_best_peer": best_peer / alone["ours"],
            "shampoo_percent_over_adamw_training_step": percent,
            "muon_speedup_over_torch_at_equal_polynomials": alone["torch"] / alone["Muon, Newton-Schulz 5"],
            "matmul_gigaflops_bfloat16": product_flops(shapes, NUM_STEPS) / products / 1e9,
        },
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--layers", type=int, default=1, help="layers of Llama-160M's shapes [default: 1]")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds [default: 7]")
    parser.add_argument(
        "--tokens", type=int, default=131_072, help="tokens per training step, 64 sequences of 2048 [default: 131072]"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.layers, arguments.rounds)
        return
    show(measure(arguments), as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
