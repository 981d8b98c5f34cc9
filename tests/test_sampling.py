"""Sampling with a KV cache in left-padded batches, beside the distribution that it should draw from."""

import numpy as np
import torch

from engine.attention import attention_of
from engine.models import use_packed_attention
from engine.sampling import sample_responses
from tests.models import VOCABULARY, random_examples, tiny_model


class Tokens:
    pad_token_id = 0
    eos_token_id = 1


def sample(model, prompts, seed=0, batch_size=3, max_new_tokens=6):
    return sample_responses(
        model,
        Tokens(),
        prompts,
        max_new_tokens=max_new_tokens,
        max_length=100,
        batch_size=batch_size,
        seed=seed,
    )


def test_samples_follow_the_seed_and_leave_the_generator_alone() -> None:
    model = tiny_model("llama")
    use_packed_attention(model)
    model.train()
    prompts = [example.prompt for example in random_examples([(4, 1), (9, 1), (1, 1), (6, 1)])]
    state = torch.random.get_rng_state()
    first = sample(model, prompts)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and model.config._attn_implementation == "packed"
    assert [answer.tolist() for answer in sample(model, prompts)] == [answer.tolist() for answer in first]
    assert [answer.tolist() for answer in sample(model, prompts, seed=1)] != [answer.tolist() for answer in first]
    for answer in first:
        assert 1 <= len(answer) <= 6 and answer.dtype == np.int32
        assert 1 not in answer[:-1]  # nothing after the end of the text


def test_samples_are_drawn_from_the_model() -> None:
    """First tokens of many answers against the model's probabilities, prompts of two lengths in each batch."""
    model = tiny_model("gpt_neox")
    prompts = [example.prompt for example in random_examples([(3, 1), (8, 1)])]
    answers = sample(model, prompts * 1500, batch_size=1000, max_new_tokens=1)
    for index, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1]
        counts = np.bincount([answer[0] for answer in answers[index::2]], minlength=VOCABULARY) / 1500
        assert np.abs(counts - logits.softmax(-1).numpy()).sum() < 0.2


def test_attention_of_restores_what_was() -> None:
    model = tiny_model("llama")
    use_packed_attention(model)
    with attention_of(model, "sdpa"):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "packed"


def test_the_models_own_generation_settings_are_left_out() -> None:
    """A repetition penalty, as some published models have, would not sample from the policy."""
    model = tiny_model("llama")
    prompts = [example.prompt for example in random_examples([(4, 1), (9, 1)])]
    plain = [answer.tolist() for answer in sample(model, prompts, max_new_tokens=20)]
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_p = 0.5
    assert [answer.tolist() for answer in sample(model, prompts, max_new_tokens=20)] == plain
    assert model.generation_config.min_p == 0.5
