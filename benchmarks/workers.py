"""Processes of benchmarks/step.py, one for each system. A worker takes one measured step per line on its stdin.

    python benchmarks/workers.py JOB.json

Each result goes to stderr as one line of JSON. Stdout and library messages are dropped.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import IO, Any, Self

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import TRL_PYTHON, compose_settings, make_trainer, measured, model_overrides, take_step
from benchmarks.cpu_profile import grouped_seconds
from benchmarks.pairs import Pair, make_example, make_ranking, responses_of

BETA, LEARNING_RATE = 0.1, 1e-5
READY = "ready"


# ---- In the parent ----


class Worker:
    """A process with one system. It takes a step at each request.

    Args:
        folder: gets the job and the caches.
        job: worker ("ours" or "trl"), settings, model (folder), batches, batch_size, task ("dpo" or "reward"),
            profile (whether ours profile their last step).
        trl_python: the interpreter of TRL's environment.
        threads: of the CPU.
        script: reads the job, and calls serve().
    """

    def __init__(
        self, folder: Path, job: dict[str, Any], threads: int, trl_python: Path = TRL_PYTHON, script: str = __file__
    ):
        folder.mkdir()
        path = folder / "job.json"
        path.write_text(json.dumps(job | {"cache": str(folder)}))
        python = sys.executable if job["worker"] == "ours" else str(trl_python)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [python, script, str(path)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        try:
            self._line(READY)
        except BaseException:
            self._end()
            raise
        self.seconds_to_start = time.perf_counter() - start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def step(self, of_memory: bool) -> dict[str, Any]:
        """Take the next step; returns loss, seconds and, if asked, memory. Or the step's profile."""
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _line() prints why the worker died
            stdin.write("memory\n" if of_memory else "time\n")
            stdin.flush()
        return json.loads(self._line("{"))

    def pause(self) -> None:
        """Stop the process. Its idle threads would spin, and take cores from others."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _line(self, prefix: str) -> str:
        """The next line with this prefix. Other lines are warnings of libraries."""
        stderr: IO[str] | None = self._process.stderr
        assert stderr is not None
        seen = []
        for line in stderr:
            if line.startswith(prefix):
                return line
            seen.append(line)
        raise SystemExit("a worker died:\n" + "".join(seen[-30:]))


# ---- In the worker ----


def wait_for_turn() -> bool:
    """Wait until a step is asked for; returns whether its memory is measured."""
    return sys.stdin.readline().strip() == "memory"


def answer(line: str) -> None:
    print(line, file=sys.__stderr__, flush=True)


def work_ours(job: dict[str, Any]) -> None:
    """Steps of this repository's trainer."""
    is_dpo = job.get("task", "dpo") == "dpo"
    loss = ["loss=dpo", f"loss.beta={BETA}"] if is_dpo else ["loss=reward"]
    settings = compose_settings(
        *model_overrides(job["model"]),
        *(*loss, f"batch_size={job['batch_size']}", "sample_during_eval=false"),
        *("optimizer=AdamW", f"lr={LEARNING_RATE}", "warmup_steps=0", f"cache_dir={job['cache']}", *job["settings"]),
    )
    make = make_example if is_dpo else make_ranking
    batches = [[make(pair) for pair in batch] for batch in job["batches"]]
    trainer = make_trainer(settings, Path(job["cache"]), [example for batch in batches for example in batch])
    answer(READY)
    for index, examples in enumerate(batches):
        of_memory = wait_for_turn()
        batch = trainer.prepare(trainer.split_batch(examples))
        if job.get("profile") and index == len(batches) - 1:
            answer(json.dumps({"profile": grouped_seconds(lambda: take_step(trainer, batch, False))}))  # noqa: B023
        else:
            answer(json.dumps(take_step(trainer, batch, of_memory)))


def trl_settings(job: dict[str, Any]) -> Any:
    """TRL's arguments: the job's own, and those of every system."""
    import torch
    from trl import DPOConfig, RewardConfig

    is_dpo = job.get("task", "dpo") == "dpo"
    settings = {name: value for name, value in job["settings"].items() if name != "dtype"}
    if is_dpo:
        config_class, settings["beta"] = DPOConfig, BETA
    else:  # a ranking is several pairs; each microbatch has as many pairs as the batch has rankings
        config_class = RewardConfig
        settings.pop("precompute_ref_log_probs", None)
        num_responses = len(responses_of(job["batches"][0][0]))
        settings["gradient_accumulation_steps"] = num_responses * (num_responses - 1) // 2
    return config_class(
        output_dir=job["cache"],
        per_device_train_batch_size=job["batch_size"],
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.01,  # AdamW's own default, as ours
        max_grad_norm=10.0,
        max_length=1024,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **settings,
    )


def word_tokenizer() -> Any:
    """A tokenizer for TRL to hold. The pairs are tokenised already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0}))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def trl_rows(batches: list[list[Pair]]) -> list[dict[str, list[int]]]:
    pairs = [pair for batch in batches for pair in batch]
    return [{f"{name}_ids": tokens for name, tokens in pair.items()} for pair in pairs]


def reward_rows(batches: list[list[Pair]]) -> list[dict[str, list[int]]]:
    """All pairs of all rankings. Pairs of one ranking are adjacent, so a microbatch has few prompts."""
    rows = []
    for ranking in (ranking for batch in batches for ranking in batch):
        texts = [[*ranking["prompt"], *response] for response in responses_of(ranking)]
        pairs = combinations(texts, 2)
        rows += [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in pairs]
    return rows


def work_trl(job: dict[str, Any]) -> None:
    """Steps of TRL's DPOTrainer or RewardTrainer."""
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
    from trl import DPOTrainer, RewardTrainer

    is_dpo = job.get("task", "dpo") == "dpo"
    base: Any = DPOTrainer if is_dpo else RewardTrainer

    class Ordered(base):
        """Trains on the tokens of the job in their order."""

        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    class Steps(TrainerCallback):
        """Measures each step. The loss is known once the trainer has logged it."""

        def __init__(self) -> None:
            self.stack = contextlib.ExitStack()
            self.found: dict[str, float] | None = None

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.found = self.stack.enter_context(measured(wait_for_turn()))

        def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            if self.found is not None and logs and "loss" in logs:
                self.found["loss"] = float(logs["loss"])
                self.stack.close()
                answer(json.dumps(self.found))
                self.found = None

    dtype = getattr(torch, job["settings"].get("dtype", "float32"))
    auto_class = AutoModelForCausalLM if is_dpo else AutoModelForSequenceClassification
    trainer = Ordered(
        model=auto_class.from_pretrained(job["model"], dtype=dtype),
        args=trl_settings(job),
        train_dataset=Dataset.from_list((trl_rows if is_dpo else reward_rows)(job["batches"])),
        processing_class=word_tokenizer(),
    )
    trainer.add_callback(Steps())
    answer(READY)
    trainer.train()


def serve(job_file: str, workers: Mapping[str, Callable[[dict[str, Any]], None]]) -> None:
    """Do the job of a file, by one of the workers."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  results go to the real stderr
    job = json.loads(Path(job_file).read_text())
    try:
        workers[job["worker"]](job)
    except Exception:
        traceback.print_exc(file=sys.__stderr__)


if __name__ == "__main__":
    serve(sys.argv[1], {"ours": work_ours, "trl": work_trl})
