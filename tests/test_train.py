"""The command line as users have it: in a process, its exit status, its last line, and the README's commands."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import chat
import export
from engine.saved_models import load_saved
from tests.runs import QUICK, SMALL, Program

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def strings(path: Path, count: int = 12) -> Path:
    """A file of prompt, chosen and rejected strings."""
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


def test_a_run_in_a_process_of_its_own(tmp_path) -> None:
    result = process(*SMALL, *QUICK, "n_examples=4", directory=tmp_path)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert re.fullmatch(rf"run_dir: {tmp_path}/\w+/films_tiny_sft_[\d_-]+", last)
    assert {path.name for path in Path(last[9:]).iterdir()} == {"config.yaml", "metrics.jsonl", "step-4", "LATEST"}
    assert "training on 4 examples in 1 steps of 4 (875 an epoch), evaluating on 8" in result.stdout
    assert result.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == [Path(last[9:]).parent.name]  # nothing of Hydra's


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


def test_an_error_of_the_program_is_not_blamed_on_the_user(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    import engine.models

    def broken(config: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(engine.models, "load_tokenizer", broken)
    run = program(f"local_run_dir={program.directory / 'x'}")
    assert run.status == 1
    assert run.err == (
        f"error[INTERNAL] ZeroDivisionError: a bug; traceback in {program.directory / 'x' / 'crash.log'}\n"
    )
    assert "in broken" in (program.directory / "x" / "crash.log").read_text()


def test_out_of_memory_has_its_status(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    import engine.models

    def too_large(config: object) -> None:
        raise MemoryError

    monkeypatch.setattr(engine.models, "load_tokenizer", too_large)
    run = program()
    assert run.status == 8 and "token_budget" in run.err


def test_help_lists_the_groups_and_keys(program: Program) -> None:
    run = program("--help")
    assert run.status == 0
    for expected in ("loss: cdpo, dpo, ipo, sft", "pythia28", "batch_size: 4", "keep_checkpoints"):
        assert expected in run.out


def test_a_sweep_runs_every_job_in_a_directory_of_its_own(program: Program) -> None:
    run = program.ok("-m", "loss=dpo", "loss.beta=0.05,0.1,0.5", "n_examples=4")
    directories = [Path(line[9:]) for line in run.out.splitlines() if line.startswith("run_dir: ")]
    assert len(set(directories)) == 3
    betas = [re.search(r"^  beta: (.*)$", (path / "config.yaml").read_text(), re.M) for path in directories]
    assert [match and match[1] for match in betas] == ["0.05", "0.1", "0.5"]
    assert run.out.count("all log-probs are in") >= 2  # the reference is computed once
    assert "job 1: loss=dpo" in run.out or "loss.beta=0.1" in run.out
    assert not (ROOT / "multirun.yaml").exists()


def test_a_sweep_goes_on_after_a_job_that_fails(program: Program) -> None:
    run = program("-m", "loss=dpo", "loss.beta=0.3,-1,0.5", "n_examples=4")
    assert run.status == 2 and run.err.count("error[CONFIG]") == 1
    assert run.out.count("run_dir: ") == 2


def test_a_hub_that_cannot_be_reached_is_told_in_seconds(tmp_path) -> None:
    start = time.monotonic()
    result = process("model=pythia28", "wandb.enabled=false", directory=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 2 and time.monotonic() - start < 40
    assert "the Hugging Face hub cannot be reached" in result.stdout
    assert result.stderr.startswith("error[CONFIG] model.name_or_path") and result.stderr.count("\n") == 1


def test_a_file_of_ones_own(program: Program) -> None:
    path = strings(program.directory / "mine.jsonl")
    run = program.ok("loss=dpo", "loss.beta=0.1", f"datasets=[{path}]", "n_examples=null", "test_fraction=0.25")
    assert "train: 9 rows, 9 prompts, 9 pairs" in run.out and "test: 3 rows" in run.out
    assert "evaluating on 3 (all there are; n_eval_examples=8)" in run.out
    assert [row["counters/examples"] for row in run.steps] == [4, 8, 9]
    assert run.dir.name.startswith("mine_tiny_dpo_")


def test_training_without_evaluation(program: Program) -> None:
    path = strings(program.directory / "mine.jsonl")
    run = program.ok(
        f"datasets=[{path}]", "test_fraction=0", "n_examples=null", "sample_during_eval=true", "n_eval_model_samples=2"
    )
    assert len(run.steps) == 3 and run.evals == []
    assert (run.dir / "LATEST" / "policy.pt").exists()


def test_a_mixture(program: Program) -> None:
    path = strings(program.directory / "mine.jsonl")
    run = program.ok(f"datasets=[films,{path}]", "sample_during_eval=true", "n_eval_model_samples=2")
    assert "ground_truth/policy" not in run.evals[0]  # a reward of films is none of other answers
    assert "3,511 prompts" in run.out or "3,512 prompts" in run.out


# ---- The README ----


def blocks() -> list[list[str]]:
    """The commands in each of the README's code blocks, continued lines joined."""
    texts = re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)
    return [
        [" ".join(line.split()) for line in re.sub(r" +#.*", "", text).replace("\\\n", " ").splitlines()]
        for text in texts
    ]


