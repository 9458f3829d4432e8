"""The teacher's hidden states and logits for every view of every training image, computed once and kept on disk."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from m2mkd.distillation.frozen_networks import FrozenNetworks, Tensors
from m2mkd.distillation.pair_folder import tensors_sha256
from m2mkd.distillation.split import count_layers, split_into_stages
from m2mkd.distillation.stage import Stage
from m2mkd.errors import CacheError, WriteError
from m2mkd.files import read_json, write_folder, write_json


CacheDtype = Literal["float16", "bfloat16", "float32"]
MANIFEST = "cache.json"
# A shard of all targets of some images is held in memory while it is written.
SHARD_BYTES = 2**28
_REPEAT = "Delete {folder}, and write the cache again."


class ViewedImages(Protocol):
    """A training set with a fixed number of views of each image, e.g. `ImageDataset`."""

    config: Any

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the view."""

    def fingerprint(self) -> dict[str, Any]:
        """What all views follow from, as plain values."""


class TargetCache:
    """
    What pairs with `context="teacher"` and `match="boundary"`, and ordinary distillation, need from the teacher: the
    hidden states between its stages and its logits. With it, the teacher is not needed any more.

    On disk, it is a folder with the teacher's `config.json`, `cache.json` and safetensors files, each with one target
    of one view of consecutive images: `boundary_<i>`, of shape `(images, num_tokens, hidden_size)`, behind stage `i -
    1`, or `logits`, of shape `(images, num_labels)`. The files are mapped into memory, so a process reads only the
    targets that it uses, and a machine needs only their files. (Shards of `datasets` would be copied through Arrow,
    which has no bfloat16.)

    Args:
        folder (`str` or `Path`): What [`TargetCache.write`] wrote.

    Raises:
        `CacheError`: the folder or one of its files is missing, damaged or truncated.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.content = read_json(self.folder / MANIFEST, CacheError, _REPEAT.format(folder=folder))
        self._open: dict[tuple[int, int, str], torch.Tensor] = {}

    @classmethod
    def write(
        cls,
        folder: str | Path,
        teacher: PreTrainedModel,
        depths: Sequence[int] | None,
        dataset: ViewedImages,
        dtype: CacheDtype = "float16",
        **options: Any,
    ) -> "TargetCache":
        """
        Run the teacher once over all views of a training set. The folder appears whole or not at all.

        Args:
            folder (`str` or `Path`)
            teacher (`PreTrainedModel`): It is frozen and moved to the device, in place.
            depths (`Sequence[int]`, *optional*): Layers in each of its stages. `None`: only the logits are kept, which
                is enough for ordinary distillation.
            dataset (`ImageDataset`): Training set without Mixup, CutMix and repeats; with `views` if it augments.
            dtype (`str`): How the targets are kept. float16 has the smaller error, bfloat16 no overflow.
            options: See [`write_targets`].

        Raises:
            `DataError`: the data set has no fixed views.
            `CacheError`: a target is not finite in `dtype`.
            `WriteError`: the disk is, or would be, full.
        """
        write_folder(
            Path(folder), lambda temporary: write_targets(temporary, teacher, depths, dataset, dtype, **options)
        )
        return cls(folder)

    @property
    def depths(self) -> list[int] | None:
        """Layers in each stage of the teacher; `None` if only the logits are kept."""
        return self.content["depths"]

    @property
    def teacher_sha256(self) -> str:
        """`tensors_sha256` of the teacher."""
        return self.content["teacher_sha256"]

    def teacher(self) -> PreTrainedModel:
        """The teacher's architecture, without weights."""
        with torch.device("meta"):
            return AutoModelForImageClassification.from_config(
                AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            )

    def check(self, **expected: Any) -> None:
        """
        Check what the cache was made from: any of `teacher_sha256`, `depths`, `dtype` and `data` (the `fingerprint` of
        the data set). Raises `CacheError`, which names the difference.
        """
        for name, value in expected.items():
            different = _difference(name, self.content.get(name), value)
            if different is not None:
                raise CacheError(
                    f"The cache {self.folder} was made with another {different}. Delete {self.folder} and write the "
                    "cache again, or use what it was made with."
                )

    def read(self, name: str, view: int, index: int) -> torch.Tensor:
        """
        Read one target (`"logits"` or `"boundary_<i>"`) of a view of an image, without its batch dimension.

        Raises:
            `CacheError`: its file is missing or truncated.
        """
        shard, place = divmod(index, self.content["shard_images"])
        key = view, shard, name
        if key not in self._open:
            self._open[key] = self._open_file(*key)
        return self._open[key][place]

    def check_files(self, names: Sequence[str]) -> None:
        """Check that all files of some targets are there and whole, by their sizes. Raises `CacheError`."""
        for path, size in self.content["files"].items():
            if Path(path).parent.name in names:
                _check_size(self.folder / path, size)

    def _open_file(self, view: int, shard: int, name: str) -> torch.Tensor:
        path = self.folder / _file_name(view, shard, name)
        _check_size(path, self.content["files"].get(_file_name(view, shard, name)))
        try:
            with safe_open(path, "pt") as file:
                # a view on the mapped file; nothing is read yet
                tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CacheError(f"{path} is damaged ({error}). {_REPEAT.format(folder=self.folder)}") from error
        if tensor.ndim < 2 or str(tensor.dtype) != f"torch.{self.content['dtype']}":
            given = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise CacheError(f"{path} is damaged (it holds {given}). {_REPEAT.format(folder=self.folder)}")
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files: each process of a data loader opens those that it reads."""
        return {**self.__dict__, "_open": {}}


class CachedTargets(FrozenNetworks):
    """
    Takes the place of the frozen networks of pairs that have a cache: inputs and targets come with the batch.

    Args:
        num_pairs (`int`): 1: the whole student (ordinary distillation).
        is_chained (`bool`): Whether only the first pair needs an input, because the student feeds the others.
    """

    def __init__(self, num_pairs: int, is_chained: bool = False):
        super().__init__([], {}, "boundary")
        self._states = ["pixel_values", *boundary_names(num_pairs), "logits"]
        self._is_chained = is_chained

    def _with_input(self, indices: Sequence[int]) -> Sequence[int]:
        return indices[:1] if self._is_chained else indices

    def names(self, indices: Sequence[int]) -> list[str]:
        """What a batch must have for some pairs: `pixel_values`, `boundary_<i>`, `logits`."""
        places = {*self._with_input(indices), *(index + 1 for index in indices)}
        return [self._states[place] for place in sorted(places)]

    def boundaries(self, batch: Mapping[str, torch.Tensor], indices: Sequence[int]) -> tuple[Tensors, Tensors]:
        """Take the inputs and targets of the pairs from the batch, as float32; batches to evaluate have no targets."""
        inputs = {index: batch[self._states[index]].float() for index in self._with_input(indices)}
        names = {index: self._states[index + 1] for index in indices}
        return inputs, {index: batch[name].float() for index, name in names.items() if name in batch}


def boundary_names(num_stages: int) -> list[str]:
    """The names of the hidden states between stages."""
    return [f"boundary_{index}" for index in range(1, num_stages)]


@torch.no_grad()
def write_targets(
    folder: Path,
    teacher: PreTrainedModel,
    depths: Sequence[int] | None,
    dataset: ViewedImages,
    dtype: CacheDtype,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
    num_workers: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """
    Fill the folder of a [`TargetCache`].

    Args:
        folder (`Path`): An empty folder.
        teacher, depths, dataset, dtype: See [`TargetCache.write`].
        device (`torch.device`), compute_dtype (`torch.dtype`): Where and how the teacher computes.
        batch_size (`int`), num_workers (`int`): Images per pass, and processes that prepare them.
        say (`Callable[[str], None]`): Announces the size before anything is computed.
    """
    views = dataset.config.fixed_views()
    content = {
        "teacher_sha256": tensors_sha256(teacher.state_dict()),
        "depths": None if depths is None else list(depths),
        "dtype": dtype,
        "data": dataset.fingerprint(),
    }
    stages = split_into_stages(teacher, depths or [count_layers(teacher)])
    for stage in stages:
        stage.to(device, compute_dtype).requires_grad_(False).eval()
    names = [*boundary_names(len(stages)), "logits"]
    run = partial(_targets, stages, names, torch.device(device), compute_dtype, getattr(torch, dtype))
    image_bytes = sum(target.nbytes for target in run(dataset[0]["pixel_values"][None]).values())
    size = image_bytes * len(dataset) * views
    _check_space(folder, size)
    say(f"{len(dataset):,} images x {views} views, {size / 2**30:.3g} GiB of {dtype}")

    batches = max(1, SHARD_BYTES // (image_bytes * batch_size))
    content |= {"shard_images": batches * batch_size, "files": {}}
    for view in range(views):
        dataset.set_epoch(view)
        loader = DataLoader(dataset, batch_size, num_workers=num_workers)
        for shard, chunk in enumerate(_chunks(loader, batches)):
            found = [run(batch["pixel_values"]) for batch in chunk]
            for name in names:
                target = torch.cat([targets[name] for targets in found])
                _check_finite(target, name, dtype)
                path = _file_name(view, shard, name)
                (folder / path).parent.mkdir(exist_ok=True)
                save_file({name: target}, folder / path)
                content["files"][path] = (folder / path).stat().st_size
    dataset.set_epoch(0)
    teacher.config.save_pretrained(folder)
    write_json(folder / MANIFEST, content)


def _targets(
    stages: Sequence[Stage],
    names: Sequence[str],
    device: torch.device,
    compute_dtype: torch.dtype,
    kept_dtype: torch.dtype,
    pixel_values: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The outputs of the teacher's stages by name, computed as in a training step, as they are kept."""
    hidden_states, outputs = pixel_values.to(device), {}
    with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
        for stage, name in zip(stages, names, strict=True):
            hidden_states = stage(hidden_states)
            outputs[name] = hidden_states.to("cpu", kept_dtype)
    return outputs


