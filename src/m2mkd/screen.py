"""Output shown while phases run: lines of text, and a progress bar per running phase."""

import sys
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from typing import TextIO, TypeVar

from accelerate import PartialState
from tqdm.auto import tqdm


# A log file gets a line of progress at this interval; a terminal gets a bar.
SECONDS_BETWEEN_LINES = 30.0
# Minimum time between two reports of a worker's steps.
SECONDS_BETWEEN_REPORTS = 0.2
T = TypeVar("T")


class Screen:
    """
    Screen that draws in this process. If several processes train together, only the main one draws.

    Args:
        stream (`TextIO`, *optional*): Where lines go. `None`: the standard output.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._bars: dict[str, tqdm] = {}
        self._last_line: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        if PartialState().is_main_process:
            # tqdm hides its bars while it writes
            stream = self._stream or sys.stdout
            tqdm.write(text, file=stream)
            stream.flush()

    def advance(self, name: str, step: int, total: int, shown: dict[str, str]) -> None:
        """Show that the phase `name` has done `step` of `total` steps, with a few values."""
        if not sys.stderr.isatty():
            self._advance_by_line(name, step, total, shown)
            return
        if name not in self._bars:
            self._bars[name] = tqdm(desc=name, initial=step, total=total, dynamic_ncols=True, leave=False)
        bar = self._bars[name]
        bar.set_postfix(shown, refresh=False)
        bar.update(step - bar.n)

    def track(self, name: str, items: Iterable[T], total: int) -> Iterator[T]:
        """Yield the items one by one, and show how many of `total` are done."""
        self.advance(name, 0, total, {})
        for step, item in enumerate(items, start=1):
            yield item
            self.advance(name, step, total, {})
        self.finish(name)

    def _advance_by_line(self, name: str, step: int, total: int, shown: dict[str, str]) -> None:
        now = time.monotonic()
        if now - self._last_line.setdefault(name, now) >= SECONDS_BETWEEN_LINES:
            self._last_line[name] = now
            values = "".join(f", {key} {value}" for key, value in shown.items())
            self.say(f"{name}: step {step:,} of {total:,}{values}")

    def finish(self, name: str) -> None:
        """Turn the bar of a phase into a line above the others."""
        self._last_line.pop(name, None)
        if name in self._bars:
            bar = self._bars.pop(name)
            as_line = str(bar)
            # a bar that tqdm leaves behind moves the others down, and their old drawings stay
            bar.close()
            # from the start of the line, where tqdm may not have gone back to
            tqdm.write(f"\r{as_line}", file=sys.stderr)

    def finish_all(self) -> None:
        """Turn all bars into lines, so that an error message stands below them."""
        for name in list(self._bars):
            self.finish(name)


class RemoteScreen(Screen):
    """Screen of a worker process: sends everything through a pipe to the process that draws."""

    def __init__(self, connection: Connection):
        super().__init__()
        self._connection = connection
        self._last_report = 0.0

    def say(self, text: str) -> None:
        self._connection.send(("say", text))

    def advance(self, name: str, step: int, total: int, shown: dict[str, str]) -> None:
        now = time.monotonic()
        if now - self._last_report >= SECONDS_BETWEEN_REPORTS or step == total:
            self._last_report = now
            self._connection.send(("advance", name, step, total, shown))

    def finish(self, name: str) -> None:
        self._connection.send(("finish", name))
