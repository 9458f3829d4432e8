"""
Benchmark of a Neural Attentive Circuit (NAC): speed and memory of the two sizes of m2mKD (64 px and 224 px images), or
accuracy and latency of a trained NAC for different numbers of kept mediator latents.

    python benchmarks/nac.py --json result.json
    python benchmarks/nac.py --attention sdpa eager --autocast --compile
    python benchmarks/nac.py --official ../m2mKD             compare with the official code in the same run
    python benchmarks/nac.py --prune runs/nac_digits --figure pruning.png     a finished run: see nac_pruning.py

Variants take turns, so that a busy moment affects all of them. Each turn is a new process with two warm-up steps of
each mode, followed by measured steps. Seconds are medians over all turns.
`forward` runs in evaluation mode without gradients. `training` is forward and backward in train mode with all noise.
Memory is the peak of the first step above the built model, because later steps reuse memory that was freed but not
returned to the system.
The floor is the time that only the step's matrix products and convolutions would take at the speed of a large matrix
product on this machine, timed right before the step. It includes the products of branches that an image drops, even
though the model may skip them. The signatures are random here: fitting a graph takes long and changes no shape.
"""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import re
import statistics
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from nac_pruning import KEEP, draw_curve, prune_curve, show_curve
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from m2mkd import NACConfig, NACForImageClassification


MIB = 2**20
GEMM_SIZE = 2048
BATCH_SIZES = {64: 32, 224: 2}
PRESETS = {64: "tiny_imagenet", 224: "imagenet"}
NUM_LABELS = {64: 200, 224: 1000}
OFFICIAL_CONFIGS = {64: "configs/nac_scale_tinyimnet_config.yml", 224: "configs/nac_scale_imnet_config.yml"}
MODES = ("forward", "training")
WARM_UP_STEPS = 2
STEPS_A_TURN = 3
PRUNING_BATCH = 64


def main() -> None:
    """Measure, print a table, and write JSON if requested."""
    options = parse_arguments()
    results = pruning(options) if options.prune else speed(options)
    if options.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**settings, "torch": torch.__version__, "results": results}, indent=2))


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--repeats", type=int, default=3, help="measured turns of each variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument(
        "--batch-size", type=int, help="images per step (speed: 32 of 64 px, 2 of 224 px; pruning: 64)"
    )
    group = parser.add_argument_group("speed and memory")
    group.add_argument("--image-size", type=int, nargs="+", choices=PRESETS, default=list(PRESETS))
    group.add_argument("--attention", nargs="+", default=["sdpa"], help="attention implementations of transformers")
    group.add_argument("--autocast", action="store_true", help="add variants with bf16 autocast")
    group.add_argument("--compile", action="store_true", help="add variants with torch.compile")
    group.add_argument("--checkpointing", action="store_true", help="add variants with gradient checkpointing")
    group.add_argument(
        "--official", type=Path, help="checkout of the official code, https://github.com/kamanphoebe/m2mKD"
    )
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group = parser.add_argument_group("accuracy against latency")
    group.add_argument("--prune", type=Path, metavar="RUN_FOLDER", help="a finished run of a NAC recipe")
    group.add_argument("--arm", default="m2mkd", help="arm of the run")
    group.add_argument(
        "--keep", type=float, nargs="+", default=list(KEEP), help="fractions of the mediators to keep, in (0, 1]"
    )
    group.add_argument("--figure", type=Path, help="file to save the figure to, e.g. pruning.png")
    options = parser.parse_args()
    if options.official and importlib.util.find_spec("einops") is None:
        parser.error("--official needs einops, which the official code imports: pip install einops")
    if options.official and not (options.official / OFFICIAL_CONFIGS[64]).is_file():
        parser.error(
            f"--official is not a checkout of the official code: {options.official / OFFICIAL_CONFIGS[64]} is missing"
        )
    if options.prune and not (options.prune / "arms" / options.arm).is_dir():
        parser.error(f"--prune: {options.prune / 'arms' / options.arm} is missing; give the folder of a finished run")
    if not all(0 < share <= 1 for share in options.keep):
        parser.error(f"--keep must be fractions in (0, 1], but is {options.keep}")
    return options


