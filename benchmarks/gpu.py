"""How fast is training on a GPU, how much memory does it take, and where does the time go?

Each case trains a model of random weights on synthetic pairs, on a GPU in a process of its own: so each starts with all
memory, and a failed one spoils no other. Its result is on disk before the next case starts. No case starts after the
time limit.

    .venv/bin/python benchmarks/gpu.py --results DIR --limit 500
    .venv/bin/python benchmarks/gpu.py --device cpu --tiny --results DIR    # does every case run?

- MFU counts the operations of fed tokens, without recomputation, against the data sheet's peak in bf16.
- The profile is of one step. Head: all kernels of the LM head. Idle: no kernel runs.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    MODELS,
    add_results_option,
    compose_settings,
    machine,
    make_trainer,
    output_of,
    shown_command,
    write_result,
)
from benchmarks.gpu_profile import grouped_seconds
from benchmarks.pairs import make_example, synthetic_pairs
from process_start import let_segments_grow

if TYPE_CHECKING:
    import torch

    from trainers import BasicTrainer

BF16 = "mixed_precision=bfloat16"
ADAMW = (BF16, "optimizer=AdamW")
QLORA = ("peft=qlora", BF16)
SAVING = (*QLORA, "activation_checkpointing=auto")
SPLIT_EVENLY, LONG = (256, 256, 256), (2048, 2048, 2048)  # tokens of prompt, chosen and rejected


# ---- Cases ----


@dataclass(frozen=True)
class Case:
    """One measurement.

    Args:
        model: of benchmarks/common.py.
        overrides: of train.py.
        without: fast paths to switch off, of FAST_PATHS.
        lengths: tokens of prompt, chosen and rejected; None for the lengths of HH.
        num_pairs: of a step.
        with_profile: measure one more step under the profiler.
        memory_gb: a limit for this process, in 10^9 bytes.
    """

    name: str
    model: str
    overrides: tuple[str, ...] = ADAMW
    without: tuple[str, ...] = ()
    lengths: tuple[int, int, int] | None = SPLIT_EVENLY
    num_pairs: int = 64
    num_warmup: int = 2
    num_steps: int = 4
    with_profile: bool = False
    memory_gb: float | None = None


@contextlib.contextmanager
def without_running_ahead() -> Iterator[None]:
    """Log each step before the next one starts."""
    from trainers import BasicTrainer

    with patch.object(BasicTrainer, "runs_ahead", property(lambda trainer: False)):
        yield


@contextlib.contextmanager
def without_sortless_gather() -> Iterator[None]:
    """Gather keys by plain indexing. Its backward pass sorts the index."""
    from engine.step import attention_kernels

    with patch.object(attention_kernels, "gather_keys", attention_kernels.plain_gather_keys):
        yield


@contextlib.contextmanager
def without_wide_head() -> Iterator[None]:
    """Round the head's products to bf16, cast its weight for each microbatch, and take small chunks."""
    from engine.models import precision, wide_products
    from engine.step import logprobs

    def rounded(total: Any, left: Any, right: Any, dtype: Any) -> Any:
        product = (left @ right).to(dtype)
        return product if total is None else total.add_(product)

    with (
        patch.object(logprobs, "add_product", rounded),
        patch.object(logprobs, "chunk_logits", lambda device_type, memory: logprobs.CHUNK_LOGITS[device_type]),
        patch.object(precision, "low_weight_in", lambda *arguments, **options: contextlib.nullcontext()),
        patch.object(wide_products, "ROW_MULTIPLE", 1),
    ):
        yield


@contextlib.contextmanager
def without_fused_optimizer() -> Iterator[None]:
    """Use torch's RMSprop. AdamW is torch's own in any case."""
    from engine.models import optimizers

    with patch.object(optimizers, "runs_on", lambda parameters: False):
        yield


@contextlib.contextmanager
def without_fused_lora() -> Iterator[None]:
    """Run peft's own LoRA layers."""
    from engine.models import lora_linear

    with patch.object(lora_linear, "fuse_lora", lambda model: None):
        yield


