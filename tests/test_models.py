"""Building models and tokenizers, and the check of packed attention against the model's own."""

import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from engine.models.layers import find_layers
from engine.models.loading import load_model
from engine.models.tokenizers import load_tokenizer
from engine.settings.schema import Settings
from engine.step.heads import response_logps
from engine.step.layout import lay_out
from engine.step.packing_check import tolerance_of, use_packed_attention
from tests.configs import make_settings, with_model
from tests.models import SIZES, pair_examples, tiny_model
from utils import UserError

CPU = torch.device("cpu")


def config(**model: Any) -> Settings:
    values = {"tokenizer_name_or_path": None, "architecture": None} | model
    return with_model(make_settings("max_length=64", "max_prompt_length=32"), **values)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1, "a": 2, "b": 3}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


@pytest.mark.parametrize("architecture", SIZES)
def test_packed_attention_is_accepted(architecture: str) -> None:
    model = tiny_model(architecture)
    use_packed_attention(model)
    assert model.config._attn_implementation == "packed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_packed_attention_is_accepted_in_other_dtypes(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    use_packed_attention(model)
    assert model.config._attn_implementation == "packed" and model.dtype == dtype


def odd_model(kind: str):
    values = {"vocab_size": 61, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    sizes = {
        "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 64},
        "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
        # Capped attention scores.
        "gemma2": {**SIZES["llama"], "head_dim": 8, "final_logit_softcapping": None, "attn_logit_softcapping": 50.0},
        # Logits scaled after the head.
        "granite": {**SIZES["llama"], "logits_scaling": 3.0},
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values, **sizes[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("kind", ["gptj", "mamba", "bloom", "granite", "gemma2"])
def test_models_without_packing_are_refused_and_run_padded(kind: str) -> None:
    model = odd_model(kind)
    examples = pair_examples()
    padded = response_logps(model, lay_out(examples, "padded"))
    tokens = torch.tensor([*examples[1].prompt.tolist(), *examples[1].responses[0].tolist()])
    alone = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None]).sum().item()
    chosen = int(lay_out(examples, "padded").chosen[2])  # the second group's first response
    assert padded[chosen].item() == pytest.approx(alone, rel=1e-4)
    with pytest.raises(UserError, match="batching=padded") as caught:
        use_packed_attention(model)
    assert caught.value.exit_status == 2


def test_layers_are_found() -> None:
    for architecture in SIZES:
        assert len(find_layers(tiny_model(architecture), None)) == 2
    model = tiny_model("llama")
    assert find_layers(model, "LlamaDecoderLayer") == find_layers(model, None)
    with pytest.raises(UserError, match="one of LlamaDecoderLayer"):
        find_layers(model, "GPT2Block")


def test_a_model_from_an_architecture_is_the_same_each_time(tokenizer) -> None:
    settings = config(architecture={"model_type": "llama", **SIZES["llama"], "attention_dropout": 0.1})
    first, second = (load_model(settings, tokenizer, torch.float32, CPU) for _ in range(2))
    assert first.config.vocab_size == len(tokenizer) and first.config.eos_token_id == 0
    assert first.config.attention_dropout == 0.0
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_dropout_is_off_everywhere(tokenizer) -> None:
    model = load_model(config(architecture={"model_type": "gpt2", **SIZES["gpt2"]}), tokenizer, torch.float32, CPU)
    tokens = torch.tensor([[2, 3, 2]])
    model.train()
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_a_model_is_loaded_in_the_requested_dtype(tokenizer, tmp_path) -> None:
    tiny_model("llama", torch.bfloat16, vocab_size=8).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = config(name_or_path=str(tmp_path))
    assert load_model(settings, load_tokenizer(settings.model), torch.float32, CPU).dtype == torch.float32


@pytest.mark.parametrize(
    "model, message",
    [
        ({"name_or_path": "/nowhere/at/all"}, "no model can be loaded from '/nowhere/at/all'"),
        ({"architecture": {"model_type": "llama9"}}, "model.architecture"),
        ({"architecture": {"model_type": "llama", **SIZES["llama"], "vocab_size": 3}}, "has 4 tokens, the model 3"),
    ],
)
def test_load_errors_are_one_line(model: dict, message: str, tokenizer) -> None:
    with pytest.raises(UserError, match="fix:") as caught:
        load_model(config(**model), tokenizer, torch.float32, CPU)
    assert message in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_status == 2


def test_a_bare_tokenizer_json_gets_its_end_of_text(tmp_path, capsys) -> None:
    backend = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(config(tokenizer_name_or_path=str(tmp_path)).model)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert "using <|endoftext|>" in capsys.readouterr().out
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(config(tokenizer_name_or_path=str(tmp_path)).model)


def test_invalid_generation_settings_are_repaired(tokenizer, tmp_path) -> None:
    model = tiny_model("llama", vocab_size=8)
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    repaired = load_model(config(name_or_path=str(tmp_path)), tokenizer, torch.float32, CPU)
    repaired.save_pretrained(tmp_path / "again")  # transformers refuses invalid ones
    saved = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["do_sample"]) == (0.6, True)


