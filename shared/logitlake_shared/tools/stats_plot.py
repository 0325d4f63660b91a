"""The figures of a lake as one PNG. The only file that imports matplotlib, which is the optional extra `[plot]`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from logitlake_shared.errors import ConfigError
from logitlake_shared.tools.stats import CacheStats, GroupStats, Histogram
from logitlake_shared.tools.stats_text import headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["save_png"]

_DPI = 144
_ROW_INCHES = 3.6
_WIDTH_INCHES = 15.0
_INK, _QUIET, _LINE, _MARK, _SOFT, _DOT = "#1c2024", "#666e76", "#e3e5e8", "#2f6fb4", "#a9c6e6", "#c2571a"


def save_png(found: Sequence[CacheStats], path: Path) -> None:
    """Draws one row a cache of samples: entropy by group, then its histograms.

    Raises `ConfigError` where matplotlib is not installed, no cache holds samples, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            'a PNG needs matplotlib, which is not installed: pip install "logitlake[plot]"; --html FILE needs nothing'
        ) from None
    drawn = [stats for stats in found if stats.histograms]
    if not drawn:
        raise ConfigError("a PNG shows caches of samples, and there is none here; leave --png out")
    figure = Figure(figsize=(_WIDTH_INCHES, _ROW_INCHES * len(drawn)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subfigures(len(drawn), 1, squeeze=False)
    for row, stats in zip(rows[:, 0], drawn, strict=True):
        row.suptitle(
            f"{stats.cache}   {' · '.join(headline(stats))}", x=0.012, ha="left", fontsize=10, color=_INK, weight="bold"
        )
        axes = row.subplots(1, 1 + len(stats.histograms))
        _strips(axes[0], stats)
        for place, histogram in enumerate(stats.histograms, start=1):
            _chart(axes[place], histogram)
    try:
        figure.savefig(path, format="png", facecolor="white")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from None


def _strips(axes: "Axes", stats: CacheStats) -> None:
    groups = [group for group in (*stats.groups, stats.total) if isinstance(group, GroupStats)]
    for place, group in enumerate(groups):
        low, median, high, _ = group.entropy_percentiles.values()
        axes.plot([low, high], [place, place], color=_SOFT, linewidth=7, solid_capstyle="butt")
        axes.plot([median], [place], "o", color=_MARK, markersize=6, clip_on=False)
        axes.plot(
            [group.entropy_mean],
            [place],
            "o",
            markerfacecolor="none",
            markeredgecolor=_DOT,
            markersize=6,
            clip_on=False,
        )
    axes.set_yticks(range(len(groups)), [group.name for group in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="x", color=_LINE)
    axes.set_axisbelow(True)
    _dress(axes, f"entropy by {stats.by}: 5–95 %, ● median, ○ mean", "nats")


def _chart(axes: "Axes", histogram: Histogram) -> None:
    places = range(len(histogram.counts))
    bars = axes.bar(places, [100 * share for share in histogram.shares], width=0.86, color=_MARK)
    axes.bar_label(
        bars,
        labels=[f"{share:.0%}" if share >= 0.02 else "" for share in histogram.shares],
        fontsize=7,
        color=_QUIET,
        padding=1,
    )
    step = max(-(-len(histogram.labels) // 8), 1)
    axes.set_xticks(list(places)[::step], histogram.labels[::step])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    _dress(axes, f"{histogram.title}, share of tokens", histogram.unit)


def _dress(axes: "Axes", title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=9, color=_INK)
    axes.set_xlabel(unit, fontsize=8, color=_QUIET)
    axes.tick_params(labelsize=7.5, colors=_QUIET, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_LINE)
