"""No output holds secrets, names stay inside their directories, and no input runs as code."""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

import train
from engine.compare.server import HOST
from engine.run.tensorboard_logger import as_markdown
from engine.settings.keys import all_keys
from engine.settings.secrets import REDACTED, comparable, is_secret_name, public, redact, secrets_of
from engine.sweep.jobs import Job
from tests.configs import write_configs
from tests.prose import tree_files
from tests.quick import slow_except
from tests.runs import QUICK, SMALL, Program

ROOT = Path(__file__).resolve().parent.parent.parent
HF_TOKEN = "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNm12345678"
WANDB_KEY = "0123456789abcdef0123456789abcdef01234567"

# ---- Secrets ----


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"lr: must be a number, not {HF_TOKEN}", f"lr: must be a number, not {REDACTED}"),
        (f'not "{WANDB_KEY}"', f'not "{REDACTED}"'),
        ("https://me:hunter22@host/x and http://host/a@b", f"https://{REDACTED}@host/x and http://host/a@b"),
        ("job 0: api_key=xyz lr=1 hub-token='a b'", f"job 0: api_key={REDACTED} lr=1 hub-token={REDACTED}"),
        ('{"password": "x, y", "n": 1}', f'{{"password": {REDACTED}, "n": 1}}'),
        ("ghp_" + "a1" * 18 + " sk-proj-" + "a1" * 18 + " AKIA" + "A1" * 8, f"{REDACTED} {REDACTED} {REDACTED}"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY----- .", f"{REDACTED} ."),
        # Not secrets.
        *[
            (text, text)
            for text in (
                f"models/snapshots/{WANDB_KEY}/model.safetensors, git@{WANDB_KEY}",
                "token_budget=5 model.tokenizer_name_or_path=gpt2 max_length=3",
                "error[DATA] a.jsonl line 3: field 'chosen' is missing; fix: correct this row or remove it",
                "run_dir: .cache/me/films_tiny_sft_2026-01-01",
            )
        ],
    ],
)
def test_redact(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "name",
    [
        "hf_token", "HF_TOKEN", "hub-token", "model.accessToken", "WANDB_API_KEY", "apikey", "AWS_SECRET_ACCESS_KEY",
        "http_auth", "GITHUB_PAT", "bearer", "client_secret", "secrets", "secret_of_mine", "password",
        "DB_PASSWORD_OLD", "passwd", "passphrase", "credential", "aws_credentials",
    ],
)  # fmt: skip
def test_each_name_of_a_secret_hides_its_value(name: str) -> None:
    assert is_secret_name(name)
    assert redact(f"before {name}=swordfish-0815 after") == f"before {name}={REDACTED} after"


@pytest.mark.parametrize(
    "name", ["key", "keys", "tokens", "token_budget", "tokenizer_name_or_path", "path", "author", "patience", "monkey"]
)
def test_other_names_hide_nothing(name: str) -> None:
    assert not is_secret_name(name)
    assert redact(f"before {name}=swordfish-0815 after") == f"before {name}=swordfish-0815 after"


def test_values_from_the_environment_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MY_PASSWORD": 'a "quoted"\n one',
        "BLAND": "swordfish-4711",
        "SCRATCH": "/nowhere/scratch",
        "LR": "1e-6",
        "UNUSED_TOKEN": "not-in-config",
    }.items():
        monkeypatch.setenv(name, value)
    config = OmegaConf.create(
        {
            "local_dirs": ["${oc.env:SCRATCH}/a"],
            "lr": "${oc.decode:${oc.env:LR}}",
            "wandb": {"entity": "${oc.env:BLAND}", "project": "${oc.env:MY_PASSWORD,x}"},
            "alias": "${wandb.entity}",
            "hub_token": "plain-text",
            "missing": "${oc.env:NOT_THERE}",
        }
    )
    assert {'a "quoted"\n one', "swordfish-4711", "plain-text", "not-in-config"} <= secrets_of(config)
    assert not {"/nowhere/scratch", "1e-6"} & secrets_of(config)
    text = (
        json.dumps(["swordfish-4711", 'a "quoted"\n one', "plain-text"]) + 'a "quoted" one ' + repr('a "quoted"\n one')
    )
    assert redact(text, config) == json.dumps([REDACTED] * 3) + f"{REDACTED} '{REDACTED}'"
    config.missing = 1
    assert public(config) == {
        "local_dirs": ["${oc.env:SCRATCH}/a"],
        "lr": "${oc.decode:${oc.env:LR}}",
        "wandb": {"entity": "${oc.env:BLAND}", "project": "${oc.env:MY_PASSWORD,x}"},
        "alias": REDACTED,
        "hub_token": REDACTED,
        "missing": 1,
    }


