"""Plans against measurements: state byte by byte, peaks as seen by the operating system."""

import ctypes
import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import engine.step.logprobs
import train
from engine.data.examples import PromptRow, Split
from engine.data.films import film_tokenizer
from engine.models.shards import local_shard
from engine.run.plan import Plan, make_plan
from engine.run.plan_report import format_plan
from engine.run.workload import Work, share_of_peak
from engine.settings.hardware import Hardware, PeakShare
from engine.settings.schema import Settings
from engine.step.layout import lay_out
from engine.step.metrics import MetricAccumulator
from tests.configs import make_settings
from tests.models import pair_examples, random_examples
from tests.quick import slow_except
from tests.ranks import on_ranks
from tests.runs import Program
from trainers import TRAINERS

# A few million parameters, so the measured memory exceeds the noise.
MODELS = {
    "llama": "hidden_size: 256, intermediate_size: 688, num_hidden_layers: 4, num_attention_heads: 4,"
    " num_key_value_heads: 2, tie_word_embeddings: false",
    "gpt_neox": "hidden_size: 256, intermediate_size: 1024, num_hidden_layers: 4, num_attention_heads: 4",
}
M_MMAP_THRESHOLD = -3
FSDP, TENSOR = "trainer=FSDPTrainer", "trainer=TensorParallelTrainer"
ONE_LAYER = "model.architecture.num_hidden_layers=1"
EXAMPLES = Split(random_examples([(150 + 10 * i, 60, 70) for i in range(8)]))


def configured(architecture: str, *overrides: str) -> Settings:
    architecture_text = (
        f"{{model_type: {architecture}, vocab_size: 8192, max_position_embeddings: 512, {MODELS[architecture]}}}"
    )
    settings = [
        *("model=blank_model", "model.name_or_path=tiny", "model.tokenizer_name_or_path=films", "loss=dpo"),
        *("loss.beta=0.1", "n_epochs=1", "batch_size=8", "token_budget=3000", "wandb.enabled=false"),
        *("sample_during_eval=false", f"model.architecture={architecture_text}"),
    ]
    return make_settings(*settings, *overrides)


def planned(settings: Settings, num_processes: int = 1) -> Plan:
    return make_plan(settings, TRAINERS[settings.trainer], padding_tokenizer(), EXAMPLES, Split([]), num_processes)


@pytest.mark.parametrize(
    "hardware, overrides, expected",
    [
        pytest.param("h100", (), "40% of the data sheet (an assumed share)", marks=pytest.mark.slow),
        pytest.param("h100", ("peft=lora",), "40% of the data sheet (an assumed share)", marks=pytest.mark.slow),
        ("rtx4090", ("peft=qlora",), "32% of the data sheet (an assumed share)"),
        ("null", (), "50% of the peak measured just now (measured: docs/performance.md)"),
        pytest.param(
            "null", ("peft=qlora",), "50% of the peak measured just now (an assumed share)", marks=pytest.mark.slow
        ),
    ],
)
def test_the_share_of_the_peak_has_a_source_or_is_assumed(hardware: str, overrides: tuple[str, ...], expected) -> None:
    plan = planned(configured("llama", ONE_LAYER, f"plan_hardware={hardware}", *overrides))
    assert f"matrix products at {expected}" in format_plan(plan)


def test_the_share_of_this_machine_is_found_by_its_cuda_name() -> None:
    settings = make_settings()
    names = ("NVIDIA H200", "NVIDIA H200 NVL", "Tesla T4")
    shares = [share_of_peak(settings, Hardware(name, "gpu", 1, {})) for name in names]
    assert shares[0].source is not None and shares[1:] == [PeakShare(0.40)] * 2


def padding_tokenizer() -> Any:
    tokenizer = film_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": str(2**16)})  # a user's own choice: the trainer leaves it
def measured(settings: Settings, directory: Path) -> dict[str, int]:
    """Measure the state of a real trainer, and the peak of a step above it, in bytes."""
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**16)  # freed large tensors return to the system
    settings = settings.named(exp_name="measured", cache_dir=str(directory), local_run_dir=str(directory))
    trainer = TRAINERS[settings.trainer](settings, directory, padding_tokenizer(), EXAMPLES, Split([]))
    (batch,) = map(trainer.prepare, trainer.train_batches())
    trainer.step(batch)
    trainer.step(batch)
    found = {"parameters": size(trainer.policy.parameters()), "optimizer": size(trainer.optimizer.state.values())}
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    idle = process_bytes("VmRSS")
    trainer.step(batch)
    found["step"] = process_bytes("VmHWM") - idle
    trainer.accumulate_gradients(batch, MetricAccumulator())
    found["gradients"] = size(parameter.grad for parameter in trainer.policy.parameters())
    return found


