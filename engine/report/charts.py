"""The charts of a report in Vega-Lite: curves, histograms of rewards, and rewards against KL."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from engine.pages.drawing import COMMON, STYLE
from engine.report.panels import Panel, Points, smooth, thin
from engine.report.run_log import RunLog, histograms_of

SIZE = {"width": 235, "height": 140}  # fits a phone unscaled
# Readable on white and on black. More runs repeat them.
COLOURS = ("#3b82c4", "#d07a1f", "#2f9e6b", "#a06bd6", "#c8566f", "#8a8a2f", "#3fa3a8", "#9a7350")
DASHES = ([1, 0], [5, 3], [1, 2], [7, 2, 1, 2], [2, 5])
LEGEND = {
    "orient": "bottom",
    "labelLimit": 240,
    "columns": 2,
    "columnPadding": 14,
    "symbolStrokeWidth": 2.5,
    "symbolOpacity": 1,
    "title": None,
    "layout": {"bottom": {"direction": "vertical", "anchor": "start"}},
}
MANY_EXAMPLES = 10_000  # to write 12k
SMALL = 1e-3
MAX_MARKED = 30  # points of a line, to mark each
FAINT = 0.3  # opacity of a noisy line below its mean


def curves(panel: Panel, runs: Sequence[RunLog], labels: Sequence[str]) -> dict[str, Any]:
    """The lines of a panel. Of one run, each metric has a colour; of several, each run, and metrics have dashes.

    Args:
        labels: of the runs.
    """
    lines = [
        Line(label if len(runs) > 1 else metric.label, metric.label, points, run.errors(metric.name))
        for run, label in zip(runs, labels, strict=True)
        for metric in panel.metrics
        if (points := run.series(metric.name))
    ]
    shown = list(dict.fromkeys(line.colour for line in lines))
    colours = [*labels] if len(runs) > 1 else shown  # a run has one colour in all panels
    dashes = list(dict.fromkeys(line.dash for line in lines)) if len(runs) > 1 else []
    largest = max(abs(value) for line in lines for _, value in line.points)
    last = max(examples for line in lines for examples, _ in line.points)
    ends = ", ".join(
        f"{' '.join(dict.fromkeys((line.colour, line.dash)))} from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}"
        for line in lines
    )
    return {
        **COMMON,
        **SIZE,
        "description": f"{panel.title}: {ends}",
        "layer": [
            layer | {"encoding": layer["encoding"] | _axes(layer, largest, last) | _by(line, colours, shown, dashes)}
            for line in lines
            for layer in _layers(line)
        ],
        "config": STYLE | {"legend": LEGEND},
    }


class Line(NamedTuple):
    """A line of a chart.

    Args:
        colour, dash: labels.
        points: examples and values.
        errors: examples, and the ends of bars: of an interval, or of one standard error each way.
    """

    colour: str
    dash: str
    points: Points
    errors: Sequence[tuple[float, float, float]]


def _layers(line: Line) -> list[dict[str, Any]]:
    """A line, its mean if it is noisy, and bars of its errors."""
    mean = smooth(line.points)
    layers = [_stroke(thin(line.points), 1.0 if mean is None else FAINT, has_points=len(line.points) <= MAX_MARKED)]
    if mean is not None:
        layers.append(_stroke(mean, 1.0, has_points=False))
    if line.errors:
        values = [{"x": x, "low": low, "high": high} for x, low, high in line.errors]
        encoding = {"y": {"field": "low"}, "y2": {"field": "high"}}
        layers.append({"data": {"values": values}, "mark": {"type": "rule", "opacity": 0.5}, "encoding": encoding})
    return layers


def _stroke(points: Points, opacity: float, *, has_points: bool) -> dict[str, Any]:
    mark: dict[str, Any] = {"type": "line", "strokeWidth": 1.8, "opacity": opacity}
    if has_points:
        mark["point"] = {"size": 22, "opacity": opacity}
    return {
        "data": {"values": [{"x": x, "y": y} for x, y in points]},
        "mark": mark,
        "encoding": {"y": {"field": "y"}},
    }


def _axes(layer: Mapping[str, Any], largest: float, last: float) -> dict[str, Any]:
    """The axes of a layer, the same for all of a panel.

    Args:
        largest: absolute value of the panel.
        last: number of examples.
    """
    x, y = _axis("x", "examples"), _axis(layer["encoding"]["y"]["field"])
    x["axis"] |= {"grid": False, "format": "~s" if last >= MANY_EXAMPLES else ",.0f"}
    if 0 < largest < SMALL:  # its zeros would not fit
        y["axis"]["format"] = "~e"
    return {"x": x, "y": y}


def _axis(field: str, title: str | None = None) -> dict[str, Any]:
    axis = {"tickCount": 4, "labelSeparation": 8}
    return {"field": field, "type": "quantitative", "title": title, "axis": axis, "scale": {"zero": False}}


def _by(line: Line, colours: Sequence[str], shown: Sequence[str], dashes: Sequence[str]) -> dict[str, Any]:
    """Colour and dash of a line. A single metric of a single run needs no legend."""
    found = {"color": _colour(colours, line.colour, shown)}
    if len(dashes) > 1:
        scale = {"domain": [*dashes], "range": DASHES[: len(dashes)]}
        found["strokeDash"] = {"datum": line.dash, "scale": scale, "title": None, "legend": {"symbolType": "stroke"}}
    return found


def _colour(labels: Sequence[str], label: str, shown: Sequence[str], symbol: str = "stroke") -> dict[str, Any]:
    scale = {"domain": [*labels], "range": [COLOURS[number % len(COLOURS)] for number in range(len(labels))]}
    legend = None if len(labels) == 1 else {"symbolType": symbol, "values": [*shown]}
    return {"datum": label, "scale": scale, "legend": legend, "title": None}


def histogram(row: Mapping[str, Any]) -> dict[str, Any]:
    """Histograms over each other, of a row of histograms.jsonl."""
    found = histograms_of(row)
    layers = []
    for label, values in found.items():
        width = (values["high"] - values["low"]) / len(values["counts"])
        bars = [
            {"from": values["low"] + width * number, "to": values["low"] + width * (number + 1), "number": count}
            for number, count in enumerate(values["counts"])
        ]
        layers.append(
            {
                "data": {"values": bars},
                "mark": {"type": "bar", "opacity": 0.55},
                "encoding": {
                    "x": _axis("from") | {"bin": {"binned": True}},
                    "x2": {"field": "to"},
                    "y": _axis("number") | {"scale": {"zero": True}},
                    "color": _colour([*found], label, [*found], symbol="square"),
                },
            }
        )
    return {
        **COMMON,
        **SIZE,
        "description": f"Histogram of held-out rewards: {', '.join(found)}",
        "layer": layers,
        "config": STYLE | {"legend": LEGEND},
    }


def frontier(points: Sequence[Mapping[str, Any]], reward: str, is_sweep: bool) -> dict[str, Any]:
    """Reward against KL, a point with its label for each run.

    Args:
        points: kl, reward, label, and kl_error (0 if unknown).
        reward: the name of the vertical axis.
        is_sweep: of one setting, so a line joins the points in their order.
    """
    x = {**_axis("kl", "KL from the reference, nats per response"), "scale": {"zero": True}}
    y = _axis("reward", reward)
    joined = {
        "mark": {"type": "line", "opacity": 0.35},
        "encoding": {"x": x, "y": y, "order": {"field": "number"}, "color": {"value": COLOURS[0]}},
    }
    text = {"align": "left", "dx": 7, "dy": -6, "fontSize": 11}
    colour = {"color": {"value": COLOURS[0]}}
    return {
        **COMMON,
        "width": 460,
        "height": 260,
        "padding": {"right": 60, "left": 5, "top": 5, "bottom": 5},
        "description": "Reward against KL: "
        + ", ".join(f"{p['label']} {p['reward']:.3g} at {p['kl']:.3g}" for p in points),
        "data": {
            "values": [
                {**point, "number": number, "low": point["kl"] - error, "high": point["kl"] + error}
                for number, (point, error) in enumerate((point, point["kl_error"]) for point in points)
            ]
        },
        "layer": [
            *([joined] if is_sweep else []),
            {
                "mark": {"type": "rule", "opacity": 0.5},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y, **colour},
            },
            {"mark": {"type": "point", "filled": True, "size": 60}, "encoding": {"x": x, "y": y, **colour}},
            {"mark": {"type": "text", **text}, "encoding": {"x": x, "y": y, "text": {"field": "label"}}},
        ],
        "config": STYLE,
    }
