"""Loggers: their output; their failures never end a run."""

import errno
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import engine.run.loggers
import engine.step.metrics
from engine.data.examples import Example
from engine.run.loggers import Loggers, fit_line
from engine.run.start_report import warn_of_warmup
from engine.run.throughput import throughput
from engine.step.metrics import DeviceTimestamp, MetricAccumulator, to_floats
from tests.configs import make_settings
from tests.ranks import make_trainer
from tests.runs import Program

DPO = ("loss=dpo", "loss.beta=0.1")


def single_process_sum(totals: torch.Tensor) -> None:
    """All-reduce of a single process."""


def test_sums_are_means_over_examples() -> None:
    sums = MetricAccumulator()
    sums.add(loss=torch.tensor([1.0, 2.0, 3.0]), other=torch.tensor([1.0, 1.0, 0.0]))
    sums.add(loss=torch.tensor([6.0]), other=torch.tensor([1.0]))
    sums.num_tokens = 7
    means, num_tokens, stop = sums.reduce(single_process_sum, stop=True)
    assert to_floats(means) == {"loss": 3.0, "other": 0.75}
    assert (num_tokens.item(), stop.item()) == (7, 1)


def test_means_are_exact_over_many_examples() -> None:
    sums = MetricAccumulator()
    for value in (2.0**25, 1.0, 1.0, 2.0):  # fp32 cannot represent 2**25 + 1
        sums.add(loss=torch.tensor([value]))
    (mean,) = sums.reduce(single_process_sum).means.values()
    assert mean.dtype == torch.float64 and mean.item() == 2.0**23 + 1


def test_means_are_over_the_examples_of_all_processes() -> None:
    sums, others = MetricAccumulator(), MetricAccumulator()
    sums.add(loss=torch.tensor([1.0, 2.0, 3.0]))
    others.add(loss=torch.zeros(0))  # a microbatch without examples
    others.add(loss=torch.tensor([6.0]))
    totals: list[torch.Tensor] = []
    others.reduce(totals.append)

    def all_reduce_sum(tensor: torch.Tensor) -> None:
        tensor += totals[0]

    assert to_floats(sums.reduce(all_reduce_sum).means) == {"loss": 3.0}


def test_to_floats_accepts_any_dtype() -> None:
    scalars = {"b": torch.tensor(0.1, dtype=torch.float64), "a": torch.tensor(3), "c": torch.tensor(0.5).bfloat16()}
    numbers = to_floats(scalars)
    assert list(numbers.items()) == [("b", 0.1), ("a", 3.0), ("c", 0.5)]
    assert all(type(number) is float for number in numbers.values())


def test_timestamps_on_a_cpu_use_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(engine.step.metrics.time, "monotonic", lambda: next(clock))
    earlier, later = DeviceTimestamp(torch.device("cpu")), DeviceTimestamp(torch.device("cpu"))
    assert later.seconds_since(earlier) == 2.5


def test_format_leaves_counters_out() -> None:
    assert fit_line("train", {"loss/train": 0.693147, "counters/examples": 4}) == "train: loss/train 0.6931"


class Broken:
    """A logger: every call raises."""

    def __init__(self, *arguments) -> None:
        pass

    def log(self, metrics, step) -> None:
        raise ConnectionError("the server is gone")

    def log_samples(self, rows, step, is_evaluation) -> None:
        self.log(rows, step)

    def close(self, is_done) -> None:
        raise OSError


def test_a_failed_logger_is_dropped(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.run.loggers, "Wandb", Broken)
    run = program.ok(
        "wandb.enabled=true", "n_examples=8", "sample_during_eval=true", "max_length=280", "n_eval_model_samples=1"
    )
    assert run.out.count("wandb: logging stopped, the run continues (ConnectionError: the server is gone)") == 1
    assert len(run.steps) == 2


