"""SFT and then DPO on the embedded model and films, and a report of the gain."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT
from engine.data.films import is_well_formed


def train(*overrides: str) -> Path:
    """Run train.py and show its output; returns its run directory, from the last line."""
    command = [sys.executable, "train.py", *overrides]
    print("\n$ python", *command[1:], flush=True)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = ""
        for line in process.stdout:
            print(line, end="", flush=True)
    if process.returncode:
        sys.exit(process.returncode)
    return ROOT / line.removeprefix("run_dir: ").strip()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def report(run_dir: Path) -> None:
    """Print the gain of DPO, from its first and last evaluation."""
    evaluations = [row for row in read(run_dir / "metrics.jsonl") if "loss/eval" in row]
    before, after = evaluations[0], evaluations[-1]
    rows = [row for row in read(run_dir / "samples.jsonl") if row["examples"] == after["counters/examples"]]
    forms = {who: sum(is_well_formed(row[who]) for row in rows) / len(rows) for who in ("reference", "policy")}
    print(f"\nWhat DPO gained, on {len(rows)} held-out prompts:\n")
    print(f"  reward accuracy of the policy     {after['rewards_eval/accuracies']:.3f}   (0.5 is chance)")
    print(f"  ground-truth reward, SFT          {before['ground_truth/policy']:+.3f}   (the range is -1 to +1)")
    print(f"  ground-truth reward, DPO          {after['ground_truth/policy']:+.3f}")
    print(f"  well-formed responses, SFT / DPO  {forms['reference']:.3f} / {forms['policy']:.3f}")
    print(f"  win rate of DPO over SFT          {after['ground_truth/win_rate']:.3f}   (ties count as half)")
    print(f"  KL to the SFT model               {after['kl_eval']:.2f}    nats per response")
    for row in rows[:4]:
        print(f"\n{row['prompt'].strip()}")
        print(f"    SFT ({row['reference_reward']:+.2f}): {row['reference'].strip()}")
        print(f"    DPO ({row['policy_reward']:+.2f}): {row['policy'].strip()}")


def main(texts: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", help="overrides of train.py for both runs, such as n_examples=64")
    given = parser.parse_args(texts).settings
    start = time.monotonic()
    sft = train("+experiment=demo_sft", *given)
    dpo = train("+experiment=demo_dpo", f"model.archive={sft / 'LATEST'}", *given)
    seconds = time.monotonic() - start
    report(dpo)
    print(f"\nBoth runs took {seconds:.0f} s. The runs, with their models, are in\n  {sft}\n  {dpo}")


if __name__ == "__main__":
    main(sys.argv[1:])
