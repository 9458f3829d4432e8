"""Charts of report.html: where ticks, points and lines lie, in pixels. The template draws them as SVG."""

from dataclasses import dataclass, field

from matplotlib.ticker import MaxNLocator


WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 40  # margins


@dataclass(frozen=True)
class Series:
    """
    Points of one name.

    Attributes:
        name: In the legend.
        color: As CSS has it.
        points: `(x, y)` in the order of the line.
        spread: Half the length of the bar through the points.
        is_line: Whether the points are joined.
        is_dashed: Whether the line is dashed.
        is_titled: Whether the legend has the name; further lines of a name leave it out.
    """

    name: str
    color: str
    points: list[tuple[float, float]]
    spread: float = 0.0
    is_line: bool = True
    is_dashed: bool = False
    is_titled: bool = True


@dataclass(frozen=True)
class Chart:
    """
    A chart with points and lines.

    Attributes:
        title: Its heading.
        x_label: Of the horizontal axis, which starts at 0.
        y_label: Of the vertical axis.
        series: At least one point.
        level: Name and height of a horizontal line, such as the teacher's accuracy.
        height: In pixels.
    """

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    level: tuple[str, float] | None = None
    width: int = field(default=WIDTH, init=False)
    height: int = field(default=HEIGHT, init=False)
    left: int = field(default=LEFT, init=False)

    @property
    def _ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        xs = [x for own in self.series for x, _ in own.points]
        ys = [y + sign * own.spread for own in self.series for _, y in own.points for sign in (-1, 1)]
        ys += [self.level[1]] if self.level else []
        low, high = min(ys), max(ys)
        pad = 0.08 * (high - low) or 1.0
        return (0.0, 1.06 * max(xs) or 1.0), (low - pad, high + pad)

    def x(self, value: float) -> float:
        """Pixels from the left."""
        low, high = self._ranges[0]
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Pixels from above."""
        low, high = self._ranges[1]
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    @property
    def x_ticks(self) -> list[float]:
        """Round values on the horizontal axis."""
        return _ticks(*self._ranges[0])

    @property
    def y_ticks(self) -> list[float]:
        """Round values on the vertical axis."""
        return _ticks(*self._ranges[1])

    @property
    def text(self) -> str:
        """What the chart shows, for a reader who cannot see it: the last point of each line."""
        said = [f"{own.name} {own.points[-1][1]:.1f} at {own.points[-1][0]:.3g}" for own in self.series]
        said += [f"{self.level[0]} {self.level[1]:.1f}"] if self.level else []
        return f"{self.title}. {self.y_label} by {self.x_label}, at the end: {'; '.join(said)}"


def _ticks(low: float, high: float) -> list[float]:
    return [float(tick) for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
