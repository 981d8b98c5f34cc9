"""README.md and docs/: every command runs, every link leads somewhere, and the tables are complete.

Each block of commands runs in order, in a folder of its own, inside this process. Large models, hub data and several
processes are replaced by the nearest form: a tiny model, the embedded data, one process.
"""

import io
import json
import re
import runpy
import shlex
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import chat
import compare
import evaluate
import export
import inspect_data
import report
from docs import make_config
from engine.compare import server
from engine.compare.session import Session
from engine.export.saved_models import load_saved
from engine.judges.client import JudgeClient
from engine.models.score_head import AUTO_CLASSES, SCORE_WEIGHT
from engine.settings.hydra_guard import check_command_line
from engine.settings.keys import all_keys
from losses import LOSSES
from tests.compared import ask, browser, give_votes
from tests.configs import composed
from tests.runs import QUICK, SMALL, Program, call_main
from utils import EXIT_STATUS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICKER = (*QUICK, "n_eval_model_samples=2", "max_length=260", "max_prompt_length=200")


# ---- Reading the pages ----


def blocks(page: Path) -> list[list[str]]:
    """The commands in each of a page's bash blocks, without comments, continued lines joined."""
    texts = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    plain = (re.sub(r" +#.*", "", text).replace("\\\n", " ") for text in texts)
    return [[" ".join(line.split()) for line in text.splitlines()] for text in plain]


def num_runs(block: list[str]) -> int:
    return sum(3 if " -m " in line else 1 for line in block if "train.py" in line)


def cases() -> list[object]:
    """Every block once, with its page; those of extend.md run in tests/test_extend.py."""
    found: dict[str, object] = {}
    for page in PAGES:
        for number, block in enumerate(blocks(page)) if page.stem != "extend" else ():
            marks = [pytest.mark.slow] * (page.stem != "README")
            text = "\n".join(map(nearest_form, block))
            found.setdefault(text, pytest.param(block, id=f"{page.stem}-{number}", marks=marks))
    return list(found.values())


# ---- The nearest form of a command ----

OWN_DATA = r"(?=.*(TEXTS|mine\.jsonl|questions\.jsonl|labels\.jsonl|votes\.jsonl|chats\.jsonl|data_dir=))"
# Replacements of models, data and files that a test lacks.
STAND_INS = [
    (r"^(python (-u )?|torchrun .*)train\.py ?", "train.py "),
    (r"model=blank_model model\.name_or_path=(?!mine)\S+", "model=tiny"),
    (r" model\.block_name=\S+", ""),  # of the replaced model
    (r"\bmodel=(?!tiny|blank_model|15m)\S+", "model=tiny"),
    (r"tokenizer\.train=\d+", "tokenizer.train=300"),
    (r"(\+experiment=\S+)", r"\1 model=tiny datasets=films"),
    (rf"^(?!{OWN_DATA})(.*)datasets=(?!films)\S+", r"\2datasets=films"),
    (r"/path/to/sft", "SFT_RUN"),
    (r"step-\d+", "step-4"),
    (r"save_every=\d+", "save_every=4"),
    (r"n_epochs=\d+ ?", ""),
    (r"n_eval_model_samples=\d+", "n_eval_model_samples=2"),
    (r"win_rate\.prompts=\d+", "win_rate.prompts=4"),
    (r"(win_rate\.judge=\S+)", r"\1 sample_during_eval=true"),
]
# A plan starts no processes, so its sizes can stay.
SIZES = [
    (r"(num_processes|tensor_parallel_size)=\d+", r"\1=1"),  # tests/test_sharded_runs.py has several
    (r"batch_size=\d+", "batch_size=2"),
]


def nearest_form(command: str) -> str:
    """A command of train.py with its stand-ins; another command as it is."""
    if "train.py" not in command:
        return command
    for pattern, replacement in STAND_INS + ([] if "plan=true" in command else SIZES):
        command = re.sub(pattern, replacement, command)
    return command


# ---- Running a block ----


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A finished run of SFT."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        directory = tmp_path_factory.mktemp("archive")
        arguments = [*SMALL, *QUICKER, "n_examples=4", f"cache_dir={cache}", f"local_run_dir={directory / 'run'}"]
        assert call_main(arguments, monkeypatch) == 0
    return directory / "run"


