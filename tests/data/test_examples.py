"""Examples by hand: contents, truncation, and dropped ones."""

import numpy as np
import pytest

from engine.data.examples import fingerprint, truncate
from engine.data.preferences import Preferences
from tests.data.samples import pair, run, texts


def test_a_pair_is_prompt_and_responses_with_eos(plain, tmp_path):
    split = run(pair("Q: ", "yes", "no"), plain, tmp_path)
    assert texts(split, plain) == [("Q: ", "yes<eos>", "no<eos>")]
    (example,) = split.examples
    assert [array.dtype for array in (example.prompt, *example.responses)] == [np.int32] * 3
    assert example.responses[0][-1] == plain.eos_token_id
    assert split.counts == {
        "rows": 0, "prompts": 1, "pairs": 1, "dropped": {}, "truncated": 0, "max_length": 512,
    }  # fmt: skip


def test_sft_has_one_example_per_prompt_and_pairs_one_per_pair(plain, tmp_path):
    data: Preferences = {
        "p": {"responses": ["a", "b", "c"], "pairs": [(0, 1), (2, 0)], "sft_target": "c"},
        "q": {"responses": ["d", "e"], "pairs": [(1, 0)], "sft_target": "e"},
    }
    sft = run(data, plain, tmp_path, batch="sft")
    assert texts(sft, plain) == [("p", "c<eos>"), ("q", "e<eos>")]
    assert (sft.counts["prompts"], sft.counts["targets"]) == (2, 2)
    pairs = run(data, plain, tmp_path)
    assert texts(pairs, plain) == [("p", "a<eos>", "b<eos>"), ("p", "c<eos>", "a<eos>"), ("q", "e<eos>", "d<eos>")]
    assert [example.prompt_index for example in pairs.examples] == [0, 0, 1]
    assert (pairs.counts["prompts"], pairs.counts["pairs"]) == (2, 3)


def test_prompt_indices_are_unique_across_data_sets_and_dense(plain, tmp_path):
    data = [pair("p", "a", "b"), pair("p", "c", ""), pair("p", "d", "e")]
    split = run(data, plain, tmp_path)
    assert [example.prompt_index for example in split.examples] == [0, 1]
    assert split.counts["prompts"] == 2


@pytest.mark.parametrize(
    ("max_length", "max_prompt_length", "mode", "expected"),
    [
        # 0123456789 + abcd<eos>: 15 tokens; xy<eos> is 3.
        (15, 4, "keep_end", ("0123456789", "abcd<eos>", "xy<eos>")),
        (14, 4, "keep_end", ("6789", "abcd<eos>", "xy<eos>")),
        (14, 4, "keep_start", ("0123", "abcd<eos>", "xy<eos>")),
        (9, 4, "keep_end", ("6789", "abcd<eos>", "xy<eos>")),
        (8, 4, "keep_end", ("6789", "abcd", "xy<eos>")),  # the short response keeps its end
        (6, 4, "keep_start", ("0123", "ab", "xy")),
        (14, 13, "keep_end", ("0123456789", "abcd", "xy<eos>")),  # a prompt below max_prompt_length is not truncated
        (14, 10, "keep_end", ("0123456789", "abcd", "xy<eos>")),
        (14, 9, "keep_end", ("123456789", "abcd<eos>", "xy<eos>")),
    ],
)
def test_truncation(plain, tmp_path, max_length, max_prompt_length, mode, expected):
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    split = run(pair("0123456789", "abcd", "xy"), plain, tmp_path, mode=mode, **limits)
    assert texts(split, plain) == [expected]
    assert split.counts["truncated"] == (max_length < 15)


@pytest.mark.parametrize(("mode", "prompt"), [("keep_end", "<s>789"), ("keep_start", "<s>012")])
def test_bos_survives_truncation(with_bos, tmp_path, mode, prompt):
    split = run(pair("0123456789", "abcd", "xy"), with_bos, tmp_path, mode=mode, max_length=15, max_prompt_length=4)
    assert texts(split, with_bos) == [(prompt, "abcd<eos>", "xy<eos>")]


def test_bos_that_only_the_template_writes_survives_truncation(plain, tmp_path):
    data = pair("<s>0123456789", "abcd", "xy", from_template=True)
    split = run(data, plain, tmp_path, max_length=15, max_prompt_length=4)
    assert texts(split, plain) == [("<s>789", "abcd<eos>", "xy<eos>")]


def test_sft_truncation_depends_on_the_target_only(plain, tmp_path):
    data: Preferences = {"0123": {"responses": ["ab", "abcdefgh"], "pairs": [(0, 1)], "sft_target": "ab"}}
    split = run(data, plain, tmp_path, batch="sft", max_length=7, max_prompt_length=2)
    assert texts(split, plain) == [("0123", "ab<eos>")]
    assert split.counts["truncated"] == 0


def test_texts_that_fit_stay_as_they_are():
    prompt, responses = np.arange(5), (np.arange(3), np.arange(2))
    same = truncate(prompt, responses, 8, 1, num_front=0)
    assert same[0] is prompt and same[1] is responses


@pytest.mark.parametrize("num_front, kept", [(0, [3, 4]), (1, [0, 4]), (2, [0, 1]), (3, [0, 1])])
def test_a_truncated_prompt_is_never_longer_than_its_limit(num_front, kept):
    """Even if more first tokens should be kept: a template may begin with many."""
    prompt, (response,) = truncate(np.arange(5), (np.arange(6),), 7, 2, num_front=num_front)
    assert prompt.tolist() == kept and len(response) == 5


