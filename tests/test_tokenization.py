"""Token ids by hand: a byte-level tokenizer without merges has one token per byte, so lengths can be counted."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from engine import tokenization
from engine.formats import MARK, Preferences, Tally
from engine.tokenization import Split, cut, encode_texts, token_prefix, tokenize
from utils import UserError

EOS = "<eos>"


def byte_tokenizer(template: str | None = None, num_merges: int = 0, chat_template: str | None = None):
    """A byte-level BPE with the special tokens <eos>, <s> and <|user|>; template: its post-processor, "<s> $A"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [EOS, "<s>", "<|user|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + num_merges,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the cat"] * 4, trainer)
    if template:
        ids = [(token, tokenizer.token_to_id(token)) for token in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token="<s>")
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>"]}, replace_extra_special_tokens=False)
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="module")
def plain():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def with_bos():
    return byte_tokenizer("<s> $A")


def pair(prompt: str, chosen: str, rejected: str, template: bool = False) -> Preferences:
    responses = [chosen, rejected]
    return {prompt: {"responses": responses, "pairs": [(0, 1)], "sft_target": chosen, "template": template}}


def run(data, tokenizer, tmp_path: Path, batch="pairs", mode="keep_end", max_length=512, max_prompt_length=256):
    data = [(preferences, mode) for preferences in (data if isinstance(data, list) else [data])]
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    return tokenize(data, tokenizer, batch, Tally(), cache_dir=tmp_path, **limits)


def texts(split: Split, tokenizer) -> list[tuple[str, ...]]:
    """Prompt and responses of each example; decode shows special tokens."""
    return [tuple(map(tokenizer.decode, (example.prompt, *example.responses))) for example in split.examples]


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


def test_each_distinct_text_is_encoded_once(plain, tmp_path, monkeypatch):
    seen: Counter[str] = Counter()

    def spy(chunk, *args, **kwargs):
        seen.update(chunk)
        return encode_texts(chunk, *args, **kwargs)

    monkeypatch.setattr(tokenization, "encode_texts", spy)
    monkeypatch.setattr(tokenization, "CHUNK_SIZE", 2)
    data: Preferences = {"p": {"responses": ["a", "b", "c"], "pairs": [(0, 1), (0, 2), (1, 2)], "sft_target": "a"}}
    split = run([data, pair("q", "a", "c")], plain, tmp_path)
    assert seen == {"p": 1, "a": 1, "b": 1, "c": 1, "q": 1}
    assert len(split.examples) == 4


@pytest.mark.parametrize("form", ["<s> $A", "<s> $A <eos>", "$A <eos>"])
def test_bos_follows_the_tokenizer_and_nothing_comes_behind_the_prompt(form, tmp_path):
    tokenizer = byte_tokenizer(form)
    bos = "<s>" if form.startswith("<s>") else ""
    assert tokenizer.decode(token_prefix(tokenizer)) == bos
    assert texts(run(pair("p", "a", "b"), tokenizer, tmp_path), tokenizer) == [(bos + "p", "a<eos>", "b<eos>")]


def test_special_tokens_in_text_are_plain_text(with_bos, tmp_path):
    (example,) = run(pair("<s> <|user|>", "a<eos>", "<eos>"), with_bos, tmp_path).examples
    special = set(with_bos.all_special_ids)
    assert [token in special for token in example.prompt] == [True] + [False] * len("<s> <|user|>")
    for response, text in zip(example.responses, ("a<eos>", "<eos>"), strict=True):
        assert [token in special for token in response] == [False] * len(text) + [True]
        assert with_bos.decode(response) == text + EOS


def test_special_tokens_that_are_words_of_the_vocabulary_stay_plain_text():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(
        ["<s> a"] * 9, trainers.BpeTrainer(special_tokens=["<s>", "</s>"], show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    assert fast.bos_token_id in fast("<s>", split_special_tokens=True)["input_ids"]  # this is why
    (ids,) = encode_texts(["<s> <s>"], fast, parse_special_tokens=False)
    assert fast.convert_ids_to_tokens(ids) == ["<", "s", ">", "<", "s", ">"]


def test_special_tokens_of_a_template_count_but_marked_ones_do_not(plain, tmp_path):
    prompt = f"<|user|><{MARK}|user|>hi"
    split = run([pair(prompt, "a<|user|>", "b", template=True), pair("<|user|>", "a", "b")], plain, tmp_path)
    user = plain.convert_tokens_to_ids("<|user|>")
    assert [int((example.prompt == user).sum()) for example in split.examples] == [1, 0]
    assert plain.decode(split.examples[0].prompt) == "<|user|><|user|>hi"
    assert len(split.examples[0].prompt) == 1 + len("<|user|>hi")
    assert split.examples[0].responses[0].tolist()[-2:] == [user, plain.eos_token_id]


def test_a_template_that_writes_bos_gets_no_second_one(with_bos, tmp_path):
    data = [pair("<s>p", "a", "b", template=True), pair("p", "a", "b", template=True)]
    assert [text[0] for text in texts(run(data, with_bos, tmp_path), with_bos)] == ["<s>p", "<s>p"]


def test_merges_do_not_cross_from_prompt_to_response(tmp_path):
    tokenizer = byte_tokenizer(num_merges=20)
    assert len(tokenizer("the")["input_ids"]) == 1
    (example,) = run(pair("t", "he", "x"), tokenizer, tmp_path).examples
    assert (len(example.prompt), len(example.responses[0])) == (1, 2 + ("he" not in tokenizer.get_vocab()))


# ---- Truncation ----


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
        (14, 13, "keep_end", ("0123456789", "abcd", "xy<eos>")),  # a prompt below max_prompt_length stays whole
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
    data = pair("<s>0123456789", "abcd", "xy", template=True)
    split = run(data, plain, tmp_path, max_length=15, max_prompt_length=4)
    assert texts(split, plain) == [("<s>789", "abcd<eos>", "xy<eos>")]


def test_sft_truncation_looks_at_the_target_only(plain, tmp_path):
    data: Preferences = {"0123": {"responses": ["ab", "abcdefgh"], "pairs": [(0, 1)], "sft_target": "ab"}}
    split = run(data, plain, tmp_path, batch="sft", max_length=7, max_prompt_length=2)
    assert texts(split, plain) == [("0123", "ab<eos>")]
    assert split.counts["truncated"] == 0


def test_cut_leaves_what_fits():
    prompt, responses = np.arange(5), (np.arange(3), np.arange(2))
    same = cut(prompt, responses, 8, 1, num_front=0)
    assert same[0] is prompt and same[1] is responses


# ---- Drops ----


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("", "b", "empty response"),
        ("a", " \n", "empty response"),
        ("a", "a", "chosen equal to rejected"),
        ("abcdefg1", "abcdefg2", "chosen equal to rejected as tokens"),
    ],
)
def test_pairs_that_cannot_train_are_dropped(plain, tmp_path, chosen, rejected, reason):
    data = {**pair("p", chosen, rejected), **pair("q", "a", "b")}
    split = run(data, plain, tmp_path, max_length=6, max_prompt_length=2)
    assert split.counts["dropped"] == {reason: 1}
    assert [plain.decode(example.prompt) for example in split.examples] == ["q"]


