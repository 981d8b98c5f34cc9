"""The picture and the table of frontier.py."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

WIDTH, HEIGHT = 760, 500
MAX_KL = 100.0  # of the picture; the table has all
MAX_REWARD = 1.05
# Of the picture in the light, and in the dark.
INK, PAPER, GRID, FAINT = ("#1f2328", "#e6edf3"), ("#ffffff", "#0d1117"), ("#e5e7eb", "#2a3038"), ("#59636e", "#9198a1")
FAMILIES = {
    "pairs": ("learns from pairs", ("#b8500f", "#f0883e")),
    "truth": ("samples, scored by the ground truth", ("#1f6fc4", "#58a6ff")),
    "learned": ("samples, scored by a reward model", ("#a3359b", "#e57bdd")),
}
Methods = Mapping[str, tuple[str, str]]  # label and family of each method
End = tuple[str, Mapping[str, Any], str]  # a label, the point beside it, its colour
FAMILY_SCALE = {
    "domain": [name for name, _ in FAMILIES.values()],
    "range": [light for _, (light, _) in FAMILIES.values()],
}
LEGEND = {"orient": "top", "direction": "horizontal", "symbolOpacity": 1, "symbolType": "circle"}
AXIS_TITLE = {"titleColor": INK[0], "titleFontWeight": "normal", "titleFontSize": 13, "labelFontSize": 12}
TICKS = (0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 10, 20, 40, 60, 100)
X_TITLE = "KL to the reference [nats per response], on a scale of log(1 + KL)"
CONFIG = {
    "view": {"stroke": None},
    "font": "Helvetica, Arial, sans-serif",
    "axis": {"gridColor": GRID[0], "domain": False, "ticks": False, "labelColor": FAINT[0], "labelPadding": 6},
    "axisX": AXIS_TITLE,
    "axisY": AXIS_TITLE,
    "legend": {"labelColor": INK[0], "labelFontSize": 12, "labelLimit": 400, "symbolSize": 90},
}


def ends_of(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points of a cell to show: the last one; without a KL penalty the whole way."""
    return cell["points"] if cell["beta"] == 0 else cell["points"][-1:]


