"""Results of a study: the points of each curve, and comparisons at equal compute."""

import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from scipy import stats

from m2mkd.errors import RunError
from m2mkd.experiment.artifact import is_finished
from m2mkd.experiment.machine import device_in_words
from m2mkd.experiment.report.collect import collect, versions
from m2mkd.experiment.run_folder import RunFolder
from m2mkd.experiment.study.spec import Point, StudySpec


# Accuracies are compared at equal FLOPs: measured where two points agree up to this fraction, else interpolated.
SAME_BUDGET = 0.05
LEVEL = 0.95
_MEASURES = ("train_flops", "train_seconds", "parallel_seconds", "peak_memory", "images", "labels")
Results = dict[str, Any]


def collect_study(spec: StudySpec, points: Sequence[Point]) -> Results:
    """
    Gather the results of the seeds that all points have finished.

    Returns:
        `name`, `seeds`, `baseline`, `device`, `versions`, `date`, `teacher` (its accuracies and FLOPs),
        `curves` (by name: `arm`, and `points` with `values` and by seed `iid`, `ood` in [0, 1], FLOPs, seconds and
        the like) and `comparisons`, see [`compare`].

    Raises:
        `RunError`: no seed is finished for all points.
    """
    seeds = [seed for seed in spec.seeds if all(_is_finished(point, seed) for point in points)]
    if spec.seeds[0] not in seeds:
        raise RunError(
            f"Seed {spec.seeds[0]} is not finished for all points of the study. Run it again: it goes on where it "
            "stopped."
        )
    curves: dict[str, Results] = {}
    teacher = None
    for point in points:
        recipe = point.recipe
        content = recipe.model_dump(mode="json")
        report = collect(Path(recipe.output_dir), content, seeds[0], seeds[1:], device_in_words(recipe))
        teacher = teacher or report["teacher"]
        results = {seed: own["arms"][point.curve] for seed, own in report["seeds"].items()}
        extra = results[str(seeds[0])]["arm"]["extra"]
        curve = curves.setdefault(point.curve, {"arm": results[str(seeds[0])]["arm"], "points": []})
        curve["points"].append(
            {
                "values": point.values,
                "run": point.name,
                "extra_flops": sum(report[network]["train_flops"] for network in extra),
                "seeds": {seed: _of_seed(result) for seed, result in results.items()},
            }
        )
    for curve in curves.values():
        curve["points"].sort(key=mean_flops)
    return {
        "name": spec.name,
        "seeds": seeds,
        "baseline": spec.reference,
        "device": device_in_words(points[0].recipe),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "teacher": teacher and {**_scores(teacher), "train_flops": teacher["train_flops"]},
        "curves": curves,
        "comparisons": compare(curves, spec.reference),
    }


def _is_finished(point: Point, seed: int) -> bool:
    return is_finished(RunFolder(point.recipe.output_dir, point.recipe.seed).arm(point.curve, seed))


def _scores(result: Results) -> Results:
    return {split: result[split] and result[split]["accuracy"] for split in ("iid", "ood")}


def _of_seed(result: Results) -> Results:
    return {**_scores(result), **{name: result[name] for name in _MEASURES}}


def mean_flops(point: Results) -> float:
    """FLOPs of a point's training, mean over the seeds."""
    return statistics.fmean(own["train_flops"] for own in point["seeds"].values())


def compare(curves: Mapping[str, Results], baseline: str) -> list[Results]:
    """
    Compare each curve with the baseline at every budget of its points that the baseline covers, seed by seed. Between
    two budgets of the baseline, its accuracy is interpolated linearly in the logarithm of the FLOPs.

    Returns:
        One entry per point: `curve`, `baseline`, `values`, `train_flops`, `is_interpolated`, and for `iid` and `ood`
        the `differences` by seed, their `mean`, the `interval` (95 %, Student's t; `None` for one seed) and the
        `verdict`: `"better"`, `"worse"` or `"not told apart"`.
    """
    found = []
    theirs = curves[baseline]["points"]
    for name, curve in curves.items():
        for point in curve["points"] if name != baseline else ():
            place = _between([mean_flops(own) for own in theirs], mean_flops(point))
            if place is None:
                continue
            before, after, weight = place
            entry = {"curve": name, "baseline": baseline, "values": point["values"], "train_flops": mean_flops(point)}
            entry["is_interpolated"] = before != after
            for split in ("iid", "ood"):
                differences = [
                    own[split]
                    - (1 - weight) * theirs[before]["seeds"][seed][split]
                    - weight * theirs[after]["seeds"][seed][split]
                    for seed, own in point["seeds"].items()
                    if own[split] is not None
                ]
                entry[split] = judged(differences) if differences else None
            found.append(entry)
    return found


def _between(budgets: Sequence[float], budget: float) -> tuple[int, int, float] | None:
    """Indices of the budgets around one, and the weight of the second; `None` outside of all."""
    for index, own in enumerate(budgets):
        if abs(own / budget - 1) <= SAME_BUDGET:
            return index, index, 0.0
    after = next((index for index, own in enumerate(budgets) if own > budget), 0)
    if after == 0:
        return None
    low, high = math.log(budgets[after - 1]), math.log(budgets[after])
    return after - 1, after, (math.log(budget) - low) / (high - low)


def judged(differences: Sequence[float]) -> Results:
    """Mean of paired differences, its 95 % interval (Student's t) and the verdict."""
    mean, interval, verdict = statistics.fmean(differences), None, "not told apart"
    if len(differences) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(differences) - 1)) * error
        interval = [mean - half, mean + half]
        verdict = "better" if interval[0] > 0 else "worse" if interval[1] < 0 else verdict
    return {"differences": list(differences), "mean": mean, "interval": interval, "verdict": verdict}
