"""Recipes: what a run trains, on which data, for how long."""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

from m2mkd.data.config import DataConfig
from m2mkd.distillation.split import stage_class_of_type
from m2mkd.distillation.target_cache import CacheDtype
from m2mkd.errors import DataError
from m2mkd.experiment.arms import DEFAULT_ARMS, PRESETS, Arm, ArmSpec, named_specs, resolve
from m2mkd.experiment.section import FolderName, Section, Training
from m2mkd.trainer.m2mkd_config import check_feed


# true: the type with the smallest error among those of two bytes; false: no cache
Cache = Annotated[CacheDtype | None, BeforeValidator(lambda value: {True: "float16", False: None}.get(value, value))]


class NetworkSpec(Section):
    """
    A network to build.

    Args:
        model_type (`str`): As in transformers: `"vit"`, `"deit"`, `"dinov2"`, `"nac"`, `"vmoe"`.
        preset (`str`, *optional*): A size of `VMoEConfig.from_preset` or `NACConfig.from_preset`.
        config (`dict`): Fields of the model's configuration. Image size and labels are set from the data.
    """

    model_type: Literal["vit", "deit", "dinov2", "nac", "vmoe"]
    preset: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)


class MetaSpec(Section):
    """
    The meta model [PT].

    Args:
        init (`str`): `"random"`: `model` is trained with the labels, and the teacher can be incubated inside it.
            `"from_teacher"`: it is made from the teacher, whose stage boundaries its layers learn; any pretrained ViT
            can be the teacher.
        model (`NetworkSpec`, *optional*): Network to train. With `from_teacher`, the architecture is the teacher's.
        depths (`list[int]`, *optional*): Layers in each stage. `None`: one per stage.
        data (`str`): Name of the training set; `from_teacher` does not read its labels.
        training (`dict`): Training arguments.
    """

    init: Literal["random", "from_teacher"] = "random"
    model: NetworkSpec | None = None
    depths: list[int] | None = None
    data: str
    training: Training = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source(self) -> "MetaSpec":
        if (self.init == "random") == (self.model is None):
            raise ValueError(
                "give either `model` (the network to train) or `init: from_teacher` (the teacher's architecture)"
            )
        return self


class TeacherSpec(Section):
    """
    The teacher: incubated inside the meta model and fine-tuned [MT + FT], or a published one. With
    `meta.init: from_teacher` there is no meta model yet to incubate in: a `model` is trained only by `finetuning`.

    Args:
        pretrained (`str`, *optional*): Hub id or folder of a trained classifier. Of the other keys, only `depths`,
            `probe` and `data` are read.
        probe (`bool`): Whether `pretrained` is only a backbone, or a classifier for other classes: a linear head is
            fitted to its features of `data` first (see [`fit_probe`]).
        model (`NetworkSpec`, *optional*): Network to incubate.
        depths (`list[int]`, *optional*): Layers in each stage. A pretrained network that only teaches as a whole does
            not need them.
        data (`str`, *optional*): Name of the training set.
        incubation, finetuning (`dict`): Training arguments of the two steps.
    """

    pretrained: str | None = None
    probe: bool = False
    model: NetworkSpec | None = None
    depths: list[int] | None = None
    data: str | None = None
    incubation: Training = Field(default_factory=dict)
    finetuning: Training = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source(self) -> "TeacherSpec":
        if (self.pretrained is None) == (self.model is None):
            raise ValueError("give either `pretrained` (a Hub id or folder) or `model` (the network to train)")
        if (self.model is not None or self.probe) and self.data is None:
            raise ValueError("`data` is missing; name the data set that the teacher is trained on")
        if self.probe and self.pretrained is None:
            raise ValueError("`probe` is only for a `pretrained` network; leave it out")
        if self.model is not None and self.depths is None:
            raise ValueError("`depths` is missing; give the number of layers in each stage")
        return self


class StudentSpec(Section):
    """
    The student.

    Args:
        model (`NetworkSpec`): Network to train.
        depths (`list[int]`): Layers in each of its stages.
    """

    model: NetworkSpec
    depths: list[int]