# Name -> a context without it.
FAST_PATHS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "running-ahead": without_running_ahead,
    "sortless-gather": without_sortless_gather,
    "wide-head": without_wide_head,
    "fused-optimizer": without_fused_optimizer,
    "fused-lora": without_fused_lora,
}
PYTHIA = "pythia-2.8b"
RMSPROP = (BF16, "optimizer=RMSprop")
# The most telling first: the time limit cuts the end.
CASES = (
    Case("pythia-2.8b", PYTHIA, with_profile=True),
    Case("pythia-2.8b-plain", PYTHIA, without=tuple(FAST_PATHS)),
    Case("llama-8b-qlora", "llama-8b", QLORA, num_pairs=32, num_steps=3, with_profile=True),
    Case("llama-8b-qlora-plain", "llama-8b", QLORA, without=tuple(FAST_PATHS), num_pairs=32, num_steps=3),
    Case("pythia-70m-hh", "pythia-70m", lengths=None, num_steps=20, with_profile=True),
    Case("pythia-70m-hh-plain", "pythia-70m", without=tuple(FAST_PATHS), lengths=None, num_steps=20),
    Case("gpt2-hh", "gpt2-124m", lengths=None, num_steps=20),
    Case("gpt2-hh-plain", "gpt2-124m", without=tuple(FAST_PATHS), lengths=None, num_steps=20),
    Case("llama-7b-qlora-512-in-12gb", "llama-7b", SAVING, num_pairs=16, num_steps=2, memory_gb=12),
    Case("llama-7b-qlora-4096-in-24gb", "llama-7b", SAVING, lengths=LONG, num_pairs=4, num_steps=2, memory_gb=24),
    Case("pythia-2.8b-compiled", PYTHIA, (*ADAMW, "compile=true"), with_profile=True),
    Case("pythia-2.8b-rmsprop", PYTHIA, RMSPROP),
    Case("pythia-2.8b-rmsprop-without-fused-optimizer", PYTHIA, RMSPROP, without=("fused-optimizer",)),
    *(Case(f"pythia-2.8b-without-{name}", PYTHIA, without=(name,)) for name in list(FAST_PATHS)[:3]),
    Case("llama-8b-qlora-compiled", "llama-8b", (*QLORA, "compile=true"), num_pairs=32, num_steps=3),
    Case("pythia-70m-hh-compiled", "pythia-70m", (*ADAMW, "compile=true"), lengths=None, num_steps=20),
    Case("pythia-2.8b-fp32", PYTHIA, ("optimizer=AdamW",), num_pairs=16, num_steps=2),
    Case("pythia-2.8b-tf32", PYTHIA, ("optimizer=AdamW", "matmul_precision=high"), num_pairs=16, num_steps=2),
    Case("pythia-2.8b-bf16-weights", PYTHIA, ("model.policy_dtype=bfloat16", "optimizer=AdamW")),
    Case("pythia-2.8b-fsdp", PYTHIA, (*ADAMW, "trainer=FSDPTrainer")),
    Case("llama-110m-hh", "llama-110m", lengths=None, num_steps=20),
    Case("llama-110m-hh-compiled", "llama-110m", (*ADAMW, "compile=true"), lengths=None, num_steps=20),
    *(
        Case(f"llama-8b-qlora-{budget}", "llama-8b", (*QLORA, f"token_budget={budget}"), num_pairs=32, num_steps=2)
        for budget in (2048, 4096, 8192)
    ),
)


# ---- Models and batches ----


