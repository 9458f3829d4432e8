"""Draws the pictures of method.md into pictures/. Run it after a change of this file."""

from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.text import Text


mpl.rcParams["svg.hashsalt"] = "m2mkd"  # the same file every time
FOLDER = Path(__file__).parent / "pictures"
FROZEN, TRAINED, PLAIN = "#dbe7f5", "#fbd9b5", "#f2f2f2"
Point = tuple[float, float]


def panel(width: float, height: float) -> Axes:
    """A drawing of this size in inches."""
    _, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return axes


def box(axes: Axes, at: Point, text: str, color: str) -> Text:
    style = {"boxstyle": "round,pad=0.5", "facecolor": color, "edgecolor": "#444444"}
    return axes.text(*at, text, ha="center", va="center", fontsize=11, bbox=style)


def arrow(axes: Axes, start: Text, end: Text, style: str = "-|>", line: str = "-") -> None:
    """From the edge of one box to that of the other, which are drawn first."""
    ends = {"patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch(), "shrinkA": 2, "shrinkB": 2}
    options = {"arrowstyle": style, "color": "#444444", "linestyle": line, **ends}
    axes.annotate("", end.get_position(), start.get_position(), arrowprops=options, zorder=4)


def chain(axes: Axes, boxes: list[tuple[Point, str, str]]) -> list[Text]:
    """Boxes and the arrows from each to the next."""
    drawn = [box(axes, *entry) for entry in boxes]
    for start, end in pairwise(drawn):
        arrow(axes, start, end)
    return drawn


def legend(axes: Axes, x: float, y: float) -> None:
    for index, (color, text) in enumerate([(FROZEN, "frozen"), (TRAINED, "trained")]):
        at = x + 1.3 * index
        axes.text(at, y, "    ", va="center", fontsize=7, bbox={"facecolor": color, "edgecolor": "#444444"})
        axes.text(at + 0.35, y, text, va="center", fontsize=10)


def with_meta_model() -> None:
    axes = panel(10, 3)
    prefix = chain(axes, [((0.8, 1.5), "image", PLAIN), ((2.3, 1.5), "M1", FROZEN)])
    teacher = chain(axes, [((5.2, 2.4), "T2", FROZEN), ((7.6, 2.4), "M3", FROZEN), ((9, 2.4), "logits", PLAIN)])
    student = [((3.8, 0.6), "stitch", TRAINED), ((5.2, 0.6), "S2", TRAINED), ((6.4, 0.6), "stitch", TRAINED)]
    student = chain(axes, [*student, ((7.6, 0.6), "M3", FROZEN), ((9, 0.6), "logits", PLAIN)])
    arrow(axes, prefix[-1], teacher[0])
    arrow(axes, prefix[-1], student[0])
    arrow(axes, teacher[-1], student[-1], "<|-|>", "--")
    axes.text(9.1, 1.5, "loss", fontsize=11, va="center")
    legend(axes, 0.5, 0.3)


def with_teacher() -> None:
    axes = panel(10, 3)
    teacher = [((0.8, 2.4), "image", PLAIN), ((2.2, 2.4), "T1", FROZEN), ((3.8, 2.4), "hidden\nstates 1", PLAIN)]
    teacher += [((5.4, 2.4), "T2", FROZEN), ((7, 2.4), "hidden\nstates 2", PLAIN), ((8.2, 2.4), "T3", FROZEN)]
    teacher = chain(axes, [*teacher, ((9.3, 2.4), "logits", PLAIN)])
    student = [((3.8, 0.6), "stitch", TRAINED), ((5.4, 0.6), "S2", TRAINED), ((7, 0.6), "stitch", TRAINED)]
    student = chain(axes, student)
    arrow(axes, teacher[2], student[0])
    arrow(axes, teacher[4], student[-1], "<|-|>", "--")
    axes.text(7.1, 1.5, "boundary loss", fontsize=11, va="center")
    legend(axes, 0.5, 0.3)


def arm() -> None:
    axes = panel(10, 3.4)
    phase = box(axes, (6.4, 1.7), "end-to-end\nphase", TRAINED)
    arrow(axes, phase, box(axes, (8.7, 1.7), "student in\narms/NAME", PLAIN))
    words = {
        "init": "where the weights come from:\nrandom, modules, upcycled",
        "supervision": "what it learns from:\nlabels, teacher",
        "data": "which images it sees",
        "training": "how long: epochs, or the FLOPs\nof another arm (budget)",
    }
    for index, (word, meaning) in enumerate(words.items()):
        arrow(axes, box(axes, (2.2, 2.95 - 0.83 * index), f"{word}: {meaning}", PLAIN), phase)


if __name__ == "__main__":
    for draw in (with_meta_model, with_teacher, arm):
        draw()
        plt.savefig(FOLDER / f"{draw.__name__}.svg", metadata={"Date": None})
