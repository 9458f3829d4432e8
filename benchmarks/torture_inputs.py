"""Images, class folders and damaged files that a command may meet, each drawn from a seeded generator."""

import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file


Random = random.Random
JUNK = [
    None, True, False, 0, -1, 1, 3, 10**9, -(10**18), 0.5, -0.5, 1e300, float("nan"), float("inf"), "", "x", "1", "🙂",
    "../..", "/etc/passwd", "\x00", "\udcff", "a" * 10_000, [], [None], [[]], [1, "x"], {}, {"x": 1}, {"1": None},
]  # fmt: skip


# ---- Plain values and bytes ----


def mutated_value(content: Any, rng: Random) -> Any:
    """A copy of plain values in which one node is replaced, removed, renamed, repeated or wrapped."""
    content = json.loads(json.dumps(content))
    parents = list(_containers(content))
    if not parents or rng.random() < 0.02:
        return rng.choice(JUNK)
    parent = rng.choice(parents)
    key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    how = rng.choice(("junk", "junk", "junk", "remove", "rename", "wrap", "number", "other"))
    if how == "remove":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        parent[rng.choice(("x", "", f"{key}s", "../x", 1))] = parent.pop(key)
    elif how == "wrap":
        parent[key] = rng.choice(([parent[key]], {"x": parent[key]}))
    elif how == "number" and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
        parent[key] = rng.choice((-parent[key], 2 * parent[key] + 1, parent[key] / 2, str(parent[key])))
    elif how == "other":
        other = rng.choice(parents)
        parent[key] = json.loads(json.dumps(other if rng.random() < 0.5 or not isinstance(other, list) else other[0]))
    else:
        parent[key] = rng.choice(JUNK)
    return content


def _containers(value: Any) -> list[Any]:
    if not isinstance(value, dict | list) or not value:
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [value, *(found for child in inner for found in _containers(child))]


def mutate_bytes(path: Path, rng: Random) -> str:
    """Truncate a file, change its bytes, or put something else in its place."""
    data = bytearray(path.read_bytes())
    how = rng.choice(
        ("truncated", "truncated", "flipped", "flipped", "header", "empty", "noise", "longer", "folder", "link")
    )
    if how in ("folder", "link"):
        path.unlink()
        path.mkdir() if how == "folder" else path.symlink_to(rng.choice(("nowhere", path.name)))
        return how
    if how == "truncated":
        del data[rng.randrange(len(data) + 1) :]
    elif how in ("flipped", "header"):
        for _ in range(rng.choice((1, 1, 3, 20)) if data else 0):
            data[rng.randrange(len(data) if how == "flipped" else min(len(data), 64))] ^= 1 << rng.randrange(8)
    elif how == "longer":
        data += rng.randbytes(rng.choice((1, 1000)))
    else:
        data = bytearray(rng.randbytes(len(data)) if how == "noise" else b"")
    path.write_bytes(data)
    return how


