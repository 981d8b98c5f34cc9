"""What does a dialogue of several turns cost: in one example, or in one example per turn?

Two trainers take steps of SFT in turns, on the same made-up dialogues from the same weights. One gets each dialogue as
one example. The other gets each turn as an example, with all turns before it as its prompt. Losses must agree.

    .venv/bin/python benchmarks/dialogues.py
"""

import argparse
import contextlib
import io
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    MODELS,
    add_results_option,
    compose_settings,
    machine,
    make_trainer,
    model_overrides,
    shown_command,
    write_model,
    write_result,
)

if TYPE_CHECKING:
    from engine.data.examples import Example

QUESTION, RESPONSE = (10, 60), (10, 120)  # tokens, about as long as in HH


def make_dialogue(rng: random.Random, vocabulary: int, num_turns: int, index: int) -> "Example":
    """A dialogue of random tokens, in one example."""
    from engine.data.dialogues import Turn
    from engine.data.examples import Example

    def tokens(lengths: tuple[int, int]) -> np.ndarray:
        return np.array([rng.randrange(2, vocabulary) for _ in range(rng.randint(*lengths))], np.int32)

    trunk, turns = np.empty(0, np.int32), list[Turn]()
    for _ in range(num_turns):
        prompt, said = np.concatenate([trunk, tokens(QUESTION)]), tokens(RESPONSE)
        turns.append(Turn(len(prompt), np.append(said, np.int32(1))))
        trunk = np.concatenate([prompt, said])
    *earlier, last = turns
    return Example(trunk[: last.num_prompt], (last.response,), index, turns=tuple(earlier))


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds, processor seconds, fed tokens and loss of each step, by how dialogues are fed."""
    from engine.data.dialogues import split_turns

    model = MODELS[arguments.model]
    rng = random.Random(0)
    count = arguments.batch * (arguments.steps + 1)
    dialogues = [make_dialogue(rng, model["vocab_size"], arguments.turns, index) for index in range(count)]
    with contextlib.redirect_stdout(io.StringIO()):
        write_model(model, folder)
        settings = compose_settings(
            *model_overrides(folder),
            *("loss=sft", "sample_during_eval=false", f"batch_size={arguments.batch}", "max_length=2048"),
            *("optimizer=AdamW", "lr=1e-5", "warmup_steps=0", f"cache_dir={folder}"),
            f"mixed_precision={arguments.mixed_precision}",
        )
        trainers = {name: make_trainer(settings, folder / name, dialogues) for name in ("joined", "apart")}
    found: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "processor": [], "tokens": [], "loss": []} for name in trainers
    }
    for step in range(arguments.steps + 1):
        batch = dialogues[step * arguments.batch : (step + 1) * arguments.batch]
        for name, trainer in trainers.items():
            examples = batch if name == "joined" else [turn for each in batch for turn in split_turns(each)]
            prepared = trainer.prepare(trainer.split_batch(examples))
            start, start_processor = time.perf_counter(), time.process_time()
            values = trainer.step(prepared).values.read()
            if step == 0:  # of warm-up
                continue
            row = time.perf_counter() - start, time.process_time() - start_processor, values["tokens"]
            for key, value in zip(found[name], (*row, values["loss/train"]), strict=True):
                found[name][key].append(value)
    return found


def main(texts: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-8k")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8, help="dialogues (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--mixed-precision", default="bfloat16", help="null for fp32 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    add_results_option(parser)
    arguments = parser.parse_args(texts)
    import torch

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(arguments, Path(folder))
    print(f"{'':8}{'fed tokens':>12}{'s/step':>9}{'processor s':>13}{'loss':>12}")
    for name, rows in found.items():
        medians = [statistics.median(rows[key]) for key in ("seconds", "processor")]
        print(f"{name:8}{sum(rows['tokens']):>12,.0f}{medians[0]:>9.3f}{medians[1]:>13.3f}{rows['loss'][-1]:>12.4f}")
    ratios = {key: sum(found["apart"][key]) / sum(found["joined"][key]) for key in ("tokens", "seconds", "processor")}
    print("one example per turn: " + ", ".join(f"{value:.2f} times the {key}" for key, value in ratios.items()))
    record = {"command": shown_command("dialogues", texts), **machine(arguments.threads)}
    write_result(arguments.results, "dialogues", record | {"steps": found, "ratios": ratios})


if __name__ == "__main__":
    main(sys.argv[1:])
