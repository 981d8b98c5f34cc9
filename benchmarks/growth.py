"""How does the cost of a step grow: with the length of the pairs, the vocabulary, the batch, the responses per prompt?

One curve after another on a small Llama; each point is a trainer of its own over synthetic pairs, its time the median
of a few steps after one of warm-up, its memory what one more step takes above what is held between steps. Time should
grow with the fed tokens (attention aside), memory not at all once a batch is cut into several microbatches.

    .venv/bin/python benchmarks/growth.py
"""

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from typing import Any

from step import MODELS, ROOT, Pair, fed_tokens, machine, our_batches, take_step

CURVES: dict[str, list[int]] = {
    "length": [256, 512, 1024, 2048, 4096],  # of prompt + response; half of it is the prompt
    "vocabulary": [8_192, 16_384, 32_768, 65_536, 131_072],
    "batch": [4, 8, 16, 32, 64],
    "responses": [2, 3, 4, 6, 8],  # per prompt, each paired with the first
}


def point(curve: str, value: int, steps: int) -> dict[str, float]:
    """Time and memory of a step at one point of a curve."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(MODELS["llama-8k"])
    length = value if curve == "length" else 256
    batch_size = {"batch": value, "length": 4, "responses": 8 * (value - 1)}.get(curve, 16)
    if curve == "vocabulary":
        values["vocab_size"] = value
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(2, values["vocab_size"]) for _ in range(count)]

    def pairs() -> Iterator[Pair]:
        while True:
            prompt, chosen = tokens(length // 2), tokens(length // 2)
            for _ in range(value - 1 if curve == "responses" else 1):
                yield {"prompt": prompt, "chosen": chosen, "rejected": tokens(length // 2)}

    stream = pairs()
    batches = [[next(stream) for _ in range(batch_size)] for _ in range(steps + 2)]
    fed = sum(map(fed_tokens, batches[0]))
    if curve == "responses":  # each prompt once, and its chosen response once
        fed -= 8 * (value - 2) * (length - 1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(0)
        model = AutoConfig.for_model(values.pop("model_type"), **values)
        AutoModelForCausalLM.from_config(model).save_pretrained(folder)
        trainer, laid_out = our_batches(folder, folder, batches, "mixed_precision=bfloat16")
        answers = [
            take_step(trainer, microbatches, of_memory=index == steps + 1)
            for index, microbatches in enumerate(laid_out)
        ]
    seconds = statistics.median(answer["seconds"] for answer in answers[1:-1])
    return {
        "fed_tokens": fed,
        "seconds": round(seconds, 4),
        "ms_per_1000_tokens": round(1e6 * seconds / fed, 1),
        "memory_mb": round(answers[-1]["memory"] / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", default=",".join(CURVES))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    record: dict[str, Any] = {"command": "benchmarks/growth.py", **machine(arguments.threads), "curves": {}}
    for curve in arguments.curves.split(","):
        print(f"\n{curve:12}{'fed tokens':>12}{'s/step':>9}{'ms/1000 tokens':>16}{'MB':>7}", flush=True)
        record["curves"][curve] = {}
        for value in CURVES[curve]:
            row = point(curve, value, arguments.steps)
            record["curves"][curve][value] = row
            print(
                f"{value:<12}{row['fed_tokens']:>12,}{row['seconds']:>9.3f}{row['ms_per_1000_tokens']:>16.1f}"
                f"{row['memory_mb']:>7.0f}",
                flush=True,
            )
    path = ROOT / "benchmarks" / "results" / f"growth-{date.today()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
