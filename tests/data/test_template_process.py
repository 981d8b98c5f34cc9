"""Chat templates that loop or grow without end are stopped, in a child process."""

import os
import signal
import time

import pytest

from engine.data import template_process
from engine.data.rows import RowCounts
from engine.data.template_process import TemplateLimit, TemplateProcess
from tests.data.samples import CHAT, CHATML, assistant, byte_tokenizer, load_rows, user
from tests.quick import slow_except
from utils import UserError

TEXT = {"conversations": [[user("hi")]], "add_generation_prompt": True}


@pytest.fixture(scope="module")
def process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_process, "MAX_SECONDS", 1)
        patch.setattr(template_process, "MAX_BYTES", 2**30)
        process = TemplateProcess()
        yield process
    process.close()


def test_texts_are_those_of_transformers(process, tokenizer):
    messages = [{"role": "system", "content": "half \ud800 of 文字\x00"}, user("hi\n"), assistant("<eos>")]
    texts = [{"conversations": [messages[:n]], "add_generation_prompt": n == 2} for n in (2, 3)]
    expected = [
        tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=n == 2) for n in (2, 3)
    ]
    assert process.render({"chat_template": CHATML, **tokenizer.special_tokens_map}, texts) == expected


LOOP = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set s = namespace(x='aaaa') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "problem"),
    slow_except(
        [
            (LOOP, "takes more than 1 s of processor time"),
            ("{{ 3 ** (10 ** (8 + messages | length)) }}", "takes more than 1 s of processor time"),
            (DOUBLE, "needs more than 1 GB of memory"),
            ("{{ 'a' * 10 ** 10 }}", "needs more than 1 GB of memory"),  # jinja computes it when it compiles
            ("{{ ([0] * 10 ** 10) | length }}", "needs more than 1 GB of memory"),
            ("{{ messages[0].content | center(10 ** 10) }}", "needs more than 1 GB of memory"),
            ("{{ messages | tojson(indent=10 ** 9) }}", "needs more than 1 GB of memory"),
            ("{{ '%0100000000000d' % 1 }}", "needs more than 1 GB of memory"),
            ("{% for a in range(90000) %}{{ 'abcd' }}{% endfor %}", r"writes more than 10\d,\d\d\d characters"),
        ],
        LOOP,
        "{{ 'a' * 10 ** 10 }}",
        "{{ '%0100000000000d' % 1 }}",
        "{% for a in range(90000) %}{{ 'abcd' }}{% endfor %}",
    ),
)
def test_bombs(process, template, problem):
    start = time.monotonic()
    with pytest.raises(TemplateLimit, match=problem):
        process.render({"chat_template": template}, [TEXT])
    assert time.monotonic() - start < 20
    assert process.render({"chat_template": "{{ messages[0].content }}"}, [TEXT]) == ["hi"]


def test_endless_recursion_is_an_error_of_the_template(process):
    with pytest.raises(ValueError, match="recursion"):
        process.render({"chat_template": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"}, [TEXT])


def test_an_idle_child_ends_and_another_starts(process, monkeypatch):
    monkeypatch.setattr(template_process, "IDLE_SECONDS", 1)
    process.close()
    assert process.render({"chat_template": "{{ messages | length }}"}, [TEXT]) == ["1"]
    child = process._child
    assert child.wait(timeout=20) == -signal.SIGALRM
    assert process.render({"chat_template": "{{ messages | length }}"}, [TEXT, TEXT]) == ["1", "1"]
    assert process._child is not child
    process.close()


def test_an_interrupted_reply_is_not_the_next_one(process):
    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        process.render({"chat_template": "warm"}, [TEXT])
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            process.render({"chat_template": LOOP}, [TEXT])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert process.render({"chat_template": "next"}, [TEXT]) == ["next"]


def test_a_killed_child_is_a_limit(process):
    process.render({"chat_template": "warm"}, [TEXT])
    os.kill(process._child.pid, signal.SIGKILL)
    with pytest.raises(TemplateLimit, match="ended its process with SIGKILL"):
        process.render({"chat_template": "x"}, [TEXT])


def test_a_bomb_ends_the_run_though_bad_rows_are_dropped(tmp_path):
    tokenizer = byte_tokenizer(chat_template="{{ messages[0].content }}{{ 'a' * 10 ** 10 }}")
    counts = RowCounts(on_bad_row="drop")
    with pytest.raises(UserError, match=r"rows.jsonl line 1: the chat template needs more than \d GB of memory; fix: "):
        load_rows(tmp_path, [CHAT], tokenizer, counts=counts)
    assert not counts.dropped
