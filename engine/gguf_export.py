"""Writes a model as one GGUF file for llama.cpp: weights, tokenizer and chat template, or refuses before it writes.

What llama.cpp expects where it differs from transformers: the rows of Llama's query and key weights in pairs for
rotation, GPT-NeoX's fused projection as all queries, keys and values, GPT-2's weights transposed.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import TokenType
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.saved_models import largest
from engine.tokenization import token_prefix
from utils import UserError

OUTTYPES = {
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
BLOCK = 32  # weights of a row that share a scale in q8_0 and q4_0
MAX_FLOAT16 = 65504.0


class Problem(ValueError):
    """Why llama.cpp cannot represent a model."""


# ---- Architectures ----


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp names an architecture, what it needs to know of its config, and how it wants its weights.

    Args:
        write: adds the metadata; raises Problem for what cannot be represented.
        convert: from a weight's name and value in transformers to its value in llama.cpp.
        needs_output: whether the head is written even where it is the embedding.
    """

    name: gguf.MODEL_ARCH
    write: Callable[[gguf.GGUFWriter, Any], None]
    convert: Callable[[str, Tensor, Any], Tensor] = lambda name, weight, config: weight
    needs_output: bool = False


def require(condition: bool, problem: str) -> None:
    if not condition:
        raise Problem(problem)


def _write_llama_like(writer: gguf.GGUFWriter, config: Any) -> None:
    """What Llama, Mistral, Qwen2 and Qwen3 share."""
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    require(config.hidden_act == "silu", f"its activation is {config.hidden_act}, not silu")
    if config.model_type == "qwen2":
        require(head_dim * num_heads == config.hidden_size, "its heads are not hidden_size together")
    if config.model_type == "qwen3":
        require(not config.attention_bias, "its attention has biases")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(_context_length(config))
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


def _context_length(config: Any) -> int:
    """The positions that llama.cpp may use: it attends to all of them, so no more than a sliding window."""
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
    elif kind == "llama3":  # its factors are a tensor: extra_tensors
        require(config.model_type in ("llama", "mistral"), "its rotary embedding is scaled like Llama 3's")
    else:
        require(kind == "default", f"its rotary embedding is scaled by '{kind}'")


def _extra_tensors(config: Any) -> dict[str, np.ndarray]:
    """Tensors that llama.cpp has and transformers computes: what each rotary frequency is divided by, in Llama 3."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    lengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / lengths  # in the context of pretraining
    smooth = np.clip((turns - low) / (high - low), 0, 1)  # 0: divided by factor, 1: kept
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


def _convert_llama(name: str, weight: Tensor, config: Any) -> Tensor:
    """transformers rotates dimension i with i + half of a head, llama.cpp 2i with 2i + 1."""
    num_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if num_heads is None:
        return weight
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


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


# ---- Tokenizers ----

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PreTokenizer(NamedTuple):
    """A way to split text before merging that llama.cpp knows, and whether whole words are then looked up first."""

    name: str
    ignore_merges: bool = False


# By what comes before the bytes in the pre-tokenizer of tokenizer.json, regular expressions as they stand there.
PRE_TOKENIZERS = {
    ("gpt-2 regex",): PreTokenizer("gpt-2"),
    ("digits", "gpt-2 regex"): PreTokenizer("smollm"),
    (CONTRACTIONS + WORDS + r"|\p{N}" + AFTER_DIGITS,): PreTokenizer("qwen2"),
    (CONTRACTIONS + WORDS + r"|\p{N}{1,3}" + AFTER_DIGITS,): PreTokenizer("llama-bpe", ignore_merges=True),
    (TEKKEN,): PreTokenizer("tekken", ignore_merges=True),
}


@dataclass
class Vocabulary:
    """A tokenizer as llama.cpp knows it."""

    model: str  # "gpt2": byte-level BPE with merges; "llama": SentencePiece BPE with scores
    pre: str
    merges: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)  # of tokens that merges make
    add_space_prefix: bool | None = None
    notes: list[str] = field(default_factory=list)


def read_vocabulary(state: dict[str, Any]) -> Vocabulary:
    """What tokenizer.json says, in llama.cpp's terms.

    Raises:
        Problem: if llama.cpp would split texts otherwise.
    """
    model = state["model"]
    require(model["type"] == "BPE", f"its tokenizer is of the kind {model['type']}, not BPE")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        require(not model.get(name), f"its tokenizer has a {name}")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        return _read_sentencepiece(state, merges)
    return _read_byte_level(state, merges)


def _parts(node: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, be they one, a sequence, or none."""
    if node is None:
        return []
    return [part for inner in node[name] for part in _parts(inner, name)] if node["type"] == "Sequence" else [node]


