"""Tokenizers and models: built from the hub, a directory, or a config with random weights; checked before use."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import engine.attention  # noqa: F401  registers packed attention
from engine.batching import lay_out
from engine.checkpoint import find_checkpoint, is_checkpoint
from engine.logprobs import response_logps
from engine.precision import model_in
from engine.tokenization import Example
from utils import UserError, clipped, is_out_of_memory

EMBEDDED_TOKENIZER = "films"
# Masks and frequencies, which older versions of transformers saved with the weights.
BUFFERS = ("attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
# Values of a transformers config, by the ends of their names, that leave log-probs as they are. Dropout is turned off.
HARMLESS = re.compile(
    r"^_|(^|_)(architectures|transformers_version|dtype|use_cache|return_dict|output_attentions|output_hidden_states"
    r"|name_or_path|id2label|label2id|problem_type|token_id|token_index|initializer_range|auto_map|tokenizer_class"
    r"|quantization_config|pretraining_tp|dropout|pdrop)$"
)


def load_tokenizer(config: DictConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of config.model, with a padding token; UserError if there is none to be had or it has no EOS."""
    key = "model.name_or_path" if config.model.tokenizer_name_or_path is None else "model.tokenizer_name_or_path"
    name = OmegaConf.select(config, key)
    if name == EMBEDDED_TOKENIZER:
        from engine.films import film_tokenizer

        tokenizer: PreTrainedTokenizerBase = film_tokenizer()
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.model.trust_remote_code)
        except Exception as error:  # damaged or unfitting files raise nearly anything
            raise _cannot_load("tokenizer", key, name, error) from error
    if tokenizer.eos_token_id is None:  # a tokenizer.json alone does not say which token it is
        vocabulary = tokenizer.get_vocab()
        known = next((token for token in END_OF_TEXT if token in vocabulary), None)
        if known is None:
            raise UserError(
                "CONFIG",
                f"model.tokenizer_name_or_path: the tokenizer {name} has no end-of-text token",
                "name it as eos_token in the tokenizer_config.json beside its tokenizer.json",
            )
        print(f"tokenizer: {name} names no end-of-text token, {known} is taken")
        tokenizer.add_special_tokens({"eos_token": known})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _cannot_load(kind: str, key: str, name: str, error: Exception) -> UserError:
    if is_out_of_memory(error):
        return UserError(
            "MEMORY", f"out of memory while the {kind} {name} is loaded", "a smaller model, or more memory"
        )
    if "trust_remote_code" in str(error):
        problem = f"{key}: {name} brings Python code of its own, which is not run"
        return UserError("CONFIG", problem, "model.trust_remote_code=true, if you have read that code")
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        "CONFIG",
        f"{key}: no {kind} can be loaded from '{name}' ({reason})",
        "give a local directory, or a name on the hub that this machine can reach or has in its cache",
    )


def load_model(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The causal language model of config.model, with the weights of model.archive if that is given.

    Args:
        dtype: of its weights, whatever the dtype they are stored in.
        device: where it is put; on "cuda" with several GPUs the layers of a model read from files are split among them.

    Raises:
        UserError: CONFIG if there is no such model, CHECKPOINT if the archive does not fit it.
    """
    settings = config.model
    hf_config = hf_config_of(settings, tokenizer)
    context = getattr(hf_config, "max_position_embeddings", None)
    if context is not None and config.max_length > context:
        raise UserError(
            "CONFIG", f"max_length: {config.max_length} is more than the {context} positions of the model", "lower it"
        )
    _turn_off_dropout(hf_config)
    kwargs: dict[str, Any] = {"config": hf_config, "dtype": dtype, "trust_remote_code": settings.trust_remote_code}
    if device.type == "cuda":
        kwargs["device_map"] = "balanced" if torch.cuda.device_count() > 1 else device
    if settings.archive is not None:
        model = _load_archive(Path(settings.archive), kwargs)
    elif settings.architecture is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # the policy and the reference start from the same weights
            try:
                model = AutoModelForCausalLM.from_config(
                    hf_config, dtype=dtype, trust_remote_code=settings.trust_remote_code
                )
            except Exception as error:  # whatever values that do not fit raise
                if is_out_of_memory(error):
                    raise
                raise _no_model(error) from error
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(settings.name_or_path, **kwargs)
        except Exception as error:  # damaged or unfitting files raise nearly anything
            raise _cannot_load("model", "model.name_or_path", settings.name_or_path, error) from error
    if not hasattr(model, "hf_device_map"):
        model = model.to(device)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _repair_generation_config(model)
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_embeddings:
        raise UserError(
            "CONFIG",
            f"model.tokenizer_name_or_path: the tokenizer has {len(tokenizer)} tokens, the model {num_embeddings}",
            "use the tokenizer that the model was trained with",
        )
    return model


def hf_config_of(settings: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The transformers config of the model that config.model describes."""
    if settings.architecture is None:
        try:
            return AutoConfig.from_pretrained(settings.name_or_path, trust_remote_code=settings.trust_remote_code)
        except Exception as error:  # damaged or unfitting files raise nearly anything
            raise _cannot_load("model", "model.name_or_path", settings.name_or_path, error) from error
    values = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **OmegaConf.to_container(settings.architecture, resolve=True),  # type: ignore[dict-item]
    }
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:  # whatever values that it does not take raise
        raise _no_model(error) from error


