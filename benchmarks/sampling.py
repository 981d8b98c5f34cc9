"""How many tokens a second does each engine of sampling give, on this device?

A model of random weights samples responses to prompts of the lengths of HH. Such a model hardly ends a response, so all
are as long as allowed. Engines take turns.

    .venv/bin/python benchmarks/sampling.py --model pythia-410m --results DIR
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import MODELS, add_results_option, machine, shown_command, write_result
from benchmarks.pairs import synthetic_pairs

EOS = 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Engine -> its tokens a second, or its error."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from engine.models.group_sampling import Sampling
    from engine.models.sampling_engines import ContinuousBatching, Loop, SamplingEngine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = dict(MODELS[arguments.model])
    vocabulary = values["vocab_size"]
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype)).eval()
    prompts = [
        np.array([max(token, 1) for token in pair["prompt"]], np.int32)
        for pair in synthetic_pairs(vocabulary, arguments.prompts)
    ]
    sampling = Sampling(
        num_samples=arguments.responses,
        max_new_tokens=arguments.max_new_tokens,
        max_length=config.max_position_embeddings,
        eos_token_id=EOS,
        pad_token_id=EOS,
        max_rows=arguments.rows,
    )
    engines: dict[str, SamplingEngine] = {"loop": Loop(), "continuous": ContinuousBatching()}
    found: dict[str, Any] = {name: [] for name in engines}
    for repeat in range(arguments.repeats + 1):  # the first warms up
        for name, engine in engines.items():
            if isinstance(found[name], str):
                continue
            start = time.perf_counter()
            try:
                tokens = engine.sample(model, prompts, [[repeat, place] for place in range(len(prompts))], sampling)[0]
            except Exception as error:  # the other engine counts
                found[name] = f"{type(error).__name__}: {error}"[:500]
                continue
            number = sum(len(response) for group in tokens for response in group)
            if repeat:
                found[name].append(number / (time.perf_counter() - start))
            print(f"{name}: {number / (time.perf_counter() - start):,.0f} tokens/s", flush=True)
    return {name: value if isinstance(value, str) else round(statistics.median(value)) for name, value in found.items()}


def main(texts: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="pythia-410m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--responses", type=int, default=8, help="to each prompt")
    parser.add_argument("--rows", type=int, default=128, help="responses at a time")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="measured, after one of warm-up")
    add_results_option(parser)
    arguments = parser.parse_args(texts)
    import torch

    record = {
        "command": shown_command("sampling", texts),
        **machine(torch.get_num_threads()),
        "tokens_per_second": measure(arguments),
    }
    print(record["tokens_per_second"])
    write_result(arguments.results, f"sampling-{arguments.model}", record)


if __name__ == "__main__":
    main(sys.argv[1:])
