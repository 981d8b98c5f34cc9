"""The jobs of a sweep: one directory for each, and names that tell them apart."""

import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils import UserError, content_hash

MAX_LENGTH = 80  # of the part of a name that tells jobs apart
OF_HYDRA = re.compile(r"\$\{(?:hydra|now):[^{}]*\}")
PLACES = {"exp_name", "local_dirs", "local_run_dir", "cache_dir", "resume"}  # where a run is, not what it trains


def check_run_dirs(jobs: Sequence[DictConfig]) -> None:
    """Refuse a sweep in which two jobs write the same run directory.

    Raises:
        UserError: CONFIG.
    """
    job_of: dict[str, int] = {}
    for number, job in enumerate(jobs):
        written = OmegaConf.to_container(job)
        assert isinstance(written, dict)
        if "${hydra:job." in str(written["local_run_dir"]):  # ${hydra:job.num} has no value yet, and differs
            continue
        with suppress(OmegaConfBaseException):  # run_job reports it
            run_dir = job.local_run_dir or (None if job.resume == "auto" else job.resume)
            if run_dir is None or job.plan is True:
                continue
            other = job_of.setdefault(os.path.abspath(str(run_dir)), number)
            if other != number:
                key = "local_run_dir" if job.local_run_dir else "resume"
                problem = f"{key}: jobs {other} and {number} of the sweep would both write {run_dir}"
                fix = "leave it out for new directories, or name a key that varies: 'local_run_dir=runs/lr-${lr}'"
                raise UserError("CONFIG", problem, fix)


def quoted_for_hydra(text: str) -> str:
    """A text as the value of an override."""
    is_plain = text.isascii() and all(char.isalnum() or char in "/._-+" for char in text)
    return text if is_plain else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def resolve_hydra(config: DictConfig) -> DictConfig:
    """A copy for a process without Hydra: ${hydra:...} and ${now:...} are values. Others stay: they may be secrets."""

    def value_of(text: str) -> Any:
        value = OmegaConf.create({"value": text}).value
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value

    def resolved(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: resolved(item) for key, item in node.items()}
        if isinstance(node, list):
            return [resolved(item) for item in node]
        if not isinstance(node, str):
            return node
        return value_of(node) if OF_HYDRA.fullmatch(node) else OF_HYDRA.sub(lambda match: str(value_of(match[0])), node)

    return OmegaConf.create(resolved(OmegaConf.to_container(config)))


def varied_values(overrides: Sequence[str], varied: Collection[str]) -> dict[str, str]:
    """The values of one job for the keys that differ between jobs.

    Args:
        overrides: of the job.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = {each.key_or_group: (each.input_line or "").partition("=")[2] for each in parsed}
    return {key: value for key, value in values.items() if key in varied}


def sweep_name(exp_name: str, overrides: Sequence[str], varied: Collection[str]) -> str:
    """exp_name with the overrides of one job that vary, as in films_tiny_dpo_beta-0.1.

    Args:
        overrides: of the job.
        varied: keys that differ between jobs.
    """
    values = {key: value for key, value in varied_values(overrides, varied).items() if key not in PLACES}
    last_words = [re.split(r"[./]", key)[-1] for key in values]
    parts = []
    for (key, value), word in zip(values.items(), last_words, strict=True):
        if value not in exp_name.split("_"):  # the loss is in the name already
            parts.append(f"{word if last_words.count(word) == 1 else key}-{value}")
    if not parts:
        return exp_name
    written = "_".join(parts)
    label = re.sub(r"[^\w.+-]+", "-", written, flags=re.ASCII).strip("-")
    if len(label) > MAX_LENGTH:
        label = f"{label[: MAX_LENGTH - 9]}_{content_hash([written])[:8]}"
    return f"{exp_name}_{label}"
