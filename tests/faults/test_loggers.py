"""wandb that refuses, raises or blocks changes neither the steps nor the exit status, nor holds the run up."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import engine.metrics
from engine.metrics import Background
from tests.runs import QUICK, SMALL, Program, Run

ROOT = Path(__file__).resolve().parent.parent.parent
OVERRIDES = (
    "minimum_log_interval_secs=0",
    "sample_during_eval=true",
    "n_eval_model_samples=2",
    "eval_every=8",
    "max_length=96",
    "max_prompt_length=80",
)


class FakeWandb:
    """A module like wandb that notes its calls; one of them refuses or blocks."""

    def __init__(self, refuses: str = "", blocks: str = ""):
        self.refuses, self.blocks = refuses, blocks
        self.calls: list[tuple[str, Any]] = []
        self.end = threading.Event()
        self.Table = lambda columns, data: SimpleNamespace(columns=columns, data=list(data))
        self.Settings = SimpleNamespace

    def call(self, name: str, value: Any = None) -> None:
        self.calls.append((name, value))
        if name == self.refuses:
            raise ConnectionError(f"{name} is refused,\nalas: hf_{'a' * 34}")
        if name == self.blocks:
            self.end.wait(60)

    def init(self, **arguments: Any) -> Any:
        self.call("init", arguments)
        return SimpleNamespace(
            log=lambda values, step: self.call("log", (step, values)),
            finish=lambda exit_code: self.call("finish", exit_code),
        )


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch):
    fakes = []

    def fake(**kwargs: str) -> FakeWandb:
        fakes.append(FakeWandb(**kwargs))
        monkeypatch.setitem(sys.modules, "wandb", fakes[-1])
        return fakes[-1]

    yield fake
    for one in fakes:
        one.end.set()


def learned(run: Run) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, without times and memory."""
    names = ("_per_second", "peak_memory_gb")
    return [{name: value for name, value in row.items() if not name.endswith(names)} for row in run.metrics]


@pytest.fixture(scope="module")
def without(tmp_path_factory, cache):
    """Metrics of the run without wandb."""
    monkeypatch = pytest.MonkeyPatch()
    try:
        capture = SimpleNamespace(readouterr=lambda: SimpleNamespace(out="", err=""))
        directory = tmp_path_factory.mktemp("without")
        Program(directory, cache, capture, monkeypatch)(*OVERRIDES, f"local_run_dir={directory / 'run'}")  # type: ignore[arg-type]
        return learned(Run(0, f"run_dir: {directory / 'run'}", ""))
    finally:
        monkeypatch.undo()


def test_all_is_logged_in_order(program: Program, faked, without) -> None:
    fake = faked()
    run = program.ok("wandb.enabled=true", *OVERRIDES)
    assert learned(run) == without
    names = [name for name, _ in fake.calls]
    assert names == ["init", *["log"] * (len(names) - 2), "finish"] and fake.calls[-1] == ("finish", 0)
    logged = [(step, values) for name, (step, values) in fake.calls[1:-1] if "samples" not in values]
    assert [values for _, values in logged] == run.metrics
    assert [step for step, _ in logged] == [int(row["counters/examples"]) for row in run.metrics]
    tables = [values["samples"] for name, (_, values) in fake.calls[1:-1] if "samples" in values]
    assert [len(table.data) for table in tables] == [2 * n for n in range(1, len(run.evals) + 1)]
    assert fake.calls[0][1]["config"]["batch_size"] == 4
    assert not [line for line in run.out.splitlines() if line.startswith("wandb")]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_refused(where: str, program: Program, faked, without) -> None:
    faked(refuses=where)
    run = program.ok("wandb.enabled=true", *OVERRIDES)
    assert learned(run) == without and run.err == ""
    told = f"wandb: logging stopped, the run goes on (ConnectionError: {where} is refused, alas: <redacted>)"
    assert run.out.splitlines().count(told) == 1


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_blocked(where: str, program: Program, faked, without, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.metrics, "PATIENCE", 0.3)
    monkeypatch.setattr(engine.metrics, "MAX_WAITING", 3)
    faked(blocks=where)
    start = time.monotonic()
    run = program.ok("wandb.enabled=true", *OVERRIDES)
    assert time.monotonic() - start < 20
    assert learned(run) == without and run.err == ""
    assert run.out.splitlines()[-1].startswith("run_dir: ")
    assert "wandb: not finished in 0.3 s, so it is left behind; metrics.jsonl has it all" in run.out
    if where != "finish":
        assert run.out.count("wandb: does not keep up; what it has no room for is dropped, the run goes on") == 1
        assert "entries were dropped; metrics.jsonl has them" in run.out


def test_a_run_that_fails_keeps_its_status(program: Program, faked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.metrics, "PATIENCE", 0.3)
    fake = faked(blocks="finish")
    run = program("wandb.enabled=true", "lr=1e30", "warmup_steps=0", "n_examples=64", "max_grad_norm=1e30")
    assert run.status == 5 and run.err.count("\n") == 1
    assert fake.calls[-1] == ("finish", 1)


def test_both_loggers_run_side_by_side(program: Program, faked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.metrics, "PATIENCE", 5.0)
    faked(refuses="init")
    run = program.ok("wandb.enabled=true", "tensorboard=true", *OVERRIDES)
    assert list((run.dir / "tensorboard").glob("events.*"))


def test_what_was_left_behind_stays_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.metrics, "PATIENCE", 0.05)
    said: list[str] = []
    go_on = threading.Event()

    def build(say: Any) -> Any:
        go_on.wait(10)
        say("too late")
        raise OSError

    logger = Background("slow", build, said.append)
    logger.close(True)
    assert len(said) == 1 and said[0].startswith("slow: not finished")
    go_on.set()
    logger._thread.join(10)
    assert len(said) == 1


def test_the_process_ends_with_its_status_though_exit_hooks_block(tmp_path) -> None:
    (tmp_path / "wandb.py").write_text(
        textwrap.dedent("""
        import atexit, threading, time
        from types import SimpleNamespace as Settings
        atexit.register(time.sleep, 100)
        threading.Thread(target=time.sleep, args=(100,)).start()
        def init(**arguments):
            time.sleep(100)
        """)
    )
    script = "import train, utils, engine.metrics; engine.metrics.PATIENCE = 0.5; utils.end_process(train.main(), 0.5)"
    start = time.monotonic()
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            *SMALL,
            *QUICK,
            "wandb.enabled=true",
            "n_examples=4",
            f"local_dirs=[{tmp_path}]",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{ROOT}", "WANDB_MODE": "offline"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=80,
    )
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - start < 60 and result.stdout.splitlines()[-1].startswith("run_dir: ")
    assert "wandb: not finished" in result.stdout and result.stderr == ""
