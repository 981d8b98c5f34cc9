"""Complete runs on several processes log, save and resume as one process does."""

import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, OPTConfig, PretrainedConfig

import train
from engine.models.weight_files import tensors_of
from engine.placement import launcher
from engine.placement.tensor_parallel import check_divides
from tests.invariants.test_runs import ARCHITECTURES, numbers
from tests.quick import slow_except
from tests.runs import Run, call_main
from tests.sharded_worker import run as run_here
from utils import UserError

pytestmark = pytest.mark.alone

Runs = dict[str, Run]
Commands = dict[str, tuple[str, ...]]  # name of a run -> overrides
WORKER = Path(__file__).with_name("sharded_worker.py")
FSDP = ("trainer=FSDPTrainer",)
TENSOR = ("trainer=TensorParallelTrainer",)
BOTH = (*FSDP, "tensor_parallel_size=2")
PACKAGE = (*TENSOR, "tensor_parallel.backend=package", "tensor_parallel_size=2")
DPO = ("loss=dpo", "loss.beta=0.1")
# The last batch and the last evaluation batch hold one example. Ranks sample for unequal numbers of prompts; some need
# several batches for them.
COMMON = (
    "model=blank_model", "model.name_or_path=tiny", "model.tokenizer_name_or_path=films", "wandb.enabled=false",
    "report=null",
    "optimizer=AdamW", "lr=1e-3", "warmup_steps=2", "max_grad_norm=1.0", "batch_size=4",
    "gradient_accumulation_steps=2", "token_budget=300", "max_length=96", "max_prompt_length=80", "n_examples=21",
    "collective_timeout=20", "n_eval_examples=5", "eval_batch_size=2", "n_eval_model_samples=5", "eval_every=8",
    "keep_checkpoints=null", "win_rate.judge=null",  # tests/test_win_rates.py judges on two processes
)  # fmt: skip
MODEL = {name: (f"model.architecture={value}",) for name, value in ARCHITECTURES.items()}
LLAMA = MODEL["llama"]
# Samples differ between placements, so these metrics do too.
SAMPLE_METRICS = ("ground_truth/", "kl_eval", "forward_kl_eval", "samples_eval/", "win_rate_eval")


def command(directory: Path, name: str, overrides: tuple[str, ...]) -> list[str]:
    override_keys = {override.partition("=")[0] for override in overrides}
    defaults = (*COMMON, *LLAMA, f"cache_dir={directory / 'cache'}", f"local_run_dir={directory / name}")
    return [*(default for default in defaults if default.partition("=")[0] not in override_keys), *overrides]


def runs_on(num_ranks: int, directory: Path, runs: Commands) -> Runs:
    """Execute runs in turn on num_ranks processes, started once for all runs."""
    commands = {name: command(directory, name, overrides) for name, overrides in runs.items()}
    outs = {name: directory / f"{name}.out" for name in runs}
    if num_ranks == 1:
        for name in runs:
            run_here(commands[name], outs[name])
    else:
        text = json.dumps([[commands[name], str(outs[name])] for name in runs])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = launcher.launch(text, num_ranks, [sys.executable, WORKER])
        assert status == 0, err.getvalue()
    return {name: Run(0, path.read_text(), "") for name, path in outs.items()}