def test_buffers_of_older_versions_are_ignored(tokenizer, tmp_path) -> None:
    settings = config(architecture={"model_type": "gpt2", **SIZES["gpt2"]})
    state = load_model(settings, tokenizer, torch.float32, CPU).state_dict()
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save({"state": state}, tmp_path / "policy.pt")
    settings = with_model(settings, archive=str(tmp_path / "policy.pt"))
    load_model(settings, tokenizer, torch.float32, CPU)
    state["transformer.h.0.other"] = torch.tensor(0.0)
    torch.save({"state": state}, tmp_path / "policy.pt")
    with pytest.raises(UserError, match="1 unexpected keys"):
        load_model(settings, tokenizer, torch.float32, CPU)


class Malicious:
    def __reduce__(self):
        return print, ("this runs code",)


def test_a_policy_pt_with_code_is_refused_without_advice_to_run_it(tokenizer, tmp_path, capsys) -> None:
    torch.save({"state": {"a": Malicious()}}, tmp_path / "policy.pt")
    settings = config(architecture={"model_type": "gpt2", **SIZES["gpt2"]}, archive=str(tmp_path / "policy.pt"))
    with pytest.raises(UserError, match="loading it could run code") as caught:
        load_model(settings, tokenizer, torch.float32, CPU)
    assert caught.value.exit_status == 4
    assert not any(word in str(caught.value) for word in ("weights_only", "safe_globals", "trust"))
    assert "this runs code" not in capsys.readouterr().out


def test_weights_of_a_model_with_other_settings_are_refused(tokenizer, tmp_path) -> None:
    """Their shapes fit, so no other check would fail."""
    values = {"model_type": "llama", **SIZES["llama"], "attention_dropout": 0.1}
    settings = config(architecture=values)
    load_model(settings, tokenizer, torch.float32, CPU).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"pad_token_id": 3, "transformers_version": "5.0.0"}))
    settings = with_model(settings, archive=str(tmp_path))
    load_model(settings, tokenizer, torch.bfloat16, CPU)
    for changed in ({"rope_parameters": {"rope_theta": 500.0}}, {"rms_norm_eps": 1e-3}, {"num_attention_heads": 2}):
        settings = with_model(settings, architecture=values | changed)
        with pytest.raises(UserError, match="does not fit the model") as caught:
            load_model(settings, tokenizer, torch.float32, CPU)
        assert f"{next(iter(changed))} is " in str(caught.value) and caught.value.exit_status == 4


@pytest.mark.parametrize("precision, bits", [("highest", 23), ("high", 10), ("medium", 7)])
def test_fp32_log_probs_may_differ_by_the_precision_of_products(precision: str, bits: int) -> None:
    """A few roundings of each factor: TF32 keeps 10 bits of a mantissa, bf16 7."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert 2 * 2.0**-bits <= tolerance_of(torch.float32) <= max(1e-4, 6 * 2.0**-bits)
        assert tolerance_of(torch.float64) == 1e-9 and tolerance_of(torch.bfloat16) == 0.02
    finally:
        torch.set_float32_matmul_precision(before)
