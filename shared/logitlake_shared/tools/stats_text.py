"""The figures of a cache on a terminal: one table, and its histograms as bars, side by side where there is room."""

from collections.abc import Callable, Iterable, Sequence

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from logitlake_shared.cli_output import compact_table
from logitlake_shared.tools.stats import PERCENTILES, CacheStats, GroupStats, Histogram, PairGroup

__all__ = ["FIGURES", "PAIR_FIGURES", "figure_rows", "headline", "print_stats"]

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_CHART_WIDTHS = (36, 46)
_CHART_GAP = 4
_NUM_CHARTS = 3
_LARGE_PERPLEXITY = 1e4

# Heading and text of each figure, in the order in which table and page show them.
FIGURES: tuple[tuple[str, Callable[[GroupStats], str]], ...] = (
    ("samples", lambda group: f"{group.samples:,}"),
    ("tokens", lambda group: f"{group.tokens:,}"),
    ("entropy, nats", lambda group: f"{group.entropy_mean:.4f}"),
    *(
        (f"p{percentile}", lambda group, percentile=percentile: f"{group.entropy_percentiles[percentile]:.3f}")
        for percentile in PERCENTILES
    ),
    ("tail mass", lambda group: f"{group.tail_mass_mean:.2e}"),
    ("top-1 = label", lambda group: f"{group.top1_is_label:.1%}"),
    ("perplexity", lambda group: _perplexity(group.label_perplexity)),
    ("k", lambda group: f"{group.mean_k:.2f}"),
    ("image adds, nats", lambda group: _optional(group.visual_advantage_mean)),
)
PAIR_FIGURES: tuple[tuple[str, Callable[[PairGroup], str]], ...] = (
    ("pairs", lambda group: f"{group.pairs:,}"),
    ("tokens", lambda group: f"{group.tokens:,}"),
    ("teacher for chosen", lambda group: f"{group.teacher_prefers_chosen:.1%}"),
    ("chosen, nats a token", lambda group: f"{group.chosen_logprob_mean:.4f}"),
    ("rejected", lambda group: f"{group.rejected_logprob_mean:.4f}"),
    ("margin, nats", lambda group: f"{group.margin_mean:.3f}"),
)


def figure_rows(stats: CacheStats) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows of a cache's table, the last row being that of all samples or pairs."""
    groups = (*stats.groups, stats.total)
    if isinstance(stats.total, PairGroup):
        rows = [[text(group) for _, text in PAIR_FIGURES] for group in groups if isinstance(group, PairGroup)]
        names = [name for name, _ in PAIR_FIGURES]
    else:
        rows = [[text(group) for _, text in FIGURES] for group in groups if isinstance(group, GroupStats)]
        names = [name for name, _ in FIGURES]
    # A figure that no group has was not captured.
    kept = [place for place in range(len(names)) if any(row[place] for row in rows)]
    return [stats.by, *(names[place] for place in kept)], [
        [group.name, *(row[place] for place in kept)] for group, row in zip(groups, rows, strict=True)
    ]


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def headline(stats: CacheStats) -> list[str]:
    """What stands beside the cache's name: who made it and what it costs."""
    parts = [f"{stats.kind} by {stats.teacher}", stats.engine, f"fingerprint {stats.fingerprint[:16]}"]
    if stats.bytes_per_token is not None:
        parts.append(f"{stats.bytes_per_token:.1f} bytes/token")
    if stats.stored_kl_mean is not None:
        parts.append(f"stored KL {stats.stored_kl_mean:.1e} nats/token")
    return [*parts, f"snapshot {stats.snapshot}"]


def print_stats(found: Iterable[CacheStats], console: Console | None = None) -> None:
    """Prints every cache's table and histograms."""
    console = console or Console()
    for stats in found:
        console.print(Text(stats.cache, "bold").append(f"  {' · '.join(headline(stats))}", "not bold dim"))
        console.print()
        console.print(_table(stats, console.width))
        if stats.histograms:
            width = _chart_width(console.width)
            console.print()
            console.print(Columns([_chart(histogram, width) for histogram in stats.histograms], (1, _CHART_GAP)))
        console.print()


def _table(stats: CacheStats, width: int) -> RenderableType:
    """One row a group; on a narrow terminal one column a group, as many tables as that takes."""
    headings, rows = figure_rows(stats)
    across = compact_table()
    for place, heading in enumerate(headings):
        across.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for row in rows[:-1]:
        across.add_row(*map(Text, row))
    across.add_section()
    across.add_row(*(Text(cell, "bold") for cell in rows[-1]))
    needed = sum(max(len(cell) for cell in cells) + 2 for cells in zip(headings, *rows, strict=True))
    if needed <= width:
        return across
    label = max(map(len, headings)) + 3
    a_table = max((width - label) // (max(len(cell) for row in rows for cell in row) + 3), 1)
    return Group(*(_turned(headings, rows[start : start + a_table]) for start in range(0, len(rows), a_table)))


def _turned(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    down = compact_table()
    down.add_column(headings[0])
    for row in rows:
        down.add_column(Text(row[0]), justify="right", no_wrap=True)
    for place, heading in enumerate(headings[1:], start=1):
        down.add_row(heading, *(Text(row[place]) for row in rows))
    return down


def _chart_width(width: int) -> int:
    """As many charts side by side as there is room for, and each as wide as that leaves it."""
    narrowest, widest = _CHART_WIDTHS
    side_by_side = max(min((width + _CHART_GAP) // (narrowest + _CHART_GAP), _NUM_CHARTS), 1)
    return min((width + _CHART_GAP) // side_by_side - _CHART_GAP, widest)


def _chart(histogram: Histogram, width: int) -> Table:
    """Bars under each other: where the bin begins, its share as a bar, and in figures."""
    label_width = max(map(len, histogram.labels))
    bar_width = max(width - label_width - 8, 1)
    largest = max(histogram.shares, default=0) or 1
    chart = Table.grid(padding=(0, 1))
    chart.title = Text(f"{histogram.title} ({histogram.unit})", "bold")
    chart.title_justify = "left"
    chart.add_column(justify="right", style="dim", no_wrap=True)
    chart.add_column(width=bar_width, no_wrap=True)
    chart.add_column(justify="right", width=6, no_wrap=True)
    for label, count, share in zip(histogram.labels, histogram.counts, histogram.shares, strict=True):
        chart.add_row(label, Text(_bar(share / largest, bar_width, count > 0), "cyan"), _percent(share, count))
    return chart


def _bar(share: float, width: int, something: bool) -> str:
    eighths = max(round(share * width * 8), 1 if something else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _perplexity(value: float) -> str:
    return f"{value:,.3f}" if value < _LARGE_PERPLEXITY else f"{value:.2e}"


def _percent(share: float, count: int) -> str:
    if not count:
        return "·"
    return f"{share:.1%}" if share >= 0.0005 else "<0.1%"
