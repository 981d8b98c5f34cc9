"""Results of scored rows, by hand: accuracies, sections of RewardBench, ties of RewardBench 2."""

import math
from typing import Any

import pytest

from engine.export.reward_bench import SECTION_WEIGHTS, results_of, row_accuracy, ties_score


def test_accuracy_of_a_row() -> None:
    assert row_accuracy([2.0, 1.0], [(0, 1)], None) == 1 and row_accuracy([1.0, 1.0], [(0, 1)], None) == 0
    assert row_accuracy([3.0, 1.0, 2.0], [(0, 1), (0, 2), (1, 2)], None) == pytest.approx(2 / 3)
    assert row_accuracy([3.0], [], None) is None
    best_of_four = [([4.0, 1, 2, 3], 1), ([4.0, 4, 2, 3], 1 / 2), ([4.0, 4, 4, 4], 1 / 4), ([3.0, 4, 2, 3], 0)]
    assert [row_accuracy(scores, [], 1) for scores, _ in best_of_four] == [expected for _, expected in best_of_four]
    assert row_accuracy([3.0, 2.0, 1.0], [], 2) == 1 and row_accuracy([3.0, 1.0, 2.0], [], 2) == 0


def table(rows: list[dict[str, Any]]) -> dict[str, dict[str, tuple[float, int]]]:
    return {
        heading: {name: (score, num_rows) for name, score, num_rows in results}
        for heading, results in results_of(rows).items()
    }


def test_results_of_reward_bench_by_hand() -> None:
    # Each subset is right in one of two rows, but for math-prm (2 of 2) and mt-bench-easy (0 of 2).
    rows = [
        {"subset": subset, "accuracy": {"math-prm": 1.0, "mt-bench-easy": 0.0}.get(subset, float(half)), "scores": []}
        for subsets in SECTION_WEIGHTS.values()
        for subset in subsets
        for half in range(2)
    ]
    results = table(rows)
    assert list(results) == ["RewardBench", "overall"] and results["RewardBench"]["hep-go"] == (0.5, 2)
    overall = results["overall"]
    assert overall["Safety"] == (0.5, 10) and overall["Chat Hard"] == (0.5, 12)
    assert overall["Chat"][0] == pytest.approx(0.5 * 330 / 358)
    assert overall["Reasoning"][0] == pytest.approx(0.75)  # math-prm weighs as much as code
    assert overall["RewardBench"] == (pytest.approx((0.5 + 0.5 + 0.75 + 0.5 * 330 / 358) / 4), 46)
    assert overall["all rows"] == (0.5, 46)
    assert [sum(weights.values()) for weights in SECTION_WEIGHTS.values()] == [358, 456, 740, 2 * 984]


def test_unknown_and_missing_subsets_are_told() -> None:
    rows: list[dict[str, Any]] = [
        {"subset": "hep-go", "accuracy": 1.0},
        {"subset": "math-prm", "accuracy": 0.5},
        {"subset": "mine", "accuracy": 0.0},
        {"subset": 7, "accuracy": 1.0},
        {"subset": "Math", "accuracy": 1.0},  # RewardBench 2 has lists
        {"accuracy": 0.0},
    ]
    results = table(rows)
    assert results["RewardBench"] == {"hep-go": (1.0, 1), "math-prm": (0.5, 1)}
    assert results["other subsets"] == {"mine": (0, 1), "7": (1, 1), "Math": (1, 1), "(no subset)": (0, 1)}
    partial = pytest.approx((164 + 0.5 * 984) / (164 + 984))
    assert results["overall"] == {"Reasoning (2 of 7 subsets)": (partial, 2), "all rows": (pytest.approx(3.5 / 6), 6)}
    assert table(rows[2:3]) == {"other subsets": {"mine": (0, 1)}, "overall": {"all rows": (0, 1)}}
    assert table(rows[-1:]) == {"overall": {"all rows": (0, 1)}}
    assert table([{"scores": [1.0]}]) == {}


def test_results_of_reward_bench_2_by_hand() -> None:
    ties = [
        # Gap 1 and 2, spread 0.5.
        {"id": "tied:1", "num_chosen": 2, "scores": [3.0, 2.5, 1.5]},
        {"id": "ref:1", "num_chosen": 1, "scores": [3.0, 1.0]},
        # Gap -1 and 0.5, spread 0.25.
        {"id": "tied:2", "num_chosen": 2, "scores": [2.0, 1.75, 2.75]},
        {"id": "ref:2", "num_chosen": 1, "scores": [2.0, 1.5]},
    ]
    margin = (math.tanh(1 / 0.5 - 1) + math.tanh(-1 / 0.25 - 1)) / 2
    expected = 0.3 * 0.5 + 0.3 * 1 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margin
    assert ties_score(ties) == pytest.approx(expected)
    assert ties_score([{"id": "7", "num_chosen": 1, "scores": [1.0, 0.0]}]) is None
    others = ["Factuality", "Precise IF", "Math", "Safety", "Focus"]
    rows = [{"subset": name, "accuracy": 0.5, "num_chosen": 1, "scores": []} for name in others]
    rows += [{"subset": "ties", "accuracy": 1.0, **row} for row in ties]
    results = table(rows)
    assert results["RewardBench 2"]["Ties"] == (pytest.approx(expected), 4)
    assert results["overall"]["RewardBench 2"] == (pytest.approx((5 * 0.5 + expected) / 6), 9)
    assert "RewardBench 2" not in table(rows[1:])["overall"]
    without_ids = table([row | {"id": "7"} for row in rows])
    assert without_ids["RewardBench 2"]["Ties, plain accuracy"] == (1.0, 4)
    assert "RewardBench 2" not in without_ids["overall"]
    # Equal right scores: the last term is 1, -1, or 0 where the gap is 0 too.
    for gap, last in ((1.0, 1.0), (-1.0, -1.0), (0.0, 0.0)):
        pair = [
            {"id": "tied:1", "num_chosen": 2, "scores": [2.0, 2.0, 2.0 - gap]},
            {"id": "ref:1", "num_chosen": 1, "scores": [2.0, -9.0]},
        ]
        assert ties_score(pair) == pytest.approx(0.3 + (gap > 0) * 0.7 + 0.01 * last)
