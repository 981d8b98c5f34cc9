"""GGUF files read back: weights, logits in transformers, tokens as in llama.cpp; unsupported models."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from engine.export.gguf import OUTTYPES, plan_gguf
from tests.models import SIZES, tiny_model
from tests.tokenizer_files import PRE_TOKENIZERS, TEXTS, byte_level, sentencepiece
from utils import UserError

QWEN3 = {**SIZES["llama"], "head_dim": 16}
ROPE = {"rope_theta": 20000.0}
LLAMA3_ROPE = {
    **ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
DYNAMIC_ROPE = {**ROPE, "rope_type": "dynamic", "factor": 2.0}
TYPES = gguf.GGMLQuantizationType


def make(architecture: str, **overrides: Any):
    if architecture == "qwen3":
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "qwen3", **{"vocab_size": 330, "max_position_embeddings": 128, **QWEN3, **overrides}
        )
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        return model.eval()
    return tiny_model(architecture, **{"vocab_size": 330, **overrides})


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def write(tmp_path: Path, model, tokenizer, outtype: str = "f32", **options: Any) -> gguf.GGUFReader:
    plan_gguf(model, tokenizer, outtype, name="tiny", **options).write(tmp_path / "model.gguf")
    return gguf.GGUFReader(tmp_path / "model.gguf")


def tensors_of(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}


def value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    tokens = torch.arange(3, 43).unsqueeze(0)
    return model(tokens).logits


# ---- Weights ----


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "rope_parameters": ROPE}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gpt2", {}),
    ],
)
def test_logits_are_the_same_in_transformers(tmp_path, architecture, overrides, tokenizer):
    model = make(architecture, **overrides)
    write(tmp_path, model, tokenizer)
    # transformers ignores a GGUF file's head size of Qwen3 and positions of GPT-2.
    options = {"config": model.config} if architecture in ("qwen3", "gpt2") else {}
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32, **options)
    torch.testing.assert_close(logits(read), logits(model), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}])
def test_gpt_neox_weights_are_reordered(tmp_path, tokenizer, overrides):
    model = make("gpt_neox", **overrides)
    tensors = tensors_of(write(tmp_path, model, tokenizer))
    layer, head_dim = model.gpt_neox.layers[1].attention, 8
    for suffix in ("weight", "bias"):
        fused = getattr(layer.query_key_value, suffix).detach().numpy()
        for part, name in enumerate(("query", "key", "value")):
            for head in range(4):
                ours = tensors[f"blk.1.attn_qkv.{suffix}"][32 * part + head_dim * head :][:head_dim]
                start = head * 3 * head_dim + part * head_dim
                assert np.array_equal(ours, fused[start : start + head_dim]), name
    assert np.array_equal(tensors["output.weight"], model.get_output_embeddings().weight.detach().numpy())
    assert np.array_equal(tensors["token_embd.weight"], model.gpt_neox.embed_in.weight.detach().numpy())
    assert len(tensors) == len(model.state_dict())


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2"])
def test_weights_of_every_type_are_within_its_rounding_error(tmp_path, architecture, tokenizer):
    model = make(architecture)
    exact = tensors_of(write(tmp_path, model, tokenizer))
    for outtype in ("f16", "bf16", "q8_0", "q4_0"):
        reader = write(tmp_path, model, tokenizer, outtype)
        tensors = tensors_of(reader)
        types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
        assert tensors.keys() == exact.keys()
        assert OUTTYPES[outtype][0] in types.values()
        for name, expected in exact.items():
            error = np.abs(tensors[name] - expected)
            if types[name] in (TYPES.Q8_0, TYPES.Q4_0):
                largest = np.abs(expected).reshape(-1, 32).max(axis=1, keepdims=True)
                bound = largest * {TYPES.Q8_0: 0.57 / 127, TYPES.Q4_0: 1.01 / 8}[types[name]]
                assert (error.reshape(-1, 32) <= bound).all(), name
            else:
                bound = {TYPES.F32: 0, TYPES.F16: 2**-11, TYPES.BF16: 2**-8}[types[name]]
                assert (error <= bound * np.abs(expected) + (bound > 0) * 1e-7).all(), name
            if expected.ndim == 1:
                assert types[name] is TYPES.F32


def test_indivisible_rows_stay_in_f16_and_the_head_in_q8_0(tmp_path, tokenizer):
    plan = plan_gguf(make("llama"), tokenizer, "q4_0", name="tiny")  # intermediate_size is 48
    types = {tensor.name: tensor.type for tensor in plan.tensors}
    assert types["blk.0.ffn_down.weight"] is TYPES.F16
    assert types["blk.0.ffn_up.weight"] is types["token_embd.weight"] is TYPES.Q4_0
    assert types["output.weight"] is TYPES.Q8_0
    note = (
        "2 tensors stay in f16, as their row length is no multiple of 32: blk.0.ffn_down.weight, blk.1.ffn_down.weight"
    )
    assert plan.notes[0].startswith(note)
    tied = plan_gguf(make("qwen2"), tokenizer, "q4_0", name="tiny")
    assert {tensor.name: tensor.type for tensor in tied.tensors}["token_embd.weight"] is TYPES.Q8_0


def test_llama3_frequencies_equal_transformers(tmp_path, tokenizer):
    model = make("llama", head_dim=16, rope_parameters=LLAMA3_ROPE)
    factors = tensors_of(write(tmp_path, model, tokenizer))["rope_freqs.weight"]
    frequencies = ROPE["rope_theta"] ** (-np.arange(0, 16, 2) / 16) / factors
    np.testing.assert_allclose(frequencies, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    assert factors.max() == 8 and factors.min() == 1


# ---- Metadata ----


def test_metadata(tmp_path, tokenizer):
    model = make("gpt_neox", rope_parameters={**ROPE, "partial_rotary_factor": 0.5}, layer_norm_eps=1e-3)
    reader = write(tmp_path, model, tokenizer, "q8_0", chat_template="{{ messages }}")
    expected = {
        "general.architecture": "gptneox",
        "general.name": "tiny",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "gptneox.block_count": 2,
        "gptneox.context_length": 128,
        "gptneox.embedding_length": 32,
        "gptneox.feed_forward_length": 48,
        "gptneox.attention.head_count": 4,
        "gptneox.attention.layer_norm_epsilon": pytest.approx(1e-3),
        "gptneox.rope.dimension_count": 4,
        "gptneox.rope.freq_base": 20000.0,
        "gptneox.use_parallel_residual": True,
        "gptneox.vocab_size": 330,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {key: value(reader, key) for key in expected} == expected

    model = make("llama", num_key_value_heads=2, rope_parameters={**ROPE, "rope_type": "linear", "factor": 4.0})
    model.generation_config.eos_token_id = [0, 7]
    reader = write(tmp_path, model, tokenizer)
    expected = {
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.attention.key_length": 8,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.chat_template": None,
    }
    assert {key: value(reader, key) for key in expected} == expected


def test_a_sliding_window_limits_the_context(tmp_path, tokenizer):
    plan = plan_gguf(make("mistral", sliding_window=64), tokenizer, "f32", name="tiny")
    assert plan.notes == ["context_length is 64, the sliding window: llama.cpp's full attention equals it so far"]
    assert plan.writer.kv_data[0]["llama.context_length"].value == 64


# ---- Tokenizers ----


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_byte_level_tokenizers(tmp_path, kind):
    tokenizer = byte_level(kind)
    reader = write(tmp_path, make("llama"), tokenizer)
    assert value(reader, "tokenizer.ggml.pre") == kind
    tokens = value(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == 330  # one for each row of the embedding
    types = value(reader, "tokenizer.ggml.token_type")
    assert (tokens[0], types[0]) == ("<|endoftext|>", gguf.TokenType.CONTROL)
    assert types[len(tokenizer) - 1 :] == [gguf.TokenType.CONTROL] + [gguf.TokenType.UNUSED] * (330 - len(tokenizer))
    merges = [tuple(merge.split(" ")) for merge in value(reader, "tokenizer.ggml.merges")]
    again = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    again.pre_tokenizer = PRE_TOKENIZERS[kind]()
    for text in TEXTS:
        assert again.encode(text).ids == tokenizer(text)["input_ids"]


def test_sentencepiece_tokenizers_merge_as_in_llama_cpp(tmp_path):
    tokenizer = sentencepiece()
    reader = write(tmp_path, make("llama", vocab_size=420), tokenizer)
    assert value(reader, "tokenizer.ggml.model") == "llama"
    assert value(reader, "tokenizer.ggml.add_bos_token") and value(reader, "tokenizer.ggml.add_space_prefix")
    tokens, scores = (value(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "scores"))
    types = value(reader, "tokenizer.ggml.token_type")
    assert types[:4] == [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, gguf.TokenType.BYTE]
    ids = {token: index for index, token in enumerate(tokens)}
    for text in TEXTS:
        symbols = list("▁" + text.replace(" ", "▁"))
        while True:  # the first pair with the highest-scored piece
            pairs = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
            if not pairs:
                break
            i = -max(pairs)[1]
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        found = [ids[s] if s in ids else [ids[f"<0x{byte:02X}>"] for byte in s.encode()] for s in symbols]
        flat = [token for item in found for token in (item if isinstance(item, list) else [item])]
        assert [1, *flat] == tokenizer(text)["input_ids"]


# ---- Unsupported models ----


def other_split():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def missing_merge():
    tokenizer = sentencepiece()
    merges = [tuple(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    tokenizer.backend_tokenizer.model = models.BPE(tokenizer.get_vocab(), merges[:-1], byte_fallback=True)
    return tokenizer


def unigram():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], 0)), eos_token="a")


def ignoring_merges():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.model.ignore_merges = True
    return tokenizer


@pytest.mark.parametrize(
    ("model", "tokenizer", "outtype", "problem"),
    [
        (("llama", {}), other_split, "f32", "splits text by Whitespace, unknown to llama.cpp"),
        (("llama", {"vocab_size": 420}), missing_merge, "f32", "does not merge"),
        (("llama", {}), unigram, "f32", "its tokenizer is of type Unigram, not BPE"),
        (("llama", {}), ignoring_merges, "f32", "has ignore_merges=True; llama.cpp's gpt-2 has False"),
        (("llama", {"vocab_size": 60}), byte_level, "f32", "tokens, the model 60"),
        (("llama", {"hidden_size": 24, "num_attention_heads": 2}), byte_level, "q8_0", r"row length \(24, 48\) is"),
        (("llama", {"hidden_act": "gelu"}), byte_level, "f32", "its activation is gelu, not silu"),
        (("llama", {"rope_parameters": DYNAMIC_ROPE}), byte_level, "f32", "rotary embedding is scaled by 'dynamic'"),
        (("qwen3", {"attention_bias": True}), byte_level, "f32", "its attention has biases"),
        (("gpt2", {"scale_attn_by_inverse_layer_idx": True}), byte_level, "f32", "scaled by the layer"),
    ],
)  # fmt: skip
def test_unsupported_models_are_refused(model, tokenizer, outtype, problem):
    with pytest.raises(UserError, match=problem) as error:
        plan_gguf(make(model[0], **model[1]), tokenizer(), outtype, name="tiny")
    assert str(error.value).startswith(f"error[CONFIG] format=gguf dtype={outtype} cannot represent this model: ")


def test_values_above_float16_and_other_architectures_are_refused(tokenizer):
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e5
    with pytest.raises(
        UserError, match=r"lm_head.weight contains 1e\+05, above float16's maximum: set dtype=bf16 or f32"
    ):
        plan_gguf(model, tokenizer, "f16", name="tiny")
    plan_gguf(model, tokenizer, "bf16", name="tiny")
    model.config.model_type = "gptj"
    with pytest.raises(UserError, match="gptj is not one of llama, mistral, qwen2, qwen3, gpt_neox, gpt2"):
        plan_gguf(model, tokenizer, "f32", name="tiny")