def pruning(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure accuracy and latency; see nac_pruning.py."""
    torch.set_num_threads(options.threads)
    batch_size = options.batch_size or PRUNING_BATCH
    points = prune_curve(options.prune, options.arm, options.keep, batch_size, options.repeats)
    show_curve(points, batch_size)
    if options.figure:
        draw_curve(points, batch_size, options.figure)
    return points


# ---- Speed and memory ----


@dataclass
class Variant:
    """One way to run a NAC."""

    name: str
    image_size: int
    batch_size: int
    threads: int
    device: str
    attention: str = "sdpa"
    autocast: bool = False
    compile: bool = False
    checkpointing: bool = False
    official: str | None = None


def variants_of(options: argparse.Namespace, image_size: int) -> list[Variant]:
    """The variants that the options ask for, the official model first."""
    common = {
        "image_size": image_size,
        "batch_size": options.batch_size or BATCH_SIZES[image_size],
        "threads": options.threads,
        "device": options.device,
    }
    variants = [Variant("official", official=str(options.official), **common)] if options.official else []
    for attention in options.attention:
        variants.append(Variant(attention, attention=attention, **common))
        for extra in ("checkpointing", "autocast", "compile"):
            if getattr(options, extra):
                variants.append(Variant(f"{attention}, {extra}", attention=attention, **{extra: True}, **common))
    return variants


def speed(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure speed and memory; returns the results by image size and variant."""
    results = {}
    for image_size in options.image_size:
        variants = variants_of(options, image_size)
        flops = in_a_process(count_flops, variants[-1])
        figures = take_turns(variants, flops, options.repeats)
        for variant in variants[1:] if options.official else []:
            for mode in MODES:
                figures[variant.name][mode].update(ratios(figures["official"][mode], figures[variant.name][mode]))
        results[str(image_size)] = figures
        show_speed(f"NAC {PRESETS[image_size]}, {image_size} px, batch {variants[0].batch_size}", figures)
    return results


def ratios(official: dict[str, Any], ours: dict[str, Any]) -> dict[str, float | None]:
    """Speed-up over the official code, and fraction of its memory."""
    share = ours["mib"] / official["mib"] if ours["mib"] and official["mib"] else None
    return {"speed_up": official["seconds"] / ours["seconds"], "memory_share": share}


def take_turns(variants: list[Variant], flops: dict[str, int], repeats: int) -> dict[str, dict[str, Any]]:
    """Medians of each variant; see the top of the file."""
    turns: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    for _ in range(repeats):
        for variant in variants:
            turns[variant.name].append(in_a_process(take_turn, variant, flops))
    return {
        variant.name: {
            "variant": asdict(variant),
            "parameters": turns[variant.name][0]["parameters"],
            "flops": None if variant.official else flops,
            **{mode: summary(turns[variant.name], mode) for mode in MODES},
        }
        for variant in variants
    }


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a new process, so that the measured memory was not used before, and return its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def summary(turns: list[dict[str, Any]], mode: str) -> dict[str, Any]:
    """Medians over the measured steps of all turns, and the memory of the very first step."""
    steps = [step for turn in turns for step in turn[mode][WARM_UP_STEPS:]]
    floor_ratios = [step["floor_ratio"] for step in steps if step["floor_ratio"] is not None]
    return {
        "seconds": statistics.median(step["seconds"] for step in steps),
        "min_seconds": min(step["seconds"] for step in steps),
        "mib": turns[0][mode][0]["mib"],
        "floor_ratio": statistics.median(floor_ratios) if floor_ratios else None,
    }


def take_turn(variant: Variant, flops: dict[str, int]) -> dict[str, Any]:
    """Build the model and run the steps of each mode. The result includes the number of parameters."""
    torch.set_num_threads(variant.threads)
    torch.manual_seed(0)
    model = official_model(variant) if variant.official else our_model(variant)
    model.to(variant.device)
    images = noise_images(variant)
    if variant.checkpointing:
        model.gradient_checkpointing_enable()
    if variant.compile:
        model.compile()
    memory = Memory(variant.device)
    steps = range(WARM_UP_STEPS + STEPS_A_TURN)
    figures: dict[str, Any] = {
        mode: [measure(model, images, mode, variant, flops, memory) for _ in steps] for mode in MODES
    }
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), **figures}


def noise_images(variant: Variant) -> torch.Tensor:
    """Make a batch of noise."""
    return torch.randn(variant.batch_size, 3, variant.image_size, variant.image_size, device=variant.device)


def our_model(variant: Variant) -> NACForImageClassification:
    """Build the preset with random signatures."""
    config = NACConfig.from_preset(
        PRESETS[variant.image_size],
        graph_prior=None,
        graph_prior_kwargs=None,
        num_labels=NUM_LABELS[variant.image_size],
    )
    model = NACForImageClassification(config)
    model.set_attn_implementation(variant.attention)
    return model


