"""Reference log-probs and their cache on disk."""

import json
import multiprocessing
import os
import sqlite3
import struct
from dataclasses import replace

import pytest
import torch
import transformers

import engine.step.reference
from engine.models.hashing import weights_hash
from engine.step import reference_cache
from engine.step.heads import response_logps
from engine.step.layout import Microbatch, lay_out
from engine.step.packing_check import use_packed_attention
from engine.step.reference import LiveReference, fill_cache, reference_key
from engine.step.reference_cache import CachedReference
from tests.invariants.test_dialogue_packing import dialogue
from tests.models import pair_examples, random_examples, tiny_model
from tests.runs import Program
from trainers import BasicTrainer
from utils import UserError


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama")
    use_packed_attention(model)
    return model


def test_added_values_are_read_by_the_next_process(tmp_path, model) -> None:
    batch = lay_out(pair_examples())
    logps = LiveReference(model).logps(batch)
    cache = CachedReference(tmp_path / "key.sqlite")
    assert cache.missing(batch.responses)
    cache.add(batch, logps)
    again = CachedReference(tmp_path / "key.sqlite")
    assert len(again) == len(batch.responses) and not again.missing(batch.responses)
    assert torch.equal(again.logps(batch).float(), logps)


def test_values_do_not_depend_on_the_batch(tmp_path, model) -> None:
    examples = pair_examples()
    cache = CachedReference(tmp_path / "key.sqlite")
    cache.add(lay_out(examples), LiveReference(model).logps(lay_out(examples)))
    for example in examples:
        batch = lay_out([example])
        torch.testing.assert_close(cache.logps(batch).float(), LiveReference(model).logps(batch), rtol=1e-5, atol=1e-5)


def test_the_boundary_of_prompt_and_response_matters(tmp_path, model) -> None:
    (example,) = random_examples([(4, 3)])
    cache = CachedReference(tmp_path / "key.sqlite")
    batch = lay_out([example])
    cache.add(batch, LiveReference(model).logps(batch))
    tokens = [*example.prompt, *example.responses[0]]
    moved = torch.tensor(tokens[:5]).int().numpy(), torch.tensor(tokens[5:]).int().numpy()
    assert cache.missing([moved])


def test_two_processes_may_fill_one_cache(tmp_path, model) -> None:
    first, second = CachedReference(tmp_path / "key.sqlite"), CachedReference(tmp_path / "key.sqlite")
    batch = lay_out(pair_examples())
    logps = LiveReference(model).logps(batch)
    first.add(batch, logps)
    second.add(batch, logps + 1)
    assert torch.equal(CachedReference(tmp_path / "key.sqlite").logps(batch).float(), logps)


def test_a_fill_computes_the_earlier_turns_of_a_dialogue(tmp_path, model) -> None:
    example = dialogue([(3, 4), (2, 5)], 0)
    cache, live = CachedReference(tmp_path / "key.sqlite"), LiveReference(model)
    last = lay_out([replace(example, turns=())])
    cache.add(last, live.logps(last))
    fill_cache(cache, live, [[[example]]], lay_out, data_rank=0, num_data_ranks=1)
    assert len(cache) == 2 and len(cache.logps(lay_out([example]))) == 2


def test_a_fill_commits_by_time(tmp_path, model, monkeypatch: pytest.MonkeyPatch) -> None:
    """And at its end. In between, other processes can write."""
    clock = [100.0]
    monkeypatch.setattr(reference_cache.time, "monotonic", lambda: clock[0])
    path = tmp_path / "key.sqlite"
    cache, on_disk = CachedReference(path), []
    examples = pair_examples()
    with cache.committing_every(5.0):
        for example, now in zip(examples[:4], (101.0, 104.0, 106.0, 107.0), strict=True):
            clock[0] = now
            batch = lay_out([example])
            cache.add(batch, LiveReference(model).logps(batch))
            assert not cache.missing(batch.responses)
            on_disk.append(len(CachedReference(path)))
        other = lay_out(examples[4:])
        CachedReference(path).add(other, LiveReference(model).logps(other))
    assert on_disk == [0, 0, 6, 6] and len(CachedReference(path)) == 9


def test_a_failed_fill_keeps_what_was_computed(tmp_path, model) -> None:
    """Each microbatch is added while the next one runs, so the last one is lost."""
    cache = CachedReference(tmp_path / "key.sqlite")
    done: list[Microbatch] = []

    class Failing(LiveReference):
        def logps(self, batch: Microbatch) -> torch.Tensor:
            if len(done) == 3:
                raise RuntimeError("no more")
            done.append(batch)
            return super().logps(batch)

    batches = [[[example] for example in pair_examples()]]
    with pytest.raises(RuntimeError, match="no more"):
        fill_cache(cache, Failing(model), batches, lay_out, data_rank=0, num_data_ranks=1)
    kept = CachedReference(tmp_path / "key.sqlite")
    assert [len(kept.missing(batch.responses)) for batch in done] == [0, 0, 2]
    fill_cache(kept, LiveReference(model), batches, lay_out, data_rank=0, num_data_ranks=1)
    assert not CachedReference(tmp_path / "key.sqlite").missing(lay_out(pair_examples()).responses)


