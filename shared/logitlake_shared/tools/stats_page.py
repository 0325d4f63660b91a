"""The figures of a lake as one HTML file: no scripts, nothing fetched, light and dark as the reader's system is.

Pictures are inline SVG that takes its colours from the page, so the file can be mailed, archived or printed.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from logitlake_shared.errors import ConfigError
from logitlake_shared.tools.stats import CacheStats, GroupStats, Histogram, round_up
from logitlake_shared.tools.stats_text import figure_rows, headline

__all__ = ["html_page", "save_html"]

_CHART_WIDTH, _CHART_HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 12, 12, 34, 44
_STRIP_WIDTH, _STRIP_ROW = 860, 30
_STRIP_LABEL = 150

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1c2024; --quiet: #666e76; --line: #e3e5e8;
  --mark: #2f6fb4; --soft: #a9c6e6; --dot: #c2571a; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e8eaed; --quiet: #9aa3ac;
  --line: #343a41; --mark: #6aa9ea; --soft: #2e5379; --dot: #f0955a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem; max-width: 82rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .1rem; }
p { margin: 0 0 1rem; color: var(--quiet); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; margin: 1rem 0;
  overflow-x: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.charts .card { margin: 0; }
table { border-collapse: collapse; width: 100%; } th { font-weight: 600; color: var(--quiet); white-space: nowrap; }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } tr:last-child td { border-bottom: 0; font-weight: 600; }
svg { display: block; width: 100%; height: auto; } svg.wide { min-width: 38rem; }
svg text { font: 11px system-ui, sans-serif; fill: var(--quiet); }
svg .title { font-size: 13px; font-weight: 600; fill: var(--ink); }
.bar { fill: var(--mark); } .range { stroke: var(--soft); stroke-width: 9; stroke-linecap: round; }
.axis { stroke: var(--line); } .median { fill: var(--mark); } .mean { fill: none; stroke: var(--dot); stroke-width: 2; }
"""


def html_page(lake: str, found: Sequence[CacheStats]) -> str:
    """The whole page."""
    sections = "\n".join(_section(stats) for stats in found)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(lake)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(lake)}</h1>\n<p>What the teacher knew about each response token, and what is stored of it.</p>\n"
        f"{sections}\n</body>\n</html>\n"
    )


def save_html(lake: str, found: Sequence[CacheStats], path: Path) -> None:
    """Writes the page. Raises `ConfigError` where that cannot be."""
    try:
        path.write_text(html_page(lake, found), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from None


def _section(stats: CacheStats) -> str:
    charts = "".join(f'<div class="card">{_chart(histogram)}</div>\n' for histogram in stats.histograms)
    groups = [group for group in (*stats.groups, stats.total) if isinstance(group, GroupStats)]
    strips = f'<div class="card">{_strips(groups, stats.by)}</div>\n' if groups else ""
    return (
        f"<section>\n<h2>{escape(stats.cache)}</h2>\n<p>{escape(' · '.join(headline(stats)))}</p>\n"
        f'<div class="card">{_table(stats)}</div>\n{strips}<div class="charts">\n{charts}</div>\n</section>'
    )


def _table(stats: CacheStats) -> str:
    headings, rows = figure_rows(stats)
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _chart(histogram: Histogram) -> str:
    """A bar a bin; the share stands above each bar that has room for it."""
    inner, height = _CHART_WIDTH - _LEFT - _RIGHT, _CHART_HEIGHT - _TOP - _BOTTOM
    slot = inner / max(len(histogram.counts), 1)
    largest = max(histogram.shares, default=0) or 1
    base = _TOP + height
    marks = []
    # As many labels as fit beside each other.
    step = max(-(-len(histogram.labels) * 34 // inner), 1)
    for place, (label, count, share) in enumerate(
        zip(histogram.labels, histogram.counts, histogram.shares, strict=True)
    ):
        left, tall = _LEFT + place * slot, max(share / largest * (height - 14), 1.5 if count else 0)
        tip = f"{histogram.title} {label}: {count:,} tokens, {share:.2%}"
        marks.append(
            f'<rect class="bar" x="{left + 1:.1f}" y="{base - tall:.1f}" width="{max(slot - 2, 1):.1f}" '
            f'height="{tall:.1f}" rx="1.5"><title>{escape(tip)}</title></rect>'
        )
        if share == largest or (share > 0.02 and slot > 30):
            marks.append(_text(left + slot / 2, base - tall - 5, f"{share:.0%}", "middle"))
        if place % step == 0:
            marks.append(_text(left + slot / 2, base + 16, label, "middle"))
    marks.append(f'<line class="axis" x1="{_LEFT}" x2="{_CHART_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    marks.append(_text(_CHART_WIDTH / 2, _CHART_HEIGHT - 8, histogram.unit, "middle"))
    return _svg(_CHART_WIDTH, _CHART_HEIGHT, f"{histogram.title}, share of tokens", marks)


def _strips(groups: Iterable[GroupStats], by: str) -> str:
    """A line from the 5th to the 95th percentile of entropy for each group, a dot at the median, a ring at the mean."""
    groups = list(groups)
    top = max(max(group.entropy_percentiles[95], group.entropy_mean) for group in groups) or 1
    scale = (_STRIP_WIDTH - _STRIP_LABEL - 30) / top
    height = _TOP + _STRIP_ROW * len(groups) + 26
    marks = []
    step = round_up(top / 6)
    for number in range(int(top / step) + 1):
        x = _STRIP_LABEL + scale * step * number
        marks.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - 24}"/>')
        marks.append(_text(x, height - 8, f"{step * number:.3g}", "middle"))
    for place, group in enumerate(groups):
        y = _TOP + _STRIP_ROW * (place + 0.5)
        low, median, high, _ = (_STRIP_LABEL + scale * value for value in group.entropy_percentiles.values())
        mean = _STRIP_LABEL + scale * group.entropy_mean
        tip = f"{group.name}: " + ", ".join(f"p{q} {value:.3f}" for q, value in group.entropy_percentiles.items())
        marks.append(_text(_STRIP_LABEL - 14, y + 4, group.name[:22], "end"))
        marks.append(
            f"<g><title>{escape(tip)}, mean {group.entropy_mean:.3f} nats</title>"
            f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="median" cx="{median:.1f}" cy="{y}" r="4.5"/>'
            f'<circle class="mean" cx="{mean:.1f}" cy="{y}" r="4.5"/></g>'
        )
    title = f"entropy by {by}, nats: 5th to 95th percentile, ● median, ○ mean"
    return _svg(_STRIP_WIDTH, height, title, marks, "wide")


def _svg(width: int, height: int, title: str, marks: Iterable[str], shape: str = "bars") -> str:
    return (
        f'<svg class="{shape}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f'<text class="title" x="{_LEFT}" y="18">{escape(title)}</text>{"".join(marks)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
