"""Score heads of reward models: one number for each hidden state, in place of the LM head.

It is transformers' `score`, Linear(hidden size, 1) without bias, of AutoModelForSequenceClassification.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from engine.models.layers import find_layers
from engine.settings.schema import LoraSettings, Settings
from losses import LOSSES, Head
from utils import UserError

SCORE_NAME, SCORE_WEIGHT = "score", "score.weight"
PAD_TOKEN = "<|pad|>"
FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")  # some of those with a score head
AUTO_CLASSES: dict[Head, Any] = {"lm": AutoModelForCausalLM, "score": AutoModelForSequenceClassification}


def head_of_loss(settings: Settings) -> Head:
    """The head that the loss of the settings reads."""
    return LOSSES[settings.loss.name].head


def has_score_head(model: PreTrainedModel) -> bool:
    """Whether a model gives scores, not logits of tokens."""
    return isinstance(getattr(model, SCORE_NAME, None), nn.Linear) and model.get_output_embeddings() is None


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The LM head of a model, or its score head."""
    return model.score if has_score_head(model) else model.get_output_embeddings()


def cast_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the weights of a model in place; a score head keeps at least fp32."""
    weight = model.score.weight.detach() if has_score_head(model) else None
    model = model.to(dtype)
    if weight is not None:
        model.score.weight.data = weight.to(torch.promote_types(dtype, torch.float32))
    return model


def prepare_config(hf_config: Any, head: Head, trusted: bool = False) -> Any:
    """The transformers config of a model with this head; changed in place.

    Args:
        trusted: the model may have Python code of its own.

    Raises:
        UserError: CONFIG for a family without a score head.
    """
    if head == "lm":
        return hf_config
    auto_map = getattr(hf_config, "auto_map", None) or {}
    has_code = trusted and AutoModelForSequenceClassification.__name__ in auto_map
    if not has_code and not _has_family_score(hf_config):
        problem = f"model: transformers has no score head for {hf_config.model_type}, and a reward model needs one"
        raise UserError("CONFIG", problem, f"use one of {', '.join(FAMILIES)}, or another decoder with `score`")
    hf_config.num_labels = 1
    return hf_config


def _has_family_score(hf_config: Any) -> bool:
    """Whether transformers has a model with a score head for a config. Encoders have other heads."""
    if type(hf_config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return False
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # without memory: a second for 80 layers
            model = AutoModelForSequenceClassification.from_config(copy.deepcopy(hf_config), trust_remote_code=False)
    except Exception:  # of an impossible config; loading reports it
        return True
    return hasattr(model, SCORE_NAME)


def finish_score_head(
    model: PreTrainedModel, settings: Settings, tokenizer: PreTrainedTokenizerBase, is_new: bool
) -> None:
    """Give the score head at least fp32, and new weights if it has none.

    Args:
        is_new: the weights came without a score head.
    """
    head = model.score
    may_change = not _has_stored_base(settings)
    _set_padding_id(model, tokenizer, may_grow=may_change)
    train_all_embeddings(model)
    model.generation_config = None  # it writes no text
    model.config.architectures = [type(model).__name__]  # as save_pretrained() does: it tells a reward model
    head.to(torch.promote_types(model.dtype, torch.float32))
    if is_new:
        generator = torch.Generator().manual_seed(settings.seed)
        _draw(head.weight, _standard_deviation(model, settings), generator)
        if may_change:
            _draw_end_of_text(model, tokenizer.eos_token_id, generator)


def train_all_embeddings(model: PreTrainedModel) -> None:
    """Train the embedding of the padding token too.

    It is often the end-of-text token, and a score is read there. torch would leave its gradient out.
    """
    model.get_input_embeddings().padding_idx = None


def is_reward_config(hf_config: Any) -> bool:
    """Whether a transformers config is of a model with a score head."""
    name = AutoModelForSequenceClassification.__name__.removeprefix("AutoModel")
    return any(each.endswith(name) for each in hf_config.architectures or [])


def has_padding_row(stored: Any, expected: Any) -> bool:
    """Whether a stored config is of a reward model with a row for its padding token, and the expected one has none."""
    rows, expected_rows = (getattr(each.get_text_config(), "vocab_size", 0) for each in (stored, expected))
    return is_reward_config(stored) and rows == expected_rows + 1


def name_padding_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, may_grow: bool = False) -> None:
    """Name a padding token in config and tokenizer, other than the end-of-text token.

    transformers reads the score at the last token that is no padding. Without a padding token it refuses batches.

    Args:
        may_grow: whether the embeddings may get a row for a new token.
    """
    _set_padding_id(model, tokenizer, may_grow)
    if _lacks_padding(tokenizer) and model.config.get_text_config().pad_token_id is not None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})


def _lacks_padding(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.pad_token_id in (None, tokenizer.eos_token_id)


@torch.no_grad()
def _set_padding_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, may_grow: bool) -> None:
    """Set the id of the padding token in the config; None if the embeddings have no row for it.

    Args:
        may_grow: whether they may get a row of zeros.
    """
    config, token = model.config.get_text_config(), tokenizer.pad_token_id
    if _lacks_padding(tokenizer):  # it will be added
        with_token = copy.deepcopy(tokenizer)  # its ids may have gaps, so only the tokenizer knows the next
        with_token.add_special_tokens({"pad_token": PAD_TOKEN})
        token = with_token.pad_token_id
    if may_grow and token == config.vocab_size:
        with torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(token + 1, mean_resizing=False)
        model.get_input_embeddings().weight[token] = 0
    config.pad_token_id = token if token < config.vocab_size else None


def record_rewards(model: PreTrainedModel, mean: float | None, deviation: float | None) -> None:
    """Keep mean and standard deviation of the rewards of held-out responses in the config; None if unknown."""
    model.config.reward_mean, model.config.reward_std = mean, deviation


def _has_stored_base(settings: Settings) -> bool:
    """Whether adapters are trained on weights that other programs load too: these weights must stay as they are."""
    is_from_scratch = settings.model.archive is None and settings.model.architecture is not None
    return isinstance(settings.peft, LoraSettings) and not is_from_scratch


def _draw_end_of_text(model: PreTrainedModel, token: int, generator: torch.Generator) -> None:
    """Draw the embedding of the end-of-text token if it is 0, as of a padding token: a score is read there.

    Norms would scale its gradient up.
    """
    embeddings = model.get_input_embeddings().weight
    if not embeddings[token].any():
        _draw(embeddings[token], embeddings.std().item(), generator)


def stored_rewards(model: PreTrainedModel) -> tuple[float | None, float | None]:
    """Mean and standard deviation that record_rewards() has kept in the config."""
    return getattr(model.config, "reward_mean", None), getattr(model.config, "reward_std", None)


@torch.no_grad()
def _draw(weights: Tensor, standard_deviation: float, generator: torch.Generator) -> None:
    """Fill weights with normal numbers: the same ones for every dtype and device."""
    weights.copy_(torch.empty(weights.shape).normal_(std=standard_deviation, generator=generator))


def _standard_deviation(model: PreTrainedModel, settings: Settings) -> float:
    if settings.loss.head_init == "depth":
        return 0.02 / (2 * len(find_layers(model, settings.model.block_name))) ** 0.5
    width = 1 / (model.score.in_features + 1) ** 0.5
    return 0.01 * width if settings.loss.head_init == "small" else width
