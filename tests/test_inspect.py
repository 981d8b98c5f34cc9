"""inspect_data.py: each planted defect is found, clean data have none, and the report holds the trained ids."""

import io
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import inspect_data
from engine.inspect.charts import bins
from engine.inspect.findings import format_share
from engine.inspect.page import format_page
from engine.inspect.repeats import jaccard, pieces, similar_sets
from engine.inspect.terminal import Terminal, columns, format_inspection
from engine.inspect.texts import RunIndex, word_runs
from engine.settings.options import parse_arguments
from inspect_data import InspectOptions, read_overrides, run_inspection, terminal_of
from tests.data.samples import CHATML, byte_tokenizer
from tests.inspections import Inspector, Row, Tags, clean_rows, table, words
from utils import UserError


@pytest.fixture
def inspector(tmp_path: Path, cache: Path) -> Inspector:
    return Inspector(tmp_path, cache)


# ---- Findings ----


def test_clean_data_have_no_finding(inspector: Inspector) -> None:
    benchmark = inspector.directory / "benchmark.txt"
    benchmark.write_text(words(40, "benchmark"))
    inspection = inspector(contamination=str(benchmark))
    assert inspection.findings == []
    assert "Findings: none" in format_inspection(inspection, Terminal())


def test_duplicates(inspector: Inspector) -> None:
    inspector.train += [inspector.train[3], inspector.train[3], inspector.train[5]]
    assert inspector.checks() == {"duplicates": 3}


def test_equal_responses_to_other_prompts_are_no_duplicates(inspector: Inspector) -> None:
    inspector.train.append({**inspector.train[3], "prompt": words(8, "another")})
    assert inspector.checks() == {}


def test_contradictions(inspector: Inspector) -> None:
    row = inspector.train[3]
    inspector.train.append({**row, "chosen": row["rejected"], "rejected": row["chosen"]})
    assert inspector.checks() == {"contradictions": 1}


def test_contradicting_labels(inspector: Inspector) -> None:
    inspector.train = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": index % 2 == 0}
        for index, row in enumerate(inspector.train)
    ]
    inspector.test = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in inspector.test]
    assert inspector.checks("loss=kto") == {}
    inspector.train.append({**inspector.train[3], "label": True})
    assert inspector.checks("loss=kto") == {"contradictions": 1}


def test_near_duplicates(inspector: Inspector) -> None:
    row = inspector.train[3]
    long = {**row, "prompt": words(30, "long")}
    inspector.train += [long, {**clean_rows("more", 1)[0], "prompt": long["prompt"] + " really"}]
    assert inspector.checks() == {"near-duplicates": 1}
    assert inspector.checks(near_duplicates=False) == {}


def test_a_shared_system_prompt_makes_no_near_duplicates(inspector: Inspector) -> None:
    frame = words(60, "frame") + ": "
    for row in (*inspector.train, *inspector.test):
        row["prompt"] = frame + row["prompt"]
    assert inspector.checks() == {}
    inspector.train[7]["prompt"] = inspector.train[5]["prompt"] + "!"
    assert inspector.checks() == {"near-duplicates": 1}


def test_large_data_are_searched_for_near_duplicates_if_asked(inspector: Inspector, monkeypatch) -> None:
    monkeypatch.setattr("engine.inspect.repeats.MAX_ROWS_FOR_NEAR_DUPLICATES", 20)
    inspector.train[7] = {**inspector.train[7], "prompt": inspector.train[5]["prompt"] + "!"}
    skipped = inspector()
    assert skipped.findings == [] and "near_duplicates=true runs it" in "".join(skipped.notes)
    assert inspector.checks(near_duplicates=True) == {"near-duplicates": 1}


def test_prompts_in_both_splits(inspector: Inspector) -> None:
    inspector.test.append({**inspector.test[0], "prompt": inspector.train[7]["prompt"]})
    assert inspector.checks() == {"prompts in both splits": 1}


