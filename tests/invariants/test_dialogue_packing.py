"""A dialogue in one example gives the losses, gradients and metrics of one example per turn."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

import engine.step.attention
import engine.step.logprobs
from engine.data.dialogues import Turn, count_turns, split_turns
from engine.data.examples import Example
from engine.run.workload import Work
from engine.settings.schema import LossSettings
from engine.step.layout import lay_out, num_fed_tokens
from engine.step.packing_check import use_packed_attention
from engine.step.splitting import split_batch, split_for_ranks
from tests.invariants.batches import run_batch
from tests.invariants.test_packing import ARCHITECTURES, assert_same, make_logits_twice
from tests.models import VOCABULARY, exact_norms, random_examples, tiny_model

LOSS = LossSettings(name="sft", keywords={})
EOS = 1


def dialogue(lengths: Sequence[tuple[int, int]], index: int, weight: float = 1.0) -> Example:
    """A dialogue of random tokens.

    Args:
        lengths: of each turn: tokens before its response, and of its response with EOS.
    """
    rng = np.random.default_rng(index)
    trunk, turns = np.empty(0, np.int32), list[Turn]()
    for num_before, num_response in lengths:
        prompt = np.concatenate([trunk, rng.integers(2, VOCABULARY, num_before, dtype=np.int32)])
        said = rng.integers(2, VOCABULARY, num_response - 1, dtype=np.int32)
        turns.append(Turn(len(prompt), np.append(said, np.int32(EOS)), weight / (1 + len(turns))))
        trunk = np.concatenate([prompt, said])
    last = turns.pop()
    return Example(trunk[: last.num_prompt], (last.response,), index, weight=last.weight, turns=tuple(turns))


def mixed_examples() -> list[Example]:
    """Dialogues and single turns. Some turns have one token, or one token between them; one dialogue is there twice,
    and one shares its last prompt with a single turn."""
    first = dialogue([(5, 4), (3, 6), (1, 2), (7, 3)], 0)
    single = random_examples([(6, 5), (4, 1)], seed=3)
    sibling = replace(random_examples([(1, 4)], seed=4)[0], prompt=first.prompt)
    return [first, *single, dialogue([(1, 1), (1, 1), (2, 9)], 1, weight=3.0), first, sibling]


def one_example_per_turn(examples: Sequence[Example]) -> list[Example]:
    return [turn for example in examples for turn in split_turns(example)]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dialogue_is_its_turns(architecture: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact_norms(tiny_model(architecture, torch.float64))
    if layout == "packed":
        use_packed_attention(model)
    examples = mixed_examples()
    single = one_example_per_turn(examples)
    assert len(single) == count_turns(examples) == 4 + 2 + 3 + 4 + 1
    truth, logged, _ = run_batch(LOSS, model, [[each] for each in single], layout)

    def check(microbatches: Sequence[list[Example]]) -> None:
        found, metrics, _ = run_batch(LOSS, model, microbatches, layout)
        assert_same(found, truth, torch.float64)
        assert metrics == pytest.approx(logged, rel=1e-12)

    check([examples])
    check([single])
    for parts, budget in [(2, 10**6), (3, 25), (1, 1)]:
        check(split_batch(examples, parts, budget, layout))
    monkeypatch.setattr(engine.step.attention, "BLOCK", 3)  # several query tiles
    make_logits_twice(monkeypatch)
    check([examples])
    if layout == "packed":
        model.set_attn_implementation("packed_dense")
        check([examples])


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_dialogue_feeds_its_tokens_once(layout: str) -> None:
    """Six turns of like length: one example per turn feeds them three and a half times."""
    example = dialogue([(20, 21)] * 6, 0)
    num_of_dialogue = len(example.prompt) + len(example.responses[0])
    batch, single = (lay_out(examples, layout) for examples in ([example], one_example_per_turn([example])))
    assert batch.num_tokens == num_fed_tokens(example, layout) == num_of_dialogue - (layout == "packed")
    assert single.num_tokens / batch.num_tokens == pytest.approx(3.5, rel=0.05)
    assert sorted(batch.targets.tolist()) == sorted(single.targets.tolist())
    assert batch.num_examples == single.num_examples == 6 and (batch.num_turns, single.num_turns) == (5, 0)
    assert Work.of([example], "packed").targets == len(batch.targets) == 6 * 21


def test_turns_of_other_places_do_not_share_a_row() -> None:
    """Two ways to divide the same tokens into turns would predict from the same positions."""
    example = dialogue([(5, 4), (3, 6), (2, 3)], 0)
    one, other = example.turns
    joined = Turn(one.num_prompt, np.append(example.prompt[one.num_prompt : other.num_prompt + 5], np.int32(EOS)))
    divided = replace(example, turns=(joined,))
    model = exact_norms(tiny_model("llama", torch.float64))
    use_packed_attention(model)
    examples = [example, divided]
    truth, _, _ = run_batch(LOSS, model, [[each] for each in one_example_per_turn(examples)])
    assert_same(run_batch(LOSS, model, [examples])[0], truth, torch.float64)


def test_ranks_know_the_place_of_their_losses() -> None:
    examples = mixed_examples()
    for part in split_for_ranks(3, examples, 1, 10**6):
        assert count_turns(part) == (lay_out(part).num_examples if part else 0)
