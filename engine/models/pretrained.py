"""Load weights by transformers, for a language model or a reward model, and say how they fit it."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.models.score_head import AUTO_CLASSES, SCORE_WEIGHT
from losses import Head
from utils import UserError

# Masks and frequencies. Older versions of transformers saved them with the weights.
BUFFERS = ("attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")


class Pretrained(NamedTuple):
    """A model with loaded weights.

    Args:
        missing, unexpected: names of weights of the model alone, and of the files alone. A new score head counts in
            neither, nor does the LM head that it replaces.
        has_new_score: the files have no score head, and the model needs one.
    """

    model: PreTrainedModel
    missing: set[str]
    unexpected: set[str]
    has_new_score: bool

    @property
    def problems(self) -> str:
        """Counts of the weights that do not fit; empty if all do."""
        counts = {"missing keys": len(self.missing), "unexpected keys": len(self.unexpected)}
        return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)

    def check_head(self, key: str, name: str) -> None:
        """Raise a UserError, CHECKPOINT, if a language model got the weights of a reward model."""
        if SCORE_WEIGHT in self.unexpected:
            raise reward_model_error(key, name)


def reward_model_error(key: str, name: str) -> UserError:
    """An error for a reward model in place of a language model."""
    problem = f"{key}: {name} is a reward model: it has a score head, and no LM head that fits its weights"
    return UserError("CHECKPOINT", problem, "give the language model that it was trained from, or set loss=reward")


def load_pretrained(
    source: str | Path | None, head: Head, config: Any, *, state: dict[str, Tensor] | None = None, **kwargs: Any
) -> Pretrained:
    """Load a model with a head.

    A score head is loaded in at least fp32, whatever the dtype of the model.

    Args:
        source: a directory, or a name on the hub; None for state.
        config: of transformers, by prepare_config().
        state: the weights, in place of files.
        kwargs: of from_pretrained().
    """
    auto_class = AUTO_CLASSES[head]
    if head == "score" or state is not None:  # only the model's own class loads weights without a name
        trusted = kwargs.pop("trust_remote_code", False)
        with torch.device("meta"):
            shape = auto_class.from_config(config, trust_remote_code=trusted)
        auto_class, config = type(shape), shape.config
        if state is not None:
            _fit_padding_row(shape, state)
    if head == "score":
        auto_class = _with_fp32_score(auto_class)
    if state is not None:
        kwargs["state_dict"] = state
    model, info = auto_class.from_pretrained(source, config=config, output_loading_info=True, **kwargs)
    if head == "score":  # a new one has the dtype of the model
        model.score.to(torch.promote_types(model.dtype, torch.float32))
    missing = set(info["missing_keys"])  # other shapes have raised an error
    unexpected = {key for key in info["unexpected_keys"] if not key.endswith(BUFFERS)}
    has_new_score = head == "score" and SCORE_WEIGHT in missing
    if has_new_score:  # the files are of a language model
        missing.remove(SCORE_WEIGHT)
        unexpected = {key for key in unexpected if key.startswith(f"{model.base_model_prefix}.")}
    return Pretrained(model, missing, unexpected, has_new_score)


def _fit_padding_row(model: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Give a model's config the row for a padding token if the weights of a reward model have one."""
    embeddings = model.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is embeddings)
    if SCORE_WEIGHT in state and name in state and len(state[name]) == len(embeddings) + 1:
        model.config.get_text_config().vocab_size += 1


def _with_fp32_score(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of the same name. transformers would round the score head to the dtype of the model."""
    kept = {*(model_class._keep_in_fp32_modules_strict or ()), rf"^{SCORE_WEIGHT}$"}
    values = {"_keep_in_fp32_modules_strict": kept, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), values)
