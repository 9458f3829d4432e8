"""
Forward and backward of a V-MoE's sparse block against a dense MLP of equal FLOPs (its width is k times an expert's).

    python benchmarks/moe_block.py --json result.json
    python benchmarks/moe_block.py --size small --dtype bfloat16 --batch-size 1 4 16

All variants take turns in one process, so that a busy moment affects all of them; ratios are of medians. Gradients are
dropped before each step, as an optimizer with `set_to_none` does. The floor is the longer of two times: that of the
FLOPs at the speed of a large matrix product, and that of moving the weights (read forward and backward, gradient
written) at the speed of a copy, both timed here. Peak memory is not measured.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from m2mkd import VMoEConfig
from m2mkd.modeling.modeling_vmoe import VMoEMLP, VMoESparseMLP


SIZES = {"base": (768, 3072, 197), "small": (64, 128, 10)}
NUM_EXPERTS, NUM_CHOICES = 8, 2
ROUTERS = {
    "token choice": {},
    "capacity": {"capacity_factor": 1.0},
    "expert choice": {"router_type": "expert_choice", "capacity_factor": float(NUM_CHOICES)},
    "soft": {"router_type": "soft"},
}


def main() -> None:
    """Measure, print a table, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--backend", nargs="+", default=["eager", "grouped_mm"], help="of transformers' experts")
    parser.add_argument("--repeats", type=int, default=7, help="measured steps of each variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = [row for batch_size in options.batch_size for row in measure(options, batch_size)]
    show(results)
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=2))


def measure(options: argparse.Namespace, batch_size: int) -> list[dict[str, Any]]:
    """Seconds of each variant for one batch size, as medians."""
    dtype = getattr(torch, options.dtype)
    width, expert_width, num_tokens = SIZES[options.size]
    variants = {"dense": VMoEMLP(config("eager", width, NUM_CHOICES * expert_width, num_tokens)).to(dtype)}
    for name, router in ROUTERS.items():
        for backend in options.backend:
            mlp = VMoESparseMLP(config(backend, width, expert_width, num_tokens, **router))
            variants[f"{name}, {backend}"] = mlp.to(dtype)
    for parameter in (parameter for variant in variants.values() for parameter in variant.parameters()):
        nn.init.normal_(parameter, std=0.02)
    hidden_states = torch.randn(batch_size, num_tokens, width, dtype=dtype, requires_grad=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(options.repeats + 2):
        for name, variant in variants.items():
            times[name].append(step(variant, hidden_states))
    macs = batch_size * num_tokens * 2 * width * NUM_CHOICES * expert_width
    weights = 2 * NUM_EXPERTS * width * expert_width * dtype.itemsize
    floor = max(3 * 2 * macs / flops_per_second(dtype), 3 * weights / bytes_per_second())
    rows = []
    for name, steps in times.items():
        forward, both = (statistics.median(seconds) for seconds in zip(*steps[2:], strict=True))
        rows.append({"batch_size": batch_size, "variant": name, "forward": forward, "both": both, "floor": floor})
    for row in rows:
        row |= {"forward_ratio": row["forward"] / rows[0]["forward"], "ratio": row["both"] / rows[0]["both"]}
    return rows


def config(backend: str, width: int, expert_width: int, num_tokens: int, **router: Any) -> VMoEConfig:
    """Of one block, whose experts see `NUM_CHOICES` times the tokens in all."""
    built = VMoEConfig(
        hidden_size=width,
        intermediate_size=expert_width,
        num_attention_heads=4,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=NUM_CHOICES,
        **({"num_slots": NUM_CHOICES * num_tokens // NUM_EXPERTS} if "router_type" in router else {}),
        **router,
    )
    built._experts_implementation = backend
    return built


def step(block: nn.Module, hidden_states: torch.Tensor) -> tuple[float, float]:
    """Seconds of the forward pass, and of forward and backward."""
    block.zero_grad(set_to_none=True)
    hidden_states.grad = None
    start = time.perf_counter()
    outputs = block(hidden_states)
    forward = time.perf_counter() - start
    outputs.backward(torch.ones_like(outputs))
    return forward, time.perf_counter() - start


def flops_per_second(dtype: torch.dtype, size: int = 2048) -> float:
    """Speed of a large matrix product."""
    matrix = torch.randn(size, size, dtype=dtype)
    return 2 * size**3 / best(lambda: matrix @ matrix)


def bytes_per_second(num_bytes: int = 2**28) -> float:
    """Bytes read or written a second by a copy in memory."""
    source, target = (torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(2))
    return 2 * num_bytes / best(lambda: target.copy_(source))


def best(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of five calls."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def show(results: list[dict[str, Any]]) -> None:
    """Print a table with one row per variant."""
    table = Table(title="A block, forward + backward")
    for heading in ("batch", "block", "forward ms", "x dense", "both ms", "x dense", "x floor"):
        table.add_column(heading, justify="left" if heading == "block" else "right")
    for row in results:
        table.add_row(
            str(row["batch_size"]),
            row["variant"],
            f"{1000 * row['forward']:.1f}",
            f"{row['forward_ratio']:.2f}",
            f"{1000 * row['both']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['both'] / row['floor']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
