"""Sample several responses to each prompt, with random numbers that no batch changes.

- A prompt is run once. Its keys and values are repeated for its samples.
- Rows leave as soon as their responses end.
- Each token of each response has a random number of its own. So a response depends on its prompt and numbers alone, up
  to rounding.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from engine.models.generation import ready_to_sample
from engine.models.packed_weights import packed_weights
from utils import Progress


class Sampling(NamedTuple):
    """How to sample.

    Args:
        num_samples: responses to each prompt.
        max_new_tokens: of a response.
        max_length: of prompt + response.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: only the most likely tokens with so much probability together are sampled.
        max_rows: responses at a time.
    """

    num_samples: int
    max_new_tokens: int
    max_length: int
    eos_token_id: int
    pad_token_id: int
    temperature: float = 1.0
    top_p: float = 1.0
    max_rows: int = 128


# Takes the index of a prompt and of a sample. Returns a number in [0, 1) for each token, fp64 [max_new_tokens].
Uniforms = Callable[[int, int], np.ndarray]


def seeded_uniforms(seed: Sequence[int], num_tokens: int) -> np.ndarray:
    """Random numbers in [0, 1), fp64 [tokens]. Equal seeds give equal numbers, whatever num_tokens is."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed]))).random(num_tokens)


@torch.no_grad()
def sample_groups(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], uniforms: Uniforms, sampling: Sampling
) -> list[list[np.ndarray]]:
    """Sample responses to each prompt.

    Args:
        prompts: token ids, each [prompt tokens].

    Returns:
        token ids of each prompt's responses, int32 [response tokens] each, up to the end-of-text token if there is one.
    """
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # for little padding
    responses: list[list[np.ndarray]] = [[] for _ in prompts]
    shown = Progress("sampling", total=len(prompts) * sampling.num_samples, unit="responses", stays=False)
    with ready_to_sample(model), packed_weights(model), shown:
        for first_sample in range(0, sampling.num_samples, sampling.max_rows):  # a large group is split
            samples = range(first_sample, min(first_sample + sampling.max_rows, sampling.num_samples))
            at_a_time = sampling.max_rows // len(samples)
            for start in range(0, len(prompts), at_a_time):
                indices = by_length[start : start + at_a_time]
                numbers = np.stack([uniforms(index, sample) for index in indices for sample in samples])
                found = _sample_batch(model, [prompts[index] for index in indices], numbers, sampling, shown)
                for place, index in enumerate(indices):
                    responses[index] += found[place * len(samples) : (place + 1) * len(samples)]
    return responses


