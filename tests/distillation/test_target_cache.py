"""Targets on disk."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from testing_utils import NUM_LABELS, images, vit

from m2mkd import TargetCache, split_into_stages
from m2mkd.distillation import target_cache
from m2mkd.distillation.pair_folder import tensors_sha256
from m2mkd.distillation.target_cache import CachedTargets
from m2mkd.errors import CacheError, WriteError


DEPTHS = [1, 2]


class Views:
    """Seven images with two views each."""

    def __init__(self) -> None:
        self.config, self.epoch = self, 0

    def fixed_views(self) -> int:
        return 2

    def fingerprint(self) -> dict[str, Any]:
        return {"seed": 0}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": images(7, seed=self.epoch)[index]}


def write(folder: Path, depths: list[int] | None = DEPTHS, dtype: str = "float32", **options: Any) -> TargetCache:
    return TargetCache.write(folder, vit(), depths, Views(), dtype, batch_size=2, **{"say": len, **options})


def expected(view: int) -> dict[str, torch.Tensor]:
    first, last = split_into_stages(vit(), DEPTHS)
    with torch.no_grad():
        boundary = first(images(7, seed=view))
        return {"boundary_1": boundary, "logits": last(boundary)}


class TestTargetCache:
    @pytest.mark.parametrize("shard_bytes", [1, 2**28])
    @pytest.mark.parametrize("dtype, rtol", [("float32", 1e-5), ("float16", 2**-10), ("bfloat16", 2**-7)])
    def test_each_view_of_each_image(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, dtype: str, rtol: float
    ) -> None:
        monkeypatch.setattr(target_cache, "SHARD_BYTES", shard_bytes)
        cache = write(tmp_path / "cache", dtype=dtype)
        assert len(list(cache.folder.glob("logits/*"))) == (8 if shard_bytes == 1 else 2)
        for view in range(2):
            for name, targets in expected(view).items():
                ours = torch.stack([cache.read(name, view, index) for index in range(7)])
                assert ours.dtype == getattr(torch, dtype)
                torch.testing.assert_close(ours.float(), targets, rtol=rtol, atol=1e-5)

    def test_without_depths_it_has_only_the_logits(self, tmp_path: Path) -> None:
        cache = write(tmp_path / "cache", depths=None)
        assert [path.name for path in cache.folder.iterdir() if path.is_dir()] == ["logits"]
        torch.testing.assert_close(cache.read("logits", 1, 6), expected(1)["logits"][6])

    def test_it_knows_its_teacher_without_its_weights(self, tmp_path: Path) -> None:
        cache = write(tmp_path / "cache")
        assert cache.teacher_sha256 == tensors_sha256(vit().state_dict())
        assert cache.teacher().num_labels == NUM_LABELS
        assert all(parameter.is_meta for parameter in cache.teacher().parameters())

    def test_the_size_is_announced_first(self, tmp_path: Path) -> None:
        said: list[str] = []
        cache = write(tmp_path / "cache", say=said.append)
        # 2 views x 7 images x (5 tokens of 12 channels and the logits) x 4 bytes
        assert said == [f"7 images x 2 views, {2 * 7 * (5 * 12 + NUM_LABELS) * 4 / 2**30:.3g} GiB of float32"]
        stored = sum(path.stat().st_size for path in cache.folder.glob("*/*"))
        assert 0 <= stored - 2 * 7 * (5 * 12 + NUM_LABELS) * 4 < 1000

    def test_a_copy_for_another_process_opens_its_own_files(self, tmp_path: Path) -> None:
        cache = write(tmp_path / "cache")
        cache.read("logits", 0, 0)
        copy = pickle.loads(pickle.dumps(cache))
        assert torch.equal(copy.read("logits", 0, 1), cache.read("logits", 0, 1))


def truncate(folder: Path) -> None:
    path = next(folder.glob("logits/*"))
    path.write_bytes(path.read_bytes()[:-1])


def corrupt_header(folder: Path) -> None:
    path = next(folder.glob("logits/*"))
    path.write_bytes(b"\xff" * path.stat().st_size)


class TestDamage:
    @pytest.mark.parametrize(
        "damage, words",
        [
            (truncate, "has .* bytes, but should have"),
            (corrupt_header, "is damaged"),
            (lambda folder: shutil.rmtree(folder / "logits"), "is missing"),
            (lambda folder: (folder / "cache.json").unlink(), "cache.json is missing"),
            (lambda folder: (folder / "cache.json").write_text("{"), "cache.json is damaged"),
        ],
        ids=["truncated", "overwritten", "half-copied", "without its description", "with a cut description"],
    )
    def test_it_is_noticed(self, tmp_path: Path, damage: Callable[[Path], Any], words: str) -> None:
        damage(write(tmp_path / "cache").folder)
        with pytest.raises(CacheError, match=f"{words}.*Delete {tmp_path / 'cache'}"):
            cache = TargetCache(tmp_path / "cache")
            [cache.read("logits", view, index) for view in range(2) for index in range(7)]

    @pytest.mark.parametrize(
        "expected, words",
        [
            ({"teacher_sha256": "x"}, "another teacher_sha256"),
            ({"depths": [2, 1]}, r"another depths \(\[1, 2\], not \[2, 1\]\)"),
            ({"dtype": "float16"}, "another dtype"),
            ({"data": {"seed": 1}}, r"another data.seed \(0, not 1\)"),
        ],
    )
    def test_what_it_was_made_from(self, tmp_path: Path, expected: dict[str, Any], words: str) -> None:
        cache = write(tmp_path / "cache")
        cache.check(teacher_sha256=cache.teacher_sha256, depths=DEPTHS, dtype="float32", data={"seed": 0})
        with pytest.raises(CacheError, match=f"{words}.*write the cache again"):
            cache.check(**expected)

    def test_a_write_that_dies_leaves_no_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(target_cache, "save_file", full)
            with pytest.raises(WriteError, match="No space left on device.*Free up disk space"):
                write(tmp_path / "cache")
        assert not (tmp_path / "cache").exists()
        assert write(tmp_path / "cache").read("logits", 0, 0).shape == (NUM_LABELS,)

    def test_too_little_space_is_noticed_before_anything_is_computed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(WriteError, match="needs .* GiB, but only .* GiB are free"):
            write(tmp_path / "cache", say=lambda text: pytest.fail("it went on"))

    def test_a_target_that_overflows_is_refused(self, tmp_path: Path) -> None:
        teacher = vit()
        teacher.classifier.bias.data.fill_(1e5)
        with pytest.raises(CacheError, match="logits is not finite in float16. Use bfloat16"):
            TargetCache.write(tmp_path / "cache", teacher, DEPTHS, Views(), "float16", say=len)
        assert not (tmp_path / "cache").exists()


class TestCachedTargets:
    BATCH = {
        name: torch.full((2,), value).half()
        for name, value in {"pixel_values": 0.0, "boundary_1": 1.0, "boundary_2": 2.0, "logits": 3.0}.items()
    }

    @pytest.mark.parametrize(
        "is_chained, indices, inputs, targets",
        [
            (False, [0, 1, 2], {0: 0, 1: 1, 2: 2}, {0: 1, 1: 2, 2: 3}),
            (False, [1], {1: 1}, {1: 2}),
            (True, [0, 1], {0: 0}, {0: 1, 1: 2}),
        ],
    )
    def test_they_come_with_the_batch(
        self, is_chained: bool, indices: list[int], inputs: dict[int, int], targets: dict[int, int]
    ) -> None:
        cached = CachedTargets(3, is_chained)
        batch = {name: self.BATCH[name] for name in cached.names(indices)}
        for found, wanted in zip(cached.inputs_and_targets(batch, indices), (inputs, targets), strict=True):
            assert {index: int(value[0]) for index, value in found.items()} == wanted
            assert all(value.dtype == torch.float32 for value in found.values())
