"""Charts for the report: SVG as text, drawn here, because a page that asks nobody for anything needs little more.

Every function returns markup that is safe to place in a page: names are escaped where they are put in. Colours are
classes (`c0` … `c5`), so that the page's style decides them for light and dark. A value that is not finite, or not
positive on a logarithmic axis, breaks the line and is never drawn somewhere else; a chart without any value says so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

__all__ = ["Band", "Series", "bar_chart", "heat_map", "legend", "line_chart", "nice_ticks"]

# A chart is as wide as a card on a phone; a wide page shows two side by side, so text never gets small.
_WIDTH, _HEIGHT = 400.0, 230.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 30.0, 34.0
_NUM_COLOURS = 6
_LETTER = 5.6
"""estimated width of a letter of the small print"""
_MOST_DOTS = 40
"""points of a series that are marked one by one; more would be a caterpillar"""


@dataclass(frozen=True)
class Series:
    """One line: `points` are (x, y) in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int | None = 0
    """which of the colours; None for the quiet one"""
    dashed: bool = False
    """a reference to compare with, drawn without dots"""


@dataclass(frozen=True)
class Band:
    """A named stretch of the x axis."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class _Scale:
    """Maps a value of `low` … `high` to a coordinate of `start` … `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    bands: Sequence[Band] = (),
    x_names: Sequence[str] = (),
    y_range: tuple[float, float] | None = None,
    log_y: bool = False,
    percent: bool = False,
) -> Markup:
    """Lines over steps, or over `x_names` (then x counts them from 0). `percent` writes shares of 1 as per cent."""
    drawn = [[(x, y) if _drawable(x, y, log_y) else None for x, y in one.points] for one in series]
    points = [point for one in drawn for point in one if point is not None]
    if not points:
        return _svg(title, _HEIGHT, [_nothing(_HEIGHT)])
    if x_names:
        x_low, x_high = -0.5, len(x_names) - 0.5
    else:
        edges = [edge for band in bands for edge in (band.start, band.end)]
        x_low, x_high = _widened([x for x, _ in points] + edges, log=False)
    y_low, y_high = y_range or _widened([y for _, y in points], log=log_y)
    y_ticks = _log_ticks(y_low, y_high) if log_y else nice_ticks(y_low, y_high, outside=y_range is None)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    to_x = _Scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT)
    to_y = _Scale(y_low, y_high, _HEIGHT - _BOTTOM, _TOP, log_y)

    parts = [_text(4, 12, y_label, "axis"), _text(_WIDTH - _RIGHT, _HEIGHT - 4, x_label, "axis end")]
    for tick in y_ticks:
        parts.append(_line(_LEFT, to_y(tick), _WIDTH - _RIGHT, to_y(tick), "grid"))
        parts.append(_text(_LEFT - 6, to_y(tick) + 4, _percent(tick) if percent else f"{tick:g}", "axis end"))
    x_ticks = list(enumerate(x_names)) if x_names else [(x, f"{x:g}") for x in nice_ticks(x_low, x_high)]
    parts += [
        _text(to_x(x), _HEIGHT - _BOTTOM + 15, name, "axis middle") for x, name in x_ticks if x_low <= x <= x_high
    ]
    for band in bands:
        parts.append(_band(band, to_x(band.start), to_x(band.end), is_first=band is bands[0]))
    for one, line in zip(series, drawn, strict=True):
        parts += _path(one, line, to_x, to_y, percent=percent, x_names=x_names)
    return _svg(title, _HEIGHT, parts)


def bar_chart(title: str, bars: Sequence[tuple[str, float]], *, label: str) -> Markup:
    """Horizontal bars from zero, one for each (name, value), with the value at its end."""
    top = 22.0
    row = _row_height(len(bars), top, least=25.0, most=46.0)
    height = max(top + row * len(bars) + 4, _HEIGHT)
    finite = [value for _, value in bars if math.isfinite(value)]
    if not finite:
        return _svg(title, height, [_nothing(height)])
    left = min(150.0, 14 + 1.15 * _LETTER * max(len(name) for name, _ in bars))
    to_x = _Scale(0.0, max(*finite, 0.0) or 1.0, left, _WIDTH - 62)
    parts = [_text(left, 12, label, "axis")]
    for number, (name, value) in enumerate(bars):
        middle = top + (number + 0.5) * row
        parts.append(_text(left - 8, middle + 4, name, "name end"))
        if math.isfinite(value):
            width = max(to_x(max(value, 0.0)) - left, 1.0)
            parts.append(
                Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}" rx="2"/>').format(
                    _n(left), _n(middle - row / 3), _n(width), _n(row / 1.5)
                )
            )
            parts.append(
                _text(left + width + 6, middle + 4, f"{value:,.0f}" if value >= 1000 else f"{value:.3g}", "name")
            )
        else:
            parts.append(_text(left + 6, middle + 4, "no data", "axis"))
    parts.append(_line(left, top, left, top + row * len(bars), "base"))
    return _svg(title, height, parts)


def heat_map(
    title: str, row_names: Sequence[str], column_names: Sequence[str], shares: Sequence[Sequence[float]]
) -> Markup:
    """A field of shares, rows by columns, as per cent; full colour is twice an equal share, or the largest if more."""
    top = 24.0
    cell = _row_height(len(row_names), top, least=24.0, most=72.0)
    height = max(top + cell * len(row_names) + 6, _HEIGHT)
    finite = [share for row in shares for share in row if math.isfinite(share)]
    if not finite or not column_names:
        return _svg(title, height, [_nothing(height)])
    left = min(130.0, 16 + 1.1 * _LETTER * max(len(name) for name in row_names))
    width = (_WIDTH - left - _RIGHT) / len(column_names)
    full = max(2 / len(column_names), *finite)
    # Names and numbers only where they fit; the tooltip has them all.
    every = max(1, math.ceil(_LETTER * (max(len(name) for name in column_names) + 1) / width))
    parts = [
        _text(left + (number + 0.5) * width, 14, name, "axis middle")
        for number, name in enumerate(column_names)
        if number % every == 0
    ]
    for number, (row_name, row) in enumerate(zip(row_names, shares, strict=True)):
        y = top + number * cell
        parts.append(_text(left - 8, y + cell / 2 + 4, row_name, "name end"))
        for place, (column_name, share) in enumerate(zip(column_names, row, strict=True)):
            said = _percent(share, digits=1) if math.isfinite(share) else "no data"
            # At 60 % of the colour the number in front is still read easily, in light and in dark.
            depth = 0.6 * share / full if math.isfinite(share) else 0.0
            parts.append(
                Markup(
                    '<g><title>{}, {}: {}</title><rect class="heat" x="{}" y="{}" width="{}" height="{}" rx="2" '
                    'fill-opacity="{}"/>'
                ).format(
                    row_name,
                    column_name,
                    said,
                    _n(left + place * width + 1),
                    _n(y + 1),
                    _n(max(width - 2, 0.5)),
                    _n(cell - 2),
                    f"{depth:.3f}",
                )
            )
            if width >= _LETTER * 7:
                parts.append(_text(left + (place + 0.5) * width, y + cell / 2 + 4, said, "name middle"))
            parts.append(Markup("</g>"))
    return _svg(title, height, parts)


def legend(series: Sequence[Series]) -> Markup:
    """The names of the lines with their strokes, as a list that wraps."""
    entries = [
        Markup('<li><i class="stroke {}{}"></i>{}</li>').format(
            _colour(one.colour), " dashed" if one.dashed else "", one.name
        )
        for one in series
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(entries))


def nice_ticks(low: float, high: float, *, about: int = 5, outside: bool = False) -> list[float]:
    """Round values 1, 2, 2.5 or 5 times a power of ten apart: those in `low` … `high`, or (`outside`) around it."""
    raw = (high - low) / max(about - 1, 1)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    # A value that is on a tick but for rounding is on it.
    low_side, high_side = (math.floor, math.ceil) if outside else (math.ceil, math.floor)
    slack = 1e-9 if outside else -1e-9
    first, last = low_side(low / step + slack), high_side(high / step - slack)
    # Rounding cleans 0.30000000000000004; ten digits below the step nothing is meant.
    return [round(number * step, 10 - math.floor(math.log10(step))) for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around `low` … `high`, with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in factors]
    below = [tick for tick in ticks if tick <= low][-1:]
    above = [tick for tick in ticks if tick >= high][:1]
    return below + [tick for tick in ticks if low < tick < high] + above


def _widened(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    """Lowest and highest; a single value gets room on both sides."""
    low, high = min(values), max(values)
    if low < high and (high - low) > 1e-9 * max(abs(low), abs(high)):
        return low, high
    room = abs(low) / 2 or 1.0
    return (low / 2, low * 2) if log else (low - room, low + room)


def _drawable(x: float, y: float, log_y: bool) -> bool:
    return math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)


def _path(
    one: Series,
    line: Sequence[tuple[float, float] | None],
    to_x: _Scale,
    to_y: _Scale,
    *,
    percent: bool,
    x_names: Sequence[str],
) -> list[Markup]:
    """The line in as many pieces as it has, and dots with tooltips."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in line:
        if point is None:
            pieces.append([])
        else:
            pieces[-1].append(point)
    parts = [
        Markup('<polyline class="line {}{}" points="{}"/>').format(
            _colour(one.colour),
            " dashed" if one.dashed else "",
            " ".join(f"{_n(to_x(x))},{_n(to_y(y))}" for x, y in piece),
        )
        for piece in pieces
        if len(piece) > 1
    ]
    if one.dashed:
        return parts
    num_points = sum(len(piece) for piece in pieces)
    for piece in pieces:
        dots = piece if num_points <= _MOST_DOTS or len(piece) == 1 else piece[-1:]
        for x, y in dots:
            where = x_names[int(x)] if x_names else f"{x:g}"
            parts.append(
                Markup('<circle class="dot {}" cx="{}" cy="{}" r="2.6"><title>{}, {}: {}</title></circle>').format(
                    _colour(one.colour),
                    _n(to_x(x)),
                    _n(to_y(y)),
                    one.name,
                    where,
                    _percent(y, digits=1) if percent else f"{y:.4g}",
                )
            )
    return parts


def _band(band: Band, start: float, end: float, *, is_first: bool) -> Markup:
    edge = Markup("") if is_first else _line(start, _TOP - 10, start, _HEIGHT - _BOTTOM, "edge")
    fits = len(band.name) * _LETTER <= end - start
    return edge + (_text((start + end) / 2, _TOP - 4, band.name, "axis middle") if fits else Markup(""))


def _row_height(num_rows: int, top: float, *, least: float, most: float) -> float:
    """Fills the height of a line chart, so that cards beside each other are alike."""
    return min(most, max(least, (_HEIGHT - top - 6) / max(num_rows, 1)))


def _svg(title: str, height: float, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg role="img" viewBox="0 0 {} {}"><title>{}</title>{}</svg>').format(
        _n(_WIDTH), _n(height), title, Markup("").join(parts)
    )


def _nothing(height: float) -> Markup:
    return _text(_WIDTH / 2, height / 2, "no data", "axis middle")


def _text(x: float, y: float, text: str, classes: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(classes, _n(x), _n(y), text)


def _line(x1: float, y1: float, x2: float, y2: float, classes: str) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(classes, _n(x1), _n(y1), _n(x2), _n(y2))


def _colour(number: int | None) -> str:
    return "quiet" if number is None else f"c{number % _NUM_COLOURS}"


def _percent(share: float, digits: int = 0) -> str:
    # Ticks such as 2.5 % keep their half.
    return f"{100 * share:.{digits}f}\u00a0%" if digits else f"{100 * share:.4g}\u00a0%"


def _n(value: float) -> str:
    """A coordinate; a tenth of a unit is finer than a pixel."""
    return f"{value:.1f}".removesuffix(".0")
