"""What a run found: report.json, report.md and report.png from the results that each finished phase left behind."""

import importlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console


# In the order of the tables, with the networks that are trained beforehand and not counted in the arm's own compute.
ARMS: dict[str, tuple[str, ...]] = {
    "e2e": (),
    "e2e_equal_compute": (),
    "kd": ("teacher",),
    "kd_equal_compute": ("teacher",),
    "m2mkd": ("meta", "teacher"),
}
BUDGETS = {
    "e2e": "equal end-to-end epochs",
    "kd": "equal end-to-end epochs",
    "e2e_equal_compute": "equal training compute",
    "kd_equal_compute": "equal training compute",
}
PACKAGES = ("torch", "transformers", "accelerate", "m2mkd")
COSTS = ("train_seconds", "train_samples_seen", "train_flops", "parameters", "images", "labels", "epochs")
RUN_AGAIN = "Run the recipe again: finished phases are kept, and what is missing is made."
REPEAT = "Delete {folder} and run the recipe again: that phase is repeated, the other finished ones are kept."

Result = dict[str, Any]
Report = dict[str, Any]
Histories = dict[str, dict[str, Any]]


class ReportError(ValueError):
    """A results file of the run is missing or damaged; the message names it and the way out."""


# ---- Reading the run ----


def collect(output_dir: Path, recipe: dict[str, Any], seed: int, repeat_seeds: list[int], device: str) -> Report:
    """
    Gather the results of a run.

    Args:
        output_dir (`Path`): The run's folder.
        recipe (`dict[str, Any]`): The recipe as plain values; a `hub_token` in it is left out of the report. Arms that
            it asks for must have run with every seed; others are reported if they have.
        seed (`int`): The seed whose phases lie in `output_dir` itself.
        repeat_seeds (`list[int]`): The seeds in `output_dir/seeds`.
        device (`str`): What the run was made on, in words.

    Returns:
        The report as DESIGN.md §5 has it: accuracies in [0, 1], times in seconds, `train_flops` in floating-point
        operations. `meta` and `teacher` are `None` if they have no folder and no arm needs one, their `iid` is `None`
        if they know other classes. Beside it `date`, `seeds` (the arms of every seed, the first included), `summary`
        (over the seeds), `comparisons` (seed by seed) and `hybrids`: the accuracy of the meta model with one teacher
        stage in it when the pairs of the first seed were distilled, and before alignment (`None` where it was not
        measured).

    Raises:
        `ReportError`: no arm has run, or a results file is missing or damaged.
    """
    output_dir = Path(output_dir)
    folders = _seed_folders(output_dir, seed, repeat_seeds)
    seeds = {name: {"arms": _read_arms(folder, recipe)} for name, folder in folders.items()}
    arms = seeds[str(seed)]["arms"]
    needed = {network for arm in arms for network in ARMS[arm]}
    networks = {
        name: _read_result(output_dir / name) if name in needed or (output_dir / name).is_dir() else None
        for name in ("meta", "teacher")
    }
    report = {
        "recipe": recipe,
        "seed": seed,
        "device": device,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        **networks,
        "hybrids": _read_hybrids(output_dir),
        "arms": arms,
        "seeds": seeds,
        "summary": {
            arm: _summarise([own["arms"][arm] for own in seeds.values() if arm in own["arms"]]) for arm in arms
        },
        "comparisons": [_compare(seeds, arms, arm) for arm in arms if arm in BUDGETS and "m2mkd" in arms],
    }
    return _plain(report)


def read_histories(output_dir: Path, seed: int, repeat_seeds: list[int]) -> Histories:
    """
    The log entries of a run, for `write_report`.

    Returns:
        `{"arms": {arm: {seed: [entry, …]}}, "pairs": {index: [entry, …]}}`, keys as text, the pairs those of the first
        seed.

    Raises:
        `ReportError`: a results file is missing or damaged.
    """
    output_dir = Path(output_dir)
    arms: dict[str, dict[str, Any]] = {}
    for name, folder in _seed_folders(output_dir, seed, repeat_seeds).items():
        for arm in ARMS:
            if (folder / "arms" / arm).is_dir():
                arms.setdefault(arm, {})[name] = _read_log(folder / "arms" / arm)
    return {"arms": arms, "pairs": {str(index): _read_log(pair) for index, pair in _pair_folders(output_dir, 0)}}