def _read_byte_level(state: dict[str, Any], merges: list[tuple[str, ...]]) -> Vocabulary:
    notes = []
    normalizers = [part["type"] for part in _parts(state["normalizer"], "normalizers")]
    require(set(normalizers) <= {"NFC"}, f"its tokenizer normalizes text by {', '.join(normalizers)}")
    if normalizers:
        notes.append("llama.cpp does not normalize text to NFC as the tokenizer does: give it composed characters")
    *splits, last = _parts(state["pre_tokenizer"], "pretokenizers") or [{"type": "none"}]
    require(last["type"] == "ByteLevel", "its tokenizer does not work on bytes")
    require(not last["add_prefix_space"], "its tokenizer adds a space in front")
    steps: list[str] = []
    for part in splits:
        if part["type"] == "Digits" and part["individual_digits"]:
            steps.append("digits")
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            steps.append(next(iter(part["pattern"].values())))
        else:
            raise Problem(f"its tokenizer splits text by {part['type']}, which is no way that llama.cpp knows")
    if last["use_regex"]:
        steps.append("gpt-2 regex")
    known = PRE_TOKENIZERS.get(tuple(steps))
    if known is None:
        raise Problem(f"its tokenizer splits text by {', '.join(map(repr, steps))}, which llama.cpp does not know")
    ignores = bool(state["model"].get("ignore_merges"))
    require(known.ignore_merges == ignores, f"its tokenizer has ignore_merges={ignores}, against all that split alike")
    return Vocabulary("gpt2", known.name, merges=[" ".join(merge) for merge in merges], notes=notes)


def _read_sentencepiece(state: dict[str, Any], merges: list[tuple[str, ...]]) -> Vocabulary:
    """A SentencePiece BPE as tokenizer.json holds it: merges in the order of the pieces' scores."""
    normalizers = _parts(state["normalizer"], "normalizers")
    pre_tokenizers = _parts(state["pre_tokenizer"], "pretokenizers")
    kinds = [part["type"] for part in normalizers + pre_tokenizers]
    if kinds in (["Prepend", "Replace"], ["Replace"]) and not pre_tokenizers:
        replaces = normalizers[-1]["pattern"] == {"String": " "} and normalizers[-1]["content"] == "▁"
        require(replaces and normalizers[0].get("prepend", "▁") == "▁", "its tokenizer is not SentencePiece's")
        has_prefix = len(normalizers) == 2
        notes = []
    else:
        require(
            kinds == ["Metaspace"] and pre_tokenizers[0]["replacement"] == "▁", "its tokenizer is not SentencePiece's"
        )
        has_prefix = pre_tokenizers[0]["prepend_scheme"] != "never"
        splits = pre_tokenizers[0].get("split", True)
        crosses = next((token for token in state["model"]["vocab"] if "▁" in token[1:].lstrip("▁")), None)
        require(not splits or crosses is None, f"its tokenizer splits at spaces, but has the token {crosses!r}")
        notes = ["llama.cpp adds a space in front of texts that begin with one, too"] if has_prefix else []
    vocabulary = state["model"]["vocab"]
    require(all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)), "its tokenizer lacks tokens for bytes")
    # llama.cpp merges whatever makes the piece of the highest score, so the order of merges must be one of pieces.
    scores: dict[str, float] = {}
    previous = None
    for left, right in merges:
        piece = left + right
        require(piece == previous or piece not in scores, f"the merges of its tokenizer that make {piece!r} are apart")
        scores.setdefault(piece, -float(len(scores)))
        previous = piece
    known = set(merges)
    added = {token["content"] for token in state["added_tokens"]}
    for piece in vocabulary:
        if piece not in added and not piece.startswith("<0x"):
            for i in range(1, len(piece)):
                left, right = piece[:i], piece[i:]
                if left in vocabulary and right in vocabulary and (left, right) not in known:
                    raise Problem(f"its tokenizer does not merge {left!r} and {right!r}, as SentencePiece's would")
    return Vocabulary("llama", "default", scores=scores, add_space_prefix=has_prefix, notes=notes)


