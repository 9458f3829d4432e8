"""The checkpoint files of google-research/vmoe are read exactly, lazily, and not at all if they are damaged."""

import json
import random
import shutil
import tracemalloc
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from jax_files import slice_nd, write_checkpoint, write_index
from safetensors.torch import load_file

from m2mkd.conversion.vmoe_jax_files import PartitionedCheckpoint
from m2mkd.errors import ConversionError


CASES = sorted((Path(__file__).parent / "vmoe_jax").glob("checkpoint_*"), key=lambda path: path.name)


def restored(prefix: Path) -> dict[str, torch.Tensor]:
    checkpoint = PartitionedCheckpoint(prefix)
    return dict(checkpoint.read(checkpoint.leaves))


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Files to be damaged: chunks of one array in three shards."""
    shutil.copytree(next(case for case in CASES if case.name == "checkpoint_v1_sharded"), tmp_path / "case")
    return tmp_path / "case" / "ckpt"


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_every_array_is_that_of_the_code(case: Path) -> None:
    leaves = json.loads((case / "config.json").read_text())["leaves"]
    expected, ours = load_file(case / "params.safetensors"), restored(case / "ckpt")
    assert list(PartitionedCheckpoint(case / "ckpt").leaves) == [leaf["name"] for leaf in leaves]
    assert ours.keys() == expected.keys()
    for leaf in leaves:
        array = ours[leaf["name"]]
        assert (list(array.shape), str(array.dtype)) == (leaf["shape"], f"torch.{leaf['dtype']}")
        # the case holds bfloat16 as float32
        assert torch.equal(array.to(expected[leaf["name"]].dtype), expected[leaf["name"]]), leaf["name"]


def test_only_what_is_asked_for_is_read(prefix: Path) -> None:
    ((name, array),) = PartitionedCheckpoint(prefix).read(["cls"])
    assert name == "cls" and torch.equal(array, load_file(prefix.parent / "params.safetensors")["cls"])


@pytest.mark.parametrize("name", ["ckpt.index", "ckpt.data-00000-of-00003", "ckpt.data-00002-of-00003"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_a_file_that_is_cut_off_is_named(prefix: Path, name: str, kept: float) -> None:
    path = prefix.with_name(name)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ConversionError, match=rf"{name} is (damaged|cut off)"):
        restored(prefix)


def test_a_changed_byte_changes_a_value_or_is_reported(prefix: Path) -> None:
    expected = {name: array.shape for name, array in restored(prefix).items()}
    paths = sorted(prefix.parent.glob("ckpt.*"))
    reported = 0
    for seed in range(200):
        generator = random.Random(seed)
        path = generator.choice(paths)
        content = bytearray(path.read_bytes())
        position = generator.randrange(len(content))
        content[position] ^= 1 << generator.randrange(8)
        intact = path.read_bytes()
        path.write_bytes(content)
        try:
            shapes = sorted(array.shape for array in restored(prefix).values())
            assert shapes == sorted(expected.values())
        except ConversionError as error:
            assert path.name in str(error)
            reported += 1
        path.write_bytes(intact)
    assert reported > 20


def test_a_missing_shard_is_named(prefix: Path) -> None:
    prefix.with_name("ckpt.data-00001-of-00003").unlink()
    with pytest.raises(ConversionError, match=r"data-00001-of-00003 is missing: ckpt.index counts 3 shards.*00002-of"):
        PartitionedCheckpoint(prefix)
    with pytest.raises(ConversionError, match=r"There is no file .*other\.index"):
        PartitionedCheckpoint(prefix.with_name("other"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_count": 4}, "data-00000-of-00004 is missing: ckpt.index counts 4 shards"),
        ({"shard_count": 2}, "ckpt.index is damaged.*is in shard 2, but there are 2"),
        ({"version": "20300101"}, "ckpt.index is damaged.*version is '20300101'"),
        ({"index": {"cls": [1, 2]}}, "ckpt.index is damaged"),
    ],
)
def test_a_wrong_index_is_refused(prefix: Path, change: dict, message: str) -> None:
    content = msgpack.unpackb(prefix.with_name("ckpt.index").read_bytes())
    write_index(prefix, {**content, **change})
    with pytest.raises(ConversionError, match=message):
        PartitionedCheckpoint(prefix)


@pytest.mark.parametrize("boxes", [[(0, 2)], [(0, 3), (2, 4)], [(0, 2), (0, 2)], [(0, 2), (2, 5)], [(2, 0), (0, 6)]])
def test_chunks_must_make_up_the_array(tmp_path: Path, boxes: list[tuple[int, int]]) -> None:
    described = msgpack.packb([[4], "float32", False, {}])
    leaf = msgpack.packb([described, [slice_nd([box]) for box in boxes], [0] * len(boxes)])
    write_index(tmp_path / "it", {"shard_count": 1, "index": {"a": msgpack.ExtType(8, leaf)}, "version": "20220622"})
    with pytest.raises(ConversionError, match=r"do not make up an array of shape \[4\]"):
        PartitionedCheckpoint(tmp_path / "it")


def test_a_shard_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one", {"a": np.zeros(8, "float32"), "b": np.zeros(2, "float32")}, 2)
    for other in ({"a": np.zeros(8, "int32")}, {"a": np.zeros((4, 2), "float32")}, {"b": np.zeros(8, "float32")}):
        write_checkpoint(tmp_path / "two", {"0": np.zeros(0, "float32"), **other} if "b" in other else other)
        shutil.copy(tmp_path / "two.data-00000-of-00001", tmp_path / "one.data-00000-of-00002")
        with pytest.raises(ConversionError, match="one.data-00000-of-00002 is damaged"):
            restored(tmp_path / "one")


@pytest.mark.parametrize("num_shards", [1, 4])
def test_memory_is_one_copy_and_one_shard(tmp_path: Path, num_shards: int) -> None:
    arrays = {f"layer_{i}": np.full((8, 131072), i, "float32") for i in range(12)}
    write_checkpoint(tmp_path / "it", arrays, num_shards, pieces=4)
    copy = sum(array.nbytes for array in arrays.values())
    tracemalloc.start()
    ours = restored(tmp_path / "it")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(torch.equal(ours[name], torch.from_numpy(array)) for name, array in arrays.items())
    assert copy < peak < copy + copy / num_shards
