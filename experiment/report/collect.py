"""Collection of a run's results from the files that each finished phase wrote."""

import importlib
import importlib.metadata
import math
import platform
import statistics
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from m2mkd.errors import RunError
from m2mkd.experiment.arms import Arm, ArmSpec, arm_of_folder, named_specs, reference, resolve
from m2mkd.experiment.artifact import EVAL_RESULTS, REPEAT, RUN_AGAIN, TRAIN_RESULTS, is_finished, read_results
from m2mkd.experiment.run_folder import RunFolder


PACKAGES = ("torch", "transformers", "accelerate", "m2mkd")
COSTS = ("train_seconds", "train_samples_seen", "train_flops", "parameters", "images", "labels", "epochs")

Result = dict[str, Any]
Report = dict[str, Any]
Histories = dict[str, dict[str, Any]]


# ---- Reading the run ----


def collect(output_dir: Path, recipe: dict[str, Any], seed: int, repeat_seeds: list[int], device: str) -> Report:
    """
    Gather the results of a run.

    Args:
        output_dir (`Path`): The run's folder.
        recipe (`dict[str, Any]`): The recipe as plain values; a `hub_token` in it is left out of the report. Arms in
            the recipe must have run with every seed; others are reported if they have.
        seed (`int`): The seed whose phases are in `output_dir` itself.
        repeat_seeds (`list[int]`): The seeds in `output_dir/seeds`.
        device (`str`): Device of the run, as text.

    Returns:
        The report: accuracies in [0, 1], times in seconds, `train_flops` in floating-point
        operations. `meta` and `teacher` are `None` if they have no folder and no arm needs one; their `iid` is `None`
        if they know other classes. In addition: `date`, `seeds` (the arms of every seed, including the first),
        `summary` (over the seeds), `comparisons` (seed by seed) and `hybrids`: the accuracy of the meta model with one
        teacher stage in it when the pairs of the first seed were distilled, and before alignment (`None` if it was
        not measured).

    Raises:
        `RunError`: no arm has run, or a results file is missing or damaged.
    """
    folder = RunFolder(output_dir, seed)
    seeds = {str(own): {"arms": _read_arms(folder, own, recipe)} for own in _seeds(seed, repeat_seeds)}
    arms = seeds[str(seed)]["arms"]
    needed = {network for result in arms.values() for network in result["arm"]["extra"]}
    networks = {
        name: _read_result(path) if name in needed or path.is_dir() else None
        for name, path in (("meta", folder.meta), ("teacher", folder.teacher))
    }
    ours = reference(list(arms_of(arms).values()))
    report = {
        "recipe": recipe,
        "seed": seed,
        "device": device,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        **networks,
        "hybrids": _read_hybrids(folder),
        "arms": arms,
        "seeds": seeds,
        "summary": {
            arm: _summarise([own["arms"][arm] for own in seeds.values() if arm in own["arms"]]) for arm in arms
        },
        "comparisons": [] if ours is None else [_compare(seeds, ours.name, arm) for arm in arms if arm != ours.name],
    }
    return plain(report)


def read_histories(output_dir: Path, seed: int, repeat_seeds: list[int]) -> Histories:
    """
    Read the log entries of a run, for `write_report`.

    Returns:
        `{"arms": {arm: {seed: [entry, …]}}, "pairs": {index: [entry, …]}}`, with keys as text and the pairs of the
        first seed.

    Raises:
        `RunError`: a results file is missing or damaged.
    """
    folder = RunFolder(output_dir, seed)
    arms: dict[str, dict[str, Any]] = {}
    for own in _seeds(seed, repeat_seeds):
        for arm in folder.arm_names(own):
            arms.setdefault(arm, {})[str(own)] = _read_log(folder.arm(arm, own))
    pairs = {str(index): _read_log(path) for index, path in enumerate(_pair_folders(folder, seed, 0))}
    return {"arms": arms, "pairs": pairs}


def arms_of(results: Mapping[str, Result]) -> dict[str, Arm]:
    """The arms with results in a report, by name."""
    arms = {name: arm_of_folder(name, result["arm"]) for name, result in results.items()}
    return {name: arm.with_sibling(arms.values()) for name, arm in arms.items()}


def _seeds(seed: int, repeat_seeds: list[int]) -> list[int]:
    return [seed, *(other for other in repeat_seeds if other != seed)]


def _pair_folders(folder: RunFolder, seed: int, num_pairs: int) -> list[Path]:
    """The folders of all pairs, at least `num_pairs`, so that a missing one is not skipped."""
    return [folder.pair(index, seed) for index in range(max(num_pairs, folder.num_pairs(seed)))]


