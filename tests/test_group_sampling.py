"""Groups of sampled responses: independent of their batch, drawn from the model."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from engine.models.group_sampling import Sampling, _choose, sample_groups, seeded_uniforms
from engine.step.packing_check import use_packed_attention
from tests.models import SIZES, VOCABULARY, random_examples, tiny_model
from tests.quick import slow_except

LENGTHS = (4, 9, 1, 6)


def sampling(**settings):
    defaults = {"num_samples": 4, "max_new_tokens": 24, "max_length": 100, "eos_token_id": 1, "pad_token_id": 0}
    return Sampling(**{**defaults, **settings})


def prompts_of(*lengths):
    return [example.prompt for example in random_examples([(length, 1) for length in lengths])]


def uniforms(prompt, sample):
    return seeded_uniforms([0, prompt, sample], 24)


def as_lists(groups):
    return [[response.tolist() for response in group] for group in groups]


def reference_samples(model, prompt, numbers, eos):
    """A response by full forward passes, without a cache."""
    tokens = torch.from_numpy(prompt.astype(np.int64))
    response = []
    for number in numbers:
        with torch.no_grad():
            probs = model(tokens[None]).logits[0, -1].double().softmax(-1)
        token = int((probs.cumsum(-1) <= number * probs.sum()).sum())
        response.append(token)
        if token == eos:
            break
        tokens = torch.cat([tokens, torch.tensor([token])])
    return response


@pytest.mark.parametrize(
    "architecture, max_rows",
    slow_except(
        itertools.product(SIZES, (1, 3, 6, 100)),
        *[("gpt2", 1), ("gpt_neox", 3), ("llama", 3), ("qwen2", 6), ("mistral", 100)],
    ),
)
def test_a_response_does_not_depend_on_its_batch(architecture, max_rows):
    model = tiny_model(architecture, torch.float64)
    prompts = prompts_of(*LENGTHS)
    endless = as_lists(sample_groups(model, prompts, uniforms, sampling(eos_token_id=-1)))
    counts = Counter(token for group in endless for response in group for token in response)
    eos = counts.most_common(1)[0][0]  # so that responses end at many lengths
    found = as_lists(sample_groups(model, prompts, uniforms, sampling(eos_token_id=eos, max_rows=max_rows)))
    assert found == [
        [reference_samples(model, prompt, uniforms(index, sample), eos) for sample in range(4)]
        for index, prompt in enumerate(prompts)
    ]
    ended = [response[-1] == eos for group in found for response in group]
    assert any(ended)
    assert len({len(response) for group in found for response in group}) > 3


def test_sampling_leaves_the_model_and_the_generator_alone():
    model = tiny_model("llama")
    use_packed_attention(model)
    model.train()
    state = torch.random.get_rng_state()
    sample_groups(model, prompts_of(4), uniforms, sampling())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and model.config._attn_implementation == "packed"


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_are_drawn_from_the_model(temperature):
    """First tokens of many responses match the model's probabilities."""
    model, (prompt,) = tiny_model("gpt2"), prompts_of(5)
    settings = sampling(num_samples=4000, max_new_tokens=1, temperature=temperature, max_rows=4000)
    ((*responses,),) = sample_groups(model, [prompt], lambda _, sample: seeded_uniforms([1, sample], 1), settings)
    with torch.no_grad():
        logits = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1]
    counts = np.bincount([response[0] for response in responses], minlength=VOCABULARY) / 4000
    assert np.abs(counts - (logits / temperature).softmax(-1).numpy()).max() < 0.03
    assert len({response[0] for response in responses}) > 3


def test_the_most_likely_tokens_alone_are_sampled():
    """By hand: of 0.15, 0.5, 0.05, 0.3 the top 0.7 are the second and the fourth, at 5/8 and 3/8."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64).log()
    numbers = torch.tensor([0.0, 0.62, 0.63, 0.99], dtype=torch.float64)
    assert _choose(logits.expand(4, -1), numbers, 1.0, top_p=0.7).tolist() == [1, 1, 3, 3]
    assert _choose(logits.expand(4, -1), numbers, 1.0, top_p=1e-9).tolist() == [1, 1, 1, 1]
    assert _choose(logits.expand(4, -1), numbers, 1.0).tolist() == [0, 1, 1, 3]


def test_temperature_0_takes_the_most_likely_token():
    model, (prompt,) = tiny_model("llama"), prompts_of(5)
    settings = sampling(num_samples=2, max_new_tokens=1, temperature=0)
    with torch.no_grad():
        best = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1].argmax().item()
    assert as_lists(sample_groups(model, [prompt], uniforms, settings)) == [[[best], [best]]]


def test_prompt_and_response_keep_within_max_length():
    groups = sample_groups(tiny_model("llama"), prompts_of(4, 9), uniforms, sampling(max_length=11, eos_token_id=-1))
    assert [{len(response) for response in group} for group in groups] == [{7}, {2}]


def test_rows_at_max_length_wait_within_the_learned_positions():
    """One of 16 rows is as long as the model can read, and too few to leave."""
    model = tiny_model("gpt2", max_position_embeddings=32)
    prompts = prompts_of(16, *[4] * 15)
    settings = sampling(num_samples=2, max_length=32, eos_token_id=-1)
    groups = sample_groups(model, prompts, uniforms, settings)
    assert [len(group[0]) for group in groups] == [16, *[24] * 15]


def test_no_more_rows_at_a_time_than_asked_for():
    model, rows = tiny_model("llama"), []
    model.register_forward_pre_hook(lambda model, inputs: rows.append(len(inputs[0])))
    sample_groups(model, prompts_of(4, 5, 6), uniforms, sampling(num_samples=5, max_rows=2, max_new_tokens=3))
    assert max(rows) == 2


def test_random_numbers_of_a_seed():
    assert np.array_equal(seeded_uniforms([1, 2], 3), seeded_uniforms([1, 2], 5)[:3])
    assert not np.array_equal(seeded_uniforms([1, 2], 3), seeded_uniforms([2, 1], 3))
