"""Output shown while phases run: lines of text, and in a terminal one live table of the running phases."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

from accelerate import PartialState
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


# A log file gets a line of progress of each phase at this interval; a terminal gets the table.
SECONDS_BETWEEN_LINES = 30.0
# Minimum time between two drawings of the table, and between two reports of a worker's steps.
SECONDS_BETWEEN_REPORTS = 0.2
T = TypeVar("T")


def in_words(seconds: float) -> str:
    """A duration in its usual unit: seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass
class _Running:
    """How far a phase is, and since when and from which step on it has been seen."""

    step: int
    total: int
    shown: dict[str, str]
    since: float
    first: int
    last_line: float

    def left(self) -> str:
        """Time that the remaining steps take, at the mean pace so far."""
        if self.step == self.first:
            return ""
        pace = (time.monotonic() - self.since) / (self.step - self.first)
        return in_words(pace * (self.total - self.step))

    def values(self) -> str:
        return "".join(f", {key} {value}" for key, value in self.shown.items())


class Screen:
    """
    Screen that draws in this process. If several processes train together, only the main one draws.

    Args:
        stream (`TextIO`, *optional*): Where lines go. `None`: the standard output. The table is drawn on the standard
            error, if that is a terminal.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._running: dict[str, _Running] = {}
        self._live: Live | None = None
        self._last_drawing = 0.0

    def say(self, text: str) -> None:
        """Print a line, above the table."""
        if not PartialState().is_main_process:
            return
        stream = self._stream or sys.stdout
        if self._live is not None and stream.isatty():
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=stream, flush=True)

    def advance(self, name: str, step: int, total: int, shown: dict[str, str]) -> None:
        """Show that the phase `name` has done `step` of `total` steps, with a few values."""
        now = time.monotonic()
        phase = self._running.setdefault(name, _Running(step, total, shown, now, step, now))
        phase.step, phase.total, phase.shown = step, total, shown
        if sys.stderr.isatty():
            self._draw(now)
        elif now - phase.last_line >= SECONDS_BETWEEN_LINES:
            phase.last_line = now
            self.say(f"{name}: step {step:,} of {total:,}{phase.values()}, {phase.left()} left")

    def track(self, name: str, items: Iterable[T], total: int) -> Iterator[T]:
        """Yield the items one by one, and show how many of `total` are done."""
        self.advance(name, 0, total, {})
        for step, item in enumerate(items, start=1):
            yield item
            self.advance(name, step, total, {})
        self.finish(name)

    def finish(self, name: str) -> None:
        """Replace the row of a phase by a line."""
        if name in self._running:
            phase = self._running.pop(name)
            took = in_words(time.monotonic() - phase.since)
            self.say(f"{name}: {phase.step - phase.first:,} steps in {took}{phase.values()}")
            self._end_or_redraw()

    def finish_all(self) -> None:
        """Replace the rows of all phases, which have been stopped, by lines; an error message stands below them."""
        stopped, self._running = self._running, {}
        for name, phase in stopped.items():
            self.say(f"{name}: stopped at step {phase.step:,} of {phase.total:,}{phase.values()}")
        self._end_or_redraw()

    def _draw(self, now: float) -> None:
        if self._live is None:
            # drawn by this thread: data loaders fork, and a thread would leave a lock taken in their processes
            self._live = Live(
                console=Console(stderr=True),
                get_renderable=self._table,
                auto_refresh=False,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        elif now - self._last_drawing < SECONDS_BETWEEN_REPORTS:
            return
        self._last_drawing = now
        self._live.refresh()

    def _end_or_redraw(self) -> None:
        if self._live is not None and self._running:
            self._live.refresh()
        elif self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self) -> Table:
        table = Table(box=None, expand=True, pad_edge=False, header_style="bold")
        keys = list(dict.fromkeys(key for phase in self._running.values() for key in phase.shown))
        table.add_column("Phase", no_wrap=True, overflow="ellipsis")
        table.add_column("", ratio=1)
        for heading in ("Step", *map(str.capitalize, keys), "Left"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, phase in self._running.items():
            values = [phase.shown.get(key, "") for key in keys]
            bar = ProgressBar(total=phase.total, completed=phase.step)
            # brackets are not markup here
            table.add_row(Text(name), bar, f"{phase.step:,}/{phase.total:,}", *values, phase.left())
        return table


class RemoteScreen(Screen):
    """
    Screen of a worker process: everything goes to the process that draws.

    Args:
        send (`Callable`): Called with the name of a method of `Screen` and its arguments, as one tuple.
    """

    def __init__(self, send: Callable[[tuple[Any, ...]], object]):
        super().__init__()
        self._send = send
        self._last_report = 0.0

    def say(self, text: str) -> None:
        self._send(("say", text))

    def advance(self, name: str, step: int, total: int, shown: dict[str, str]) -> None:
        now = time.monotonic()
        if now - self._last_report >= SECONDS_BETWEEN_REPORTS or step == total:
            self._last_report = now
            self._send(("advance", name, step, total, shown))

    def finish(self, name: str) -> None:
        self._send(("finish", name))