def process_bytes(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def size(values: Any) -> int:
    return sum(local_shard(value).nbytes for value in tree_leaves([*values]) if isinstance(value, Tensor))


@pytest.mark.parametrize(
    "architecture, num_ranks, overrides",
    [
        pytest.param("llama", 1, (), marks=pytest.mark.slow),
        pytest.param("gpt_neox", 1, ("optimizer=AdamW", "activation_checkpointing=true"), marks=pytest.mark.slow),
        pytest.param(
            *("gpt_neox", 1, ("mixed_precision=bfloat16", "gradient_accumulation_steps=4", "optimizer=SGD")),
            marks=pytest.mark.slow,
        ),
        pytest.param("llama", 2, (FSDP, "optimizer=AdamW"), marks=pytest.mark.slow),
        pytest.param("gpt_neox", 2, (FSDP, "mixed_precision=bfloat16"), marks=pytest.mark.slow),
        pytest.param("llama", 2, (TENSOR,), marks=pytest.mark.slow),
        pytest.param("llama", 4, (FSDP, "tensor_parallel_size=2"), marks=pytest.mark.slow),
        pytest.param("llama", 1, ("peft=qlora", "optimizer=AdamW"), marks=pytest.mark.slow),
        pytest.param("gpt_neox", 1, ("peft=lora", "mixed_precision=bfloat16"), marks=pytest.mark.slow),
        pytest.param("llama", 1, ("freeze.patterns=[embed,layers.0]",), marks=pytest.mark.slow),
        pytest.param("llama", 2, (FSDP, "peft=qlora", "mixed_precision=bfloat16"), marks=pytest.mark.slow),
    ],
)
def test_a_plan_matches_the_measurement(
    architecture: str, num_ranks: int, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    config = configured(architecture, *overrides)
    memory = planned(config, num_ranks).memory
    found = on_ranks(num_ranks, measured, config, tmp_path)[0]
    for name in ("parameters", "gradients", "optimizer"):
        assert getattr(memory, name) == pytest.approx(found[name], rel=0.05), name
    assert memory.state == pytest.approx(found["parameters"] + found["optimizer"], rel=0.05)
    assert memory.peak - memory.state == pytest.approx(found["step"], rel=0.2)


def test_work_counts_the_tokens_of_the_row() -> None:
    examples = pair_examples()
    batch, work = lay_out(examples), Work.of(examples, "packed")
    assert (work.tokens, work.targets) == (batch.num_tokens, len(batch.targets))
    batch = lay_out(examples, "padded")
    assert Work.of(examples, "padded").tokens == batch.input_ids.numel()


@pytest.mark.slow
def test_more_processes_need_less_and_are_faster() -> None:
    config = configured("llama", ONE_LAYER, FSDP, "plan_hardware=h100")
    plans = [planned(config, num) for num in (1, 2, 8)]
    assert [plan.memory.parameters * plan.num_processes for plan in plans] == [plans[0].memory.parameters] * 3
    seconds = [plan.seconds["training"] for plan in plans if plan.seconds]
    assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) == 3


@pytest.mark.parametrize(
    "hardware, dtype",
    slow_except([("plan_hardware=h100", torch.bfloat16), ("n_epochs=1", torch.float32)], "plan_hardware=h100"),
)
def test_a_planned_gpu_has_no_wide_copy_of_a_low_head(
    hardware: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes = set()

    def products(inputs: Tensor, weight: Tensor, out: Tensor) -> None:
        dtypes.add(weight.dtype)
        compute(inputs, weight, out)

    compute = engine.step.logprobs.wide_product
    monkeypatch.setattr(engine.step.logprobs, "wide_product", products)
    planned(configured("llama", ONE_LAYER, "model.policy_dtype=bfloat16", hardware))
    assert dtypes == {dtype}


def test_the_program_plans_and_leaves_no_run(program: Program) -> None:
    run = program.ok("plan=true", FSDP, "num_processes=64", "plan_hardware=a100", "loss=dpo", "loss.beta=0.1")
    assert "plan of FSDPTrainer on 64 GPUs" in run.out and "\nfits" in run.out
    assert not list(program.directory.rglob("config.yaml"))


@pytest.mark.parametrize(
    "num_gpus, overrides, expected",
    [
        (8, (), "warning: BasicTrainer computes on 1 of 8 GPUs at a time: FSDPTrainer uses all"),
        pytest.param(
            *(8, (FSDP, "num_processes=2"), "warning: 6 of 8 GPUs are idle: leave num_processes out to use all"),
            marks=pytest.mark.slow,
        ),
        *slow_except(
            [(8, (FSDP, "num_processes=2", "plan_hardware=h100"), None), (2, (FSDP, "num_processes=2"), None)]
        ),
        (0, (), None),
        (
            0,
            (FSDP, "num_processes=16", "plan_hardware=h100", "tensor_parallel_size=2"),
            "warning: 8 of 16 GPUs get no example of a step (batch_size=4) and are idle: a batch_size of at least 8 or"
            " fewer processes",
        ),
    ],
)
def test_a_plan_tells_of_idle_gpus(
    num_gpus: int, overrides: tuple[str, ...], expected: str | None, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.launcher, "count_gpus", lambda: num_gpus)
    run = program.ok("plan=true", *overrides)
    warnings = [line for line in run.out.splitlines() if "idle" in line or "at a time:" in line]
    assert warnings == ([expected] if expected else [])


PROMPTS = Split(
    [
        replace(example, responses=(), prompt_index=index, row=PromptRow(str(index), {}))
        for index, example in enumerate(random_examples([(20 + 10 * i, 5, 5) for i in range(8)]))
    ]
)
ONLINE = (
    ONE_LAYER,
    "loss=grpo",
    "rewards=[length]",
    "max_length=150",
    "max_prompt_length=100",
    "rollout.num_responses=3",
)


def online_plan(*overrides: str, num_processes: int = 1) -> Plan:
    settings = configured("llama", *ONLINE, "plan=true", *overrides)
    return make_plan(settings, TRAINERS[settings.trainer], padding_tokenizer(), PROMPTS, PROMPTS, num_processes)


def test_online_training_is_planned_with_the_longest_responses() -> None:
    plan = online_plan("rollout.prompts=8", "rollout.max_new_tokens=60")
    prompts = [20 + 10 * i for i in range(8)]
    responses = [min(60, 150 - prompt) for prompt in prompts]
    assert plan.num_tokens == sum(prompts) + sum(3 * (length - 1) for length in responses)
    assert (plan.num_steps, plan.max_microbatches, plan.max_tokens) == (1, 1, plan.num_tokens)
    assert plan.memory.reference == plan.memory.parameters
    assert plan.seconds is not None and plan.seconds["log-probs"] > 0 and plan.seconds["reference"] > 0
    assert plan.sampling is not None
    assert (plan.sampling.num_rows, plan.sampling.num_tokens) == (24, 150)
    per_token = 1 * 2 * 2 * 64 * 4  # layers, keys and values, their heads, their size, bytes
    assert plan.sampling.cache == per_token * 24 * 150
    text = format_plan(plan)
    assert "sampled  24 responses to 8 prompts at a time, of at most 60 tokens each, learned once" in text
    assert f"steps    1 of 8 prompts, at most {plan.num_tokens:,} tokens in all" in text
    assert "samples and their rewards, often most of it" in text


@pytest.mark.parametrize(
    "overrides",
    [
        ("loss=online_dpo", "rollout.num_responses=2"),
        ("loss=xpo", "rollout.num_responses=2"),
        pytest.param(("loss=rloo", "peft=lora"), marks=pytest.mark.slow),
        pytest.param(("loss=remax", "batching=padded"), marks=pytest.mark.slow),
    ],
)
def test_other_online_losses_are_planned(overrides: tuple[str, ...]) -> None:
    """Their shapes depend on no values: a plan has none."""
    plan = online_plan(*overrides)
    assert plan.sampling is not None and plan.memory.peak > plan.memory.state


@pytest.mark.slow
def test_passes_learn_the_same_responses_again() -> None:
    once, twice = online_plan(), online_plan("rollout.epochs=2")
    assert (twice.num_steps, twice.num_tokens) == (2 * once.num_steps, 2 * once.num_tokens)
    assert once.seconds is not None and twice.seconds is not None
    assert twice.seconds["training"] / twice.seconds["log-probs"] == pytest.approx(
        2 * once.seconds["training"] / once.seconds["log-probs"]
    )


@pytest.mark.slow
def test_sampling_gathers_all_weights() -> None:
    """It may need more memory than a step."""
    one, four = online_plan(FSDP, "loss.beta=0"), online_plan(FSDP, "loss.beta=0", num_processes=4)
    assert one.sampling is not None and four.sampling is not None and four.memory.reference == 0
    assert four.sampling.num_rows == one.sampling.num_rows / 4
    assert four.sampling.peak == four.memory.state + one.memory.parameters + 2 * four.sampling.cache
    large = online_plan("rollout.num_responses=32", "rollout.max_rows=256", "token_budget=300")
    assert large.sampling is not None and large.needed > large.sampling.peak > large.memory.peak


def test_the_program_plans_online_training(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.run.online.build_rewards", lambda *args: pytest.fail("a plan scores nothing"))
    run = program.ok("plan=true", "loss=grpo", "rollout.prompts=8", "n_examples=16")
    assert "\nsampled  64 responses to 8 prompts at a time" in run.out and "\nfits" in run.out


def test_a_model_that_is_too_large_does_not_fit(program: Program) -> None:
    large = ("model.architecture.hidden_size=16384", "model.architecture.num_hidden_layers=2")
    run = program.ok("plan=true", "plan_hardware=rtx4090", *large, "model.architecture.intermediate_size=28672")
    assert "does not fit" in run.out


def test_a_live_reference_takes_memory_beside_the_policy() -> None:
    cached, live = (planned(configured("llama", ONE_LAYER, f"reference={kind}")).memory for kind in ("cached", "live"))
    assert (cached.reference, live.reference) == (0, live.parameters)
    assert live.state - cached.state == pytest.approx(live.parameters, rel=0.01)
