"""Generate bad configs and bad data, and parts of their error messages; deterministic for a seed."""

import gzip
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.settings.annotations import accepts, describe
from engine.settings.keys import key_types, loss_types

# ---- Configs ----


@dataclass(frozen=True)
class BadConfig:
    """Overrides with an error of status 2; its line must contain every text of `says`."""

    kind: str
    overrides: tuple[str, ...]
    says: tuple[str, ...] = ()


def make_typo(name: str, rng: random.Random) -> str:
    """Make one typo in a name: a letter is omitted, doubled, swapped with the next, or replaced."""
    position = rng.randrange(1, len(name) - 1)
    before, letter, after = name[:position], name[position], name[position + 1 :]
    wrong = rng.choice(
        [before + after, before + letter * 2 + after, before + after[0] + letter + after[1:], before + "q" + after]
    )
    return wrong if wrong != name else before + after


def bad_values(annotation: Any) -> list[str]:
    """Invalid command-line values for a key with this annotation."""
    words = describe(annotation)
    for_any_type = ["{a: 1}", "[[1]]", "{x: null}"]
    if "integer" in words:
        return [*for_any_type, "abc", "1.5", "-7", "true", "'3'", "''", "nan", "1e400", "[1]", "1,5'" + "'"]
    if "a number of layers" in words:
        return [*for_any_type, "some", "-1", "1.5", "null", "''"]
    if "a number" in words:
        return [*for_any_type, "abc", "nan", "inf", "-inf", "-1", "true", "'1'", "[0.1]", "''", "1e-6x", "0..1"]
    if words == "true or false":
        return [*for_any_type, "3", "yes", "no", "null", "[true]", "1.0", "'true'", "tru", "0"]
    if "list of" in words:
        empty = [] if accepts(annotation, []) else ["[]"]
        single = [] if accepts(annotation, "hh") else ["hh"]
        missing = [] if accepts(annotation, None) else ["null"]
        return [*empty, *single, *missing, "3", "[3]", "[null]", "['']", "{a: 1}", "true", "[[hh]]", "[true]"]
    if "existing" in words or "file" in words:
        return [*for_any_type, "3", "true", "/no/such/place", "''", "[x]", "'/tmp/\\x00'"]
    if words == "null or auto or a path":
        return [*for_any_type, "3", "true", "1.5", "''", "[x]"]
    if words.startswith(("null or", "text", "auto", "a name", "a model", "a tokenizer")) and " or " not in words[8:]:
        return [*for_any_type, "3", "true", "1.5", "''", "[x]"]
    if words == "anything":
        return []
    return [*for_any_type, "3", "true", "1.5", "''", "[x]", "no_such_choice", "-1"]


