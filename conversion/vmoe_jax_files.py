"""
Reads the checkpoint files of google-research/vmoe without JAX: `PREFIX.index`, which describes a tree of arrays, and
`PREFIX.data-nnnnn-of-NNNNN`, which hold them in chunks (that code's `checkpoints/partitioned.py`, both its versions).
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, starmap
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch

from m2mkd.errors import ConversionError


# The part of an array that a chunk holds: start and stop on each axis.
Box = tuple[tuple[int, int], ...]

_VERSIONS = (None, "20220622")
_MAP_OF_CHUNKS = "__msgpack_array_chunk_a87ca2__"
# extension types
_NDARRAY, _SLICE_ND, _INDEX_INFO = 1, 6, 8


@dataclass(frozen=True)
class Leaf:
    """An array as the index describes it: `chunks` gives the shard in which each of its parts lies."""

    shape: tuple[int, ...]
    dtype: str
    chunks: dict[Box, int]


class PartitionedCheckpoint:
    """
    A checkpoint in several files. Making it reads only the index; [`~PartitionedCheckpoint.read`] reads the arrays.

    Args:
        prefix (`Path`): What the names of the files have in common.

    Attributes:
        leaves (`dict[str, Leaf]`): The arrays by name, with `/` between the names of the tree. Their order is that in
            which the shards number them.

    Raises:
        `ConversionError`: a file is missing, damaged or too short; the message names it.
    """

    def __init__(self, prefix: Path):
        self.prefix, self.index_path = prefix, prefix.with_name(f"{prefix.name}.index")
        least: Counter[int] = Counter()
        with _named_if_damaged(self.index_path):
            content = msgpack.unpackb(self.index_path.read_bytes())
            if content.get("version") not in _VERSIONS:
                raise ValueError(f"its version is {content['version']!r}; only {_VERSIONS[1]!r} and none can be read")
            self.shard_count = content["shard_count"]
            self.leaves = dict(_leaves(content["index"]))
            for name, leaf in self.leaves.items():
                for box, shard in leaf.chunks.items():
                    if not 0 <= shard < self.shard_count:
                        raise ValueError(f"a chunk of `{name}` is in shard {shard}, but there are {self.shard_count}")
                    least[shard] += _volume(box) * _numpy_dtype(leaf.dtype).itemsize
        for shard in range(self.shard_count):
            self._check_size(self._shard_path(shard), least[shard])

    def read(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """
        Read arrays, shard by shard. Of a shard, only one chunk at a time is in memory.

        Args:
            names (`Collection[str]`): Names from `leaves`.

        Yields:
            Name and array, as soon as all chunks of the array are read.

        Raises:
            `ConversionError`: a shard is damaged, or does not hold what the index says; the message names it.
        """
        numbers = {number: name for number, name in enumerate(self.leaves) if name in names}
        left = {name: len(self.leaves[name].chunks) for name in names}
        arrays: dict[str, np.ndarray] = {}
        for shard in range(self.shard_count):
            path = self._shard_path(shard)
            expected = {(n, box) for n in names for box, where in self.leaves[n].chunks.items() if where == shard}
            with _named_if_damaged(path):
                for number, box, chunk in _chunks(path, numbers):
                    name, leaf = numbers[number], self.leaves[numbers[number]]
                    if (name, box) not in expected:
                        raise ValueError(f"{self.index_path.name} knows no such chunk of `{name}`: {box}")
                    expected.remove((name, box))
                    if name not in arrays:
                        arrays[name] = np.empty(leaf.shape, _numpy_dtype(leaf.dtype))
                    if chunk.dtype != arrays[name].dtype:
                        raise ValueError(f"`{name}` is {chunk.dtype}, in {self.index_path.name} {leaf.dtype}")
                    chunk = chunk.reshape([stop - start for start, stop in box])
                    arrays[name][tuple(slice(*ends) for ends in box)] = chunk
                    left[name] -= 1
                if expected:
                    raise ValueError(f"it has no chunk {min(expected)}, in contrast to {self.index_path.name}")
            for name in [name for name in arrays if not left[name]]:
                yield name, _tensor(arrays.pop(name), self.leaves[name].dtype)

    def _shard_path(self, shard: int) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.data-{shard:05d}-of-{self.shard_count:05d}")

    def _check_size(self, path: Path, least: int) -> None:
        if not path.is_file():
            there = sorted(other.name for other in path.parent.glob(f"{self.prefix.name}.data-*"))
            raise ConversionError(
                f"{path} is missing: {self.index_path.name} counts {self.shard_count} shards, and there are {there}. "
                "Put all files of the checkpoint into one folder."
            )
        if path.stat().st_size < least:
            raise ConversionError(
                f"{path} is cut off: it has {path.stat().st_size} bytes, and its arrays alone have {least}. Copy it "
                "again."
            )


@contextmanager
def _named_if_damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ConversionError(f"There is no file {path}.") from error
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        MemoryError,
        msgpack.UnpackException,
    ) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise ConversionError(
            f"{path} is damaged, or not of a checkpoint of google-research/vmoe: {reason}. Copy it again."
        ) from error


def _leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Leaf]]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _leaves(child, (*path, name))
    elif node is not None:
        yield "/".join(path), _leaf(node)


def _leaf(node: msgpack.ExtType) -> Leaf:
    if node.code != _INDEX_INFO:
        raise ValueError(f"an extension of type {node.code} stands where an array must be described")
    described, parts, shards = msgpack.unpackb(node.data)
    shape, dtype, *_ = msgpack.unpackb(described)
    boxes = [_box(part) for part in parts]
    within = all(0 <= start <= stop <= n for box in boxes for (start, stop), n in zip(box, shape, strict=True))
    if not within or sum(map(_volume, boxes)) != math.prod(shape) or any(starmap(_overlap, combinations(boxes, 2))):
        raise ValueError(f"the chunks {boxes} do not make up an array of shape {shape}")
    return Leaf(tuple(shape), dtype, dict(zip(boxes, shards, strict=True)))


def _chunks(path: Path, wanted: Collection[int]) -> Iterator[tuple[int, Box, np.ndarray]]:
    """Number of the array, its part, and the data, flat, of each chunk of the wanted arrays in a shard."""
    size, keys = path.stat().st_size, []
    with path.open("rb") as file:
        unpacker = msgpack.Unpacker(file, max_buffer_size=size, ext_hook=_extension)
        for _ in range(unpacker.read_map_header()):
            keys.append(unpacker.unpack())
            if keys[-1] == _MAP_OF_CHUNKS or int(keys[-1]) not in wanted:
                unpacker.skip()
                continue
            for _ in range(unpacker.read_array_header()):
                subchunks, box = unpacker.unpack()
                yield int(keys[-1]), box, subchunks[0] if len(subchunks) == 1 else np.concatenate(subchunks)
    if _MAP_OF_CHUNKS not in keys or unpacker.tell() != size:
        raise ValueError("it is not one map of chunks")


def _extension(code: int, data: bytes) -> np.ndarray | Box:
    if code == _SLICE_ND:
        return _box(data)
    if code != _NDARRAY:
        raise ValueError(f"an extension of type {code} stands among the chunks")
    _, dtype, values = msgpack.unpackb(data)
    return np.frombuffer(values, _numpy_dtype(dtype))


def _box(data: bytes) -> Box:
    slices = [msgpack.unpackb(part) for part in msgpack.unpackb(data)]
    if any(step not in (None, 1) for _, _, step in slices):
        raise ValueError(f"a chunk is a part with gaps: {slices}")
    return tuple((start, stop) for start, stop, _ in slices)


def _volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _overlap(one: Box, other: Box) -> bool:
    return all(start < end and begin < stop for (start, stop), (begin, end) in zip(one, other, strict=True))


def _numpy_dtype(name: str) -> np.dtype:
    # numpy knows no bfloat16
    dtype = np.dtype("uint16" if name == "bfloat16" else name)
    if dtype.kind not in "biuf":
        raise ValueError(f"{name!r} is no type of numbers")
    return dtype


def _tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
