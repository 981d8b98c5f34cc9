"""Run train.py inside a test: the users' command line, on a model trained in one second."""

import copy
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.hydra import Hydra

import preference_datasets
import train
from engine.data.examples import Split
from engine.data.token_cache import tokenizer_state

SMALL = (
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=48",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.num_attention_heads=2",
    "model.architecture.num_key_value_heads=2",
)
# Few examples, no samples, and a learning rate with a visible effect after a few steps.
QUICK = (
    "wandb.enabled=false",
    "report=null",
    "sample_during_eval=false",
    "n_examples=16",
    "n_eval_examples=8",
    "eval_batch_size=4",
    "warmup_steps=2",
    "lr=1e-3",
)

REWARD = ("loss=reward", "optimizer=AdamW", "lr=1e-3", "n_examples=16")
ONLINE = (
    "loss=grpo",
    "batch_size=4",
    "max_length=64",
    "max_prompt_length=40",
    "rollout.max_new_tokens=8",
    "rollout.num_responses=3",
    "sample_during_eval=true",
    "n_eval_model_samples=2",
    "rewards=[vowels]",
)


def vowels(prompt: str, response: str, row: Any) -> float:
    """A reward that a model from scratch can raise."""
    return sum(letter in "aeiou" for letter in response) / max(len(response), 1)


@dataclass
class Run:
    """Exit status, output and files of a run."""

    status: int
    out: str
    err: str

    @property
    def dir(self) -> Path:
        return Path(self.out.strip().splitlines()[-1].removeprefix("run_dir: "))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [row for row in self.metrics if "loss/train" in row]

    @property
    def evals(self) -> list[dict[str, Any]]:
        return [row for row in self.metrics if "loss/eval" in row]

    @property
    def samples(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.dir / "samples.jsonl").read_text().splitlines()]


def copy_stopped(run: Run, directory: Path, step: int) -> None:
    """Copy a run, and stop_after() in the copy."""
    shutil.copytree(run.dir, directory, symlinks=True)
    stop_after(directory, step)


def stop_after(directory: Path, step: int) -> None:
    """Leave a run as if killed after the checkpoint at step: later checkpoints are gone, later rows stay."""
    for checkpoint in directory.glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    (directory / "LATEST").unlink()
    (directory / "LATEST").symlink_to(f"step-{step}")


load_split = preference_datasets.load_split
FILMS: dict[str, Split] = {}  # by all that they depend on


def load_films_once(settings: Any, tokenizer: Any, split: Any, batch: Any, **others: Any) -> Split:
    """load_split(), but each split of the films is tokenized once: a third of a short run."""
    if settings.datasets != ["films"] or others.keys() > {"needs_mismatched"}:
        return load_split(settings, tokenizer, split, batch, **others)
    read = [settings.max_length, settings.max_prompt_length, settings.test_fraction, settings.seed, settings.loss]
    special = [tokenizer.eos_token, tokenizer.bos_token, tokenizer.special_tokens_map]
    films = [preference_datasets.DATASETS["films"], preference_datasets.tokenize]  # tests may have replaced them
    key = repr([split, batch, others, read, special, films, tokenizer_state(tokenizer)])
    if key not in FILMS:
        FILMS[key] = load_split(settings, tokenizer, split, batch, **others)
    found = FILMS[key]
    copied = copy.copy(found.examples)  # a list, or a table
    return Split(copied, copy.deepcopy(found.counts), list(found.sizes), list(found.prompt_texts))


def call_main(arguments: list[str], patches: pytest.MonkeyPatch) -> int:
    """Call train.main(); returns the exit status. Plain command lines skip what would be composed or read again."""
    is_plain = not any(argument.startswith("-") or set("@$") & set(argument) for argument in arguments)
    is_plain &= not any("hydra" in argument or "_target_" in argument for argument in arguments)
    patches.setattr(sys, "argv", ["train.py", *arguments])
    if is_plain:  # each would compose the config once more: a sixth of a short run
        patches.setattr(train, "check_command_line", lambda *arguments: None)
        patches.setattr(Hydra, "get_mode", lambda *arguments, **named: None)
    patches.setattr(preference_datasets, "load_split", load_films_once)
    return train.main()


class Program:
    """`python train.py` inside this process, with all its directories under one parent."""

    def __init__(
        self, directory: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ):
        self.directory = directory
        self._cache = cache
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *overrides: str, defaults: tuple[str, ...] = SMALL + QUICK) -> Run:
        override_keys = {override.split("=")[0].lstrip("+") for override in overrides}
        kept_defaults = [default for default in defaults if default.split("=")[0] not in override_keys]
        arguments = [
            f"local_dirs=[{self.directory}]",
            f"cache_dir={self._cache}",
            *kept_defaults,
            *overrides,
        ]
        with self._monkeypatch.context() as patches:
            self._capsys.readouterr()
            status = call_main(arguments, patches)
        captured = self._capsys.readouterr()
        return Run(status, captured.out, captured.err)

    def ok(self, *overrides: str, **kwargs: Any) -> Run:
        """Run the program; it must succeed."""
        run = self(*overrides, **kwargs)
        assert run.status == 0, run.err
        return run
