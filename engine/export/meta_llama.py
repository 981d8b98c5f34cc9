"""Load LLaMA 1 to 3 from Meta's own files."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as FastTokenizer

from engine.export.saved_models import SavedModel
from utils import UserError, is_out_of_memory

# Meta's name -> (transformers' name, the dimension split by model parallelism)
LAYER_WEIGHTS: dict[str, tuple[str, int | None]] = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = (
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "reserved_special_token_2",
    "reserved_special_token_3", "start_header_id", "end_header_id", "reserved_special_token_4", "eot_id",
)  # fmt: skip
LLAMA31_SPECIAL = (
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id",
    "reserved_special_token_2", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
)  # fmt: skip
NUM_LLAMA3_SPECIAL = 256
MISMATCH = "params.json does not match the weights"


def load_meta(path: Path, *, tokenizer: str | None = None, context: int | None = None) -> SavedModel:
    """Load the model and tokenizer of a directory.

    Args:
        path: has params.json, consolidated.*.pth, and tokenizer.model (or its parent has that).
        tokenizer: a tokenizer in transformers' form, instead of tokenizer.model.
        context: maximum number of positions. Meta's files do not contain it; None infers it from the other values.

    Raises:
        UserError: CHECKPOINT if files are missing, damaged, or inconsistent.
    """
    params, shards = _read_files(path)
    try:
        config = _model_config(params, shards, context)
        state = _join_shards(shards, config)
    except UserError:
        raise
    except Exception as error:  # KeyError, RuntimeError, errors of LlamaConfig, ...
        if is_out_of_memory(error):
            raise
        raise _checkpoint_error(path, f"{MISMATCH} ({type(error).__name__}: {error})") from error
    loaded_tokenizer = _load_tokenizer(path, tokenizer, config)
    if loaded_tokenizer.bos_token_id is not None:
        config.bos_token_id = loaded_tokenizer.bos_token_id
    config.eos_token_id = loaded_tokenizer.eos_token_id
    dtype = state["model.embed_tokens.weight"].dtype
    try:
        model, info = LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:  # sizes differ
        if is_out_of_memory(error):
            raise
        raise _checkpoint_error(path, MISMATCH) from error
    problems = [f"{len(info[kind])} {kind.replace('_', ' ')}" for kind in info if info[kind]]
    if problems:
        raise _checkpoint_error(path, ", ".join(problems))
    return SavedModel(model, loaded_tokenizer)


def _checkpoint_error(path: Path, problem: str) -> UserError:
    fix = "give the directory of Meta's download, with params.json and all of consolidated.*.pth"
    return UserError("CHECKPOINT", f"path: {path} is not a complete LLaMA checkpoint of Meta's: {problem}", fix)


def _read_files(path: Path) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    files = sorted(path.glob("consolidated.*.pth"))
    if not files or not (path / "params.json").is_file():
        raise _checkpoint_error(path, f"{'params.json' if files else 'consolidated.*.pth'} is missing")
    names = [f"consolidated.{number:02}.pth" for number in range(len(files))]
    if [file.name for file in files] != names:
        raise _checkpoint_error(path, f"some files from {names[0]} to {files[-1].name} are missing")
    try:
        params = json.loads((path / "params.json").read_text())
        shards = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
    except Exception as error:  # nearly any type, for damaged files
        raise _checkpoint_error(
            path, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    for file, shard in zip(files, shards, strict=True):
        if not isinstance(shard, dict) or shard.keys() != shards[0].keys():
            raise _checkpoint_error(path, f"{file.name} has other weights than {files[0].name}")
    return params, shards


def _model_config(params: dict[str, Any], shards: list[dict[str, Tensor]], context: int | None) -> LlamaConfig:
    """The config of transformers.

    Sizes come from the weights where params.json omits them.
    """
    dim, num_heads = params["dim"], params["n_heads"]
    scaled = params.get("use_scaled_rope", False)
    theta = params.get("rope_theta", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaled:  # some releases omit the factor: it is 32 in the small models of 3.2, 8 in 3.1
        rope |= {
            "rope_type": "llama3",
            "factor": float(params.get("rope_scaling_factor", 8 if dim > 3072 else 32)),
            "low_freq_factor": 1.0,
            "high_freq_factor": float(params.get("rope_high_freq_factor", 4)),
            "original_max_position_embeddings": 8192,
        }
    if context is None:
        # In order: 3.1 and later; 3; Code Llama; 1; 2. norm_eps separates 1 from 2, except for the largest model of 1.
        is_first = params["norm_eps"] != 1e-5 or (dim == 8192 and not params.get("n_kv_heads"))
        context = 131072 if scaled else {5e5: 8192, 1e6: 16384}.get(theta, 2048 if is_first else 4096)
        print(f"context: {context} positions, inferred from params.json; context=N overrides")
    first = shards[0]
    tied = (
        len(shards) == 1
        and "output.weight" in first
        and torch.equal(first["output.weight"], first["tok_embeddings.weight"])
    )
    return LlamaConfig(
        vocab_size=_embedding(shards, dim).shape[0],
        hidden_size=dim,
        intermediate_size=first["layers.0.feed_forward.w1.weight"].shape[0] * len(shards),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=num_heads,
        num_key_value_heads=params.get("n_kv_heads") or num_heads,
        max_position_embeddings=context,
        rms_norm_eps=params["norm_eps"],
        rope_parameters=rope,
        tie_word_embeddings=tied,
        pad_token_id=None,
    )


def _embedding(shards: list[dict[str, Tensor]], dim: int) -> Tensor:
    """[vocabulary, dim]."""
    parts = [shard["tok_embeddings.weight"] for shard in shards]
    return torch.cat(parts, dim=0 if parts[0].shape[1] == dim else 1)  # 3 splits the vocabulary, 1 and 2 split dim


def _join_shards(shards: list[dict[str, Tensor]], config: LlamaConfig) -> dict[str, Tensor]:
    """Concatenate the weights of all shards, under transformers' names."""
    head_dim = config.hidden_size // config.num_attention_heads
    state = {"model.embed_tokens.weight": _embedding(shards, config.hidden_size)}
    expected = {"tok_embeddings.weight"}

    def join(name: str, dim: int | None) -> Tensor:
        expected.add(name)
        if name not in shards[0]:
            raise UserError("CHECKPOINT", f"path: {name} is not in the checkpoint", "give a complete checkpoint")
        parts = [shard[name] for shard in shards]
        return parts[0].clone() if dim is None else torch.cat(parts, dim)

    state["model.norm.weight"] = join("norm.weight", None)
    head = join("output.weight", 0)
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = head
    for layer in range(config.num_hidden_layers):
        for name, (new_name, dim) in LAYER_WEIGHTS.items():
            weight = join(f"layers.{layer}.{name}.weight", dim)
            if name in ("attention.wk", "attention.wv"):
                # With more shards than key heads, several shards have the same head.
                copies = len(weight) // (config.num_key_value_heads * head_dim)
                if copies > 1:
                    size = len(weight) // len(shards)
                    weight = torch.cat([weight[i * size : (i + 1) * size] for i in range(0, len(shards), copies)])
            if name in ("attention.wq", "attention.wk"):
                # Meta rotates dimensions (2i, 2i + 1), transformers (i, i + half a head).
                weight = weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)
            state[f"model.layers.{layer}.{new_name}.weight"] = weight
    unknown = {name for name in shards[0] if name not in expected and not name.endswith("rope.freqs")}
    if unknown:
        problem = f"path: {len(unknown)} weights are unknown in LLaMA, such as {min(unknown)}"
        raise UserError("CHECKPOINT", problem, "give a text model of LLaMA 1 to 3; no other is supported")
    return state


