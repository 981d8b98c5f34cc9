"""Models that were saved: run directories, checkpoints, adapters and exported directories, loaded to be used."""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from engine.checkpoint import MANIFEST_FILE, STATE_FILE, checkpoints, find_checkpoint
from engine.commands import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_base
from engine.models import BUFFERS, END_OF_TEXT
from utils import UserError, is_out_of_memory, quiet_bitsandbytes

# Data sets whose loaders write "\n\nHuman: ...\n\nAssistant:".
HH_DATASETS = {"films", "hh", "shp", "se"}


@dataclass
class SavedModel:
    """A model with its adapters merged, and its tokenizer.

    base: the name of the model that adapters were merged into, if there were any.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: str | None = None


@dataclass
class RunRecord:
    """What a checkpoint and the run around it say about how the model was trained; empty for other directories."""

    config: dict[str, Any] = field(default_factory=dict)
    examples: int | None = None  # trained on until this checkpoint
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation until then

    @property
    def chat_template(self) -> str | None:
        """What chat_template wrote the training data: hh, llama2, a Jinja file, or None for the tokenizer's own."""
        template = self.config.get("chat_template")
        datasets = self.config.get("datasets") or []
        return "hh" if template is None and datasets and HH_DATASETS.issuperset(datasets) else template


def largest(tensor: torch.Tensor) -> float:
    """The largest magnitude in a tensor, in one pass: NaN or infinite if it holds such a number."""
    low, high = tensor.aminmax()
    return max(-low.item(), high.item())


def find_saved(name: str) -> Path | None:
    """The directory of a saved model that name is the path of: itself, or the newest checkpoint of a run directory.

    Returns:
        None if there is no such path, so that it can only be a name on the hub.

    Raises:
        UserError: CHECKPOINT if there is no model at the path, or it is a checkpoint that is damaged.
    """
    path = Path(name).expanduser()
    if path.name == "policy.pt" and path.is_file():  # holds the weights of the checkpoint that it lies in
        path = path.parent
    if not path.exists():
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:  # no name on the hub
            raise UserError("CHECKPOINT", f"there is no {path}", "correct the path")
        return None
    for candidate in (path, path / "LATEST", *reversed(checkpoints(path))):
        if (candidate / "config.json").is_file() or (candidate / ADAPTER_CONFIG).is_file():
            candidate = candidate.resolve()
            if candidate.name.startswith("step-") and (candidate / MANIFEST_FILE).exists():  # no copy, to be changed
                find_checkpoint(candidate, "the model")  # or say what is wrong with it
            return candidate
    raise UserError(
        "CHECKPOINT",
        f"there is no model in {path}: neither config.json nor {ADAPTER_CONFIG}",
        "give a run directory, a checkpoint in it (step-N, LATEST) or a directory that save_pretrained wrote",
    )


def read_run(directory: Path) -> RunRecord:
    """What is known of the run that a checkpoint directory belongs to."""
    record = RunRecord()
    run_dir = directory.parent
    try:
        if not (directory / STATE_FILE).is_file():
            return record
        record.examples = json.loads((directory / STATE_FILE).read_text())["counters"]["examples"]
        if (run_dir / "config.yaml").is_file():
            record.config = yaml.safe_load((run_dir / "config.yaml").read_text())
        if (run_dir / "metrics.jsonl").is_file():
            for line in (run_dir / "metrics.jsonl").read_text().splitlines():
                row = json.loads(line)
                if "loss/eval" in row and row["counters/examples"] <= record.examples:
                    record.metrics = row
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        problem = f"{directory} and the run around it cannot be read ({type(error).__name__}: {error})"
        raise UserError("CHECKPOINT", problem, "give another checkpoint") from error
    return record


