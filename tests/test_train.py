"""The users' command line: processes, exit statuses, and the last line."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import QUICK, SMALL, Program

ROOT = Path(__file__).resolve().parent.parent


def write_pairs(path: Path, count: int = 12) -> Path:
    """Write a file of prompt, chosen and rejected strings."""
    rows = [{"prompt": f"Q{n}?", "chosen": f" yes, {n}.", "rejected": f" no, not {n}."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def process(*overrides: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "train.py", f"local_dirs=[{directory}]", *overrides],
        capture_output=True,
        text=True,
        cwd=directory,
        env={name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        | {"OMP_NUM_THREADS": "1", **environment},
        timeout=120,
    )


def test_a_run_in_a_separate_process(tmp_path) -> None:
    result = process(*SMALL, *QUICK, "n_examples=4", directory=tmp_path)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert re.fullmatch(rf"run_dir: {tmp_path}/\w+/films_tiny_sft_[\d_-]+", last)
    assert {path.name for path in Path(last[9:]).iterdir()} == {"config.yaml", "metrics.jsonl", "step-4", "LATEST"}
    assert "training on 4 examples in 1 steps of 4 (875 an epoch), evaluating on 8" in result.stdout
    assert result.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == [Path(last[9:]).parent.name]  # no files of Hydra


@pytest.mark.parametrize(
    "overrides, status, message",
    [
        (["lr=abc", "batch_size=0"], 2, "error[CONFIG] 2 problems: batch_size: must be"),
        (["bach_size=4"], 2, "batch_size"),
        (["loss=dppo"], 2, "dpo"),
        (["loss=dpo"], 2, "loss.beta"),
        (["datasets=[hh]", "data_dir=."], 3, "error[DATA]"),
        (["model.archive=nowhere"], 4, "error[CHECKPOINT] model.archive"),
        (["resume=nowhere"], 4, "error[CHECKPOINT] resume"),
        (["local_run_dir=/proc/nowhere"], 6, "error[STORAGE] local_run_dir"),
    ],
)
def test_errors_are_one_line_with_their_status(
    overrides: list[str], status: int, message: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(program.directory)
    run = program(*overrides)
    assert run.status == status
    assert message in run.err and "; fix: " in run.err
    assert run.err.count("\n") == 1 and "Traceback" not in run.err


def test_an_internal_error_writes_a_crash_log(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:

    from engine.models import tokenizers

    def broken(config: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(tokenizers, "load_tokenizer", broken)
    run = program(f"local_run_dir={program.directory / 'x'}")
    assert run.status == 1
    assert run.err == (
        f"error[INTERNAL] ZeroDivisionError: a bug; traceback in {program.directory / 'x' / 'crash.log'}\n"
    )
    assert "in broken" in (program.directory / "x" / "crash.log").read_text()


def test_out_of_memory_has_its_status(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:

    from engine.models import tokenizers

    def too_large(config: object) -> None:
        raise MemoryError

    monkeypatch.setattr(tokenizers, "load_tokenizer", too_large)
    run = program()
    assert run.status == 8 and "token_budget" in run.err


def test_help_lists_the_groups_and_keys(program: Program) -> None:
    run = program("--help")
    assert run.status == 0
    for expected in ("loss: cdpo, dpo, ipo, sft", "pythia28", "batch_size: 4", "keep_checkpoints"):
        assert expected in run.out


def test_a_sweep_runs_every_job_in_a_separate_directory(program: Program) -> None:
    cache = f"cache_dir={program.directory / 'cache'}"
    run = program.ok("-m", "loss=dpo", "loss.beta=0.05,0.1,0.5", "n_examples=4", cache)
    directories = [Path(line[9:]) for line in run.out.splitlines() if line.startswith("run_dir: ")]
    assert len(set(directories)) == 3
    betas = [re.search(r"^  beta: (.*)$", (path / "config.yaml").read_text(), re.M) for path in directories]
    assert [match and match[1] for match in betas] == ["0.05", "0.1", "0.5"]
    assert run.out.count("log-probs computed in") == 1 and run.out.count("all log-probs are in") == 2
    jobs = [line for line in run.out.splitlines() if line.startswith("job ")]
    assert [re.search(r"loss\.beta=\S+", line)[0] for line in jobs] == [  # type: ignore[index]
        "loss.beta=0.05",
        "loss.beta=0.1",
        "loss.beta=0.5",
    ]
    assert not (ROOT / "multirun.yaml").exists()


def test_a_sweep_continues_after_a_failed_job(program: Program) -> None:
    run = program("-m", "loss=dpo", "loss.beta=0.3,-1,0.5", "n_examples=4")
    assert run.status == 2 and run.err.count("error[CONFIG]") == 1
    assert run.out.count("run_dir: ") == 2


def test_an_unreachable_hub_is_reported_within_seconds(tmp_path) -> None:
    start = time.monotonic()
    result = process("model=pythia28", "wandb.enabled=false", directory=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 2 and time.monotonic() - start < 40
    assert "the Hugging Face hub cannot be reached" in result.stdout
    assert result.stderr.startswith("error[CONFIG] model.name_or_path") and result.stderr.count("\n") == 1


def test_a_user_file(program: Program) -> None:
    path = write_pairs(program.directory / "mine.jsonl")
    run = program.ok("loss=dpo", "loss.beta=0.1", f"datasets=[{path}]", "n_examples=null", "test_fraction=0.25")
    assert "train: 9 rows, 9 prompts, 9 pairs" in run.out and "test: 3 rows" in run.out
    assert "evaluating on 3 (all there are; n_eval_examples=8)" in run.out
    assert [row["counters/examples"] for row in run.steps] == [4, 8, 9]
    assert run.dir.name.startswith("mine_tiny_dpo_")


def test_training_without_evaluation(program: Program) -> None:
    path = write_pairs(program.directory / "mine.jsonl")
    run = program.ok(
        f"datasets=[{path}]", "test_fraction=0", "n_examples=null", "sample_during_eval=true", "n_eval_model_samples=2"
    )
    assert len(run.steps) == 3 and run.evals == []
    assert (run.dir / "LATEST" / "policy.pt").exists()


def test_a_mixture(program: Program) -> None:
    path = write_pairs(program.directory / "mine.jsonl")
    run = program.ok(f"datasets=[films,{path}]", "sample_during_eval=true", "n_eval_model_samples=2")
    assert "ground_truth/policy" not in run.evals[0]  # the reward of films does not fit other responses
    assert "train: 3,686 rows, 3,511 prompts, 3,511 targets" in run.out
    assert "test: 513 rows, 513 prompts, 513 targets" in run.out
