"""Sample responses from a model, with a random generator apart from training's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from engine.models.attention_switch import attention_of
from utils import Progress


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    max_length: int,
    batch_size: int,
    seed: int,
) -> list[np.ndarray]:
    """Sample one response per prompt at temperature 1, with a KV cache.

    Args:
        prompts: token ids, each [prompt tokens].
        max_new_tokens: per response.
        max_length: of prompt + response.
        batch_size: prompts at a time.
        seed: of the samples. Random numbers of training stay as they are.

    Returns:
        token ids of each response, int32 [response tokens], up to its end-of-text token if it has one.
    """
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    responses: dict[int, np.ndarray] = {}
    device = model.get_input_embeddings().weight.device
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # for little padding
    num_batches = -(-len(prompts) // batch_size)
    shown = Progress("sampling", total=num_batches * max_new_tokens, unit="tokens", stays=False)
    with _ready_to_generate(model, settings, seed), shown:
        for start in range(0, len(prompts), batch_size):
            indices = by_length[start : start + batch_size]
            length = max(len(prompts[index]) for index in indices)
            input_ids = torch.full((len(indices), length), tokenizer.pad_token_id)
            attention_mask = torch.zeros_like(input_ids)
            for row, index in enumerate(indices):  # padded on the left: all responses start together
                prompt = prompts[index]
                input_ids[row, length - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
                attention_mask[row, length - len(prompt) :] = 1
            output = model.generate(
                input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=min(max_new_tokens, max_length - length),
                synced_gpus=False,  # other ranks may have more prompts, or none
                stopping_criteria=StoppingCriteriaList([_TokenCounter(shown)]),
            )
            shown.update(max_new_tokens - (output.shape[1] - length))  # all responses ended early
            for index, response in zip(indices, output[:, length:].cpu().numpy().astype(np.int32), strict=True):
                ends = np.flatnonzero(response == tokenizer.eos_token_id)
                responses[index] = response[: ends[0] + 1] if len(ends) else response
    return [responses[index] for index in range(len(prompts))]


class _TokenCounter(StoppingCriteria):
    """Counts generated tokens, and stops nothing."""

    def __init__(self, shown: Progress):
        self._shown = shown

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self._shown.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _ready_to_generate(model: PreTrainedModel, settings: GenerationConfig, seed: int) -> Iterator[None]:
    """Prepare a model for generate() in a with block, and restore it.

    - the given generation settings in place of the model's: its repetition penalty would distort the policy
    - a random generator apart
    """
    original_settings = model.generation_config
    device = model.get_input_embeddings().weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), ready_to_sample(model):
        torch.manual_seed(seed)
        model.generation_config = settings
        try:
            yield
        finally:
            model.generation_config = original_settings


@contextmanager
def ready_to_sample(model: PreTrainedModel) -> Iterator[None]:
    """Run a model in evaluation mode, with the attention from before packing, in a with block."""
    was_training = model.training
    attention = getattr(model, "original_attention", model.config._attn_implementation)
    # Hidden states may have a lower dtype than the head.
    head = model.get_output_embeddings()
    with (
        attention_of(model, attention),
        head.register_forward_pre_hook(lambda head, inputs: (inputs[0].to(head.weight.dtype),)),
    ):
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)