# ---- The tokenizer ----


def _load_tokenizer(path: Path, name: str | None, config: LlamaConfig) -> PreTrainedTokenizerBase:
    if name is not None:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    file = next((file for file in (path / "tokenizer.model", path.parent / "tokenizer.model") if file.is_file()), None)
    if file is None:
        problem = f"path: tokenizer.model is missing in {path} and its parent"
        raise UserError(
            "CHECKPOINT", problem, "put it there, or give a tokenizer in transformers' form: tokenizer=PATH"
        )
    data = file.read_bytes()
    try:
        if re.match(rb"[A-Za-z0-9+/=]+ \d+\n", data):
            return _from_tiktoken(data, LLAMA31_SPECIAL if "factor" in config.rope_parameters else LLAMA3_SPECIAL)
        return _from_sentencepiece(data)
    except Exception as error:  # of protobuf, base64, ...
        problem = f"path: {file} cannot be read ({type(error).__name__}: {error})"
        raise UserError(
            "CHECKPOINT", problem, "give Meta's tokenizer.model, or another tokenizer: tokenizer=PATH"
        ) from error


def _from_sentencepiece(data: bytes) -> PreTrainedTokenizerBase:
    from transformers.utils import sentencepiece_model_pb2_new as protobuf

    pieces = protobuf.ModelProto.FromString(data).pieces
    vocabulary = {piece.piece: index for index, piece in enumerate(pieces)}
    ranks = {piece.piece: -piece.score for piece in pieces if piece.type == piece.NORMAL}
    return LlamaTokenizer(vocab=vocabulary, merges=find_merges(ranks, vocabulary), add_bos_token=True)


def _from_tiktoken(data: bytes, special: tuple[str, ...]) -> PreTrainedTokenizerBase:
    ranks: dict[str, float] = {}
    characters = byte_characters()
    for line in data.splitlines():
        token, rank = line.split()
        ranks["".join(characters[byte] for byte in base64.b64decode(token))] = int(rank)
    vocabulary = {token: int(rank) for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=find_merges(ranks, vocabulary), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    numbered = [name for name in special if name.startswith("reserved")]
    reserved = (f"reserved_special_token_{number}" for number in range(len(numbered), NUM_LLAMA3_SPECIAL))
    names = [*special, *(next(reserved) for _ in range(NUM_LLAMA3_SPECIAL - len(special)))]
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False, special=True) for name in names])
    begin = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return FastTokenizer(tokenizer_object=tokenizer, bos_token=begin, eos_token="<|end_of_text|>")


def find_merges(ranks: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens with a token as their concatenation, ordered by its rank."""
    merges = []
    for token, rank in ranks.items():
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in vocabulary and right in vocabulary:
                merges.append((rank, vocabulary[token], vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def byte_characters() -> list[str]:
    """GPT-2's printable character of each byte: itself if printable, else the next one from 256 upwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
