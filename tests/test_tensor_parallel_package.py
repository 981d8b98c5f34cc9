"""A model split by the tensor_parallel package behaves like the same model unsplit."""

import copy
import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import AutoModelForCausalLM, PreTrainedModel

import engine.placement.tensor_parallel_package
from engine.models.attention_switch import attention_of
from engine.models.generation import sample_responses
from engine.models.precision import run_in_dtype
from engine.placement.memory import saved_bytes
from engine.placement.tensor_parallel_package import (
    LAYERS,
    load_merged,
    load_merged_optimizer_state,
    merged_optimizer_state,
    merged_state_dict,
    split_model,
)
from engine.step.heads import response_logps, run_head
from engine.step.layout import GroupSpan, lay_out
from engine.step.logprobs import sum_by_response
from engine.step.packing_check import use_packed_attention
from tests.models import exact_norms, pair_examples, random_examples, tiny_model
from utils import UserError

CPU = torch.device("cpu")
# Optional biases, heads with a size other than hidden_size / heads, indivisible widths.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt_neox": {},
    "gpt2": {},
    "llama with biases": {
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 12,
        "intermediate_size": 47,
        "tie_word_embeddings": True,
    },
    "gpt_neox without biases": {"attention_bias": False, "use_parallel_residual": False, "intermediate_size": 47},
    "gpt2 untied": {"tie_word_embeddings": False, "n_inner": 47, "scale_attn_by_inverse_layer_idx": True},
}