def test_wandb_without_an_account_logs_offline_with_a_notice(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    run = program.ok(
        "wandb.enabled=true", "n_examples=8", "sample_during_eval=true", "max_length=280", "n_eval_model_samples=1"
    )
    lines = [line for line in run.out.splitlines() if line.startswith("wandb")]
    assert len(lines) == 1 and "no account is set up, so the run is logged offline" in lines[0]
    assert list((run.dir / "wandb").glob("offline-run-*"))


def test_wandb_without_a_network_logs_offline(program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run = program.ok("wandb.enabled=true", "n_examples=8")
    assert "http://127.0.0.1:9 cannot be reached, so the run is logged offline" in run.out


def test_messages_of_loggers_hold_no_secret(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://me:swordfish-0815@127.0.0.1:9")
    run = program.ok("wandb.enabled=true", "n_examples=8")
    assert "@127.0.0.1:9 cannot be reached, so the run is logged offline" in run.out and "swordfish" not in run.out

    def fail(self: Broken, *arguments) -> None:
        raise ConnectionError("no project swordfish-4711")

    monkeypatch.setenv("BLAND", "swordfish-4711")
    monkeypatch.setattr(engine.run.loggers, "Wandb", type("Failing", (Broken,), {"__init__": fail}))
    run = program.ok("wandb.enabled=true", "wandb.project=${oc.env:BLAND}", "n_examples=8")
    assert "(ConnectionError: no project <redacted>)" in run.out and "swordfish" not in run.out


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.EACCES, errno.ENOSPC])
def test_a_log_write_error_ends_the_run(number: int, program: Program, monkeypatch) -> None:
    def failing(file, mode: str = "r", *arguments, **keywords):
        if mode == "a" and str(file).endswith("metrics.jsonl") and Path(file).exists():
            raise OSError(number, os.strerror(number), str(file))
        return open(file, mode, *arguments, **keywords)

    monkeypatch.setattr(engine.run.loggers, "open", failing, raising=False)
    run = program("n_examples=8")
    assert run.status == 6 and run.err.count("\n") == 1
    assert re.match(rf"error\[STORAGE\] \S+metrics.jsonl cannot be written \({os.strerror(number)}\); fix: ", run.err)


def test_tensorboard_holds_metrics_and_samples(program: Program) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = program.ok(
        *DPO, "tensorboard=true", "n_examples=8", "sample_during_eval=true", "max_length=280", "n_eval_model_samples=2"
    )
    events = EventAccumulator(str(run.dir / "tensorboard"))
    events.Reload()
    assert events.Scalars("loss/eval")[-1].value == pytest.approx(run.evals[-1]["loss/eval"])
    assert "samples/text_summary" in events.Tags()["tensors"]


@pytest.mark.parametrize(
    "warmup_steps, expected",
    [
        (4, "4 steps of this run: the learning rate reaches 0.0008 in place of lr=0.001"),
        (150, "4 steps of this run: the learning rate reaches 2.65e-05 in place of lr=0.001"),
        (3, None),
        (0, None),
    ],
)
def test_a_warmup_beyond_the_run_is_told(warmup_steps: int, expected: str | None) -> None:
    warning = warn_of_warmup(make_settings(f"warmup_steps={warmup_steps}", "lr=1e-3"), num_updates=4)
    assert warning == (expected and f"warning: warmup_steps={warmup_steps} is not below the {expected}")


def test_a_run_shorter_than_its_warmup_says_so(program: Program) -> None:
    run = program.ok("warmup_steps=9", "n_examples=8")
    assert run.out.count("warning: warmup_steps=9 is not below the 2 steps of this run") == 1
    assert run.steps[-1]["learning_rate"] == pytest.approx(2e-4)


def test_printed_lines_respect_their_interval(program: Program) -> None:
    often = program.ok("minimum_log_interval_secs=0")
    seldom = program.ok("minimum_log_interval_secs=1000")
    assert often.out.count("train after") == len(often.steps) == 4
    assert seldom.out.count("train after") == 1 and len(seldom.steps) == 4


def test_printed_lines_say_how_far_and_are_short(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    seconds = iter([10, 30, 40, 130])
    settings = make_settings("wandb.enabled=false", "report=null", "minimum_log_interval_secs=0")
    loggers = Loggers(settings, tmp_path, 2000, 500, 500, clock=lambda: next(seconds))
    long = {f"rewards_train/{name}": -123456.789 for name in ("chosen", "rejected", "margins", "accuracies")}
    long |= {f"logps_train/{name}": 1e-9 for name in ("chosen", "rejected")} | {f"other_{i}/train": i for i in range(9)}
    long |= {"grad_norm": 12.3456, "learning_rate": 5.123e-7, "tokens_per_second": 12345.6, "loss/train": 0.7}
    for examples in (600, 700):
        loggers.train(long | {"counters/examples": examples})
    loggers.eval({"counters/examples": 700, "loss/eval": 0.5})
    loggers.train({"counters/examples": 2000, "loss/train": 0.5, "tokens_per_second": 1})
    loggers.close()
    first, second, evaluation, last = capsys.readouterr().out.splitlines()
    assert first.startswith("train after 600 of 2,000 examples: loss/train 0.7, rewards_train/accuracies -1.235e+05")
    assert second.startswith("train after 700 of 2,000 examples, 4 min 20 s left: loss/train 0.7, ")
    assert evaluation == "eval after 700 of 2,000 examples, 6 min 30 s left: loss/eval 0.5"
    assert last == "train after 2,000 of 2,000 examples: loss/train 0.5, tokens_per_second 1"
    assert 150 < len(second) <= 200 and "learning_rate 5.123e-07" in second
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) > 400


def test_rows_with_any_text_are_json(tmp_path) -> None:
    loggers = Loggers(make_settings("wandb.enabled=false", "report=null"), tmp_path, 4, 1)
    loggers.samples([{"examples": 0, "prompt": 'a "b"\n\u2028\ud7ff'}])
    loggers.close()
    (line,) = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(line)["prompt"] == 'a "b"\n\u2028\ud7ff'


def test_mfu_counts_work_of_fed_tokens_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: no padding, no embeddings, no recomputation; the head at targets alone."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    trainer = make_trainer(("llama", "dpo", ("batching=padded", "activation_checkpointing=true")), tmp_path)
    prompt, chosen, rejected = (np.arange(2, 2 + length, dtype=np.int32) for length in (10, 4, 6))
    examples = [Example(prompt, (chosen, rejected), 0)] * 2  # one pair, twice
    trainer.placement.device = torch.device("cuda")
    metrics = throughput(trainer, examples, num_tokens=18, seconds=0.5)
    hidden, mlp, layers, vocabulary = 32, 48, 2, trainer.policy.config.vocab_size
    weights = layers * (hidden * hidden * 3 + 3 * hidden * mlp + 2 * hidden)  # with 2 of 4 key heads, and 2 norms
    pairs = 10**2 / 2 + 4 * (10 + 2) + 6 * (10 + 3)
    flops = 6 * weights * 18 + 12 * hidden * layers * pairs + 6 * vocabulary * hidden * (4 + 6)
    assert metrics["mfu"] == pytest.approx(flops / (0.5 * 989e12))
    assert metrics["tokens_per_second"] == 36 and metrics["examples_per_second"] == 4
    trainer.placement.device = torch.device("cpu")
    assert "mfu" not in throughput(trainer, examples, 18, 0.5)