PATHS = (
    "local_run_dir", "cache_dir", "resume", "data_dir", "chat_template", "model.archive",
    "model.tokenizer_name_or_path", "model=blank_model model.name_or_path",
)  # fmt: skip
CONSTANT_CONFIGS = [
    ("n_epochs=null", "n_epochs: is null"),
    ("max_prompt_length=512", "max_prompt_length: must be below"),
    ("gradient_accumulation_steps=5", "gradient_accumulation_steps: must be at most"),
    ("n_eval_model_samples=300 sample_during_eval=true n_eval_examples=9", "n_eval_model_samples: must be at most"),
    ("mixed_precision=bfloat16 model.policy_dtype=float64", "mixed_precision: "),
    ("resume=auto", "resume: auto needs"),
    ("model.name_or_path=gpt2", "model.name_or_path: "),
    ("loss=dpo", "loss.beta: is required"),
    ("model=blank_model", "model.name_or_path: is required"),
    ("~lr", "lr: is not set"),
    ("~wandb", "wandb.enabled: is not set"),
    ("wandb=null", "wandb"),
    ("loss=null", "loss=null: a preset must be"),
    ("peft=nope", "peft=nope"),
    ("loss=dppo", "did you mean dpo?"),
    ("model=pythia2.8b", "model=pythia2.8b"),
    ("model=../loss/dpo", "model"),
    ("model=/etc/passwd", "model"),
    ("hydra/launcher=nope", "hydra/launcher=nope"),
    ("hydra/sweeper=nope", "hydra/sweeper"),
    ("+hydra/nope=x", "hydra/nope"),
    ("loss@x=dpo", "x"),
    ("+loss@x.y=dpo loss.beta=1", "x"),
    ("model@=gpt2", "model"),
    ("~nope", "nope"),
    ("~loss=dpo", "loss"),
    ("++optimizer.x=1", "optimizer"),
    ("lr.x=1", "lr"),
    ("wandb.enabled.x=1", "wandb.enabled"),
    ("+datasets.0=hh", "datasets"),
    ("lr=${lr}", "lr"),
    ("lr=${batch_size.x}", "lr"),
    ("lr=${nope}", "lr"),
    ("lr=${oc.env:NOT_THERE_AT_ALL}", "NOT_THERE_AT_ALL"),
    ("lr=${nope:1}", "nope"),
    ("lr=${oc.decode:'{'}", "lr"),
    ("seed=${lr} lr=${seed}", "seed"),
    ("lr=???", "lr"),
    ("wandb.entity=???", "wandb.entity"),
    ("exp_name=${local_dirs}", "exp_name"),
    ("lr", "'lr'"),
    ("=3", "=3: a preset must be a string"),
    ("lr='", "lr"),
    ("lr={", "lr"),
    ("lr=[1", "lr"),
    ("lr=${", "lr"),
    ("lr=a=b", "lr"),
    ("lr=\x00", "lr"),
    ("exp_name=a\nb", "exp_name"),
    ("exp_name='\udcff'", "exp_name"),
    ("+\udcff=1", ""),
    ("+a.b.c.d=1", "a.b.c.d: unknown key"),
    ("+lr=1", "lr"),
    ("+loss.beta=1", "loss.beta"),
    ("lr=1 lr=2,3", "lr"),
    ("lr=1,2", "multirun"),
    ("lr=range(1,3)", "lr"),
    ("lr=choice(1,2)", "lr"),
    ("lr=glob(*)", "lr"),
    ("lr=int(abc)", "lr"),
    ("lr=shuffle(3)", "lr"),
    ("lr=extend_list(1)", "lr"),
    ("+null=1", ""),
    ("+true=1", ""),
    ("'a b'=1", ""),
    ("+3=1", ""),
    ("hydra=null", "hydra"),
    ("hydra.mode=nope", "hydra"),
    ("hydra.run=3", "hydra"),
    ("hydra.nope=3", "hydra.nope"),
    ("--config-name=nope", "nope"),
    ("--config-dir=/no/such", "/no/such"),
    ("--config-path=/no/such", "/no/such"),
    ("--experimental-rerun=/no/such", ""),
    ("--nope", "--nope: no such option"),
    ("--config-d=/tmp", "--config-d=/tmp: no such option"),
    ("--cfg=nope", "invalid choice: 'nope'"),
    ("--info=nope", "invalid choice: 'nope'"),
    ("-m hydra.launcher=null", "launcher"),
    ("-m hydra.sweeper=3", ""),
    ("hydra.callbacks=3", "hydra.callbacks"),
    ("hydra/job_logging=nope", "hydra/job_logging"),
    ("hydra.output_subdir=.hydra", "hydra.output_subdir"),
    ("-m hydra.sweep.dir=/tmp/sweep", "hydra.sweep.dir"),
    ("-m lr=abc,-1", "lr"),
    ("-m loss=dpo,nope loss.beta=1", "write ++loss.beta"),
    ("-m loss=dpo,nope ++loss.beta=1", "nope"),
    ("-m lr=", "lr"),
    ("model.architecture={model_type: nope}", "model.architecture"),
    ("model.architecture={model_type: llama}", "model"),
    ("model.architecture.hidden_size=abc", "model.architecture"),
    ("model.architecture.hidden_size=-3", "model.architecture"),
    ("model.architecture.hidden_size=33", "model.architecture"),
    ("model.architecture.num_attention_heads=0", "model.architecture"),
    ("model.architecture.num_hidden_layers=0", "model.architecture"),
    ("model.architecture.num_hidden_layers=null", "model.architecture"),
    ("model.architecture.vocab_size=3", "model"),
    ("model.architecture.model_type=bert", "BertLMHeadModel"),
    ("model.architecture.model_type=clip", "model.architecture"),
    ("model.architecture.model_type=t5", "model.architecture"),
    ("+model.architecture.hidden_act=nope", "model.architecture"),
    ("+model.architecture.rope_scaling=3", "model.architecture"),
    ("model.architecture.max_position_embeddings=10", "max_length"),
    ("model.block_name=Nope activation_checkpointing=true", "model.block_name"),
    ("model.tokenizer_name_or_path=/etc", "model.tokenizer_name_or_path"),
    ("model=blank_model model.name_or_path=/etc", "model.name_or_path"),
    ("chat_template=/dev/null datasets=[CHAT]", "chat_template"),
    *[(f"{key}={name}", f"{key.split()[-1]}: ") for key in PATHS for name in (300 * "x", "/tmp/" + 2500 * "x/")],
    *[(f"{key}=[{300 * 'x'}]", f"{key}: ") for key in ("datasets", "local_dirs")],
    ("local_run_dir='a\x00b'", "local_run_dir"),
    ("cache_dir='a\x00b'", "cache_dir"),
    ("local_dirs=['a\x00b']", "local_dirs"),
    ("resume='a\x00b'", "resume"),
    ("model.archive='a\x00b'", "model.archive"),
    ("datasets=['a\x00b']", "datasets"),
    ("data_dir='a\x00b'", "data_dir"),
    ("chat_template='a\x00b'", "chat_template"),
    ("model.name_or_path='/a\x00b'", "model.name_or_path"),
    ("model.tokenizer_name_or_path='a\x00b'", "model.tokenizer_name_or_path"),
]


