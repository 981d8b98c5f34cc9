"""keep_best: the best checkpoint is kept, and compared over the same examples."""

import json
from pathlib import Path

import pytest

from engine.export.saved_models import load_saved
from engine.run.best import BestCheckpoint
from tests.models import pair_examples
from tests.runs import Program


@pytest.mark.parametrize("count, starts_anew", [(4, False), (3, True)])
def test_the_best_is_compared_over_the_same_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, starts_anew: bool
) -> None:
    examples = pair_examples()
    first = BestCheckpoint("loss/eval", examples[:4])
    assert first.update({"loss/eval": 0.1}, "step-4")
    (tmp_path / "step-4").mkdir()
    resumed = BestCheckpoint("loss/eval", examples[:count])
    resumed.resume(first.record, tmp_path, is_first_rank=True)
    assert ("starts anew" in capsys.readouterr().out) == starts_anew
    assert resumed.update({"loss/eval": 0.2}, "step-8") == starts_anew


def test_the_best_checkpoint_is_kept(program: Program) -> None:
    command = ("loss=dpo", "loss.beta=0.1", "peft=lora", "peft.rank=4", "lr=1", "optimizer=SGD", "eval_every=4",
               "n_examples=16", "n_eval_examples=4", "keep_checkpoints=1")  # fmt: skip
    result = program.ok(*command, "keep_best=rewards_eval/margins", f"local_run_dir={program.directory / 'a'}")
    values = {row["counters/examples"]: row["rewards_eval/margins"] for row in result.evals[1:]}
    best = max(values, key=lambda examples: values[examples])
    assert (result.dir / "BEST").resolve().name == f"step-{best}"
    assert {path.name for path in result.dir.glob("step-*")} == {f"step-{best}", "step-16"}
    load_saved(str(result.dir / "BEST"))
    state = json.loads((result.dir / "BEST" / "training_state.json").read_text())
    expected = {"metric": "rewards_eval/margins", "value": values[best], "checkpoint": f"step-{best}"}
    assert len(state["best"].pop("evaluated")) > 8  # a hash of the examples
    assert state["best"] == expected
    lowest = program.ok(*command, "keep_best=loss/eval", f"local_run_dir={program.directory / 'b'}")
    losses = {row["counters/examples"]: row["loss/eval"] for row in lowest.evals[1:]}
    assert (lowest.dir / "BEST").resolve().name == f"step-{min(losses, key=lambda examples: losses[examples])}"
