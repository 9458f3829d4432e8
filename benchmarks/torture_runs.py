"""A tiny run that is killed, starved of disk and started twice, and must end as if nothing had happened."""

import json
import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torture_process import Ending, Process, disk_full_from, killed_at


SECONDS = 600.0  # after which a process counts as hanging
_CLASSES = {"blue": (0, 0, 120), "red": (120, 0, 0)}
# Times, which differ from run to run. Everything else is the same.
_CLOCKS = {"train_seconds", "parallel_seconds", "peak_memory", "date", "device"}
_CLOCKS_IN_TEXT = re.compile(r"[\d.,e+-]+ (?:ms|s|min|h|[KMG]iB)\b|\d{4}-\d\d-\d\dT\S+")


def write_images(folder: Path, per_class: int, seed: int) -> str:
    """Noise around the color of its class; returns the source for a recipe."""
    rng = np.random.default_rng(seed)
    for name, color in _CLASSES.items():
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = np.clip(rng.uniform(0, 120, (8, 8, 3)) + color, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return f"imagefolder:{folder}"


def recipe_content(folder: Path) -> dict[str, Any]:
    """A recipe with every kind of phase: meta model, incubated teacher, stored targets, pairs, dense network, arms."""
    network = {"num_attention_heads": 2, "patch_size": 4}
    vit = {"hidden_size": 8, "intermediate_size": 12, **network}
    pixels = {"image_size": 8, "resample": "bilinear"}
    return {
        "name": "torture",
        "output_dir": "run",
        "arms": ["kd", "m2mkd", "upcycle"],
        "processes": 1,
        "data": {
            "train": {"source": write_images(folder / "train", 6, 0), **pixels},
            "iid": {"source": write_images(folder / "test", 2, 1)},
        },
        "training": {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 6,
            "learning_rate": 1e-3,
            # a log entry beside every checkpoint: its averages would restart with a resumed run
            "logging_strategy": "steps",
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
        },
        "meta": {"model": {"model_type": "vit", "config": {**vit, "num_hidden_layers": 2}}, "data": "train"},
        "teacher": {
            "model": {"model_type": "vit", "config": {**vit, "num_hidden_layers": 3}},
            "depths": [2, 1],
            "data": "train",
        },
        "student": {
            "model": {
                "model_type": "vmoe",
                "config": {**vit, "num_hidden_layers": 2, "num_experts": 2, "moe_layers": [1]},
            },
            "depths": [1, 1],
        },
        "distill": {"data": "train"},
        "finetune": {"data": "train"},
        "kd": {"cache": True},
        "upcycle": {"source": "dense"},
        "evaluation": {"iid": "iid"},
    }


class Reference:
    """
    A run that nothing has interrupted.

    Args:
        folder (`Path`): Where its images, its recipe and its folder `whole` go.
    """

    def __init__(self, folder: Path):
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(recipe_content(folder)))
        self.folder = folder / "whole"
        counted = folder / "events"
        counted.write_bytes(b"")

        def count(number: int, event: str, arguments: tuple[Any, ...]) -> None:
            with counted.open("ab") as file:
                file.write(b".")

        self.folder.mkdir()
        start = time.monotonic()
        ending = Process(self.folder, ["run", str(self.recipe)], on_event=count).end(SECONDS)
        if ending.code != 0:
            raise RuntimeError(f"The run itself failed: {ending.said}")
        self.seconds, self.events = time.monotonic() - start, counted.stat().st_size
        self.state = state_of(self.folder / "run")

    def differences(self, run: Path) -> list[str]:
        """Files of another run that are missing, left over or different."""
        state = state_of(run)
        return [line for name in sorted({*state, *self.state}) for line in _differences(name, state, self.state)]


def state_of(run: Path) -> dict[str, Any]:
    """The content of every file of a run, without times."""
    return {path.relative_to(run).as_posix(): _content(path) for path in sorted(run.rglob("*")) if path.is_file()}


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return _without_clocks(json.loads(path.read_text()))
    if path.suffix == ".md":
        return _CLOCKS_IN_TEXT.sub("(time)", path.read_text())
    # a figure shows times too
    return path.suffix if path.suffix == ".png" else path.read_bytes()


def _without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_clocks(inner) for name, inner in value.items() if name not in _CLOCKS}
    return [_without_clocks(inner) for inner in value] if isinstance(value, list) else value


def _differences(name: str, ours: Any, theirs: Any) -> list[str]:
    """The names of what differs, and plain values."""
    ours, theirs = ours.get(name), theirs.get(name)
    if ours == theirs:
        return []
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [f"{name}.{line}" for key in {*ours, *theirs} for line in _differences(key, ours, theirs)]
    if isinstance(ours, str) and isinstance(theirs, str):
        lines = zip(ours.splitlines(), theirs.splitlines(), strict=False)
        ours, theirs = next(((one, other) for one, other in lines if one != other), (len(ours), len(theirs)))
    return [f"{name}: {str(ours)[:200]}, not {str(theirs)[:200]}"]


def _finished(run: Path) -> set[str]:
    """The artifacts that are there, by name."""
    found = (path.parent.relative_to(run) for path in run.rglob("train_results.json"))
    return {path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)}


