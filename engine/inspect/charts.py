"""Histograms in Vega-Lite."""

from typing import Any

import numpy as np

from engine.inspect.findings import Histogram
from engine.pages.drawing import COMMON, STYLE

MAX_BINS = 30
SIZE = {"width": 250, "height": 110}  # fits a phone unscaled


def specification(histogram: Histogram) -> dict[str, Any]:
    """A histogram in Vega-Lite."""
    edges, counts = bins(histogram.values)
    data = [
        {"from": float(start), "to": float(end), "number": int(count)}
        for start, end, count in zip(edges, edges[1:], counts, strict=False)
    ]
    x = {
        "type": "quantitative",
        "title": histogram.unit or None,
        "axis": {"tickCount": 5, "grid": False, "labelSeparation": 8},
    }
    layers: list[dict[str, Any]] = [
        {
            "mark": {"type": "bar"},
            "encoding": {
                "x": {"field": "from", "bin": {"binned": True}, **x},
                "x2": {"field": "to"},
                "y": {"field": "number", "type": "quantitative", "title": None, "axis": {"tickCount": 3}},
            },
        }
    ]
    if is_marked(histogram) and histogram.mark is not None:
        rule = {"type": "rule", "strokeDash": [4, 3]}
        layers.append({"data": {"values": [{}]}, "mark": rule, "encoding": {"x": {"datum": histogram.mark[1]}}})
    return {
        **COMMON,
        **SIZE,
        "description": f"Histogram: {histogram.title}",
        "data": {"values": data},
        "layer": layers,
        "config": STYLE,
    }


def caption(histogram: Histogram) -> str:
    """The title, with the meaning of the dashed line if there is one."""
    if not is_marked(histogram) or histogram.mark is None:
        return histogram.title
    return f"{histogram.title} (dashed: {histogram.mark[0]}, {histogram.mark[1]:g})"


def is_marked(histogram: Histogram) -> bool:
    """Whether the mark is in the range of the chart."""
    edges, _ = bins(histogram.values)
    return histogram.mark is not None and edges[0] <= histogram.mark[1] <= edges[-1]


def bins(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges and counts of bins from the first to the 99th percentile; whole numbers have bins of whole width."""
    low, high = np.percentile(values, [0 if values.min() >= 0 else 1, 99])
    if np.issubdtype(values.dtype, np.integer):
        low, high = min(np.floor(low), 0), np.ceil(high) + 1
        width = max(np.ceil((high - low) / MAX_BINS), 1)
        edges = np.arange(low, high + width, width)
    else:
        edges = np.linspace(0, 1, MAX_BINS + 1)
    counts, _ = np.histogram(values, edges)
    return edges, counts