def mutate_text(path: Path, rng: Random) -> str:
    """Mutate a JSON or YAML file: mostly one of its values, sometimes its bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(path, rng)
    is_json = path.suffix == ".json"
    content = mutated_value(json.loads(path.read_text()) if is_json else yaml.safe_load(path.read_text()), rng)
    text = json.dumps(content) if is_json else yaml.safe_dump(content)
    path.write_bytes(text.encode(errors="surrogateescape"))
    return "value"


# ---- Tensors ----


def mutated_tensors(tensors: dict[str, torch.Tensor], rng: Random) -> dict[str, torch.Tensor]:
    """Tensors of which one is missing, new, swapped, of another type or shape, or not finite."""
    tensors, name, other = dict(tensors), *(rng.choice(sorted(tensors)) for _ in range(2))
    tensor = tensors[name]
    how = rng.choice(("drop", "add", "swap", "dtype", "shape", "scalar", "none", "rename", "nan", "all"))
    if how == "drop":
        del tensors[name]
    elif how == "add":
        tensors[rng.choice(("x", f"{name}.x", "../x"))] = torch.zeros(2)
    elif how == "swap":
        tensors[name], tensors[other] = tensors[other].clone(), tensor.clone()
    elif how == "dtype":
        tensors[name] = tensor.to(rng.choice((torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool)))
    elif how == "shape":
        tensors[name] = (
            tensor.reshape(-1).clone() if rng.random() < 0.5 else tensor[: max(len(tensor) // 2, 0)].clone()
        )
    elif how == "scalar":
        tensors[name] = torch.tensor(1.0)
    elif how == "none":
        tensors[name] = torch.zeros(0)
    elif how == "rename":
        tensors[f"module.{name}"] = tensors.pop(name)
    elif how == "nan":
        tensors[name] = torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor
    else:
        tensors = {} if rng.random() < 0.5 else {key: value.to(torch.float64) for key, value in tensors.items()}
    return tensors


def mutate_weights(path: Path, rng: Random) -> str:
    """Mutate a safetensors, PyTorch or other binary file."""
    if not (path.suffix == ".safetensors" or path.name == "model.pth") or rng.random() < 0.4:
        return mutate_bytes(path, rng)
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in mutated_tensors(load_file(path), rng).items()}, path)
        return "tensors"
    content = torch.load(path, weights_only=True)
    model = mutated_tensors(content["model"], rng)
    wrong: Any = rng.choice(
        ({"model": model}, {"model": model}, model, [model], {"model": [1]}, {"model_stages": 3}, 7)
    )
    torch.save(wrong, path)
    return "tensors"


# ---- Images ----


def _pixels(rng: Random, *shape: int) -> np.ndarray:
    return np.random.default_rng(rng.randrange(2**32)).integers(0, 255, shape, dtype=np.uint8)


def _photo(rng: Random, height: int = 12, width: int = 10) -> Image.Image:
    return Image.fromarray(_pixels(rng, height, width, 3))


def _bomb(path: Path, side: int) -> None:
    """A PNG of a few kilobytes whose header says `side` x `side`."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def _animated(path: Path, rng: Random) -> None:
    frames = [_photo(rng) for _ in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def _rotated(path: Path, rng: Random) -> None:
    exif = Image.Exif()
    exif[0x0112] = rng.choice((0, 3, 6, 8, 99))
    _photo(rng).save(path, exif=exif)


def _truncated(path: Path, rng: Random) -> None:
    _photo(rng, 64, 64).save(path)
    os.truncate(path, rng.randrange(path.stat().st_size))


IMAGES: dict[str, tuple[str, Callable[[Path, Random], Any]]] = {
    "truncated": ("x.jpg", _truncated),
    "truncated PNG": ("x.png", _truncated),
    "1 x 1": ("x.png", lambda path, rng: _photo(rng, 1, 1).save(path)),
    "30,000 px wide": ("x.png", lambda path, rng: _photo(rng, 2, 30_000).save(path)),
    "30,000 px high": ("x.jpg", lambda path, rng: _photo(rng, 30_000, 1).save(path)),
    "CMYK": ("x.jpg", lambda path, rng: Image.fromarray(_pixels(rng, 9, 9, 4), mode="CMYK").save(path)),
    "16 bits": ("x.png", lambda path, rng: Image.fromarray(_pixels(rng, 9, 9).astype(np.uint16) * 99).save(path)),
    "float": ("x.tiff", lambda path, rng: Image.fromarray(_pixels(rng, 9, 9).astype(np.float32)).save(path)),
    "1 bit": ("x.png", lambda path, rng: _photo(rng).convert("1").save(path)),
    "gray and alpha": ("x.png", lambda path, rng: _photo(rng).convert("LA").save(path)),
    "palette": ("x.png", lambda path, rng: _photo(rng).convert("P").save(path, transparency=0)),
    "animated": ("x.gif", _animated),
    "animated PNG": ("x.png", _animated),
    "animated WebP": ("x.webp", _animated),
    "EXIF rotated": ("x.jpg", _rotated),
    "bomb": ("x.png", lambda path, rng: _bomb(path, rng.choice((14_000, 20_000, 100_000, 2**31 - 1)))),
    "empty": ("x.png", lambda path, rng: path.write_bytes(b"")),
    "noise": ("x.png", lambda path, rng: path.write_bytes(rng.randbytes(500))),
    "text": ("x.jpg", lambda path, rng: path.write_text("<html>404</html>")),
    "script": ("x.eps", lambda path, rng: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
    "pipe": ("x.png", lambda path, rng: os.mkfifo(path)),
    "endless": ("x.png", lambda path, rng: path.symlink_to("/dev/zero")),
    "dangling link": ("x.png", lambda path, rng: path.symlink_to("nowhere")),
    "flipped": ("x.jpg", lambda path, rng: (_photo(rng, 40, 40).save(path), mutate_bytes(path, rng))),
    "flipped PNG": ("x.png", lambda path, rng: (_photo(rng, 40, 40).save(path), mutate_bytes(path, rng))),
}  # fmt: skip


# ---- Class folders ----


def write_classes(root: Path, names: list[str], rng: Random) -> None:
    """A folder of each name with two images."""
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(2):
            _photo(rng).save(root / name / f"{index}.png")


def _with_loop(root: Path, rng: Random) -> None:
    write_classes(root, ["blue", "red"], rng)
    for name in ("blue/loop", "red/again", "red/loop"):
        (root / name).symlink_to(rng.choice((root, root / "red")))


def _many(root: Path, rng: Random) -> None:
    for number in range(10_000):
        (root / f"class_{number}").mkdir(parents=True)
    write_classes(root, ["blue"], rng)


FOLDERS: dict[str, Callable[[Path, Random], Any]] = {
    "nothing": lambda root, rng: None,
    "empty": lambda root, rng: root.mkdir(),
    "a file": lambda root, rng: root.write_text("x"),
    "empty class": lambda root, rng: (write_classes(root, ["blue"], rng), (root / "red").mkdir()),
    "no classes": lambda root, rng: (root.mkdir(), _photo(rng).save(root / "x.png")),
    "unicode": lambda root, rng: write_classes(root, ["blue", "rød", "青", "🙂", "e\u0301", "é"], rng),
    "not UTF-8": lambda root, rng: write_classes(root, ["blue", os.fsdecode(b"r\xf8d")], rng),
    "lines": lambda root, rng: write_classes(root, ["blue", "r\ned", " ", "-x", "[red]", "a" * 250], rng),
    "splits": lambda root, rng: write_classes(root, ["train/blue", "train/red", "test/blue"], rng),
    "loop": _with_loop,
    "10,000 classes": _many,
    "other files": lambda root, rng: (write_classes(root, ["blue"], rng), (root / "blue/x.txt").write_text("x")),
    "dangling class": lambda root, rng: (write_classes(root, ["blue"], rng), (root / "red").symlink_to("nowhere")),
    "class is itself": lambda root, rng: (write_classes(root, ["blue"], rng), (root / "red").symlink_to("red")),
    "strange files": lambda root, rng: (write_classes(root, ["blue"], rng), os.mkfifo(root / "blue" / "pipe")),
}  # fmt: skip