class DistillSpec(Section):
    """
    The distillation of the pairs [m2mKD].

    Args:
        data (`str`): Name of the training set.
        pairs (`list[int]` or `"all"`): The pairs that this process trains, counted from 0.
        context, match, feed, stitch_init (`str`): See [`M2MKDConfig`]. The paper's are `"meta"`, `"logits"`,
            `"teacher"` and `"random"`.
        cache (`bool` or `str`): Store the teacher's hidden states and logits for all images once, as `"float16"`
            (`true`), `"bfloat16"` or `"float32"`, and read them instead of running the teacher. All seeds share them,
            so the images are augmented with the recipe's `seed`. Needs `context: teacher`, `match: boundary`, and
            `views` of the data set if it is augmented.
        training (`dict`): Training arguments.
    """

    _has_teacher = True
    data: str
    cache: Cache = None
    pairs: list[int] | Literal["all"] = "all"
    context: Literal["meta", "teacher"] = "meta"
    match: Literal["logits", "boundary"] = "logits"
    feed: Literal["teacher", "student"] = "teacher"
    stitch_init: Literal["random", "least_squares"] = "random"
    training: Training = Field(default_factory=dict)

    def arguments(self) -> Training:
        """The fields that are arguments of the trainer."""
        return {name: getattr(self, name) for name in ("context", "match", "feed", "stitch_init")}


class FinetuneSpec(Section):
    """
    The end-to-end phase [FT / E2E], the same for every arm.

    Args:
        data (`str`): Name of the training set.
        keep_stitches (`bool`): Keep the stitches between the modules of a distilled V-MoE, and train them too.
        training (`dict`): Training arguments.
    """

    data: str
    keep_stitches: bool = False
    training: Training = Field(default_factory=dict)


class KDSpec(Section):
    """
    Ordinary distillation from the whole teacher.

    Args:
        cache (`bool` or `str`): As in `distill`, for the logits on the training sets of all arms that learn from the
            teacher.
        training (`dict`): Arguments that differ from the end-to-end phase, e.g. `alpha`.
    """

    _has_teacher = True
    cache: Cache = None
    training: Training = Field(default_factory=dict)


class UpcycleSpec(Section):
    """
    The dense network that the experts of upcycled arms are copies of (sparse upcycling, arXiv 2212.05055).

    Args:
        source (`str`): `"dense"`: the student without experts, trained here; or `"teacher"`, if it has the student's
            sizes.
        supervision (`str`): What the dense network learns from: `"labels"`, or `"teacher"`.
        data (`str`, *optional*): Name of its training set. `None`: that of `finetune`.
        training (`dict`): Training arguments that override those of `finetune` (and `kd`).
    """

    _has_teacher = True
    source: Literal["dense", "teacher"] = "dense"
    supervision: Literal["labels", "teacher"] = "labels"
    data: str | None = None
    training: Training = Field(default_factory=dict)


class EvaluationSpec(Section):
    """
    The tests.

    Args:
        iid (`str`): Name of the test set.
        ood (`str`, *optional*): Name of a test set with another distribution of the same classes.
    """

    iid: str
    ood: str | None = None


Engine = Literal["local", "ray"]
PhaseKind = Literal["meta", "teacher", "cache", "pairs", "dense", "arms"]