def commands() -> list[str]:
    """Those with train.py."""
    return [line for block in blocks() for line in block if "train.py" in line]


# What stands in the README for something that a test has not: a smaller stand-in; and places, for single commands.
STAND_INS = [
    (r"^(python (-u )?|torchrun .*)train\.py ?", ""),
    (r"\bmodel=(?!tiny|blank_model)\S+", "model=tiny"),
    (r"model=blank_model model\.name_or_path=(?!mine)\S+", "model=tiny"),
    (r"datasets=\[\S*?\]", "datasets=[films]"),
    (r"data_dir=\S+ ?", ""),
    (r"(num_processes|tensor_parallel_size)=\d+", r"\1=1"),  # tests/test_sharded_runs.py has several
    (r"batch_size=\d+", "batch_size=2"),
    (r"n_epochs=\d+ ?", ""),
    (r"gradient_accumulation_steps=\d+", "gradient_accumulation_steps=2"),
    (r"n_eval_model_samples=\d+", "n_eval_model_samples=2"),
]
PLACES = [(r"model\.archive=\S+", "model.archive=ARCHIVE"), (r"local_run_dir=\S+", "local_run_dir=RUN")]


QUICKER = (*QUICK, "n_eval_model_samples=2", "max_length=260", "max_prompt_length=200")


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("archive")
    result = process(*SMALL, *QUICKER, "n_examples=4", f"local_run_dir={directory / 'run'}", directory=directory)
    assert result.returncode == 0, result.stderr
    return directory / "run" / "LATEST"


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_runs(command: str, program: Program, archive: Path) -> None:
    for pattern, replacement in STAND_INS + PLACES:
        command = re.sub(pattern, replacement, command)
    arguments = shlex.split(command.replace("ARCHIVE", str(archive)).replace("=RUN", f"={program.directory}/run"))
    sizes = () if "model.architecture" in command else SMALL
    run = program.ok(*arguments, "n_examples=4", defaults=sizes + QUICKER)
    assert run.out.splitlines()[-1].startswith("run_dir: ") or "--" in command


@pytest.mark.parametrize("block", [block for block in blocks() if any("export.py" in line for line in block)])
def test_commands_of_the_readme_run_one_after_another(
    block: list[str], program: Program, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(program.directory)
    Path("RUN").symlink_to(archive.parent)
    Path("OTHER").symlink_to(archive)
    Path("prompts.txt").write_text("Is it any good?\n")
    run = None
    for line in block:
        if "train.py" in line:
            for pattern, replacement in STAND_INS:
                line = re.sub(pattern, replacement, line)
            run = program.ok(*shlex.split(line), "n_examples=4", defaults=SMALL + QUICKER)
            if given := re.search(r"model\.archive=(\S+)", line):  # of adapters: what training began with
                assert (
                    f"reference: {Path(given[1], 'base').resolve()} with {Path(given[1]).resolve()}/step-4" in run.out
                )
        elif "from=meta" not in line:  # of which tests/test_export.py has the files
            script, *arguments = shlex.split(line.removeprefix("python ").partition(" < ")[0])
            file = line.partition(" < ")[2]
            monkeypatch.setattr(sys, "stdin", io.StringIO(Path(file).read_text() if file else "hello\n"))
            quicker = ["max_new_tokens=4"] if script == "chat.py" else []
            monkeypatch.setattr(sys, "argv", [script, *arguments, *quicker])
            assert {"chat.py": chat, "export.py": export}[script].main() == 0
            values = dict(argument.split("=", 1) for argument in arguments)
            assert run is None or Path(values["from"]).resolve() == run.dir.resolve()  # the last of a chain
            if script == "export.py" and "format" not in values:
                state = load_saved(values["from"]).model.state_dict()
                exported = AutoModelForCausalLM.from_pretrained(values["to"]).state_dict()
                assert all(torch.equal(exported[name], value) for name, value in state.items())


def test_the_readme_names_every_command_of_the_reference() -> None:
    joined = " ".join(commands())
    for part in (
        "loss=sft",
        "loss=dpo loss.beta=0.1",
        "model=pythia28",
        "model=pythia69",
        "model.archive=",
        "[hh,shp]",
    ):
        assert part in joined
