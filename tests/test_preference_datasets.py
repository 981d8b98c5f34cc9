"""The named data sets by hand, and a split from settings to its counts."""

import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from engine.data import html as html_module
from engine.data.dialogues import split_turns
from engine.data.forms import PROMPTS_DIFFER
from engine.data.row_sources import RowSource
from engine.data.rows import RowCounts
from preference_datasets import DATASETS, chat_form, format_counts, ground_truth_reward, load_split
from tests.data.samples import HH_START, byte_tokenizer, load_named, se, shp, write
from utils import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


# ---- Loaders ----


def test_hh(tmp_path):
    rows = [
        {"chosen": HH_START + " good", "rejected": HH_START + " bad"},
        {"chosen": HH_START + " better", "rejected": HH_START + " worse"},
        {"chosen": HH_START + " x", "rejected": "\n\nHuman: hi\n\nAssistant: y"},
        {"chosen": HH_START + " x", "rejected": "no turn"},
    ]
    preferences, counts = load_named("hh", rows, tmp_path)
    responses = [" good", " bad", " better", " worse"]
    assert preferences == {HH_START: {"responses": responses, "pairs": [(0, 1), (2, 3)], "sft_target": " better"}}
    assert (counts.rows, counts.dropped) == (4, {PROMPTS_DIFFER: 2})


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": HH_START}, "field 'rejected' is missing"),
        ({"chosen": HH_START, "rejected": 5}, "field 'rejected' is a number, not text"),
        ({"chosen": "no turn", "rejected": HH_START}, "field 'chosen' has no '\\n\\nAssistant:' turn"),
    ],
)
def test_malformed_hh(tmp_path, row, problem):
    good = {"chosen": HH_START + " a", "rejected": HH_START + " b"}
    with pytest.raises(UserError) as error:
        load_named("hh", [good] * 16 + [row], tmp_path)
    assert str(error.value).startswith(f"error[DATA] {tmp_path}/hh/train.jsonl.gz line 17: {problem}; fix: ")
    assert error.value.exit_status == 3


def test_shp(tmp_path):
    rows = [
        shp((4, 2), 1, "ab"),
        shp((3, 10), 0, "cd"),
        shp((9, 4), 1, "ef"),
        shp((3, 2), 1, history="ratio 1.5 only"),
    ]
    preferences, counts = load_named("shp", rows, tmp_path)
    responses = [" a", " b", " c", " d", " e", " f"]
    pairs = [(0, 1), (3, 2), (4, 5)]
    assert preferences == {"\n\nHuman: q\n\nAssistant:": {"responses": responses, "pairs": pairs, "sft_target": " d"}}
    assert (counts.rows, counts.dropped) == (4, {"score ratio below 2": 1})


@pytest.mark.parametrize(
    ("scores", "kept"), [((5, 0), True), ((0, 5), True), ((0, 0), False), ((5, -1), False), ((-4, -2), False)]
)
def test_shp_scores_without_a_ratio(tmp_path, scores, kept):
    assert len(load_named("shp", [shp(scores, int(scores[0] > scores[1]))], tmp_path)[0]) == kept


@pytest.mark.parametrize(("label", "problem"), [(2, "is 2, not 1"), ("1", "is text, not a number"), (None, "is null")])
def test_malformed_shp(tmp_path, label, problem):
    with pytest.raises(UserError, match=rf"shp/train\.jsonl\.gz line 1: field 'labels' {problem}"):
        load_named("shp", [shp((4, 2), label)], tmp_path)


def test_se(tmp_path):
    rows = [
        se("<p>why</p>", ("<p>a</p>", 1), ("<p>b</p>", 5), ("<p>c</p>", 1)),
        se("<p>one</p>", ("<p>d</p>", -1)),
        se("<p>none</p>"),
    ]
    write(tmp_path / "se" / "test.jsonl", rows)  # train keeps all rows
    preferences, counts = load_named("se", rows, tmp_path)
    assert preferences == {
        "\n\nHuman: why\n\nAssistant:": {
            "responses": [" a", " b", " c"], "pairs": [(1, 0), (1, 2)], "sft_target": " b",
        },
        "\n\nHuman: one\n\nAssistant:": {"responses": [" d"], "pairs": [], "sft_target": " d"},
    }  # fmt: skip
    assert (counts.rows, counts.dropped) == (3, {"no answers": 1})


