"""Dialogues of several learned responses: which turns become one example, and what is counted."""

import json

import numpy as np
import pytest

import preference_datasets
from engine.data.dialogues import split_turns
from engine.data.example_table import ExampleTable
from engine.data.examples import fingerprint
from engine.step.layout import fed_tokens, num_fed_tokens
from preference_datasets import format_counts, load_split, num_shared_prompts
from tests.configs import make_settings
from tests.data.samples import CHATML, assistant, byte_tokenizer, user, write

SETTINGS = make_settings("loss=sft")
# Shortens earlier responses, as some templates leave out their thoughts.
FORGETFUL = (
    "{% for m in messages %}{% set is_whole = loop.last or m['role'] == 'user' %}"
    "{{ '<|user|>' + (m['content'] if is_whole else m['content'][:1]) + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|user|>' }}{% endif %}"
)


def turns(*texts):
    return {"messages": [(user, assistant)[index % 2](text) for index, text in enumerate(texts)]}


def load(tmp_path, rows, tokenizer, split="train", **options):
    values = {"datasets": [str(write(tmp_path / "rows.jsonl", rows))], "cache_dir": str(tmp_path / "cache")}
    limits = {"max_length": 512, "max_prompt_length": 256, "test_fraction": 0}
    return load_split(SETTINGS.model_copy(update=values | limits | options), tokenizer, split, "sft")


def learned(split, tokenizer):
    """Of each example: the prompt and the response of each of its turns."""
    return [
        [(tokenizer.decode(turn.prompt), tokenizer.decode(turn.responses[0])) for turn in split_turns(example)]
        for example in split.examples
    ]


@pytest.mark.parametrize("chat_template", ["hh", "llama2", "chatml", None])
@pytest.mark.parametrize("prefix", [None, "<s> $A"])
def test_a_dialogue_is_one_example(tmp_path, chat_template, prefix):
    tokenizer = byte_tokenizer(prefix, 20, CHATML)
    rows = [turns("hi", "yes?", "so", "a", "the cat", "sat on the mat"), turns("one", "two")]
    split = load(tmp_path, rows, tokenizer, chat_template=chat_template)
    first, single = split.examples
    assert len(first.turns) == 2 and not single.turns
    said, how = [message["content"] for message in rows[0]["messages"]], {"chat_template": chat_template}
    apart = [load(tmp_path, [turns(*said[:end])], tokenizer, sft_turns="last", **how).examples[0] for end in (2, 4, 6)]
    for turn, alone in zip(split_turns(first), apart, strict=True):
        assert turn.prompt.tolist() == alone.prompt.tolist()
        assert turn.responses[0].tolist() == alone.responses[0].tolist()
        assert turn.responses[0][-1] == tokenizer.eos_token_id and turn.weight == 1
    assert num_fed_tokens(first) == num_fed_tokens(apart[-1])
    assert fed_tokens(split.examples).tolist() == [*map(num_fed_tokens, split.examples)]
    assert (split.counts["rows"], split.counts["prompts"], split.counts["targets"]) == (2, 4, 4)
    assert format_counts(split.counts) == "2 rows, 4 prompts, 4 targets in 2 examples"
    assert split.sizes == [2]


def test_turns_of_a_rewritten_history_stay_apart(tmp_path):
    tokenizer = byte_tokenizer(chat_template=FORGETFUL)
    split = load(tmp_path, [turns("hi", "yes?", "so", "a", "b", "c")], tokenizer)
    first, second = "<|user|>hi<eos><|user|>", "<|user|>hi<eos><|user|>y<eos><|user|>so<eos><|user|>"
    assert learned(split, tokenizer) == [
        [(first, "yes?<eos>")],
        [(second, "a<eos>"), (f"{second}a<eos><|user|>b<eos><|user|>", "c<eos>")],  # "a" is no longer when shortened
    ]
    assert format_counts(split.counts) == "1 rows, 3 prompts, 3 targets in 2 examples"


def test_turns_merged_with_their_successor_stay_apart(tmp_path):
    """A token over the border of a response and the next message is not the response's last token."""
    tokenizer = byte_tokenizer(num_merges=1, text="a\n\n\nb")
    rows = [turns("hi", "yes\n", "so", "a", "b", "c")]
    split = load(tmp_path, rows, tokenizer, chat_template="hh")
    assert [len(each) for each in learned(split, tokenizer)] == [1, 2]
    assert [len(each) for each in learned(load(tmp_path, rows, byte_tokenizer(), chat_template="hh"), tokenizer)] == [3]


def test_truncated_turns_stay_apart(tmp_path, plain):
    rows = [turns("hi", "yes?", "so", "a", "and a long question", "a response", "and", "b")]
    split = load(tmp_path, rows, plain, chat_template="hh", max_length=70, max_prompt_length=60)
    assert [len(each) for each in learned(split, plain)] == [2, 1, 1]
    assert format_counts(split.counts) == (
        "1 rows, 4 prompts, 4 targets in 3 examples, 2 targets of them truncated to max_length=70"
    )
    split = load(tmp_path, rows, plain, chat_template="hh", max_length=40, max_prompt_length=8)
    assert [len(each) for each in learned(split, plain)] == [1] * 4


