"""Meta's original LLaMA checkpoints (consolidated.*.pth, params.json, tokenizer.model) as a transformers model.

transformers 5 ships no converter for them. The files are read without running what a pickle could hold.
"""

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

from engine.saved_models import SavedModel
from utils import UserError, is_out_of_memory

LAYER_WEIGHTS = {  # Meta's name -> that of transformers, and the dimension that model parallelism splits
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


def load_meta(path: Path, *, tokenizer: str | None = None, context: int | None = None) -> SavedModel:
    """The model and tokenizer in a directory of Meta's.

    Args:
        tokenizer: a tokenizer in transformers' form, in place of tokenizer.model.
        context: the positions it was trained for, which Meta's files do not say; None: known from its other values.

    Raises:
        UserError: CHECKPOINT if the files are not whole or do not fit each other.
    """
    params, shards = _read_files(path)
    try:
        config = _config(params, shards, context)
        state = _join(shards, config)
    except UserError:
        raise
    except Exception as error:  # KeyError, RuntimeError, those of the config's own checks, ...
        if is_out_of_memory(error):
            raise
        problem = f"params.json and the weights do not fit ({type(error).__name__}: {error})"
        raise _damaged(path, problem) from error
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
        raise _damaged(path, "params.json and the weights do not fit") from error
    problems = [f"{len(info[kind])} {kind.replace('_', ' ')}" for kind in info if info[kind]]
    if problems:
        raise _damaged(path, ", ".join(problems))
    return SavedModel(model, loaded_tokenizer)


def _damaged(path: Path, problem: str) -> UserError:
    fix = "give the directory of Meta's download, with params.json and all of consolidated.*.pth"
    return UserError("CHECKPOINT", f"path: {path} is no LLaMA checkpoint of Meta's: {problem}", fix)


def _read_files(path: Path) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    files = sorted(path.glob("consolidated.*.pth"))
    if not files or not (path / "params.json").is_file():
        raise _damaged(path, f"there is no {'params.json' if files else 'consolidated.*.pth'}")
    names = [f"consolidated.{number:02}.pth" for number in range(len(files))]
    if [file.name for file in files] != names:
        raise _damaged(path, f"of {files[-1].name} and what is before it, some are missing")
    try:
        params = json.loads((path / "params.json").read_text())
        shards = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
    except Exception as error:  # a damaged file raises nearly anything
        raise _damaged(path, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    for file, shard in zip(files, shards, strict=True):
        if not isinstance(shard, dict) or shard.keys() != shards[0].keys():
            raise _damaged(path, f"{file.name} does not hold the weights that {files[0].name} does")
    return params, shards


def _config(params: dict[str, Any], shards: list[dict[str, Tensor]], context: int | None) -> LlamaConfig:
    """Sizes are those of the weights; params.json leaves some of them out."""
    dim, num_heads = params["dim"], params["n_heads"]
    scaled = params.get("use_scaled_rope", False)
    theta = params.get("rope_theta", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaled:  # the factor is not in the files of all releases: 32 in the small models of 3.2, 8 in 3.1
        rope |= {
            "rope_type": "llama3",
            "factor": float(params.get("rope_scaling_factor", 8 if dim > 3072 else 32)),
            "low_freq_factor": 1.0,
            "high_freq_factor": float(params.get("rope_high_freq_factor", 4)),
            "original_max_position_embeddings": 8192,
        }
    if context is None:
        # 3.1 and later; 3; Code Llama; 2 and 1, whose norm_eps tells them apart but for 1's largest.
        is_first = params["norm_eps"] != 1e-5 or (dim == 8192 and not params.get("n_kv_heads"))
        context = 131072 if scaled else {5e5: 8192, 1e6: 16384}.get(theta, 2048 if is_first else 4096)
        print(f"context: {context} positions, by its params.json; context=N sets another")
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
    parts = [shard["tok_embeddings.weight"] for shard in shards]
    return torch.cat(parts, dim=0 if parts[0].shape[1] == dim else 1)  # Llama 3 splits the vocabulary, 1 and 2 dim


def _join(shards: list[dict[str, Tensor]], config: LlamaConfig) -> dict[str, Tensor]:
    """The weights under transformers' names, put together from all shards."""
    head_dim = config.hidden_size // config.num_attention_heads
    state = {"model.embed_tokens.weight": _embedding(shards, config.hidden_size)}
    expected = {"tok_embeddings.weight"}

    def joined(name: str, dim: int | None) -> Tensor:
        expected.add(name)
        if name not in shards[0]:
            raise UserError("CHECKPOINT", f"path: {name} is not in the checkpoint", "give a whole checkpoint")
        parts = [shard[name] for shard in shards]
        return parts[0].clone() if dim is None else torch.cat(parts, dim)

    state["model.norm.weight"] = joined("norm.weight", None)
    head = joined("output.weight", 0)
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = head
    for layer in range(config.num_hidden_layers):
        for name, (new_name, dim) in LAYER_WEIGHTS.items():
            weight = joined(f"layers.{layer}.{name}.weight", dim)
            if name in ("attention.wk", "attention.wv"):
                # With more shards than key heads, each head is in several of them.
                copies = len(weight) // (config.num_key_value_heads * head_dim)
                if copies > 1:
                    size = len(weight) // len(shards)
                    weight = torch.cat([weight[i * size : (i + 1) * size] for i in range(0, len(shards), copies)])
            if name in ("attention.wq", "attention.wk"):
                # Meta rotates dimension 2i with 2i + 1, transformers i with i + half of a head.
                weight = weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)
            state[f"model.layers.{layer}.{new_name}.weight"] = weight
    unknown = {name for name in shards[0] if name not in expected and not name.endswith("rope.freqs")}
    if unknown:
        problem = f"path: {len(unknown)} weights are not LLaMA's, such as {min(unknown)}"
        raise UserError("CHECKPOINT", problem, "text models of LLaMA 1 to 3 are converted, no others")
    return state


# ---- The tokenizer ----


def _load_tokenizer(path: Path, name: str | None, config: LlamaConfig) -> PreTrainedTokenizerBase:
    if name is not None:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    file = next((file for file in (path / "tokenizer.model", path.parent / "tokenizer.model") if file.is_file()), None)
    if file is None:
        problem = f"path: there is no tokenizer.model in {path} or above it"
        raise UserError(
            "CHECKPOINT", problem, "put it there, or name a tokenizer in transformers' form: tokenizer=PATH"
        )
    data = file.read_bytes()
    try:
        if re.match(rb"[A-Za-z0-9+/=]+ \d+\n", data):
            return _from_tiktoken(data, LLAMA31_SPECIAL if "factor" in config.rope_parameters else LLAMA3_SPECIAL)
        return _from_sentencepiece(data)
    except Exception as error:  # protobuf and base64 have errors of their own
        problem = f"path: {file} cannot be read ({type(error).__name__}: {error})"
        raise UserError("CHECKPOINT", problem, "give Meta's tokenizer.model, or another as tokenizer=PATH") from error


def _from_sentencepiece(data: bytes) -> PreTrainedTokenizerBase:
    from transformers.utils import sentencepiece_model_pb2_new as protobuf

    pieces = protobuf.ModelProto.FromString(data).pieces
    vocabulary = {piece.piece: index for index, piece in enumerate(pieces)}
    ranks = {piece.piece: -piece.score for piece in pieces if piece.type == piece.NORMAL}
    return LlamaTokenizer(vocab=vocabulary, merges=merges_of(ranks, vocabulary), add_bos_token=True)


def _from_tiktoken(data: bytes, special: tuple[str, ...]) -> PreTrainedTokenizerBase:
    ranks: dict[str, float] = {}
    characters = byte_characters()
    for line in data.splitlines():
        token, rank = line.split()
        ranks["".join(characters[byte] for byte in base64.b64decode(token))] = int(rank)
    vocabulary = {token: int(rank) for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges_of(ranks, vocabulary), ignore_merges=True))
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


def merges_of(ranks: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes another one, in the order of what they make."""
    merges = []
    for token, rank in ranks.items():
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in vocabulary and right in vocabulary:
                merges.append((rank, vocabulary[token], vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def byte_characters() -> list[str]:
    """A printable character for each byte, as GPT-2 has it: itself where it is printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
