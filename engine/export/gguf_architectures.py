"""Architectures of llama.cpp: names, metadata, layout of weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from engine.export.gguf_errors import require


@dataclass(frozen=True)
class Architecture:
    """A transformers architecture in llama.cpp's terms.

    Args:
        name: in llama.cpp.
        write: adds the metadata of a config; raises UnsupportedModel.
        convert: (name, weight, config) in transformers -> the weight in llama.cpp's layout.
        needs_output: the head is written even where it is tied to the embedding.
    """

    name: gguf.MODEL_ARCH
    write: Callable[[gguf.GGUFWriter, Any], None]
    convert: Callable[[str, Tensor, Any], Tensor] = lambda name, weight, config: weight
    needs_output: bool = False


# ---- Llama, Mistral, Qwen2, Qwen3 ----


def _write_llama_like(writer: gguf.GGUFWriter, config: Any) -> None:
    num_heads = config.num_attention_heads
    head_dim = _head_dim(config)
    require(config.hidden_act == "silu", f"its activation is {config.hidden_act}, not silu")
    if config.model_type == "qwen2":
        require(head_dim * num_heads == config.hidden_size, "its heads do not add up to hidden_size")
    if config.model_type == "qwen3":
        require(not config.attention_bias, "its attention has biases")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    _write_rope(writer, config)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def context_length(config: Any) -> int:
    """The context in tokens: llama.cpp has full attention only, so a sliding window limits it."""
    window = getattr(config, "sliding_window", None)
    is_sliding = getattr(config, "use_sliding_window", True) and window is not None
    return min(config.max_position_embeddings, window) if is_sliding else config.max_position_embeddings


def _write_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        known = {"rope_theta", "rope_type", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
        others = sorted(key for key, value in rope.items() if key not in known and value is not None)
        require(not others, f"its rope_parameters set {', '.join(others)}")
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
    elif kind == "llama3":  # its scaling is a tensor: rope_tensors()
        require(config.model_type in ("llama", "mistral"), "its rotary embedding is scaled like Llama 3's")
    else:
        require(kind == "default", f"its rotary embedding is scaled by '{kind}'")


def rope_tensors(config: Any) -> dict[str, np.ndarray]:
    """Llama 3's divisors of the rotary frequencies: transformers computes them, llama.cpp reads them.

    Returns:
        name in llama.cpp -> float32 [head_dim / 2]; empty without Llama 3's scaling.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return {}
    head_dim = _head_dim(config)
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wavelengths  # in the context of pretraining
    smooth = np.clip((turns - low) / (high - low), 0, 1)  # 0: divided by factor, 1: unchanged
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


def _convert_llama(name: str, weight: Tensor, config: Any) -> Tensor:
    """Reorder the rows of queries and keys: transformers rotates (i, i + half a head), llama.cpp (2i, 2i + 1)."""
    num_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if num_heads is None:
        return weight
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


# ---- GPT-NeoX ----


def _write_gpt_neox(writer: gguf.GGUFWriter, config: Any) -> None:
    require(config.hidden_act.startswith("gelu"), f"its activation is {config.hidden_act}, not gelu")
    require(config.attention_bias, "its attention has no biases")
    head_dim = config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    require(rope.get("rope_type", "default") == "default", f"its rotary embedding is scaled by '{rope['rope_type']}'")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_head_count(config.num_attention_heads)
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_layer_norm_eps(config.layer_norm_eps)


def _convert_gpt_neox(name: str, weight: Tensor, config: Any) -> Tensor:
    """[heads, 3, head_dim, ...] to [3, heads, head_dim, ...]."""
    if ".query_key_value." not in name:
        return weight
    return weight.unflatten(0, (config.num_attention_heads, 3, -1)).transpose(0, 1).reshape(weight.shape)


# ---- GPT-2 ----


def _write_gpt2(writer: gguf.GGUFWriter, config: Any) -> None:
    require(config.activation_function.startswith("gelu"), f"its activation is {config.activation_function}, not gelu")
    require(config.scale_attn_weights, "its attention scores are not scaled")
    require(not config.scale_attn_by_inverse_layer_idx, "its attention scores are scaled by the layer")
    require(not config.add_cross_attention, "it has cross-attention")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _convert_gpt2(name: str, weight: Tensor, config: Any) -> Tensor:
    """Transpose the weights of Conv1D layers, [in, out] in transformers."""
    is_transposed = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
    return weight.T if is_transposed else weight


ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, _write_llama_like, _convert_llama),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, _write_llama_like, _convert_llama),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, _write_llama_like),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, _write_llama_like),
    "gpt_neox": Architecture(gguf.MODEL_ARCH.GPTNEOX, _write_gpt_neox, _convert_gpt_neox, needs_output=True),
    "gpt2": Architecture(gguf.MODEL_ARCH.GPT2, _write_gpt2, _convert_gpt2),
}
