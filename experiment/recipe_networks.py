"""Checks before anything is trained that a recipe's networks fit their depths, each other and the images."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from m2mkd.data.config import DataConfig
from m2mkd.data.known_sets import known_set
from m2mkd.data.processing import build_image_processor
from m2mkd.distillation.checks import check_same_normalization, check_stitchable
from m2mkd.distillation.load import config_with_new_head, load_network_config, load_processor
from m2mkd.distillation.meta_from_teacher import meta_from_teacher
from m2mkd.distillation.split import split_into_stages, stage_class
from m2mkd.distillation.upcycling import upcycle_into
from m2mkd.errors import StageError
from m2mkd.experiment.networks import build_config, fit_to_data
from m2mkd.experiment.plan.step_cost import build_on_meta
from m2mkd.experiment.recipe import NetworkSpec, Recipe
from m2mkd.experiment.run_data import RunData


class RecipeNetworks:
    """
    The networks that the arms of a recipe need, on the meta device, without memory for their weights. The runner, the
    plan and the miniature build them first, so that a recipe that cannot run fails here.

    Args:
        recipe (`Recipe`)
        class_names (`Callable[[str], Sequence[str]]`): The classes of a training set, by its name.

    Attributes:
        meta_depths (`list[int]`): Layers in each stage of the meta model.
        teacher (`PreTrainedModel`, *optional*): The teacher for the images of `distill.data`.
        meta (`PreTrainedModel`, *optional*): The meta model.

    Raises:
        `RecipeError`: a configuration is not valid.
        `StageError`: depths do not add up, networks do not fit together, or the teacher cannot be loaded or is
            untrained.
        `DataError`: the teacher has no image processor.
    """

    def __init__(self, recipe: Recipe, class_names: Callable[[str], Sequence[str]]):
        self.recipe, self._class_names = recipe, class_names
        self.meta_depths = recipe.meta_depths
        arms = recipe.all_arms.values()
        self._is_modular = any(arm.is_modular for arm in arms)
        # training sets on which a student learns from the whole teacher
        self._taught = sorted({recipe.data_of(arm) for arm in arms if arm.has_teacher})
        has_teacher = any("teacher" in arm.extra for arm in arms)
        self.is_incubated = has_teacher and recipe.is_incubated
        self._uses_meta = self._is_modular and recipe.distill.context == "meta"
        self.teacher = self._teacher() if has_teacher else None
        self.meta: PreTrainedModel | None = None
        if self._uses_meta or self.is_incubated:
            self.meta = (
                meta_from_teacher(self.teacher, recipe.teacher.depths, self.meta_depths)
                if recipe.is_aligned
                else self.build(recipe.meta.model, recipe.meta.data)
            )
        self._check_networks()
        self._check_processors()

    def build(self, spec: NetworkSpec, data: str) -> PreTrainedModel:
        """Build a network of the recipe for one of its training sets."""
        return build_on_meta(build_config(spec, self.recipe.data[data], self._class_names(data)))

    def _teacher(self) -> PreTrainedModel:
        spec, data = self.recipe.teacher, self.recipe.distill.data
        if spec.model is not None:
            teacher = self.build(spec.model, spec.data)
        elif spec.probe:
            teacher = build_on_meta(config_with_new_head(spec.pretrained, self._class_names(spec.data)))
        else:
            teacher = build_on_meta(load_network_config(spec.pretrained))
        fit_to_data(teacher, self.recipe.data[data], self._class_names(data))
        return teacher

    def _check_networks(self) -> None:
        """Check that the networks fit each other."""
        recipe = self.recipe
        used = {recipe.distill.data, *map(recipe.data_of, recipe.all_arms.values())}
        students = {data: self.build(recipe.student.model, data) for data in sorted(used)}
        distilled = students[recipe.distill.data]
        cuts = (
            (distilled, recipe.student.depths),
            (self.teacher, recipe.teacher.depths),
            (self.meta, self.meta_depths),
        )
        for network, depths in cuts:
            if network is not None and depths is not None:
                split_into_stages(network, depths)
        if self.is_incubated:
            check_stitchable(self.build(recipe.teacher.model, recipe.teacher.data).config, None, self.meta.config)
        if self._is_modular:
            self._check_pairs(distilled)
        for data in self._taught:
            check_stitchable(students[data].config, self.teacher.config, None)
        for arm in recipe.all_arms.values():
            if arm.spec.init == "upcycled" and arm.source.phase is None:
                upcycle_into(students[recipe.data_of(arm)], self.teacher)

    def _check_pairs(self, student: PreTrainedModel) -> None:
        spec = self.recipe.distill
        check_stitchable(student.config, self.teacher.config, (self.meta if self._uses_meta else self.teacher).config)
        if spec.match == "boundary" and not stage_class(type(self.teacher)).is_meta_source:
            raise StageError(
                f"`distill.match` is boundary, but the hidden states of the teacher, a {type(self.teacher).__name__}, "
                "are not tokens of an image that a module could match. Set `distill.match` to logits, or use a ViT, "
                "DeiT, DINOv2 or V-MoE as the teacher."
            )

    def _check_processors(self) -> None:
        """Check that networks trained on one data set and used on another get the same pixels."""
        recipe, distill = self.recipe, self.recipe.distill.data
        if self.teacher is None:
            return
        spec = recipe.teacher
        name = "teacher" if spec.pretrained is None else f"teacher {spec.pretrained}"
        teacher = load_processor(spec.pretrained) if spec.pretrained else build_image_processor(recipe.data[spec.data])
        if spec.probe:
            check_pixels(spec.data, recipe.data[spec.data], name, teacher, any_size=True)
            teacher = build_image_processor(recipe.data[spec.data])
        if self._is_modular:
            check_pixels(distill, recipe.data[distill], name, teacher)
        if self._uses_meta:
            meta = build_image_processor(recipe.data[recipe.meta.data])
            check_pixels(distill, recipe.data[distill], "meta model", meta)
        for data in self._taught:
            check_pixels(data, recipe.data[data], name, teacher)


def check_pixels(
    data: str, config: DataConfig, network: str, processor: BaseImageProcessor, any_size: bool = False
) -> None:
    """
    Check that a data set feeds a network the pixels that it was trained on.

    Args:
        data (`str`), config (`DataConfig`): Name of the data set in the recipe, and its configuration.
        network (`str`), processor (`BaseImageProcessor`): Name of the network in messages, and its image processor.
        any_size (`bool`): Whether the size may differ, as for a network whose head is not fitted yet.

    Raises:
        `StageError`: mean, standard deviation, rescaling or size differ.
    """
    check_same_normalization(build_image_processor(config), processor, (f"data set {data!r}", network), any_size)


def class_names_without_images(data: RunData, name: str) -> list[str]:
    """
    List the classes of a training set; those of a published set are known without its images.

    Raises:
        `DataError`: it is not a published set, and its images cannot be loaded.
    """
    config = data.config(name)
    known = known_set(config.source)
    return data.class_names(name) if known is None or config.partial else known.classes
