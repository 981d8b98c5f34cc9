"""Processes of benchmarks/online.py. A worker takes one iteration of online training per line on its stdin.

    python benchmarks/online_workers.py JOB.json

- Both sides sample responses of the same lengths. So no side has less to do.
- Prompts are words of a tokenizer with one word a token.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import compose_settings, make_trainer
from benchmarks.workers import READY, answer, serve, wait_for_turn

EOS = 0  # of the tokenizer: the first token, so a random number of 0 chooses it
LEAST_NUMBER = 0.05  # of other tokens, far above the probability of EOS under a model of random weights
CLIP, LEARNING_RATE = 0.2, 1e-6
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    """A tokenizer with one token a word: <eos>, w1, w2, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": EOS} | {f"w{index}": index for index in range(1, vocabulary)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)


def text_of(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def even_words(response: str) -> float:
    """The reward: the share of words with an even number."""
    words = response.split()
    return sum(int(word[1:]) % 2 == 0 for word in words) / max(1, len(words))


# ---- Ours ----


def work_ours(job: dict[str, Any]) -> None:
    """Iterations of this repository's trainer."""
    import numpy as np

    from engine.data.examples import Example, PromptRow
    from rewards import REWARDS

    num_prompts, num_responses = job["num_prompts"], job["num_responses"]
    REWARDS["even_words"] = lambda prompt, response, row: even_words(response)
    settings = compose_settings(
        *("model=blank_model", f"model.name_or_path={job['model']}", f"model.tokenizer_name_or_path={job['model']}"),
        *("loss=grpo", f"loss.beta={job['beta']}", "rewards=[even_words]", f"batch_size={num_prompts}", "n_epochs=1"),
        *(f"rollout.num_responses={num_responses}", f"rollout.max_new_tokens={job['max_new_tokens']}"),
        *("max_length=1024", "max_prompt_length=512", f"lr={LEARNING_RATE}", "warmup_steps=0"),
        *(f"cache_dir={job['cache']}", *job["settings"]),
    )
    examples = [
        Example(np.array(tokens, np.int32), (), index, row=PromptRow(text_of(tokens), {}))
        for index, tokens in enumerate(job["prompts"])
    ]
    trainer = make_trainer(settings, Path(job["cache"]), examples)
    clock = CLOCKS[job["clock"]]

    def numbers_with_an_end(seed: list[int], num_tokens: int) -> np.ndarray:
        *_, prompt, _, sample = seed
        numbers = LEAST_NUMBER + (1 - LEAST_NUMBER) * np.random.default_rng(seed).random(num_tokens)
        numbers[job["lengths"][prompt][sample] - 1] = 0  # chooses the end of text
        return numbers

    answer(READY)
    with (
        patch("engine.models.sampling_engines.seeded_uniforms", numbers_with_an_end),
        patch("engine.run.sampler.time", SimpleNamespace(monotonic=clock)),
    ):
        batches = trainer.train_batches()
        for _ in range(len(examples) // num_prompts):
            wait_for_turn()
            start = clock()
            step = trainer.step(trainer.prepare(next(batches)))
            loss = step.values.read()["loss/train"]
            seconds = clock() - start
            parts = {name: step.facts[f"time/{name}"] for name in ("generate", "reward", "logps")}
            tokens = round(step.facts["rollout/length_mean"] * num_prompts * num_responses)
            answer(json.dumps(result(seconds, parts, loss, tokens)))


def result(seconds: float, parts: dict[str, float], loss: float, tokens: int) -> dict[str, float]:
    return {"seconds": seconds, **parts, "train": seconds - sum(parts.values()), "loss": loss, "tokens": tokens}


# ---- TRL ----


class Timers:
    """Seconds of methods of an object."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = self.clock()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - start

    def wrap(self, method: Callable[..., Any], name: str, counts: Callable[[], bool] = lambda: True) -> Any:
        """A method whose calls are timed where counts() holds."""

        def timed_method(*args: Any, **kwargs: Any) -> Any:
            if not counts():
                return method(*args, **kwargs)
            with self.timed(name):
                return method(*args, **kwargs)

        return timed_method


def grpo_settings(job: dict[str, Any]) -> Any:
    """TRL's arguments. Each microbatch has rows_at_a_time responses."""
    import torch
    from trl import GRPOConfig

    num_rows = job["num_prompts"] * job["num_responses"]
    rows_at_a_time = min(job["rows_at_a_time"], num_rows)
    return GRPOConfig(
        output_dir=job["cache"],
        per_device_train_batch_size=rows_at_a_time,
        gradient_accumulation_steps=num_rows // rows_at_a_time,
        num_generations=job["num_responses"],
        max_completion_length=job["max_new_tokens"],
        beta=job["beta"],
        epsilon=CLIP,
        loss_type="grpo",
        shuffle_dataset=False,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.01,  # AdamW's own default, as ours
        max_grad_norm=10.0,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **job["settings"],
    )


def end_at(lengths: list[int]) -> Any:
    """A processor of logits for one call of generate(). It ends each response at its length."""
    import torch
    from transformers import LogitsProcessor

    class EndAtLengths(LogitsProcessor):
        def __init__(self) -> None:
            self.step = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.step += 1
            scores[:, EOS] = -torch.inf
            ends = [row for row, length in enumerate(lengths) if length <= self.step]
            scores[ends] = -torch.inf
            scores[ends, EOS] = 0
            return scores

    return EndAtLengths()


def work_trl(job: dict[str, Any]) -> None:
    """Iterations of TRL's GRPOTrainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, TrainerCallback
    from trl import GRPOTrainer

    lengths: list[int] = []  # of the responses of an iteration, in the order of its rows

    class Iterations(TrainerCallback):
        """Measures each iteration. The loss is known once the trainer has logged it."""

        num_done = 0
        start = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            first = self.num_done * job["num_prompts"]
            of_prompts = job["lengths"][first : first + job["num_prompts"]]
            lengths[:] = [length for of_prompt in of_prompts for length in of_prompt]
            timers.seconds = dict.fromkeys(("generate", "reward", "logps"), 0.0)
            wait_for_turn()
            self.start = timers.clock()

        def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                seconds = timers.clock() - self.start
                tokens = round(logs["completions/mean_length"] * len(lengths))
                answer(json.dumps(result(seconds, timers.seconds, float(logs["loss"]), tokens)))
                self.num_done += 1

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [even_words(completion) for completion in completions]

    timers = Timers(CLOCKS[job["clock"]])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=grpo_settings(job),
        train_dataset=Dataset.from_list([{"prompt": text_of(tokens)} for tokens in job["prompts"]]),
        processing_class=tokenizer,
    )
    generate = trainer.model.generate
    trainer.model.generate = lambda **kwargs: generate(
        **kwargs, logits_processor=LogitsProcessorList([end_at(lengths)])
    )
    for method, name in (("_generate_single_turn", "generate"), ("_calculate_rewards", "reward")):
        setattr(trainer, method, timers.wrap(getattr(trainer, method), name))
    # Without gradients it is called for the reference, and for old log-probs.
    method = "_get_per_token_logps_and_entropies"
    setattr(trainer, method, timers.wrap(getattr(trainer, method), "logps", lambda: not torch.is_grad_enabled()))
    trainer.add_callback(Iterations())
    answer(READY)
    trainer.train()


if __name__ == "__main__":
    serve(sys.argv[1], {"ours": work_ours, "trl": work_trl})
