"""Answers sampled from a model, with random numbers of their own: sampling never changes training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from engine.attention import attention_of


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
    """One answer to each prompt, sampled at temperature 1 with a KV cache, batch_size prompts at a time.

    Args:
        prompts: token ids, each [prompt tokens].
        max_new_tokens: of an answer.
        max_length: of prompt + answer.

    Returns:
        token ids of each answer, int32 [answer tokens], with its end-of-text token if it came to one.
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
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding
    with _ready_to_generate(model, settings, seed):
        for start in range(0, len(prompts), batch_size):
            indices = by_length[start : start + batch_size]
            length = max(len(prompts[index]) for index in indices)
            input_ids = torch.full((len(indices), length), tokenizer.pad_token_id)
            attention_mask = torch.zeros_like(input_ids)
            for row, index in enumerate(indices):  # padded on the left, so that all answers start together
                prompt = prompts[index]
                input_ids[row, length - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
                attention_mask[row, length - len(prompt) :] = 1
            output = model.generate(
                input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=min(max_new_tokens, max_length - length),
                synced_gpus=False,  # other processes may have more prompts, or none
            )
            for index, answer in zip(indices, output[:, length:].cpu().numpy().astype(np.int32), strict=True):
                ends = np.flatnonzero(answer == tokenizer.eos_token_id)
                responses[index] = answer[: ends[0] + 1] if len(ends) else answer
    return [responses[index] for index in range(len(prompts))]


@contextmanager
def _ready_to_generate(model: PreTrainedModel, settings: GenerationConfig, seed: int) -> Iterator[None]:
    """The model in evaluation mode with its own attention, its own generation settings out of the way (a repetition
    penalty would not sample from the policy), and a random generator of its own."""
    was_training, own_settings = model.training, model.generation_config
    device = model.get_input_embeddings().weight.device
    attention = getattr(model, "own_attention", model.config._attn_implementation)
    # Hidden states may have a lower dtype than the head.
    head = model.get_output_embeddings()
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        attention_of(model, attention),
        head.register_forward_pre_hook(lambda head, inputs: (inputs[0].to(head.weight.dtype),)),
    ):
        torch.manual_seed(seed)
        model.generation_config = settings
        model.eval()
        try:
            yield
        finally:
            model.generation_config = own_settings
            model.train(was_training)