def mean_points(cells: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Means over seeds of each method's points, sorted by beta, or by time without a KL penalty."""
    groups: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for cell in cells:
        for point in ends_of(cell):
            time = point["examples"] if cell["beta"] == 0 else 0
            groups.setdefault((cell["method"], cell["beta"] or 0.0, time), []).append({"beta": cell["beta"], **point})
    found: dict[str, list[dict[str, Any]]] = {}
    for (method, _, _), group in sorted(groups.items()):
        mean: dict[str, Any] = {"beta": group[0]["beta"], "examples": group[0]["examples"], "seeds": len(group)}
        for key in ("reward", "kl", "well_formed"):
            values = [point[key] for point in group]
            mean |= {key: fmean(values), f"{key}_low": min(values), f"{key}_high": max(values)}
        found.setdefault(method, []).append(mean)
    return found


# ---- The table ----


def table(record: Mapping[str, Any], methods: Methods) -> str:
    """Markdown: methods with the range over seeds, and the exact optimum."""
    header = ["method", "beta", "seeds", "reward", "KL [nats]", "well formed", "optimum at this KL"]
    rows = [header]
    for method, points in mean_points(record["cells"]).items():
        for point in points:
            beta = "" if point["beta"] is None else f"{point['beta']:g}"
            beta += f", {point['examples']} prompts" if point["beta"] == 0 else ""
            best = optimum_at(record["optimum"]["exact"], point["kl"])
            measures = [ranged(point, key, digits) for key, digits in (("reward", 2), ("kl", 2), ("well_formed", 3))]
            rows.append([methods[method][0], beta, str(point["seeds"]), *measures, f"{best:.2f}"])
    optimum = [["of the reference", "strength", "reward", "bias", "KL [nats]", "bias"]]
    for name, sign in (("exact", "beta"), ("best_of_n", "n")):
        for point in record["optimum"][name]:
            numbers = [
                *(f"{point['reward']:.3f} ± {point['reward_error']:.3f}", f"{point['reward_bias']:+.3f}"),
                *(f"{point['kl']:.3f} ± {point['kl_error']:.3f}", f"{point['kl_bias']:+.3f}"),
            ]
            optimum.append([name.replace("_", " "), f"{sign} = {point['strength']:g}", *numbers])
    return "\n\n".join(map(markdown, (rows, optimum))) + "\n"


def ranged(point: Mapping[str, Any], key: str, digits: int) -> str:
    """A mean, with the lowest and the highest of several seeds."""
    text = f"{point[key]:.{digits}f}"
    low, high = point[f"{key}_low"], point[f"{key}_high"]
    return text if point["seeds"] == 1 else f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def optimum_at(curve: Sequence[Mapping[str, float]], kl: float) -> float:
    """The exact optimum's reward at a KL: linear between points, constant beyond them."""
    import numpy as np

    ordered = sorted(curve, key=lambda point: point["kl"])
    return float(np.interp(kl, [point["kl"] for point in ordered], [point["reward"] for point in ordered]))


# ---- The picture ----


def draw(record: Mapping[str, Any], methods: Methods, path: Path) -> None:
    """Write <path>.svg, with colours for light and dark, and <path>.png.

    Args:
        methods: label and family of each method.
    """
    import vl_convert

    spec = specification(record, methods)
    svg = vl_convert.vegalite_to_svg(spec, vl_version="5.21")
    path.with_suffix(".svg").write_text(with_dark_colours(svg), encoding="utf-8")
    path.with_suffix(".png").write_bytes(vl_convert.vegalite_to_png(spec, vl_version="5.21", scale=2))


def with_dark_colours(svg: str) -> str:
    """An SVG whose colours follow the reader's light or dark theme."""
    pairs = [INK, PAPER, GRID, FAINT, *(colours for _, colours in FAMILIES.values())]
    rules = "".join(f'[fill="{light}"]{{fill:{dark}}}[stroke="{light}"]{{stroke:{dark}}}' for light, dark in pairs)
    start, end = svg.split(">", 1)
    return f"{start}><style>@media (prefers-color-scheme:dark){{{rules}}}</style>{end}"


def specification(record: Mapping[str, Any], methods: Methods) -> dict[str, Any]:
    """The picture in Vega-Lite: curves of the reference, means of the methods, single seeds behind them."""
    optimum, cells = record["optimum"], record["cells"]
    start = {"kl": 0.0, "reward": optimum["reference_reward"]}
    curves = {"exact optimum": [start, *optimum["exact"]], "best of n": [start, *optimum["best_of_n"]]}
    means = {name: [point for point in points if point["kl"] <= MAX_KL] for name, points in mean_points(cells).items()}
    ends: list[End] = [(name, points[-1], INK[0]) for name, points in curves.items()]
    for name, points in means.items():
        colour = FAMILIES[methods[name][1]][1][0]
        ends += [(methods[name][0], max(points, key=lambda point: point["kl"]), colour)] if points else []
    lines = [{"name": name, **point} for name, points in curves.items() for point in points]
    dots = [{"name": name, **point} for name, points in means.items() for point in points]
    seeds = [{"name": cell["method"], **point} for cell in cells for point in ends_of(cell) if point["kl"] <= MAX_KL]
    frame = Frame.around([*lines, *dots, *seeds])
    for row in (*dots, *seeds):
        row["family"] = FAMILIES[methods[row["name"]][1]][0]
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": WIDTH,
        "height": HEIGHT,
        "padding": 16,
        "background": PAPER[0],
        "description": "Ground-truth reward against KL to the reference: each method, and the exact optimum",
        "layer": [
            *layers_of_marks(frame, start, lines, dots, seeds),
            *(label_layer(frame, label) for label in place_labels(frame, ends, [*lines, *dots])),
            label_layer(frame, {"name": "SFT model, the reference", **start, "dx": 4, "dy": 18, "colour": INK[0]}),
        ],
        "config": CONFIG,
    }


