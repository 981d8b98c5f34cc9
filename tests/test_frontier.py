"""benchmarks/frontier.py and benchmarks/online_demo.py: cells, the exact optimum, the picture, and small runs."""

import json
import math
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import frontier, frontier_chart, frontier_measures, online_demo
from benchmarks.common import compose_settings

NAMES = {name: (method.label, method.family) for name, method in frontier.METHODS.items()}


# ---- Cells ----


@pytest.mark.parametrize("cell", frontier.cells(frontier.METHODS, [0]), ids=lambda cell: cell.name)
def test_every_cell_is_a_command(cell: frontier.Cell, tmp_path: Path) -> None:
    frontier.write_preferred(tmp_path / "preferred.jsonl")
    settings = compose_settings(*frontier.COMMON, *cell.command(tmp_path))
    assert settings.seed == 0 and settings.do_first_eval is False
    assert getattr(settings.loss, "beta", cell.beta) == cell.beta


def test_cells_differ_and_the_first_seed_comes_first() -> None:
    cells = frontier.cells(frontier.METHODS, [0, 1])
    assert len({cell.name for cell in cells}) == len(cells)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert [cell.name for cell in frontier.cells(["dpo:0.2", "best_of_n"], [3])] == ["dpo-0.2-seed3", "best_of_n-seed3"]


def test_a_result_is_kept_for_the_same_request_alone(tmp_path: Path) -> None:
    path, request = tmp_path / "cells" / "x.json", {"beta": 0.1, "overrides": ["lr=1e-3"]}
    assert frontier.kept_result(path, request) is None
    frontier.write_whole(path, request | {"points": []})
    assert frontier.kept_result(path, request) == request | {"points": []}
    assert frontier.kept_result(path, request | {"overrides": ["lr=1e-4"]}) is None
    assert [each.name for each in path.parent.iterdir()] == ["x.json"]


# ---- The exact optimum ----


def test_optimum_by_hand() -> None:
    """Rewards 0 and 1, half each: at beta the share of 1 is s = e / (1 + e), e = exp(1 / beta)."""
    rewards = np.array([[0.0, 1.0, 0.0, 1.0]])
    share = 1 / (1 + math.exp(-2))
    reward, kl = frontier_measures.tilted(rewards, 0.5)
    assert reward == pytest.approx(share)
    assert kl == pytest.approx(share * math.log(2 * share) + (1 - share) * math.log(2 * (1 - share)))
    reward, kl = frontier_measures.best_of(rewards, 3)
    assert reward == pytest.approx(7 / 8)
    assert kl == pytest.approx(7 / 8 * math.log(2 * 7 / 8) + 1 / 8 * math.log(2 / 8))


def test_optimum_of_a_known_distribution() -> None:
    """Samples of three rewards agree with their probabilities, and no best of n is above the optimum."""
    levels, shares = np.array([-1.0, 0.0, 1.0]), np.array([0.1, 0.6, 0.3])
    rewards = np.random.default_rng(0).choice(levels, p=shares, size=(100, 512))
    found = frontier_measures.optimum(rewards)
    for point in found["exact"]:
        weights = shares * np.exp(levels / point["strength"])
        weights /= weights.sum()
        assert point["reward"] == pytest.approx(weights @ levels, abs=4 * point["reward_error"] + 1e-3)
        exact = (weights * np.log(np.maximum(weights, 1e-300) / shares)).sum()
        assert point["kl"] == pytest.approx(exact, abs=4 * point["kl_error"] + 2 * abs(point["kl_bias"]) + 1e-3)
    assert [point["kl"] for point in found["exact"]] == sorted(point["kl"] for point in found["exact"])
    for point in found["best_of_n"][:4]:
        assert 0.9 < point["reward"] / frontier_chart.optimum_at(found["exact"], point["kl"]) < 1.01


# ---- The picture ----


def result(method: str, kl: float, reward: float, seed: int = 0, beta: float | None = 0.1) -> dict[str, Any]:
    points = [
        {"examples": 800 * n, "kl": n * kl / 2, "reward": reward / n, "well_formed": 0.9, "reward_error": 0.01}
        for n in (1, 2)
    ]
    return {"method": method, "beta": beta, "seed": seed, "points": points}


@pytest.fixture
def record() -> dict[str, Any]:
    rewards = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=(20, 64))
    cells = [result("dpo", 2.0, 0.8), result("dpo", 3.0, 1.0, seed=1), result("grpo", 2.5, 0.9)]
    return {"optimum": frontier_measures.optimum(rewards), "cells": cells}


def test_table_has_means_and_ranges(record: dict[str, Any]) -> None:
    lines = frontier_chart.table(record, NAMES).splitlines()
    (row,) = [line for line in lines if line.startswith("| DPO |")]
    assert "| 0.1 | 2 | 0.45 (0.40 to 0.50) | 2.50 (2.00 to 3.00) | 0.900" in row
    assert any(line.startswith("| exact | beta = 1 |") for line in lines)


