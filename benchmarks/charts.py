"""One PNG for a section: bars of its contenders with a dot for every round, or its curves."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.record import Curve, Measured, Section

OURS, THEIRS, INK, MUTED = "#1f6f8b", "#b8bec4", "#22272b", "#5f676d"
LINES = ("#1f6f8b", "#5f676d", "#c8702a", "#7a9a3a", "#8a4f7d", "#3a3f44")
WIDTH, BAR, EDGE = 8.0, 0.36, 0.95
"""Inches: of the chart, of a bar with its gap, and of a panel's axis with its label."""
NOT_OURS = ("bare", "BatchGenerator", "mlx_lm", "transformers", "read JSON", "write json", "write JSON", "JSON")


def draw(section: Section, path: Path) -> bool:
    """Write the chart; False where there is nothing to show."""
    if section.curves:
        figure = _lines(section.curves)
    elif section.measured:
        figure = _bars(section.measured)
    else:
        return False
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    return True


def _bars(measured: tuple[Measured, ...]) -> Figure:
    units = list(dict.fromkeys(one.unit for one in measured))
    panels = [[one for one in measured if one.unit == unit] for unit in units]
    heights = [BAR * len(panel) + EDGE for panel in panels]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(units), 1, squeeze=False, height_ratios=[len(panel) + 1 for panel in panels])
    for axes, unit, panel in zip(all_axes[:, 0], units, panels, strict=True):
        _bar_panel(axes, unit, panel)
    return figure


def _bar_panel(axes: Axes, unit: str, panel: list[Measured]) -> None:
    places = range(len(panel))
    medians = [one.median for one in panel]
    colours = [THEIRS if one.name.startswith(NOT_OURS) else OURS for one in panel]
    axes.barh(places, medians, height=0.62, color=colours, zorder=2)
    most = max((max(one.rounds) for one in panel), default=1.0) or 1.0
    for place, one in zip(places, panel, strict=True):
        if len(one.rounds) > 1:
            axes.plot(one.rounds, [place] * len(one.rounds), "o", ms=3, mfc="white", mec=INK, mew=0.7, zorder=3)
        axes.text(max(one.rounds) + most * 0.015, place, f"{one.median:.4g}", va="center", color=INK, fontsize=9)
    axes.set_yticks(places, [one.name for one in panel], fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, most * 1.12)
    axes.set_xlabel(f"{unit} (bar: median, dots: rounds)" if len(panel[0].rounds) > 1 else unit, color=MUTED)
    _quiet(axes, "x")


def _lines(curves: tuple[Curve, ...]) -> Figure:
    labels = list(dict.fromkeys((curve.x_label, curve.y_label) for curve in curves))
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    for axes, (x_label, y_label) in zip(figure.subplots(1, len(labels), squeeze=False)[0], labels, strict=True):
        shown = [curve for curve in curves if (curve.x_label, curve.y_label) == (x_label, y_label)]
        for curve, colour in zip(shown, LINES * len(shown), strict=False):
            axes.plot(*zip(*curve.points, strict=True), "o-", ms=4, lw=1.6, color=colour, label=curve.name)
        xs = sorted({x for curve in shown for x, _ in curve.points})
        if xs[0] > 0 and xs[-1] / xs[0] > 8:
            axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(xs, [f"{x:g}" for x in xs], fontsize=9)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label, color=MUTED)
        axes.set_ylabel(y_label, color=MUTED)
        _quiet(axes, "y")
    axes.legend(frameon=False, fontsize=9)
    return figure


def _quiet(axes: Axes, grid: str) -> None:
    """No box; faint lines along one direction, behind everything."""
    axes.spines[["top", "right", "left" if grid == "x" else "top"]].set_visible(False)
    axes.grid(axis=grid, color="#e4e7ea", lw=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK, labelsize=9)
