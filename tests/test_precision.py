"""Temporary casts of parameters: the cast ones, their restoration, and the gradients."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedModel

import engine.models.precision
from engine.models.precision import parameters_in, run_in_dtype
from engine.models.rounding import RoundedCopy, Thresholds, embedding_thresholds, round_by, weight_thresholds
from engine.models.shards import full_tensor
from engine.step.heads import response_logps, run_head
from engine.step.layout import lay_out
from tests.models import pair_examples, tiny_model
from tests.quick import slow_except
from tests.ranks import make_trainer, on_ranks
from tests.runs import Program

TOKENS = [torch.tensor([0, 1, 2, 3]), torch.tensor([4, 4, 5, 1])]


class Tied(nn.Module):
    """A toy language model with tied embedding and head, and frozen integers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(6, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.quantised = nn.Parameter(torch.arange(3, dtype=torch.int8), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.middle(self.embedding(tokens)).tanh()
        return self.head(hidden.to(self.head.weight.dtype)).float().log_softmax(-1)[:, 0].sum()


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_floats_are_cast_inside_and_restored_after() -> None:
    model = Tied()
    before = dict(model.named_parameters())
    with parameters_in(model, torch.bfloat16):
        assert dtypes(model) == {
            "embedding.weight": torch.bfloat16,
            "middle.weight": torch.bfloat16,
            "middle.bias": torch.bfloat16,
            "quantised": torch.int8,
        }
        assert model.quantised is before["quantised"]
        thresholds = weight_thresholds("middle.weight", before["middle.weight"])
        assert torch.equal(model.middle.weight, round_by(before["middle.weight"], thresholds))
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


def test_originals_are_restored_after_an_exception() -> None:
    model = Tied()
    before = list(model.parameters())
    with pytest.raises(KeyError), parameters_in(model, torch.bfloat16):
        raise KeyError
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))


def test_a_tied_weight_is_copied_once() -> None:
    model = Tied()
    with parameters_in(model, torch.bfloat16):
        assert model.head.weight is model.embedding.weight


def test_gradients_equal_a_model_cast_by_hand_summed_in_fp32() -> None:
    model = Tied()
    with parameters_in(model, torch.bfloat16):
        for tokens in TOKENS:
            model(tokens).backward()
    expected: dict[str, Tensor] = {}
    for tokens in TOKENS:
        cast = copy.deepcopy(model)
        cast.zero_grad()
        with torch.no_grad():
            for name, parameter in cast.named_parameters():
                if parameter.is_floating_point():
                    parameter.copy_(round_by(parameter, weight_thresholds(name, parameter)))
        cast.to(torch.bfloat16)
        cast(tokens).backward()
        for name, gradient in gradients(cast).items():
            expected[name] = expected.get(name, 0) + gradient.float()
    ours = gradients(model)
    assert set(ours) == set(expected) == {"embedding.weight", "middle.weight", "middle.bias"}
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected[name])


def test_kept_modules_are_not_cast_even_when_tied() -> None:
    model = Tied()
    weight = model.head.weight
    with parameters_in(model, torch.bfloat16, keep=[model.head]):
        assert model.head.weight is weight
        assert model.embedding.weight.dtype == torch.bfloat16
        model(TOKENS[0]).backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    rows = weight.grad.ne(0).any(1)
    assert rows.all()  # the head reaches all rows, the embedding four


def test_the_same_dtype_changes_nothing() -> None:
    model = Tied()
    before = list(model.parameters())
    with parameters_in(model, torch.float32):
        assert all(now is then for now, then in zip(model.parameters(), before, strict=True))


def test_without_gradients_copies_have_none() -> None:
    model = Tied()
    with torch.no_grad(), parameters_in(model, torch.bfloat16):
        assert not model(TOKENS[0]).requires_grad
    with parameters_in(model, torch.bfloat16):
        assert model(TOKENS[0]).requires_grad


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])  # qwen2 and gpt2 with tied embeddings
def test_layers_run_in_the_dtype_embeddings_and_head_do_not(architecture: str) -> None:
    model = tiny_model(architecture)
    dtypes = []
    model.base_model.register_forward_hook(lambda module, args, output: dtypes.append(output.last_hidden_state.dtype))
    batch = lay_out(pair_examples(), "padded")
    with run_in_dtype(model, torch.bfloat16):
        assert model.get_input_embeddings().weight.dtype == torch.float32
        loss, logps = run_head(model, batch, lambda logps, span: logps.sum())
        loss.backward()
    assert dtypes == [torch.bfloat16] and logps.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())
    with run_in_dtype(model, None):
        response_logps(model, batch)
    assert dtypes[1] == torch.float32


ARCHITECTURES = ("llama", "mistral", "gpt_neox", "qwen2", "gpt2")  # the last two with tied embeddings


