"""Find a saved model, load it, and merge its adapters."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from engine.data.chat_templates import without_end
from engine.models.archives import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST_FILE,
    check_base_exists,
    checkpoints,
    find_base_model,
    find_checkpoint,
    is_local,
    locate,
)
from engine.models.loading import reason_of
from engine.models.pretrained import load_pretrained
from engine.models.records import AdapterConfig, check_shard_index, read_record
from engine.models.score_head import cast_model, is_reward_config, prepare_config
from engine.models.tokenizers import END_OF_TEXT
from losses import Head
from utils import UserError, is_out_of_memory, progress, quiet_bitsandbytes


@dataclass
class SavedModel:
    """A model with merged adapters, and its tokenizer.

    Args:
        base: name of the model below the adapters; None without adapters.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: str | None = None


def max_magnitude(tensor: torch.Tensor) -> float:
    """The largest magnitude in a tensor, in one pass; NaN or Inf if the tensor contains any."""
    low, high = tensor.aminmax()
    return max(-low.item(), high.item())


def check_finite(model: PreTrainedModel, fix: str, *, show_progress: bool = True) -> None:
    """Refuse a model with NaN or Inf in its weights.

    Args:
        fix: the remedy in the error.

    Raises:
        UserError: NONFINITE, naming the tensor.
    """
    state = model.state_dict()
    for key, tensor in progress(state.items(), description="checking weights", unit="tensors", is_shown=show_progress):
        if tensor.numel() and not math.isfinite(max_magnitude(tensor)):
            raise UserError("NONFINITE", f"{key} contains NaN or Inf", fix)


# ---- Finding ----


def find_saved(name: str) -> Path | None:
    """The directory of a saved model.

    Args:
        name: a model directory, a run directory (its newest checkpoint is taken), a policy.pt (the checkpoint around
            it is taken), or a name on the hub.

    Returns:
        None for a name on the hub.

    Raises:
        UserError: CHECKPOINT if the path does not exist, contains no model, or is a damaged checkpoint.
    """
    path = Path(name).expanduser()
    if path.name == "policy.pt" and path.is_file():
        path = path.parent
    if not path.exists():
        if is_local(name):
            raise UserError("CHECKPOINT", f"{path} does not exist", "correct the path")
        return None
    for candidate in (path, path / "LATEST", *reversed(checkpoints(path))):
        if (candidate / "config.json").is_file() or (candidate / ADAPTER_CONFIG).is_file():
            candidate = locate(candidate)
            # Copies under another name may be edited, so only a run's own checkpoints are verified.
            if candidate.name.startswith("step-") and (candidate / MANIFEST_FILE).exists():
                find_checkpoint(candidate, "the model")  # raises for a damaged one
            return candidate
    raise UserError(
        "CHECKPOINT",
        f"{path} contains no model: neither config.json nor {ADAPTER_CONFIG}",
        "give a run directory, a checkpoint in it (step-N, LATEST) or a directory written by save_pretrained",
    )


# ---- Loading ----


def load_saved(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    base: str | None = None,
    show_progress: bool = True,
    head: Head | None = None,
) -> SavedModel:
    """Load a model from a directory, a run, or the hub; merge adapters in fp32.

    The score head of a reward model stays in fp32.

    Args:
        dtype: of the weights; None: as stored (of adapters: as the base model is stored).
        base: the base model of an adapter, instead of the one in adapter_config.json.
        show_progress: of merging; False keeps stdout free for other output.
        head: of the model, for the base of an adapter; None: as stored.

    Raises:
        UserError: CHECKPOINT if the model cannot be loaded, or weights are missing.
    """
    directory = find_saved(name)
    if directory is not None and (directory / ADAPTER_CONFIG).is_file():
        saved = _load_adapter(directory, dtype, base, show_progress)
    elif base is not None:
        raise UserError("CONFIG", f"base: {name} is no adapter, so it has no base model", "leave base out")
    else:
        source = name if directory is None else str(directory)
        saved = SavedModel(_load_model(source, dtype, head), _load_tokenizer(source))
    _set_end_of_text(saved)
    return saved