def model_and_split(
    variant: str, layout: str = "packed", dtype: torch.dtype = torch.float32, num_devices: int = 2
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model, and a split copy of it."""
    model = tiny_model(variant.split()[0], dtype, **VARIANTS[variant])
    if dtype == torch.float64:
        model = exact_norms(model)
    if layout == "packed":
        use_packed_attention(model)
    return model, split_model(copy.deepcopy(model), [CPU] * num_devices)


def run(model: PreTrainedModel, layout: str = "packed") -> torch.Tensor:
    """Log-probs of pairs; adds the gradients of their squares to the parameters."""
    batch = lay_out(pair_examples(), layout)

    def span_loss(token_logps: torch.Tensor, span: GroupSpan) -> torch.Tensor:
        return (sum_by_response(token_logps, batch.response_lengths[span.responses]) ** 2).mean()

    loss, token_logps = run_head(model, batch, span_loss)
    loss.backward()
    return sum_by_response(token_logps, batch.response_lengths)


def gradients(split: PreTrainedModel) -> dict[str, torch.Tensor]:
    body, prefix = split.base_model, split.base_model_prefix + "."
    merged = {prefix + name: body.merged(name, lambda parameter: parameter.grad) for name in body.weights}
    return merged | {name: weight.grad for name, weight in split.named_parameters() if not name.startswith(prefix)}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert list(actual) == list(expected)
    for name in expected:
        difference = (actual[name] - expected[name]).norm() / expected[name].norm()
        assert difference < tolerance, f"{name} differs by {difference:.1e}"


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probs_and_gradients_equal_the_unsplit_model(variant: str, layout: str) -> None:
    model, split = model_and_split(variant, layout)
    expected = run(model, layout)
    torch.testing.assert_close(run(split, layout), expected, rtol=1e-5, atol=0)
    assert_close(gradients(split), {name: weight.grad for name, weight in model.named_parameters()})
    norms = [get_total_norm([weight.grad for weight in each.parameters()]) for each in (model, split)]
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)
    assert split.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("architecture", LAYERS)
def test_training_gives_the_weights_of_the_unsplit_model(architecture: str, layout: str, dtype: torch.dtype) -> None:
    """An evaluation before each step must not affect the step.

    Without rotation, attention does not depend on the bias of its keys, so their gradient is a rounding error. AdamW
    turns it into a normal step unless it is far below eps. In fp32 those weights are left out.
    """
    weights = []
    for model in model_and_split(architecture, layout, dtype):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(5):
            with torch.no_grad():
                response_logps(model, lay_out(pair_examples(), layout))
            run(model, layout)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            optimizer.zero_grad()
        left_out = ("c_attn.bias", "query_key_value.bias") if dtype == torch.float32 else ()
        weights.append({name: value for name, value in model.state_dict().items() if not name.endswith(left_out)})
    assert_close(weights[1], weights[0], 1e-5 if dtype == torch.float32 else 1e-7)
    start = tiny_model(architecture).state_dict()
    assert all((value - start[name]).abs().max() > 1e-3 for name, value in weights[0].items())


def test_four_devices_are_bitwise_repeatable() -> None:
    model, split = model_and_split("gpt_neox", num_devices=4)
    torch.testing.assert_close(run(split), run(model), rtol=1e-5, atol=0)
    first = gradients(split)
    assert_close(first, {name: weight.grad for name, weight in model.named_parameters()})
    for _ in range(5):
        split.zero_grad()
        run(split)
        assert all(torch.equal(gradient, first[name]) for name, gradient in gradients(split).items())


@pytest.mark.parametrize("architecture", LAYERS)
def test_samples_equal_the_unsplit_model(architecture: str) -> None:
    model, split = model_and_split(architecture)
    prompts = [example.prompt for example in random_examples([(4, 1), (9, 1), (1, 1), (6, 1)])]

    class Tokens:
        pad_token_id, eos_token_id = 0, 1

    responses = [
        sample_responses(each, Tokens(), prompts, max_new_tokens=12, max_length=100, batch_size=3, seed=0)
        for each in (model, split)
    ]
    assert [response.tolist() for response in responses[0]] == [response.tolist() for response in responses[1]]
    ids = torch.from_numpy(prompts[1]).long()[None]
    with attention_of(split, "sdpa"), torch.no_grad():
        plain, cached = (split.generate(ids, do_sample=False, max_new_tokens=8, use_cache=use) for use in (False, True))
        assert plain.tolist() == cached.tolist()
        with pytest.raises(UserError, match="no beam search"):
            split.generate(ids, num_beams=2, max_new_tokens=3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoints_equal_the_unsplit_model(variant: str, tmp_path) -> None:
    model, split = model_and_split(variant)
    expected = model.state_dict()
    weights = merged_state_dict(split)
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    changed = {name: weight + 1 for name, weight in expected.items()}
    load_merged(split, {name: changed[name] for name, _ in model.named_parameters()})
    assert all(torch.equal(weight, changed[name]) for name, weight in merged_state_dict(split).items())
    split.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert all(torch.equal(weight, changed[name]) for name, weight in loaded.state_dict().items())
    missing, unexpected = split.load_state_dict({"lm_head.wait": torch.ones(1)}, strict=False)
    assert missing and unexpected == ["lm_head.wait"]


@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "SGD", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam"])
def test_training_resumes_split_or_unsplit(name: str) -> None:
    """Two steps unsplit, two split, two unsplit, with one optimizer state, equal six unsplit."""
    model, split = model_and_split("gpt2", dtype=torch.float64)
    uninterrupted = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters()]

    def new_optimizer(each: PreTrainedModel) -> torch.optim.Optimizer:
        return getattr(torch.optim, name)(each.parameters(), lr=1e-3, **({"momentum": 0.9} if name == "SGD" else {}))

    def train(each: PreTrainedModel, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
        for _ in range(num_steps):
            run(each)
            torch.nn.utils.clip_grad_norm_(each.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    train(uninterrupted, new_optimizer(uninterrupted), 6)

    optimizer = new_optimizer(model)
    train(model, optimizer, 2)
    state = optimizer.state_dict()["state"]
    load_merged(split, model.state_dict())
    split_optimizer = new_optimizer(split)
    load_merged_optimizer_state(split, split_optimizer, dict(zip(names, state.values(), strict=True)))
    train(split, split_optimizer, 2)
    merged = merged_optimizer_state(split, split_optimizer)
    assert list(merged) == names
    model.load_state_dict(merged_state_dict(split))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(enumerate(merged.values()))})
    train(model, optimizer, 2)
    assert_close(model.state_dict(), uninterrupted.state_dict(), 1e-7)


def test_optimizer_state_round_trip_is_exact() -> None:
    _, split = model_and_split("gpt2")
    optimizer = torch.optim.AdamW(split.parameters())
    run(split)
    optimizer.step()
    before, merged = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(merged_optimizer_state(split, optimizer))
    optimizer.step()
    load_merged_optimizer_state(split, optimizer, merged)
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before["state"][index][key]) for key, value in state.items())
    factored = torch.optim.Adafactor(split.parameters())
    factored.step()
    with pytest.raises(UserError, match="Adafactor needs full matrices"):
        merged_optimizer_state(split, factored)


def test_a_split_model_has_the_methods_of_a_model() -> None:
    """Packing after the split, mixed precision, a copy as reference, train and eval, properties."""
    model, split = model_and_split("llama", "padded")
    use_packed_attention(split)
    use_packed_attention(model)
    assert split.train().training and all(module.training for module in split.modules())
    assert split.dtype == torch.float32 and split.device == CPU and split.config is split.base_model.config
    assert split.get_input_embeddings().weight.shape == model.get_input_embeddings().weight.shape

    reference = copy.deepcopy(split).requires_grad_(False)
    before = run(split)
    with torch.no_grad():
        for weight in split.parameters():
            weight.zero_()
    batch = lay_out(pair_examples())
    assert torch.equal(response_logps(reference, batch), before)

    model, split = model_and_split("llama with biases")
    with run_in_dtype(model, torch.bfloat16), run_in_dtype(split, torch.bfloat16):
        torch.testing.assert_close(run(split), run(model), rtol=0.02, atol=0)
    # Split weights have other thresholds than the full ones.
    assert_close(gradients(split), {name: weight.grad for name, weight in model.named_parameters()}, tolerance=0.1)

    def forward(each: PreTrainedModel) -> torch.Tensor:
        return run_head(each, batch, lambda logps, span: logps.sum())[0]

    unsplit_bytes, first_device_bytes = saved_bytes(lambda: forward(model)), saved_bytes(lambda: forward(split))
    assert 0.4 * unsplit_bytes < first_device_bytes < unsplit_bytes


def test_an_evaluation_keeps_no_graph() -> None:
    _, split = model_and_split("gpt2")
    graphs = []
    for shard in split.base_model.shards:
        shard.h[1].mlp.c_fc.register_forward_hook(lambda module, inputs, output: graphs.append(output.grad_fn))
    with torch.no_grad():
        response_logps(split, lay_out(pair_examples()))
    assert graphs == [None, None]


def test_a_failed_device_ends_the_pass() -> None:
    _, split = model_and_split("gpt_neox")
    expected = run(split)

    def fail(*_: object) -> None:
        raise MemoryError("of the second device")

    with split.base_model.shards[1].layers[0].mlp.register_forward_pre_hook(fail), pytest.raises(MemoryError):
        run(split)
    assert torch.equal(run(split), expected)


@pytest.mark.parametrize(
    ("architecture", "overrides", "num_devices", "message"),
    [
        ("qwen2", {}, 2, "llama, gpt_neox, gpt2, not qwen2"),
        ("mistral", {}, 2, "not mistral"),
        ("llama", {}, 3, "4 attention heads cannot be divided among 3 devices"),
        ("llama", {}, 4, "2 key and value heads cannot be divided among 4 devices"),
        ("gpt2", {}, 3, "4 attention heads"),
        ("gpt2", {}, 1, "among 1 device"),
        ("gpt2", {"resid_pdrop": 0.1}, 2, "dropout"),
        ("llama", {"attention_dropout": 0.1}, 2, "dropout"),
    ],
)
def test_unsupported_models_are_refused(architecture, overrides, num_devices, message) -> None:
    model = tiny_model(architecture, **overrides)
    with pytest.raises(UserError, match=message) as error:
        split_model(model, [CPU] * num_devices)
    assert error.value.code == "CONFIG"
    run(model, "padded")  # the model is intact


def test_other_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model, split = model_and_split("llama")
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        split.activation_checkpointing_enable()

    class Quantised(nn.Linear):
        pass

    model.model.layers[0].mlp.up_proj = Quantised(32, 48, bias=False)
    with pytest.raises(UserError, match="cannot split the Quantised at layers"):
        split_model(model, [CPU] * 2)

    monkeypatch.setitem(sys.modules, "tensor_parallel.shard", None)
    spec = importlib.util.spec_from_file_location("again", engine.placement.tensor_parallel_package.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(UserError, match="pip install tensor_parallel"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