def _write_tokenizer(
    writer: gguf.GGUFWriter, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template: Any
) -> list[str]:
    """Add the tokenizer; returns what a user should know of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Problem("its tokenizer is written in Python, without a tokenizer.json")
    vocabulary = read_vocabulary(json.loads(backend.to_str()))
    num_rows = model.get_input_embeddings().weight.shape[0]
    tokens_by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    require(max(tokens_by_id) < num_rows, f"its tokenizer has {max(tokens_by_id) + 1} tokens, the model {num_rows}")
    added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
    tokens, types, scores = [], [], []
    lowest = -float(len(vocabulary.scores)) - 1
    for index in range(num_rows):
        token = tokens_by_id.get(index)
        if token is None:
            token, kind = f"[PAD{index}]", TokenType.UNUSED
        elif vocabulary.model == "llama" and index == tokenizer.unk_token_id:
            kind = TokenType.UNKNOWN
        elif index in special or (index in added and added[index].special):
            kind = TokenType.CONTROL
        elif index in added:
            kind = TokenType.USER_DEFINED
        elif vocabulary.model == "llama" and token.startswith("<0x") and len(token) == 6:
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(token)
        types.append(kind)
        scores.append(vocabulary.scores.get(token, lowest))
    require(len(set(tokens)) == len(tokens), "two of its tokens have the same text")

    prefix = token_prefix(tokenizer)
    require(prefix in ([], [tokenizer.bos_token_id]), f"its tokenizer puts {prefix} in front of texts, not BOS alone")
    eos = tokenizer.eos_token_id
    if eos is None:
        raise Problem("its tokenizer has no end-of-text token")
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if vocabulary.model == "llama":
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(bool(vocabulary.add_space_prefix))
    else:
        writer.add_token_merges(vocabulary.merges)
    # Where there is no BOS, llama.cpp would take the token that has this role in GPT-2's or Llama's vocabulary.
    writer.add_bos_token_id(eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    ends = getattr(model.generation_config, "eos_token_id", None)
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if end not in (None, eos)]
    if others:
        writer.add_eot_token_id(others[0])
    writer.add_add_bos_token(bool(prefix))
    writer.add_add_eos_token(False)
    if isinstance(chat_template, dict):
        chat_template = [{"name": name, "template": template} for name, template in chat_template.items()]
    if chat_template:
        writer.add_chat_template(chat_template)
    return vocabulary.notes


# ---- Tensors ----


@dataclass
class PlannedTensor:
    name: str  # in llama.cpp
    type: Type
    array: Callable[[], np.ndarray]  # float32, as llama.cpp wants it
    shape: tuple[int, ...]


def _plan_tensors(model: PreTrainedModel, architecture: Architecture, outtype: str) -> list[PlannedTensor]:
    config = model.config
    names = gguf.get_tensor_name_map(architecture.name, config.num_hidden_layers)
    wanted = OUTTYPES[outtype][0]
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    is_tied = embedding.data_ptr() == head.data_ptr()
    plan = []
    for source, weight in model.state_dict().items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise Problem(f"llama.cpp knows no tensor for {source}")
        if name == "output.weight" and is_tied and not architecture.needs_output:
            continue
        converted = architecture.convert(source, weight, config)  # views and small copies, so made again when written
        _check_values(source, weight, wanted)
        plan.append(
            PlannedTensor(
                name,
                _tensor_type(name, tuple(converted.shape), wanted, is_tied and not architecture.needs_output),
                lambda source=source, weight=weight: (  # type: ignore[misc]
                    architecture.convert(source, weight, config).float().contiguous().cpu().numpy()
                ),
                tuple(converted.shape),
            )
        )
    for name, array in _extra_tensors(config).items():
        plan.append(PlannedTensor(name, Type.F32, lambda array=array: array, array.shape))  # type: ignore[misc]
    if wanted in (Type.Q8_0, Type.Q4_0) and not any(tensor.type is wanted for tensor in plan):
        lengths = sorted({tensor.shape[-1] for tensor in plan if len(tensor.shape) > 1})
        raise Problem(f"no weight has rows (of {', '.join(map(str, lengths))}) that divide into blocks of {BLOCK}")
    return plan


def _tensor_type(name: str, shape: tuple[int, ...], wanted: Type, is_tied: bool) -> Type:
    """What a tensor is stored as: as llama.cpp's converter and quantizer have it, but for Q6_K, which is Q8_0 here."""
    if len(shape) == 1 or "_norm." in name or name == "position_embd.weight":
        return Type.F32
    if wanted in (Type.Q8_0, Type.Q4_0) and shape[-1] % BLOCK:
        return Type.F16
    if wanted is Type.Q4_0 and (name == "output.weight" or (is_tied and name == "token_embd.weight")):
        return Type.Q8_0
    return wanted