def _load_model(source: str, dtype: torch.dtype | None, head: Head | None) -> PreTrainedModel:
    check_shard_index(Path(source), "model")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        is_reward_model = is_reward_config(config)
        head = head or ("score" if is_reward_model else "lm")
        if head == "score":
            prepare_config(config, head)
        is_quantised = getattr(config, "quantization_config", None) is not None
        if not is_quantised:
            loaded = load_pretrained(source, head, config, dtype=dtype or "auto", trust_remote_code=False)
    except Exception as error:  # nearly any type, for damaged files
        raise loading_error("model", source, error) from error
    if is_quantised:
        raise UserError(
            "CHECKPOINT",
            f"{source} is stored quantised",
            "export the model from before quantisation; for an adapter, give that model as base=PATH",
        )
    problems = loaded.problems or ("no score head" if loaded.has_new_score and is_reward_model else "")
    if problems:
        problem = f"the weights in {source} do not match the model ({problems})"
        raise UserError("CHECKPOINT", problem, "give a complete directory")
    return loaded.model


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise loading_error("tokenizer", source, error) from error
    tokenizer.chat_template = without_end(tokenizer.chat_template)
    return tokenizer


def loading_error(kind: str, source: str, error: Exception) -> UserError:
    """A user's error for a failed load; raises the error itself if memory ran out."""
    if is_out_of_memory(error):
        raise error
    if "trust_remote_code" in str(error):
        problem = f"{source} brings Python code of its own, never run here"
        return UserError("CHECKPOINT", problem, "give a model supported by transformers itself")
    return UserError(
        "CHECKPOINT",
        f"no {kind} can be loaded from {source} ({reason_of(error)})",
        f"give a directory with a {kind}, or a name on the hub; without network only cached names work",
    )


# ---- Adapters ----


def _load_adapter(directory: Path, dtype: torch.dtype | None, base: str | None, show_progress: bool) -> SavedModel:
    config = read_record(AdapterConfig, directory / ADAPTER_CONFIG, "adapter", "give another adapter")
    configured = config.get("base_model_name_or_path") or ""
    try:
        with safe_open(directory / ADAPTER_WEIGHTS, framework="pt") as file:
            stored = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise loading_error("adapter", str(directory), error) from error
    if not (base or configured):
        raise UserError("CHECKPOINT", f"{directory} does not name its base model", "give it as base=NAME_OR_PATH")
    if base is None:
        check_base_exists(directory, configured, "base", "as base=PATH")
    source = base or str(find_base_model(directory, configured) or configured)
    try:
        head: Head | None = "score" if config.get("task_type") == "SEQ_CLS" else None
        base_model = load_saved(source, dtype=dtype, show_progress=show_progress, head=head)  # may be an adapter itself
    except UserError as error:
        raise UserError(error.code, f"the base model of {directory}: {error.what}", "give it as base=PATH") from error
    try:
        model = _merge(base_model.model, directory, stored, show_progress)
    except Exception as error:  # peft raises RuntimeError, KeyError, ValueError, ... for adapters of other models
        raise loading_error("adapter", str(directory), error) from error
    has_tokenizer = (directory / "tokenizer_config.json").is_file()
    tokenizer = _load_tokenizer(str(directory)) if has_tokenizer else base_model.tokenizer
    return SavedModel(model, tokenizer, base_model.base or source)


def _merge(model: PreTrainedModel, adapter: Path, stored: set[str], show_progress: bool) -> PreTrainedModel:
    """Merge an adapter into its base model.

    Each layer is merged in fp32, so the sum is rounded once. One layer at a time bounds the memory.

    Args:
        stored: names of the tensors in the adapter's file.
    """
    quiet_bitsandbytes()  # imported by peft
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    dtype = model.dtype
    with warnings.catch_warnings(action="ignore"):  # the check below replaces peft's warnings
        adapted = PeftModel.from_pretrained(model, adapter)
        expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if not expected <= stored:  # peft would leave them at their initial values
            missing = len(expected - stored)
            raise ValueError(f"{missing} of its {len(expected)} tensors are not in {ADAPTER_WEIGHTS}")
        layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
        for layer in progress(layers, description="merging adapters", unit="layers", is_shown=show_progress):
            layer.to(torch.float32)
            layer.merge(safe_merge=True)
            layer.to(dtype)
        return cast_model(adapted.merge_and_unload(), dtype)


def _set_end_of_text(saved: SavedModel) -> None:
    """Name the end-of-text token in tokenizer and generation config: other tools stop generating there."""
    tokenizer, generation = saved.tokenizer, getattr(saved.model, "generation_config", None)
    if tokenizer.eos_token_id is None:
        known = next((token for token in END_OF_TEXT if token in tokenizer.get_vocab()), None)
        if known is not None:
            tokenizer.add_special_tokens({"eos_token": known})
    if generation is not None:
        ends = generation.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
            ends = [tokenizer.eos_token_id, *ends]
            generation.eos_token_id = ends if len(ends) > 1 else ends[0]
        if generation.pad_token_id is None:
            generation.pad_token_id = tokenizer.pad_token_id
