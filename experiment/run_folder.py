"""Paths of everything in a run's folder; no other file joins them."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path


class RunFolder:
    """
    The folder of a run.

    Args:
        path (`str` or `Path`)
        seed (`int`): The recipe's `seed`, whose pairs and arms are in `path` itself; those of its `repeat_seeds` are
            in `path/seeds/<seed>`.
    """

    def __init__(self, path: str | Path, seed: int):
        self.path, self.seed = Path(path), seed

    @property
    def recipe(self) -> Path:
        """The recipe that the folder belongs to."""
        return self.path / "recipe.json"

    def report(self, kind: str) -> Path:
        """The report as `json`, `md` or `png`."""
        return self.path / f"report.{kind}"

    @property
    def meta(self) -> Path:
        """The meta model."""
        return self.path / "meta"

    @property
    def teacher(self) -> Path:
        """The teacher; for a published teacher, only the results."""
        return self.path / "teacher"

    @property
    def incubation(self) -> Path:
        """Path that names the checkpoints of the teacher's incubation; it is not an artifact."""
        return self.path / "teacher-incubation"

    def cache(self, data: str) -> Path:
        """The teacher's stored targets for a training set."""
        return self.path / "cache" / data

    def name_of(self, artifact: Path) -> str:
        """Name of an artifact: its path in this folder."""
        return artifact.relative_to(self.path).as_posix()

    def of_seed(self, seed: int) -> Path:
        """The folder with the pairs and arms of a seed."""
        return self.path if seed == self.seed else self.path / "seeds" / str(seed)

    def pairs(self, seed: int) -> Path:
        """The folder of all pairs of a seed."""
        return self.of_seed(seed) / "pairs"

    def pair(self, index: int, seed: int) -> Path:
        """One distilled pair."""
        return self.pairs(seed) / str(index)

    def dense(self, seed: int) -> Path:
        """The dense network that arms are upcycled from."""
        return self.of_seed(seed) / "dense"

    def arm(self, name: str, seed: int) -> Path:
        """One arm."""
        return self.of_seed(seed) / "arms" / name

    def arm_names(self, seed: int) -> list[str]:
        """Names of the arms that have a folder."""
        arms = self.of_seed(seed) / "arms"
        return sorted(path.name for path in arms.glob("*") if path.is_dir() and not path.name.startswith("."))

    def seeds(self) -> list[int]:
        """The seeds that have a folder, the recipe's own first."""
        further = [int(path.name) for path in self.path.glob("seeds/*") if path.name.isdigit()]
        return [self.seed, *sorted(seed for seed in further if seed != self.seed)]

    def num_pairs(self, seed: int) -> int:
        """The highest index of a pair that has a folder, plus one."""
        found = [int(path.name) for path in self.pairs(seed).glob("*") if path.name.isdigit()]
        return max(found, default=-1) + 1

    def work_folders(self) -> Iterator[Path]:
        """Find the folders with the checkpoints of all unfinished phases."""
        return self.path.rglob(".*.work")

    def locks(self) -> Iterator[Path]:
        """Find the locks of all artifacts that are being made."""
        return self.path.rglob(".*.lock")

    def temporary(self) -> Iterator[Path]:
        """Find files and folders that were not yet in their place, and locks on their way out."""
        return chain(self.path.rglob(".*.tmp"), self.path.rglob(".*.lock.*"))


def work_folder(artifact: Path) -> Path:
    """Folder of a phase's checkpoints until `artifact` is finished."""
    return artifact.parent / f".{artifact.name}.work"


def lock_file(artifact: Path) -> Path:
    """File that names the process that makes `artifact`."""
    return artifact.parent / f".{artifact.name}.lock"