@contextlib.contextmanager
def models_made_on(device: str) -> Iterator[None]:
    """Make random weights on the device inside a with block, and hash none. The CPU takes minutes for 8B."""
    import torch
    from transformers import AutoModelForCausalLM

    from engine.models import policy
    from engine.models.loading import hf_config_of, turn_off_dropout
    from engine.placement import placement
    from engine.run import reference_setup

    def build(settings: Any, tokenizer: Any, dtype: "torch.dtype", _: "torch.device") -> Any:
        torch.manual_seed(0)
        is_frozen = settings.peft.name != "none"
        with torch.device(device):
            dtype = torch.bfloat16 if is_frozen else dtype
            config = hf_config_of(settings.model, tokenizer)
            turn_off_dropout(config)
            return AutoModelForCausalLM.from_config(config, dtype=dtype)

    def load_policy(settings: Any, tokenizer: Any, dtype: Any, where: Any, run_dir: Any) -> Any:
        return policy.load_policy(settings, tokenizer, dtype, where, run_dir, build)

    with (
        patch.object(placement, "load_policy", load_policy),
        patch.object(policy, "weights_hash", lambda *arguments: ""),
        patch.object(reference_setup, "weights_hash", lambda *arguments: ""),
    ):
        yield


def overrides_of(case: Case, arguments: argparse.Namespace, cache: Path) -> list[str]:
    architecture = MODELS["tiny" if arguments.tiny else case.model]
    values = ", ".join(f"{key}: {str(value).lower()}" for key, value in architecture.items())
    longest = case.lengths[0] + case.lengths[1] if case.lengths else 512
    return [
        *("model=blank_model", "model.name_or_path=random", "model.tokenizer_name_or_path=films"),
        *(f"model.architecture={{{values}}}", f"max_length={longest}", "warmup_steps=0", "lr=1e-6"),
        *("loss=dpo", "loss.beta=0.1", f"batch_size={num_pairs_of(case, arguments)}", "debug=true"),
        *("n_examples=1000000", "n_epochs=null", "eval_every=1000000", "wandb.enabled=false"),
        *("sample_during_eval=false", f"cache_dir={cache}", *case.overrides),
    ]


def num_pairs_of(case: Case, arguments: argparse.Namespace) -> int:
    return 2 if arguments.tiny else case.num_pairs


def batches_of(case: Case, arguments: argparse.Namespace) -> list[list[Any]]:
    """Two batches of pairs, for all steps in turn."""
    import random

    count, vocabulary = num_pairs_of(case, arguments), MODELS["tiny" if arguments.tiny else case.model]["vocab_size"]
    if case.lengths is None:
        pairs = synthetic_pairs(vocabulary, 2 * count)
    else:
        rng, lengths = random.Random(0), [8, 8, 8] if arguments.tiny else case.lengths
        names = ("prompt", "chosen", "rejected")
        pairs = [
            {
                name: [rng.randrange(2, vocabulary) for _ in range(length)]
                for name, length in zip(names, lengths, strict=True)
            }
            for _ in range(2 * count)
        ]
    examples = [make_example(pair, prompt_index=index) for index, pair in enumerate(pairs)]
    return [examples[:count], examples[count:]]


# ---- Measuring ----


@dataclass
class Recorder:
    """In place of the loggers: keeps the metrics of each step."""

    steps: list[dict[str, float]] = field(default_factory=list)

    def train(self, metrics: dict[str, float]) -> None:
        self.steps.append(metrics)

    def samples(self, rows: Sequence[Mapping[str, Any]], *, is_shown: bool = True) -> None: ...

    def print(self, line: str) -> None:
        print(line, flush=True)


