"""HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE in every command; a missing network is reported within seconds."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.data.films import film_tokenizer
from tests.models import tiny_model

ROOT = Path(__file__).parent.parent
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9"}


def process(script: str, *arguments: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python <script> <arguments>`, without the hub settings of the tests."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    inherited |= {"HF_HOME": str(directory / "hub"), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=directory, env=inherited, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "script, arguments, environment",
    [
        pytest.param("export.py", ("from=me/model", "to=out"), NOWHERE, marks=pytest.mark.slow),
        ("chat.py", ("model=me/model", "prompt=hello"), {"HF_HUB_OFFLINE": "1"}),
    ],
)
def test_a_missing_network_is_reported_within_seconds(script, arguments, environment, tmp_path: Path) -> None:
    begun = time.monotonic()
    result = process(script, *arguments, directory=tmp_path, **environment)
    assert result.returncode == 4 and time.monotonic() - begun < 30
    assert result.stderr.splitlines()[-1].startswith("error[CHECKPOINT] no model can be loaded from me/model")
    assert len(result.stderr.splitlines()) == 1 + ("HF_ENDPOINT" in environment)


@pytest.mark.slow
def test_models_in_the_cache_of_HF_HOME_are_found_without_a_network(tmp_path: Path) -> None:
    stored = tmp_path / "hub" / "hub" / "models--me--model"
    snapshot = stored / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0" * 40)
    tokenizer = film_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512, hidden_size=64).save_pretrained(
        snapshot
    )
    tokenizer.save_pretrained(snapshot)
    result = process(
        "train.py", "model=blank_model", "model.name_or_path=me/model", "peft=qlora", "n_examples=4", "lr=1e-3",
        "n_eval_examples=2", "sample_during_eval=false", "wandb.enabled=false", "local_run_dir=run", directory=tmp_path,
        **NOWHERE,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "the Hugging Face hub cannot be reached" in result.stdout
    assert not (tmp_path / "run" / "base").exists()  # a hub name replaces the copy
    exported = process("export.py", "from=run", "to=out", directory=tmp_path, **NOWHERE)
    assert exported.returncode == 0 and (tmp_path / "out" / "model.safetensors").exists(), exported.stderr
    assert "base_model: me/model" in (tmp_path / "out" / "README.md").read_text()