def _sample_batch(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], uniforms: np.ndarray, sampling: Sampling, shown: Progress
) -> list[np.ndarray]:
    """Sample responses to prompts of one batch, in the order of the rows of uniforms, [responses, max_new_tokens]."""
    device = model.get_input_embeddings().weight.device
    length, num_samples = max(map(len, prompts)), len(uniforms) // len(prompts)
    ids, mask = _pad_left(prompts, length, sampling.pad_token_id)
    limits = [min(sampling.max_new_tokens, sampling.max_length - len(prompt)) for prompt in prompts]
    row_limits = torch.tensor(limits).repeat_interleave(num_samples)  # tokens of each response
    num_new = max(limits)
    mask = torch.cat([mask, mask.new_ones(len(mask), num_new)], 1).to(device)
    is_padded = bool((mask == 0).any())
    cache = Cache(layer_class_to_replicate=partial(_ReservedLayer, length + num_new))

    def logits_of(tokens: Tensor, positions: Tensor) -> Tensor:
        end = cache.get_seq_length() + tokens.shape[1]
        attention_mask = mask[:, :end] if is_padded else None
        output = model(
            tokens.to(device),
            attention_mask=attention_mask,
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    positions = (mask[:, :length].cumsum(-1) - 1).clamp(min=0)
    logits = logits_of(ids, positions).repeat_interleave(num_samples, 0)
    cache.batch_repeat_interleave(num_samples)
    mask = mask.repeat_interleave(num_samples, 0)
    next_positions = positions[:, -1:].repeat_interleave(num_samples, 0) + 1
    numbers = torch.from_numpy(uniforms)
    sampled = torch.full((len(numbers), num_new), sampling.pad_token_id)
    lengths = torch.zeros(len(numbers), dtype=torch.int64)
    rows = torch.arange(len(numbers))  # still running
    for step in range(num_new):
        tokens = _choose(logits, numbers[rows, step], sampling.temperature, sampling.top_p).cpu()
        sampled[rows, step] = tokens
        has_ended = (tokens == sampling.eos_token_id) | (row_limits[rows] == step + 1)
        if has_ended.any():
            lengths[rows[has_ended]] = step + 1
            shown.update(int(has_ended.sum()))
            kept = _fill_gaps(~has_ended)
            if not len(kept):
                break
            rows, tokens = rows[kept], tokens[kept]
            mask, next_positions = mask[kept.to(device)], next_positions[kept.to(device)]
            cache.batch_select_indices(kept)
        logits = logits_of(tokens[:, None], next_positions)
        next_positions = next_positions + 1
    pairs = zip(sampled.numpy().astype(np.int32), lengths.tolist(), strict=True)
    return [response[:length] for response, length in pairs]


def _fill_gaps(is_kept: Tensor) -> Tensor:
    """The indices of rows that stay, in new order: the last ones fill the gaps, so few move."""
    number = int(is_kept.sum())
    indices = torch.arange(number)
    indices[~is_kept[:number]] = is_kept[number:].nonzero().squeeze(-1) + number
    return indices


def _pad_left(prompts: Sequence[np.ndarray], length: int, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of prompts, [prompts, length] each. All responses then start together."""
    ids = torch.full((len(prompts), length), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def _choose(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """A token for each row of logits [rows, vocabulary], where the sum of probabilities passes its number, [rows]."""
    if temperature == 0:
        return logits.argmax(-1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    probs, order = wide.softmax(-1).double(), None
    if top_p < 1:
        probs, order = probs.sort(-1, descending=True)
        probs = probs.where(probs.cumsum(-1) - probs < top_p, 0)
    sums = probs.cumsum(-1)
    points = uniforms.to(sums.device) * sums[:, -1]
    tokens = torch.searchsorted(sums, points[:, None], right=True).clamp(max=logits.shape[-1] - 1)
    return (tokens if order is None else order.gather(-1, tokens)).squeeze(-1)


class _ReservedLayer(DynamicLayer):
    """Keys and values of a layer, with memory for all tokens to come. A step then copies its own tokens alone."""

    def __init__(self, capacity: int):
        super().__init__()
        self._capacity = capacity
        self._buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._reserve(key_states, value_states)
        else:
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[: len(states), :, start:end] = states
            self._show(len(key_states), end)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._reserve(*(states.repeat_interleave(repeats, 0) for states in (self.keys, self.values)))

    def batch_select_indices(self, indices: Tensor) -> None:
        length, places = self.get_seq_length(), (indices != torch.arange(len(indices))).nonzero().squeeze(-1)
        if len(places):
            to, origin = (each.to(self.device) for each in (places, indices[places]))
            for buffer in self._buffers:
                buffer[to, :, :length] = buffer[origin, :, :length]
        self._show(len(indices), length)

    def _reserve(self, *states: Tensor) -> None:
        """Keep keys and values, [rows, heads, tokens, size] each, with room behind them."""
        self._buffers = [each.new_empty(*each.shape[:2], self._capacity, each.shape[3]) for each in states]
        num_rows, _, length, _ = states[0].shape
        for buffer, each in zip(self._buffers, states, strict=True):
            buffer[:, :, :length] = each
        self._show(num_rows, length)

    def _show(self, num_rows: int, length: int) -> None:
        self.keys, self.values = (buffer[:num_rows, :, :length] for buffer in self._buffers)
