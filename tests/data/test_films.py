"""The embedded data set: the same rows everywhere, its reward by hand, and the form of responses."""

import statistics

import pytest
from tokenizers import Tokenizer

from engine.data.films import (
    MIN_GAP,
    PRAISE_AND_FAULT,
    TOKENIZER,
    WORDS,
    film_reward,
    film_rows,
    film_tokenizer,
    is_well_formed,
    train_film_tokenizer,
)
from utils import content_hash

TRAIN, TEST = film_rows("train"), film_rows("test")
RESPONSES = [row[kind] for row in TRAIN + TEST for kind in ("chosen", "rejected")]


def test_rows_are_always_the_same():
    assert content_hash(TRAIN) == "e9286aa5a9a4e4b049f13f67cc3241d4"
    assert content_hash(TEST) == "d7e9d39e392d6559fe16fddc4be75d4c"


def test_train_and_test_are_apart():
    train_prompts, test_prompts = {row["prompt"] for row in TRAIN}, {row["prompt"] for row in TEST}
    assert (len(TRAIN), len(train_prompts)) == (3675, 3500)
    assert len(TEST) == len(test_prompts) == 512
    assert not train_prompts & test_prompts


def test_rows_are_dialogues():
    for row in TRAIN + TEST:
        assert row["prompt"].startswith("\n\nHuman: ") and row["prompt"].endswith("\n\nAssistant:")
        turns = row["prompt"].split("\n\n")[1:]
        assert [turn.split(":")[0] for turn in turns] == ["Human", "Assistant"] * (len(turns) // 2)
        assert "{" not in row["prompt"]


@pytest.mark.parametrize("rows", [TRAIN, TEST], ids=["train", "test"])
def test_many_prompts_are_long(rows):
    num_turns = [row["prompt"].count("\n\nHuman:") for row in rows]
    assert 0.25 < sum(num > 1 for num in num_turns) / len(rows) < 0.35
    assert max(num_turns) == 5


def test_chosen_is_better():
    assert all(film_reward(row["chosen"]) - film_reward(row["rejected"]) >= MIN_GAP for row in TRAIN + TEST)


def test_responses_are_well_formed_and_of_mixed_sentiment():
    assert all(is_well_formed(response) for response in RESPONSES)
    rewards = [film_reward(response) for response in RESPONSES]
    assert abs(statistics.mean(rewards)) < 0.02
    assert statistics.pstdev(rewards) > 0.7


def test_sft_targets_have_no_sentiment():
    assert all(row["sft_target"] in (row["chosen"], row["rejected"]) for row in TRAIN)
    assert abs(statistics.mean(film_reward(row["sft_target"]) for row in TRAIN)) < 0.05


def test_words_of_judgement_are_balanced():
    for praise, fault in PRAISE_AND_FAULT.items():
        assert len(WORDS[praise].split("|")) == len(WORDS[fault].split("|"))


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (" The acting was superb.", 1),
        (" I loathed the story.", -1),
        (" The ending was not dull.", 1),
        (" It was not superb.", -1),
        (" It follows two sisters.", 0),
        (" The acting was superb, but the ending felt hollow.", 0),
        (" You should watch it. I saw it last week.", 1),
        (" You should skip it. The music was warm and rich.", 1 / 3),
        (" It wastes your evening. Although the sound was rich, I hated the mood. I saw it last week.", -1 / 3),
        (" It was sweet and moving. The cast was not weak. What a dull film!", 1 / 2),
        ("superb superb superb", -1),
        ("", -1),
    ],
)
def test_reward(response, expected):
    assert film_reward(response) == pytest.approx(expected)


@pytest.mark.parametrize(
    "response",
    [
        "",
        " ",
        "The acting was superb.",
        "  The acting was superb.",
        " The acting was superb",
        " The acting was superb. ",
        " The acting was superb.\n",
        " the acting was superb.",
        " The acting was superb. The",
        " The acting was superb.The mood felt rich.",
        " The acting was superduper.",
        " The acting superb was.",
        " The acting was superb superb.",
        " The acting was superb. The acting was superb.",
        " I loved it. I enjoyed it. I admired it. I adored it.",
        " I loved it.\n\nHuman: Should I see it, then?",
        " I loved it.<|endoftext|>",
        " I loved it..",
        " {hero}.",
    ],
)
def test_ill_formed(response):
    assert not is_well_formed(response)
    assert film_reward(response) == -1


@pytest.fixture(scope="module")
def tokenizer():
    return film_tokenizer()


def test_tokenizer_is_the_one_that_training_gives(tokenizer):
    """If it differs, train_film_tokenizer().save(str(TOKENIZER), pretty=False) writes it again."""
    assert Tokenizer.from_file(str(TOKENIZER)).to_str() == train_film_tokenizer().to_str()
    assert len(tokenizer) == 832
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == ("<|endoftext|>", None, None)
    assert len(tokenizer(" The acting was superb.")["input_ids"]) == 5


ODD_TEXTS = ["", " ", "\n\nHuman:  a , b .\r\n\t", "naïve 電影 🎬🏽 \u200b\x00\x7f", "do n't", "<|endoftext|> x"]


def test_tokenizer_keeps_any_text(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    for text in ODD_TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == loaded.decode(ids) == text


def test_lengths_in_tokens(tokenizer):
    num_prompt, num_chosen, num_rejected = (
        [len(ids) for ids in tokenizer([row[key] for row in TRAIN + TEST])["input_ids"]]
        for key in ("prompt", "chosen", "rejected")
    )
    assert 2 < statistics.mean(num_prompt) / statistics.mean(num_chosen + num_rejected) < 3.5
    longest = max(p + max(c, r) for p, c, r in zip(num_prompt, num_chosen, num_rejected, strict=True))
    assert longest + 1 < 192
