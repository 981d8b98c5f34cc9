"""Settings of all tests: no network, no accounts, one thread (fastest for tiny models)."""

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HOME", str(Path("~/.cache/huggingface").expanduser()))  # before the next line moves it
os.environ["XDG_CACHE_HOME"] = str(Path(tempfile.gettempdir(), f"trainer-tests-{os.getuid()}"))  # spares the user's

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def program(tmp_path, cache, capsys, monkeypatch):
    from tests.runs import Program  # libraries read the environment on import

    return Program(tmp_path, cache, capsys, monkeypatch)
