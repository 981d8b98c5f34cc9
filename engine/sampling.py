"""Answers sampled from a model, with random numbers of their own: sampling never changes training."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.attention import attention_of


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> list[np.ndarray]:
    """One answer to each prompt, sampled at temperature 1 with a KV cache, batch_size prompts at a time.

    Args:
        prompts: token ids, each [prompt tokens].

    Returns:
        token ids of each answer, int32 [answer tokens], with its end-of-text token if it came to one.
    """
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    responses: list[np.ndarray] = []
    attention = "sdpa" if model.config._attn_implementation == "packed" else model.config._attn_implementation
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), attention_of(model, attention):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            length = max(map(len, batch))
            input_ids = torch.full((len(batch), length), tokenizer.pad_token_id)
            attention_mask = torch.zeros_like(input_ids)
            for row, prompt in enumerate(batch):  # padded on the left, so that all answers start together
                input_ids[row, length - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
                attention_mask[row, length - len(prompt) :] = 1
            output = model.generate(
                input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            for answer in output[:, length:].cpu().numpy().astype(np.int32):
                ends = np.flatnonzero(answer == tokenizer.eos_token_id)
                responses.append(answer[: ends[0] + 1] if len(ends) else answer)
    model.train(was_training)
    return responses