class Resources(Section):
    """
    What a phase needs of one node of a Ray cluster.

    Args:
        gpus (`float`, *optional*): GPUs. A fraction: several phases share one. More than 1: so many processes
            (torchrun) share the phase. `None`: 1, or 0 if the cluster has no GPU.
        cpus (`float`): CPU cores, and threads of the phase.
    """

    gpus: float | None = Field(default=None, ge=0)
    cpus: float = Field(default=1, ge=0)

    @field_validator("gpus", "cpus")
    @classmethod
    def _whole_above_one(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and not value.is_integer():
            raise ValueError("above 1, it must be a whole number: only one device or core can be shared")
        return value


class Recipe(Section):
    """
    A whole experiment.

    Args:
        name (`str`): Name in the report.
        output_dir (`str`): Folder of the run.
        seed (`int`): Seed of weights, data order and augmentation.
        repeat_seeds (`list[int]`): Repeat distillation and arms with these seeds, sharing meta model and teacher.
        arms (`list` or `dict`): The arms to run, see `ArmSpec`: names of presets, or `{name: {init: …, supervision: …,
            data: …, training: …, budget: …}}`.
        equal_compute (`bool`): Also run each other arm with the FLOPs of the first arm that starts from modules. The
            FLOPs of its distillation become extra epochs of the others (`budget: {flops_of: …}`). An arm that takes
            more FLOPs anyway is not run again; its result counts for both.
        processes (`int`, *optional*): Number of phases to run at once on this machine, each in its own process with
            its part of the threads. `None`: on a CPU, one per arm and seed, but no more than there are threads; 1 with
            a GPU, or if several processes share each phase (torchrun).
        engine (`str`): Where phases run: `"local"`: on this machine; `"ray"`: on the nodes of a Ray cluster.
        resources (`dict[str, Resources]`): For Ray, by kind of phase: `meta`, `teacher`, `cache`, `pairs` (each pair),
            `dense`, `arms` (each arm).
        data (`dict[str, DataConfig]`): Data sets by name; the phases refer to them.
        training (`dict`): Training arguments of every phase; those of a single phase override them.
    """

    name: str
    output_dir: str
    seed: int = Field(default=0, ge=0, lt=2**31)
    repeat_seeds: list[int] = Field(default_factory=list)
    arms: dict[FolderName, ArmSpec] = Field(
        default_factory=lambda: {name: PRESETS[name] for name in DEFAULT_ARMS}, min_length=1
    )
    equal_compute: bool = False
    processes: int | None = Field(default=None, ge=1)
    engine: Engine = "local"
    resources: dict[PhaseKind, Resources] = Field(default_factory=dict)
    data: dict[FolderName, DataConfig]
    training: Training = Field(default_factory=dict)
    meta: MetaSpec | None = None
    teacher: TeacherSpec
    student: StudentSpec
    distill: DistillSpec
    finetune: FinetuneSpec
    kd: KDSpec = Field(default_factory=KDSpec)
    upcycle: UpcycleSpec | None = None
    evaluation: EvaluationSpec

    @field_validator("arms", mode="before")
    @classmethod
    def _named_arms(cls, arms: Any) -> Any:
        return named_specs(arms)

    @field_serializer("arms")
    def _short_arms(self, arms: dict[str, ArmSpec]) -> list[Any]:
        return [
            name if PRESETS.get(name) == spec else {name: spec.model_dump(mode="json", exclude_defaults=True)}
            for name, spec in arms.items()
        ]

    @property
    def all_arms(self) -> dict[str, Arm]:
        """The arms by name, including those that `equal_compute` adds."""
        upcycle = None if self.upcycle is None else self.upcycle.model_dump()
        return resolve(self.arms, self.equal_compute, {"distill": self.distill.arguments(), "upcycle": upcycle})

    @property
    def is_aligned(self) -> bool:
        """Whether the meta model is made from the teacher."""
        return self.meta is not None and self.meta.init == "from_teacher"

    @property
    def is_incubated(self) -> bool:
        """Whether the teacher is trained inside the meta model."""
        return self.meta is not None and self.meta.init == "random" and self.teacher.pretrained is None

    @property
    def meta_depths(self) -> list[int]:
        """Layers in each stage of the meta model."""
        return (self.meta.depths if self.meta is not None else None) or [1] * len(self.student.depths)

    def data_of(self, arm: Arm) -> str:
        """Name of the training set of an arm."""
        return arm.spec.data or self.finetune.data

    def cache_of(self, arm: Arm) -> str | None:
        """Name of the training set whose cached targets the end-to-end phase of an arm reads."""
        return self.data_of(arm) if arm.has_teacher and self.kd.cache else None

    def caches_of(self, arm: Arm) -> list[str]:
        """Names of all training sets whose cached targets an arm needs, also for its modules."""
        of_modules = self.distill.data if arm.is_modular and self.distill.cache else None
        return [name for name in dict.fromkeys([of_modules, self.cache_of(arm)]) if name is not None]

    def _uses(self) -> dict[str, str]:
        """The names of data sets, by the recipe key that refers to them."""
        names = {
            **{f"arms.{name}.data": spec.data for name, spec in self.arms.items()},
            "meta.data": self.meta.data if self.meta is not None else None,
            "teacher.data": self.teacher.data,
            "distill.data": self.distill.data,
            "finetune.data": self.finetune.data,
            "upcycle.data": self.upcycle.data if self.upcycle is not None else None,
            "evaluation.iid": self.evaluation.iid,
            "evaluation.ood": self.evaluation.ood,
        }
        return {key: name for key, name in names.items() if name is not None}

    def used_data(self) -> dict[str, DataConfig]:
        """The data sets that the phases read or are tested on."""
        return {name: data for name, data in self.data.items() if name in self._uses().values()}

    def all_training(self) -> list[Training]:
        """The training arguments of every section."""
        arms = self.arms.values()
        sections = (self, self.meta, self.distill, self.finetune, self.kd, self.upcycle, *arms)
        trainings = [section.training for section in sections if section is not None]
        return [*trainings, self.teacher.incubation, self.teacher.finetuning]

    @model_validator(mode="after")
    def _check_holdouts(self) -> "Recipe":
        """Check that both parts of a folder with a holdout are used; otherwise images would be lost silently."""
        used = {name: data for name, data in self.used_data().items() if data.holdout}
        for name, data in used.items():
            rest = {"train": "test", "test": "train"}.get(data.split)
            same = [other for other in used.values() if other.same_folder(data) and other.holdout == data.holdout]
            if rest is not None and rest not in [other.split for other in same]:
                raise ValueError(
                    f"`data.{name}` has `holdout: {data.holdout}` and is split {data.split!r} of {data.source!r}, but "
                    f"no other set of this recipe is split {rest!r} of that folder with the same `holdout`. For "
                    f"separate folders, set data.{name}.holdout to 0 and data.{name}.split to null, as "
                    "recipes/image_folders.yaml does for each set. For one folder, set `source` of both sets to it"
                )
        return self

    def _check_distillation(self) -> None:
        """Check that the pairs get what their context, targets and inputs need."""
        spec, num_pairs = self.distill, len(self.student.depths)
        if any(arm.init == "upcycled" for arm in self.arms.values()):
            if self.upcycle is None:
                raise ValueError(
                    "an arm has `init: upcycled`, but there is no `upcycle`. Say where its experts come from, e.g. "
                    "upcycle: {source: dense, training: {num_train_epochs: 10}}"
                )
            if not stage_class_of_type(self.student.model.model_type).has_experts:
                raise ValueError(
                    f"an arm has `init: upcycled`, but a {self.student.model.model_type} has no experts. Leave the "
                    "arm out, or use a vmoe as the student"
                )
        if spec.context == "meta" and self.meta is None and any(arm.init == "modules" for arm in self.arms.values()):
            raise ValueError(
                "`distill.context` is meta, but there is no `meta`. Describe the meta model, or set `distill.context` "
                "to teacher"
            )
        if spec.feed == "student" and self.finetune.keep_stitches:
            raise ValueError(
                "`distill.feed` is student, so there are no stitches between the modules that "
                "`finetune.keep_stitches` could keep. Leave one of them out"
            )
        pairs = list(range(num_pairs)) if spec.pairs == "all" else spec.pairs
        if pairs and 0 <= min(pairs) and max(pairs) < num_pairs:
            check_feed(spec.feed, pairs)

    def _check_caches(self) -> None:
        """Check that what is cached does not change from epoch to epoch, and serves the phases that read it."""
        spec, cached = self.distill, {}
        if spec.cache:
            cached["distill.cache"] = spec.data
            if spec.context != "teacher" or spec.match != "boundary":
                raise ValueError(
                    f"`distill.cache` needs `distill.context: teacher` and `distill.match: boundary`, but they are "
                    f"{spec.context} and {spec.match}: the outputs of the pairs would pass through frozen layers, "
                    "whose results cannot be stored. Set them, or leave out `distill.cache`"
                )
            if {**self.training, **spec.training}.get("eval_strategy", "no") != "no":
                raise ValueError(
                    "`distill.cache` has no targets for the test set, but `distill.training.eval_strategy` (or that "
                    'of `training`) asks for evaluations. Set `distill.training.eval_strategy` to "no"'
                )
            if self.kd.cache not in (None, spec.cache):
                raise ValueError(
                    f"`distill.cache` is {spec.cache}, but `kd.cache` is {self.kd.cache}; they share what is stored, "
                    "so set both to the same type"
                )
        cached |= {f"kd.cache (arm {name})": self.cache_of(arm) for name, arm in self.all_arms.items()}
        for key, name in cached.items():
            if name is not None:
                try:
                    self.data[name].fixed_views()
                except DataError as error:
                    raise ValueError(f"`{key}`: data.{name}: {error}") from error

    def _reads_labels(self) -> dict[str, str]:
        """The names of the data sets whose labels are read, by the recipe key that makes it so."""
        alpha = {"distill": self.distill.training.get("alpha", 0.5), "kd": self.kd.training.get("alpha", 0.5)}
        found = {"evaluation.iid": self.evaluation.iid, "evaluation.ood": self.evaluation.ood}
        if self.meta is not None and not self.is_aligned:
            found["meta.data"] = self.meta.data
        found["teacher.data"] = self.teacher.data
        if any(arm.init == "modules" for arm in self.arms.values()) and alpha["distill"] < 1:
            found["distill.data"] = self.distill.data
        for name, arm in self.arms.items():
            if arm.supervision == "labels" or arm.training.get("alpha", alpha["kd"]) < 1:
                found["finetune.data" if arm.data is None else f"arms.{name}.data"] = arm.data or self.finetune.data
        return {key: name for key, name in found.items() if name is not None}

    @model_validator(mode="after")
    def _check_labels(self) -> "Recipe":
        """Check that no phase reads labels of a set that has none."""
        for key, name in self._reads_labels().items():
            if name in self.data and not self.data[name].is_labeled:
                raise ValueError(
                    f"`{key}` is {name!r}, a set without labels ({self.data[name].source}), but labels are read "
                    "there. Learn only from the teacher (`alpha: 1.0` in distill.training and kd.training, and arms "
                    "with `supervision: teacher`), or give a labelled set"
                )
        return self

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        for key, name in self._uses().items():
            if name not in self.data:
                raise ValueError(f"`{key}` is {name!r}, but `data` has only {sorted(self.data)}")
        num_pairs = len(self.student.depths)
        for key, depths in (("teacher.depths", self.teacher.depths), ("meta.depths", self.meta_depths)):
            if depths is None and not any(arm.init == "modules" for arm in self.arms.values()) and not self.meta:
                continue
            if depths is None:
                raise ValueError(
                    "`teacher.depths` is missing; give the number of the teacher's layers in each of the "
                    f"{num_pairs} stages, or leave out the arms that start from modules and `meta`"
                )
            if len(depths) != num_pairs:
                raise ValueError(
                    f"`student.depths` {self.student.depths} makes {num_pairs} stages, but `{key}` {depths} makes "
                    f"{len(depths)}; all networks need the same number of stages"
                )
        if (self.meta is None or self.is_aligned) and self.teacher.incubation:
            why = "`meta.init` is from_teacher" if self.is_aligned else "there is no `meta`"
            raise ValueError(
                f"`teacher.incubation` needs a meta model to incubate in, but {why}. Leave out `teacher.incubation` "
                "(`teacher.finetuning` trains the whole teacher), or train a `meta.model`"
            )
        self._check_distillation()
        if self.finetune.keep_stitches and not stage_class_of_type(self.student.model.model_type).keeps_stitches:
            raise ValueError(
                f"`finetune.keep_stitches` works only with a vmoe; a {self.student.model.model_type} has no place for "
                "stitches"
            )
        resolve(self.arms, self.equal_compute)
        self._check_caches()
        seeds = [self.seed, *self.repeat_seeds]
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"`seed` {self.seed} and `repeat_seeds` {self.repeat_seeds} must all be different")
        return self
