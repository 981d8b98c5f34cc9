"""A failing or blocking wandb changes neither steps nor exit status, and delays nothing."""

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

import engine.run.background_logger
from engine.run.background_logger import BackgroundLogger
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
    """A fake wandb module: records its calls; one of them raises or blocks."""

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
def fake_wandb(monkeypatch: pytest.MonkeyPatch):
    fakes = []

    def fake(**kwargs: str) -> FakeWandb:
        fakes.append(FakeWandb(**kwargs))
        monkeypatch.setitem(sys.modules, "wandb", fakes[-1])
        return fakes[-1]

    yield fake
    for one in fakes:
        one.end.set()


def metrics_without_timings(run: Run) -> list[dict[str, float]]:
    """Rows of metrics.jsonl without times and memory."""
    names = ("_per_second", "peak_memory_gb")
    return [{name: value for name, value in row.items() if not name.endswith(names)} for row in run.metrics]


@pytest.fixture(scope="module")
def metrics_without_wandb(tmp_path_factory, cache):
    """Metrics of a run without wandb."""
    monkeypatch = pytest.MonkeyPatch()
    try:
        capture = SimpleNamespace(readouterr=lambda: SimpleNamespace(out="", err=""))
        directory = tmp_path_factory.mktemp("without")
        Program(directory, cache, capture, monkeypatch)(*OVERRIDES, f"local_run_dir={directory / 'run'}")  # type: ignore[arg-type]
        return metrics_without_timings(Run(0, f"run_dir: {directory / 'run'}", ""))
    finally:
        monkeypatch.undo()


def test_all_is_logged_in_order(program: Program, fake_wandb, metrics_without_wandb) -> None:
    fake = fake_wandb()
    run = program.ok("wandb.enabled=true", *OVERRIDES)
    assert metrics_without_timings(run) == metrics_without_wandb
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
def test_a_failing_logger_is_dropped(where: str, program: Program, fake_wandb, metrics_without_wandb) -> None:
    fake_wandb(refuses=where)
    run = program.ok("wandb.enabled=true", *OVERRIDES)
    assert metrics_without_timings(run) == metrics_without_wandb and run.err == ""
    notice = f"wandb: logging stopped, the run continues (ConnectionError: {where} is refused, alas: <redacted>)"
    assert run.out.splitlines().count(notice) == 1


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_blocking_logger_is_abandoned(
    where: str, program: Program, fake_wandb, metrics_without_wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.run.background_logger, "CLOSE_SECONDS", 0.3)
    monkeypatch.setattr(engine.run.background_logger, "MAX_QUEUED", 3)
    fake_wandb(blocks=where)
    start = time.monotonic()
    run = program.ok("wandb.enabled=true", *OVERRIDES)
    assert time.monotonic() - start < 50
    assert metrics_without_timings(run) == metrics_without_wandb and run.err == ""
    assert run.out.splitlines()[-1].startswith("run_dir: ")
    assert "wandb: not finished in 0.3 s, abandoned; metrics.jsonl is complete" in run.out
    if where != "finish":
        assert run.out.count("wandb: too slow; entries beyond its queue are dropped, the run continues") == 1
        assert "entries were dropped; metrics.jsonl has them" in run.out


def test_a_run_that_fails_keeps_its_status(program: Program, fake_wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.run.background_logger, "CLOSE_SECONDS", 0.3)
    fake = fake_wandb(blocks="finish")
    run = program("wandb.enabled=true", "lr=1e30", "warmup_steps=0", "n_examples=64", "max_grad_norm=1e30")
    assert run.status == 5 and run.err.count("\n") == 1
    assert fake.calls[-1] == ("finish", 1)


def test_both_loggers_run_side_by_side(program: Program, fake_wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.run.background_logger, "CLOSE_SECONDS", 5.0)
    fake_wandb(refuses="init")
    run = program.ok("wandb.enabled=true", "tensorboard=true", *OVERRIDES)
    assert list((run.dir / "tensorboard").glob("events.*"))


def test_an_abandoned_logger_stays_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.run.background_logger, "CLOSE_SECONDS", 0.05)
    messages: list[str] = []
    release = threading.Event()

    def build(say: Any) -> Any:
        release.wait(10)
        say("too late")
        raise OSError

    logger = BackgroundLogger("slow", build, messages.append)
    logger.log({}, 1)
    logger.close(True)
    assert len(messages) == 1 and messages[0].startswith("slow: not finished")
    release.set()
    logger._thread.join(10)
    assert len(messages) == 1


@pytest.mark.slow
def test_blocking_exit_hooks_do_not_change_the_exit_status(tmp_path) -> None:
    (tmp_path / "wandb.py").write_text(
        textwrap.dedent("""
        import atexit, threading, time
        from types import SimpleNamespace as Settings
        atexit.register(time.sleep, 10_000)
        threading.Thread(target=time.sleep, args=(10_000,)).start()
        def init(**arguments):
            time.sleep(10_000)
        """)
    )
    script = "import train, utils; from engine.run import background_logger as loggers; loggers.CLOSE_SECONDS = 0.5;"
    script += " utils.end_process(train.main(), 0.5)"
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
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("run_dir: ")
    assert "wandb: not finished" in result.stdout and result.stderr == ""