def bad_configs(rng: random.Random, count: int) -> Iterator[BadConfig]:
    """Yield `count` bad configs of all kinds."""
    losses = {name: loss_types(name) for name in ("sft", "dpo", "cdpo", "ipo")}
    cases = [(("loss=dpo", "loss.beta=0.1"), key, annotation) for key, annotation in key_types("dpo").items()]
    cases += [
        ((f"loss={name}", "loss.beta=0.1"), key, annotation)
        for name in ("cdpo", "ipo")
        for key, annotation in losses[name].items()
    ]
    wrong = [(base, key, value) for base, key, annotation in cases for value in bad_values(annotation)]
    rng.shuffle(wrong)
    # Hydra composes these, so one message reports all their problems.
    simple = [case for case in wrong if "loss.beta=0.1" in case[0] and "loss=dpo" in case[0] and case[1] != "loss.name"]
    simple = [case for case in simple if not set(case[2]) & set("'[{,")]
    constants = list(CONSTANT_CONFIGS)
    rng.shuffle(constants)
    long_keys = [key for key in key_types() if len(key.rpartition(".")[2]) > 6]
    for number in range(count):
        if number % 8 == 0 and constants:
            text, says = constants.pop()
            yield BadConfig("constant", tuple(text.split(" ") if "'" not in text else [text]), (says,))
        elif number % 8 in (1, 2):
            key = rng.choice(long_keys)
            prefix, dot, name = key.rpartition(".")
            typo = prefix + dot + make_typo(name, rng)
            yield BadConfig(
                "unknown key",
                (f"{rng.choice(['', '+', '++'])}{typo}=1",),
                (f"{typo}: unknown key (did you mean {key}?)",),
            )
        elif number % 8 == 3:
            one, other = rng.sample(simple, 2)
            while one[1] == other[1]:
                other = rng.choice(simple)
            overrides = (*one[0], f"{one[1]}={one[2]}", f"{other[1]}={other[2]}")
            yield BadConfig("two problems", overrides, (f"{one[1]}: ", f"{other[1]}: "))
        else:
            base, key, value = wrong.pop() if wrong else (*rng.choice(cases)[:2], "{a: 1}")
            yield BadConfig("value", (*base, f"{key}={value}"), (key,))


# ---- Data ----