def test_malformed_se(tmp_path):
    row = se("q", ("a", 1), ("b", 2))
    del row["answers"][1]["pm_score"]
    with pytest.raises(UserError, match=r"line 1: field 'answers\[1\]\.pm_score' is missing"):
        load_named("se", [row], tmp_path, split="test")


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ("<div>" * 1000, "is HTML with tags nested more than 250 deep"),
        ("<b>" * 251, "is HTML with tags nested more than 250 deep"),
        ("<a " * 20_000, "is HTML with unclosed tags"),
        ("<a b='>' " * 10_000, "is HTML with unclosed tags"),
        ("<![<![", "is HTML that cannot be read"),
    ],
)
def test_se_html_too_slow_to_parse(tmp_path, html, problem):
    begun = time.process_time()
    rows = [se("q", ("a", 1), ("b", 2)), se("r", ("a", 1), (html, 2)), se("s", ("a", 1))]
    with pytest.raises(UserError, match=rf"line 2: field 'answers\[1\]\.text' {problem}"):
        load_named("se", rows, tmp_path, split="test")
    counts = RowCounts(on_bad_row="drop")
    preferences = DATASETS["se"].function("test", RowSource("se", str(tmp_path), counts))
    assert len(preferences) == 2 and counts.dropped == {"malformed": 1}
    assert time.process_time() - begun < 5


def test_many_rows_are_stripped_by_several_processes(tmp_path, monkeypatch):
    rows = [se(f"<p>q{i}</p>", (f"<b>a{i}</b>", 1)) for i in range(5)]
    alone, _ = load_named("se", rows, tmp_path)
    monkeypatch.setattr(html_module, "CHUNK_SIZE", 4)
    assert load_named("se", rows, tmp_path)[0] == alone
    assert alone["\n\nHuman: q4\n\nAssistant:"]["sft_target"] == " a4"


def test_stack_exchange_paired(tmp_path):
    rows = [{"question": "q", "response_j": "good", "response_k": "bad"}]
    preferences, _ = load_named("stack-exchange-paired", rows, tmp_path)
    expected = {"responses": ["good", "bad"], "pairs": [(0, 1)], "sft_target": "good"}
    assert preferences == {"Question: q\n\nAnswer: ": expected}


def test_films():
    source = RowSource("films")
    preferences = DATASETS["films"].function("test", source)
    assert source.counts.rows >= len(preferences) > 0
    prompt, preference = next(iter(preferences.items()))
    assert prompt.startswith("\n\nHuman: ") and prompt.endswith("\n\nAssistant:")
    assert preference["pairs"][0] == (0, 1) and preference["sft_target"] in preference["responses"]
    reward = DATASETS["films"].reward
    assert reward is not None and reward(preference["responses"][0]) > reward(preference["responses"][1])


def test_chat_form():
    assert chat_form(["films"]) == chat_form(["hh", "shp", "se"]) == "hh"
    assert chat_form(["hh", "stack-exchange-paired"]) is None
    assert chat_form(["hh", "own.jsonl"]) is None
    assert chat_form([]) is None


def test_ground_truth_reward():
    assert ground_truth_reward(["films"]) is DATASETS["films"].reward
    assert ground_truth_reward(["hh"]) is ground_truth_reward(["films", "films"]) is ground_truth_reward(["x"]) is None


# ---- Splits ----


def config(tmp_path: Path, **options):
    defaults: dict[str, Any] = {"datasets": ["hh"], "data_dir": str(tmp_path), "format": None, "chat_template": None}
    defaults |= {
        "sft_turns": "all",
        "test_fraction": 0.25,
        "on_bad_row": "error",
        "max_length": 100,
        "max_prompt_length": 50,
        "cache_dir": str(tmp_path / "cache"),
    }
    return OmegaConf.create(defaults | options)


