"""The users' command line: processes, exit statuses, and the last line."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.settings.hydra_guard import split_arguments
from engine.settings.sweeps import MAX_LENGTH, sweep_name
from tests.quick import slow_except
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
    names = {path.name for path in Path(last[9:]).iterdir()}
    assert names == {"config.yaml", "run.json", "metrics.jsonl", "step-4", "LATEST"}
    assert "training on 4 examples in 1 step of 4 (875 an epoch), evaluating on 8" in result.stdout
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
    for expected in ("loss: aot, apo_down, ", "pythia28", "batch_size: 4", "keep_checkpoints"):
        assert expected in run.out


@pytest.mark.slow
def test_a_sweep_runs_every_job_in_a_separate_directory(program: Program) -> None:
    cache = f"cache_dir={program.directory / 'cache'}"
    run = program.ok("-m", "loss=dpo", "loss.beta=0.05,0.1,0.5", "n_examples=4", cache)
    directories = [Path(line[9:]) for line in run.out.splitlines() if line.startswith("run_dir: ")]
    assert len(set(directories)) == 3
    betas = [re.search(r"^  beta: (.*)$", (path / "config.yaml").read_text(), re.M) for path in directories]
    assert [match and match[1] for match in betas] == ["0.05", "0.1", "0.5"]
    assert run.out.count("log-probs computed in") == 1 and run.out.count("all log-probs are in") == 2
    jobs = [line for line in run.out.splitlines() if re.match(r"job \d+: ", line)]
    assert [re.search(r"loss\.beta=\S+", line)[0] for line in jobs] == [  # type: ignore[index]
        "loss.beta=0.05",
        "loss.beta=0.1",
        "loss.beta=0.5",
    ]
    assert not (ROOT / "multirun.yaml").exists()


@pytest.mark.slow
def test_runs_of_a_sweep_are_named_by_what_varies(program: Program) -> None:
    run = program.ok("loss=dpo,ipo", "-m", "++loss.beta=0.1,0.5", "n_examples=4", "lr=1e-5")
    names = [line.rpartition("/")[2] for line in run.out.splitlines() if line.startswith("run_dir: ")]
    assert [re.sub(r"_\d{4}-.*", "", name) for name in names] == [
        f"films_tiny_{loss}_beta-{beta}" for loss in ("dpo", "ipo") for beta in (0.1, 0.5)
    ]


@pytest.mark.parametrize(
    "overrides, varied, expected",
    [
        (["lr=1e-6", "seed=3"], ["seed"], "x_seed-3"),
        (
            ["optim.lr=1", "loss.lr=2", "model=a/b c"],
            ["optim.lr", "loss.lr", "model"],
            "x_optim.lr-1_loss.lr-2_model-a-b-c",
        ),
        (["exp_name=x", "local_run_dir=r"], ["exp_name", "local_run_dir"], "x"),
        (["+experiment=x", "loss.beta=-1"], ["experiment", "loss.beta"], "x_beta--1"),
    ],
)
def test_the_name_of_a_job(overrides: list[str], varied: list[str], expected: str) -> None:
    assert sweep_name("x", overrides, varied) == expected


def test_long_names_of_jobs_stay_short_and_apart() -> None:
    names = [sweep_name("x", [f"datasets=/data/{'long-' * 60}{end}"], ["datasets"]) for end in "ab"]
    assert len(set(names)) == 2 and all(len(name) <= len("x_") + MAX_LENGTH for name in names)


@pytest.mark.parametrize(
    "overrides, jobs",
    [
        (["seed=1,2", "local_run_dir={}/a"], "local_run_dir: jobs 0 and 1"),
        (["seed=1,2", "resume={}/a"], "resume: jobs 0 and 1"),
        (["seed=1,2", "local_run_dir={}/a,{}/b"], "local_run_dir: jobs 0 and 2"),
        (["local_run_dir={}/a,{}/./a"], "local_run_dir: jobs 0 and 1"),
    ],
)
def test_two_jobs_in_one_directory_are_refused(overrides: list[str], jobs: str, program: Program) -> None:
    run = program("-m", *(override.replace("{}", str(program.directory)) for override in overrides))
    assert run.status == 2 and run.err.startswith(f"error[CONFIG] {jobs} of the sweep would both write ")
    assert "run directory" not in run.out and list(program.directory.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("names", ["{}/1,{}/2", "{}/$\\{seed\\}", "'{}/${hydra:job.num}'"])
def test_a_sweep_may_name_a_directory_for_each_job(names: str, program: Program) -> None:
    sweep = [
        "n_examples=4",
        "do_first_eval=false",
        "local_run_dir=" + names.replace("{}", str(program.directory)).replace("\\", ""),
        f"sweep.dir={program.directory / 'sweep'}",
    ]
    run = program.ok("-m", *sweep, *(["seed=1,2"] if "," not in names else []))
    assert run.out.count("run_dir: ") == 2
    assert {path.name for path in program.directory.iterdir()} in ({"1", "2", "sweep"}, {"0", "1", "sweep"})


@pytest.mark.parametrize(
    "arguments, options, overrides",
    [
        ("lr=1,2 -m seed=1", "-m", "lr=1,2 seed=1"),
        ("lr=1 -cn x --cfg job loss=dpo", "-cn x --cfg job", "lr=1 loss=dpo"),
        ("--info all a=1 -i b=1 --config-dir=/x ~c", "--info all -i --config-dir=/x", "a=1 b=1 ~c"),
        ("reward_options.length.most=9 reward_options={} -m", "-m", "++reward_options.length.most=9 reward_options={}"),
    ],
)
def test_options_may_follow_overrides(arguments: str, options: str, overrides: str) -> None:
    assert split_arguments(arguments.split()) == (options.split(), overrides.split())


def test_a_sweep_continues_after_a_failed_job(program: Program) -> None:
    run = program("-m", "loss=dpo", "loss.beta=0.3,-1,0.5", "n_examples=4")
    assert run.status == 2 and run.err.count("error[CONFIG]") == 1
    assert run.out.count("run_dir: ") == 2


CLOSED = {
    "stdout": ">&-",
    "stderr": "2>&-",
    "all": "<&- >&- 2>&-",
    "full device": ">/dev/full 2>/dev/full",
    "broken pipe": "2>&1 | head -n 1",
}


@pytest.mark.parametrize("how", slow_except(CLOSED, "all"))
def test_a_run_needs_no_terminal(how: str, tmp_path: Path) -> None:
    """Python has no sys.stdout then. Files must not get the descriptors of closed streams."""
    overrides = [*SMALL, *QUICK, "n_examples=4", "do_first_eval=false", f"local_run_dir={tmp_path}/run"]
    script = f'set -o pipefail; {sys.executable} {ROOT / "train.py"} "$@" {CLOSED[how]}'
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(["bash", "-c", script, "bash", *overrides], capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert "step-4" in {path.name for path in (tmp_path / "run").iterdir()}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    if how == "stderr":
        assert result.stdout.splitlines()[-1] == f"run_dir: {tmp_path}/run"


@pytest.mark.slow
def test_a_plain_locale(tmp_path: Path) -> None:
    """LANG=C without Python's own remedies: files are UTF-8 all the same."""
    rows = [{"prompt": f"東京 {n}?", "chosen": f" é{n}.", "rejected": f" ü{n} 🙂"} for n in range(12)]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    overrides = (*SMALL, *QUICK, f"datasets={path}", "test_fraction=0.25", "sample_during_eval=true")
    locale = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = process(
        *overrides, "n_eval_model_samples=1", f"local_run_dir={tmp_path}/run", directory=tmp_path, **locale
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert (
        "東京" in json.loads((tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])["prompt"]
    )


SHORT, UNEVALUATED = ("n_examples=4",), ("n_examples=4", "do_first_eval=false", "test_fraction=0")


@pytest.mark.parametrize(
    "loss, overrides",
    slow_except(
        itertools.product(["sft", "dpo"], [(), SHORT, UNEVALUATED]),
        *[("dpo", ()), ("sft", SHORT), ("sft", UNEVALUATED)],
    ),
)
def test_a_learning_rate_of_1e30(loss: str, overrides: tuple[str, ...], program: Program) -> None:
    """The weights leave the range of fp32 at once. No checkpoint keeps them."""
    path = write_pairs(program.directory / "mine.jsonl", 40)
    run_dir = program.directory / "run"
    beta = ("loss.beta=0.1",) if loss == "dpo" else ()
    run = program(f"datasets={path}", f"loss={loss}", *beta, "lr=1e30", f"local_run_dir={run_dir}", *overrides)
    assert run.status == 5 and run.err.startswith("error[NONFINITE] ") and run.err.count("\n") == 1, run.err
    assert not list(run_dir.glob("*step-*"))


@pytest.mark.slow
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
        f"datasets=[{path}]",
        "test_fraction=0",
        "n_examples=null",
        "sample_during_eval=true",
        "max_length=280",
        "n_eval_model_samples=2",
    )
    assert len(run.steps) == 3 and run.evals == []
    assert (run.dir / "LATEST" / "policy.pt").exists()


def test_a_mixture(program: Program) -> None:
    path = write_pairs(program.directory / "mine.jsonl")
    run = program.ok(f"datasets=[films,{path}]", "sample_during_eval=true", "max_length=280", "n_eval_model_samples=2")
    assert "ground_truth/policy" not in run.evals[0]  # the reward of films does not fit other responses
    assert "train: 3,686 rows, 3,511 prompts, 3,511 targets" in run.out
    assert "test: 513 rows, 513 prompts, 513 targets" in run.out