@pytest.mark.parametrize(
    "written",
    [
        "${oc.env:BLAND}",
        '${oc.env:"BLAND"}',
        "${oc.env:'BLAND'}",
        "${ oc.env : BLAND }",
        "a-${oc.env:'BLAND'}-b",
        "${oc.env:${oc.env:NAME}}",
        "${oc.env:NOT_THERE,${oc.env:BLAND}}",
        "${oc.env:NOT_THERE,swordfish-4711}",
        "${oc.select:missing,${oc.env:'BLAND'}}",
        "${oc.select:nothing,${oc.env:'BLAND'}}",
        "${other.${oc.env:'BLAND'}}",
        '${oc.decode:"[swordfish-4711, ${oc.env:NAME}]"}${oc.env:"BLAND"}',
        "${oc.decode:${oc.env:LIST}}",
    ],
)
def test_environment_values_are_redacted_in_every_syntax(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"BLAND": "swordfish-4711", "NAME": "BLAND", "LIST": "[swordfish-4711, other-value-2]"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    config = OmegaConf.create({"entity": written, "alias": "${entity}", "other": {}, "missing": None})
    assert redact('must be a number, not "swordfish-4711"', config) == f'must be a number, not "{REDACTED}"'
    if "other." in written:  # no config with this error has public values
        config.entity = config.alias = ""
    assert "swordfish" not in json.dumps(public(config)) + json.dumps(comparable(config))


def test_short_secrets_are_redacted_where_they_stand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "x9!")
    monkeypatch.setenv("MY_PIN", "q-7b")
    monkeypatch.setenv("DISABLE_AUTH", "true")  # named like a secret, and not in the config
    config = OmegaConf.create({"a": "${oc.env:'MY_PASSWORD'}", "b": "${oc.env:MY_PIN}", "c": "${a}", "d": True})
    text = "not \"x9!\", not 'q-7b': q-7b and seq-7b-x9!y are true"
    assert redact(text, config) == f"not \"{REDACTED}\", not '{REDACTED}': {REDACTED} and seq-7b-x9!y are true"
    assert public(config) == {"a": "${oc.env:'MY_PASSWORD'}", "b": "${oc.env:MY_PIN}", "c": REDACTED, "d": True}


def test_redacted_values_differ_by_their_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OmegaConf.create(
        {"lr": "${oc.decode:${oc.env:LR}}", "a": ["${oc.env:BLAND}", "x"], "b": {"c": "${oc.env:BLAND}"}, "d": True}
    )
    found = []
    for learning_rate, word in (("1e-6", "swordfish"), ("1e-6", "swordfish-2"), ("2e-6", "swordfish"), ("1e-6",) * 2):
        monkeypatch.setenv("LR", learning_rate)
        monkeypatch.setenv("BLAND", word)
        found.append(comparable(config))
        assert "swordfish" not in json.dumps(found) and found[-1]["a"][0].startswith("${oc.env:BLAND} (hash ")
        hashed = found[-1]["b"]["c"]
        assert found[-1] == {"lr": float(learning_rate), "a": [hashed, "x"], "b": {"c": hashed}, "d": True}
    assert len({json.dumps(each) for each in found}) == len(found)


def test_no_config_key_looks_like_a_secret() -> None:
    config = OmegaConf.create()
    for key in all_keys():
        OmegaConf.update(config, key, "a value of some length", force_add=True)
    assert REDACTED not in json.dumps(public(config))


