"""GRPO of the embedded model on the ground truth of the films, and whether it reaches its goal.

It starts from the SFT model of `make demo`, kept in .cache/online, and made if it is not there.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT
from benchmarks.demo import read, train
from engine.data.films import is_well_formed

MIN_REWARD = 0.90
MIN_WELL_FORMED = 0.97
MAX_KL = 2.5  # nats per response


def make_sft_model(directory: Path, settings: Sequence[str]) -> bool:
    """Train the SFT model of the demo into a directory, unless it is there; returns whether it was made."""
    finished = directory / "finished"
    if finished.exists():
        return False
    quick = ("sample_during_eval=false", "do_first_eval=false")
    train("+experiment=demo_sft", *quick, f"local_run_dir={directory}", *settings)
    finished.touch()
    return True


def judge(run_dir: Path) -> tuple[str, bool]:
    """The result in a line, from the last evaluation of a run, and whether it reaches the goal."""
    last = [row for row in read(run_dir / "metrics.jsonl") if "rewards_eval/sampled" in row][-1]
    rows = [row for row in read(run_dir / "samples.jsonl") if "policy" in row]
    responses = [row["policy"] for row in rows if row["examples"] == last["counters/examples"]]
    reward, kl = last["rewards_eval/sampled"], last["kl_eval"]
    well_formed = sum(map(is_well_formed, responses)) / len(responses)
    is_reached = reward >= MIN_REWARD and well_formed >= MIN_WELL_FORMED and kl <= MAX_KL
    line = (
        f"reward {reward:+.3f} (at least {MIN_REWARD:+.2f}), well formed {well_formed:.3f}"
        f" (at least {MIN_WELL_FORMED:.2f}), KL {kl:.2f} nats (at most {MAX_KL}), on {len(responses)} held-out prompts"
    )
    return f"{'reached' if is_reached else 'MISSED'}: {line}", is_reached


def main(texts: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "online", help="keeps the SFT model")
    parser.add_argument("--seed", type=int, default=0, help="of GRPO")
    parser.add_argument("settings", nargs="*", help="overrides of train.py for both runs, such as n_examples=64")
    arguments = parser.parse_args(texts)
    sft, settings = arguments.work.resolve() / "sft", arguments.settings
    start = time.monotonic()
    was_made = make_sft_model(sft, settings)
    run_dir = train("+experiment=demo_grpo", f"seed={arguments.seed}", f"model.archive={sft / 'LATEST'}", *settings)
    line, is_reached = judge(run_dir)
    print(f"\n{line}, in {time.monotonic() - start:.0f} s{' with SFT' if was_made else ''}")
    return 0 if is_reached else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