def program(*arguments: str) -> Run:
    """`python train.py *arguments`, including its launcher."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = call_main(list(arguments), patch)
    return Run(status, out.getvalue(), err.getvalue())


def weights(run: Run) -> dict[str, Tensor]:
    return dict(tensors_of(run.dir / "LATEST", "model"))


def assert_same_weights(ours: Run, theirs: Run, rel: float = 1e-5) -> None:
    found, expected = weights(ours), weights(theirs)
    assert found.keys() == expected.keys()
    differences = torch.cat([(found[name] - value).flatten() for name, value in expected.items()])
    assert differences.norm() / torch.cat([value.flatten() for value in expected.values()]).norm() < rel


def assert_equal_weights(ours: Run, theirs: Run) -> None:
    found, expected = weights(ours), weights(theirs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def assert_same(ours: Run, theirs: Run, rel: float = 1e-5, after: int = -1) -> None:
    """Check for equal weights and rows; of theirs, rows after `after` examples."""
    found, expected = numbers(ours), [row for row in numbers(theirs) if row["counters/examples"] > after]
    assert len(found) == len(expected) > 0
    for row, other in zip(found, expected, strict=True):
        row, other = ({key: each[key] for key in each if not key.startswith(SAMPLE_METRICS)} for each in (row, other))
        assert row.keys() == other.keys()
        for key, value in other.items():
            if "accuracies" in key and abs(other[key.replace("accuracies", "margins")]) < 1e-4:
                continue  # near a tie, the larger of two is chance
            # Rewards are a tenth of differences of log-probs of about 100, and kl is their mean.
            scale = 1 if "rewards" in key else 10 if key.startswith(("kl/", "logratios")) else 0.1
            assert row[key] == pytest.approx(value, rel=rel, abs=scale * rel), (key, row, other)
    assert_same_weights(ours, theirs, rel)


# ---- The runs ----

# Sizes no world size divides evenly.
SIZES = "hidden_size: 34, intermediate_size: 46, num_hidden_layers: 2, num_attention_heads: 2, head_dim: 16"
ODD = f"model.architecture={{model_type: llama, vocab_size: 835, {SIZES}}}"
OTHERS: Commands = {  # run by BasicTrainer, FSDPTrainer and TensorParallelTrainer
    "live": (*DPO, "reference=live", "n_eval_examples=1", "n_eval_model_samples=1", "n_examples=9", ODD),
    "padded": (*DPO, "batching=padded", "optimizer=SGD", "sample_during_eval=false", "n_examples=9"),
    "sft": (
        "loss=sft",
        "optimizer=Adagrad",
        "activation_checkpointing=true",
        "sample_during_eval=false",
        "n_examples=9",
    ),
    "bf16": (*DPO, "mixed_precision=bfloat16", "n_examples=9"),
    "aot": ("loss=aot", "sample_during_eval=false", "n_examples=9"),
    "beta-dpo": ("loss=beta_dpo", "sample_during_eval=false", "n_examples=9"),
    "tdpo2": ("loss=tdpo2", "sample_during_eval=false", "n_examples=9", ODD),
    "tdpo2-bf16": ("loss=tdpo2", "sample_during_eval=false", "n_examples=9", "mixed_precision=bfloat16"),
    "wpo": ("loss=wpo", "sample_during_eval=false", "n_examples=9", ODD),
    "ld-dpo": ("loss=ld_dpo", "sample_during_eval=false", "n_examples=9"),
    "kto": ("loss=kto", "loss.beta=0.1", "sample_during_eval=false", "n_examples=9"),
    "bco": ("loss=bco", "sample_during_eval=false", "n_examples=9"),
}
# (trainer, run of OTHERS): "live" with both trainers, other sums over ranks with one; `make soak` runs all.
ON_TWO = [("fsdp", "live"), ("tensor", "live"), ("fsdp", "aot"), ("tensor", "bco")]
MORE_ON_TWO = [(name, other) for other in OTHERS for name in ("fsdp", "tensor") if (name, other) not in ON_TWO]
IN_ORDER = (*DPO, "deterministic=true", "optimizer=RMSprop", "sample_during_eval=false", "n_examples=9")
BY_PACKAGE = ("llama", "gpt_neox", "gpt2")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def launched(directory: Path) -> Run:
    """A run of FSDPTrainer on two processes, by the users' command line."""
    run = program(*command(directory, "launched", (*DPO, *FSDP, "num_processes=2")))
    assert run.status == 0, run.err
    return run


def run_basic(directory: Path, runs: Commands) -> Runs:
    found = runs_on(1, directory, {f"basic-{name}": overrides for name, overrides in runs.items()})
    return {name.removeprefix("basic-"): run for name, run in found.items()}


@pytest.fixture(scope="module")
def basic(directory: Path, launched: Run) -> Runs:
    """Runs of BasicTrainer; the first reads the cached reference of `launched`."""
    runs = {name: (*DPO, *MODEL[name]) for name in ("llama", "gpt2")} | {"in-order": IN_ORDER}
    return run_basic(directory, runs | {other: OTHERS[other] for _, other in ON_TWO})


