"""How does the cost of a step grow: with the length of the pairs, the vocabulary, the batch, the responses per prompt?

One curve after another on a small Llama. Each point has its own trainer on synthetic pairs. Its time is the median of a
few steps after one of warm-up. Its memory is that of one more step, above the memory held between steps.

Time should grow with the fed tokens, apart from attention. Memory should not grow once a batch has several
microbatches.

    .venv/bin/python benchmarks/growth.py
"""

import argparse
import contextlib
import io
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    MODELS,
    add_results_option,
    compose_settings,
    machine,
    make_trainer,
    model_overrides,
    shown_command,
    take_step,
    write_model,
    write_result,
)
from benchmarks.pairs import Pair, fed_tokens, make_example

CURVES: dict[str, list[int]] = {
    "length": [256, 512, 1024, 2048, 4096],  # of prompt + response; half of it is the prompt
    "vocabulary": [8_192, 16_384, 32_768, 65_536, 131_072],
    "batch": [4, 8, 16, 32, 64],
    "responses": [2, 3, 4, 6, 8],  # per prompt, each paired with the first
}


def pairs_of(length: int, vocabulary: int, num_responses: int) -> Iterator[Pair]:
    """Endless pairs of random tokens. Each prompt has its first response paired with each other one."""
    rng = random.Random(0)

    def tokens() -> list[int]:
        return [rng.randrange(2, vocabulary) for _ in range(length // 2)]

    while True:
        prompt, chosen = tokens(), tokens()
        for _ in range(num_responses - 1):
            yield {"prompt": prompt, "chosen": chosen, "rejected": tokens()}


def point(curve: str, value: int, base: dict[str, Any], steps: int) -> dict[str, float]:
    """Time and memory of a step at one point of a curve."""
    length = value if curve == "length" else 256
    num_responses = value if curve == "responses" else 2
    batch_size = {"batch": value, "length": 4, "responses": 8 * (value - 1)}.get(curve, 16)
    model = base | ({"vocab_size": value} if curve == "vocabulary" else {})
    stream = pairs_of(length, model["vocab_size"], num_responses)
    batches = [[next(stream) for _ in range(batch_size)] for _ in range(steps + 2)]
    fed = sum(map(fed_tokens, batches[0]))
    if curve == "responses":  # the prompt and the first response stand once for 8 prompts
        fed -= 8 * (value - 2) * (length - 1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        write_model(model, Path(folder))
        settings = compose_settings(
            *model_overrides(Path(folder)),
            *("loss=dpo", "loss.beta=0.1", "sample_during_eval=false", f"batch_size={batch_size}"),
            *("optimizer=AdamW", "lr=1e-5", "warmup_steps=0", f"cache_dir={folder}", "mixed_precision=bfloat16"),
        )
        examples = [[make_example(pair) for pair in batch] for batch in batches]
        trainer = make_trainer(settings, Path(folder), [example for batch in examples for example in batch])
        prepared = (trainer.prepare(trainer.split_batch(batch)) for batch in examples)
        found = [take_step(trainer, batch, of_memory=index == steps + 1) for index, batch in enumerate(prepared)]
    seconds = statistics.median(step["seconds"] for step in found[1:-1])
    return {
        "fed_tokens": fed,
        "seconds": round(seconds, 4),
        "ms_per_1000_tokens": round(1e6 * seconds / fed, 1),
        "memory_mb": round(found[-1]["memory"] / 1e6),
    }


def main(texts: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-8k")
    parser.add_argument("--curves", default=",".join(CURVES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--points", type=int, default=5, help="of each curve, from its smallest on")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    add_results_option(parser)
    arguments = parser.parse_args(texts)
    import torch

    torch.set_num_threads(arguments.threads)
    curves: dict[str, dict[int, dict[str, float]]] = {}
    for curve in arguments.curves.split(","):
        print(f"\n{curve:12}{'fed tokens':>12}{'s/step':>9}{'ms/1000 tokens':>16}{'MB':>7}", flush=True)
        curves[curve] = {}
        for value in CURVES[curve][: arguments.points]:
            row = curves[curve][value] = point(curve, value, MODELS[arguments.model], arguments.steps)
            print(
                f"{value:<12}{row['fed_tokens']:>12,}{row['seconds']:>9.3f}{row['ms_per_1000_tokens']:>16.1f}"
                f"{row['memory_mb']:>7.0f}",
                flush=True,
            )
    record = {"command": shown_command("growth", texts), **machine(arguments.threads), "curves": curves}
    write_result(arguments.results, "growth", record)


if __name__ == "__main__":
    main(sys.argv[1:])