@pytest.mark.parametrize("form", ["text", "rows"])
def test_contamination(inspector: Inspector, form: str) -> None:
    question = words(20, "a question")
    inspector.train[4]["prompt"] += " " + question.replace(" ", ", ").upper()
    inspector.train[6]["prompt"] += " " + words(20, "another question")
    path = inspector.directory / ("benchmark.txt" if form == "text" else "benchmark.jsonl")
    other = words(50, "other")
    nested = json.dumps({"id": 1, "choices": [{"text": other}, {"text": f"so {question} so"}]})
    path.write_text(f"{other}\n\nso {question} so\n\nshort" if form == "text" else nested + "\n")
    inspection = inspector(contamination=str(path))
    (finding,) = inspection.findings
    assert (finding.check, finding.number) == ("contamination", 1)
    assert question[:40] in finding.places[0]
    assert ("1 of them" if form == "text" else "0 of them") in inspection.notes[0]


def test_a_benchmark_without_long_texts_is_an_error(inspector: Inspector, capsys) -> None:
    path = inspector.directory / "benchmark.txt"
    path.write_text("too short")
    with pytest.raises(ValueError, match=re.escape("has no text of 13 words or more")):
        inspector(contamination=str(path))


def test_similar_pairs(inspector: Inspector) -> None:
    row = inspector.train[3]
    row["rejected"] = row["chosen"].replace(row["chosen"][5], "X", 1)
    assert inspector.checks() == {"similar pairs": 1}


def test_equal_after_truncation_and_without_end_of_text(inspector: Inspector) -> None:
    start = " " + words(40, "start")
    inspector.train[3] |= {"chosen": start + " yes", "rejected": start + " no"}
    limits = ("max_length=200", "max_prompt_length=100")
    assert inspector.checks(*limits) == {"equal after truncation": 1}
    inspector.train[5] |= {"chosen": start + " yes"}
    assert inspector.checks(*limits) == {"equal after truncation": 1, "no end of text": 1}


def test_truncated_prompts(inspector: Inspector) -> None:
    inspection = inspector("max_length=90", "max_prompt_length=20")
    assert {finding.check for finding in inspection.findings} == {"truncated prompts"}
    notes = next(section.notes for section in inspection.sections if section.title == "Truncation")
    assert "rows train: prompts lose their start (after BOS)" in notes


@pytest.mark.parametrize("place", ["prompt", "chosen"])
def test_literal_special_tokens(inspector: Inspector, place: str) -> None:
    inspector.train[3][place] += " <|user|> said"
    assert inspector.checks() == {"literal special tokens": 1}


def test_length(inspector: Inspector) -> None:
    for row in inspector.train:
        row["chosen"], row["rejected"] = sorted((row["chosen"], row["rejected"]), key=len, reverse=True)
    (finding,) = inspector().findings
    assert finding.check == "length" and finding.number > 40 and "write longer responses" in finding.meaning


# ---- Templates ----


def as_messages(rows: list[Row]) -> list[Row]:
    return [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {name: [{"role": "assistant", "content": row[name].strip()}] for name in ("chosen", "rejected")}
        for row in rows
    ]


def use_messages(inspector: Inspector, template: str = CHATML) -> None:
    inspector.tokenizer = byte_tokenizer(chat_template=template)
    inspector.train, inspector.test = as_messages(inspector.train), as_messages(inspector.test)


def test_the_own_chat_template_does_not_drift(inspector: Inspector) -> None:
    use_messages(inspector)
    assert inspector.checks() == {}


def test_another_chat_template_drifts(inspector: Inspector) -> None:
    use_messages(inspector)
    (finding,) = inspector("chat_template=llama2").findings
    assert finding.check == "template drift" and finding.number == 40
    assert finding.places[0].endswith("token 1: trained '<s>|[|I|N', own template '<s>|<|user|>|u|s'")