def test_dialogues_with_a_common_beginning_learn_it_once(tmp_path, plain):
    rows = [turns("hi", "a", "so", "b"), turns("hi", "a", "so", "c", "d", "e"), turns("hi", "x", "so", "b")]
    split = load(tmp_path, rows, plain, chat_template="hh")
    hi, so = "\n\nHuman: hi\n\nAssistant:", "\n\nHuman: so\n\nAssistant:"
    found = {tuple(response for _, response in each): each for each in learned(split, plain)}
    assert {*found} == {(" a<eos>", " b<eos>"), (" c<eos>", " e<eos>"), (" x<eos>", " b<eos>")}
    assert found[" x<eos>", " b<eos>"] == [(hi, " x<eos>"), (f"{hi} x{so}", " b<eos>")]
    assert split.counts["dropped"] == {"duplicate response": 1}
    assert (split.counts["prompts"], split.counts["targets"], split.counts["joined"]) == (4, 6, 3)
    assert split.sizes == [3]


def test_an_empty_response_divides_a_dialogue(tmp_path, plain):
    rows = [turns("hi", "a", "so", "b", "c", " ", "d", "e", "f", "g")]
    split = load(tmp_path, rows, plain, chat_template="hh")
    assert [[response for _, response in each] for each in learned(split, plain)] == [
        [" a<eos>", " b<eos>"],
        [" e<eos>", " g<eos>"],
    ]
    assert split.counts["dropped"] == {"empty response": 1}


def test_only_the_last_response_has_no_turns(tmp_path, plain):
    split = load(tmp_path, [turns("hi", "a", "so", "b")], plain, chat_template="hh", sft_turns="last")
    assert [len(each) for each in learned(split, plain)] == [1]
    assert format_counts(split.counts) == "1 rows, 1 prompts, 1 targets"


def test_a_stored_split_keeps_turns_and_weights(tmp_path, plain, monkeypatch):
    rows = [turns("hi", "a", "so", "b", "c", "d") | {"weight": 0.5}, turns("e", "f"), turns("g", "h", "i", "j")]
    first = load(tmp_path, rows, plain, chat_template="hh")
    monkeypatch.setattr(preference_datasets, "_read_split", None)  # the second load reads no rows
    second = load(tmp_path, rows, plain, chat_template="hh")
    assert isinstance(second.examples, ExampleTable) and second.examples.turns is not None
    assert not second.examples.turns.columns["start_0"].flags.owndata
    assert learned(first, plain) == learned(second, plain)
    assert [[turn.weight for turn in split_turns(each)] for each in second.examples] == [[0.5] * 3, [1.0], [1.0] * 2]
    assert fingerprint(first.examples) == fingerprint(second.examples) == fingerprint([*second.examples])
    assert (first.counts, first.sizes) == (second.counts, second.sizes)
    assert all(turn.response.dtype == np.int32 for each in second.examples for turn in each.turns)


def test_the_fingerprint_knows_the_turns(tmp_path, plain):
    rows = [turns("hi", "a", "so", "b")]
    prints = {
        load(tmp_path, each, plain, chat_template="hh", **options).examples.fingerprint
        for each, options in ((rows, {}), (rows, {"sft_turns": "last"}), ([rows[0] | {"weight": 2}], {}))
    }
    assert len(prints) == 3


def test_a_dialogue_is_in_one_split(tmp_path, plain):
    rows = [turns(f"hi {index}", "a", "so", "b") for index in range(20)]
    train, test = (
        load(tmp_path, rows, plain, split, chat_template="hh", test_fraction=0.25) for split in ("train", "test")
    )
    assert (len(train.examples), len(test.examples)) == (15, 5)
    assert all(len(each.turns) == 1 for split in (train, test) for each in split.examples)
    assert num_shared_prompts(train, test) == (0, 10)
    assert num_shared_prompts(train, train) == (30, 30)


def test_each_data_set_has_its_own_dialogues(tmp_path, plain):
    """Equal dialogues of two data sets are two examples, counted with their data set."""
    paths = []
    for index, rows in enumerate(([turns("hi", "a", "so", "b")], [turns("x", "y"), turns("hi", "a", "so", "b")])):
        paths.append(str(tmp_path / f"{index}.jsonl"))
        (tmp_path / f"{index}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"datasets": paths, "cache_dir": str(tmp_path / "cache"), "test_fraction": 0, "chat_template": "hh"}
    split = load_split(SETTINGS.model_copy(update=values), plain, "train", "sft")
    assert split.sizes == [1, 2] and [len(each) for each in learned(split, plain)] == [2, 1, 2]