def differing_values(stored: Any, own: Any) -> str:
    """What makes a stored transformers config one of another model than our own, in words; empty if nothing does.

    A value that only one of them has was added by another version of transformers, or says what is the default.
    """

    def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> Iterator[str]:
        for key in sorted(theirs.keys() & ours.keys()):
            if isinstance(ours[key], dict) and key.endswith("_config") and isinstance(theirs[key], dict):
                yield from compare(theirs[key], ours[key])
            elif theirs[key] != ours[key] and not HARMLESS.search(key):
                yield f"{key} is {theirs[key]} there, not {ours[key]}"

    if stored.model_type != own.model_type:
        return f"model_type is {stored.model_type} there, not {own.model_type}"
    return clipped(", ".join(compare(stored.to_dict(), own.to_dict())), 500)


def _no_model(error: Exception) -> UserError:
    return UserError(
        "CONFIG",
        f"model.architecture: transformers makes no model of it ({type(error).__name__}: {clipped(str(error), 500)})",
        "give model_type and values that its transformers config takes",
    )


def _turn_off_dropout(hf_config: Any) -> None:
    # Attention modules copy these values when they are built, and apply them functionally.
    for name, value in hf_config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(hf_config, name, 0.0)


def _repair_generation_config(model: PreTrainedModel) -> None:
    # Some published models have settings for sampling without do_sample, with which no checkpoint could be saved.
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True


def _load_archive(archive: Path, kwargs: dict[str, Any]) -> PreTrainedModel:
    fix = "give the run directory, checkpoint (step-N, LATEST) or policy.pt of a run with this model"
    if archive.is_dir() and not (archive / "config.json").exists():  # a run directory
        archive = find_checkpoint(archive, "model.archive") or archive
    directory = archive.parent if archive.is_file() else archive
    if is_checkpoint(directory):
        find_checkpoint(directory, "model.archive")  # or say what is wrong with it
    try:
        if (archive.is_dir() or is_checkpoint(directory)) and (directory / "config.json").exists():
            stored = AutoConfig.from_pretrained(directory, trust_remote_code=kwargs["trust_remote_code"])
            if differing := differing_values(stored, kwargs["config"]):
                raise UserError("CHECKPOINT", f"model.archive: {archive} does not fit the model ({differing})", fix)
        if archive.is_dir():
            model, info = AutoModelForCausalLM.from_pretrained(archive, output_loading_info=True, **kwargs)
        else:
            state = torch.load(archive, map_location="cpu", weights_only=True, mmap=True)["state"]
            with torch.device("meta"):  # without a name, only the model's own class loads weights
                trusted = kwargs.pop("trust_remote_code")
                own = type(AutoModelForCausalLM.from_config(kwargs["config"], trust_remote_code=trusted))
            model, info = own.from_pretrained(None, state_dict=state, output_loading_info=True, **kwargs)
    except UserError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError("CHECKPOINT", f"model.archive: cannot load {archive}: {reason}", fix) from error
    info["unexpected_keys"] = {key for key in info["unexpected_keys"] if not key.endswith(BUFFERS)}
    problems = [f"{len(info[kind])} {kind.replace('_', ' ')}" for kind in info if info[kind] and kind != "error_msgs"]
    if problems:
        raise UserError("CHECKPOINT", f"model.archive: {archive} does not fit the model ({', '.join(problems)})", fix)
    return model


