"""Temporary casts of parameters: the cast ones, their restoration, and the gradients."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.models.precision import parameters_in, round_masters, run_in_dtype
from engine.models.shards import full_tensor
from engine.step.heads import response_logps, run_head
from engine.step.layout import lay_out
from tests.models import pair_examples, tiny_model
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
        assert torch.equal(model.middle.weight, before["middle.weight"].to(torch.bfloat16))
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


def one_step(
    mixed: torch.dtype | None, *, rounds: bool, architecture: str = "llama", rounds_tied: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs of fp16-stored weights before and after one SGD step of about 1e-9 per weight."""
    model = tiny_model(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.float16))
        if rounds_tied:
            embeddings = model.get_input_embeddings().weight
            embeddings.copy_(embeddings.to(torch.bfloat16))
    batch = lay_out(pair_examples(), "padded")

    def logps() -> Tensor:
        with torch.no_grad(), run_in_dtype(model, mixed):
            return response_logps(model, batch)

    before = logps()
    if mixed is not None and rounds:
        assert round_masters(model, mixed)
        assert torch.equal(logps(), before)  # step 0 is the same, bitwise
    with run_in_dtype(model, mixed):
        run_head(model, batch, lambda logps, span: logps.sum())[0].backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-9 * parameter.grad.sign()
    return before, logps()


def moved(*arguments: torch.dtype | None, **options: Any) -> float:
    """The largest change of a log-prob by one_step()."""
    before, after = one_step(*arguments, **options)
    return (after - before).abs().max().item()


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_neox"])
def test_a_tiny_step_moves_bf16_no_more_than_fp32(architecture: str) -> None:
    bound = max(moved(None, rounds=False, architecture=architecture), 1e-5)
    # As stored, weights halfway between two bf16 values are tipped.
    assert moved(torch.bfloat16, rounds=False, architecture=architecture) > bound
    assert moved(torch.bfloat16, rounds=True, architecture=architecture) <= bound


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_a_tiny_step_tips_only_embeddings_tied_to_the_head(architecture: str) -> None:
    """They stay as stored, as the head reads them in fp32. Rounded too, they would not be tipped."""
    bound = max(moved(None, rounds=False, architecture=architecture), 1e-5)
    as_stored = moved(torch.bfloat16, rounds=False, architecture=architecture)
    assert bound < moved(torch.bfloat16, rounds=True, architecture=architecture) < as_stored
    assert moved(torch.bfloat16, rounds=True, architecture=architecture, rounds_tied=True) <= bound


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_step_0_is_the_same_with_tied_embeddings(architecture: str) -> None:
    one_step(torch.bfloat16, rounds=True, architecture=architecture)  # asserts it


def test_rounding_leaves_head_and_frozen_weights() -> None:
    model = tiny_model("llama")
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    kept = [frozen, model.get_output_embeddings().weight]
    before = [weight.clone() for weight in kept]
    trained = model.model.layers[0].mlp.down_proj.weight
    expected = trained.detach().to(torch.bfloat16).float()
    assert round_masters(model, torch.bfloat16)
    assert all(torch.equal(now, then) for now, then in zip(kept, before, strict=True))
    assert torch.equal(trained, expected)
    assert not round_masters(model, torch.bfloat16)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_the_head_runs_in_its_own_dtype(architecture: str) -> None:
    model = tiny_model(architecture)
    head = model.get_output_embeddings().weight
    with run_in_dtype(model, torch.bfloat16):
        assert model.get_output_embeddings().weight is head and head.dtype == torch.float32


# ---- Placements ----

MIXED = ("mixed_precision=bfloat16", "reference=live")
PLACEMENTS = {
    "basic": (),
    "lora": ("peft=lora", "peft.rank=4"),
    "qlora": ("peft=qlora", "peft.rank=4"),
    "package": ("trainer=TensorParallelTrainer", "tensor_parallel.backend=package", "tensor_parallel_size=2"),
}


def round_and_step(overrides: tuple[str, ...], directory: Path) -> tuple[set[str], dict[str, float]]:
    """Round the weights of a trainer, and take a step.

    Returns:
        names of trained weights with values between those of bf16, and the metrics of step 0.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    trainer = make_trainer(("llama", "dpo", (*MIXED, *overrides)), directory / str(rank))
    trainer.round_policy()
    names = set()
    for name, parameter in trainer.policy.named_parameters():
        if parameter.requires_grad:
            full = full_tensor(parameter).detach()
            if not torch.equal(full, full.to(torch.bfloat16).to(full.dtype)):
                names.add(name)
    return names, trainer.step(trainer.prepare(next(trainer.train_batches()))).values.read()


def check_rounded(found: tuple[set[str], dict[str, float]]) -> None:
    """Only the head keeps its digits, and step 0 is exact: the margin is 0, the loss ln 2."""
    unrounded, metrics = found
    assert all("lm_head" in name for name in unrounded)
    assert metrics["rewards_train/margins"] == metrics["rewards_train/chosen"] == 0
    assert metrics["loss/train"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_placement_rounds_what_runs_in_bf16(name: str, tmp_path: Path) -> None:
    check_rounded(round_and_step(PLACEMENTS[name], tmp_path))


@pytest.mark.alone
@pytest.mark.parametrize("trainer", ["FSDPTrainer", "TensorParallelTrainer"])
def test_shards_round_what_runs_in_bf16(trainer: str, tmp_path: Path) -> None:
    for found in on_ranks(2, round_and_step, (f"trainer={trainer}",), tmp_path):
        check_rounded(found)


def test_a_run_rounds_at_its_start_and_not_on_resume(program: Program) -> None:
    """A checkpoint's weights hold progress smaller than a step of bf16."""
    common = ("loss=dpo", "loss.beta=0.1", "mixed_precision=bfloat16", "lr=1e-7", "save_every=8", "n_eval_examples=2")
    directories = [f"local_run_dir={program.directory / name}" for name in ("a", "b")]
    run = program.ok(*common, directories[0])
    assert "mixed_precision: trained weights of the layers are rounded once to bfloat16" in run.out
    again = program.ok(*common, directories[1], f"resume={run.dir}/step-8")
    assert "rounded once" not in again.out
    ours, theirs = (load_file(each.dir / "LATEST" / "model.safetensors") for each in (again, run))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    weight = theirs["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())
