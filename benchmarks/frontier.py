"""Figure 2 of the DPO paper, completed: ground-truth reward against KL to the reference, on the embedded films.

A cell is a method at one strength of its KL penalty and one seed. It trains from one SFT model, the reference. All
checkpoints of a cell are measured alike: on samples, whatever the run itself reports. Beside the methods stands the
exact optimum. Finished cells are kept: a second command runs only the others.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, ROOT, add_results_option, machine, shown_command, write_result
from benchmarks.frontier_chart import draw, table

COMMON = ("+experiment=demo_sft", "do_first_eval=false", "sample_during_eval=false", "n_eval_examples=16")
OFFLINE = ("n_epochs=1", "lr=1.5e-4", "save_every=1840")  # one pass over 3,675 pairs
ONLINE = (
    *("n_epochs=null", "n_examples=960", "save_every=960", "lr=5e-4"),  # 60 steps of 16 prompts
    *("rollout.num_responses=8", "rollout.max_new_tokens=40", "n_eval_model_samples=2"),
)
LONGER = (*ONLINE, "n_examples=1600", "save_every=800", "rollout.num_responses=16")
PPO = (*ONLINE, "loss=ppo", "rollout.epochs=2", "critic.lr=1e-3")
LEARNED = (*PPO, "rewards=[reward_model]", "++reward_options.reward_model.path={reward}", "critic.archive={reward}")
# Longer and faster, to go beyond the best of the true reward.
FREE = (*LEARNED, "n_examples=1920", "save_every=480", "lr=1e-3")


@dataclass(frozen=True)
class Method:
    """A way to train a policy.

    Args:
        label: in the picture and the table.
        family: a key of FAMILIES, its colour in the picture.
        overrides: of train.py, after COMMON.
        betas: values of loss.beta; (None,) for a loss without.
    """

    label: str
    family: str
    overrides: tuple[str, ...]
    betas: tuple[float | None, ...] = (None,)


METHODS = {
    "dpo": Method("DPO", "pairs", (*OFFLINE, "loss=dpo"), (0.05, 0.1, 0.3, 1.0)),
    "ipo": Method("IPO", "pairs", (*OFFLINE, "loss=ipo"), (0.05, 0.2)),
    "cdpo": Method("cDPO", "pairs", (*OFFLINE, "loss=cdpo"), (0.1, 0.3)),
    "dpo_sft": Method("DPO + SFT", "pairs", (*OFFLINE, "loss=dpo", "loss.sft_weight=0.5", "lr=5e-4"), (0.1, 0.3)),
    "preferred": Method("SFT on preferred", "pairs", (*OFFLINE, "loss=sft", "datasets={preferred}")),
    "grpo": Method("GRPO", "truth", (*ONLINE, "loss=grpo"), (0.02, 0.07, 0.2)),
    "grpo_longer": Method("GRPO, longer", "truth", (*LONGER, "loss=grpo"), (0.02, 0.07, 0.2)),
    "rloo": Method("RLOO", "truth", (*ONLINE, "loss=rloo"), (0.1, 0.2, 0.4)),
    "online_dpo": Method("Online DPO", "truth", (*ONLINE, "loss=online_dpo"), (0.1, 0.3)),
    "ppo": Method("PPO", "truth", PPO, (0.05, 0.12)),
    "ppo_learned": Method("PPO on a reward model", "learned", LEARNED, (0.1, 0.3)),
    "ppo_free": Method("the same without KL penalty", "learned", FREE, (0.0,)),
    "best_of_n": Method("Best of 8, learned", "truth", (*ONLINE, "loss=best_of_n")),
}


@dataclass(frozen=True)
class Cell:
    """A method at one beta and seed."""

    method: str
    beta: float | None
    seed: int

    @property
    def name(self) -> str:
        return "-".join([self.method, *([] if self.beta is None else [f"{self.beta:g}"]), f"seed{self.seed}"])

    def overrides(self) -> list[str]:
        """Of train.py, after COMMON; with {names} for paths."""
        beta = [] if self.beta is None else [f"loss.beta={self.beta:g}"]
        return [*METHODS[self.method].overrides, *beta, f"seed={self.seed}"]

    def command(self, work: Path) -> list[str]:
        """The overrides with paths."""
        places = {"preferred": work / "preferred.jsonl", "reward": work / "reward" / "LATEST"}
        return [*(text.format(**places) for text in self.overrides()), f"model.archive={work / 'sft' / 'LATEST'}"]


def cells(names: Iterable[str], seeds: Sequence[int]) -> list[Cell]:
    """The cells of some methods, the first seed of each before the second.

    Args:
        names: a method, or METHOD:BETA.
    """
    pairs: list[tuple[str, float | None]] = []
    for name in names:
        method, _, beta = name.partition(":")
        pairs += [(method, float(beta))] if beta else [(method, each) for each in METHODS[method].betas]
    return [Cell(method, beta, seed) for seed in seeds for method, beta in pairs]


def train(directory: Path, work: Path, *overrides: str, common: Sequence[str] = COMMON) -> None:
    """Run train.py on one thread, unless it has finished there."""
    finished = directory / "finished"
    if finished.exists():
        return
    shutil.rmtree(directory, ignore_errors=True)
    places = (f"local_run_dir={directory}", f"cache_dir={work / 'cache'}", "keep_checkpoints=null")
    command = [sys.executable, "train.py", *common, *overrides, *places]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr}")
    finished.touch()


def run_cell(cell: Cell, work: Path, settings: Sequence[str], responses: int) -> dict[str, Any]:
    """Train and measure a cell, unless its result is there; the run itself is deleted afterwards."""
    from benchmarks.frontier_measures import Meter

    path = work / "cells" / f"{cell.name}.json"
    request = {
        **{"method": cell.method, "beta": cell.beta, "seed": cell.seed, "responses": responses},
        "overrides": [*cell.overrides(), *settings],
    }
    found = kept_result(path, request)
    if found is None:
        start = time.monotonic()
        directory = work / "runs" / cell.name
        train(directory, work, *cell.command(work), *settings)
        meter = Meter(work / "sft", test_prompts(settings), responses)
        steps = sorted(directory.glob("step-*"), key=lambda step: int(step.name.removeprefix("step-")))
        points = [{**learned_reward(directory, step), **meter.measure(step)} for step in steps]
        samples = meter.samples[:8]
        found = request | {"points": points, "samples": samples, "seconds": time.monotonic() - start}
        write_whole(path, found)
        shutil.rmtree(directory)
    return found


def learned_reward(directory: Path, step: Path) -> dict[str, float]:
    """The examples of a checkpoint, and the reward model's last mean score before it, of a run with one."""
    examples = int(step.name.removeprefix("step-"))
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    key = "rewards_train/reward_model"
    scores = [row[key] for row in rows if key in row and row["counters/examples"] <= examples]
    return {"examples": examples} | ({"learned_reward": scores[-1]} if scores else {})