def _read_arms(folder: RunFolder, seed: int, recipe: dict[str, Any]) -> dict[str, Result]:
    """Read the arms of one seed: those of the recipe, in its order, and others that have a folder."""
    arms = _asked_arms(recipe)
    for name in folder.arm_names(seed):
        own = folder.arm(name, seed)
        words = read_results(own).get("arm") if is_finished(own) else None
        if name not in arms and (arm := arm_of_folder(name, words, recipe)) is not None:
            arms[name] = arm
    if not arms:
        raise RunError(f"No arm has run: there is none in {folder.of_seed(seed) / 'arms'}. {RUN_AGAIN}")
    results = {name: _read_result(folder.arm(name, seed)) for name in arms}
    for name, result in results.items():
        if result["iid"] is None:
            raise _damaged(folder.arm(name, seed) / EVAL_RESULTS, "an arm needs an `iid` result")
        result["arm"] = arms[name].described()
        made = {None: [], "dense": [folder.dense(seed)], "pairs": []}[arms[name].source.phase]
        if arms[name].is_modular:
            num_pairs = len((recipe.get("student") or {}).get("depths") or [])
            made = _pair_folders(folder, seed, num_pairs)
            if not made:
                raise RunError(f"There are no distilled pairs in {folder.pairs(seed)}. {RUN_AGAIN}")
        caches = {read_results(path).get("cache") for path in [folder.arm(name, seed), *made]} - {None}
        before = {"cache": [folder.cache(data) for data in sorted(caches)]}
        before["distill" if arms[name].is_modular else "dense"] = made
        is_chain = (recipe.get("distill") or {}).get("feed") == "student"
        costs = {phase: [_read_costs(path) for path in paths] for phase, paths in before.items()}
        _add_beforehand(result, costs, is_chain)
    return results


def _asked_arms(recipe: dict[str, Any]) -> dict[str, Arm]:
    specs = {
        name: spec if isinstance(spec, ArmSpec) else ArmSpec.model_validate(spec)
        for name, spec in named_specs(recipe.get("arms") or []).items()
    }
    return resolve(specs, bool(recipe.get("equal_compute")), recipe)


def _read_hybrids(folder: RunFolder) -> Result | None:
    """
    Read the results of `hybrid_accuracies`: `stages` (`before` and `after` alignment, by index), `teacher`, `chance`,
    `n` and `set`.
    """
    before: dict[str, float] = {}
    if is_finished(folder.meta):
        before = read_results(folder.meta).get("before", {}).get("hybrids", {})
    pairs = [read_results(pair).get("hybrids") for pair in _pair_folders(folder, folder.seed, 0)]
    measured = [own for own in pairs if own]
    if not measured:
        return None
    # hybrids of pairs that were distilled together were measured together
    after = {index: accuracy for own in measured for index, accuracy in own["hybrids"].items()}
    stages = {index: {"before": before.get(index), "after": after[index]} for index in sorted(after, key=int)}
    return {"stages": stages, **{name: measured[-1][name] for name in ("teacher", "chance", "n", "set")}}


def _add_beforehand(result: Result, before: dict[str, list[Result]], is_chain: bool) -> None:
    """
    Add the cost of the parts of phases (stored targets, and the pairs or the dense network) to an arm that starts from
    them; its own cost is that of its end-to-end phase. The pairs of a chain, which are fed by the student, run in one
    process.
    """
    finetune, phases = {name: result[name] for name in COSTS}, {}
    total = ("train_seconds", "train_flops", "parameters")
    for phase, parts in before.items():
        if not parts:
            continue
        own = {name: (sum if name in total else max)(part[name] for part in parts) for name in COSTS}
        for name in ("train_seconds", "train_flops", "train_samples_seen"):
            result[name] += own[name]
        for name in ("images", "labels"):
            result[name] = max(result[name], own[name])
        result["parallel_seconds"] += (sum if is_chain else max)(part["parallel_seconds"] for part in parts)
        result["peak_memory"] = _largest([result, *parts])
        phases[phase] = own
    if phases:
        result["phases"] = {**phases, "finetune": finetune}


def _read_result(folder: Path) -> Result:
    """Read results and costs of a finished phase; `iid` and `ood` are `None` if it was not tested on them."""
    path, evaluation, costs = folder / EVAL_RESULTS, read_results(folder, EVAL_RESULTS), _read_costs(folder)
    load = evaluation.get("expert_load")
    if load is not None and not _is_load(load):
        raise _damaged(path, "`expert_load` does not give the fraction of each expert by layer")
    # a run of an older version does not say
    dropped = None if evaluation.get("dropped") is None else _number(evaluation, "dropped", path, highest=1)
    scores = {split: _scores(evaluation, split, path) for split in ("iid", "ood")}
    return {**scores, **costs, "expert_load": load, "dropped": dropped}