@pytest.fixture(scope="module")
def more_basic(directory: Path, basic: Runs) -> Runs:
    runs = {"gpt_neox": (*DPO, *MODEL["gpt_neox"])} | OTHERS
    return basic | run_basic(directory, {name: run for name, run in runs.items() if name not in basic})


def others_on_two(cases: list[tuple[str, str]]) -> Commands:
    trainers = {"fsdp": FSDP, "tensor": TENSOR}
    return {f"{name}-{other}": (*trainers[name], *OTHERS[other]) for name, other in cases}


@pytest.fixture(scope="module")
def more_on_two(directory: Path, basic: Runs) -> Runs:
    gpt2, silent = (*DPO, *MODEL["gpt2"]), "sample_during_eval=false"
    runs = others_on_two(MORE_ON_TWO) | {
        "fsdp-from-basic": (*DPO, *FSDP, f"resume={basic['llama'].dir}/step-8", silent),
        "tensor-gpt2": (*gpt2, *TENSOR),
        "tensor-gpt2-resumed": (*gpt2, *TENSOR, f"resume={directory}/tensor-gpt2/step-8"),
        "tensor-gpt2-from-basic": (*gpt2, *TENSOR, f"resume={basic['gpt2'].dir}/step-8", silent),
    }
    return runs_on(2, directory, runs)


@pytest.fixture(scope="module")
def on_two(directory: Path, launched: Run, basic: Runs) -> Runs:
    runs = others_on_two(ON_TWO) | {
        "fsdp-in-order": (*IN_ORDER, *FSDP),
        "fsdp-in-order-from-basic": (*IN_ORDER, *FSDP, f"resume={basic['in-order'].dir}/step-8"),
        "fsdp-resumed": (*DPO, *FSDP, f"resume={launched.dir}/step-8"),
        "tensor-from-fsdp": (*DPO, *TENSOR, f"resume={launched.dir}/step-8", "sample_during_eval=false"),
    }
    return runs_on(2, directory, runs)


@pytest.fixture(scope="module")
def on_four(directory: Path, launched: Run, more_on_two: Runs) -> Runs:
    gpt2, one_prompt = MODEL["gpt2"], ("n_eval_examples=1", "n_eval_model_samples=1")
    runs = {
        "replicas": (*DPO, *FSDP, "fsdp.replicas=2", "fsdp.cpu_offload=true"),
        "replicas-live": (*OTHERS["live"], *FSDP, "fsdp.replicas=2"),
        "grid-from-fsdp": (*DPO, *BOTH, f"resume={launched.dir}/step-8", *one_prompt),
        "grid-gpt2-from-tensor": (*DPO, *gpt2, *BOTH, f"resume={more_on_two['tensor-gpt2'].dir}/step-16", *one_prompt),
    }
    return runs_on(4, directory, runs)


@pytest.fixture(scope="module")
def packaged(directory: Path) -> Runs:
    return runs_on(1, directory, {"package-gpt2": (*DPO, *MODEL["gpt2"], *PACKAGE)})


@pytest.fixture(scope="module")
def more_packaged(directory: Path) -> Runs:
    runs: Commands = {f"package-{name}": (*DPO, *MODEL[name], *PACKAGE) for name in BY_PACKAGE if name != "gpt2"}
    return runs_on(1, directory, runs)


# ---- Equivalences ----


def test_a_launched_run_logs_like_one_process(launched: Run, basic: Runs) -> None:
    assert_same(launched, basic["llama"])
    assert [row["counters/examples"] for row in launched.steps] == [4, 8, 12, 16, 20, 21]
    assert [row["counters/examples"] for row in launched.evals] == [0, 8, 16, 21]
    assert [row["prompt"] for row in launched.samples] == [row["prompt"] for row in basic["llama"].samples]
    assert len(launched.samples) == 4 * 5
    assert all(row["policy"] and row["reference"] for row in launched.samples)
    assert launched.err == "" and launched.out.count("run directory: ") == 1