def test_simultaneous_processes_do_not_lock_each_other_out(tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(10):
        barrier = context.Barrier(4)
        arguments = (tmp_path / f"{attempt}.sqlite", barrier)
        processes = [context.Process(target=open_at_once, args=arguments) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4


def open_at_once(path, barrier) -> None:
    barrier.wait()
    CachedReference(path)


def test_an_unusable_cache_is_named(tmp_path) -> None:
    (tmp_path / "key.sqlite").mkdir()
    with pytest.raises(UserError, match=r"key\.sqlite") as caught:
        CachedReference(tmp_path / "key.sqlite")
    assert caught.value.exit_status == 6


@pytest.mark.parametrize("kept", [1000, 4096, 5000, "another file", "another table"])
def test_a_damaged_cache_is_computed_again(tmp_path, model, capsys, kept: int | str) -> None:
    batch = lay_out(pair_examples())
    logps = LiveReference(model).logps(batch)
    path = tmp_path / "key.sqlite"
    CachedReference(path).add(batch, logps)
    if isinstance(kept, int):
        os.truncate(path, kept)
    elif kept == "another file":
        path.write_text("not a database" * 100)
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("DROP TABLE logps")
            connection.execute("CREATE TABLE logps (other)")
    cache = CachedReference(path)
    assert cache.missing(batch.responses) and "computed again" in capsys.readouterr().out
    cache.add(batch, logps)
    assert torch.equal(CachedReference(path).logps(batch).float(), logps)


@pytest.mark.parametrize("what", ["logp", "response"])
def test_a_flipped_bit_is_found_and_repaired(tmp_path, model, capsys, what: str) -> None:
    batch = lay_out(pair_examples())
    logps = LiveReference(model).logps(batch)
    path = tmp_path / "key.sqlite"
    CachedReference(path).add(batch, logps)
    with sqlite3.connect(path) as connection:
        response, logp = connection.execute("SELECT response, logp FROM logps LIMIT 1").fetchone()
    content = bytearray(path.read_bytes())
    written = struct.pack(">d", logp) if what == "logp" else response
    content[content.index(written) + 2] ^= 16
    path.write_bytes(content)
    cache = CachedReference(path)
    assert len(cache) == len(batch.responses) - 1 and cache.missing(batch.responses) == {response}
    assert "1 log-probs" in capsys.readouterr().out
    cache.add(batch, logps)
    assert torch.equal(CachedReference(path).logps(batch).float(), logps)


def test_the_key_depends_on_everything_affecting_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(model, *settings: str) -> str:
        return reference_key(weights_hash(model, {}), settings, model.device)

    model = tiny_model("llama")
    keys = [
        key(model, "packed"),
        key(model, "padded"),
        key(model, "packed", "bfloat16"),
        key(tiny_model("llama", torch.bfloat16), "packed"),
        key(tiny_model("llama", rms_norm_eps=1e-3), "packed"),
    ]
    assert key(tiny_model("llama"), "packed") == keys[0]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    keys.append(key(model, "packed"))
    keys.append(reference_key(weights_hash(model, {}), ["packed"], torch.device("meta")))
    has_units = engine.step.reference.cpu_rounds_products()
    monkeypatch.setattr(engine.step.reference, "cpu_rounds_products", lambda: not has_units)
    keys.append(key(model, "packed"))
    monkeypatch.setattr(torch, "__version__", "1.0")
    keys.append(key(model, "packed"))
    assert len(set(keys)) == len(keys)


def test_another_version_of_transformers_has_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights_hash(tiny_model("llama"), {})
    monkeypatch.setattr(transformers.configuration_utils, "__version__", "99.0")
    assert tiny_model("llama").config.to_dict()["transformers_version"] == "99.0"
    assert weights_hash(tiny_model("llama"), {}) == before


def test_one_epoch_computes_the_whole_cache(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of epochs."""
    path = program.directory / "rows.jsonl"
    rows = ({"prompt": f"q{n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(14))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    num_splits = 0

    def split_batch(self: BasicTrainer, *arguments):
        nonlocal num_splits
        num_splits += 1
        if num_splits > 20:
            raise UserError("DATA", "too many", "look at an epoch")
        return plain_split(self, *arguments)

    def prepare_policy(self: BasicTrainer) -> None:
        reference = self.runner.reference
        assert isinstance(reference, CachedReference)
        assert len(reference) == 2 * (len(self.train_examples) + len(self.evaluator.examples)) == 28
        raise UserError("DATA", "all there", "")

    plain_split = BasicTrainer.split_batch
    monkeypatch.setattr(BasicTrainer, "split_batch", split_batch)
    monkeypatch.setattr(BasicTrainer, "prepare_policy", prepare_policy)
    given = (f"datasets=[{path}]", "test_fraction=0.2", "n_epochs=null", "n_examples=100000000")
    for batch_size in (1, 4, 64):
        cache_dir = program.directory / f"cache-{batch_size}"
        run = program(*given, "loss=dpo", "loss.beta=0.1", f"batch_size={batch_size}", f"cache_dir={cache_dir}")
        assert "all there" in run.err
        num_splits = 0


def test_reference_log_probs_have_no_gradient(model) -> None:
    batch = lay_out(pair_examples())
    assert not LiveReference(model).logps(batch).requires_grad
    assert torch.equal(LiveReference(model).logps(batch), response_logps(model, batch))
