"""Writes what the tests of the converters read: official checkpoints and configurations."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from m2mkd.conversion.official_models import without_aliases


def save(path: Path, content: Any) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def config_file(folder: Path, content: dict[str, Any], name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(content) if name.endswith("json") else yaml.safe_dump(content))
    return path


def left(out: Path) -> list[str]:
    """What lies where the folder should be, temporary files included."""
    return sorted(path.name for path in out.parent.iterdir() if out.name in path.name)


def with_stitches(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An official V-MoE of width 32 that keeps the stitches between its blocks 1 and 2, 40 wide."""
    shapes = {
        "blocks.1.post_stitch.ln": ((32,), (32,)),
        "blocks.1.post_stitch.fc": ((40, 32), (40,)),
        "blocks.2.pre_stitch.ln": ((40,), (40,)),
        "blocks.2.pre_stitch.fc": ((32, 40), (32,)),
    }
    stitches = {}
    for name, (weight, bias) in shapes.items():
        stitches.update({f"{name}.weight": torch.randn(weight), f"{name}.bias": torch.randn(bias)})
    return {**without_aliases(state_dict), **stitches}