def layers_of_marks(
    frame: "Frame", start: dict[str, Any], lines: Sequence[Any], dots: Sequence[Any], seeds: Sequence[Any]
) -> list[dict[str, Any]]:
    family = {"field": "family", "type": "nominal", "title": None, "scale": FAMILY_SCALE, "legend": LEGEND}
    dash = {"field": "name", "type": "nominal", "legend": None, "scale": {"range": [[5, 4], [1, 0]]}}
    order = {"field": "order", "type": "quantitative"}
    ordered = [[{**point, "order": number} for number, point in enumerate(points)] for points in (lines, dots)]
    method_line = {"type": "line", "strokeWidth": 1.5, "opacity": 0.6}
    return [
        frame.layer(ordered[0], {"type": "line", "color": INK[0], "strokeWidth": 2}, strokeDash=dash, order=order),
        frame.layer([start], {"type": "point", "filled": True, "size": 90, "color": INK[0], "opacity": 1}),
        frame.layer(seeds, {"type": "point", "filled": True, "size": 22, "opacity": 0.45}, color=family),
        frame.layer(ordered[1], method_line, color=family, detail={"field": "name"}, order=order),
        frame.layer(dots, {"type": "point", "filled": True, "size": 80, "opacity": 1}, color=family),
    ]


def label_layer(frame: "Frame", label: Mapping[str, Any]) -> dict[str, Any]:
    mark = {"type": "text", "align": "left", "baseline": "middle", "fontSize": 12, "color": label["colour"]}
    return frame.layer([label], mark | {"dx": label["dx"], "dy": label["dy"], "text": label["name"]})


def place_labels(frame: "Frame", ends: Sequence[End], taken: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Labels beside the last point of their line, at the nearest place free of points and other labels."""
    boxes = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in map(frame.pixels, taken)]
    found = []
    for name, point, colour in ends:
        x, y = frame.pixels(point)
        width = 6.5 * len(name)
        shifts = sorted((0, *range(-64, 65, 8)), key=abs)
        places = [(dx, dy) for dy in shifts for dx in (9, -9 - width)]
        tried = [Box(x + dx, y + dy - 8, x + dx + width, y + dy + 8) for dx, dy in places]
        free = [number for number, box in enumerate(tried) if is_inside(box) and not any(map(box.overlaps, boxes))]
        chosen = free[0] if free else 0
        boxes.append(tried[chosen])
        dx, dy = places[chosen]
        found.append({"name": name, "kl": point["kl"], "reward": point["reward"], "dx": dx, "dy": dy, "colour": colour})
    return found


def is_inside(box: "Box") -> bool:
    """Whether a label ends near the right border at most."""
    return box.left >= 0 and box.right <= WIDTH + 20


class Frame(NamedTuple):
    """The ranges of the picture: KL from 0 to max_kl, reward from min_reward to MAX_REWARD."""

    max_kl: float
    min_reward: float

    @classmethod
    def around(cls, points: Sequence[Mapping[str, Any]]) -> "Frame":
        """The frame of some points, in steps of half a nat and a fifth of a reward."""
        max_kl, min_reward = max(point["kl"] for point in points), min(point["reward"] for point in points)
        return cls(math.ceil(2 * max_kl + 1) / 2, math.floor(5 * min_reward - 0.5) / 5)

    def pixels(self, point: Mapping[str, Any]) -> tuple[float, float]:
        """A point's distance from the left and from the top."""
        height = (MAX_REWARD - point["reward"]) / (MAX_REWARD - self.min_reward)
        return WIDTH * math.log1p(max(point["kl"], 0)) / math.log1p(self.max_kl), HEIGHT * height

    def layer(self, values: Sequence[Mapping[str, Any]], mark: Mapping[str, Any], **encoding: Any) -> dict[str, Any]:
        """Marks of some values at their KL and reward."""
        x = {"field": "kl", "scale": {"type": "symlog", "domain": [0, self.max_kl]}, "title": X_TITLE}
        y = {"field": "reward", "scale": {"domain": [self.min_reward, MAX_REWARD]}, "title": "ground-truth reward"}
        axes = {"type": "quantitative", "axis": {"format": "~g"}}
        ticks = {"values": [value for value in TICKS if value <= self.max_kl], "format": "~g"}
        return {
            "data": {"values": [*values]},
            "mark": dict(mark),
            "encoding": {"x": x | axes | {"axis": ticks}, "y": y | axes, **encoding},
        }


class Box(NamedTuple):
    """A rectangle in pixels, from the upper left."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )
