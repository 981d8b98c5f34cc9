"""How long does an iteration of online training take, and its parts, beside TRL's GRPOTrainer?

An iteration samples responses to prompts, scores them, computes log-probs, and takes one step of GRPO. Each system runs
in its own process, on the same weights, prompts, lengths of responses, optimizer (AdamW) and learning rate. They take
turns iteration by iteration, so all see the same machine. On a machine busy with other work, seconds of the process
count better than those of the wall: --clock cpu --threads 1. A row of the table, of the iterations after the warm-up:

- generate, reward, logps, train: median seconds of the parts. logps are those of the reference, and of the sampling
  policy where a system computes them apart.
- learn: logps and train.
- times: the median over iterations of the ratio to the first system, of learning, of sampling and of all.

    .venv/bin/python benchmarks/online.py --data DATA_DIR --model llama-8k

TRL needs its own environment, .venv-bench; `make bench` builds it. Without it, only our systems are measured.
"""

import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import online_workers
from benchmarks.common import MODELS, TRL_PYTHON, add_results_option, machine, shown_command, write_model, write_result
from benchmarks.pairs import Pair, hh_pairs, responses_of, synthetic_pairs
from benchmarks.workers import Worker

# name -> (worker, its settings)
SYSTEMS: dict[str, tuple[str, Any]] = {
    "ours": ("ours", []),
    "ours-bf16": ("ours", ["mixed_precision=bfloat16"]),
    "trl": ("trl", {"bf16": False}),
    "trl-bf16": ("trl", {"bf16": True}),
    "trl-static-cache": ("trl", {"bf16": False, "cache_implementation": "static"}),
}
PARTS = ("generate", "reward", "logps", "train")
Steps = dict[str, list[dict[str, float]]]  # system -> its iterations


# ---- Work ----


def make_job(pairs: Sequence[Pair], num_responses: int, most: int) -> dict[str, list[Any]]:
    """Prompts in the order of training, and the lengths of the responses to each, end of text included.

    Args:
        pairs: their responses give the lengths.
        most: the longest response.
    """
    from benchmarks.pairs import make_example
    from engine.step.sources import plan_batches

    examples = [make_example(pair, (), index) for index, pair in enumerate(pairs)]
    order = [index for batch in plan_batches(examples, 1, seed=0, n_epochs=1, n_examples=None) for index in batch]
    pool = [min(len(response), most) for pair in pairs for response in responses_of(pair)]
    rng = random.Random(0)
    lengths = [[rng.choice(pool) for _ in range(num_responses)] for _ in pairs]
    prompts = [[max(token, 1) for token in pair["prompt"]] for pair in pairs]
    return {"prompts": prompts, "order": order, "lengths": lengths}


def run_systems(names: Sequence[str], job: dict[str, Any], arguments: argparse.Namespace) -> Steps:
    """The iterations of each system."""
    model = MODELS[arguments.model]
    steps: Steps = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        # Llama's own default is 2. TRL ends responses there too.
        write_model({**model, "eos_token_id": online_workers.EOS}, Path(folder))
        online_workers.write_tokenizer(model["vocab_size"], Path(folder))
        workers: dict[str, Worker] = {}
        for name in names:
            kind, settings = SYSTEMS[name]
            own = {**job, "worker": kind, "settings": settings, "model": folder}
            if kind == "trl":  # ours shuffles the prompts itself
                own["prompts"] = [job["prompts"][index] for index in job["order"]]
            place = (Path(folder, name), own, arguments.threads, arguments.trl_python)
            workers[name] = stack.enter_context(Worker(*place, script=online_workers.__file__))
            print(f"{name}: ready after {workers[name].seconds_to_start:.0f} s", flush=True)
            workers[name].pause()
        for index in range(arguments.warmup + arguments.steps):
            for name, worker in workers.items():
                worker.go_on()
                steps[name].append(worker.step(False))
                worker.pause()
                print(f"iteration {index}, {name}: {steps[name][-1]['seconds']:.2f} s", flush=True)
            tokens = {name: steps[name][-1]["tokens"] for name in names}
            if len(set(tokens.values())) > 1:
                raise SystemExit(f"iteration {index}: the systems sampled different numbers of tokens: {tokens}")
    return steps


# ---- The table ----


def learn(step: dict[str, float]) -> float:
    return step["logps"] + step["train"]


def row_of(own: Sequence[dict[str, float]], first: Sequence[dict[str, float]]) -> dict[str, Any]:
    """A system's row of the table, of its own measured iterations and those of the system of ratio 1."""

    def ratio(part: Any) -> float:
        return round(statistics.median(part(a) / part(b) for a, b in zip(own, first, strict=True)), 2)

    return {
        "iterations": [{name: round(value, 6) for name, value in step.items()} for step in own],
        **{part: round(statistics.median(step[part] for step in own), 4) for part in (*PARTS, "seconds")},
        "learn": round(statistics.median(map(learn, own)), 4),
        "times_generate": ratio(lambda step: step["generate"]),
        "times_learn": ratio(learn),
        "times": ratio(lambda step: step["seconds"]),
    }


COLUMNS = (*PARTS, "learn", "seconds", "times_generate", "times_learn", "times")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [f"| system | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[column]:.4g}" for column in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def page(arguments: argparse.Namespace, record: dict[str, Any]) -> str:
    """A result as Markdown: the table, and how it was made."""
    clock = "of the process" if arguments.clock == "cpu" else "of the wall"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"# Online training of {arguments.model}: {arguments.prompts} prompts, {arguments.responses} responses each\n",
        f"GRPO at beta {arguments.beta:g}. Median seconds {clock} of {arguments.steps} iterations, and medians of"
        " ratios to the first system. Systems took turns, and sampled responses of equal lengths.\n",
        table(record["systems"]),
        f"`{record['command']}`, commit {record['commit'][:10]}, {record['machine']}; {versions}.",
    ]
    return "\n".join(lines) + "\n"


# ---- The command ----


def parse(texts: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with hh/train.jsonl.gz; without it, prompts are synthetic")
    parser.add_argument("--model", choices=MODELS, default="llama-8k")
    parser.add_argument("--systems", default="ours,trl", help="comma-separated, of " + ", ".join(SYSTEMS))
    parser.add_argument("--prompts", type=int, default=8, help="of an iteration")
    parser.add_argument("--responses", type=int, default=8, help="to each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--beta", type=float, default=0.04, help="weight of the KL; 0 needs no reference")
    parser.add_argument("--rows-at-a-time", type=int, default=8, help="responses of TRL's microbatches")
    parser.add_argument("--steps", type=int, default=5, help="measured iterations, after --warmup")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument(
        "--clock", choices=online_workers.CLOCKS, default="wall", help="cpu, with --threads 1: on a busy machine"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--trl-python", type=Path, default=TRL_PYTHON, help="of TRL's environment (default: %(default)s)"
    )
    add_results_option(parser)
    arguments = parser.parse_args(texts)
    if unknown := [name for name in arguments.systems.split(",") if name not in SYSTEMS]:
        parser.error(f"--systems: {', '.join(unknown)}: choose from {', '.join(SYSTEMS)}")
    return arguments


def main(texts: Sequence[str]) -> None:
    arguments = parse(texts)
    names = arguments.systems.split(",")
    if not arguments.trl_python.exists():
        print(f"TRL is not measured: {arguments.trl_python} does not exist (make bench builds it)")
        names = [name for name in names if SYSTEMS[name][0] != "trl"]
    vocabulary = MODELS[arguments.model]["vocab_size"]
    count = arguments.prompts * (arguments.warmup + arguments.steps)
    pairs = hh_pairs(arguments.data, vocabulary, count) if arguments.data else synthetic_pairs(vocabulary, count)
    job = {
        **make_job(pairs, arguments.responses, arguments.max_new_tokens),
        **{"num_prompts": arguments.prompts, "num_responses": arguments.responses, "beta": arguments.beta},
        **{"max_new_tokens": arguments.max_new_tokens, "rows_at_a_time": arguments.rows_at_a_time},
        "clock": arguments.clock,
    }
    steps = run_systems(names, job, arguments)
    measured = {name: each[arguments.warmup :] for name, each in steps.items()}
    rows = {name: row_of(each, measured[names[0]]) for name, each in measured.items()}
    record = {
        "command": shown_command("online", texts, arguments.data),
        **machine(arguments.threads, arguments.trl_python),
        "systems": rows,
    }
    print(f"\nmedian seconds of {arguments.steps} iterations, {arguments.prompts} x {arguments.responses} responses:\n")
    print(table(rows))
    label = f"online-{arguments.model}-{arguments.prompts}x{arguments.responses}"
    path = write_result(arguments.results, label, record)
    path.with_suffix(".md").write_text(page(arguments, record), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