def _chunks(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batches = iter(batches)
    while chunk := list(islice(batches, size)):
        yield chunk


def _file_name(view: int, shard: int, name: str) -> str:
    return f"{name}/view-{view}-{shard:05d}.safetensors"


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise WriteError(
            f"The cache {folder.parent} needs {size / 2**30:.3g} GiB, but only {free / 2**30:.3g} GiB are free there. "
            "Free up disk space, or store fewer `views` of the images."
        )


def _check_finite(target: torch.Tensor, name: str, dtype: CacheDtype) -> None:
    if not target.isfinite().all():
        raise CacheError(
            f"The teacher's {name} is not finite in {dtype}. Use bfloat16, or check the teacher's weights "
            "if it is not finite there either."
        )


def _check_size(path: Path, size: int | None) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size or size is None:
        raise CacheError(
            f"{path} {'is missing' if found is None else f'has {found} bytes'}, but should have {size or 0} bytes. "
            f"{_REPEAT.format(folder=path.parent.parent)}"
        )


def _difference(name: str, there: Any, expected: Any) -> str | None:
    """The first difference of two plain values, in words."""
    if isinstance(there, dict) and isinstance(expected, dict):
        keys = dict.fromkeys([*there, *expected])
        return next(
            filter(None, (_difference(f"{name}.{key}", there.get(key), expected.get(key)) for key in keys)), None
        )
    return None if there == expected else f"{name} ({there}, not {expected})"
