"""Votes of compare.py: the file, the win rate, prompts to vote on; train.py learns from them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

import compare
from compare import CompareOptions
from engine.compare import votes as votes_module
from engine.compare.prompts import read_prompts, split_dialogue
from engine.compare.votes import Tally, VoteFile, count_votes, preference_columns
from engine.data.chat import Chat
from engine.settings.options import parse_arguments
from tests.compared import Fake, ask, browser, compared, finish, give_votes, vote
from tests.runs import Program
from tests.tokenizer_files import byte_level
from utils import UserError

DIALOGUE = "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant:"


@pytest.fixture
def votes(tmp_path: Path) -> Iterator[VoteFile]:
    file = VoteFile(tmp_path / "votes.jsonl")
    yield file
    file.close()


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(byte_level(), "hh")


# ---- Votes ----


def test_a_vote_is_a_row_and_is_counted_once(votes, chat):
    session = compared(votes, is_swapped=True, columns=lambda *arguments: preference_columns(chat, *arguments))
    client = browser(session)
    ask(client, session, "Is it\r\ngood?")
    first = vote(client, session, "a")
    assert "You chose dpo." in first.text and "1.000" not in first.text and "0.000" in first.text
    assert vote(client, session, "b").status_code == 409
    (row,) = [json.loads(line) for line in votes.path.read_text().splitlines()]
    expected: dict[str, Any] = {
        "prompt": "\n\nHuman: Is it\ngood?\n\nAssistant:",
        "chosen": " hello",
        "rejected": " good day",
    }
    expected |= {"weight": 1.0, "vote": "against", "model": "/runs/sft", "against": "/runs/dpo", "cut": []}
    assert {name: row[name] for name in expected} == expected and row.keys() - expected.keys() == {"time"}


@pytest.mark.parametrize("choice, name", [("tie", "tie"), ("bad", "both bad")])
def test_a_tie_has_no_weight(votes, choice, name):
    for is_swapped in (False, True):
        session = compared(votes, is_swapped=is_swapped)
        client = browser(session)
        ask(client, session)
        vote(client, session, choice)
    assert [(row["vote"], row["weight"], row["chosen"][0]["content"]) for row in votes.rows] == [
        (name, 0, "good day")
    ] * 2
    assert session.tally.win_rate.value == 0.5


def test_a_nul_byte_does_not_reach_the_file(votes):
    """Models of bytes sample it, and train.py refuses rows with one."""
    session = compared(votes, Fake("sft", ["a\0b"]), Fake("dpo", ["c"]))
    client = browser(session)
    ask(client, session, "d\0e")
    assert vote(client, session, "a").status_code == 200
    assert "\\u0000" not in votes.path.read_text() and "a\ufffdb" in votes.path.read_text()
    assert votes.rows[0]["prompt"][-1]["content"] == "d\ufffde"


def test_equal_responses_have_no_better_one(votes):
    session = compared(votes, Fake("sft", ["same"]), Fake("dpo", [" same"]))
    client = browser(session)
    ask(client, session)
    page = client.get("/").text
    assert "Both responses are the same." in page and "A is better" not in page
    assert vote(client, session, "a").status_code == 409 and vote(client, session, "tie").status_code == 200
    assert len(votes.rows) == 1


def test_a_vote_that_cannot_be_written_can_be_repeated(votes, monkeypatch):
    session = compared(votes)
    client = browser(session)
    ask(client, session)
    write = os.write
    monkeypatch.setattr(votes_module.os, "write", lambda file, data: write(file, data[:20]))  # a full disk
    answer = vote(client, session, "a")
    assert answer.status_code == 507 and "error[STORAGE]" in answer.text and "Which response is better?" in answer.text
    assert "Response A: sft" not in answer.text
    assert votes.path.read_bytes() == b"" and votes.rows == []
    monkeypatch.undo()
    assert vote(client, session, "a").status_code == 200
    assert json.loads(votes.path.read_text())["vote"] == "model"


def test_the_file_is_continued_by_one_command_at_a_time(tmp_path, capsys):
    path = tmp_path / "votes.jsonl"
    path.write_text('{"prompt": "mine", "chosen": "x", "rejected": "y"}\n{"vote": "mo')
    file = VoteFile(path)
    assert "incomplete last line" in capsys.readouterr().err
    with pytest.raises(UserError, match="another command writes"):
        VoteFile(path)
    file.add({"vote": "tie", "text": "ü\n"})
    file.close()
    path.write_text(path.read_text().rstrip("\n"))  # an editor may leave the last end of line out
    file = VoteFile(path)
    assert [row.get("vote") for row in file.rows] == [None, "tie"]
    file.add({"vote": "model"})
    file.close()
    assert [json.loads(line).get("vote") for line in path.read_text().splitlines()] == [None, "tie", "model"]


@pytest.mark.parametrize("content", ["no json\n{}\n", "[1]\n"])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "votes.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="line 1 is not a JSON object"):
        VoteFile(path)
    assert path.read_text() == content


def test_a_file_without_votes_is_removed(tmp_path):
    VoteFile(tmp_path / "votes.jsonl").close()
    assert not list(tmp_path.iterdir())
    for path in (tmp_path / "none" / "votes.jsonl", tmp_path / "votes.csv"):
        with pytest.raises(UserError, match="votes: "):
            VoteFile(path)


def test_votes_are_counted_in_either_order():
    rows = [{"vote": "model", "model": "x", "against": "y"}, {"vote": "against", "model": "y", "against": "x"}]
    rows += [{"vote": "tie", "model": "y", "against": "x"}, {"vote": "both bad", "model": "x", "against": "y"}]
    rows += [{"vote": "against", "model": "x", "against": "y"}]
    others: list[Any] = [{"vote": "model", "model": "x", "against": "z"}, {"prompt": "p", "chosen": "c"}, {"vote": 3}]
    assert count_votes([*rows, *others], "x", "y") == Tally(wins=2, losses=1, ties=1, both_bad=1)
    assert count_votes(rows, "y", "x") == Tally(wins=1, losses=2, ties=1, both_bad=1)


@pytest.mark.parametrize("wins, count", [(0, 1), (1, 1), (7, 12), (50, 100), (0, 40), (999, 1000)])
def test_the_interval_is_wilsons(wins, count):
    expected = binomtest(wins, count).proportion_ci(0.95, "wilson")
    found = Tally(wins=wins, losses=count - wins).win_rate
    assert (found.value, found.low, found.high) == pytest.approx((wins / count, expected.low, expected.high), abs=1e-12)


# ---- Prompts of a file ----


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    "name, rows, expected",
    [
        ("p.txt", "one\n\n two \none\n", [[user("one")], [user("two")]]),
        ("p.jsonl", [{"prompt": "one"}, {"prompt": [user("two")]}], [[user("one")], [user("two")]]),
        ("p.jsonl", [{"prompt": "\n\nHuman: one\n\nAssistant:", "chosen": " x", "rejected": " y"}], [[user("one")]]),
        (
            "p.jsonl",
            [{"chosen": f"{DIALOGUE} 4", "rejected": f"{DIALOGUE} 5"}],
            [[user("1"), {"role": "assistant", "content": "2"}, user("3")]],
        ),
        (
            "p.jsonl",
            [{"system": "S", "messages": [user("1"), {"role": "assistant", "content": "2"}]}],
            [[{"role": "system", "content": "S"}, user("1")]],
        ),
        ("p.jsonl", [{"instruction": "do", "input": "this", "output": "x"}], [[user("do\n\nthis")]]),
    ],
)  # fmt: skip
def test_prompts_of_any_form(tmp_path, name, rows, expected):
    path = tmp_path / name
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(path, byte_level()) == expected


def test_a_file_without_prompts_is_refused(tmp_path):
    for name, content in (("p.txt", "\n \n"), ("p.jsonl", ""), ("p.txt", b"\xff"), ("p.bin", "x")):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(UserError, match="DATA"):
            read_prompts(path, byte_level())


def test_a_text_that_only_mentions_a_turn_is_a_question():
    assert split_dialogue("what is \n\nHuman: here?") == [user("what is \n\nHuman: here?")]


def test_prompts_are_offered_in_order_without_those_with_a_vote(votes):
    prompts: list[Any] = [[user("first?")], [user("second?")], [user("third?")]]
    session = compared(votes, prompts=prompts)
    client = browser(session)
    assert "Prompt 1 of 3" in client.get("/").text and "first?" in client.get("/").text
    client.post("/ask", data={"number": "1"})
    finish(session)
    vote(client, session, "tie")
    again = compared(votes, prompts=prompts)  # the next command
    assert again.next_prompt() == 0
    client = browser(again)
    for number in ("0", "2"):
        client.post("/ask", data={"number": number})
        finish(again)
        vote(client, again, "tie")
    page = client.get("/").text
    assert "That was the last of 3 prompts." in page and 'name="prompt"' in page
    assert compared(votes, prompts=prompts).next_prompt() is None
    other = compared(votes, Fake("sft", ["x"]), Fake("third", ["y"]), prompts=prompts)  # votes on other models
    assert other.next_prompt() == 0


def test_the_system_prompt_is_of_both_and_in_the_row(votes):
    session = compared(votes, system="Be brief.", prompts=[[{"role": "system", "content": "Rhyme."}, user("a?")]])
    client = browser(session)
    ask(client, session, "hi")
    vote(client, session, "a")
    client.post("/ask", data={"number": "0"})
    finish(session)
    system = {"role": "system", "content": "Be brief."}
    assert [model.seen[0] for model in session.responders] == [[system, user("hi")]] * 2  # type: ignore[attr-defined]
    assert votes.rows[0]["prompt"] == [system, user("hi")]
    assert session.responders[0].seen[1][0]["content"] == "Rhyme."  # type: ignore[attr-defined]


# ---- From real models to training ----


@pytest.fixture
def two_runs(program: Program, sft_run: Path) -> Path:
    arguments = ["loss=dpo", "loss.beta=0.1", f"model.archive={sft_run}", "n_examples=8"]
    return program.ok(*arguments, "local_run_dir=" + str(program.directory / "dpo")).dir


def test_training_reads_the_votes(program, sft_run, two_runs, monkeypatch):
    """Real models respond, votes are given, and train.py learns from them."""
    monkeypatch.chdir(program.directory)
    votes = VoteFile(Path("votes.jsonl"))
    options = parse_arguments(CompareOptions, [f"model={sft_run}", f"against={two_runs}", "max_new_tokens=8"])
    session = compare.make_session(options, votes)
    give_votes(browser(session), session, ["a", "b", "tie", "a"])
    assert [row["weight"] for row in votes.rows] == [1, 1, 0, 1]
    votes.close()
    run = program.ok("loss=dpo", "loss.beta=0.1", "datasets=[votes.jsonl]", "test_fraction=0.34", "n_examples=8")
    assert "of 4 rows have a weight other than 1, 1 of them 0 (dropped)" in run.out
    assert run.steps
    again = VoteFile(Path("votes.jsonl"))
    with pytest.raises(UserError, match="has prompts of text, and this model's are messages"):
        compare.make_session(options.model_copy(update={"chat_template": "chatml"}), again)
    again.close()