def _check_values(name: str, weight: Tensor, wanted: Type) -> None:
    value = largest(weight)
    if not math.isfinite(value):
        raise UserError("NONFINITE", f"format=gguf: {name} holds a number that is not finite", "another checkpoint")
    if wanted not in (Type.F32, Type.BF16) and value > MAX_FLOAT16:
        raise Problem(f"{name} holds {value:.3g}, more than float16 can: dtype=bf16 or f32 would do")


# ---- The file ----


@dataclass
class Plan:
    """A GGUF file that can be written."""

    writer: gguf.GGUFWriter
    tensors: list[PlannedTensor]
    notes: list[str]

    def write(self, path: Path) -> None:
        """Write the file, a tensor at a time."""
        try:
            self.writer.write_header_to_file(path)
            self.writer.write_kv_data_to_file()
            self.writer.write_ti_data_to_file()
            for tensor in self.tensors:
                self.writer.write_tensor_data(gguf.quants.quantize(tensor.array(), tensor.type))
        finally:
            self.writer.close()


def plan_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, outtype: str, *, name: str, chat_template: Any = None
) -> Plan:
    """Decide everything about a GGUF file before any of it is written.

    Args:
        outtype: a key of OUTTYPES; vectors stay in f32, and rows that do not divide into blocks in f16.
        name: of the model.
        chat_template: in Jinja, or several by name; None for none.

    Raises:
        UserError: CONFIG if llama.cpp cannot represent the model.
    """
    try:
        architecture = ARCHITECTURES.get(model.config.model_type)
        if architecture is None:
            raise Problem(f"{model.config.model_type} is not one of {', '.join(ARCHITECTURES)}")
        writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture.name])
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        architecture.write(writer, model.config)
        writer.add_file_type(OUTTYPES[outtype][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        notes = _write_tokenizer(writer, model, tokenizer, chat_template)
        tensors = _plan_tensors(model, architecture, outtype)
    except Problem as problem:
        raise UserError(
            "CONFIG", f"format=gguf dtype={outtype} cannot represent this model: {problem}", "use format=hf"
        ) from problem
    notes += _notes(model, tensors, outtype)
    for tensor in tensors:
        num_bytes = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=tensor.type)
    return Plan(writer, tensors, notes)


def _notes(model: PreTrainedModel, tensors: list[PlannedTensor], outtype: str) -> Iterator[str]:
    config, wanted = model.config, OUTTYPES[outtype][0]
    if hasattr(config, "rope_parameters") and config.model_type != "gpt_neox":
        context = _context_length(config)
        if context < config.max_position_embeddings:
            yield f"context_length is {context}, the sliding window: within it llama.cpp's full attention is the same"
    kept = [tensor.name for tensor in tensors if len(tensor.shape) > 1 and tensor.type is Type.F16 is not wanted]
    if kept:
        names = ", ".join(kept[:3]) + (", ..." if len(kept) > 3 else "")
        yield f"{len(kept)} tensors stay in f16, as their rows do not divide into blocks of {BLOCK}: {names}"
