"""evaluate.py: scores in order, continued after a stop, and RewardBench's results."""

import json
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate
from engine.export.reward_bench import SECTIONS, results_of, row_accuracy, ties_score
from engine.export.scoring import Scorer
from tests.runs import Program

REWARD = ("loss=reward", "optimizer=AdamW", "lr=1e-3", "n_examples=16")
Evaluate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Run evaluate.py; returns (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
        capsys.readouterr()
        status = evaluate.main()
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of a reward model."""
    import train
    from tests.runs import QUICK, SMALL

    directory = tmp_path_factory.mktemp("reward")
    with pytest.MonkeyPatch.context() as patch:
        arguments = [*SMALL, *QUICK, *REWARD, f"local_run_dir={directory}/run", f"cache_dir={directory}/cache"]
        patch.setattr("sys.argv", ["train.py", *arguments])
        assert train.main() == 0
    return directory / "run"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


PAIRS = [
    {"prompt": f"\n\nHuman: Is {n} good?\n\nAssistant:", "chosen": f" Yes, {n}.", "rejected": " No."} for n in range(9)
]


def test_scores_are_those_of_the_run(
    run_evaluate: Evaluate, reward_run: Path, tmp_path: Path, program: Program
) -> None:
    """Of the evaluation at its end: accuracy, mean and deviation of the same rows."""
    data = write(tmp_path / "rows.jsonl", PAIRS)
    trained = program.ok(
        *REWARD, f"datasets={data}", "test_fraction=0.4", "n_examples=4", f"model.archive={reward_run}"
    )
    for layout in ("packed", "padded"):
        target = tmp_path / f"{layout}.jsonl"
        status, out, err = run_evaluate(f"model={trained.dir}", f"data={data}", f"to={target}", f"batching={layout}")
        assert status == 0, err
        rows = read(target)
        assert [row["row"] for row in rows] == list(range(9)) and all(len(row["scores"]) == 2 for row in rows)
        assert [row["accuracy"] for row in rows] == [float(a > b) for a, b in (row["scores"] for row in rows)]
        assert f"all rows                 {sum(row['accuracy'] for row in rows) / 9:.4f}" in out
    packed, padded = (read(tmp_path / f"{layout}.jsonl") for layout in ("packed", "padded"))
    for one, other in zip(packed, padded, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    mean = trained.evals[-1]["rewards_eval/mean"]  # of four of the rows
    scores = torch.tensor([row["scores"] for row in packed])
    means = [scores[list(rows)].mean().item() for rows in combinations(range(9), 4)]
    assert any(math.isclose(mean, each, abs_tol=1e-5) for each in means)


def test_every_form_is_scored_in_order(run_evaluate: Evaluate, reward_run: Path, tmp_path: Path) -> None:
    prompt = "\n\nHuman: Is it good?\n\nAssistant:"
    user = {"role": "user", "content": "Is it good?"}
    texts = [" Yes.", " No."]
    answers = [{"role": "assistant", "content": text.strip()} for text in texts]
    forms: dict[str, dict[str, Any]] = {
        "strings": {"prompt": prompt, "chosen": texts[0], "rejected": texts[1]},
        "transcripts": {"chosen": prompt + texts[0], "rejected": prompt + texts[1]},
        "messages": {"chosen": [user, answers[0]], "rejected": [user, answers[1]]},
        "ranked": {"prompt": prompt, "responses": texts, "scores": [2, 1]},
        "sharegpt": {"conversations": [user], "chosen": answers[0], "rejected": answers[1]},
        "completion": {"prompt": prompt, "completion": texts[0]},
        "alpaca": {"instruction": "Is it good?", "output": "Yes."},
        "lists": {"prompt": prompt, "chosen": texts[:1], "rejected": texts[1:]},
    }
    found = {}
    for form, row in forms.items():
        data, target = write(tmp_path / f"{form}.jsonl", [row]), tmp_path / f"{form}.out"
        status, _, err = run_evaluate(f"model={reward_run}", f"data={data}", f"to={target}")
        assert status == 0, (form, err)
        (found[form],) = read(target)
    first = found["strings"]["scores"]
    assert first[0] != first[1]
    for form, line in found.items():
        assert line["scores"] == pytest.approx(first[: len(line["scores"])], abs=1e-5), form
        assert ("accuracy" in line) == (form not in ("completion", "alpaca"))


def test_a_stopped_command_continues(
    run_evaluate: Evaluate, reward_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "rows.jsonl", PAIRS)
    arguments = (f"model={reward_run}", f"data={data}")
    assert run_evaluate(*arguments, f"to={tmp_path}/whole.jsonl")[0] == 0
    monkeypatch.setattr(evaluate, "ROWS_AT_ONCE", 2)
    scored: list[int] = []
    plain = Scorer.scores

    def stopped(self: Scorer, rows: Any) -> list[list[float]]:
        if len(scored) == 4 and not scored[0] < 0:
            raise KeyboardInterrupt
        scored.extend(range(len(rows)))
        return plain(self, rows)

    monkeypatch.setattr(Scorer, "scores", stopped)
    target = tmp_path / "part.jsonl"
    assert run_evaluate(*arguments, f"to={target}")[0] == 130 and not target.exists()
    partial = tmp_path / ".part.jsonl.partial"
    with open(partial, "a") as file:
        file.write('{"row": 4, "sco')  # a cut line
    scored[:] = [-1]
    status, out, err = run_evaluate(*arguments, f"to={target}")
    assert status == 0, err
    assert "continuing after 4 rows" in out and len(scored) == 1 + 5
    whole = read(tmp_path / "whole.jsonl")
    for row, other in zip(read(target), whole, strict=True):
        assert row["row"] == other["row"] and row["scores"] == pytest.approx(other["scores"], abs=1e-5)
    assert not partial.exists()
    # Another option, or other data, continues nothing.
    scored[:] = []
    assert run_evaluate(*arguments, f"to={tmp_path}/third.jsonl")[0] == 130
    scored[:] = [-1]
    status, _, err = run_evaluate(*arguments, f"to={tmp_path}/third.jsonl", "normalize=true")
    assert status == 2 and "is of another model, other data or other options" in err
    write(data, PAIRS[:8])
    assert run_evaluate(*arguments, f"to={tmp_path}/third.jsonl")[0] == 2


def test_normalised_scores(run_evaluate: Evaluate, reward_run: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", PAIRS)
    config = json.loads((reward_run / "LATEST" / "config.json").read_text())
    plain, normal = tmp_path / "plain.jsonl", tmp_path / "normal.jsonl"
    assert run_evaluate(f"model={reward_run}", f"data={data}", f"to={plain}")[0] == 0
    assert run_evaluate(f"model={reward_run}", f"data={data}", f"to={normal}", "normalize=true")[0] == 0
    for row, other in zip(read(plain), read(normal), strict=True):
        expected = [(score - config["reward_mean"]) / config["reward_std"] for score in row["scores"]]
        assert other["scores"] == pytest.approx(expected, abs=1e-5)


def test_wrong_models_and_files(run_evaluate: Evaluate, sft_run: Path, reward_run: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", PAIRS)
    status, _, err = run_evaluate(f"model={sft_run}", f"data={data}", f"to={tmp_path}/out")
    assert status == 2 and "is a model of text, not a reward model" in err
    assert run_evaluate(f"model={reward_run}", f"data={tmp_path}/none.jsonl", f"to={tmp_path}/out")[0] == 3
    assert run_evaluate(f"model={reward_run}", f"data={data}", f"to={data}")[0] == 2
    assert run_evaluate("help")[0] == 2
    bad = write(tmp_path / "bad.jsonl", [*PAIRS[:2], {"prompt": "x", "chosen": 3, "rejected": "y"}])
    status, _, err = run_evaluate(f"model={reward_run}", f"data={bad}", f"to={tmp_path}/out")
    assert status == 3 and "bad.jsonl line 3: field 'chosen' is a number, not text" in err


# ---- Results ----


def test_accuracy_of_a_row() -> None:
    assert row_accuracy([2.0, 1.0], [(0, 1)], None) == 1 and row_accuracy([1.0, 1.0], [(0, 1)], None) == 0
    assert row_accuracy([3.0, 1.0, 2.0], [(0, 1), (0, 2), (1, 2)], None) == pytest.approx(2 / 3)
    assert row_accuracy([3.0], [], None) is None
    best_of_four = [([4.0, 1, 2, 3], 1), ([4.0, 4, 2, 3], 1 / 2), ([4.0, 4, 4, 4], 1 / 4), ([3.0, 4, 2, 3], 0)]
    assert [row_accuracy(scores, [], 1) for scores, _ in best_of_four] == [expected for _, expected in best_of_four]
    assert row_accuracy([3.0, 2.0, 1.0], [], 2) == 1 and row_accuracy([3.0, 1.0, 2.0], [], 2) == 0


def test_results_of_reward_bench_by_hand() -> None:
    # Each subset is right in one of two rows, but for math-prm (2 of 2) and mt-bench-easy (0 of 2).
    rows = [
        {"subset": subset, "accuracy": {"math-prm": 1.0, "mt-bench-easy": 0.0}.get(subset, float(half)), "scores": []}
        for subsets in SECTIONS.values()
        for subset in subsets
        for half in range(2)
    ]
    results = results_of(rows)
    assert results["hep-go"] == 0.5 and results["Safety"] == results["Chat Hard"] == 0.5
    assert results["Chat"] == pytest.approx(0.5 * 330 / 358)
    assert results["Reasoning"] == pytest.approx(0.75)  # math-prm weighs as much as code
    assert results["RewardBench"] == pytest.approx((0.5 + 0.5 + 0.75 + 0.5 * 330 / 358) / 4)
    assert sum(SECTIONS["Reasoning"].values()) == 2 * 984
    some = results_of([{"subset": "hep-go", "accuracy": 1.0}, {"subset": "mine", "accuracy": 0.0}])
    assert some == {"hep-go": 1.0, "mine": 0.0, "Reasoning": 1.0, "all rows": 0.5}
    assert results_of([{"scores": [1.0]}]) == {}


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
    rows = [{"subset": name, "accuracy": 0.5, "scores": []} for name in others]
    rows += [{"subset": "Ties", "accuracy": 1.0, **row} for row in ties]
    assert results_of(rows)["RewardBench 2"] == pytest.approx((5 * 0.5 + expected) / 6)