def run_optimum(work: Path, settings: Sequence[str], responses: int) -> dict[str, Any]:
    """The exact optimum and the best of n, from samples of the reference; kept as a cell is."""
    from benchmarks.frontier_measures import Meter, optimum

    path, request = work / "cells" / "optimum.json", {"responses": responses, "settings": [*settings]}
    found = kept_result(path, request)
    if found is None:
        rewards = Meter(work / "sft", test_prompts(settings), responses).rewards_of_reference()
        found = request | optimum(rewards)
        write_whole(path, found)
    return found


def kept_result(path: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a cell, if there is one of the same request."""
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found | request == found else None


def write_whole(path: Path, result: dict[str, Any]) -> None:
    """Write a result. A stopped command leaves no part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def test_prompts(settings: Sequence[str]) -> list[str]:
    """Held-out prompts: as many as n_eval_model_samples of the settings, or all 512."""
    from engine.data.films import film_rows

    number = next((int(text.split("=")[1]) for text in settings if text.startswith("n_eval_model_samples=")), None)
    return [row["prompt"] for row in film_rows("test")][:number]


def write_preferred(path: Path) -> None:
    """The chosen responses of the films as targets of SFT."""
    from engine.data.films import film_rows

    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in film_rows("train")]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_all(
    chosen: Sequence[Cell], work: Path, arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The exact optimum and the results of all cells, several at a time; the first failure ends them."""
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn"), use_one_thread) as pool:
        try:
            best = pool.submit(run_optimum, work, arguments.settings, arguments.optimum_responses)
            futures = {
                pool.submit(run_cell, cell, work, arguments.settings, arguments.responses): cell for cell in chosen
            }
            for future in as_completed(futures):
                last = future.result()["points"][-1]
                measures = (f"{key} {last[key]:.3f}" for key in ("reward", "kl", "well_formed"))
                print(f"{futures[future].name}:", *measures, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return best.result(), [future.result() for future in futures]


def main(texts: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=",".join(METHODS), help="METHOD or METHOD:BETA, with commas")
    parser.add_argument("--seeds", default="0,1,2", help="with commas (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells at a time, one thread each")
    parser.add_argument("--responses", type=int, default=2, help="to each prompt, in a measurement")
    parser.add_argument("--optimum-responses", type=int, default=128, help="to each prompt, for the exact optimum")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "frontier", help="keeps finished cells")
    parser.add_argument("settings", nargs="*", help="overrides of train.py for all runs, such as n_examples=64")
    add_results_option(parser)
    arguments = parser.parse_args(texts)
    work, settings = arguments.work.resolve(), arguments.settings
    start = time.monotonic()
    write_preferred(work / "preferred.jsonl")
    train(work / "sft", work, "n_epochs=4", *settings)
    chosen = cells(arguments.methods.split(","), [int(seed) for seed in arguments.seeds.split(",")])
    if any(METHODS[cell.method].family == "learned" for cell in chosen):
        few = [text for text in settings if not text.startswith("n_eval_model_samples=")]  # it samples nothing
        train(work / "reward", work, *few, common=("+experiment=demo_reward", "wandb.enabled=false"))
    best, results = run_all(chosen, work, arguments)
    minutes = (time.monotonic() - start) / 60
    record = {"command": shown_command("frontier", texts), **machine(1), "minutes": minutes}
    record |= {"optimum": best, "cells": results}
    shown = {name: (method.label, method.family) for name, method in METHODS.items()}
    path = write_result(arguments.results or RESULTS, "frontier", record)
    path.with_suffix(".md").write_text(table(record, shown), encoding="utf-8")
    draw(record, shown, path)
    print(f"{len(results)} cells in {minutes:.0f} minutes; {path}, .md, .svg and .png")


def use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    main(sys.argv[1:])
