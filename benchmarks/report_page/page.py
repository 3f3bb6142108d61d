"""All plots on one page that asks nobody for anything: style and pictures stand in it."""

from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from benchmarks.report_page.charts import NUM_COLOURS, draw, format_number
from benchmarks.report_page.results import Result
from benchmarks.report_page.sections import HEADINGS, Plot, make_plots

_LIGHT = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#65a30d")
_DARK = ("#60a5fa", "#fbbf24", "#34d399", "#f87171", "#a78bfa", "#22d3ee", "#f472b6", "#a3e635")
_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tandem, measured</title>
<style>
:root { color-scheme: light dark; --back: #fff; --text: #1f2937; --faint: #6b7280; --grid: #e5e7eb;
{%- for colour in light %} --c{{ loop.index0 }}: {{ colour }};{% endfor %} }
@media (prefers-color-scheme: dark) { :root { --back: #111827; --text: #e5e7eb; --faint: #9ca3af; --grid: #374151;
{%- for colour in dark %} --c{{ loop.index0 }}: {{ colour }};{% endfor %} } }
body { background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto;
max-width: 1320px; padding: 0 1rem; }
.plots { display: grid; gap: 1.5rem 2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); }
figure { margin: 0; } h3 { font-size: 1rem; margin: 0 0 .3rem; } svg { display: block; width: 100%; }
svg text { fill: var(--text); font-size: 12px; } svg .small { font-size: 10px; } svg .grid { stroke: var(--grid); }
svg .mark { stroke: var(--faint); stroke-dasharray: 5 4; } svg polyline { fill: none; stroke-width: 2; }
{% for number in colours %}.fill{{ number }} { fill: var(--c{{ number }}); background: var(--c{{ number }}); }
.line{{ number }} { stroke: var(--c{{ number }}); }
{% endfor -%}
.legend { display: flex; flex-wrap: wrap; font-size: 13px; gap: .2rem 1rem; } .legend i { display: inline-block;
height: .75em; margin-right: .35em; width: .75em; } .wide { grid-column: 1 / -1; overflow-x: auto; }
figcaption { color: var(--faint); font-size: 12px; margin-top: .3rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 13px; }
th, td { border-bottom: 1px solid var(--grid); padding: .15rem .6rem; text-align: right; }
</style>
</head>
<body>
<h1>Tandem, measured</h1>
{% for heading, plots in sections %}
<h2>{{ heading }}</h2>
<div class="plots">
{% for plot, result, picture in plots %}
<figure{% if plot.rows %} class="wide"{% endif %}>
<h3>{{ plot.title or result.benchmark }}</h3>
{% if plot.chart %}
<div class="legend">{% for one in plot.chart.series %}<span><i class="fill{{ loop.index0 % colours | length }}"></i>
{{- one.name }}</span>{% endfor %}</div>
{{ picture }}
{% else %}
<table>
<tr>{% for name in columns(plot.rows) %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in plot.rows %}
<tr>{% for name in columns(plot.rows) %}<td>{{ cell(row.get(name)) }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}
<figcaption>{{ result.origin }}<br><code>{{ result.command }}</code></figcaption>
</figure>
{% endfor %}
</div>
{% endfor %}
{% if skipped %}
<h2>Skipped</h2>
<ul>{% for line in skipped %}<li>{{ line }}</li>{% endfor %}</ul>
{% endif %}
</body>
</html>
"""


def plot_results(results: Sequence[Result]) -> tuple[list[tuple[Plot, Result, Markup]], list[str]]:
    """Every plot with its result and picture, and lines about results that have another form than their benchmark's."""
    plots, skipped = [], []
    for result in results:
        try:
            own = [(plot, result, _picture(plot)) for plot in make_plots(result)]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            skipped.append(f"{result.name}: these are no results of {result.benchmark} ({error!r})")
            continue
        plots += own
        if not own:
            skipped.append(f"{result.name}: nothing of benchmark {result.benchmark} can be shown")
    return plots, skipped


def render(plots: Sequence[tuple[Plot, Result, Markup]], skipped: Sequence[str]) -> str:
    """The page as HTML."""
    by_heading = [(heading, [plot for plot in plots if plot[0].heading == heading]) for heading in HEADINGS]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_TEMPLATE).render(
        sections=[(heading, own) for heading, own in by_heading if own],
        skipped=skipped,
        light=_LIGHT,
        dark=_DARK,
        colours=range(NUM_COLOURS),
        columns=_columns,
        cell=_cell,
    )


def _picture(plot: Plot) -> Markup:
    return Markup("" if plot.chart is None else draw(plot.chart))  # draw has escaped its texts


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return format_number(value)
    return "-" if value is None else str(value)
