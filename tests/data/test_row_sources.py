"""Rows of named data sets: from data_dir, the hub, and its local cache."""

import time

import datasets
import huggingface_hub
import numpy as np
import pytest

from engine.data.row_sources import RowSource
from preference_datasets import DATASETS
from tests.data.samples import HH_START, load_named, se, write
from utils import UserError


def test_data_dir_needs_the_file_of_the_split(tmp_path):
    write(tmp_path / "hh" / "train.jsonl", [])
    with pytest.raises(UserError, match=r"error\[DATA\] data_dir: .*/hh holds neither test\.jsonl nor test\.jsonl\.gz"):
        list(RowSource("hh", str(tmp_path)).rows("x", "test"))


HUB_ROWS = [{"chosen": HH_START + " a", "rejected": HH_START + " b"}, {"chosen": HH_START + " c", "rejected": None}]


@pytest.fixture
def hub(monkeypatch):
    """A reachable hub with HUB_ROWS; records its calls."""
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
    rows = list(RowSource("hh").rows("Anthropic/hh-rlhf", "train"))
    assert [row.values for row in rows] == HUB_ROWS
    assert hub == [("Anthropic/hh-rlhf", None)]
    with pytest.raises(UserError, match="Anthropic/hh-rlhf train row 1: field 'rejected' is null"):
        DATASETS["hh"].function("train", RowSource("hh"))
    with pytest.raises(UserError, match=r"datasets: hh: Anthropic/hh-rlhf test cannot be loaded: KeyError"):
        DATASETS["hh"].function("test", RowSource("hh"))


def test_paired_stack_exchange_has_a_folder_per_split(hub):
    for split in ("train", "test"):
        with pytest.raises(UserError, match=rf"{split} row 0: field 'question' is missing"):
            DATASETS["stack-exchange-paired"].function(split, RowSource("stack-exchange-paired"))
    assert [data_dir for _, data_dir in hub] == ["data/rl", "data/evaluation"]


def test_se_from_the_hub_is_split(hub, monkeypatch):
    rows = [se(f"q{i}", ("a", 1)) for i in range(200)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: {"train": datasets.Dataset.from_list(rows)})
    splits = [DATASETS["se"].function(split, RowSource("se")) for split in ("train", "test")]
    expected = {f"\n\nHuman: q{i}\n\nAssistant:" for i in np.random.default_rng(42).permutation(200)[:2]}
    assert splits[1].keys() == expected
    assert len(splits[0]) == 198


def test_without_network_the_local_cache_is_read(hub, no_network, monkeypatch):
    def snapshot_download(hub_id, repo_type, local_files_only):
        assert (hub_id, repo_type, local_files_only) == ("Anthropic/hh-rlhf", "dataset", True)
        return "/cache/snapshot"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert len(list(RowSource("hh").rows("Anthropic/hh-rlhf", "train"))) == 2
    assert hub == [("/cache/snapshot", None)]


def test_without_network_and_cache_the_error_names_the_fix_within_seconds(no_network, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        DATASETS["shp"].function("train", RowSource("shp"))
    assert time.monotonic() - start < 15
    assert str(error.value) == (
        "error[DATA] datasets: shp: stanfordnlp/SHP is not in the hub's local cache, and the hub fails: Name or "
        "service not known; fix: put its rows in DATA_DIR/shp/train.jsonl and test.jsonl (or .jsonl.gz) and set "
        "data_dir=DATA_DIR, or try again with a network"
    )


def test_se_without_a_test_file_has_the_reference_split(tmp_path):
    rows = [se(f"<p>q{i}</p>", ("a", 1)) for i in range(250)]
    train, _ = load_named("se", rows, tmp_path)
    test, counts = load_named("se", [], tmp_path, split="train")  # an empty file, to be written over
    assert not test
    write(tmp_path / "se" / "train.jsonl.gz", rows)
    source = RowSource("se", str(tmp_path))
    test = DATASETS["se"].function("test", source)
    shuffled = datasets.Dataset.from_list([{"i": i} for i in range(250)]).shuffle(seed=42)
    assert {f"\n\nHuman: q{i}\n\nAssistant:" for i in shuffled["i"][:2]} == test.keys()
    assert len(train) == 248 and not train.keys() & test.keys()
    assert (source.counts.rows, counts.rows) == (2, 0)
