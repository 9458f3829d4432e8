"""Commands of m2mkd with mutated input: recipes, options, models, checkpoints, pairs, caches, images and folders."""

import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from torture_inputs import FOLDERS, IMAGES, JUNK, mutate_text, mutate_weights, write_classes
from torture_process import Ending, Process
from torture_runs import Reference


ROOT = Path(__file__).resolve().parents[1]
OFFICIAL = ROOT / "tests" / "modeling" / "official"
JAX = ROOT / "tests" / "conversion" / "vmoe_jax" / "checkpoint_v1_sharded"
# Of one command. Seconds of the processor: the machine may be busy, and a tiny model needs few.
CPU_SECONDS, MEMORY, SECONDS = 60, 2**33, 600.0
KINDS = {"vit": "incubated_vit", "nac": "nac_small_train", "vmoe-student": "m2mkd_vmoe_1"}
EVALUATE = ["evaluate", "run/arms/kd", "--data", "imagefolder:images"]
USES = (
    EVALUATE,
    ["few-shot", "run/arms/kd", "--data", "imagefolder:images", "--ways", "2", "--shots", "1", "--episodes", "1"],
    ["inspect", "run/arms/kd", "images/blue/0.png", "--out", "picture.png"],
)
# The rest of a case: the command, and a word about what was mutated.
Case = tuple[list[str], str]


