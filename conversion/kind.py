"""What a kind of official checkpoint is: how its configuration and its tensors become a folder, and back."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from m2mkd.conversion.checkpoint_file import Checkpoint, read_checkpoint
from m2mkd.conversion.output import Output, Tensors
from m2mkd.errors import ConversionError


@dataclass
class Request:
    """
    What one conversion was given.

    Args:
        content (`dict[str, Any]`): The configuration as [`read_config`] read it; empty without `--config`.
        path (`Path`): File of the checkpoint, or what the names of its files begin with.
        stage (`int`, *optional*): `--stage`.
        num_stages (`int`, *optional*): `--num-stages`.
    """

    content: dict[str, Any]
    path: Path
    stage: int | None = None
    num_stages: int | None = None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint as [`read_checkpoint`] reads it. Raises `ConversionError`."""
        return read_checkpoint(self.path)


class Kind(ABC):
    """A kind of official checkpoint, as `--kind` names it."""

    name: ClassVar[str]
    needs_config: ClassVar[bool] = True

    @abstractmethod
    def convert(self, request: Request) -> Output:
        """What becomes of a checkpoint. Raises `ConversionError`."""


class ReversibleKind(Kind):
    """A kind of whole models that `--to-official` converts back."""

    model_class: ClassVar[type[PreTrainedModel]]

    @abstractmethod
    def described_model(self, content: dict[str, Any], official: Mapping[str, Any]) -> PreTrainedModel:
        """
        The whole model that a configuration describes, on the meta device.

        Args:
            content (`dict`): What [`read_config`] read.
            official (`Mapping[str, Any]`): Its tensors, which say where a V-MoE keeps stitches if `content` does not.

        Raises:
            `ConversionError`: the configuration describes no such model.
        """

    @abstractmethod
    def official_tensors(self, model: PreTrainedModel) -> Tensors:
        """The tensors of a whole model by their official names, without aliases."""

    def official_depths(self, content: dict[str, Any]) -> list[int] | None:
        """Layers of each stage that the official trainer keeps beside the whole model, if it keeps any."""
        return None


class StudentKind(Kind):
    """A kind of distilled stages; each stands for one of the stages of a whole model."""

    # of the paper's students, where nothing else says how many there are
    default_stages: ClassVar[int]
    least_stages: ClassVar[int] = 1

    def num_stages(self, request: Request) -> int:
        """Stages of the whole model: as said, else as many as the meta model's."""
        meta, given = request.content.get("meta"), request.num_stages
        if given is None and isinstance(meta, Mapping) and "divided_depths" in meta:
            given = len(meta["divided_depths"])
        number = self.default_stages if given is None else given
        if number < self.least_stages:
            raise ConversionError(f"--num-stages must be at least {self.least_stages}, but is {number}.")
        return number


def known_index(path: Path, content: Mapping[str, Any], given: int | None, num_stages: int) -> int | None:
    """Which stage a student is: as said, else by the file's name, else by the configuration."""
    if given is not None:
        return given
    name = re.match(r"(ReadIn|Mediator|ReadOut)Student(?:_(\d+))?$", path.stem)
    if name and (name[1] != "Mediator" or name[2]):
        return int(name[2]) if name[1] == "Mediator" else {"ReadIn": 0, "ReadOut": num_stages - 1}[name[1]]
    index = content.get("idx")
    return index % num_stages if index is not None and index < 0 else index


def checked_index(index: int | None, num_stages: int) -> int:
    """The index, which must be known and that of a stage. Raises `ConversionError`."""
    if index is None:
        raise ConversionError(
            "neither the name of the checkpoint (ReadInStudent, MediatorStudent_3, ReadOutStudent) nor the "
            "configuration says which stage it is. Give --stage, from 0."
        )
    if not 0 <= index < num_stages:
        raise ConversionError(f"there is no stage {index} of {num_stages}. Give --stage and --num-stages.")
    return index


def stitch_size_of(official: Mapping[str, Any], post: str, pre: str) -> int:
    """Width of the meta model, from the shape of a stitch; 0 if there is none."""
    if getattr(official.get(post), "ndim", 0) == 2:
        return official[post].shape[0]
    return official[pre].shape[1] if getattr(official.get(pre), "ndim", 0) == 2 else 0
