"""Writes what google-research/vmoe's `save_checkpoint` writes: an index and shards, in its version 20220622."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np


def slice_nd(starts_and_stops: list[tuple[int, int]]) -> bytes:
    return msgpack.packb([msgpack.packb([start, stop, None]) for start, stop in starts_and_stops])


def write_checkpoint(prefix: Path, arrays: Mapping[str, np.ndarray], num_shards: int = 1, pieces: int = 1) -> Path:
    """Arrays of which `pieces` divides the first axis are cut into as many chunks; the chunks go round the shards."""
    index: dict[str, Any] = {}
    shards: list[dict[str, Any]] = [{"__msgpack_array_chunk_a87ca2__": True} for _ in range(num_shards)]
    turn = 0
    for number, name in enumerate(sorted(arrays, key=lambda name: name.split("/"))):
        array, boxes, where = arrays[name], [], []
        cut = pieces if array.ndim and array.shape[0] % pieces == 0 else 1
        for piece in range(cut):
            box = [(0, size) for size in array.shape]
            if cut > 1:
                step = array.shape[0] // cut
                box[0] = (piece * step, (piece + 1) * step)
            values = np.ascontiguousarray(array[tuple(slice(*ends) for ends in box)])
            data = msgpack.packb([[values.size], array.dtype.name, values.tobytes()])
            chunk = [[msgpack.ExtType(1, data)], msgpack.ExtType(6, slice_nd(box))]
            shards[turn % num_shards].setdefault(str(number), []).append(chunk)
            boxes.append(slice_nd(box))
            where.append(turn % num_shards)
            turn += 1
        node = index
        *branches, leaf = name.split("/")
        for branch in branches:
            node = node.setdefault(branch, {})
        described = msgpack.packb([list(array.shape), array.dtype.name, False, {}])
        node[leaf] = msgpack.ExtType(8, msgpack.packb([described, boxes, where]))
    write_index(prefix, {"shard_count": num_shards, "index": index, "version": "20220622"})
    for shard, content in enumerate(shards):
        path = prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{num_shards:05d}")
        path.write_bytes(msgpack.packb(content))
    return prefix


def write_index(prefix: Path, content: Mapping[str, Any]) -> None:
    prefix.with_name(f"{prefix.name}.index").write_bytes(msgpack.packb(content))
