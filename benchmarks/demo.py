"""What does DPO gain? SFT and then DPO on the embedded model and films, and a report of what changed."""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.films import well_formed  # noqa: E402  found through the line above

EVAL = ["n_eval_examples=512", "n_eval_model_samples=256", "eval_batch_size=256", "wandb.enabled=false"]
BOTH = ["optimizer=AdamW", "batch_size=16", "warmup_steps=20", "lr_schedule=linear", "minimum_log_interval_secs=5"]
SFT = ["loss=sft", "lr=3e-3", "n_epochs=4"]
DPO = ["loss=dpo", "loss.beta=0.3", "loss.sft_weight=0.5", "lr=5e-4", "reference=live"]


def train(*overrides: str) -> Path:
    """Run train.py, showing what it prints; returns its run directory, which its last line names."""
    command = [sys.executable, "train.py", *overrides, *BOTH, *EVAL]
    print("\n$ python", *command[1:], flush=True)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = ""
        for line in process.stdout:
            print(line, end="", flush=True)
    if process.returncode:
        sys.exit(process.returncode)
    return ROOT / line.removeprefix("run_dir: ").strip()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    start = time.monotonic()
    sft = train(*SFT)
    dpo = train(*DPO, f"model.archive={sft / 'LATEST'}")
    seconds = time.monotonic() - start

    evaluations = [row for row in read(dpo / "metrics.jsonl") if "loss/eval" in row]
    before, after = evaluations[0], evaluations[-1]
    rows = [row for row in read(dpo / "samples.jsonl") if row["examples"] == after["counters/examples"]]
    forms = {who: sum(well_formed(row[who]) for row in rows) / len(rows) for who in ("reference", "policy")}
    print(f"\nWhat DPO gained, on {len(rows)} held-out prompts and 512 held-out pairs:\n")
    print(f"  reward accuracy of the policy   {after['rewards_eval/accuracies']:.3f}   (0.5 is chance)")
    print(f"  ground-truth reward, SFT        {before['ground_truth/policy']:+.3f}   (the range is -1 to +1)")
    print(f"  ground-truth reward, DPO        {after['ground_truth/policy']:+.3f}")
    print(f"  well-formed answers, SFT / DPO  {forms['reference']:.3f} / {forms['policy']:.3f}")
    print(f"  win rate of DPO over SFT        {after['ground_truth/win_rate']:.3f}   (ties count as half)")
    print(f"  KL to the SFT model             {after['kl_eval']:.2f}    nats per answer")
    for row in rows[:4]:
        print(f"\n{row['prompt'].strip()}")
        print(f"    SFT ({row['reference_reward']:+.2f}): {row['reference'].strip()}")
        print(f"    DPO ({row['policy_reward']:+.2f}): {row['policy'].strip()}")
    print(f"\nBoth runs took {seconds:.0f} s. The runs, with their models, are in\n  {sft}\n  {dpo}")


if __name__ == "__main__":
    main()
