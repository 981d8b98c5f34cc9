"""Do GGUF files give the same logits and tokens in llama.cpp as in transformers?

Cases: a tiny random model for each supported architecture, rotary scaling and tokenizer. llama-cpp-python is not among
the requirements, as it compiles llama.cpp for minutes:

    .venv/bin/pip install --target .cache/llama_cpp llama-cpp-python
    PYTHONPATH=.cache/llama_cpp .venv/bin/python benchmarks/llama_cpp_parity.py
"""

import json
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from llama_cpp import Llama

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import ROOT, versions
from engine.export.gguf import OUTTYPES, plan_gguf
from tests.models import SIZES, tiny_model
from tests.tokenizer_files import PRE_TOKENIZERS, TEXTS, byte_level, sentencepiece

THETA = {"rope_theta": 10000.0}
SCALED = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {**SCALED, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "sentencepiece", {}),
    ("llama", "llama-bpe", {"rope_parameters": THETA | LLAMA3}),
    ("llama", "smollm", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", "gpt-2", {"rope_parameters": THETA | {"rope_type": "linear", "factor": 4.0}, "head_dim": 16}),
    ("llama", "gpt-2", {"rope_parameters": THETA | SCALED | {"rope_type": "yarn"}}),
    ("mistral", "sentencepiece", {"sliding_window": 64}),
    ("qwen2", "qwen2", {}),
    ("qwen3", "qwen2", {"head_dim": 16}),
    ("gpt_neox", "gpt-2", {}),
    ("gpt_neox", "gpt-2", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    ("gpt2", "gpt-2", {}),
]


def measure(architecture: str, kind: str, overrides: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The largest difference of a logit for each type, and the texts with different tokens."""
    tokenizer = sentencepiece() if kind == "sentencepiece" else byte_level(kind)
    model = tiny_model(architecture, vocab_size=len(tokenizer) + 3, **overrides)
    tokens = torch.randint(3, len(tokenizer), (48,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens.unsqueeze(0)).logits[0]
    row: dict[str, Any] = {"architecture": architecture, "tokenizer": kind, "config": overrides}
    row["largest_logit"] = expected.abs().max().item()
    for outtype in OUTTYPES:
        path = directory / f"{outtype}.gguf"
        plan_gguf(model, tokenizer, outtype, name="tiny").write(path)
        # Type 0 is f32; llama.cpp's default for keys and values is f16.
        reader = Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0)
        reader.eval(tokens.tolist())
        row[outtype] = (torch.tensor(reader.scores[:48]) - expected).abs().max().item()
    row["other_tokens"] = [
        text
        for text in (*TEXTS, "a <|user|> b", " leading space", "e\u0301")
        if reader.tokenize(text.encode(), add_bos=True, special=True) != tokenizer(text)["input_ids"]
    ]
    return row


def main() -> None:
    SIZES["qwen3"] = SIZES["llama"]
    assert {kind for _, kind, _ in CASES} == {*PRE_TOKENIZERS, "sentencepiece"}
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for case in CASES:
            rows.append(measure(*case, Path(directory)))
            print({key: f"{value:.2g}" if isinstance(value, float) else value for key, value in rows[-1].items()})
    result = {"versions": versions() | {"llama-cpp-python": version("llama-cpp-python")}, "rows": rows}
    path = ROOT / "benchmarks" / "results" / f"llama-cpp-{date.today()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