def stored_in(dtype: torch.dtype, architecture: str) -> PreTrainedModel:
    """A tiny model with values of a dtype. Of fp16, many lie halfway between two of bf16."""
    model = tiny_model(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


def moved(model: PreTrainedModel, step: float, dtype: torch.dtype | None) -> float:
    """How far the sum of log-probs moves when each weight moves by step along its gradient."""
    batch = lay_out(pair_examples(), "padded")

    def logps() -> float:
        with torch.no_grad(), run_in_dtype(model, dtype):
            return response_logps(model, batch).double().sum().item()

    before = logps()
    run_head(model, batch, lambda logps, span: logps.sum())[0].backward()  # the same gradient for each dtype
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += step * parameter.grad.sign()
    return logps() - before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
def test_copies_show_a_step_below_one_of_bf16(
    stored: torch.dtype, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the nearest, weights stored in bf16 hide most of it."""
    exact, ours = (moved(stored_in(stored, architecture), 1e-4, dtype) for dtype in (None, torch.bfloat16))
    assert ours == pytest.approx(exact, rel=0.2)
    if stored == torch.bfloat16:
        monkeypatch.setattr(engine.models.precision, "has_thresholds", lambda values, dtype: False)
        assert moved(stored_in(stored, architecture), 1e-4, stored) < 0.4 * exact


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tiny_step_makes_no_leap(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the nearest, it tips the weights halfway between two values of bf16, embeddings tied to the head too."""
    exact, ours = (moved(stored_in(torch.float16, architecture), 1e-7, dtype) for dtype in (None, torch.bfloat16))
    assert abs(ours - exact) < 0.05
    monkeypatch.setattr(engine.models.precision, "has_thresholds", lambda values, dtype: False)
    assert moved(stored_in(torch.float16, architecture), 1e-7, torch.bfloat16) > 0.4


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_the_head_runs_in_its_own_dtype(architecture: str) -> None:
    model = tiny_model(architecture)
    head = model.get_output_embeddings().weight
    with run_in_dtype(model, torch.bfloat16):
        assert model.get_output_embeddings().weight is head and head.dtype == torch.float32


# ---- Rounding by thresholds ----


def test_rounding_is_exact_for_bf16_and_unbiased_between() -> None:
    """Of the weights a quarter of a step above a value of bf16, a quarter is rounded up, in each row and column."""
    low = torch.tensor([1.0, -1.0, 0.02, 3e-20]).bfloat16().float().repeat(200)
    high = (low.view(torch.int32) + (1 << 16)).view(torch.float32)
    weight = nn.Parameter((low + (high - low) / 4).expand(4000, 800).clone())
    copy = RoundedCopy.apply(weight, weight_thresholds("weight", weight)).float()
    is_up = copy == high
    assert torch.equal(is_up, copy != low)
    assert is_up.float().mean().item() == pytest.approx(0.25, abs=0.002)
    for dimension in (0, 1):
        shares = is_up.float().mean(dimension)
        deviation = math.sqrt(0.25 * 0.75 / is_up.shape[dimension])
        assert (shares - 0.25).abs().max() < 6 * deviation


@pytest.mark.parametrize("threshold", [0, 1 << 15, (1 << 16) - 1])
def test_values_of_bf16_infinity_and_nan_stay(threshold: int) -> None:
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, -(1 << 22), -1], dtype=torch.int32)  # NaN of GPUs, of torch, of x86
    values = torch.cat(
        [torch.tensor([0.0, -0.0, 1.0, -3e38, 1e-39, math.inf, -math.inf]).bfloat16().float(), bits.view(torch.float32)]
    )
    thresholds = Thresholds(torch.tensor([threshold], dtype=torch.int32), torch.zeros(len(values), dtype=torch.int32))
    rounded = round_by(values, thresholds)
    torch.testing.assert_close(rounded, values.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_thresholds_are_of_the_name_and_repeat() -> None:
    weight = nn.Parameter(torch.randn(40, 30))
    first, again, other = (of_values(weight_thresholds(name, weight)) for name in ("a", "a", "b"))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == weight.shape and first.min() >= 0 and first.max() < 1 << 16
    tokens = torch.tensor([[3, 5], [5, 0]])
    of_tokens = of_values(embedding_thresholds(tokens, 7, torch.zeros(2, 2, 30))).view(2, 2, 30)
    assert torch.equal(of_tokens[0, 1], of_tokens[1, 0]) and not torch.equal(of_tokens[0, 1], of_tokens[0, 0])


def of_values(thresholds: Thresholds) -> Tensor:
    return thresholds.rows[:, None] ^ thresholds.columns


def test_simulations_leave_no_thresholds() -> None:
    weight = torch.zeros(3, 5)
    with FakeTensorMode():
        assert weight_thresholds("simulated", torch.zeros(3, 5)).rows.shape == (3,)
    assert type(weight_thresholds("simulated", weight).rows) is Tensor
    with FakeTensorMode():
        assert type(weight_thresholds("simulated", torch.zeros(3, 5)).rows) is not Tensor


def test_gradients_pass_a_rounded_copy() -> None:
    weight, factors = nn.Parameter(torch.randn(5, 4)), torch.randn(5, 4).bfloat16()
    (RoundedCopy.apply(weight, weight_thresholds("weight", weight)) * factors).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, factors.float())


