"""How closely does mixed_precision=bfloat16 follow fp32? DPO on short pairs, step by step, from the same weights.

- leap: the loss on the pairs of the first batch, before and after one step on them. A tiny lr should move nothing.
- follow: the margin of those pairs after each step of a run on other pairs. "seen" is what training computes;
  "learned" is the change of the fp32 weights, run in fp32.

Variants: fp32; bf16, the product; unrounded, the weights as stored; tied, with embeddings rounded that are tied to the
head; stochastic, as bf16, but the copies of the weights are rounded at random in each step.

    .venv/bin/python benchmarks/bf16.py --model MODEL --data DATA
"""

import argparse
import contextlib
import gc
import io
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
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

BETA = 0.1
VARIANTS = ("fp32", "bf16", "unrounded", "tied", "stochastic")


def parse(texts: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="folder of a model and its tokenizer (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder with hh/train.jsonl.gz (default: the embedded films)")
    parser.add_argument("--leap-lr", type=float, default=3.3e-9, help="of the single step (default: %(default)s)")
    parser.add_argument("--lr", default="5e-7,1e-5", help="of the runs (default: %(default)s)")
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


@contextlib.contextmanager
def variant_of_training(name: str) -> Iterator[None]:
    """Patch the product inside a with block."""
    import trainers
    from engine.models import precision

    with contextlib.ExitStack() as patches:
        if name == "unrounded":
            patches.enter_context(patch.object(trainers.BasicTrainer, "round_policy", lambda trainer: None))
        if name == "stochastic":
            patches.enter_context(patch.object(precision, "cast", stochastic_cast()))
        yield


def stochastic_cast() -> Any:
    """A cast to bf16 that rounds at random, up in proportion to the part cut off; exact for values of bf16."""
    import torch

    class Cast(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
            noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32)
            return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient.float()

    def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        is_master = values.requires_grad and values.dtype == torch.float32
        return Cast.apply(values) if is_master else values.to(dtype)

    return cast


def round_tied(trainer: Any) -> None:
    """Round embeddings that are tied to the head."""
    import torch

    embeddings, head = trainer.policy.get_input_embeddings(), trainer.policy.get_output_embeddings()
    if embeddings.weight is head.weight:
        with torch.no_grad():
            embeddings.weight.copy_(embeddings.weight.bfloat16().float())


# ---- Measuring ----


def train(
    model: list[str], examples: list[Any], variant: str, lr: float, batches: Sequence[Sequence[Any]]
) -> list[dict[str, float]]:
    """Loss and margin of the first batch before training and after each step."""
    import torch

    from engine.step.metrics import MetricAccumulator

    gc.collect()  # the trainer before is part of cycles
    overrides = [
        *("loss=dpo", f"loss.beta={BETA}", *model, f"lr={lr!r}", "warmup_steps=0", "batch_size=4", "n_examples=4"),
        *("max_length=256", "max_prompt_length=128", "reference=live", "wandb.enabled=false"),
        *([] if variant == "fp32" else ["mixed_precision=bfloat16"]),
    ]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = compose_settings(*overrides, f"cache_dir={folder}/cache", f"local_run_dir={folder}")
        trainer = make_trainer(settings, Path(folder), examples)
        with variant_of_training(variant):
            trainer.round_policy()
            if variant == "tied":
                round_tied(trainer)
            probe = trainer.prepare(trainer.split_batch(batches[0]))

            def means(mixed: contextlib.AbstractContextManager[None]) -> dict[str, float]:
                metrics = MetricAccumulator()
                with torch.no_grad(), mixed:
                    for microbatch in probe.microbatches:
                        trainer.runner.loss(microbatch, 4, metrics)
                reduced = metrics.reduce(trainer.placement.all_reduce_sum).means
                return {name: value.item() for name, value in reduced.items()}

            def measure() -> dict[str, float]:
                seen, learned = means(trainer.runner.in_mixed_precision()), means(contextlib.nullcontext())
                return {
                    "loss": seen["loss"],
                    # Log-ratios of policy to reference, in nats.
                    "chosen": seen["rewards/chosen"] / BETA,
                    "rejected": seen["rewards/rejected"] / BETA,
                    "seen": seen["rewards/margins"] / BETA,
                    "learned": learned["rewards/margins"] / BETA,
                }

            found = [measure()]
            for index, batch in enumerate(batches):
                torch.manual_seed(index)
                trainer.step(trainer.prepare(trainer.split_batch(batch)))
                found.append(measure())
    for row in reversed(found):
        row["learned"] -= found[0]["learned"]  # rounding at the start is not learned
    return found


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
        examples = load_pairs(arguments, model, 4 * arguments.steps)
        batches = [examples[start : start + 4] for start in range(0, len(examples), 4)]
        leaps = {}
        for variant in variants:
            before, after = train(model, examples, variant, arguments.leap_lr, batches[:1])
            leaps[variant] = {"before": before, "after": after}
            moved = {name: f"{after[name] - before[name]:+.4f}" for name in ("chosen", "rejected")}
            print(
                f"leap    {variant:11} loss {before['loss']:.6f} -> {after['loss']:.6f},"
                f" log-ratios of chosen {moved['chosen']}, of rejected {moved['rejected']}",
                flush=True,
            )
        runs: dict[str, dict[str, list[dict[str, float]]]] = {}
        for lr in arguments.lr.split(","):
            runs[lr] = {}
            for variant in variants:
                runs[lr][variant] = train(model, examples, variant, float(lr), batches)
                for kind in ("seen", "learned"):
                    margins = [f"{row[kind]:+.2f}" for row in runs[lr][variant]]
                    print(f"follow  {variant:11} lr {lr} {kind:8} {' '.join(margins)}", flush=True)
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