def _read_costs(folder: Path) -> Result:
    path, content = folder / TRAIN_RESULTS, read_results(folder)
    phases = content.get("phases") or {}
    if not isinstance(phases, dict):
        raise _damaged(path, "`phases` is not a mapping")
    costs: Result = {name: _number(content, name, path) for name in COSTS}
    costs["parallel_seconds"] = costs["train_seconds"]
    costs["peak_memory"] = content.get("peak_memory")
    # for a published network; for an arm that has the model of another one
    costs |= {name: content[name] for name in ("pretrained", "network", "same_as") if content.get(name)}
    if phases:
        costs["phases"] = {phase: {name: _number(own, name, path) for name in COSTS} for phase, own in phases.items()}
    return costs


def _largest(results: list[Result]) -> int | None:
    """Peak memory of the largest process, if that was recorded."""
    return max((own["peak_memory"] for own in results if own["peak_memory"] is not None), default=None)


def _read_log(folder: Path) -> list[dict[str, Any]]:
    log = read_results(folder).get("log_history") or []
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise _damaged(folder / TRAIN_RESULTS, "`log_history` is not a list of entries")
    return log


def _damaged(path: Path, why: str) -> RunError:
    return RunError(f"{path} is damaged: {why}. {REPEAT.format(folder=path.parent)}")


def _number(content: Any, name: str, path: Path, highest: float = math.inf) -> float:
    value: Any = content.get(name) if isinstance(content, dict) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not 0 <= value <= highest:
        limit = "" if highest == math.inf else f" and at most {highest:g}"
        raise _damaged(path, f"`{name}` should be a number of at least 0{limit}, but is {value!r}")
    return value


def _scores(evaluation: dict[str, Any], name: str, path: Path) -> Result | None:
    scores = evaluation.get(name)
    if scores is None:
        return None
    accuracy, size = _number(scores, "accuracy", path, highest=1), _number(scores, "n", path)
    return {"accuracy": accuracy, "top5_accuracy": scores.get("top5_accuracy"), "loss": scores.get("loss"), "n": size}


def _is_load(load: Any) -> bool:
    return isinstance(load, dict) and all(
        isinstance(shares, list) and shares and all(isinstance(share, int | float) and share >= 0 for share in shares)
        for shares in load.values()
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(name), "__version__", "unknown"))


def plain(value: Any) -> Any:
    """Convert a value for JSON: `None` for numbers that are not finite, text for unknown objects, no tokens."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if not str(key).endswith("hub_token")}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


# ---- Statistics over the seeds ----


def _statistics(values: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (`None` for a single value)."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def _summarise(results: list[Result]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for split in ("iid", "ood"):
        measured = all(result[split] for result in results)
        values = [result[split]["accuracy"] for result in results] if measured else []
        summary[split] = {**_statistics(values), "values": values} if values else None
    return summary


def _compare(seeds: dict[str, Any], name: str, baseline: str) -> dict[str, Any]:
    """Compare an arm with `baseline`, seed by seed: differences of accuracies in [-1, 1]."""
    first = next(iter(seeds.values()))["arms"]
    budget, unit = _common_budget(first[name], first[baseline])
    own = first[name][unit]
    comparison: dict[str, Any] = {
        "arm": name,
        "baseline": baseline,
        "budget": budget,
        "budget_ratio": first[baseline][unit] / own if own else None,
    }
    for split in ("iid", "ood"):
        both = [own["arms"] for own in seeds.values() if {name, baseline} <= set(own["arms"])]
        pairs = [(arms[name][split], arms[baseline][split]) for arms in both]
        if not all(ours and theirs for ours, theirs in pairs):
            comparison[split] = None
            continue
        values = [ours["accuracy"] - theirs["accuracy"] for ours, theirs in pairs]
        spread = _statistics(values)
        comparison[split] = {
            "mean_difference": spread["mean"],
            "std": spread["std"],
            "wins": sum(value > 0 for value in values),
            "n": len(values),
            "values": values,
        }
    return comparison


def _common_budget(ours: Result, theirs: Result) -> tuple[str, str]:
    """The budget that two arms have in common, as text and as the name of a cost."""
    if theirs["arm"]["budget"] is not None:
        return "equal training compute", "train_flops"
    if theirs["arm"]["data"] == ours["arm"]["data"]:
        return "equal end-to-end epochs", "epochs"
    return "budgets of their own", "train_flops"
