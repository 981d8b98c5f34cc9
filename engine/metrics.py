"""Where numbers go: metrics.jsonl always, the terminal, and wandb and TensorBoard if asked for.

wandb and TensorBoard each run in a thread of their own. One that fails is reported once and left out; one that takes
its time, or never answers, is not waited for. Neither ends a run or holds it up.
"""

import json
import os
import queue
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol
from urllib.request import getproxies

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from engine.secrets import public, redact
from utils import UserError, is_reachable, printable

Metrics = Mapping[str, float]

MAX_WAITING = 1000  # calls that wait for a logger; what comes beyond them is dropped
PATIENCE = 10.0  # seconds to wait for a logger at the end of a run


class Sums:
    """Means over examples, exactly: per-example values are kept on their device until they are asked for."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self.counts = {"tokens": 0, "stop": 0}  # the tokens that were fed; whether this process was told to stop

    def add(self, **values: Tensor) -> None:
        """Add values, each [examples]; every name has one for every example."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach())

    def means(self, add_others: Callable[[Tensor], None]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The means, and the counts: scalars in fp64, on the device of the values.

        Args:
            add_others: adds to a tensor, in place, what other processes have of it.
        """
        joined = [torch.cat(values).double() for values in self._values.values()]
        counts = joined[0].new_tensor([len(joined[0]), *self.counts.values()])
        totals = torch.cat([torch.stack([values.sum() for values in joined]), counts])
        add_others(totals)
        num_means = len(self._values)
        means = totals[:num_means] / totals[num_means]
        return (
            dict(zip(self._values, means.unbind(), strict=True)),
            dict(zip(self.counts, totals[num_means + 1 :].unbind(), strict=True)),
        )


def fetched(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """The numbers in scalars, brought to the CPU all at once."""
    device = next(iter(scalars.values())).device  # of most of them, where layers are split among GPUs
    return dict(
        zip(scalars, torch.stack([value.double().to(device) for value in scalars.values()]).tolist(), strict=True)
    )


class Moment:
    """When all work that was given to a device so far is done."""

    def __init__(self, device: torch.device):
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))
        self._time = time.monotonic()

    def seconds_since(self, earlier: "Moment") -> float:
        """Waits for this moment, if it is still to come."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000


class Logger(Protocol):
    """What takes the metrics and samples of a run."""

    def log(self, metrics: Metrics, step: int) -> None: ...
    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None: ...
    def close(self, is_done: bool) -> None: ...


class Wandb:
    """A wandb run; offline, with a line that says so, where there is no account or no network."""

    def __init__(self, config: DictConfig, run_dir: Path, say: Callable[[str], None]):
        import wandb

        if "WANDB_MODE" not in os.environ:
            reason = _why_offline(wandb)
            if reason:
                say(f"wandb: {reason}, so the run is logged offline in {run_dir / 'wandb'}")
        else:
            reason = ""
        command_line = " ".join(sys.argv)
        id_file = run_dir / "wandb-id"  # a run that is resumed in place goes on in the same one
        if config.resume is None or not id_file.exists():
            id_file.write_text(token_hex(4))
        self._wandb = wandb
        self._rows: list[list[Any]] = []
        self._columns: list[str] = []
        self._run = wandb.init(
            entity=config.wandb.entity,
            project=config.wandb.project,
            name=config.exp_name,
            id=id_file.read_text(),
            resume="allow",
            dir=run_dir,
            config=public(config),
            mode="offline" if reason else None,
            settings=wandb.Settings(
                silent=True,
                console="off",
                reinit="create_new",  # never the run of a sweep's earlier job, which may not be finished
                x_disable_meta=redact(command_line, config) != command_line,  # it holds the command line
            ),
        )

    def log(self, metrics: Metrics, step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        # A logged table cannot grow, so each evaluation logs all rows again, as one table under one name.
        self._columns = list(rows[0])
        self._rows += [list(row.values()) for row in rows]
        self._run.log({"samples": self._wandb.Table(columns=self._columns, data=self._rows)}, step=step)

    def close(self, is_done: bool) -> None:
        self._run.finish(exit_code=0 if is_done else 1)


def _why_offline(wandb: Any) -> str:
    if not os.environ.get("WANDB_API_KEY") and not wandb.setup().settings.api_key and not _netrc_has_wandb():
        return "no account is set up"
    if getproxies().get("https"):
        return ""  # what can be reached is the proxy's to say
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return "" if is_reachable(address) else f"{address} cannot be reached"


def _netrc_has_wandb() -> bool:
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class TensorBoard:
    """TensorBoard files in run_dir/tensorboard."""

    def __init__(self, run_dir: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run_dir / "tensorboard")
        self._text = ""

    def log(self, metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        if not self._text:
            self._text = "|" + "|".join(rows[0]) + "|\n" + "|---" * len(rows[0]) + "|\n"
        for row in rows:
            self._text += "|" + "|".join(as_markdown(str(value)) for value in row.values()) + "|\n"
        self._writer.add_text("samples", self._text, step)

    def close(self, is_done: bool) -> None:
        self._writer.close()


def as_markdown(text: str) -> str:
    """Markdown for a cell of a table that shows text as it is: nothing in it is markup, HTML or a link."""
    return "<br>".join(re.sub(r"[!-/:-@[-`{-~]", lambda mark: f"&#{ord(mark[0])};", line) for line in text.splitlines())


class Background:
    """A logger in a thread of its own, so that no call to it is waited for and none of its errors is the run's.

    Args:
        name: what it is called in messages.
        build: makes the logger; is given what takes a line for the user.
        write: writes such a line.
    """

    def __init__(self, name: str, build: Callable[[Callable[[str], None]], Logger], write: Callable[[str], None]):
        self._name = name
        self._write = write
        self._calls: queue.Queue[Callable[[Logger], None] | None] = queue.Queue(MAX_WAITING)  # None: close
        self._num_dropped = 0
        self._is_done = False
        self._is_left = False
        self._lock = threading.Lock()  # of _is_left
        # A daemon, as the end of the process does not wait for those.
        self._thread = threading.Thread(target=self._run, args=(build,), name=f"logger {name}", daemon=True)
        self._thread.start()

    def _run(self, build: Callable[[Callable[[str], None]], Logger]) -> None:
        try:
            logger = build(self._say)
            while (call := self._calls.get()) is not None:
                call(logger)
            logger.close(self._is_done)
        except BaseException as error:  # whatever a logger raises, the run goes on
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._say(f"{self._name}: logging stopped, the run goes on ({reason})")

    def _say(self, line: str) -> None:
        with self._lock:
            if not self._is_left:  # what was left behind stays silent
                self._write(line)

    def _call(self, call: Callable[[Logger], None]) -> None:
        if not self._thread.is_alive():  # it has failed, and said so
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            if not self._num_dropped:
                self._write(f"{self._name}: does not keep up; what it has no room for is dropped, the run goes on")
            self._num_dropped += 1

    def log(self, metrics: Metrics, step: int) -> None:
        self._call(lambda logger: logger.log(metrics, step))

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        self._call(lambda logger: logger.log_samples(rows, step))

    def close(self, is_done: bool) -> None:
        """Let the logger write what waits for it and finish; after PATIENCE it is left behind."""
        self._is_done = is_done
        deadline = time.monotonic() + PATIENCE
        while self._thread.is_alive() and time.monotonic() < deadline:
            with suppress(queue.Full):
                self._calls.put(None, timeout=0.1)
                self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            self._is_left = True
        if self._thread.is_alive():
            self._write(f"{self._name}: not finished in {PATIENCE:g} s, so it is left behind; metrics.jsonl has it all")
        if self._num_dropped:
            self._write(f"{self._name}: {self._num_dropped:,} entries were dropped; metrics.jsonl has them")


class NoLoggers:
    """Of the processes beside the first, which logs for all."""

    def train(self, metrics: dict[str, float]) -> None: ...
    def eval(self, metrics: dict[str, float]) -> None: ...
    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def print(self, text: str) -> None: ...
    def close(self, is_done: bool = True) -> None: ...


class Loggers:
    """All the loggers of a run, and its progress on the terminal."""

    def __init__(self, config: DictConfig, run_dir: Path, num_examples: int, first_example: int = 0):
        self._run_dir = run_dir
        self._interval = config.minimum_log_interval_secs
        self._last = -float("inf")
        self._lock = threading.RLock()  # of the terminal; a signal may come while it is held
        on_terminal = sys.stderr.isatty()
        terminal = shutil.get_terminal_size()  # tqdm shows nothing on a terminal that does not know its own size
        self._bar = tqdm(
            total=num_examples,
            initial=first_example,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            disable=not on_terminal,
            ncols=terminal.columns,
            nrows=terminal.lines,
        )
        self._loggers: list[Logger] = []

        def write(line: str) -> None:
            self.print(redact(line, config))  # libraries are free to say anything

        if config.wandb.enabled and not config.debug:
            self._loggers.append(Background("wandb", lambda say: Wandb(config, run_dir, say), write))
        if config.tensorboard:
            self._loggers.append(Background("tensorboard", lambda say: TensorBoard(run_dir), write))

    def print(self, text: str) -> None:
        """A line on stdout that does not break the progress bar."""
        with self._lock:
            self._bar.clear()
            print(text, flush=True)
            self._bar.refresh()

    def train(self, metrics: dict[str, float]) -> None:
        """Log a training step."""
        examples = int(metrics["counters/examples"])
        self._write("metrics.jsonl", [metrics])
        self._bar.update(examples - self._bar.n)
        now = time.monotonic()
        if now - self._last < self._interval:
            return
        self._last = now
        short = {"loss": "loss/train", "acc": "rewards_train/accuracies", "margin": "rewards_train/margins"}
        postfix = {name: f"{metrics[key]:.4g}" for name, key in short.items() if key in metrics}
        self._bar.set_postfix(postfix | {"tokens/s": f"{metrics['tokens_per_second']:,.0f}"})
        if self._bar.disable:
            print(f"train after {examples} examples: {format_metrics(metrics)}", flush=True)
        self._log(metrics, examples)

    def eval(self, metrics: dict[str, float]) -> None:
        """Log an evaluation."""
        examples = int(metrics["counters/examples"])
        self._write("metrics.jsonl", [metrics])
        self.print(f"eval after {examples} examples: {format_metrics(metrics)}")
        self._log(metrics, examples)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log sampled answers; every row has the same keys, "examples" (the counter) first. The first is shown."""
        self._write("samples.jsonl", rows)
        for name, value in rows[0].items():
            if isinstance(value, str):
                text = printable(value)
                self.print(f"  sample, {name}: {text if len(text) <= 160 else '... ' + text[-156:]}")
        for logger in self._loggers:
            logger.log_samples(rows, int(rows[0]["examples"]))

    def _log(self, metrics: Metrics, step: int) -> None:
        for logger in self._loggers:
            logger.log(metrics, step)

    def _write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        try:
            with open(self._run_dir / name, "a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise UserError(
                "STORAGE",
                f"{self._run_dir / name} cannot be written ({error.strerror})",
                "make room or see to the disk, then continue with resume=",
            ) from error

    def close(self, is_done: bool = True) -> None:
        """Finish all logs; is_done is whether the run came to its end."""
        for logger in self._loggers:
            logger.close(is_done)
        self._bar.close()


def format_metrics(metrics: Metrics) -> str:
    """Metrics on one line, the loss first, counters left out."""
    shown = {name: metrics[name] for name in sorted(metrics, key=lambda name: not name.startswith("loss/"))}
    shown = {name: value for name, value in shown.items() if not name.startswith("counters/")}
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())


def peak_flops(device: torch.device) -> float | None:
    """The peak of a device's dense bfloat16 matrix products in FLOP/s; None if not known."""
    return gpu_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def gpu_peak_flops(name: str) -> float | None:
    """The same for a GPU by its name, from its data sheet."""
    peaks = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12}
    return next((peak for known, peak in peaks.items() if known in name), None)