def test_repeated_and_contradicting_pairs_are_counted_and_kept(plain, tmp_path):
    pairs = [(0, 1), (0, 1), (1, 0), (0, 2)]
    data: Preferences = {"p": {"responses": ["a", "b", "c"], "pairs": pairs, "sft_target": "a"}}
    split = run(data, plain, tmp_path)
    letters = [("a", "b"), ("a", "b"), ("b", "a"), ("a", "c")]
    assert texts(split, plain) == [("p", f"{chosen}<eos>", f"{rejected}<eos>") for chosen, rejected in letters]
    assert (split.counts["duplicates"], split.counts["contradictions"], split.counts["dropped"]) == (1, 1, {})


def test_a_pair_gives_two_labelled_examples(plain, tmp_path):
    data: Preferences = {
        "p": {"responses": ["a", "b", "c"], "pairs": [(0, 1), (2, 0)], "sft_target": "c"},
        "q": {"responses": ["d"], "pairs": [], "sft_target": None, "labels": [(0, False)]},
        "r": {"responses": ["f", "f"], "pairs": [(0, 1)], "sft_target": "f", "labels": [(0, True)]},
        "s": {"responses": [" ", "e"], "pairs": [(0, 1)], "sft_target": "e"},
        "t": {"responses": ["e"], "pairs": [], "sft_target": "e"},
    }
    split = run(data, plain, tmp_path, batch="unpaired")
    assert texts(split, plain) == [
        ("p", "a<eos>"), ("p", "b<eos>"), ("p", "c<eos>"), ("p", "a<eos>"), ("q", "d<eos>"), ("r", "f<eos>"),
        ("s", "e<eos>"),
    ]  # fmt: skip
    assert [example.label for example in split.examples] == [True, False, True, False, False, True, False]
    assert [example.prompt_index for example in split.examples] == [0, 0, 0, 0, 1, 2, 3]
    assert (split.counts["examples"], split.counts["desirable"], split.counts["contradictions"]) == (7, 3, 1)
    reasons = ("chosen equal to rejected", "empty response", "prompt without a pair or a label")
    assert split.counts["dropped"] == dict.fromkeys(reasons, 1)


def test_repeated_labelled_responses_are_counted_and_kept(plain, tmp_path):
    labels = [(0, True), (1, True), (2, False), (3, False)]
    data: Preferences = {"p": {"responses": ["a", "a", "a", "b"], "pairs": [], "sft_target": "a", "labels": labels}}
    split = run(data, plain, tmp_path, batch="unpaired")
    assert len(split.examples) == 4
    assert (split.counts["duplicates"], split.counts["contradictions"]) == (1, 1)


def test_a_prompt_without_a_desirable_response_is_not_for_sft(plain, tmp_path):
    data: Preferences = {"p": {"responses": ["a"], "pairs": [], "sft_target": None, "labels": [(0, False)]}}
    assert run(data, plain, tmp_path, batch="sft").counts["dropped"] == {"prompt without a desirable response": 1}


def test_labels_change_the_fingerprint_and_not_the_tokens(plain, tmp_path):
    def labelled(label: bool) -> Preferences:
        return {"p": {"responses": ["a"], "pairs": [], "sft_target": None, "labels": [(0, label)]}}

    splits = [run(labelled(label), plain, tmp_path, batch="unpaired") for label in (True, False)]
    assert fingerprint(splits[0].examples) != fingerprint(splits[1].examples)
    assert len([*(tmp_path / "tokens").glob("[!.]*")]) == 1


def test_repeated_demonstrations_are_learned_once(plain, tmp_path):
    data: Preferences = {"p": {"responses": [], "pairs": [], "sft_target": "b", "demonstrations": ["a", "b", "a"]}}
    split = run(data, plain, tmp_path, batch="sft")
    assert texts(split, plain) == [("p", "a<eos>"), ("p", "b<eos>")]
    assert split.counts["dropped"] == {"duplicate response": 1}


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("", "b", "empty response"),
        ("a", " \n", "empty response"),
        ("a", "a", "chosen equal to rejected"),
        ("abcdefg1", "abcdefg2", "chosen equal to rejected as tokens"),
    ],
)
def test_useless_pairs_are_dropped(plain, tmp_path, chosen, rejected, reason):
    data = {**pair("p", chosen, rejected), **pair("q", "a", "b")}
    split = run(data, plain, tmp_path, max_length=6, max_prompt_length=2)
    assert split.counts["dropped"] == {reason: 1}
    assert [plain.decode(example.prompt) for example in split.examples] == ["q"]


def test_a_prompt_without_room_for_a_response_is_dropped(plain, tmp_path):
    data = {**pair("0123", "a", "b"), **pair("0", "a", "b")}
    split = run(data, plain, tmp_path, max_length=4, max_prompt_length=4)
    assert split.counts["dropped"] == {"no response tokens left": 1}
    assert len(split.examples) == 1


def test_an_empty_prompt_needs_bos(plain, with_bos, tmp_path):
    split = run(pair("", "a", "b"), plain, tmp_path)
    assert list(split.counts["dropped"]) == ["empty prompt (no token predicts the first of the response)"]
    assert texts(run(pair("", "a", "b"), with_bos, tmp_path), with_bos) == [("<s>", "a<eos>", "b<eos>")]


def test_a_prompt_without_pairs_is_for_sft_only(plain, tmp_path):
    data: Preferences = {"p": {"responses": ["a"], "pairs": [], "sft_target": "a"}}
    assert run(data, plain, tmp_path).counts["dropped"] == {"prompt without a pair": 1}
    assert run(data, plain, tmp_path, batch="sft").counts["dropped"] == {}