def read_all(directory: Path) -> str:
    """Names and contents of all files in a directory."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return "\n".join([*map(str, files), *(path.read_bytes().decode("latin-1") for path in files)])


SECRET_OVERRIDES = [
    (f"exp_name={HF_TOKEN}", "exp_name"),
    ("exp_name=a-${oc.env:MY_SECRET}", "exp_name"),
    (f"local_run_dir=runs/{HF_TOKEN}", "local_run_dir"),
    (f"local_dirs=[a,{HF_TOKEN}]", "local_dirs[1]"),
    (f"cache_dir={HF_TOKEN}", "cache_dir"),
    (f"resume={HF_TOKEN}", "resume"),
    (f"datasets=[{HF_TOKEN}]", "datasets"),
    ("datasets=[${oc.env:MY_SECRET}]", "datasets"),
    (f"data_dir={HF_TOKEN}", "data_dir"),
    (f"wandb.entity={WANDB_KEY}", "wandb.entity"),
    ("wandb.project=${oc.env:MY_SECRET}", "wandb.project"),
    ("model.archive='https://me:swordfish-0815@host/x'", "model.archive"),
    (f"model.block_name={HF_TOKEN}", "model.block_name"),
    ("+model.architecture.hub_token=swordfish-0815", "model.architecture.hub_token"),
    (f"+model.architecture.note={HF_TOKEN}", "model.architecture.note"),
    (f"optimizer={HF_TOKEN}", "optimizer"),
    ("optimizer=${oc.env:BLAND}", "optimizer"),
    ("optimizer=${oc.env:'BLAND'}", "optimizer"),
    ("+api_key=swordfish-0815", "api_key"),
    ("api_key=swordfish-0815", "api_key"),
    ("api_key='swordfish-0815", "api_key"),
    (f"lr=${{{HF_TOKEN}}}", "lr"),
    (f"loss={HF_TOKEN}", "loss"),
]


@pytest.mark.parametrize(
    ("override", "key", "sweep"),
    [(*case, ()) for case in SECRET_OVERRIDES]
    + slow_except([(*case, ("-m", "seed=1,2")) for case in SECRET_OVERRIDES[::3]], SECRET_OVERRIDES[0][0]),
)
def test_a_secret_in_an_override_is_refused_and_not_repeated(
    override: str, key: str, sweep: tuple[str, ...], program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET", "swordfish-0815")
    monkeypatch.setenv("BLAND", "swordfish-0815")
    run = program(override, *sweep)
    assert run.status == 2 and key in run.err
    assert "Traceback" not in run.err and run.err.count("\n") <= 2
    for secret in (HF_TOKEN, WANDB_KEY, "swordfish-0815"):
        assert secret not in run.out + run.err + read_all(program.directory)


def test_a_run_leaves_no_secret(tmp_path) -> None:
    """Secrets come from the environment and from overrides; one run succeeds, one crashes."""
    secrets = {
        "HF_TOKEN": HF_TOKEN,
        "MY_SECRET": "swordfish-0815",
        "WANDB_API_KEY": WANDB_KEY,
    }
    crash = (
        "import os, train, engine.step.sources as sources\n"
        "names = 'HF_TOKEN', 'MY_SECRET', 'WANDB_API_KEY'\n"
        "def fail(*_): raise RuntimeError(' '.join(os.environ[name] for name in names))\n"
        "sources.num_planned = fail\n"
    )
    for script in ("import train\n", crash):
        result = subprocess.run(
            [
                *(sys.executable, "-c", script + "raise SystemExit(train.main())"),
                *(*([] if script is crash else ["-m"]), *SMALL, *QUICK, "n_examples=4", f"local_dirs=[{tmp_path}]"),
                *("wandb.enabled=true", "tensorboard=true"),
                f"hydra.help.header=hf_{'b' * 30}",
                "hydra.help.footer=${oc.env:'MY_SECRET'}",
                *("seed=1", "exp_name=a-${oc.env:NAME}"),
            ],
            env=os.environ
            | secrets
            | {"OMP_NUM_THREADS": "1", "NAME": "me", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert result.returncode == int(script is crash), result.stderr
        left = result.stdout + result.stderr + read_all(tmp_path)
        for secret in (*secrets.values(), "hf_" + "b" * 30):
            assert secret not in left
    assert "crash.log" in left and "offline-run" in left and "a-me" in left


def test_hydra_leaves_no_sweep_file(tmp_path, monkeypatch: pytest.MonkeyPatch, program: Program) -> None:
    """Requested places are refused; Hydra's temporary file would stay after a kill."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    secret = f"hydra.help.footer={HF_TOKEN}"
    for key in ("hydra.sweep.dir", "hydra.output_subdir"):
        run = program("-m", f"{key}={tmp_path / 'kept'}", secret, "seed=1,2")
        assert run.status == 2 and run.err.count("\n") == 1 and f"{key}: Hydra would write" in run.err
    found: list[Path] = []

    def look(config: DictConfig, varied: list[str], started: str) -> Job:
        found.extend(tmp_path.rglob("multirun.yaml"))
        assert HF_TOKEN not in read_all(tmp_path)
        return Job(0, status=0)

    monkeypatch.setattr(train, "prepare_job", look)
    program.ok("-m", secret, "seed=1,2")
    assert len(found) == 2 and not any(path.exists() and path.stat().st_size for path in found)
    assert not list(tmp_path.rglob("multirun.yaml"))