def find_blocks(model: nn.Module, block_name: str | None) -> list[nn.Module]:
    """The repeated transformer blocks, in order: those of class block_name, or the longest list of like modules."""
    if block_name is not None:
        blocks = [module for module in model.modules() if type(module).__name__ == block_name]
        if not blocks:
            classes = sorted({type(child).__name__ for module in _lists(model) for child in module})
            raise UserError(
                "CONFIG",
                f"model.block_name: the model has no {block_name}",
                f"one of {', '.join(classes)}, or null to have it found",
            )
        return blocks
    blocks = max((list(blocks) for blocks in _lists(model)), key=len, default=[])
    if not blocks:
        problem = f"model.architecture: {type(model).__name__} has no blocks"
        raise UserError(
            "CONFIG", problem, "give it at least one layer, or name the class of its blocks: model.block_name"
        )
    return blocks


def _lists(model: nn.Module) -> list[nn.ModuleList]:
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    ]


@torch.no_grad()
def use_packed_attention(
    model: PreTrainedModel, mixed_precision: torch.dtype | None = None, products: torch.dtype | None = None
) -> None:
    """Switch model to packed attention, after a check that it gives the log-probs of the model's own forward.

    The check runs the model over a few tokens, packed and padded. It catches whatever packing would get wrong:
    attention that cannot be replaced, state that crosses examples (Mamba), position biases, logits that are scaled
    or capped after the head.

    Args:
        mixed_precision: what the model will run in, if that is not the dtype of its weights.
        products: the dtype of some of its matrix products, if that is another.

    Raises:
        UserError: CONFIG, naming batching=padded.
    """
    name = type(model).__name__
    fix = "batching=padded"
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (40,), generator=torch.Generator().manual_seed(0)).numpy().astype("int32")
    example = Example(tokens[:7], (tokens[7:12], tokens[12:20]), 0)
    changed = Example(example.prompt, (example.responses[0], (example.responses[1] + 1) % vocabulary), 0)
    other = Example(tokens[20:24], (tokens[24:29], tokens[29:40]), 1)
    device = model.get_output_embeddings().weight.device

    def logps(examples: list[Example], layout: str) -> Tensor:
        with model_in(model, mixed_precision):
            return response_logps(model, lay_out(examples, layout).to(device))[1]

    model.own_attention = model.config._attn_implementation  # for sampling
    try:
        padded = logps([example, other], "padded")
    except Exception as error:
        if is_out_of_memory(error):
            raise
        problem = f"model.architecture: {name} does not run ({type(error).__name__}: {clipped(str(error), 500)})"
        raise UserError("CONFIG", problem, "give values that fit each other, or another model") from error
    try:
        model.set_attn_implementation("packed")
        packed, packed_changed = (logps([first, other], "packed") for first in (example, changed))
    except Exception as error:  # whatever a model does with keywords or attention it does not know
        if is_out_of_memory(error):
            raise
        raise UserError("CONFIG", f"{name} does not run with batching=packed ({error})", fix) from error
    if model.config._attn_implementation != "packed":
        raise UserError("CONFIG", f"{name} has an attention that batching=packed cannot replace", fix)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(products or mixed_precision or model.dtype, 0.02)
    difference = ((packed - padded) / padded).abs().max().item()
    unchanged = [0, 2, 3]  # all responses but the one that was changed
    leak = ((packed - packed_changed) / packed)[unchanged].abs().max().item()
    if not (difference <= tolerance and leak <= tolerance / 100):
        worst = max(difference, leak)
        raise UserError("CONFIG", f"{name} gives other log-probs with batching=packed (off by {worst:.1%})", fix)
