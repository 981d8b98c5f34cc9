"""Every loss on the embedded films: ground-truth reward, KL, form and accuracy, each at three learning rates.

SFT first, then each loss from its checkpoint, for one epoch. All runs share seed, data and schedule. All are measured
alike, on samples and on log-probs relative to the SFT model, whatever the loss itself reports.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, ROOT, add_results_option, compose_settings, machine, shown_command, write_result

COMMON = ("+experiment=demo_sft", "n_epochs=1", "do_first_eval=false")
DEFAULT_LR = 1.5e-4
LEARNING_RATES = (5e-5, DEFAULT_LR, 5e-4)
NEED_BETA = ("dpo", "cdpo", "ipo")  # no default, as in the reference implementation
MEASURES = {
    "reward": "ground-truth reward",
    "kl": "KL to SFT [nats]",
    "well_formed": "well-formed share",
    "accuracy": "accuracy",
}


@dataclass(frozen=True)
class Job:
    """A run: one loss at one learning rate."""

    loss: str
    lr: float
    directory: Path

    def overrides(self, sft: Path) -> list[str]:
        beta = ["loss.beta=0.1"] if self.loss in NEED_BETA else []
        return [f"loss={self.loss}", *beta, f"lr={self.lr:g}", f"model.archive={sft / 'LATEST'}"]


def train(directory: Path, *overrides: str) -> None:
    """Run train.py on one thread, unless it has finished there."""
    finished = directory / "finished"
    if finished.exists():
        return
    shutil.rmtree(directory, ignore_errors=True)
    command = [sys.executable, "train.py", *COMMON, f"local_run_dir={directory}", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr}")
    finished.touch()


def measure(run_dir: Path, sft: Path, settings: Any) -> dict[str, float]:
    """The measures of a trained run, on held-out prompts and pairs."""
    import torch
    import transformers

    from engine.data.examples import Example
    from engine.data.films import film_reward, is_well_formed
    from engine.export.saved_models import load_saved
    from engine.step.heads import response_logps
    from engine.step.layout import lay_out
    from preference_datasets import load_split

    transformers.logging.disable_progress_bar()
    policy, reference = (load_saved(str(each / "LATEST"), dtype=torch.float32) for each in (run_dir, sft))
    tokenizer = policy.tokenizer

    @torch.no_grad()
    def logratios(examples: Sequence[Example]) -> torch.Tensor:  # [responses] of examples, in their order
        found = []
        for start in range(0, len(examples), 64):
            batch = lay_out(examples[start : start + 64], "padded", tokenizer.pad_token_id)
            ratios = response_logps(policy.model, batch) - response_logps(reference.model, batch)
            roles = [batch.chosen] if batch.rejected is None else [batch.chosen, batch.rejected]
            found.append(torch.stack([ratios[role] for role in roles], -1))
        return torch.cat(found)

    pairs = [*load_split(settings, tokenizer, "test", "pairs").examples[: settings.n_eval_examples]]
    chosen, rejected = logratios(pairs).unbind(-1)
    lines = (run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row["examples"] == rows[-1]["examples"]]

    def encoded(text: str, end: list[int]) -> Any:
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False) + end, dtype=torch.int32).numpy()

    samples = [
        Example(encoded(row["prompt"], []), (encoded(row["policy"], [tokenizer.eos_token_id]),), index)
        for index, row in enumerate(rows)
    ]
    return {
        "reward": sum(film_reward(row["policy"]) for row in rows) / len(rows),
        "kl": logratios(samples).mean().item(),
        "well_formed": sum(is_well_formed(row["policy"]) for row in rows) / len(rows),
        "accuracy": (chosen > rejected).double().mean().item(),
    }


def best_of(rows: Sequence[dict[str, Any]], loss: str) -> dict[str, Any]:
    """A loss's run with the highest ground-truth reward."""
    return max((row for row in rows if row["loss"] == loss), key=lambda row: row["reward"])


def table(rows: Sequence[dict[str, Any]], losses: Sequence[str]) -> str:
    """Markdown: each loss at the default learning rate and at its best."""
    header = ["loss", *(f"{name}, default" for name in MEASURES.values()), "best lr", *MEASURES.values()]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for loss in sorted(losses, key=lambda loss: -best_of(rows, loss)["reward"]):
        default = next(row for row in rows if row["loss"] == loss and row["lr"] == DEFAULT_LR)
        best = best_of(rows, loss)
        cells = [
            *(f"{default[key]:.3f}" for key in MEASURES),
            f"{best['lr']:g}",
            *(f"{best[key]:.3f}" for key in MEASURES),
        ]
        lines.append(f"| `{loss}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], losses: Sequence[str], path: Path) -> None:
    """Bars of the ground-truth reward, and reward against KL."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    best = sorted((best_of(rows, loss) for loss in losses), key=lambda row: row["reward"])
    figure, (bars, points) = pyplot.subplots(1, 2, figsize=(13, max(4, 0.3 * len(best))), layout="constrained")
    names = [f"{row['loss']}  ({row['lr']:g})" for row in best]
    bars.barh(names, [row["reward"] for row in best], color="#4c72b0")
    bars.set_xlabel("ground-truth reward of sampled responses, at the best of three learning rates")
    bars.set_xlim(right=1)
    points.scatter([row["kl"] for row in best], [row["reward"] for row in best], color="#4c72b0")
    for row in best:
        points.annotate(row["loss"], (row["kl"], row["reward"]), xytext=(4, 2), textcoords="offset points", fontsize=8)
    points.set_xscale("symlog", linthresh=0.1)
    points.set_xlabel("KL to the SFT model, in nats per response")
    points.set_ylabel("ground-truth reward")
    points.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(texts: Sequence[str]) -> None:
    from losses import LOSSES

    every = [name for name, loss in LOSSES.items() if name != "sft" and loss.batch != "rollout"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--losses", default=",".join(every), help="of loss.name, with commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--work", type=Path, help="where the runs go; finished ones there are not repeated")
    parser.add_argument("settings", nargs="*", help="overrides of train.py for all runs, such as n_examples=64")
    add_results_option(parser)
    arguments = parser.parse_args(texts)
    names, settings = arguments.losses.split(","), arguments.settings
    work = arguments.work or Path(mkdtemp(prefix="losses-"))
    start = time.monotonic()
    sft = work / "sft"
    train(sft, "n_epochs=4", *settings)
    composed = compose_settings(*COMMON, *settings, f"cache_dir={work / 'cache'}")
    jobs = [Job(name, lr, work / f"{name}-{lr:g}") for name in names for lr in LEARNING_RATES]

    def run(job: Job) -> dict[str, Any]:
        train(job.directory, *settings, *job.overrides(sft))
        row: dict[str, Any] = {"loss": job.loss, "lr": job.lr, **measure(job.directory, sft, composed)}
        print(f"{job.loss} at {job.lr:g}:", *(f"{key} {row[key]:.3f}" for key in MEASURES), flush=True)
        return row

    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(run, jobs))
    seconds = time.monotonic() - start
    record = {"command": shown_command("losses", texts), **machine(1), "seconds": seconds, "runs": rows}
    path = write_result(arguments.results or RESULTS, "losses", record)
    path.with_suffix(".md").write_text(table(rows, names), encoding="utf-8")
    draw(rows, names, path.with_suffix(".png"))
    print(f"{len(rows)} runs in {seconds / 60:.0f} minutes; {path}, .md and .png")


if __name__ == "__main__":
    main(sys.argv[1:])
