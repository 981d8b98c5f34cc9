"""How closely does mixed_precision=bfloat16 follow fp32? DPO on short pairs, step by step, from the same weights.

- leap: one step at a tiny lr, from the same weights for each batch. How far do the pairs of that batch move?
- follow: a run of 20 steps. How far do the pairs of its first batch move?
- "seen" is what training computes; "learned" is the change of the fp32 weights, run in fp32.

Variants: fp32; bf16, the product: thresholds round the copies of weights; nearest: copies are rounded to the nearest;
rounded: the same, and the weights themselves are rounded once, at the start.

    .venv/bin/python benchmarks/bf16.py --model MODEL --data DATA
"""

import argparse
import contextlib
import gc
import io
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    MODELS,
    add_results_option,
    compose_settings,
    machine,
    make_trainer,
    shown_command,
    write_model,
    write_result,
)

if TYPE_CHECKING:
    from trainers import BasicTrainer

BETA = 0.1
Batches = Sequence[Sequence[Any]]  # of examples
VARIANTS = ("fp32", "bf16", "nearest", "rounded")


def parse(texts: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="folder of a model and its tokenizer (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder with hh/train.jsonl.gz (default: the embedded films)")
    parser.add_argument("--leap-lr", type=float, default=3.3e-9, help="of the single step (default: %(default)s)")
    parser.add_argument("--leap-batches", type=int, default=5, help="0: no single steps (default: %(default)s)")
    parser.add_argument("--lr", default="5e-7,1e-5", help="of the runs; empty: no runs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of each run (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=48, help="longest prompt or response (default: %(default)s)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    add_results_option(parser)
    return parser.parse_args(texts)


def load_pairs(arguments: argparse.Namespace, model: list[str], count: int) -> list[Any]:
    """The first short pairs, one per prompt."""
    from engine.models.tokenizers import load_tokenizer
    from preference_datasets import load_split

    source = ["datasets=[films]"]
    if arguments.data:
        source = ["datasets=[hh]", f"data_dir={arguments.data.resolve()}"]
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(io.StringIO()):
        settings = compose_settings("loss=dpo", "loss.beta=0.1", *model, *source, f"cache_dir={cache}")
        examples = load_split(settings, load_tokenizer(settings.model), "train", "pairs").examples
    first = {example.prompt_index: example for example in reversed(examples)}
    short = [
        example
        for _, example in sorted(first.items())
        if max(map(len, (example.prompt, *example.responses))) <= arguments.max_tokens
    ]
    if len(short) < count:
        raise SystemExit(f"only {len(short)} of the {count} pairs needed have at most {arguments.max_tokens} tokens")
    return short[:count]


# ---- Variants ----


def with_trainer(
    measured: Callable[["BasicTrainer", Batches], list[Any]],
    model: list[str],
    variant: str,
    lr: float,
    batches: Batches,
) -> list[Any]:
    """Build the trainer of a variant, and measure it."""
    from engine.models import precision

    gc.collect()  # the trainer before is part of cycles
    overrides = [
        *("loss=dpo", f"loss.beta={BETA}", *model, f"lr={lr!r}", "warmup_steps=0", "batch_size=4", "n_examples=4"),
        *("max_length=256", "max_prompt_length=128", "reference=live", "wandb.enabled=false"),
        *([] if variant == "fp32" else ["mixed_precision=bfloat16"]),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if variant in ("nearest", "rounded"):
            stack.enter_context(patch.object(precision, "has_thresholds", lambda values, dtype: False))
        settings = compose_settings(*overrides, f"cache_dir={folder}/cache", f"local_run_dir={folder}")
        trainer = make_trainer(settings, Path(folder), [example for batch in batches for example in batch])
        if variant == "rounded":
            round_weights(trainer.policy)
        return measured(trainer, batches)


def round_weights(policy: Any) -> None:
    """Round all weights to bf16, but for the head: they run in fp32, tied embeddings too."""
    import torch

    head = policy.get_output_embeddings().weight
    with torch.no_grad():
        for weight in policy.parameters():
            if weight is not head:
                weight.copy_(weight.bfloat16())


# ---- Measuring ----

Row = dict[str, dict[str, float]]  # seen and learned -> loss, margin and log-ratios


def measure(trainer: "BasicTrainer", batch: Any, has_learned: bool) -> Row:
    """Loss, margin and log-ratios of policy to reference on a batch, in nats."""
    import torch

    from engine.step.metrics import MetricAccumulator

    def means(mixed: contextlib.AbstractContextManager[None]) -> dict[str, float]:
        metrics = MetricAccumulator()
        with torch.no_grad(), mixed:
            trainer.runner.measure(batch, trainer.placement.all_reduce_sum, metrics)
        reduced = metrics.reduce(trainer.placement.all_reduce_sum).means
        ratios = {name: reduced[f"rewards/{name}"].item() / BETA for name in ("chosen", "rejected", "margins")}
        return {"loss": reduced["loss"].item(), **ratios}

    row = {"seen": means(trainer.runner.in_mixed_precision())}
    if has_learned:
        row["learned"] = means(contextlib.nullcontext()) if trainer.runner.compute_dtype else row["seen"].copy()
    return row


def leap(trainer: "BasicTrainer", batches: Batches) -> list[tuple[Row, Row]]:
    """For each batch: before and after one step on it, from the same weights."""
    import torch

    weights = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
    found = []
    for index, examples in enumerate(batches):
        trainer.policy.load_state_dict(weights)
        trainer.optimizer.state.clear()
        torch.manual_seed(index)
        batch = trainer.prepare(trainer.split_batch(examples))
        before = measure(trainer, batch, has_learned=False)
        trainer.step(batch)
        found.append((before, measure(trainer, batch, has_learned=False)))
    return found


def follow(trainer: "BasicTrainer", batches: Batches) -> list[Row]:
    """The first batch before training and after each step. "learned" is from the start, and not of every step."""
    import torch

    probe = trainer.prepare(trainer.split_batch(batches[0]))
    found = [measure(trainer, probe, has_learned=True)]
    for step, batch in enumerate(batches, 1):
        torch.manual_seed(step)
        trainer.step(trainer.prepare(trainer.split_batch(batch)))
        found.append(measure(trainer, probe, has_learned=step <= 2 or step % 5 == 0))
    found[0]["rounding"] = start = found[0]["learned"].copy()  # of weights that are rounded at the start
    for row in found:
        if "learned" in row:
            row["learned"] = {name: value - start[name] for name, value in row["learned"].items()}
    return found


def show_leap(variant: str, found: Sequence[tuple[Row, Row]], exact: Sequence[tuple[Row, Row]]) -> str:
    """Mean and standard deviation of what moves, and the mean distance to fp32."""

    def moved(rows: Sequence[tuple[Row, Row]], name: str) -> list[float]:
        return [after["seen"][name] - before["seen"][name] for before, after in rows]

    texts = []
    for name in ("margins", "chosen", "rejected"):
        values = moved(found, name)
        apart = mean(abs(ours - theirs) for ours, theirs in zip(values, moved(exact, name), strict=True))
        spread = stdev(values) if len(values) > 1 else 0.0
        texts.append(f"{name} {mean(values):+.4f} +- {spread:.4f}, {apart:.4f} from the first variant")
    return f"leap    {variant:11} {'; '.join(texts)}"


def main(texts: Sequence[str]) -> None:
    import torch

    arguments = parse(texts)
    torch.set_num_threads(arguments.threads)
    variants = arguments.variants.split(",")
    with tempfile.TemporaryDirectory() as folder:
        model = ["model=blank_model", f"model.name_or_path={arguments.model}"]
        if arguments.model == "tiny":
            write_model({**MODELS["tiny"], "tie_word_embeddings": True}, Path(folder), "float16")
            model = ["model=blank_model", f"model.name_or_path={folder}", "model.tokenizer_name_or_path=films"]
        examples = load_pairs(arguments, model, 4 * max(arguments.steps, arguments.leap_batches))
        batches = [examples[start : start + 4] for start in range(0, len(examples), 4)]
        leaps: dict[str, list[tuple[Row, Row]]] = {}
        for variant in variants if arguments.leap_batches else []:
            first = batches[: arguments.leap_batches]
            leaps[variant] = with_trainer(leap, model, variant, arguments.leap_lr, first)
            print(show_leap(variant, leaps[variant], leaps[variants[0]]), flush=True)
        runs: dict[str, dict[str, list[Row]]] = {}
        for lr in filter(None, arguments.lr.split(",")):
            runs[lr] = {}
            for variant in variants:
                rows = with_trainer(follow, model, variant, float(lr), batches[: arguments.steps])
                runs[lr][variant] = rows
                for kind in ("seen", "learned"):
                    for name in ("margins", "chosen", "rejected"):
                        values = " ".join(f"{row[kind][name]:+.2f}" if kind in row else "." for row in rows)
                        print(f"follow  {variant:11} lr {lr} {kind:8} {name:9} {values}", flush=True)
    record = {
        "command": shown_command("bf16", texts, arguments.data),
        **machine(arguments.threads),
        "pairs": len(examples),
        "leaps": leaps,
        "runs": runs,
    }
    write_result(arguments.results, f"bf16-{Path(arguments.model).name}", record)


if __name__ == "__main__":
    main(sys.argv[1:])