def test_load_split_mixes_data_sets(tmp_path, tokenizer):
    same = {"chosen": HH_START + " a", "rejected": HH_START + " a"}
    write(tmp_path / "hh" / "train.jsonl", [{"chosen": HH_START + " good", "rejected": HH_START + " bad"}, same])
    path = write(tmp_path / "own.jsonl", [{"prompt": HH_START, "chosen": f"c{i}", "rejected": "r"} for i in range(2)])
    split = load_split(config(tmp_path, datasets=["hh", str(path)], test_fraction=0), tokenizer, "train", "pairs")
    assert [tokenizer.decode(example.responses[0]) for example in split.examples] == [
        " good<eos>",
        "c0<eos>",
        "c1<eos>",
    ]
    assert [example.prompt_index for example in split.examples] == [0, 1, 1]
    assert split.counts == {
        "rows": 4, "prompts": 2, "pairs": 3, "dropped": {"chosen equal to rejected": 1}, "truncated": 0,
        "max_length": 100,
    }  # fmt: skip


def test_truncation_keeps_the_end_of_prompts_in_files(tmp_path, tokenizer):
    path = write(tmp_path / "mine.jsonl", [{"prompt": "0123456789" * 10, "chosen": "c", "rejected": "r"}])
    options = {"datasets": [str(path)], "max_length": 20, "max_prompt_length": 8, "test_fraction": 0}
    (example,) = load_split(config(tmp_path, **options), tokenizer, "train", "pairs").examples
    assert tokenizer.decode(example.prompt) == "23456789"


def test_repeated_and_opposite_pairs_are_kept_and_counted(tmp_path, tokenizer):
    """Of p: a > b three times (two repeats), and b > a once. Of q: c > d twice (one repeat)."""
    pairs = [("p", "a", "b")] * 3 + [("p", "b", "a")] + [("q", "c", "d")] * 2 + [("r", "a", "b")]
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
    path = write(tmp_path / "mine.jsonl", rows)
    options = {"datasets": [str(path)], "test_fraction": 0}
    split = load_split(config(tmp_path, **options), tokenizer, "train", "pairs")
    assert len(split.examples) == 7
    assert (split.counts["duplicates"], split.counts["contradictions"]) == (3, 1)
    text = format_counts(split.counts)
    assert "repeat a pair: 3 pairs" in text and "(A over B and B over A): 1 pairs" in text


@pytest.mark.parametrize(("name", "end"), [("hh", "sistant:"), ("shp", "\n\nHuman:")])
def test_truncation_keeps_the_end_named_by_the_data_set(tmp_path, tokenizer, name, end):
    prompt = "\n\nHuman: " + "x" * 100 + "\n\nAssistant:"
    row = {"hh": {"chosen": prompt + " a", "rejected": prompt + " b"}, "shp": shp((4, 2), 1, history="x" * 100)}[name]
    write(tmp_path / name / "train.jsonl", [row])
    options = {"datasets": [name], "max_length": 20, "max_prompt_length": 8}
    (example,) = load_split(config(tmp_path, **options), tokenizer, "train", "sft").examples
    assert tokenizer.decode(example.prompt) == end


def test_a_chat_file_end_to_end(tmp_path):
    template = "{% for m in messages %}<|user|>{{ m.content + eos_token + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|user|>{% endif %}"
    tokenizer = byte_tokenizer("<s> $A", chat_template=template)
    row = {"prompt": "say <eos>", "chosen": [{"role": "assistant", "content": "no <eos>!"}]}
    path = write(tmp_path / "own.jsonl", [row | {"rejected": [{"role": "assistant", "content": "<eos>!"}]}])
    options = {"datasets": [str(path)], "test_fraction": 0}
    (example,) = load_split(config(tmp_path, **options), tokenizer, "train", "pairs").examples
    bos, eos, user = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")

    def plain(text):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    assert example.prompt.tolist() == [bos, user, *plain("say <eos>"), eos, *plain("\n"), user]
    assert [response.tolist() for response in example.responses] == [
        [*plain("no <eos>!"), eos],
        [*plain("<eos>!"), eos],
    ]