def test_a_launched_run_saves_like_one_process(launched: Run, basic: Runs, directory: Path) -> None:
    checkpoint, other = launched.dir / "LATEST", basic["llama"].dir / "LATEST"
    parts = {f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("model", "optimizer") for rank in (1, 2)}
    indices = {f"{kind}.safetensors.index.json" for kind in ("model", "optimizer")}
    unsplit_files = {f"{kind}.safetensors" for kind in ("model", "optimizer")}
    files, expected = ({path.name for path in where.iterdir()} for where in (checkpoint, other))
    assert files - parts - indices == expected - unsplit_files
    assert {path.name for path in launched.dir.iterdir()} == {path.name for path in basic["llama"].dir.iterdir()}
    for kind in ("model", "optimizer"):
        found, unsplit = dict(tensors_of(checkpoint, kind)), dict(tensors_of(other, kind))
        assert {name: value.shape for name, value in found.items()} == {name: v.shape for name, v in unsplit.items()}
        index = json.loads((checkpoint / f"{kind}.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
        for name, file in index["weight_map"].items():
            with safe_open(checkpoint / file, framework="pt") as part:
                assert torch.equal(part.get_tensor(name), found[name])
        for name, value in found.items():
            torch.testing.assert_close(value, unsplit[name], rtol=1e-3, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights(launched).items())
    assert AutoTokenizer.from_pretrained(checkpoint)("film").input_ids
    states = [torch.load(where / "policy.pt", weights_only=True) for where in (checkpoint, other)]
    assert states[0]["step_idx"] == 21 and states[0]["metrics"].keys() == states[1]["metrics"].keys()
    assert states[0]["state"].keys() == states[1]["state"].keys()
    assert all(torch.equal(value, states[0]["state"][name]) for name, value in weights(launched).items())


def test_the_margin_is_exactly_0_before_the_first_step(launched: Run, on_two: Runs) -> None:
    assert_margin_is_0({"launched": launched, **{name: on_two[name] for name in ("fsdp-live", "tensor-live")}})


def assert_margin_is_0(runs: Runs) -> None:
    for name, run in runs.items():
        for split, row in (("eval", run.evals[0]), ("train", run.steps[0])):
            assert row[f"rewards_{split}/margins"] == row[f"rewards_{split}/chosen"] == 0, name
            assert row[f"loss/{split}"] == pytest.approx(math.log(2), abs=1e-7), name


def test_a_reference_computed_on_several_ranks_is_complete(launched: Run, basic: Runs, on_two: Runs) -> None:
    assert "log-probs computed" in launched.out
    others = (basic["llama"], on_two["fsdp-resumed"], on_two["tensor-from-fsdp"])
    assert all("all log-probs are in" in run.out for run in others)


@pytest.mark.parametrize(("name", "other"), slow_except([*ON_TWO, *MORE_ON_TWO], *ON_TWO))
def test_two_processes_train_like_one(name: str, other: str, request: pytest.FixtureRequest) -> None:
    on_two, on_one = ("on_two", "basic") if (name, other) in ON_TWO else ("more_on_two", "more_basic")
    run = request.getfixturevalue(on_two)[f"{name}-{other}"]
    assert_same(run, request.getfixturevalue(on_one)[other], rel=1e-2 if other.endswith("bf16") else 1e-5)
    assert len(run.steps) == 3


def test_ordered_sums_equal_one_process_bitwise(on_two: Runs, basic: Runs) -> None:
    assert numbers(on_two["fsdp-in-order"]) == numbers(basic["in-order"])
    assert_equal_weights(on_two["fsdp-in-order"], basic["in-order"])
    assert "resumed from" in on_two["fsdp-in-order-from-basic"].out
    assert_equal_weights(on_two["fsdp-in-order-from-basic"], basic["in-order"])


@pytest.mark.slow
def test_replicas_and_offloading_train_like_one_process(on_four: Runs, basic: Runs) -> None:
    assert_margin_is_0({"replicas-live": on_four["replicas-live"]})
    assert "all log-probs are in" in on_four["replicas"].out
    assert_same(on_four["replicas"], basic["llama"])
    assert len(on_four["replicas"].samples) == 4 * 5
    assert_same(on_four["replicas-live"], basic["live"])
    assert len(on_four["replicas-live"].samples) == 3  # one prompt, before, at 8 and at the end


@pytest.mark.parametrize("name", slow_except(BY_PACKAGE, "gpt2"))
def test_the_package_trains_like_one_process(name: str, request: pytest.FixtureRequest) -> None:
    packaged, basic = ("packaged", "basic") if name == "gpt2" else ("more_packaged", "more_basic")
    run = request.getfixturevalue(packaged)[f"package-{name}"]
    assert_same(run, request.getfixturevalue(basic)[name])
    assert len(run.samples) == 4 * 5


@pytest.mark.slow
def test_fused_projections_are_saved_in_their_original_order(more_on_two: Runs, basic: Runs) -> None:
    assert_same(more_on_two["tensor-gpt2"], basic["gpt2"])
    assert len(more_on_two["tensor-gpt2"].samples) == 4 * 5


# ---- Resume, under the same and other placements ----


def test_a_resumed_run_equals_the_uninterrupted_run_bitwise(launched: Run, on_two: Runs) -> None:
    assert_equal_after_8(on_two["fsdp-resumed"], launched)


@pytest.mark.slow
def test_a_resumed_run_under_tensor_parallelism_too(more_on_two: Runs) -> None:
    assert_equal_after_8(more_on_two["tensor-gpt2-resumed"], more_on_two["tensor-gpt2"])


def assert_equal_after_8(resumed: Run, uninterrupted: Run) -> None:
    assert "resumed from" in resumed.out
    assert numbers(resumed) == [row for row in numbers(uninterrupted) if row["counters/examples"] > 8]
    assert_equal_weights(resumed, uninterrupted)


def test_a_run_resumes_under_another_trainer(launched: Run, on_two: Runs, basic: Runs, directory: Path) -> None:
    runs: Commands = {"basic-from-fsdp": (*DPO, f"resume={launched.dir}/step-8", "sample_during_eval=false")}
    assert_resumed(runs_on(1, directory, runs) | {"tensor-from-fsdp": on_two["tensor-from-fsdp"]}, basic)


@pytest.mark.slow
def test_more_runs_resume_under_another_trainer(
    more_on_two: Runs, packaged: Runs, basic: Runs, directory: Path
) -> None:
    gpt2 = (*DPO, *MODEL["gpt2"])
    runs = {
        "basic-gpt2-from-tensor": (*gpt2, f"resume={more_on_two['tensor-gpt2'].dir}/step-8"),
        "basic-gpt2-from-package": (*gpt2, f"resume={packaged['package-gpt2'].dir}/step-8"),
        "package-gpt2-from-tensor": (*gpt2, *PACKAGE, f"resume={more_on_two['tensor-gpt2'].dir}/step-8"),
    }
    sharded = {name: more_on_two[name] for name in ("fsdp-from-basic", "tensor-gpt2-from-basic")}
    assert_resumed(runs_on(1, directory, runs) | sharded, basic)


def assert_resumed(runs: Runs, basic: Runs) -> None:
    for name, run in runs.items():
        assert "resumed from" in run.out, name
        assert_same(run, basic["gpt2" if "gpt2" in name else "llama"], after=8)


@pytest.mark.slow
def test_a_run_resumes_on_a_grid(on_four: Runs, basic: Runs) -> None:
    for name, expected in (("grid-from-fsdp", basic["llama"]), ("grid-gpt2-from-tensor", basic["gpt2"])):
        grid = on_four[name]  # it evaluates fewer examples
        last = [row["loss/train"] for row in expected.steps][-len(grid.steps) :]
        assert [row["loss/train"] for row in grid.steps] == pytest.approx(last, rel=1e-5)
        assert_same_weights(grid, expected)
    assert len(on_four["grid-from-fsdp"].samples) == 2


def test_other_settings_are_still_refused_on_resume(launched: Run, directory: Path) -> None:
    changed = ("trainer=BasicTrainer", "fsdp.replicas=1", "collective_timeout=9", "batch_size=3")
    run = program(*command(directory, "refused", (*DPO, *changed, f"resume={launched.dir}/step-8")))
    assert run.status == 2 and "another config: batch_size was 4 and is 3;" in run.err


# ---- Refusals ----

# Larger than any machine, so a refusal proves it was never loaded.
HUGE = "hidden_size: 98304, intermediate_size: 393216, num_hidden_layers: 400"


@pytest.mark.parametrize(
    "trainer, model, message",
    [
        pytest.param(
            (*TENSOR, "num_processes=2"),
            f"{{model_type: llama, {HUGE}, num_attention_heads: 96, num_key_value_heads: 3}}",
            "tensor_parallel_size: 2 does not divide the model's 3 key_value_heads; fix: tensor_parallel_size=3",
            marks=pytest.mark.slow,
        ),
        (
            (*PACKAGE, "tensor_parallel_size=5"),
            f"{{model_type: llama, {HUGE}, num_attention_heads: 96}}",
            "96 attention heads cannot be divided among 5 devices; fix: ",
        ),
        (PACKAGE, f"{{model_type: qwen2, {HUGE}}}", "it can split llama, gpt_neox, gpt2, not"),
    ],
)
def test_an_unsplittable_model_is_refused_before_loading(
    trainer: tuple[str, ...], model: str, message: str, directory: Path
) -> None:
    run = program(*command(directory, "refused", (*DPO, *trainer, f"model.architecture={model}")))
    assert run.status == 2
    assert run.err.startswith("error[CONFIG] ") and run.err.count("\n") == 1 and message in run.err


@pytest.mark.parametrize(
    "config, message",
    [
        (GPT2Config(n_head=3), "2 does not divide the model's 3 attention_heads; fix: tensor_parallel_size=3"),
        (OPTConfig(), "opt cannot be split: it has no plan for tensor parallelism; fix: trainer=FSDPTrainer"),
        (LlamaConfig(num_attention_heads=1), "fix: trainer=FSDPTrainer splits any model"),
    ],
)
def test_the_world_size_must_divide_the_model(config: PretrainedConfig, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_divides(config, 2)


def test_embeddings_in_a_plan_of_transformers_are_split_as_ever() -> None:
    config = LlamaConfig()
    config.base_model_tp_plan = {"embed_tokens": "embedding_rowwise", **config.base_model_tp_plan}  # as in 5.17
    assert check_divides(config, 2) == LlamaConfig().base_model_tp_plan


# ---- Two machines ----


@pytest.fixture
def machines(tmp_path) -> Iterator[list[str]]:
    """The names of two network namespaces, 10.99.7.1 and 10.99.7.2 in a network of their own."""
    names = [f"trainer-{os.getpid()}-{index}" for index in (1, 2)]

    def ip(arguments: str) -> None:
        subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)

    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip(f"netns add {name}")
                stack.callback(ip, f"netns delete {name}")  # removes both ends of the cable
            ip(f"link add one netns {names[0]} type veth peer name two netns {names[1]}")
            for index, (name, link) in enumerate(zip(names, ("one", "two"), strict=True), start=1):
                ip(f"-n {name} address add 10.99.7.{index}/24 dev {link}")
                ip(f"-n {name} link set {link} up")
                ip(f"-n {name} link set lo up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
        yield names


@pytest.mark.slow  # tests/faults have ranks in the environment of torchrun
def test_two_machines_train_like_one(machines: list[str], directory: Path, basic: Runs) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                "--master-addr=10.99.7.1", "--master-port=29400")  # fmt: skip
    arguments = command(directory, "machines", (*DPO, *FSDP, "sample_during_eval=false"))
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *torchrun, f"--node-rank={rank}", train.__file__, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )
        for rank, name in enumerate(machines)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], outputs
    run = Run(0, outputs[0][0], outputs[0][1])
    assert outputs[1][0] == ""
    assert_same(run, basic["llama"])
    assert len(list((run.dir / "LATEST").glob("model-*-of-00002.safetensors"))) == 2
