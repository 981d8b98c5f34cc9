"""Tiny models with random weights, one per architecture, and random examples."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from engine.data.examples import Example
from engine.data.rankings import compare_by_rank

VOCABULARY = 61
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2},
    "qwen2": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "sliding_window": 5},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}  # fmt: skip


def tiny_reward_model(architecture: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Build a tiny_model() with a score head."""
    return tiny_model(architecture, dtype, AutoModelForSequenceClassification, num_labels=1, **overrides)


def tiny_model(
    architecture: str, dtype: torch.dtype = torch.float32, auto_class: Any = AutoModelForCausalLM, **overrides: Any
) -> PreTrainedModel:
    """Build a model with large random weights, so log-probs depend on all attended tokens."""
    torch.manual_seed(0)
    values = {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "eos_token_id": 1, "bos_token_id": 0,
              "pad_token_id": 0, "attention_dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
              **SIZES[architecture], **overrides}  # fmt: skip
    model = auto_class.from_config(AutoConfig.for_model(architecture, **values)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def random_examples(lengths: list[tuple[int, ...]], seed: int = 0) -> list[Example]:
    """Examples of random tokens; lengths: of the prompt, then of each response."""
    generator = np.random.default_rng(seed)
    return [
        Example(tokens[0], tuple(tokens[1:]), index)
        for index, sizes in enumerate(lengths)
        for tokens in [[generator.integers(2, VOCABULARY, size, dtype=np.int32) for size in sizes]]
    ]


def pair_examples(seed: int = 0) -> list[Example]:
    """Five pairs of many shapes.

    Some prompts and responses have one token. Two pairs share a prompt and a response."""
    examples = random_examples([(9, 4, 7), (1, 6, 2), (5, 1, 3), (12, 5, 1)], seed)
    first = examples[0]
    extra = random_examples([(1, 5)], seed + 1)[0].responses[0]
    return [*examples, Example(first.prompt, (extra, first.responses[0]), first.prompt_index)]


def ranking_examples(seed: int = 0) -> list[Example]:
    """Five rankings of two to four responses, with ties and a margin.

    Some prompts and responses have one token. Two rankings share a prompt and a response."""
    sizes = [(9, 4, 7), (1, 6, 2, 1), (5, 1, 3, 4, 2), (12, 5, 1, 5)]
    ranks = [(0, 1), (0, 1, 2), (0, 1, 1, 3), (0, 0, 2)]
    comparisons = [compare_by_rank(of_prompt) for of_prompt in ranks]
    examples = [
        replace(each, comparisons=of) for each, of in zip(random_examples(sizes, seed), comparisons, strict=True)
    ]
    first = examples[0]
    extra = random_examples([(1, 5)], seed + 1)[0].responses[0]
    responses = (extra, first.responses[0])
    with_margin = compare_by_rank((0, 1), margin=0.5)
    return [*examples, Example(first.prompt, responses, first.prompt_index, comparisons=with_margin)]


def exact_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Replace RMS norms by ones in the model's dtype; those of transformers round to fp32."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(len(child.weight), eps=child.variance_epsilon, dtype=child.weight.dtype)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model