def _seed_folders(output_dir: Path, seed: int, repeat_seeds: list[int]) -> dict[str, Path]:
    further = {str(other): output_dir / "seeds" / str(other) for other in repeat_seeds if other != seed}
    return {str(seed): output_dir, **further}


def _pair_folders(folder: Path, num_pairs: int) -> list[tuple[int, Path]]:
    """The folders of all pairs from 0 on, at least `num_pairs`: one that is missing is not passed over."""
    found = [int(path.name) for path in (folder / "pairs").glob("*") if path.name.isdigit()]
    return [(index, folder / "pairs" / str(index)) for index in range(max([num_pairs - 1, *found]) + 1)]


def _read_arms(folder: Path, recipe: dict[str, Any]) -> dict[str, Result]:
    """The arms of one seed, in the order of `ARMS`: those that the recipe asks for and those that are there."""
    asked = list(recipe.get("arms") or [])
    if recipe.get("equal_compute") and "m2mkd" in asked:
        asked += [f"{arm}_equal_compute" for arm in asked if arm != "m2mkd"]
    arms = [arm for arm in ARMS if arm in asked or (folder / "arms" / arm).is_dir()]
    if not arms:
        raise ReportError(f"No arm has run: there is none of {', '.join(ARMS)} in {folder / 'arms'}. {RUN_AGAIN}")
    results = {arm: _read_result(folder / "arms" / arm) for arm in arms}
    for arm, result in results.items():
        if result["iid"] is None:
            raise _damaged(folder / "arms" / arm / "eval_results.json", "an arm needs an `iid` result")
    if "m2mkd" in results:
        num_pairs = len((recipe.get("student") or {}).get("depths") or [])
        pairs = [_read_costs(pair / "train_results.json") for _, pair in _pair_folders(folder, num_pairs)]
        if not pairs:
            raise ReportError(f"There are no distilled pairs in {folder / 'pairs'}. {RUN_AGAIN}")
        _add_distillation(results["m2mkd"], pairs)
    return results


def _read_hybrids(folder: Path) -> Result | None:
    """`stages` (`before` alignment and `after` it, by index), `teacher`, `chance`, `n`, `set`: `hybrid_accuracies`."""
    before: dict[str, float] = {}
    if (folder / "meta" / "train_results.json").is_file():
        before = _read_json(folder / "meta" / "train_results.json").get("before", {}).get("hybrids", {})
    pairs = [_read_json(pair / "train_results.json").get("hybrids") for _, pair in _pair_folders(folder, 0)]
    measured = [own for own in pairs if own]
    if not measured:
        return None
    # pairs that were distilled together were measured together
    after = {index: accuracy for own in measured for index, accuracy in own["hybrids"].items()}
    stages = {index: {"before": before.get(index), "after": after[index]} for index in sorted(after, key=int)}
    return {"stages": stages, **{name: measured[-1][name] for name in ("teacher", "chance", "n", "set")}}


def _add_distillation(result: Result, pairs: list[Result]) -> None:
    """Add what the pairs cost to the m2mkd arm, whose own results are those of its end-to-end phase."""
    finetune = {name: result[name] for name in COSTS}
    total = ("train_seconds", "train_flops", "parameters")
    distill = {name: (sum if name in total else max)(pair[name] for pair in pairs) for name in COSTS}
    for name in ("train_seconds", "train_flops", "train_samples_seen"):
        result[name] += distill[name]
    for name in ("images", "labels"):
        result[name] = max(result[name], distill[name])
    result["phases"] = {"distill": distill, "finetune": finetune}


def _read_result(folder: Path) -> Result:
    """The R of DESIGN.md §5 of a finished phase; `iid` and `ood` are `None` where it was not tested."""
    path = folder / "eval_results.json"
    evaluation = _read_json(path)
    costs = _read_costs(folder / "train_results.json")
    load = evaluation.get("expert_load")
    if load is not None and not _is_load(load):
        raise _damaged(path, "`expert_load` is no share of each expert by layer")
    return {**{split: _scores(evaluation, split, path) for split in ("iid", "ood")}, **costs, "expert_load": load}