class Mutations:
    """
    Mutates the input of commands.

    Args:
        folder (`Path`): For the inputs.
        reference (`Reference`): A finished run.
        seed (`int`)
    """

    def __init__(self, folder: Path, reference: Reference, seed: int):
        self.rng, self._folder, self._reference, self._seed = random.Random(seed), folder, reference, seed
        self._template = folder / "template"
        shutil.copytree(reference.folder / "run", self._template / "run")
        shutil.copy(reference.recipe, self._template)
        write_classes(self._template / "images", ["blue", "red"], self.rng)
        (self._template / "study.yaml").write_text(yaml.safe_dump(_study()))
        self._with_checkpoints = folder / "checkpoints"
        _stop_before_the_end(self._with_checkpoints, reference)
        self.areas: dict[str, Callable[[Path], Case]] = {
            "recipe": self._recipe,
            "options": self._options,
            "model": self._model,
            "official checkpoint": self._official,
            "pair": self._pair,
            "cache": self._cache,
            "run": self._run,
            "checkpoint": self._checkpoint,
            "image": self._image,
            "class folder": self._class_folder,
        }

    def one(self, area: str) -> tuple[Ending, str]:
        """Mutate one input of a kind and run a command on it. Returns how it ended, and what was done."""
        place = self._folder / "mutated"
        shutil.copytree(self._with_checkpoints if area == "checkpoint" else self._template, place)
        try:
            arguments, what = self.areas[area](place)
            ending = Process(place, arguments, limits=_limit).end(SECONDS)
        finally:
            shutil.rmtree(place)
        return ending, f"{what}: m2mkd {' '.join(arguments)[:300]}"

    def _any_file(self, place: Path, pattern: str) -> Path:
        return self.rng.choice(sorted(path for path in place.glob(pattern) if path.is_file()))

    def _mutate(self, path: Path) -> str:
        how = (mutate_text if path.suffix in (".json", ".yaml") else mutate_weights)(path, self.rng)
        return f"{path.name} ({how})"

    def _recipe(self, place: Path) -> Case:
        name, options = self.rng.choice(
            (("recipe.yaml", ["--plan"]), ("recipe.yaml", ["--plan"]), ("recipe.yaml", ["--miniature", "--plan"]))
            + (("study.yaml", ["--plan"]), ("recipe.yaml", []))
        )
        what = self._mutate(place / name)
        command = "study" if name == "study.yaml" else "run" if options else "slurm"
        return [command, name, *options], what

    def _options(self, place: Path) -> Case:
        keys = list(_keys(yaml.safe_load((place / "recipe.yaml").read_text())))
        value = str(self.rng.choice(JUNK)).replace("\x00", "0")
        if self.rng.random() < 0.5:
            return ["run", "recipe.yaml", "--plan", f"--{self.rng.choice(keys)}", value], "a key"
        command = [
            *self.rng.choice((*USES, ["assemble", "out", "run"], ["report", "run"], ["upcycle", "run/teacher", "out"]))
        ]
        place_of_junk = self.rng.randrange(1, len(command) + 1)
        command[place_of_junk : place_of_junk + self.rng.randrange(2)] = [value]
        return command, "an argument"

    def _model(self, place: Path) -> Case:
        if self.rng.random() < 0.2:
            return ["upcycle", "run/dense", "out", "--experts", "2"], self._mutate(
                self._any_file(place, "run/dense/*[gs]")
            )
        what = self._mutate(self._any_file(place, "run/arms/kd/*[!m][gs]*"))
        return [*self.rng.choice(USES)], what

    def _official(self, place: Path) -> Case:
        if self.rng.random() < 0.3:
            shutil.copytree(JAX, place / "jax")
            what = self._mutate(self._any_file(place, "jax/c*"))
            return ["convert", "jax/ckpt", "out", "--kind", "vmoe-jax", "--config", "jax/config.json"], what
        kind = self.rng.choice(list(KINDS))
        shutil.copytree(OFFICIAL / KINDS[kind], place / "official")
        name = "state_dict.safetensors"
        if self.rng.random() < 0.5:
            torch.save({"model": load_file(place / "official" / name)}, place / "official" / "model.pth")
            name = "model.pth"
        what = self._mutate(place / "official" / self.rng.choice((name, name, "config.json")))
        stage = ["--stage", "1"] if kind == "vmoe-student" else []
        return ["convert", f"official/{name}", "out", "--kind", kind, "--config", "official/config.json", *stage], what

    def _pair(self, place: Path) -> Case:
        name = self.rng.choice(("pair.json", "pair.json", "*.json", "*.safetensors"))
        what = self._mutate(self._any_file(place, f"run/pairs/[01]/{name}"))
        return ["assemble", "out", "run", *self.rng.choice(([], ["--keep-stitches"]))], what

    def _cache(self, place: Path) -> Case:
        shutil.rmtree(place / "run" / "arms" / "kd")
        what = self._mutate(self._any_file(place, self.rng.choice(("run/cache/train/*", "run/cache/train/*/*"))))
        return ["run", "recipe.yaml", "--phase", "arms/kd"], what

    def _run(self, place: Path) -> Case:
        command = self.rng.choice(
            (["report", "run"], ["report", "run"], ["push", "run", "--dry-run"], ["run", "recipe.yaml"])
        )
        if command[0] == "push":
            return [*command, "--repo-id", "user/name"], self._mutate(self._any_file(place, "run/**/*.json"))
        if command[0] == "run":
            shutil.rmtree(place / "run" / "arms" / "m2mkd")
            if self.rng.random() < 0.2:
                (place / "run" / "arms" / ".m2mkd.lock").write_text(
                    self.rng.choice(("{}", "", "[1]", "null", '{"pid": "x"}'))
                )
                return command, "a lock"
        return command, self._mutate(
            self._any_file(place, self.rng.choice(("run/*.json", "run/*/*.json", "run/*/*/*")))
        )

    def _checkpoint(self, place: Path) -> Case:
        what = self._mutate(
            self._any_file(place, self.rng.choice(("run/arms/.kd.work/*/*", "run/arms/.kd.work/*/*.json")))
        )
        return ["run", "recipe.yaml", "--phase", "arms/kd"], what

    def _image(self, place: Path) -> Case:
        name = self.rng.choice(list(IMAGES))
        file, make = IMAGES[name]
        make(place / "images" / "blue" / file, self.rng)
        options = (EVALUATE, ["inspect", "run/arms/kd", f"images/blue/{file}", "--out", "picture.png"])
        return [*self.rng.choice(options)], name

    def _class_folder(self, place: Path) -> Case:
        name = self.rng.choice(list(FOLDERS))
        shutil.rmtree(place / "images")
        FOLDERS[name](place / "images", self.rng)
        train = ["run", "recipe.yaml", "--phase", "teacher", "--output_dir", "new", "--meta", "null", "--arms", "[kd]"]
        on_images = ["--data.train.source", "imagefolder:images", "--teacher.finetuning.max_steps", "1"]
        return [*self.rng.choice((EVALUATE, EVALUATE, [*train, *on_images]))], name


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _study() -> dict[str, object]:
    curves = {
        "kd": {"arm": "kd", "grid": {"finetune.training.num_train_epochs": [1, 2]}},
        "e2e": {"arm": "e2e", "points": [{"seed": 1}]},
    }
    return {
        "name": "s",
        "recipe": "recipe.yaml",
        "output_dir": "study",
        "seeds": [0, 1],
        "baseline": "kd",
        "curves": curves,
    }


def _keys(content: dict[str, object], prefix: str = "") -> list[str]:
    found = []
    for name, value in content.items():
        found += [f"{prefix}{name}", *(_keys(value, f"{prefix}{name}.") if isinstance(value, dict) else ())]
    return found


def _stop_before_the_end(place: Path, reference: Reference) -> None:
    """A run whose arm kd has all its checkpoints but is not finished."""
    shutil.copytree(reference.folder / "run", place / "run")
    shutil.copy(reference.recipe, place)
    shutil.rmtree(place / "run" / "arms" / "kd")

    def stop(count: int, event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.mkdir" and str(arguments[0]).endswith("/.kd.tmp"):
            raise KeyboardInterrupt

    Process(place, ["run", "recipe.yaml", "--phase", "arms/kd"], on_event=stop).end(SECONDS)
    if not list(place.glob("run/arms/.kd.work/*/COMPLETE")):
        raise RuntimeError(f"{place} has no checkpoints")