def test_plain_text_drifts_from_a_chat_template(inspector: Inspector) -> None:
    inspector.tokenizer = byte_tokenizer(chat_template=CHATML)
    (finding,) = inspector().findings
    assert finding.check == "template drift" and "trained as plain text" in finding.meaning


def test_a_border_tokenized_otherwise_drifts(inspector: Inspector) -> None:
    """The template puts no token between prompt and response, so a merge spans the border."""
    use_messages(inspector, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    inspector.tokenizer = byte_tokenizer(num_merges=3, chat_template=inspector.tokenizer.chat_template)
    merge = next(token for token in inspector.tokenizer.get_vocab() if len(token) == 2 and token.isascii())
    inspector.train[3]["prompt"][0]["content"] += " x" + merge[0]
    inspector.train[3]["chosen"][0]["content"] = merge[1] + inspector.train[3]["chosen"][0]["content"]
    (finding,) = inspector().findings
    assert finding.check == "template drift" and "at their border" in finding.meaning and finding.number >= 1


def test_special_tokens_in_messages_are_found_beside_those_of_the_template(inspector: Inspector) -> None:
    use_messages(inspector)
    inspector.train[3]["chosen"][0]["content"] += " <|user|> said"
    (finding,) = inspector().findings
    assert finding.check == "literal special tokens" and finding.places[0].startswith("'<|user|>' in rows train")


@pytest.mark.parametrize(
    "loss, roles", [("sft", {"response"}), ("kto", {"response, desirable", "response, undesirable"})]
)
def test_single_responses_have_their_report_too(inspector: Inspector, loss: str, roles: set[str]) -> None:
    inspection = inspector(f"loss={loss}", examples=100)
    assert inspection.findings == []
    assert {part.role for example in inspection.examples for part in example.parts} == {"prompt", *roles}
    assert [section.title for section in inspection.sections] == ["Rows", "Lengths", "Truncation", "Tokens fed"]
    assert format_page(inspection).count("<svg") == 2


def test_prompts_of_online_training_have_their_report(inspector: Inspector) -> None:
    questions = [{"prompt": words(8, index), "answer": str(index)} for index in range(50)]
    inspector.train = [*questions[:40], questions[0] | {"answer": "another"}, questions[1]]
    inspector.test = [*questions[40:], questions[2]]
    inspection = inspector("loss=grpo", "rewards=exact_match", "max_prompt_length=20", examples=2)
    assert {finding.check: finding.number for finding in inspection.findings} == {
        "prompts in both splits": 1,
        "truncated prompts": 52,
    }
    assert [section.title for section in inspection.sections] == ["Rows", "Lengths", "Truncation"]
    assert table(inspection, "Rows")["rows train"] == {"rows": "42", "prompts": "40", "examples": "41", "dropped": "0"}
    assert table(inspection, "Truncation")["rows train"]["prompts"] == "100%"
    assert [[part.role for part in example.parts] for example in inspection.examples] == [["prompt"]] * 2
    assert all(part.num_cut and len(part.tokens) == 20 for example in inspection.examples for part in example.parts)
    assert format_page(inspection).count("<svg") == 1
    assert "masked" in format_inspection(inspection, Terminal())


def test_equal_questions_of_two_files_are_duplicates(inspector: Inspector, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in inspector.train[:2]))
    overrides = [*inspector.overrides("loss=grpo", "rewards=length", "test_fraction=0")]
    datasets = overrides[0].removeprefix("datasets=")
    inspection = run_inspection(
        read_overrides([f"datasets=[{datasets},{path}]", *overrides[1:]]), parse_arguments(InspectOptions, [])
    )
    assert {finding.check: finding.number for finding in inspection.findings} == {"duplicates": 2}


# ---- Tables ----