def test_reference_adapters_are_rounded_as_the_trained_ones() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            default = nn.Linear(20, 30, bias=False)
            self.lora_A = nn.ModuleDict({"default": default, "reference": copy.deepcopy(default)})

    layer = Layer()
    nearest = layer.get_parameter("lora_A.default.weight").bfloat16()
    with parameters_in(layer, torch.bfloat16):
        trained, reference = (weight.clone() for weight in layer.parameters())
        assert torch.equal(trained, reference) and not torch.equal(trained, nearest)


# ---- Placements ----

MIXED = ("mixed_precision=bfloat16", "reference=live")
PLACEMENTS = {
    "basic": (),
    "lora": ("peft=lora", "peft.rank=4"),
    "qlora": ("peft=qlora", "peft.rank=4"),
    "package": ("trainer=TensorParallelTrainer", "tensor_parallel.backend=package", "tensor_parallel_size=2"),
}


def first_step(overrides: tuple[str, ...], directory: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of two evaluations, which are equal, and of the first step."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    trainer = make_trainer(("llama", "dpo", (*MIXED, *overrides)), directory / str(rank))
    evaluated, again = (trainer.evaluator.measure(trainer.token_budget, lambda: False) for _ in range(2))
    assert evaluated == again
    return evaluated, trainer.step(trainer.prepare(next(trainer.train_batches()))).values.read()


def check_exact(found: tuple[dict[str, float], dict[str, float]]) -> None:
    """Before the first update the margin is 0 and the loss ln 2, though no weight is a value of bf16."""
    for split, metrics in zip(("eval", "train"), found, strict=True):
        assert metrics[f"rewards_{split}/margins"] == metrics[f"rewards_{split}/chosen"] == 0
        assert metrics[f"loss/{split}"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_step_0_is_exact_in_every_placement(name: str, tmp_path: Path) -> None:
    check_exact(first_step(PLACEMENTS[name], tmp_path))


@pytest.mark.alone
@pytest.mark.parametrize("trainer", slow_except(["FSDPTrainer", "TensorParallelTrainer"], "FSDPTrainer"))
def test_step_0_is_exact_in_shards(trainer: str, tmp_path: Path) -> None:
    for found in on_ranks(2, first_step, (f"trainer={trainer}",), tmp_path):
        check_exact(found)


def copies(overrides: tuple[str, ...], directory: Path) -> dict[str, Tensor]:
    """The policy's weights inside in_mixed_precision(), gathered from all ranks, and embeddings of a few tokens."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    trainer = make_trainer(("gpt2", "dpo", (*MIXED, *overrides)), directory / str(rank))
    permutations, policy = trainer.placement.permutations, trainer.policy
    hidden: list[Tensor] = []
    policy.get_input_embeddings().register_forward_hook(lambda module, inputs, output: hidden.append(output.detach()))

    def full() -> dict[str, Tensor]:
        tensors = policy.state_dict(keep_vars=True).items()
        return {name: full_tensor(value.detach(), permutations.get(name)).float().clone() for name, value in tensors}

    before = full()
    with trainer.runner.in_mixed_precision(), trainer.runner.in_mixed_precision():
        found = full()
        policy.get_input_embeddings().register_forward_hook(lambda module, inputs, output: hidden.append(output))
        response_logps(policy, trainer.runner.lay_out(trainer.train_examples[:2]))
    after = full()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # the fp32 weights are back
    return found | {"embeddings": hidden[-1].detach()}


@pytest.mark.alone
@pytest.mark.parametrize("trainer", slow_except(["FSDPTrainer", "TensorParallelTrainer"], "TensorParallelTrainer"))
def test_shards_are_rounded_as_the_full_weights(trainer: str, tmp_path: Path) -> None:
    """Tensor parallelism permutes the fused weights of GPT-2. Its head is tied to the embeddings: it has no copy."""
    expected = copies((), tmp_path / "basic")
    in_bf16 = {name for name, value in expected.items() if torch.equal(value, value.bfloat16().float())}
    assert in_bf16 == {name for name in expected if "wte" not in name and "lm_head" not in name}
    for found in on_ranks(2, copies, (f"trainer={trainer}",), tmp_path):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].bfloat16(), value.bfloat16()) for name, value in expected.items())


def test_a_run_in_bf16_resumes_bitwise(program: Program) -> None:
    """A checkpoint's weights hold progress smaller than a step of bf16."""
    common = ("loss=dpo", "loss.beta=0.1", "mixed_precision=bfloat16", "lr=1e-7", "save_every=8", "n_eval_examples=2")
    directories = [f"local_run_dir={program.directory / name}" for name in ("a", "b")]
    run = program.ok(*common, directories[0])
    again = program.ok(*common, directories[1], f"resume={run.dir}/step-8")
    ours, theirs = (load_file(each.dir / "LATEST" / "model.safetensors") for each in (again, run))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    weight = theirs["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())