@dataclass(frozen=True)
class BadData:
    """Files of a data set, and the expected error or counts.

    Args:
        files: name -> content. Of several files, the folder is the data set.
        where: the place in the error, like "line 3" or "row 2"; empty for the whole file.
        name: of the bad field; empty if there is none.
        counted: expected counts, in place of an error.
        data_set: its name in data_dir; empty for a user's file.
    """

    kind: str
    files: dict[str, bytes]
    where: str = ""
    name: str = ""
    counted: dict[str, Any] = field(default_factory=dict)
    data_set: str = ""
    can_drop: bool = True


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def good_row(form: str, n: int) -> dict[str, Any]:
    talk = f"\n\nHuman: question {n}?\n\nAssistant:"
    rows: dict[str, dict[str, Any]] = {
        "strings": {"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"},
        "transcripts": {"chosen": f"{talk} good", "rejected": f"{talk} bad"},
        "messages": {
            "chosen": [message("user", f"q{n}"), message("assistant", "good")],
            "rejected": [message("user", f"q{n}"), message("assistant", "bad")],
        },
        "sharegpt": {
            "conversations": [{"from": "human", "value": f"q{n}"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        "ranked": {"prompt": f"q{n}", "responses": ["best", "middle", "worst"], "scores": [3, 2.5, -1]},
        "hh": {"chosen": f"{talk} good", "rejected": f"{talk} bad"},
        "shp": {"history": f"q{n}", "human_ref_A": "a", "human_ref_B": "b", "score_A": 9, "score_B": 2, "labels": 1},
        "se": {"question": f"q{n}", "answers": [{"text": "<p>a</p>", "pm_score": 3}, {"text": "b", "pm_score": 1}]},
        "stack-exchange-paired": {"question": f"q{n}", "response_j": "a", "response_k": "b"},
    }
    return rows[form]


FORMS = ("strings", "transcripts", "messages", "sharegpt", "ranked")
NAMED = ("hh", "shp", "se", "stack-exchange-paired")
NOT_TEXT: tuple[Any, ...] = (None, 3, -1.5, True, [], ["x"], {}, {"a": 1}, "a\x00b", "\ud800", "x" * 2_000_001)
BAD_HTML = ("<div>" * 1000 + "x", "<b>" * 500 + "<p>x", "<a " * 20_000, "<a/" * 20_000, "<![<![")
NOT_NUMBERS: tuple[Any, ...] = (None, "3", True, [], {}, float("nan"), float("inf"), -float("inf"), 10**400)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the path and value of everything in a row."""
    if path:
        yield path, value
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths_of(item, (*path, key))


def with_change(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """Copy a row, and call change(container, key) at a path of the copy."""
    value = json.loads(json.dumps(value))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return value


def bad_row(form: str, rng: random.Random) -> tuple[str, Any, str]:
    """Make a bad row; returns (kind of error, row, outermost bad field)."""
    row = good_row(form, 99)
    if rng.random() < 0.1:
        return "not an object", rng.choice([None, 3, "text", [], [row], True]), ""
    path, value = rng.choice([(path, value) for path, value in paths_of(row)])
    optional = path[0] == "scores" and len(path) == 1
    if isinstance(path[-1], str) and not optional and rng.random() < 0.3:
        # Without a required column a user's file has no known form. The error then lists all columns.
        return "missing", with_change(row, path, lambda inner, key: inner.pop(key)), str(path[0])
    if isinstance(value, str):
        wrong = rng.choice(NOT_TEXT + BAD_HTML if form == "se" else NOT_TEXT)
    elif isinstance(value, list):
        wrong = rng.choice([None, 3, True, {}, "text"])
    elif isinstance(value, dict):
        wrong = rng.choice([None, 3, True, []])
    else:
        wrong = rng.choice(NOT_NUMBERS)
    kind = f"{type(value).__name__} is {type(wrong).__name__}"
    return kind, with_change(row, path, lambda inner, key: inner.__setitem__(key, wrong)), str(path[0])


def encode_rows(rows: list[Any], suffix: str) -> bytes:
    if suffix == ".parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    text = json.dumps(rows, indent=1) if suffix.startswith(".json") and "jsonl" not in suffix else lines(rows)
    return gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode()


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


BAD_LINES: dict[str, bytes] = {
    "cut short": b'{"prompt": "q", "cho',
    "no JSON": b"prompt,chosen,rejected",
    "quotes": b"{'prompt': 'q', 'chosen': 'a', 'rejected': 'b'}",
    "comma": b'{"prompt": "q", "chosen": "a", "rejected": "b",}',
    "two rows": b'{"prompt": "q", "chosen": "a", "rejected": "b"} {}',
    "not UTF-8": b'{"prompt": "q", "chosen": "\xff\xfe", "rejected": "b"}',
    "UTF-16": '{"prompt": "q", "chosen": "a"}'.encode("utf-16-le"),
    "NUL bytes": b"\x00\x00\x00\x00",
    "NUL in text": b'{"prompt": "q\x00", "chosen": "a", "rejected": "b"}',
    "control character": b'{"prompt": "q\x07", "chosen": "a", "rejected": "b"}',
    "nested": b"[" * 100_000,
    "nested objects": b'{"prompt": ' * 50_000,
    "digits": b'{"prompt": ' + b"1" * 5000 + b', "chosen": "a", "rejected": "b"}',
    "half an escape": b'{"prompt": "\\u12", "chosen": "a", "rejected": "b"}',
    "a word": b"null",
}


def bad_data(rng: random.Random, count: int, *, large: bool = True) -> Iterator[BadData]:
    """Yield `count` bad data sets of all kinds; if large, some with rows of 50 MB."""
    for number in range(count):
        kind = number % 10
        position = rng.randrange(6)
        if kind < 5:  # a row of a form
            form = FORMS[number // 10 % 5] if kind < 4 else NAMED[number // 10 % 4]
            suffix = (
                rng.choice([".jsonl", ".jsonl.gz", ".json", ".json.gz"])
                if kind < 4
                else rng.choice([".jsonl", ".jsonl.gz"])
            )
            what, row, name = bad_row(form, rng)
            if isinstance(row, list) and position == 0 and "jsonl" in suffix:
                position = 1  # a list in the first line would be the whole file
            rows = [good_row(form, n) for n in range(6)]
            rows[position] = row
            where = f"line {position + 1}" if "jsonl" in suffix else f"row {position}"
            is_named = form in NAMED
            data = encode_rows(rows, suffix)
            files = (
                {f"{form}/{split}{suffix}": data for split in ("train", "test")}
                if is_named
                else {f"my data{suffix}": data}
            )
            yield BadData(f"{form}: {what}", files, where, name, data_set=form if is_named else "")
        elif kind == 5:  # a line without a row
            what, line = rng.choice(list(BAD_LINES.items()))
            good = [json.dumps(good_row("strings", n)).encode() for n in range(6)]
            good[position] = line
            if position == 0 and line.startswith(b"["):
                good.insert(0, json.dumps(good_row("strings", 9)).encode())
                position = 1
            data = b"\n".join(good) + b"\n" * rng.randrange(2)
            zipped = rng.random() < 0.3
            yield BadData(
                f"line: {what}",
                {"a.jsonl.gz" if zipped else "a.jsonl": gzip.compress(data) if zipped else data},
                f"line {position + 1}",
            )
        elif kind == 6:
            yield bad_file(rng)
        elif kind == 7:
            yield large_line(rng) if large and number % 50 == 7 else bad_list(rng)
        elif kind == 8:
            yield counted(rng)
        else:
            yield bad_column(rng)


def large_line(rng: random.Random) -> BadData:
    good = [lines([good_row("strings", n)]).encode() for n in range(6)]
    position = rng.randrange(1, 6)
    text = (b'{"prompt": "q", "chosen": "', b"x" * 50_000_000, b'", "rejected": "b"}\n')
    zeros = (b"", b"\x00" * 50_000_000, b"\n")
    numbers = (b"[", b"10," * 17_000_000, b"1]\n")
    good[position] = b"".join(rng.choice([text, zeros, numbers]))
    return BadData("a line of 50 MB", {"big.jsonl": b"".join(good)}, f"line {position + 1}")


def bad_list(rng: random.Random) -> BadData:
    rows = [good_row("ranked", n) for n in range(6)]
    position = rng.randrange(6)
    del rows[position]["scores"]
    rows[position]["responses"] = rng.choice([[], ["x"] * 2000, ["x", 3], "x"])
    return BadData("responses", {"r.jsonl": lines(rows).encode()}, f"line {position + 1}", "responses")


def bad_column(rng: random.Random) -> BadData:
    """A parquet file with nulls in a column, or a column of another type."""
    rows = [good_row("strings", n) for n in range(6)]
    position = rng.randrange(6)
    column = rng.choice(["prompt", "chosen", "rejected"])
    wrong = rng.choice([None, 3, 1.5, True, [1], {"a": 1}, b"bytes"])
    for row in rows if wrong is not None else rows[position : position + 1]:
        row[column] = wrong
    where = f"row {0 if wrong is not None else position}"
    return BadData(
        "parquet column", {"p.parquet": encode_rows(rows, ".parquet")}, where, column, can_drop=wrong is None
    )


def bad_file(rng: random.Random) -> BadData:
    good = [good_row("strings", n) for n in range(50)]
    text, array, zipped, parquet = (
        lines(good).encode(),
        encode_rows(good, ".json"),
        encode_rows(good, ".jsonl.gz"),
        encode_rows(good, ".parquet"),
    )
    cut = rng.randrange(30, len(zipped) - 30)
    noise = rng.randbytes(200)
    kinds: dict[str, tuple[str, bytes]] = {
        "empty": ("e.jsonl", b""),
        "empty json": ("e.json", b""),
        "empty gzip": ("e.jsonl.gz", b""),
        "empty gzip inside": ("e.jsonl.gz", gzip.compress(b"")),
        "empty parquet": ("e.parquet", b""),
        "empty list": ("e.json", b"[]"),
        "white space": ("w.jsonl", b" \n\n\t\n"),
        "byte order mark": ("b.jsonl", b"\xef\xbb\xbf"),
        "gzip cut short": ("g.jsonl.gz", zipped[:cut]),
        "gzip that is none": ("g.jsonl.gz", text),
        "gzip with a damage": ("g.jsonl.gz", zipped[:cut] + bytes([zipped[cut] ^ 255]) + zipped[cut + 1 :]),
        "plain that is gzip": ("g.jsonl", zipped),
        "parquet cut short": ("p.parquet", parquet[: rng.randrange(1, len(parquet) - 1)]),
        "parquet that is none": ("p.parquet", text),
        "noise": ("n.jsonl", noise.replace(b"[", b"(").replace(b"{", b"(")),
        "noise parquet": ("n.parquet", noise),
        "list cut short": ("l.json", array[: rng.randrange(2, len(array) - 3)]),
        "list with more": ("l.json", array + b"x"),
        "list of lists": ("l.json", json.dumps([[1], [2]]).encode()),
        "unknown suffix": ("l.csv", text),
        "no suffix": ("data", text),
        "another form": ("f.jsonl", lines([{"instruction": "q", "output": "a"}] * 3).encode()),
        "columns": ("c.json", json.dumps({"prompt": ["q"], "chosen": ["a"], "rejected": ["b"]}).encode()),
    }
    kind = rng.choice(list(kinds))
    name, data = kinds[kind]
    return BadData(f"file: {kind}", {name: data}, can_drop=False)


def counted(rng: random.Random) -> BadData:
    rows = [good_row("strings", n) for n in range(20)]
    number = rng.randrange(1, 8)
    chosen = rng.sample(rows, number)
    kind = rng.choice(
        ["duplicates", "contradictions", "shared", "empty response", "chosen equal to rejected", "prompts differ"]
    )
    if kind == "duplicates":
        return BadData(kind, {"d.jsonl": lines(rows + chosen).encode()}, counted={"duplicates": number})
    if kind == "contradictions":
        swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in chosen]
        return BadData(kind, {"d.jsonl": lines(rows + swapped).encode()}, counted={"contradictions": number})
    if kind == "shared":
        files = {"train.jsonl": lines(rows).encode(), "test.jsonl": lines(chosen).encode()}
        return BadData(kind, files, counted={"shared": number})
    if kind == "prompts differ":
        talks = [good_row("transcripts", n) for n in range(20)]
        for row in talks[:number]:
            row["rejected"] = "\n\nHuman: another\n\nAssistant: x"
        reason = "prompts of chosen and rejected differ"
        return BadData(kind, {"d.jsonl": lines(talks).encode()}, counted={"dropped": {reason: number}})
    for row in chosen:
        row["chosen"] = rng.choice(["", " ", "\n\t"]) if kind == "empty response" else row["rejected"]
    return BadData(kind, {"d.jsonl": lines(rows).encode()}, counted={"dropped": {kind: number}})