def run_case(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """The results of a case."""
    from engine.placement import process_group
    from trainers import BasicTrainer

    on_gpu = arguments.device == "cuda"
    seconds: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        for name in case.without:
            stack.enter_context(FAST_PATHS[name]())
        if "trainer=FSDPTrainer" in case.overrides:
            stack.enter_context(process_group.joined(60))
        stack.enter_context(models_made_on(arguments.device))
        if case.memory_gb:
            stack.enter_context(memory_limited(case.memory_gb * 1e9, on_gpu))
        stack.enter_context(timed_method(BasicTrainer, "build_reference", seconds))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        start = time.perf_counter()
        batches = batches_of(case, arguments)
        settings = compose_settings(*overrides_of(case, arguments, folder / "cache"))
        trainer = make_trainer(settings, folder, [example for batch in batches for example in batch])
        synchronize(on_gpu)
        seconds["construction"] = time.perf_counter() - start
        return {
            "settings": list(case.overrides),
            "without": list(case.without),
            "pairs": num_pairs_of(case, arguments),
            "token_budget": trainer.token_budget,
            "recomputing_layers": trainer.num_checkpointed,
        } | measure(trainer, case, batches, arguments, seconds)


@contextlib.contextmanager
def memory_limited(limit: float, on_gpu: bool) -> Iterator[None]:
    """Limit this process to some bytes of GPU memory in a with block; the trainer believes in a card of that size.

    The limit holds once the policy is there: random weights are made on the GPU before they are quantised. A user's are
    quantised layer by layer.
    """
    import torch

    from engine.placement import placement
    from engine.placement.memory import total_memory

    load_policy = placement.load_policy

    def then_limited(*arguments: Any) -> Any:
        policy = load_policy(*arguments)
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(limit / total_memory(torch.device("cuda")))
        return policy

    with (
        patch.object(placement, "load_policy", then_limited),
        patch.object(placement, "total_memory", lambda device: int(limit)),
    ):
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.set_per_process_memory_fraction(1.0)


@contextlib.contextmanager
def timed_method(owner: type, name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Record the seconds of the calls of a method in a with block."""
    original = getattr(owner, name)

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = original(*arguments)
        seconds[name] = time.perf_counter() - start
        return result

    with patch.object(owner, name, timed):
        yield


def measure(
    trainer: "BasicTrainer",
    case: Case,
    batches: list[list[Any]],
    arguments: argparse.Namespace,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Warm up, take the steps of a case, and profile one more."""
    import torch

    on_gpu = arguments.device == "cuda"
    num_warmup, num_steps = (1, 2) if arguments.tiny else (case.num_warmup, case.num_steps)

    def take(num: int) -> list[dict[str, float]]:
        recorder = Recorder()
        trainer.loggers = recorder  # type: ignore[assignment]
        split = map(trainer.split_batch, (batches[index % 2] for index in range(num)))
        trainer.train_on(split)
        # The last step is logged when the next one starts.
        return recorder.steps

    start = time.perf_counter()
    warmup = take(num_warmup)
    synchronize(on_gpu)
    seconds["warm_up"] = time.perf_counter() - start
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    take(num_steps)
    synchronize(on_gpu)
    total = time.perf_counter() - start
    result: dict[str, Any] = {
        "first_loss": warmup[0]["loss/train"] if warmup else None,
        "seconds_per_step": total / num_steps,
        **speeds(trainer, batches, num_steps, total),
        "clock_mhz": output_of(["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]),
    }
    if on_gpu:
        result["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        result["reserved_memory_gb"] = torch.cuda.max_memory_reserved() / 1e9
    if case.with_profile:
        result["profile"] = grouped_seconds(lambda: take(1), on_gpu)
    return result | {"seconds": seconds}


def speeds(trainer: "BasicTrainer", batches: list[list[Any]], num_steps: int, seconds: float) -> dict[str, float]:
    """Pairs and fed tokens per second, and MFU."""
    import torch

    from engine.run.workload import Work
    from engine.settings.hardware import peak_flops

    used = [batches[index % 2] for index in range(num_steps)]
    work = [Work.of(part, trainer.settings.batching) for batch in used for part in trainer.split_batch(batch)]
    tokens, pairs = sum(each.tokens for each in work), sum(map(len, used))
    found = {"tokens_per_second": tokens / seconds, "pairs_per_second": pairs / seconds}
    flops = sum(trainer.flops(each, True) for each in work)
    found["tflop_per_second"] = flops / seconds / 1e12
    if torch.cuda.is_available() and (peak := peak_flops(torch.cuda.get_device_name())):
        found["mfu"] = flops / seconds / peak
    return found


def synchronize(on_gpu: bool) -> None:
    import torch

    if on_gpu:
        torch.cuda.synchronize()


def measure_ceilings(arguments: argparse.Namespace) -> dict[str, float]:
    """What the device can do: copies in GB/s, matrix products in TFLOP/s."""
    import torch

    on_gpu, size = arguments.device == "cuda", 64 if arguments.tiny else 8192
    left, right = (torch.randn(size, size, device=arguments.device, dtype=torch.bfloat16) for _ in range(2))
    total = torch.zeros(size, size, device=arguments.device)
    large = torch.empty(size * size * 8, device=arguments.device)
    jobs: dict[str, tuple[float, Callable[[], Any]]] = {
        "copy_gb_per_second": (2 * large.nbytes / 1e9, lambda: large.clone()),
        "bf16_tflop_per_second": (2 * size**3 / 1e12, lambda: left @ right),
    }
    if on_gpu:
        fp32 = torch.float32
        jobs["bf16_to_fp32_tflop_per_second"] = 2 * size**3 / 1e12, lambda: torch.mm(left, right, out_dtype=fp32)
        jobs["bf16_added_to_fp32_tflop_per_second"] = (
            2 * size**3 / 1e12,
            lambda: torch.addmm(total, left, right, out_dtype=fp32, out=total),
        )
        jobs["bf16_rounded_then_added_tflop_per_second"] = 2 * size**3 / 1e12, lambda: total.add_(left @ right)
    found = {}
    for name, (amount, job) in jobs.items():
        with contextlib.suppress(RuntimeError, TypeError):  # versions of torch differ in these
            times = []
            for _ in range(3 if arguments.tiny else 10):
                synchronize(on_gpu)
                start = time.perf_counter()
                job()
                synchronize(on_gpu)
                times.append(time.perf_counter() - start)
            found[name] = round(amount / statistics.median(times), 1)
    return found


# ---- The command ----


def run_apart(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """run_case() in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run_case, case, arguments).result()


def shown(name: str, result: dict[str, Any]) -> str:
    """A case as a line of the table."""
    if "error" in result:
        return f"{name:32} failed: {result['error']}"
    memory = f"{result['peak_memory_gb']:6.1f} GB" if "peak_memory_gb" in result else ""
    mfu = f"{result['mfu']:6.1%}" if "mfu" in result else ""
    speed = f"{result['seconds_per_step']:8.3f} s/step {result['tokens_per_second']:9,.0f} tokens/s"
    return f"{name:32}{speed}{mfu}{memory}"


def parse(texts: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and batches, for a test")
    parser.add_argument("--cases", help="comma-separated, of " + ", ".join(case.name for case in CASES))
    parser.add_argument("--limit", type=float, default=3600, help="seconds; no case starts later (default: 3600)")
    add_results_option(parser)
    arguments = parser.parse_args(texts)
    names = {case.name for case in CASES}
    if unknown := [name for name in (arguments.cases or "").split(",") if name and name not in names]:
        parser.error(f"--cases: {', '.join(unknown)}: choose from {', '.join(sorted(names))}")
    return arguments


def main(texts: Sequence[str]) -> None:
    import torch

    arguments, started = parse(texts), time.monotonic()
    let_segments_grow()  # as train.py does
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --device cpu --tiny tries all cases on the CPU")
    card = torch.cuda.get_device_name().split()[1].lower() if arguments.device == "cuda" else "cpu"
    chosen = [case for case in CASES if not arguments.cases or case.name in arguments.cases.split(",")]
    record: dict[str, Any] = {
        "command": shown_command("gpu", texts),
        **machine(torch.get_num_threads()),
        "ceilings": measure_ceilings(arguments),
        "cases": {},
        "not_started": [case.name for case in chosen],
    }
    print(json.dumps(record["ceilings"]), flush=True)
    if arguments.device == "cuda":
        torch.cuda.empty_cache()  # the cases have processes of their own
    for case in chosen:
        if time.monotonic() - started > arguments.limit:
            break
        try:
            result = run_apart(case, arguments) if arguments.device == "cuda" else run_case(case, arguments)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        record["cases"][case.name] = result
        record["not_started"].remove(case.name)
        write_result(arguments.results, f"gpu-{card}", record, silently=True)
        print(shown(case.name, result), flush=True)
    write_result(arguments.results, f"gpu-{card}", record)


if __name__ == "__main__":
    main(sys.argv[1:])