class Torture:
    """
    Interrupts runs and counts what goes wrong.

    Args:
        folder (`Path`): For the runs.
        reference (`Reference`)
        seed (`int`): Decides about every moment.
    """

    def __init__(self, folder: Path, reference: Reference, seed: int):
        self.reference, self.rng, self._folder, self._runs = reference, random.Random(seed), folder, 0
        self.counts: dict[str, Counter[str]] = {}
        self.faults: list[str] = []

    def kill(self, kills: int) -> None:
        """Kill runs `kills` times, each several times, and let each end."""
        done = 0
        while done < kills:
            with self._new_run() as place:
                for _ in range(min(self.rng.randint(2, 6), kills - done)):
                    if not self._killed(place):
                        break
                    done += 1
                self._must_end("killed", place)

    def _killed(self, place: Path) -> bool:
        """Start a run and kill it, or one of its workers. Returns whether it was killed before its end."""
        how = self.rng.choice(("event", "event", "time", "workers"))
        before = _finished(place / "run")
        options = ["--processes", "2"] if how == "workers" else []
        at = self.rng.randint(1, max(self.reference.events * (10 - len(before)) // 10, 20))
        process = self._start(place, *options, on_event=killed_at(at) if how == "event" else None)
        what = f"killed by {how}"
        if how == "time":
            time.sleep(self.rng.uniform(0, 0.8 * self.reference.seconds))
            process.kill()
        elif how == "workers":
            self._kill_among_workers(process)
        ending = process.end(SECONDS)
        if ending.code == 0:
            return False
        self._count(what, "times")
        if ending.code is None or ending.code > 0:
            self._judge(what, ending)
        if process.left():
            self._fault(what, "left processes", f"after a kill in {place}")
        if lost := before - _finished(place / "run"):
            self._fault(what, "lost", str(sorted(lost)))
        return True

    def _kill_among_workers(self, process: Process) -> None:
        """Kill a worker, or the process that distributes the work, when there are workers."""
        limit, delay = time.monotonic() + SECONDS, self.rng.uniform(0, 3 * self.reference.seconds)
        is_worker = self.rng.random() < 0.5
        while (
            time.monotonic() < limit and os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            if time.monotonic() - process.started > delay and (not is_worker or process.kill_worker(self.rng)):
                if not is_worker:
                    process.kill()
                return
            time.sleep(0.01)

    def fill_disk(self, times: int) -> None:
        """Let the disk be full from some moment on, then free it."""
        for _ in range(times):
            with self._new_run() as place:
                at = self.rng.randint(1, self.reference.events)
                self._count("full disk (writes fail)", "times")
                process = self._start(place, on_event=disk_full_from(at))
                self._must_refuse("full disk (writes fail)", process.end(SECONDS), f"from event {at}")
                self._must_end("full disk (writes fail)", place)

    def fill_tmpfs(self, times: int) -> None:
        """Run on a file system that is too small, then enlarge it; or that is made read-only for a while."""
        size = sum(path.stat().st_size for path in (self.reference.folder / "run").rglob("*") if path.is_file())
        for number in range(times):
            what = ("full disk (tmpfs)", "read-only disk")[number % 2]
            kilobytes = self.rng.randint(16, size // 1024) if number % 2 == 0 else 2**16
            with self._new_run() as place, _tmpfs(place / "run", kilobytes) as mounted:
                self._count(what, "times")
                process = self._start(place)
                if number % 2:
                    time.sleep(self.rng.uniform(0, self.reference.seconds))
                    mounted("ro")
                ending = process.end(SECONDS)
                if number % 2 == 0 or ending.code != 0:
                    self._must_refuse(what, ending, f"{kilobytes} KiB")
                mounted(f"rw,size={2**16}k")
                self._must_end(what, place)

    def start_twice(self, times: int) -> None:
        """Start two runs in one folder: one may refuse, and what is there at the end must be whole."""
        for _ in range(times):
            with self._new_run() as place:
                self._count("two runs in one folder", "times")
                first = self._start(place)
                time.sleep(self.rng.uniform(0, 0.3 * self.reference.seconds))
                other = self._start(place, log="other")
                for process in (other, first):
                    ending = process.end(SECONDS)
                    if ending.fault or (ending.code and "is being made by process" not in ending.message):
                        self._fault("two runs in one folder", ending.fault or "advice", ending.said[-1500:])
                self._must_end("two runs in one folder", place)

    # ---- Judging ----

    @contextmanager
    def _new_run(self) -> Iterator[Path]:
        self._runs += 1
        place = self._folder / f"run_{self._runs}"
        place.mkdir()
        yield place
        shutil.rmtree(place)

    def _start(self, place: Path, *options: str, log: str | None = None, on_event: Any = None) -> Process:
        return Process(place, ["run", str(self.reference.recipe), *options], on_event=on_event, log=log)

    def _must_refuse(self, what: str, ending: Ending, where: str) -> None:
        if ending.code == 0:
            # the failure met only what the run can do without
            return
        self._judge(what, ending, where)

    def _judge(self, what: str, ending: Ending, where: str = "") -> None:
        if ending.fault:
            self._fault(what, ending.fault, f"{where} {ending.said[-2500:]}")

    def _must_end(self, what: str, place: Path) -> None:
        self._count(what, "ends")
        ending = self._start(place).end(SECONDS)
        if ending.code != 0:
            self._fault(what, ending.fault or "no end", ending.said[-2500:])
        elif wrong := self.reference.differences(place / "run"):
            self._fault(what, "lost", f"missing, left over or different: {wrong}")

    def _count(self, what: str, name: str) -> None:
        self.counts.setdefault(what, Counter())[name] += 1

    def _fault(self, what: str, kind: str, text: str) -> None:
        self._count(what, kind)
        self.faults.append(f"{what}: {kind}: {text.strip()}")


@contextmanager
def _tmpfs(folder: Path, kilobytes: int) -> Iterator[Any]:
    """A small file system; gives a function that remounts it with other options."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=True)

    def remount(options: str) -> None:
        command = ["mount", "-o", f"remount,{options}", folder]
        # it is busy while a file is open for writing
        while subprocess.run(command, capture_output=True, check=False).returncode:
            time.sleep(0.001)

    try:
        yield remount
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