def test_a_prompt_that_leaves_no_room_is_dropped(plain, tmp_path):
    data = {**pair("0123", "a", "b"), **pair("0", "a", "b")}
    split = run(data, plain, tmp_path, max_length=4, max_prompt_length=4)
    assert split.counts["dropped"] == {"no response tokens left": 1}
    assert len(split.examples) == 1


def test_an_empty_prompt_needs_bos(plain, with_bos, tmp_path):
    split = run(pair("", "a", "b"), plain, tmp_path)
    assert list(split.counts["dropped"]) == ["empty prompt, so nothing to predict the first token from"]
    assert texts(run(pair("", "a", "b"), with_bos, tmp_path), with_bos) == [("<s>", "a<eos>", "b<eos>")]


def test_a_prompt_without_pairs_is_for_sft_only(plain, tmp_path):
    data: Preferences = {"p": {"responses": ["a"], "pairs": [], "sft_target": "a"}}
    assert run(data, plain, tmp_path).counts["dropped"] == {"prompt without a pair": 1}
    assert run(data, plain, tmp_path, batch="sft").counts["dropped"] == {}


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"error\[CONFIG\] the tokenizer has no end-of-text token"):
        run(pair("p", "a", "b"), tokenizer, tmp_path)


# ---- Cache ----


@pytest.fixture
def num_encoded(monkeypatch) -> Counter[str]:
    """Counts calls of the encoder."""
    calls: Counter[str] = Counter()

    def spy(*args, **kwargs):
        calls["encode"] += 1
        return encode_texts(*args, **kwargs)

    monkeypatch.setattr(tokenization, "encode_texts", spy)
    return calls


def test_the_cache_gives_the_same_and_encodes_nothing(plain, tmp_path, num_encoded):
    data = pair("p", "a", "b")
    first, second = (texts(run(data, plain, tmp_path), plain) for _ in range(2))
    assert first == second == [("p", "a<eos>", "b<eos>")]
    run(data, plain, tmp_path, max_length=4, max_prompt_length=2)  # the lengths are applied after the cache
    assert num_encoded["encode"] == 1
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] == [".safetensors"]


def test_the_cache_tells_texts_tokenizers_and_templates_apart(plain, with_bos, tmp_path, num_encoded):
    run(pair("p", "a", "b"), plain, tmp_path)
    run(pair("p", "a", "c"), plain, tmp_path)
    run(pair("pa", "", "c") | pair("p", "a", "d"), plain, tmp_path)
    run(pair("p", "a", "b"), with_bos, tmp_path)
    run(pair("p", "a", "b"), byte_tokenizer(num_merges=2), tmp_path)
    run(pair("p", "a", "b", template=True), plain, tmp_path)
    assert num_encoded["encode"] == len(list((tmp_path / "tokens").iterdir())) == 6


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_cache_is_built_again(plain, tmp_path, num_encoded, damage):
    data = pair("p", "a", "b")
    run(data, plain, tmp_path)
    (path,) = (tmp_path / "tokens").iterdir()
    good = path.read_bytes()
    flipped = good[:-5] + bytes([good[-5] ^ 1]) + good[-4:]
    path.write_bytes({"flip": flipped, "cut": good[:-5], "empty": b"", "other": b"x" * 100}[damage])
    assert texts(run(data, plain, tmp_path), plain) == [("p", "a<eos>", "b<eos>")]
    assert num_encoded["encode"] == 2
    assert path.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_told(plain, tmp_path):
    (tmp_path / "tokens").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"error\[STORAGE\] cache_dir: .* cannot be written"):
        run(pair("p", "a", "b"), plain, tmp_path)