def test_rows_are_counted_with_reasons_and_places(inspector: Inspector) -> None:
    inspector.train[2] |= {"rejected": " "}
    inspector.train[4] |= {"rejected": inspector.train[4]["chosen"]}
    inspector.train[6] = {"prompt": "half a row"}
    inspection = inspector("on_bad_row=drop")
    assert table(inspection, "Rows")["rows train"] == {"rows": "40", "prompts": "37", "pairs": "37", "dropped": "3"}
    notes = "\n".join(inspection.sections[0].notes)
    assert "rows train: 1 dropped: malformed" in notes and "train.jsonl line 7: field 'chosen' is missing" in notes
    assert "1 dropped: empty response" in notes and "1 dropped: chosen equal to rejected" in notes


def test_each_data_set_has_its_own_counts(inspector: Inspector, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for split, rows in (("train", clean_rows("other", 6)), ("test", clean_rows("other test", 2))):
        (other / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [each for each in inspector.overrides() if not each.startswith("datasets=")]
    overrides.append(f"datasets=[{tmp_path / 'rows'},{other}]")
    inspection = run_inspection(read_overrides(overrides), parse_arguments(InspectOptions, []))
    counts = {name: row["pairs"] for name, row in table(inspection, "Rows").items()}
    assert counts == {"rows train": "40", "rows test": "10", "other train": "6", "other test": "2"}


def test_lengths_and_truncation_by_hand(inspector: Inspector) -> None:
    inspector.train = [{"prompt": "p" * 10, "chosen": "c" * 20, "rejected": "r" * 40}]
    inspector.test = [{"prompt": "q" * 10, "chosen": "c" * 5, "rejected": "r" * 4}]
    inspection = inspector("max_length=36", "max_prompt_length=6")
    sizes = table(inspection, "Lengths")
    assert [sizes[f"rows train {role}"]["max"] for role in ("prompt", "chosen", "rejected")] == ["10", "21", "41"]
    cut = table(inspection, "Truncation")["rows train"]
    assert [cut["prompts"], cut["responses"], cut["tokens"]] == ["100%", "100%", "21%"]  # (4 + 11) / 72
    fed = {name: int(row["tokens"]) for name, row in table(inspection, "Tokens fed").items()}
    assert [*fed.values()] == [6 + 20 + 29, 6 + 21 + 6 + 30, 2 * (6 + 30)]


def test_turns_of_a_dialogue_share_a_row(inspector: Inspector) -> None:
    def messages(*texts: str) -> Row:
        return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}

    inspector.train, inspector.test = [messages("hi", "yes", "so", "a"), messages("b", "c")], [messages("x", "y")]
    inspection = inspector("loss=sft", "chat_template=hh")
    rows = next(section for section in inspection.sections if section.title == "Rows")
    assert rows.table is not None and rows.table.rows[0][1:] == ["2", "3", "3", "0"]
    assert rows.notes == ["rows train: training joins the turns of dialogues to 2 examples", "no row is dropped"]
    fed = {name: int(row["tokens"]) for name, row in table(inspection, "Tokens fed").items()}
    first, second, other = (len("\n\nHuman: \n\nAssistant:") + size for size in (2 + 4, 2 + 2, 1 + 2))
    assert [*fed.values()][:2] == [first + second + other, first + 1 + first + second + 1 + other + 1]


# ---- Tokens ----


def test_tokens_are_those_of_training(inspector: Inspector) -> None:
    inspector.train = inspector.train[:1]
    row = inspector.train[0]
    (example,) = inspector(examples=3).examples
    tokenizer = inspector.tokenizer
    expected = [tokenizer(row[name])["input_ids"] for name in ("prompt", "chosen", "rejected")]
    expected = [expected[0], *([*ids, tokenizer.eos_token_id] for ids in expected[1:])]
    assert [[token.id for token in part.tokens] for part in example.parts] == expected
    assert [part.state for part in example.parts] == ["masked", "trained on", "trained on"]
    assert [{token.is_used for token in part.tokens} for part in example.parts] == [{False}, {True}, {True}]
    last = example.parts[1].tokens[-1]
    assert (last.text, last.is_special, example.parts[1].tokens[0].text) == ("<eos>", True, "·")


def test_both_layouts_show_the_same_tokens(inspector: Inspector) -> None:
    assert inspector("batching=padded").examples == inspector("batching=packed").examples


def test_a_token_of_half_a_character_is_shown_as_bytes(inspector: Inspector) -> None:
    inspector.train[0]["prompt"] = "é"
    example = next(each for each in inspector(examples=40).examples if len(each.parts[0].tokens) == 2)
    assert [token.text for token in example.parts[0].tokens] == ["\\xc3", "\\xa9"]


# ---- The terminal ----


def test_lines_fit_a_terminal_and_hold_no_control_characters(inspector: Inspector) -> None:
    for index in (0, 1, 2):
        inspector.train[index]["prompt"] = f"\x1b[31mred \x07 東京 {index}" * 9
    inspector.train += [inspector.train[0]]
    text = format_inspection(inspector(examples=40), Terminal(width=80))
    assert max(map(columns, text.splitlines())) <= 80
    assert "\x1b" not in text and "\x07" not in text
    assert "duplicates: 1 of 51 examples" in text


def test_colour_is_for_terminals(inspector: Inspector) -> None:
    inspection = inspector()
    coloured = format_inspection(inspection, Terminal(has_colour=True))
    assert "\x1b[32m" in coloured and re.sub(r"\x1b\[[\d;]*m", "", coloured) == format_inspection(
        inspection, Terminal()
    )
    assert format_inspection(inspection, Terminal(has_unicode=False)).isascii()


class Stream(io.StringIO):
    """A terminal, or a file, with an encoding."""

    def __init__(self, is_terminal: bool, encoding: str):
        super().__init__()
        self.is_terminal, self.name_of_encoding = is_terminal, encoding

    def isatty(self) -> bool:
        return self.is_terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.name_of_encoding


def test_the_terminal_decides_on_colour_width_and_characters(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal_of(Stream(True, "utf-8")) == Terminal(100, has_colour=True, has_unicode=True)
    assert terminal_of(Stream(False, "ANSI_X3.4-1968")) == Terminal(80, has_colour=False, has_unicode=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "500")
    assert terminal_of(Stream(True, "UTF-8")) == Terminal(120, has_colour=False, has_unicode=True)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", *arguments])
    return inspect_data.main()


def test_the_command(inspector: Inspector, monkeypatch, capsys) -> None:
    assert run(monkeypatch, *inspector.overrides(), "examples=1") == 0
    out = capsys.readouterr().out
    assert "Tokens fed" in out and "chosen: " in out and "Findings: none" in out


@pytest.mark.parametrize(
    "arguments, status, problem",
    [
        (["loss=dpo"], 2, "loss.beta: is required"),
        (["datasets=nowhere.jsonl"], 2, "nowhere.jsonl does not exist"),
        (["lrr=1"], 2, "lrr: unknown key"),
        (["-m", "seed=1,2"], 2, "-m: no such option here"),
        (["contamination=nowhere.txt"], 2, "contamination: must be null or an existing file"),
        (["examples=-1"], 2, "examples: must be an integer of at least 0"),
        (["+model._target_=os.system"], 2, "would run code"),
        (["hydra.searchpath=[pkg://os]"], 2, "would run code"),
    ],
)
def test_mistakes_on_the_command_line(arguments, status, problem, monkeypatch, capsys) -> None:
    assert run(monkeypatch, *arguments) == status
    err = capsys.readouterr().err
    assert problem in err and len(err.splitlines()) == 1


def test_help_lists_the_own_keys(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert all(f"{key}=" in out for key in ("page", "examples", "contamination", "near_duplicates"))


# ---- Parts ----


def test_similar_sets_against_all_pairs() -> None:
    rng = np.random.default_rng(0)
    base = [rng.integers(0, 500, 60) for _ in range(30)]
    sets = [pieces(tokens) for tokens in base]
    for tokens in base[:10]:
        changed = tokens.copy()
        changed[3] = 501
        sets.append(pieces(changed))
    expected = {
        later
        for later in range(len(sets))
        if any(jaccard(sets[later], sets[earlier]) >= 0.8 for earlier in range(later))
    }
    assert expected == set(range(30, 40)) == {later for later, _ in similar_sets(sets)}


def test_runs_of_words_are_found_as_by_comparing_all() -> None:
    vocabulary = words(3, "few").split()
    rng = random.Random(0)
    texts = [" ".join(rng.choices(vocabulary, k=40)) for _ in range(60)]
    wanted = {next(iter(word_runs(text))) for text in texts[:5]}
    index = RunIndex(wanted)
    for text in texts:
        assert (index.find(text) is not None) == (not wanted.isdisjoint(word_runs(text)))


def test_shares_keep_apart_none_few_and_all() -> None:
    assert [format_share(number, 100_000) for number in (0, 1, 30, 4_200, 50_000, 99_999, 100_000)] == [
        "0%", "<0.01%", "0.03%", "4.2%", "50%", ">99.99%", "100%",
    ]  # fmt: skip


# ---- The page ----


def test_the_page_is_whole_and_texts_of_the_data_are_inert(inspector: Inspector, monkeypatch, capsys) -> None:
    attack = "</style><script>alert(1)</script><img src=x onerror=alert(2)>\" onload='alert(3)' \x1b[31m"
    for index in range(40):  # in the findings, the places of dropped rows, and the tokens
        inspector.train[index]["prompt"] = f"{attack}{words(8, index)}{attack[:60]}"
    inspector.train += [inspector.train[0], {**inspector.train[1], "rejected": " "}]
    path = inspector.directory / "page.html"
    assert run(monkeypatch, *inspector.overrides(), f"page={path}") == 0
    assert capsys.readouterr().out.endswith(f"page: {path}\n")
    page = Tags(path.read_text(encoding="utf-8"))
    names = [name for name, _ in page.tags]
    assert not {"script", "img", "link", "iframe", "object"} & set(names) and names.count("style") == 1
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert not [key for _, attributes in page.tags for key in attributes if key in ("src", "href", "xlink:href")]
    assert names.count("svg") == 5  # three lengths, the difference, the similarity
    assert "<script>alert(1)</script>" in page.text and "duplicates: 1 of 51 examples" in page.text
    assert "\x1b" not in page.text
    policy = next(each["content"] for _, each in page.tags if each.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_the_page_shows_every_token(inspector: Inspector) -> None:
    inspector.train[0]["prompt"] = words(100, "long")
    inspection = inspector(examples=40)
    html = format_page(inspection)
    tokens = [token for example in inspection.examples for part in example.parts for token in part.tokens]
    assert html.count('<span class="token') == len(tokens)
    assert sum(name == "small" for name, _ in Tags(html).tags) == len(tokens)


def test_a_page_that_cannot_be_written_is_an_error_at_once(tmp_path: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, f"page={tmp_path / 'nowhere' / 'page.html'}") == 2
    assert "there is no directory" in capsys.readouterr().err
    assert run(monkeypatch, f"page={tmp_path}") == 2
    assert "is a directory" in capsys.readouterr().err


def test_charts_that_cannot_be_drawn_are_an_error(inspector: Inspector, monkeypatch) -> None:
    worker = inspector.directory / "worker.py"
    worker.write_text("raise SystemExit('no converter here')")
    monkeypatch.setattr("engine.pages.drawing.WORKER", worker)
    with pytest.raises(UserError, match="its charts cannot be drawn"):
        format_page(inspector())


def test_bins_count_every_value_up_to_the_99th_percentile() -> None:
    values = np.array([0] * 5 + [1] * 90 + [2] * 4 + [1000])
    edges, counts = bins(values)
    assert edges[:3].tolist() == [0, 1, 2] and counts.sum() >= 99 and counts[:2].tolist() == [5, 90]
    _, shares = bins(np.array([0.0, 0.5, 1.0]))
    assert shares.sum() == 3