def test_an_instruction_file_end_to_end(tmp_path):
    tokenizer = byte_tokenizer("<s> $A")
    path = write(tmp_path / "own.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}])
    options = {"datasets": [str(path)], "test_fraction": 0, "chat_template": "llama2"}
    split = load_split(config(tmp_path, **options), tokenizer, "train", "sft")
    (example,) = split.examples
    assert tokenizer.decode(example.prompt) == "<s>[INST] Add.\n\n1 2 [/INST]"
    assert [tokenizer.decode(response) for response in example.responses] == [" 3 <eos>"]
    assert format_counts(split.counts) == "1 rows, 1 prompts, 1 targets"
    with pytest.raises(UserError, match="line 1: rows of format=alpaca have one response and no preference"):
        load_split(config(tmp_path, **options), tokenizer, "train", "pairs")


def test_all_demonstrations_of_a_prompt_are_learned(tmp_path, tokenizer):
    """Each once, although dialogues share beginnings."""
    question = {"role": "user", "content": "hi"}
    rows = [
        {
            "messages": [
                question,
                {"role": "assistant", "content": first},
                question,
                {"role": "assistant", "content": "b"},
            ]
        }
        for first in ("yes?", "yes?", "no?")
    ]
    path = write(tmp_path / "own.jsonl", rows)
    options = {"datasets": [str(path)], "test_fraction": 0, "chat_template": "hh"}
    split = load_split(config(tmp_path, **options), tokenizer, "train", "sft")
    responses = [[tokenizer.decode(turn.responses[0]) for turn in split_turns(example)] for example in split.examples]
    assert responses == [[" yes?<eos>", " b<eos>"], [" no?<eos>", " b<eos>"]]
    assert split.counts["rows"] == 3 and split.counts["prompts"] == 3 and split.counts["targets"] == 4
    assert split.counts["dropped"] == {"duplicate response": 2}


def test_a_rejected_response_is_no_demonstration(tmp_path, tokenizer):
    """In a file with pairs and demonstrations."""
    question = {"from": "human", "value": "hi"}
    good = {"conversations": [question, {"from": "gpt", "value": "nice"}]}
    pair = {"conversations": [question], "chosen": "good", "rejected": "bad"}
    options = {"test_fraction": 0, "chat_template": "hh"}
    for rows, expected in (([pair, good], ["nice"]), ([good, pair], ["nice", "good"])):
        path = write(tmp_path / "own.jsonl", rows)
        split = load_split(config(tmp_path, datasets=[str(path)], **options), tokenizer, "train", "sft")
        assert [tokenizer.decode(e.responses[0]) for e in split.examples] == [
            f" {response}<eos>" for response in expected
        ]


def test_train_and_test_of_a_file_share_no_prompt(tmp_path, tokenizer):
    path = write(tmp_path / "own.jsonl", [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(20)])
    prompts = [
        {tokenizer.decode(example.prompt) for example in load_split(settings, tokenizer, split, "sft").examples}
        for settings in [config(tmp_path, datasets=[str(path)])]
        for split in ("train", "test")
    ]
    assert list(map(len, prompts)) == [15, 5] and not prompts[0] & prompts[1]


def test_empty_splits(tmp_path, tokenizer):
    write(tmp_path / "hh" / "train.jsonl", [])
    with pytest.raises(UserError, match=r"error\[DATA\] datasets: hh has no train rows; fix: "):
        load_split(config(tmp_path), tokenizer, "train", "sft")
    write(tmp_path / "hh" / "train.jsonl", [{"chosen": HH_START, "rejected": HH_START + " b"}])
    with pytest.raises(
        UserError, match=r"no row of the train split of hh is left \(dropped: 1 empty response\); fix: "
    ):
        load_split(config(tmp_path), tokenizer, "train", "pairs")
    with pytest.raises(UserError, match=r"there is no file nowhere\.jsonl"):
        load_split(config(tmp_path, datasets=["nowhere.jsonl"]), tokenizer, "train", "pairs")


def test_format_counts():
    counts: dict[str, Any] = {"rows": 1400, "prompts": 370, "pairs": 1397, "truncated": 12, "max_length": 512}
    line = "1,400 rows, 370 prompts, 1,397 pairs, 12 of them truncated to max_length=512"
    assert format_counts(counts | {"dropped": {}}) == line
    dropped = {"empty response": 1, "chosen equal to rejected": 2}
    assert format_counts(counts | {"dropped": dropped}) == line + (
        "\n  dropped: 1 empty response, 2 chosen equal to rejected"
    )
    counts = {"rows": 4, "prompts": 3, "targets": 3, "truncated": 0, "max_length": 512, "dropped": {}}
    assert format_counts(counts) == "4 rows, 3 prompts, 3 targets"
