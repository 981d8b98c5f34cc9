"""The named data sets by hand, where their rows come from, and a split from the config to its counts."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
from omegaconf import OmegaConf

import preference_datasets
from engine.formats import PROMPTS_DIFFER, Tally
from preference_datasets import DATASETS, Source, format_counts, load_split, strip_html
from tests.test_tokenization import byte_tokenizer
from utils import UserError

HH_START = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: so\n\nAssistant:"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def get(name: str, rows: list, tmp_path: Path, split="train"):
    """What the loader of a data set makes of rows in data_dir, and its tally."""
    write(tmp_path / name / f"{split}.jsonl.gz", rows)
    source = Source(name, str(tmp_path))
    return DATASETS[name].function(split, source), source.tally


# ---- Loaders ----


def test_hh(tmp_path):
    rows = [
        {"chosen": HH_START + " good", "rejected": HH_START + " bad"},
        {"chosen": HH_START + " better", "rejected": HH_START + " worse"},
        {"chosen": HH_START + " x", "rejected": "\n\nHuman: hi\n\nAssistant: y"},
        {"chosen": HH_START + " x", "rejected": "no turn"},
    ]
    preferences, tally = get("hh", rows, tmp_path)
    responses = [" good", " bad", " better", " worse"]
    assert preferences == {HH_START: {"responses": responses, "pairs": [(0, 1), (2, 3)], "sft_target": " better"}}
    assert (tally.rows, tally.dropped) == (4, {PROMPTS_DIFFER: 2})


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
        get("hh", [good] * 16 + [row], tmp_path)
    assert str(error.value).startswith(f"error[DATA] {tmp_path}/hh/train.jsonl.gz line 17: {problem}; fix: ")
    assert error.value.exit_status == 3


def shp(scores, label, answers="AB", history="q"):
    row = {"history": history, "human_ref_A": answers[0], "human_ref_B": answers[1], "labels": label}
    return row | {"score_A": scores[0], "score_B": scores[1]}


def test_shp(tmp_path):
    rows = [
        shp((4, 2), 1, "ab"),
        shp((3, 10), 0, "cd"),
        shp((9, 4), 1, "ef"),
        shp((3, 2), 1, history="ratio 1.5 only"),
    ]
    preferences, tally = get("shp", rows, tmp_path)
    responses = [" a", " b", " c", " d", " e", " f"]
    pairs = [(0, 1), (3, 2), (4, 5)]
    assert preferences == {"\n\nHuman: q\n\nAssistant:": {"responses": responses, "pairs": pairs, "sft_target": " d"}}
    assert (tally.rows, tally.dropped) == (4, {"score ratio below 2": 1})


@pytest.mark.parametrize(
    ("scores", "kept"), [((5, 0), True), ((0, 5), True), ((0, 0), False), ((5, -1), False), ((-4, -2), False)]
)
def test_shp_scores_without_a_ratio(tmp_path, scores, kept):
    assert len(get("shp", [shp(scores, int(scores[0] > scores[1]))], tmp_path)[0]) == kept


@pytest.mark.parametrize(("label", "problem"), [(2, "is 2, not 1"), ("1", "is text, not a number"), (None, "is null")])
def test_malformed_shp(tmp_path, label, problem):
    with pytest.raises(UserError, match=rf"shp/train\.jsonl\.gz line 1: field 'labels' {problem}"):
        get("shp", [shp((4, 2), label)], tmp_path)


def se(question: str, *answers: tuple[str, int]):
    return {"question": question, "answers": [{"text": text, "pm_score": score} for text, score in answers]}


def test_se(tmp_path):
    rows = [
        se("<p>why</p>", ("<p>a</p>", 1), ("<p>b</p>", 5), ("<p>c</p>", 1)),
        se("<p>one</p>", ("<p>d</p>", -1)),
        se("<p>none</p>"),
    ]
    write(tmp_path / "se" / "test.jsonl", rows)  # so that train is not split
    preferences, tally = get("se", rows, tmp_path)
    assert preferences == {
        "\n\nHuman: why\n\nAssistant:": {
            "responses": [" a", " b", " c"], "pairs": [(1, 0), (1, 2)], "sft_target": " b",
        },
        "\n\nHuman: one\n\nAssistant:": {"responses": [" d"], "pairs": [], "sft_target": " d"},
    }  # fmt: skip
    assert (tally.rows, tally.dropped) == (3, {"no answers": 1})


def test_malformed_se(tmp_path):
    row = se("q", ("a", 1), ("b", 2))
    del row["answers"][1]["pm_score"]
    with pytest.raises(UserError, match=r"line 1: field 'answers\[1\]\.pm_score' is missing"):
        get("se", [row], tmp_path, split="test")


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ("<div>" * 1000, "is HTML with tags nested more than 250 deep"),
        ("<b>" * 251, "is HTML with tags nested more than 250 deep"),
        ("<a " * 20_000, "is HTML with tags that do not end"),
        ("<a b='>' " * 10_000, "is HTML with tags that do not end"),
        ("<![<![", "is HTML that cannot be read"),
    ],
)
def test_html_of_se_that_would_take_minutes(tmp_path, html, problem):
    begun = time.monotonic()
    rows = [se("q", ("a", 1), ("b", 2)), se("r", ("a", 1), (html, 2)), se("s", ("a", 1))]
    with pytest.raises(UserError, match=rf"line 2: field 'answers\[1\]\.text' {problem}"):
        get("se", rows, tmp_path, split="test")
    tally = Tally(on_bad_row="drop")
    preferences = DATASETS["se"].function("test", Source("se", str(tmp_path), tally))
    assert len(preferences) == 2 and tally.dropped == {"malformed": 1}
    assert time.monotonic() - begun < 5


def test_html_as_deep_as_may_be():
    assert strip_html("<b>" * 248 + "x<p>y") == "x\n\ny"
    assert strip_html("<b>" * 249 + "x") == "x"


def test_se_without_a_test_file_is_split_as_the_reference_splits_it(tmp_path):
    rows = [se(f"<p>q{i}</p>", ("a", 1)) for i in range(250)]
    train, _ = get("se", rows, tmp_path)
    test, tally = get("se", [], tmp_path, split="train")  # an empty file, to be written over
    assert not test
    write(tmp_path / "se" / "train.jsonl.gz", rows)
    source = Source("se", str(tmp_path))
    test = DATASETS["se"].function("test", source)
    shuffled = datasets.Dataset.from_list([{"i": i} for i in range(250)]).shuffle(seed=42)
    assert {f"\n\nHuman: q{i}\n\nAssistant:" for i in shuffled["i"][:2]} == test.keys()
    assert len(train) == 248 and not train.keys() & test.keys()
    assert (source.tally.rows, tally.rows) == (2, 0)


def test_many_rows_are_stripped_by_several_processes(tmp_path, monkeypatch):
    rows = [se(f"<p>q{i}</p>", (f"<b>a{i}</b>", 1)) for i in range(5)]
    alone, _ = get("se", rows, tmp_path)
    monkeypatch.setattr(preference_datasets, "HTML_BLOCK_ROWS", 4)
    assert get("se", rows, tmp_path)[0] == alone
    assert alone["\n\nHuman: q4\n\nAssistant:"]["sft_target"] == " a4"


def test_stack_exchange_paired(tmp_path):
    rows = [{"question": "q", "response_j": "good", "response_k": "bad"}]
    preferences, _ = get("stack-exchange-paired", rows, tmp_path)
    expected = {"responses": ["good", "bad"], "pairs": [(0, 1)], "sft_target": "good"}
    assert preferences == {"Question: q\n\nAnswer: ": expected}


def test_films():
    source = Source("films")
    preferences = DATASETS["films"].function("test", source)
    assert source.tally.rows >= len(preferences) > 0
    prompt, preference = next(iter(preferences.items()))
    assert prompt.startswith("\n\nHuman: ") and prompt.endswith("\n\nAssistant:")
    assert preference["pairs"][0] == (0, 1) and preference["sft_target"] in preference["responses"]
    reward = DATASETS["films"].reward
    assert reward is not None and reward(preference["responses"][0]) > reward(preference["responses"][1])


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>a</p>\n\n<p>b</p>\n", "a\n\nb"),
        ("<p>use <code>x &lt; y</code> now</p>", "use <code>x < y</code> now"),
        ('<p>see <a href="http://x">this <em>page</em></a>.</p>', "see this page."),
        ("<pre><code>if a:\n    b\n</code></pre>", "<code>if a:\n    b\n</code>"),
        ("<ul>\n<li>a</li>\n<li>b <b>c</b></li>\n</ul>", "- a\n- b c"),
        ("<p>x</p><ol><li><p>a</p></li><li>b<ul><li>c</li></ul></li></ol>", "x\n\n1. a\n2. b\n  - c"),
        ("<ul><li>a<pre><code>x\n y</code></pre></li></ul>", "- a\n  <code>x\n y</code>"),
        ("<blockquote><p>a</p><p>b</p></blockquote><h2>c</h2>", "a\n\nb\n\nc"),
        ("a<br>b<!-- c --><script>d</script>", "a\nb"),
        ("plain <b>text</b><p>p</p>tail", "plain text\n\np\n\ntail"),
        ('<a href="x"><p>in a link</p></a>', "in a link"),
        ("1 < 2 &amp; 3", "1 < 2 & 3"),
        ("", ""),
    ],
)
def test_strip_html(html, text):
    assert strip_html(html) == text


# ---- Sources ----


def test_data_dir_needs_the_file_of_the_split(tmp_path):
    write(tmp_path / "hh" / "train.jsonl", [])
    with pytest.raises(UserError, match=r"error\[DATA\] data_dir: .*/hh holds neither test\.jsonl nor test\.jsonl\.gz"):
        list(Source("hh", str(tmp_path)).rows("x", "test"))


HUB_ROWS = [{"chosen": HH_START + " a", "rejected": HH_START + " b"}, {"chosen": HH_START + " c", "rejected": None}]


@pytest.fixture
def hub(monkeypatch):
    """A hub that can be reached and gives HUB_ROWS; the calls made to it."""
    calls = []

    def load_dataset(path, data_dir=None):
        calls.append((path, data_dir))
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(HUB_ROWS)})

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.fixture
def no_network(monkeypatch):
    def dataset_info(*args, **kwargs):
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)


def test_rows_from_the_hub(hub):
    rows = list(Source("hh").rows("Anthropic/hh-rlhf", "train"))
    assert [row.values for row in rows] == HUB_ROWS
    assert hub == [("Anthropic/hh-rlhf", None)]
    with pytest.raises(UserError, match="Anthropic/hh-rlhf train row 1: field 'rejected' is null"):
        DATASETS["hh"].function("train", Source("hh"))
    with pytest.raises(UserError, match=r"datasets: hh: Anthropic/hh-rlhf test cannot be loaded: KeyError"):
        DATASETS["hh"].function("test", Source("hh"))


def test_paired_stack_exchange_has_a_folder_per_split(hub):
    for split in ("train", "test"):
        with pytest.raises(UserError, match=rf"{split} row 0: field 'question' is missing"):
            DATASETS["stack-exchange-paired"].function(split, Source("stack-exchange-paired"))
    assert [data_dir for _, data_dir in hub] == ["data/rl", "data/evaluation"]


def test_se_from_the_hub_is_split(hub, monkeypatch):
    rows = [se(f"q{i}", ("a", 1)) for i in range(200)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: {"train": datasets.Dataset.from_list(rows)})
    splits = [DATASETS["se"].function(split, Source("se")) for split in ("train", "test")]
    expected = {f"\n\nHuman: q{i}\n\nAssistant:" for i in np.random.default_rng(42).permutation(200)[:2]}
    assert splits[1].keys() == expected
    assert len(splits[0]) == 198


def test_without_a_network_the_local_cache_is_read(hub, no_network, monkeypatch):
    def snapshot_download(hub_id, repo_type, local_files_only):
        assert (hub_id, repo_type, local_files_only) == ("Anthropic/hh-rlhf", "dataset", True)
        return "/cache/snapshot"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert len(list(Source("hh").rows("Anthropic/hh-rlhf", "train"))) == 2
    assert hub == [("/cache/snapshot", None)]


def test_without_a_network_and_cache_the_way_out_is_told_at_once(no_network, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        DATASETS["shp"].function("train", Source("shp"))
    assert time.monotonic() - start < 5
    assert str(error.value) == (
        "error[DATA] datasets: shp: stanfordnlp/SHP is not in the hub's local cache, and the hub fails: Name or "
        "service not known; fix: put its rows in DATA_DIR/shp/train.jsonl and test.jsonl (or .jsonl.gz) and set "
        "data_dir=DATA_DIR, or try again with a network"
    )


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
    own = write(tmp_path / "own.jsonl", [{"prompt": HH_START, "chosen": f"c{i}", "rejected": "r"} for i in range(2)])
    split = load_split(config(tmp_path, datasets=["hh", str(own)], test_fraction=0), tokenizer, "train", "pairs")
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


@pytest.mark.parametrize(("name", "end"), [("hh", "sistant:"), ("shp", "\n\nHuman:")])
def test_which_end_of_a_prompt_stays(tmp_path, tokenizer, name, end):
    prompt = "\n\nHuman: " + "x" * 100 + "\n\nAssistant:"
    row = {"hh": {"chosen": prompt + " a", "rejected": prompt + " b"}, "shp": shp((4, 2), 1, history="x" * 100)}[name]
    write(tmp_path / name / "train.jsonl", [row])
    options = {"datasets": [name], "max_length": 20, "max_prompt_length": 8}
    (example,) = load_split(config(tmp_path, **options), tokenizer, "train", "sft").examples
    assert tokenizer.decode(example.prompt) == end


def test_a_chat_file_from_end_to_end(tmp_path):
    template = "{% for m in messages %}<|user|>{{ m.content + eos_token + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|user|>{% endif %}"
    tokenizer = byte_tokenizer("<s> $A", chat_template=template)
    row = {"prompt": "say <eos>", "chosen": [{"role": "assistant", "content": "no <eos>"}]}
    own = write(tmp_path / "own.jsonl", [row | {"rejected": [{"role": "assistant", "content": "<eos>"}]}])
    options = {"datasets": [str(own)], "test_fraction": 0}
    (example,) = load_split(config(tmp_path, **options), tokenizer, "train", "pairs").examples
    bos, eos, user = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")

    def plain(text):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    assert example.prompt.tolist() == [bos, user, *plain("say <eos>"), eos, *plain("\n"), user]
    assert [response.tolist() for response in example.responses] == [[*plain("no <eos>"), eos], [*plain("<eos>"), eos]]


def test_an_instruction_file_from_end_to_end(tmp_path):
    tokenizer = byte_tokenizer("<s> $A")
    own = write(tmp_path / "own.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}])
    options = {"datasets": [str(own)], "test_fraction": 0, "chat_template": "llama2"}
    split = load_split(config(tmp_path, **options), tokenizer, "train", "sft")
    (example,) = split.examples
    assert tokenizer.decode(example.prompt) == "<s>[INST] Add.\n\n1 2 [/INST]"
    assert [tokenizer.decode(response) for response in example.responses] == [" 3 <eos>"]
    assert format_counts(split.counts) == "1 rows, 1 prompts, 1 targets"
    with pytest.raises(UserError, match="line 1: rows of the form alpaca have one answer, which is preferred"):
        load_split(config(tmp_path, **options), tokenizer, "train", "pairs")


def test_all_demonstrations_of_a_prompt_are_learned(tmp_path, tokenizer):
    """Once each: dialogues often begin alike."""
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
    own = write(tmp_path / "own.jsonl", rows)
    options = {"datasets": [str(own)], "test_fraction": 0, "chat_template": "hh"}
    split = load_split(config(tmp_path, **options), tokenizer, "train", "sft")
    answers = [tokenizer.decode(example.responses[0]) for example in split.examples]
    assert answers == [" yes?<eos>", " no?<eos>", " b<eos>", " b<eos>"]
    assert split.counts["rows"] == 3 and split.counts["prompts"] == 3 and split.counts["targets"] == 4
    assert split.counts["dropped"] == {"answer that the prompt has already": 2}
    assert split.examples[0].prompt_index == split.examples[1].prompt_index  # so that it is fed once


def test_a_rejected_answer_is_no_demonstration(tmp_path, tokenizer):
    """In a file that has both."""
    question = {"from": "human", "value": "hi"}
    good = {"conversations": [question, {"from": "gpt", "value": "nice"}]}
    pair = {"conversations": [question], "chosen": "good", "rejected": "bad"}
    options = {"test_fraction": 0, "chat_template": "hh"}
    for rows, expected in (([pair, good], ["nice"]), ([good, pair], ["nice", "good"])):
        own = write(tmp_path / "own.jsonl", rows)
        split = load_split(config(tmp_path, datasets=[str(own)], **options), tokenizer, "train", "sft")
        assert [tokenizer.decode(e.responses[0]) for e in split.examples] == [f" {answer}<eos>" for answer in expected]


def test_train_and_test_of_a_file_share_no_prompt(tmp_path, tokenizer):
    own = write(tmp_path / "own.jsonl", [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(20)])
    prompts = [
        {tokenizer.decode(example.prompt) for example in load_split(settings, tokenizer, split, "sft").examples}
        for settings in [config(tmp_path, datasets=[str(own)])]
        for split in ("train", "test")
    ]
    assert list(map(len, prompts)) == [15, 5] and not prompts[0] & prompts[1]


def test_splits_with_nothing_in_them(tmp_path, tokenizer):
    write(tmp_path / "hh" / "train.jsonl", [])
    with pytest.raises(UserError, match=r"error\[DATA\] datasets: hh has no train rows; fix: "):
        load_split(config(tmp_path), tokenizer, "train", "sft")
    write(tmp_path / "hh" / "train.jsonl", [{"chosen": HH_START, "rejected": HH_START + " b"}])
    with pytest.raises(UserError, match=r"train rows of hh none is left \(dropped: 1 empty response\); fix: "):
        load_split(config(tmp_path), tokenizer, "train", "pairs")
    with pytest.raises(UserError, match=r"there is no file nowhere\.jsonl"):
        load_split(config(tmp_path, datasets=["nowhere.jsonl"]), tokenizer, "train", "pairs")


def test_format_counts():
    counts: dict[str, Any] = {"rows": 1400, "prompts": 370, "pairs": 1397, "truncated": 12, "max_length": 512}
    line = "1,400 rows, 370 prompts, 1,397 pairs, 12 of them cut to max_length=512"
    assert format_counts(counts | {"dropped": {}}) == line
    dropped = {"empty response": 1, "chosen equal to rejected": 2}
    assert format_counts(counts | {"dropped": dropped}) == line + (
        "\n  dropped: 1 empty response, 2 chosen equal to rejected"
    )
    counts = {"rows": 4, "prompts": 3, "targets": 3, "truncated": 0, "max_length": 512, "dropped": {}}
    assert format_counts(counts) == "4 rows, 3 prompts, 3 targets"
