"""Settings of all tests: no network, no accounts, one thread (fastest for tiny models)."""

import copy
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HOME", str(Path("~/.cache/huggingface").expanduser()))  # before the next line moves it
os.environ["XDG_CACHE_HOME"] = str(Path(tempfile.gettempdir(), f"trainer-tests-{os.getuid()}"))  # spares the user's
os.environ["TRACKIO_DIR"] = str(Path(os.environ["XDG_CACHE_HOME"], "trackio"))

import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigSource

torch.set_num_threads(1)

sources: list[Any] = Plugins.instance().discover(ConfigSource)
(CONFIG_DIRECTORIES,) = [source for source in sources if source.scheme() == "file"]
load_config = CONFIG_DIRECTORIES.load_config
CONFIG_FILES: dict[tuple[str, int], Any] = {}
CONFIG = Path(__file__).resolve().parent.parent / "config"


def load_config_once(source: Any, config_path: str) -> Any:
    """Copy the parsed YAML of an unchanged config file. Parsing takes a third of a composition."""
    path = Path(source.path, source._normalize_file_name(config_path))
    if not path.is_file():
        return load_config(source, config_path)
    key = (str(path), path.stat().st_mtime_ns)
    if key not in CONFIG_FILES:
        CONFIG_FILES[key] = load_config(source, config_path)
    return copy.deepcopy(CONFIG_FILES[key])


merge_files = ConfigLoaderImpl._compose_config_from_defaults_list
MERGED_FILES: dict[str, Any] = {}


def merge_files_once(loader: Any, defaults: list[Any], repo: Any) -> Any:
    """Copy the merged files of config/. Merging takes a third of a composition. The command line is applied later."""
    places = {source.path for source in repo.get_sources() if source.scheme() == "file"}
    if places != {str(CONFIG)}:  # with files of a test
        return merge_files(loader, defaults, repo)
    key = repr(defaults)
    if key not in MERGED_FILES:
        MERGED_FILES[key] = merge_files(loader, defaults, repo)
    return copy.deepcopy(MERGED_FILES[key])


ConfigLoaderImpl._compose_config_from_defaults_list = merge_files_once  # type: ignore[method-assign, assignment]
CONFIG_DIRECTORIES.load_config = load_config_once


def pytest_configure(config):
    """Only tests marked gpu see the GPUs of this machine. The others expect the bits of a CPU."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def program(tmp_path, cache, capsys, monkeypatch):
    from tests.runs import Program  # libraries read the environment on import

    return Program(tmp_path, cache, capsys, monkeypatch)


@pytest.fixture
def online(program, monkeypatch, request):
    """The program, by default with a run of GRPO or with ONLINE_DEFAULTS of the test file."""
    from rewards import REWARDS
    from tests.runs import ONLINE, QUICK, SMALL, vowels

    monkeypatch.setitem(REWARDS, "vowels", vowels)
    defaults = getattr(request.module, "ONLINE_DEFAULTS", (*SMALL, *QUICK, *ONLINE))
    return lambda *overrides: program(*overrides, defaults=defaults)


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory):
    """Directory of an SFT run on the films, one per test file."""
    from tests.runs import QUICK, SMALL, call_main

    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        arguments = [*SMALL, *QUICK, f"local_dirs=[{directory}]", f"local_run_dir={directory}/films", "loss=sft"]
        assert call_main([*arguments, f"cache_dir={directory}/cache"], patch) == 0
    return directory / "films"


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory):
    """Directory of a run of a reward model, one per test file."""
    from tests.runs import QUICK, REWARD, SMALL, call_main

    directory = tmp_path_factory.mktemp("reward")
    with pytest.MonkeyPatch.context() as patch:
        arguments = [*SMALL, *QUICK, *REWARD, f"local_run_dir={directory}/run", f"cache_dir={directory}/cache"]
        assert call_main(arguments, patch) == 0
    return directory / "run"


@pytest.fixture
def run_export(monkeypatch, capsys):
    """Run export.py; returns (exit status, stdout, stderr)."""
    import export

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
        capsys.readouterr()
        status = export.main()
        return status, *capsys.readouterr()

    return run