def _read_costs(path: Path) -> Result:
    content = _read_json(path)
    phases = content.get("phases") or {}
    if not isinstance(phases, dict):
        raise _damaged(path, "`phases` is no mapping")
    costs: Result = {name: _number(content, name, path) for name in COSTS}
    # a published network; an arm whose model stands for two arms
    costs |= {name: content[name] for name in ("pretrained", "same_as") if content.get(name)}
    if phases:
        costs["phases"] = {phase: {name: _number(own, name, path) for name in COSTS} for phase, own in phases.items()}
    return costs


def _read_log(folder: Path) -> list[dict[str, Any]]:
    path = folder / "train_results.json"
    log = _read_json(path).get("log_history") or []
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise _damaged(path, "`log_history` is no list of entries")
    return log


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        way_out = REPEAT.format(folder=path.parent) if path.parent.is_dir() else RUN_AGAIN
        raise ReportError(f"{path} is missing. {way_out}") from error
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no mapping of names to values")
    return content


def _damaged(path: Path, why: str) -> ReportError:
    return ReportError(f"{path} is damaged: {why}. {REPEAT.format(folder=path.parent)}")


def _number(content: Any, name: str, path: Path, highest: float = math.inf) -> float:
    value: Any = content.get(name) if isinstance(content, dict) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not 0 <= value <= highest:
        limit = "" if highest == math.inf else f" up to {highest:g}"
        raise _damaged(path, f"`{name}` should be a number from 0{limit} on, and is {value!r}")
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


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(name), "__version__", "unknown"))


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: `None` for numbers that are not finite, text for unknown objects, no tokens."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if not str(key).endswith("hub_token")}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


# ---- Statistics over the seeds ----


def _statistics(values: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (`None` of one value)."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def _summarise(results: list[Result]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for split in ("iid", "ood"):
        measured = all(result[split] for result in results)
        values = [result[split]["accuracy"] for result in results] if measured else []
        summary[split] = {**_statistics(values), "values": values} if values else None
    return summary


def _compare(seeds: dict[str, Any], first: dict[str, Result], baseline: str) -> dict[str, Any]:
    """The m2mkd arm minus `baseline`, seed by seed; differences of accuracies in [-1, 1]."""
    unit = "epochs" if BUDGETS[baseline] == "equal end-to-end epochs" else "train_flops"
    own = first["m2mkd"][unit]
    comparison: dict[str, Any] = {
        "arm": "m2mkd",
        "baseline": baseline,
        "budget": BUDGETS[baseline],
        "budget_ratio": first[baseline][unit] / own if own else None,
    }
    for split in ("iid", "ood"):
        both = [own["arms"] for own in seeds.values() if {"m2mkd", baseline} <= set(own["arms"])]
        pairs = [(arms["m2mkd"][split], arms[baseline][split]) for arms in both]
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


# ---- Showing it ----


def write_report(output_dir: Path, report: Report, histories: Histories, graph: bytes | None = None) -> Path:
    """
    Write report.json, report.md and report.png into `output_dir`, and graph.png for a NAC, each whole or not at all.

    Args:
        output_dir (`Path`): The run's folder; made if it does not exist.
        report (`dict[str, Any]`): From `collect`, or a report.json read back.
        histories (`dict`): From `read_histories`; `{}` leaves the training curves out.
        graph (`bytes`, *optional*): Picture of a NAC's graph.

    Returns:
        The path of report.md.
    """
    # here, so that reading results needs no matplotlib
    from m2mkd.trainer.report_figure import render_figure, to_markdown

    report = _plain(report)
    contents = {
        "report.json": (json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode(),
        "report.png": render_figure(report, histories),
        "report.md": to_markdown(report).encode(),
        **({} if graph is None else {"graph.png": graph}),
    }
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        _replace(folder / name, content)
    return folder / "report.md"


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the table of results and one sentence a comparison; `console` defaults to the terminal."""
    from m2mkd.trainer.report_figure import print_tables

    # a log file has no width of its own, and the usual 80 columns would break every cell
    console = console or Console(width=None if Console().is_terminal else 140)
    print_tables(report, console)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