# ---- Names and code ----


@pytest.mark.parametrize("name", ["../x", "..", "a/b", "/abs", "a\\b", "a\nb", "x" * 300])
def test_exp_name_cannot_leave_its_directory(name: str, program: Program) -> None:
    before = {path for path in program.directory.parent.iterdir()}
    run = program(f"exp_name='{name}'")
    assert run.status == 2 and "exp_name: " in run.err
    assert {path for path in program.directory.parent.iterdir()} == before and not list(program.directory.iterdir())


CODE = {
    "configuration_odd.py": "from pathlib import Path\nPath(__file__).with_name('was_run').write_text('x')\n"
    "from transformers import LlamaConfig\nclass OddConfig(LlamaConfig):\n    model_type = 'odd'\n",
    "modeling_odd.py": "from transformers import LlamaForCausalLM\nfrom .configuration_odd import OddConfig\n"
    "class OddModel(LlamaForCausalLM):\n    config_class = OddConfig\n",
    "tokenization_odd.py": "from transformers import PreTrainedTokenizerFast\n"
    "class OddTokenizer(PreTrainedTokenizerFast):\n    pass\n",
}


@pytest.fixture
def odd_model(tmp_path) -> Path:
    """A model directory with Python code."""
    directory = tmp_path / "odd"
    directory.mkdir()
    for name, text in CODE.items():
        (directory / name).write_text(text)
    sizes = {
        "vocab_size": 600,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    auto_map = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddModel"}
    (directory / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": auto_map, **sizes}))
    return directory


def test_python_code_of_a_model_is_refused(odd_model: Path, program: Program) -> None:
    model = ("model=blank_model", f"model.name_or_path={odd_model}")
    run = program(*model, "model.tokenizer_name_or_path=films", defaults=QUICK)
    assert run.status == 2 and run.err.count("\n") == 1
    assert f"model.name_or_path: {odd_model} brings Python code of its own" in run.err
    assert "model.trust_remote_code=true" in run.err
    (odd_model / "tokenizer_config.json").write_text(
        json.dumps(
            {"auto_map": {"AutoTokenizer": [None, "tokenization_odd.OddTokenizer"]}, "tokenizer_class": "OddTokenizer"}
        )
    )
    run = program(*model, defaults=QUICK)
    assert run.status == 2 and run.err.count("\n") == 1 and "model.trust_remote_code=true" in run.err
    assert "brings Python code of its own" in run.err


@pytest.mark.parametrize(
    "override",
    [
        "+hydra.callbacks.x._target_=os.getpid",
        "+hydra.callbacks.x={_target_: os.getpid}",
        "hydra.launcher._target_=os.getpid",
        "+model.architecture._target_=os.getpid",
        "+hydra.callbacks.x='${oc.decode:${oc.env:CODE}}'",
        "+hydra.launcher.x='${oc.decode:${oc.env:CODE}}'",
        "+hydra.job_logging.handlers={x: {class: os.getpid}}",
        "hydra.job_logging.root.level=ext://os.getpid",
        "--experimental-rerun=/tmp/config.pickle",
        "--exp=/tmp/config.pickle",
    ],
)
def test_code_on_the_command_line_is_refused(override: str, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE", "{_target_: os.getpid}")
    for run in (program(override), program("-m", override, "seed=1,2")):
        assert run.status == 2 and run.err.count("\n") == 1 and "would run code that it names" in run.err


CONFIGS = {
    "hydra/callbacks/evil.yaml": "x:\n  _target_: os.makedirs\n  name: MADE\n",
    "hydra/launcher/evil.yaml": "_target_: os.makedirs\nname: MADE\n",
    "hydra/sweeper/evil.yaml": "defaults: [basic]\nparams:\n  x: {_target_: os.makedirs, name: MADE}\n",
    "hydra/job_logging/evil.yaml": "version: 1\nroot: {}\nhandlers: {x: {(): os.makedirs, name: MADE}}\n",
    "loss/evil.yaml": "# @package _global_\nhydra: {callbacks: {x: {_target_: os.makedirs, name: MADE}}}\n"
    "loss: {name: sft, average_log_prob: false}\n",
    "loss/logs.yaml": "# @package _global_\nhydra: {job_logging: {handlers: {x: {(): os.makedirs, name: MADE}}}}\n"
    "loss: {name: sft, average_log_prob: false}\n",
    "loss/mine.yaml": "name: sft\naverage_log_prob: true\n",
    "loss/environment.yaml": "# @package _global_\nhydra: {job: {env_set: {LD_PRELOAD: MADE.so}}}\n"
    "loss: {name: sft, average_log_prob: false}\n",
    "experiment/environment.yaml": "# @package _global_\nhydra: {job: {env_set: {PYTHONPATH: MADE}}}\n",
    "main.yaml": "hydra: {callbacks: {x: {_target_: os.makedirs, name: MADE}}}\n",
    "variables.yaml": "defaults: [config, _self_]\nhydra: {job: {env_set: {PYTHONPATH: MADE}}}\n",
    "packages.yaml": "defaults: [config, _self_]\nhydra: {searchpath: ['pkg://package_with_code']}\n",
}


@pytest.fixture
def configs(tmp_path) -> Path:
    """A directory of configs; most of them name code to make a directory."""
    return write_configs(CONFIGS, tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--config-dir=CONFIGS", "hydra/callbacks=evil"),
        ("--config-dir=CONFIGS", "+x@hydra.callbacks=../hydra/callbacks/evil"),
        ("hydra.searchpath=[file://CONFIGS]", "hydra/callbacks=evil"),
        ("-m", "--config-dir=CONFIGS", "hydra/launcher=evil"),
        ("-m", "--config-dir=CONFIGS", "hydra/sweeper=evil"),
        ("--config-dir=CONFIGS", "hydra/job_logging=evil"),
        ("--help", "--config-dir=CONFIGS", "hydra/hydra_logging=../job_logging/evil"),
        ("--config-dir=CONFIGS", "loss=evil"),
        ("-m", "--config-dir=CONFIGS", "loss=sft,evil"),
        ("-m", "--config-dir=CONFIGS", "loss=sft,logs"),
        ("--config-path=CONFIGS", "--config-name=main"),
        ("-cd", "CONFIGS", "-cn", "main"),
        ("+hydra.job.env_set.PYTHONPATH=CONFIGS",),
        ("++hydra.job.env_set={LD_PRELOAD: x.so}",),
        ("-m", "+hydra.job.env_set.PYTHONPATH=CONFIGS", "seed=1,2"),
        ("--config-dir=CONFIGS", "loss=environment"),
        ("-m", "--config-dir=CONFIGS", "loss=sft,environment"),
        ("--config-dir=CONFIGS", "+experiment=environment"),
        ("-cd", "CONFIGS", "-cn", "variables"),
        ("hydra.searchpath=[pkg://package_with_code]",),
        ("-cd", "CONFIGS", "-cn", "packages"),
        ("--config-path=pkg://package_with_code",),
        ("--config-dir=pkg://package_with_code",),
    ],
)
def test_code_in_a_config_is_refused(arguments: tuple[str, ...], configs: Path, monkeypatch, capsys) -> None:
    (configs.parent / "package_with_code").mkdir()
    (configs.parent / "package_with_code" / "__init__.py").write_text(f"import os; os.mkdir('{configs.parent}/made')")
    monkeypatch.syspath_prepend(configs.parent)
    monkeypatch.setattr(sys, "argv", ["train.py", *(text.replace("CONFIGS", str(configs)) for text in arguments)])
    status, (out, err) = train.main(), capsys.readouterr()
    assert status == 2 and err.count("\n") == 1 and err.startswith("error[CONFIG] ") and "job 0" not in out
    if "env_set" in str(arguments) or {"loss=environment", "+experiment=environment", "variables"} & {*arguments}:
        assert "hydra.job.env_set would change" in err
    if "package" in str(arguments):
        assert "hydra.searchpath: pkg://package_with_code would run code" in err
    assert not (configs.parent / "made").exists()


def test_user_configs_are_accepted(configs: Path, program: Program) -> None:
    for arguments in ((f"--config-dir={configs}",), (f"hydra.searchpath=[file://{configs}]",)):
        run = program.ok(*arguments, "loss=mine", "n_examples=4")
        assert "average_log_prob: true" in (run.dir / "config.yaml").read_text()


def test_markdown_shows_text_unchanged() -> None:
    import html

    text = "<script>alert(1)</script> ![x](http://h/x.png) [a](javascript:b) *b* | `c` _d_ &amp; # ~e~ \\\nnext"
    shown = as_markdown(text)
    assert not set("<>![]()*|`_#~\\").intersection(shown.replace("<br>", "").replace("&#", ""))
    assert html.unescape(shown.replace("<br>", "\n")) == text


def test_no_source_runs_input_as_code() -> None:
    """No pickles, no shells, no code or classes from data and configs, no server on the network."""
    files = tree_files(".py")
    assert len(files) > 100
    for path in files:
        for call in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)):
            name, where = ast.unparse(call.func), f"{path.name} line {call.lineno}"
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            last = name.rpartition(".")[2]
            if path.name != "code_worker.py":  # it runs code of a model, in a process of its own without rights
                assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), where
            if path.name not in ("test_schema.py", "test_utils.py"):  # they pickle values and load them again
                assert not re.search(r"(pickle|dill|joblib|marshal|shelve)\.", name), where
            assert last not in ("instantiate", "unsafe_load", "full_load", "get_class", "get_method"), where
            if (
                last == "load" and name.split(".")[0] == "torch" and "tests" not in path.parts
            ):  # tests load files of tests
                assert keywords.get("weights_only") == "True", where
            if last == "load" and name.split(".")[0] in ("np", "numpy"):
                assert "allow_pickle" not in keywords, where
            if re.fullmatch(r"yaml\.\w+", name):
                assert last in ("safe_load", "safe_dump", "dump", "YAMLError"), where
            assert keywords.get("shell", "False") == "False", where
            assert keywords.get("trust_remote_code", "False") != "True", where
            if re.fullmatch(r"Auto\w+\.from_\w+", name) and not {"tests", "benchmarks"} & {*path.parts}:
                assert keywords.keys() & {"trust_remote_code", None}, (
                    where
                )  # without the keyword, transformers asks the user
            if last in ("HTTPServer", "TCPServer", "create_server", "bind"):
                assert "127.0.0.1" in ast.unparse(call.args[0]).replace("HOST", HOST), where
        if path.name != Path(__file__).name:
            assert "0.0.0.0" not in path.read_text("utf-8"), path.name
