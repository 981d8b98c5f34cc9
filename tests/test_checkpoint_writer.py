"""The checkpoint writer in one process: files, shares, room, retention, and what a failure leaves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.models.archives import MANIFEST_FILE, STATE_FILE, checkpoints, find_corruption, size_and_hash
from engine.run import checkpoint_writer
from engine.run.checkpoint_writer import CheckpointWriter, Contents
from utils import UserError

TENSORS = {"a": torch.arange(4.0), "b": torch.arange(4.0, 8.0), "c": torch.tensor(3.0)}


def contents_of(tensors: dict[str, torch.Tensor] | None = None) -> Contents:
    contents = Contents()
    contents.add("model", TENSORS if tensors is None else tensors, {})
    return contents


def write_state(directory: Path) -> None:
    (directory / STATE_FILE).write_text("{}")


def save(
    writer: CheckpointWriter,
    num_examples: int,
    write_rest: Callable[[Path], None] = write_state,
    is_best: bool = False,
) -> Path:
    writer.start(num_examples, contents_of(), write_rest, is_best=is_best)
    saved = writer.finished(wait=True)
    assert saved is not None
    return saved


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# ---- Contents ----


def test_one_process_writes_one_file_without_an_index() -> None:
    contents = contents_of()
    assert [*contents.files] == ["model.safetensors"] and not contents.indices
    assert contents.num_bytes == 4 * 4 + 4 * 4 + 4
    assert all(torch.equal(contents.files["model.safetensors"][name], value) for name, value in TENSORS.items())


def test_contents_are_copies() -> None:
    """Training changes the weights while they are written."""
    tensor = torch.zeros(3)
    contents = contents_of({"a": tensor})
    tensor += 1
    assert contents.files["model.safetensors"]["a"].tolist() == [0, 0, 0]


def test_sizes_of_several_kinds_add_up() -> None:
    contents = contents_of()
    contents.add("optimizer", {"a.step": torch.tensor(1.0)}, {})
    assert [*contents.files] == ["model.safetensors", "optimizer.safetensors"] and contents.num_bytes == 40


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_share_the_bytes_and_rank_0_keeps_the_index(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "rank_and_size", lambda: (rank, 2))
    contents = contents_of()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    ((name, tensors),) = contents.files.items()
    assert (name, [*tensors]) == ((first, ["a", "b"]) if rank == 0 else (second, ["c"]))
    index = {"metadata": {"total_size": 36}, "weight_map": {"a": first, "b": first, "c": second}}
    assert contents.indices == ({"model.safetensors.index.json": index} if rank == 0 else {})
    assert contents.num_bytes == 36


def test_a_rank_without_tensors_writes_an_empty_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "rank_and_size", lambda: (2, 3))
    assert contents_of({"a": torch.zeros(2)}).files == {"model-00003-of-00003.safetensors": {}}


@pytest.mark.parametrize("rank", [0, 1])
def test_adapters_are_one_file_of_rank_0(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "rank_and_size", lambda: (rank, 2))
    contents = Contents()
    contents.add("adapter_model", TENSORS, {}, in_one=True)
    assert [*contents.files] == (["adapter_model.safetensors"] if rank == 0 else []) and not contents.indices


def test_permuted_weights_and_their_state_are_put_back_in_order() -> None:
    contents = Contents()
    permuted = torch.tensor([2.0, 0.0, 1.0])
    tensors = {"h.a": permuted, "h.a.exp_avg": permuted, "h.a.step": torch.ones(()), "h.b": permuted}
    contents.add("model", tensors, {"h.a": (0, torch.tensor([2, 0, 1]))})
    written = contents.files["model.safetensors"]
    assert written["h.a"].tolist() == written["h.a.exp_avg"].tolist() == [0, 1, 2]
    assert written["h.a.step"].item() == 1 and written["h.b"].tolist() == [2, 0, 1]


# ---- Writing ----


def test_a_checkpoint_holds_every_file_and_its_hash(tmp_path: Path) -> None:
    def write_rest(directory: Path) -> None:
        write_state(directory)
        (directory / "templates").mkdir()
        (directory / "templates" / "tool.jinja").write_text("x")

    saved = save(CheckpointWriter(tmp_path, None), 8, write_rest)
    assert saved == tmp_path / "step-8" == (tmp_path / "LATEST").resolve()
    manifest = json.loads((saved / MANIFEST_FILE).read_text())
    assert manifest["checkpoint"] == "step-8"
    assert manifest["files"].keys() == {"model.safetensors", STATE_FILE, "templates/tool.jinja"}
    assert find_corruption(saved) is None and names(tmp_path) == {"step-8", "LATEST"}
    (saved / "templates" / "tool.jinja").write_text("y")
    assert "templates/tool.jinja" in (find_corruption(saved) or "")
    assert torch.equal(load_file(saved / "model.safetensors")["b"], TENSORS["b"])


def test_weights_say_that_they_are_of_torch(tmp_path: Path) -> None:
    """transformers asks for it."""
    from safetensors import safe_open

    with safe_open(save(CheckpointWriter(tmp_path, None), 8) / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_save_is_reported_once(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, None)
    assert writer.finished(wait=True) is None
    save(writer, 8)
    assert writer.finished(wait=True) is None


def test_a_killed_save_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    unfinished = tmp_path / ".step-8.tmp"
    unfinished.mkdir()
    (unfinished / "model-00001-of-00002.safetensors").write_text("half")
    assert names(save(CheckpointWriter(tmp_path, None), 8)) == {"model.safetensors", STATE_FILE, MANIFEST_FILE}


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, None)
    (save(writer, 8) / "stray").write_text("from before a resume")
    assert "stray" not in names(save(writer, 8))


@pytest.mark.parametrize("kind, is_storage", [(OSError, True), (ZeroDivisionError, False)])
def test_a_failed_save_leaves_earlier_checkpoints_alone(tmp_path: Path, kind: type, is_storage: bool) -> None:
    def fail(directory: Path) -> None:
        raise kind("no")

    writer = CheckpointWriter(tmp_path, 1)
    before = save(writer, 8)
    with pytest.raises(UserError if is_storage else kind) as raised:
        save(writer, 16, fail)
    if is_storage:
        assert (
            isinstance(raised.value, UserError)
            and raised.value.code == "STORAGE"
            and f"{tmp_path / 'step-16'} could not be written (no)" in str(raised.value)
        )
    assert find_corruption(before) is None and names(tmp_path) == {"step-8", "LATEST"}
    assert (tmp_path / "LATEST").resolve() == before
    assert save(writer, 24).name == "step-24"  # the writer goes on


@pytest.mark.parametrize("is_enough", [False, True])
def test_room_is_needed_for_all_files_and_a_little_more(
    tmp_path: Path, is_enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = (36 + 1_000_000) * 1.01 + 2**20
    usage = shutil.disk_usage(tmp_path)._replace(free=int(needed) + is_enough)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    writer = CheckpointWriter(tmp_path, None)
    if is_enough:
        writer.start(8, contents_of(), write_state, extra_bytes=1_000_000)
        assert writer.finished(wait=True) == tmp_path / "step-8"
        assert names(tmp_path) == {"step-8", "LATEST"}
        return
    with pytest.raises(UserError, match=r"step-8 could not be written \(it needs 2 MB, and 2 MB are free\)"):
        writer.start(8, contents_of(), write_state, extra_bytes=1_000_000)
    assert names(tmp_path) == set()


# ---- Ranks, with messages in place of processes ----

SECOND = "model-00002-of-00002.safetensors"


def rank_0(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], dict[str, object]]) -> list[tuple[str, str]]:
    """Play rank 1 of two to a writer on rank 0; returns what rank 0 posts."""
    posted: list[tuple[str, str]] = []
    topics: list[str] = []

    def receive(topic: str, rank: int) -> str:
        assert rank == 1
        topics.append(topic)
        return json.dumps(answer())

    def post(topic: str, text: str) -> None:
        posted.append((topic, text))
        assert topics == [topic]  # after rank 1 has reported

    monkeypatch.setattr(checkpoint_writer, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(checkpoint_writer, "receive", receive)
    monkeypatch.setattr(checkpoint_writer, "post", post)
    return posted


def test_rank_0_records_the_files_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer() -> dict[str, object]:
        save_file({"c": TENSORS["c"]}, tmp_path / ".step-8.tmp" / SECOND)
        return {"files": {SECOND: size_and_hash(tmp_path / ".step-8.tmp" / SECOND)}}

    posted = rank_0(monkeypatch, answer)
    saved = save(CheckpointWriter(tmp_path, None), 8)
    assert find_corruption(saved) is None and [text for _, text in posted] == ["over"]
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["c"] == SECOND and index["metadata"] == {"total_size": 36}
    assert json.loads((saved / MANIFEST_FILE).read_text())["files"].keys() == {
        "model-00001-of-00002.safetensors", SECOND, "model.safetensors.index.json", STATE_FILE,
    }  # fmt: skip


@pytest.mark.parametrize("is_storage, kind", [(True, UserError), (False, RuntimeError)])
def test_a_failure_of_another_rank_ends_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_storage: bool, kind: type
) -> None:
    posted = rank_0(monkeypatch, lambda: {"error": "OSError: full", "is_storage": is_storage})
    with pytest.raises(kind, match="rank 1: OSError: full"):
        save(CheckpointWriter(tmp_path, None), 8)
    assert names(tmp_path) == set() and [text for _, text in posted] == ["over"]


@pytest.mark.parametrize("error, is_storage", [(None, False), (OSError("full"), True), (ValueError("odd"), False)])
def test_another_rank_writes_its_file_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, is_storage: bool
) -> None:
    (tmp_path / ".step-8.tmp").mkdir()  # by rank 0
    messages: list[tuple[str, object]] = []
    monkeypatch.setattr(checkpoint_writer, "rank_and_size", lambda: (1, 2))
    monkeypatch.setattr(checkpoint_writer, "post", lambda topic, text: messages.append((topic, json.loads(text))))
    monkeypatch.setattr(checkpoint_writer, "receive", lambda topic, rank: messages.append((topic, rank)))
    writer = CheckpointWriter(tmp_path, None)
    if error is None:
        assert save(writer, 8) == tmp_path / "step-8"
        expected: list[object] = [{"files": {SECOND: size_and_hash(tmp_path / ".step-8.tmp" / SECOND)}}]
        assert names(tmp_path) == {".step-8.tmp"} and names(tmp_path / ".step-8.tmp") == {SECOND}
    else:

        def fail(*arguments: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(checkpoint_writer, "save_file", fail)
        with pytest.raises(UserError if is_storage else type(error), match=str(error)):
            save(writer, 8)
        report = {"error": f"{type(error).__name__}: {error}", "is_storage": is_storage}
        expected = [report, 0]  # and waits for rank 0
    assert [message for _, message in messages] == expected and len({topic for topic, _ in messages}) == 1
    assert messages[0][0].startswith("save-")


# ---- Retention ----


@pytest.mark.parametrize("keep, kept", [(None, [8, 16, 24, 32]), (1, [32]), (2, [24, 32])])
def test_the_newest_are_kept(tmp_path: Path, keep: int | None, kept: list[int]) -> None:
    writer = CheckpointWriter(tmp_path, keep)
    for num_examples in (8, 16, 24, 32):
        save(writer, num_examples)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{number}" for number in kept]
    assert names(tmp_path) == {*(f"step-{number}" for number in kept), "LATEST"}


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 1)
    for num_examples in (8, 16, 24):
        save(writer, num_examples, is_best=num_examples == 8)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-8", "step-24"]
    assert (tmp_path / "BEST").resolve().name == "step-8"
    save(writer, 32, is_best=True)  # the old best, step-8, is one of the old ones now
    assert [path.name for path in checkpoints(tmp_path)] == ["step-32"]


def test_later_checkpoints_do_not_count(tmp_path: Path) -> None:
    """A run resumed from an earlier checkpoint, as the later ones are damaged."""
    for num_examples in (8, 100):
        save(CheckpointWriter(tmp_path, None), num_examples)
    save(CheckpointWriter(tmp_path, 2), 16)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-8", "step-16", "step-100"]


def test_an_old_checkpoint_that_stays_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree = shutil.rmtree

    def fail(path: Path, *arguments: object, **options: object) -> None:
        if path.name == ".step-8.tmp":
            raise OSError("busy")
        rmtree(path)

    writer = CheckpointWriter(tmp_path, 1)
    save(writer, 8)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: fail(path) if path.exists() else None)
    assert save(writer, 16) == tmp_path / "step-16"
    assert [path.name for path in checkpoints(tmp_path)] == ["step-16"]