def load_saved(name: str, *, dtype: torch.dtype | None = None, base: str | None = None) -> SavedModel:
    """Load a model from a directory, a run, or the hub; adapters are merged into their base model, in fp32.

    Args:
        dtype: of the weights; None: that in which they, or those of the base model, are stored.
        base: the base model of an adapter, in place of the one that it names.

    Raises:
        UserError: CHECKPOINT if it cannot be loaded, or its weights are not those of the model.
    """
    directory = find_saved(name)
    if directory is not None and (directory / ADAPTER_CONFIG).is_file():
        saved = _load_adapter(directory, dtype, base)
    elif base is not None:
        raise UserError("CONFIG", f"base: {name} is no adapter, so it has no base model", "leave base out")
    else:
        source = name if directory is None else str(directory)
        try:
            described = AutoConfig.from_pretrained(source, trust_remote_code=False)
            is_quantised = getattr(described, "quantization_config", None) is not None
            if not is_quantised:
                model, info = AutoModelForCausalLM.from_pretrained(
                    source, dtype=dtype or "auto", output_loading_info=True, trust_remote_code=False
                )
        except Exception as error:  # a damaged file raises nearly anything
            raise _cannot_load("model", source, error) from error
        if is_quantised:
            raise UserError(
                "CHECKPOINT",
                f"{source} is stored quantised",
                "export before quantising it; for an adapter, base=PATH names the model that was quantised",
            )
        info["unexpected_keys"] = {key for key in info["unexpected_keys"] if not key.endswith(BUFFERS)}
        problems = [f"{len(info[kind])} {kind.replace('_', ' ')}" for kind in info if info[kind]]
        if problems:
            fix = "give a directory that was written whole"
            raise UserError("CHECKPOINT", f"{source} does not hold the model's weights ({', '.join(problems)})", fix)
        saved = SavedModel(model, _load_tokenizer(source))
    _name_end_of_text(saved)
    return saved


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise _cannot_load("tokenizer", source, error) from error


def _cannot_load(kind: str, source: str, error: Exception) -> UserError:
    if is_out_of_memory(error):
        raise error
    if "trust_remote_code" in str(error):
        problem = f"{source} brings Python code of its own, which is not run"
        return UserError("CHECKPOINT", problem, "give a model that transformers has the code of")
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        "CHECKPOINT",
        f"no {kind} can be loaded from {source} ({reason})",
        "give a directory that holds one, or a name on the hub that this machine can reach or has in its cache",
    )


def _load_adapter(directory: Path, dtype: torch.dtype | None, base: str | None) -> SavedModel:
    quiet_bitsandbytes()  # which peft imports
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        named = json.loads((directory / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
        with safe_open(directory / ADAPTER_WEIGHTS, framework="pt") as file:
            stored = set(file.keys())
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _cannot_load("adapter", str(directory), error) from error
    if not (base or named):
        raise UserError("CHECKPOINT", f"{directory} does not name its base model", "give it as base=NAME_OR_PATH")
    source = base or str(find_base(directory, named) or named)
    try:
        below = load_saved(source, dtype=dtype)  # which may be an adapter itself
    except UserError as error:
        raise UserError(error.code, f"the base model of {directory}: {error.what}", "give it as base=PATH") from error
    model = below.model
    stored_dtype = model.dtype
    try:
        with warnings.catch_warnings(action="ignore"):  # peft warns of what is checked here
            adapted = PeftModel.from_pretrained(model, directory)
            expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
            if not expected <= stored:  # peft would go on with its initial weights
                missing = len(expected - stored)
                raise ValueError(f"{missing} of its {len(expected)} tensors are not in {ADAPTER_WEIGHTS}")
            for layer in adapted.modules():
                if isinstance(layer, BaseTunerLayer):  # one after another: the sum is rounded once, at the end
                    layer.to(torch.float32)
                    layer.merge(safe_merge=True)
                    layer.to(stored_dtype)
            model = adapted.merge_and_unload()
    except Exception as error:  # peft raises RuntimeError, KeyError, ValueError, ... where an adapter does not fit
        raise _cannot_load("adapter", str(directory), error) from error
    has_tokenizer = (directory / "tokenizer_config.json").is_file()
    tokenizer = _load_tokenizer(str(directory)) if has_tokenizer else below.tokenizer
    return SavedModel(model.to(stored_dtype), tokenizer, below.base or source)


def _name_end_of_text(saved: SavedModel) -> None:
    # Other tools stop where the generation config says, so it and the tokenizer must agree with the training data.
    tokenizer, generation = saved.tokenizer, saved.model.generation_config
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