def make_places(archive: Path) -> None:
    """The files that commands name, in this directory: runs, rows and prompts."""
    for name in ("RUN", "OTHER", "SFT_RUN"):
        Path(name).symlink_to(archive)
    Path("prompts.txt").write_text("Is it any good?\n")
    rows = [{"prompt": f"Q{n}?", "chosen": f" yes, {n}.", "rejected": f" no, not {n}."} for n in range(12)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("benchmark.jsonl").write_text(json.dumps({"question": "one two three four five " * 4}) + "\n")
    questions = [{"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in range(12)]
    (task,) = re.findall(r"```yaml\n(task: .*?)```", (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8"), re.S)
    Path("mine.yaml").write_text(task.replace("questions.jsonl", "choices.jsonl"))
    choices = [{"question": f"{n} + 1 =", "choices": [str(n + 1), "0"], "answer": 0} for n in range(4)]
    Path("choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    labelled = [{"prompt": f"Q{n}?", "completion": f" A{n}.", "label": n % 3 > 0} for n in range(12)]
    Path("labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    turns = [[{"role": "user", "content": f"Q{n}?"}, {"role": "assistant", "content": f"A{n}."}] for n in range(12)]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": [*turn, *turn]}) + "\n" for turn in turns))
    Path("TEXTS").mkdir()
    for n in range(24):
        Path("TEXTS", f"{n}.txt").write_text("".join(f"Line {i} of text {n}: {i * n}.\n" for i in range(12)))
    Path("more.jsonl").write_text("".join(json.dumps({"content": f"More of it, {n}. " * 9}) + "\n" for n in range(40)))
    Path("DATA/hh").mkdir(parents=True)
    for split in ("train", "test"):
        prompts = [f"\n\nHuman: {split} {n}?\n\nAssistant:" for n in range(8)]
        transcripts = [{"chosen": f"{prompt} yes", "rejected": f"{prompt} no"} for prompt in prompts]
        Path(f"DATA/hh/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in transcripts))


@pytest.mark.parametrize("block", cases())
def test_every_command_runs(block: list[str], program: Program, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(program.directory)
    monkeypatch.setattr(JudgeClient, "_request", lambda self, body: "Score: 5 [[C]]")  # in place of a server
    make_places(archive)
    monkeypatch.setattr(server, "serve", use_page)
    if any("REWARD_RUN" in line for line in block):
        program.ok("loss=reward", "n_examples=4", "local_run_dir=REWARD_RUN", defaults=SMALL + QUICKER)
    for line in block:
        words = shlex.split(nearest_form(line).partition(" < ")[0])
        if words[0] == "train.py":
            run_training(words[1:], program)
        elif words[0] == "python" and words[1] == "inspect_data.py":
            run_inspection(words[2:], program, monkeypatch)
        elif words[0] == "python" and words[1] == "report.py":
            monkeypatch.setattr(sys, "argv", words[1:])
            assert report.main() == 0
        elif words[0] == "python" and words[1] in ("chat.py", "export.py", "evaluate.py"):
            run_command(words[1], words[2:], line.partition(" < ")[2], monkeypatch)
        elif words[0] == "python" and words[1] == "compare.py":
            run_command(words[1], [*words[2:], "max_new_tokens=4", "port=0"], "", monkeypatch)
        else:
            check_command(words)


def run_training(arguments: list[str], program: Program) -> None:
    if any(argument.startswith("hydra/launcher=") for argument in arguments):  # tests/test_sweeps.py has them
        sweep = check_command_line(arguments, run_training)
        assert sweep is not None and sweep.plugin
        return
    sizes = () if any("model.architecture" in argument for argument in arguments) else SMALL
    run = program.ok(*arguments, "n_examples=4", defaults=sizes + QUICKER)
    if "-m" in arguments:
        assert run.out.splitlines()[-1].startswith("results: ") and " failed (" not in run.out
        return
    prints_no_run = {"--help", "plan=true"} & set(arguments)
    assert prints_no_run or run.out.splitlines()[-1].startswith("run_dir: ")
    given = next((word.removeprefix("model.archive=") for word in arguments if word.startswith("model.archive=")), "")
    if Path(given, "LATEST", "adapter_config.json").exists():  # the reference is where training began
        base, start = Path(given, "base").resolve(), Path(given, "LATEST").resolve()
        assert f"reference: {base} with {start}" in run.out


def run_inspection(arguments: list[str], program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """inspect_data.py in this process, with the embedded tokenizer."""
    nearest = ["model=tiny" if argument.startswith("model=") else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", *nearest, f"local_dirs=[{program.directory}]"])
    assert inspect_data.main() == 0
    page = next((argument.removeprefix("page=") for argument in arguments if argument.startswith("page=")), None)
    assert page is None or "</html>" in Path(page).read_text()


def run_command(script: str, arguments: list[str], stdin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """chat.py, compare.py, export.py or evaluate.py in this process."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(Path(stdin).read_text() if stdin else "hello\n"))
    is_comparison = any(argument.startswith("against=") for argument in arguments) and script == "evaluate.py"
    quicker = ["max_new_tokens=4"] if script == "chat.py" else ["prompts=2"] if is_comparison else []
    monkeypatch.setattr(sys, "argv", [script, *arguments, *quicker])
    status = {"chat.py": chat, "compare.py": compare, "export.py": export, "evaluate.py": evaluate}[script].main()
    values = dict(argument.split("=", 1) for argument in arguments)
    if values.get("from") == "meta":  # tests/test_export.py has such files; here they are missed in the right place
        assert status == EXIT_STATUS["CHECKPOINT"] and not Path(values["path"]).exists()
        return
    if "tasks" in values and find_spec("lm_eval") is None:
        assert status == EXIT_STATUS["CONFIG"]
        return
    assert status == 0
    if script == "export.py" and "format" not in values:
        state = load_saved(values["from"]).model.state_dict()
        auto_class = AUTO_CLASSES["score" if SCORE_WEIGHT in state else "lm"]
        exported = auto_class.from_pretrained(values["to"]).state_dict()  # a row more for a padding token
        assert all(torch.equal(exported[name][: len(value)], value) for name, value in state.items())


def use_page(session: Session, listener: socket.socket) -> None:
    """In place of a browser: prompts, and votes where two models respond."""
    client = browser(session)
    if session.is_blind:
        give_votes(client, session, "aaba")
    else:
        ask(client, session, "Is it any good?")
    assert client.get("/").status_code == 200


def test_python_of_the_page_of_reward_models_runs(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(program.directory)
    run = program.ok("loss=reward", "optimizer=AdamW", "n_examples=4", defaults=SMALL + QUICKER)
    run_command("export.py", [f"from={run.dir}", "to=my-reward-model"], "", monkeypatch)
    text = (ROOT / "docs" / "reward.md").read_text(encoding="utf-8")
    Path("page.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", text, re.S)))
    names = runpy.run_path("page.py")
    scores = names["scores"].tolist()
    assert len(scores) == 2 and scores[0] != scores[1]
    assert names["scores_of_messages"].tolist() == pytest.approx(scores, abs=1e-5)  # the same text, by the hh template
    rows = [{"prompt": names["prompt"], "chosen": names["responses"][0], "rejected": names["responses"][1]}]
    Path("rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    for target, key, found in (("a", "false", scores), ("b", "true", names["normalised"].tolist())):
        arguments = [f"model={run.dir}", "data=rows.jsonl", f"to={target}.jsonl", f"normalize={key}"]
        run_command("evaluate.py", arguments, "", monkeypatch)
        assert json.loads(Path(f"{target}.jsonl").read_text())["scores"] == pytest.approx(found, abs=1e-4)


def test_python_of_the_page_of_serving_runs(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_command("export.py", [f"from={archive}", "to=my-model"], "", monkeypatch)
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    Path("page.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", text, re.S)))
    capsys.readouterr()
    runpy.run_path("page.py")
    assert capsys.readouterr().out.strip()


def check_command(words: list[str]) -> None:
    """A command of make, pytest or a benchmark: its target, marker, script and options exist."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif words[:3] == ["python", "-m", "pytest"]:
        assert words[3] == "-m" and f'"{words[4]}: ' in (ROOT / "pyproject.toml").read_text()
    elif Path(words[0]).name == "python":
        source = (ROOT / words[1]).read_text()
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))
    elif words[:2] == ["pip", "install"]:
        assert "".join(words[2:]) in (ROOT / "requirements.txt").read_text().splitlines()
    elif words[0] == ".venv/bin/pip":
        assert words[1:] == ["install", "pre-commit", "&&", ".venv/bin/pre-commit", "install"]
        assert (ROOT / ".pre-commit-config.yaml").exists()
    else:
        assert (ROOT / words[0]).exists(), f"{words}: no such command"


def test_the_commands_of_the_reference_implementation_are_there() -> None:
    joined = " ".join(line for page in PAGES for block in blocks(page) for line in block)
    for part in (
        "model=pythia69 datasets=[hh] loss=sft",
        "model.name_or_path=/PATH/TO/LLAMA/WEIGHTS model.block_name=LlamaDecoderLayer datasets=[hh,shp]",
        "model=pythia69 datasets=[hh] loss=dpo loss.beta=0.1 model.archive=",
        "model=pythia28 datasets=[hh] loss=sft",
        "model=pythia28 datasets=[hh] loss=dpo loss.beta=0.1",
    ):
        assert part in joined


# ---- Links and tables ----


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_to_a_file(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    files = re.findall(r"`((?:engine|tests|benchmarks|config)/[\w./-]+)`", text)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_the_readme_links_to_every_page() -> None:
    readme = PAGES[0].read_text(encoding="utf-8")
    assert all(f"(docs/{page.name})" in readme for page in PAGES if page.parent.name == "docs")


def test_config_page_is_up_to_date() -> None:
    page = make_config.page()
    assert make_config.PAGE.read_text(encoding="utf-8") == page, "run `make docs`"
    missing = {key for key in all_keys() if f"| `{key}` |" not in page}
    assert missing == {"loss.name", "peft.name"}  # the titles have them


@pytest.mark.parametrize("name", LOSSES)
def test_losses_page_has_every_loss(name: str) -> None:
    """Its row says whether it needs a reference, and has the defaults of config/loss."""
    text = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{name}` \|(.*)\|$", text, re.M)
    assert row is not None
    _, needs, _, defaults, _, _ = row[1].split("|")
    assert ("reference" in needs) == ("reference" in LOSSES[name].needs)
    group = composed(f"loss={name}").loss
    for key in set(group) - {"name"}:
        value = "required" if OmegaConf.is_missing(group, key) else group[key]
        assert not value or f"`{key}` {value}" in defaults, key


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "extend"], ids=lambda page: page.stem)
def test_every_loss_of_a_page_exists(page: Path) -> None:
    """In tables too. The page that adds a loss is left out."""
    text = page.read_text(encoding="utf-8")
    assert {*re.findall(r"\bloss=(\w+)", text)} <= {*LOSSES}
    keys = {*re.findall(r"`loss\.(\w+)", text)} - {"name"}
    assert {f"loss.{key}" for key in keys} <= {*all_keys()}


def test_errors_page_has_every_status() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert all(f"| {status} | {code} |" in text for code, status in EXIT_STATUS.items())


def test_inspect_page_has_every_finding_and_key() -> None:
    text = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "engine" / "inspect").glob("*.py")]
    checks = {name for source in sources for name in re.findall(r'\b_?[Ff]inding\("([^"]+)"', source)}
    assert len(checks) == 12 and all(f"\n| {check} |" in text for check in checks)
    assert all(f"| `{key}=" in text for key in inspect_data.InspectOptions.model_fields)


@pytest.mark.slow
def test_metrics_page_has_every_metric(program: Program) -> None:
    run = program.ok("loss=dpo", "loss.beta=0.1", "reference=live", "sample_during_eval=true", "n_eval_model_samples=2")
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    logged = {name for row in run.metrics for name in row}
    assert {name for name in logged if f"`{name}`" not in text} == set()


def test_readme_shows_what_the_demo_prints() -> None:
    printed = re.findall(r'print\(f?"  ([a-zA-Z /-]+?) {2,}', (ROOT / "benchmarks" / "demo.py").read_text())
    readme = PAGES[0].read_text(encoding="utf-8")
    assert printed and all(f"\n  {label} " in readme for label in printed)
