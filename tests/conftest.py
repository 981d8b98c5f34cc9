"""For all tests: no network, no accounts, and one thread, which is the fastest for models of this size."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def program(tmp_path, cache, capsys, monkeypatch):
    from tests.runs import Program  # after the environment was set, which libraries read when they are imported

    return Program(tmp_path, cache, capsys, monkeypatch)