def official_model(variant: Variant) -> nn.Module:
    """
    Build the same model of the official code. That code imports packages that it does not need (`speedrun`, `timm`)
    and names that no longer exist in `transformers`. Empty modules replace both.
    """

    def stand_in(name: str, **attributes: Any) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        return module

    old_names = [
        "CLIPTokenizer",
        "CLIPModel",
        "FlaxCLIPVisionModel",
        "LxmertTokenizer",
        "LxmertModel",
        "BertTokenizer",
    ]
    unused = dict.fromkeys(("flatten_dict", "unflatten_dict", "recursive_update"))
    modules = {
        "transformers": stand_in("transformers", **dict.fromkeys(old_names, object)),
        "speedrun": stand_in("speedrun"),
        "speedrun.utils": stand_in("speedrun.utils"),
        "speedrun.utils.py_utils": stand_in("speedrun.utils.py_utils", **unused),
        "timm": stand_in("timm"),
        "timm.models": stand_in("timm.models"),
        "timm.models.layers": stand_in(
            "timm.models.layers",
            trunc_normal_=lambda tensor, std: nn.init.trunc_normal_(tensor, std=std),
            DropPath=None,
        ),
        "timm.models.registry": stand_in("timm.models.registry", register_model=lambda function: function),
    }
    checkout = Path(variant.official)
    before = {name: sys.modules.get(name) for name in modules}
    sys.path.insert(0, str(checkout / "nacs"))
    sys.modules.update(modules)
    try:
        core = importlib.import_module("neural_compilers.model.nc.core")
    finally:
        sys.modules.update({name: module for name, module in before.items() if module is not None})
    kwargs = yaml.safe_load((checkout / OFFICIAL_CONFIGS[variant.image_size]).read_text())["model"]["kwargs"]
    kwargs = {name: value for name, value in kwargs.items() if not name.startswith("__")}
    kwargs["latent_graph_kwargs"]["mediator_latent_kwargs"] = {"graph_preset": None}
    return core.NeuralCompiler(**kwargs)


def logits_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits of the official model or ours."""
    outputs = model(images)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def step(model: nn.Module, images: torch.Tensor, mode: str) -> None:
    """Run one step of a mode."""
    if mode == "forward":
        with torch.no_grad():
            logits_of(model, images)
        return
    # any loss will do, because it makes no difference to the model
    logits_of(model, images).float().logsumexp(-1).mean().backward()


def count_flops(variant: Variant) -> dict[str, int]:
    """
    FLOPs of matrix products and convolutions, by mode. The counter does not see into fused attention, and recomputed
    or deliberately skipped products should make no difference, so this uses eager attention without checkpointing.
    """
    model = our_model(replace(variant, attention="eager")).to(variant.device)
    images = noise_images(variant)
    flops = {}
    for mode in MODES:
        model.train(mode == "training")
        with FlopCounterMode(display=False) as counter:
            step(model, images, mode)
        flops[mode] = counter.get_total_flops()
    return flops


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def gemm_rate(variant: Variant) -> float:
    """FLOP/s of a large matrix product on this machine, now."""
    dtype = torch.bfloat16 if variant.autocast else torch.float32
    left, right = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=variant.device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        synchronize(variant.device)
        start = time.perf_counter()
        torch.matmul(left, right)
        synchronize(variant.device)
        seconds.append(time.perf_counter() - start)
    return 2 * GEMM_SIZE**3 / statistics.median(seconds[1:])


class Memory:
    """Peak memory above the memory at construction: GPU memory, or resident memory as reported by Linux."""

    def __init__(self, device: str):
        self.device = device
        self.base = 0
        self.restart()
        self.base = self._read()

    def restart(self) -> None:
        """Forget earlier peaks."""
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")

    def _read(self) -> int | None:
        if self.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated()
        if sys.platform != "linux":
            return None
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    def peak_mib(self) -> float | None:
        """The peak since `restart`; `None` where it cannot be measured."""
        peak = self._read()
        return None if peak is None else (peak - self.base) / MIB


def measure(
    model: nn.Module, images: torch.Tensor, mode: str, variant: Variant, flops: dict[str, int], memory: Memory
) -> dict[str, float | None]:
    """Time one step."""
    rate = gemm_rate(variant)
    model.train(mode == "training")
    model.zero_grad()
    memory.restart()
    start = time.perf_counter()
    with torch.autocast(torch.device(variant.device).type, torch.bfloat16, enabled=variant.autocast):
        step(model, images, mode)
    synchronize(variant.device)
    seconds = time.perf_counter() - start
    floor_ratio = None if variant.official else seconds * rate / flops[mode]
    return {"seconds": seconds, "mib": memory.peak_mib(), "floor_ratio": floor_ratio, "gemm_rate": rate}


def show_speed(title: str, figures: dict[str, dict[str, Any]]) -> None:
    """Print a table with one row per mode and variant."""
    table = Table(title=title)
    for heading in ("mode", "variant", "seconds", "peak MiB", "x floor", "x faster than official", "of its memory"):
        table.add_column(heading, justify="left" if heading in ("mode", "variant") else "right")
    for mode in MODES:
        for name, figure in figures.items():
            values = figure[mode]
            cells = [(values["seconds"], ".3f"), (values["mib"], ".0f"), (values["floor_ratio"], ".2f")]
            cells += [(values.get("speed_up"), ".2f"), (values.get("memory_share"), ".0%")]
            table.add_row(mode, name, *("" if value is None else format(value, spec) for value, spec in cells))
    Console().print(table)


if __name__ == "__main__":
    main()