def test_a_run_without_penalty_shows_its_way() -> None:
    means = frontier_chart.mean_points([result("grpo", 4, 0.6, beta=0.0), result("grpo", 1, 0.7)])
    assert [(point["examples"], point["kl"]) for point in means["grpo"]] == [(800, 2), (1600, 4), (1600, 1)]


def test_picture(record: dict[str, Any], tmp_path: Path) -> None:
    frontier_chart.draw(record, NAMES, tmp_path / "x.json")
    svg = (tmp_path / "x.svg").read_text()
    assert all(f">{label}</text>" in svg for label in ("DPO", "GRPO", "exact optimum", "best of n"))
    assert ">IPO</text>" not in svg
    colours = [colour for colour, _ in (frontier_chart.INK, frontier_chart.PAPER, frontier_chart.FAMILIES["truth"][1])]
    style, _, rest = svg.partition("</style>")
    assert "prefers-color-scheme:dark" in style
    assert all(f'fill="{colour}"' in rest and f'[fill="{colour}"]' in style for colour in colours)
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_labels_keep_apart() -> None:
    ends = [(f"method {n}", {"kl": 2 + n / 50, "reward": 0.8}, "#000000") for n in range(8)]
    frame = frontier_chart.Frame.around([point for _, point, _ in ends])
    labels = frontier_chart.place_labels(frame, ends, [point for _, point, _ in ends])
    places = [(label["dx"] > 0, label["dy"]) for label in labels]
    assert len({*places}) == len(ends)


# ---- Small runs ----

FEW = ("n_examples=32", "n_epochs=null", "n_eval_model_samples=4")


@pytest.mark.slow
def test_frontier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two cells. A second command reads the cells that are there."""
    sizes = ("--seeds", "0", "--jobs", "1", "--responses", "2", "--optimum-responses", "4")
    places = ("--work", str(tmp_path / "work"), "--results", str(tmp_path))
    few = (*FEW, "warmup_steps=0")
    frontier.main(["--methods", "preferred,best_of_n", *sizes, *places, *few])
    first = capsys.readouterr().out
    assert "preferred-seed0: reward -" in first and "2 cells in" in first
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "cells").iterdir()}
    frontier.main(["--methods", "preferred,best_of_n", *sizes, *places, *few])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "cells").iterdir()} == files
    assert {path.stem for path in files} == {"optimum", "preferred-seed0", "best_of_n-seed0"}
    record = json.loads((tmp_path / f"frontier-{date.today()}.json").read_text())
    assert [cell["method"] for cell in record["cells"]] == ["preferred", "best_of_n"]
    assert all(cell["points"][-1]["examples"] == 32 and cell["points"][-1]["kl"] != 0 for cell in record["cells"])
    meter = frontier_measures.Meter(tmp_path / "work" / "sft", ["\n\nHuman: Hi\n\nAssistant:"], 3)
    model = meter._reference
    response, other = np.array([5, 6, 0], dtype=np.int32), np.array([7, 0], dtype=np.int32)
    kl = meter._kl(model, [[response, other, response]])  # equal responses count each
    assert kl.shape == (1, 3) and not kl.any()
    assert "| SFT on preferred |" in (tmp_path / f"frontier-{date.today()}.md").read_text()


@pytest.mark.slow
def test_online_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A tiny run misses the goal, and says so. The SFT model is made once."""
    arguments = ["--work", str(tmp_path), f"local_dirs=[{tmp_path}]", *FEW, "n_eval_examples=8"]
    assert online_demo.main(arguments) == 1
    line = capfd.readouterr().out.splitlines()[-1]
    assert line.startswith("MISSED: reward -1.000 (at least +0.90), well formed 0.000") and line.endswith(" with SFT")
    assert online_demo.main(["--seed", "1", *arguments]) == 1
    out = capfd.readouterr().out
    assert "demo_sft" not in out and "seed=1" in out


def test_goal_of_the_online_demo(tmp_path: Path) -> None:
    """Each of reward, form and KL can miss it."""

    def judged(reward: float, kl: float, num_bad: int) -> bool:
        metrics = {"rewards_eval/sampled": reward, "kl_eval": kl, "counters/examples": 16}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
        rows = [{"examples": 16, "policy": " I loved it." if n >= num_bad else "no"} for n in range(100)]
        (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        line, is_reached = online_demo.judge(tmp_path)
        assert line.startswith("reached" if is_reached else "MISSED") and "on 100 held-out prompts" in line
        return is_reached

    assert judged(0.90, 2.5, 3)
    assert not judged(0.89, 2.5, 3) and not judged(0.90, 2.51, 3) and not judged(0.90, 2.5, 4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_online_demo_reaches_its_goal(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    work = tmp_path_factory.getbasetemp() / "online_demo"  # one SFT model for the seeds
    assert online_demo.main(["--work", str(work), "--seed", str(seed), f"local_dirs=[{work}]"]) == 0
