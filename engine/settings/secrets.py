"""Keep secrets out of what a run writes."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils import content_hash

REDACTED = "<redacted>"
MIN_LENGTH = 6  # a shorter secret would match inside ordinary text
# Tokens with a known form: Hugging Face, wandb, OpenAI and similar, GitHub, GitLab, AWS, Slack; JWTs.
TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|wandb_v\d_\w{20,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+)"
    r"|(?<![0-9a-f/@.-])[0-9a-f]{40}(?![0-9a-f])"  # a wandb key; in a path or after @ it is a commit
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
URL_PASSWORD = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")
ASSIGNMENT = re.compile(r"(([\w.-]+)(?:=|[\"']: ?))(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s,;'\"}\])&]+)")
FROM_ENVIRONMENT = re.compile(r"oc\.env:\s*([^\s,}]+)")
# Keys for names and paths. A run prints them and creates files by them. So an environment variable in one of them is a
# secret only if it looks like one.
PLACES = {
    "exp_name", "local_dirs", "local_run_dir", "cache_dir", "resume", "datasets", "data_dir", "chat_template",
    "model.name_or_path", "model.tokenizer_name_or_path", "model.archive",
}  # fmt: skip


def is_secret_name(name: str) -> bool:
    """Whether a key or an environment variable is named like a secret: hf_token, WANDB_API_KEY, password."""
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", name.rpartition(".")[2]).lower().replace("-", "_").split("_")
    is_key = words[-1] == "key" and len(words) > 1  # a bare "key" is any key
    return (
        is_key
        or words[-1] in ("token", "apikey", "auth", "pat", "bearer")
        or bool({"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials"} & set(words))
    )


def secrets_of(config: DictConfig | None = None) -> set[str]:
    """Secrets of the environment and of a config. No run may write them."""
    found = {value for name, value in os.environ.items() if is_secret_name(name)}
    for key, written, value in _leaves(config) if config is not None else ():
        if is_secret_name(key):
            found.add(value)
        for name in FROM_ENVIRONMENT.findall(written):
            variable = os.environ.get(name, "")
            if is_secret_name(name) or not (key.partition("[")[0] in PLACES or _is_plain(variable)):
                found.add(variable)
    return {text for text in found if len(text) >= MIN_LENGTH}


def keys_with_secrets(config: DictConfig) -> list[str]:
    """Keys of secrets, by key name, by the form of the value, or by the name of the environment variable in it."""
    return [
        key
        for key, written, value in _leaves(config)
        if is_secret_name(key)
        or any(is_secret_name(name) for name in FROM_ENVIRONMENT.findall(written))
        or any(pattern.search(text) for pattern in (TOKENS, URL_PASSWORD) for text in (written, value))
    ]


def _is_plain(value: str) -> bool:
    """Whether a value is a number, an existing path or a short word, and so reveals nothing."""
    return bool(re.fullmatch(r"[-+.\deE_]+|[A-Za-z]{,10}\d{,3}", value)) or os.path.exists(value)


def _leaves(config: DictConfig) -> Iterator[tuple[str, str, str]]:
    """The texts of a config: dotted key, text as written, resolved value ("" for errors and other types)."""

    def walk(node: Any, key: str) -> Iterator[tuple[str, str, str]]:
        if isinstance(node, dict):
            for name, item in node.items():
                yield from walk(item, f"{key}.{name}" if key else str(name))
        elif isinstance(node, list):
            for index, item in enumerate(node):
                yield from walk(item, f"{key}[{index}]")
        elif isinstance(node, str):
            value = None
            with suppress(OmegaConfBaseException):  # the interpolated key does not exist
                value = OmegaConf.select(config, key)
            yield key, node, value if isinstance(value, str) else ""

    return walk(OmegaConf.to_container(config), "")


def redact(text: str, config: DictConfig | None = None) -> str:
    """Text without secrets: those of the environment and of config, and anything in the form of one."""
    return _without(text, secrets_of(config))


def _without(text: str, secrets: set[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        # As it is, in JSON, as a Python literal, and on one line: messages use all of these forms.
        for form in {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], " ".join(secret.split())} - {""}:
            text = text.replace(form, REDACTED)
    text = URL_PASSWORD.sub(REDACTED, TOKENS.sub(REDACTED, text))
    return ASSIGNMENT.sub(lambda match: match[1] + REDACTED if is_secret_name(match[2]) else match[0], text)


def public(config: DictConfig) -> dict[str, Any]:
    """The values of a config without secrets; values of the environment stay names, ${oc.env:NAME}."""
    secrets = secrets_of(config)

    def shown(written: Any, value: Any, key: str) -> Any:
        if isinstance(value, dict):
            members = written if isinstance(written, dict) else {}
            return {name: shown(members.get(name), item, f"{key}.{name}") for name, item in value.items()}
        if isinstance(value, list):
            items = written if isinstance(written, list) else [None] * len(value)
            return [shown(*both, key) for both in zip(items, value, strict=True)]
        if isinstance(written, str) and FROM_ENVIRONMENT.search(written):
            return _without(written, secrets)
        if not isinstance(value, str):
            return value
        return REDACTED if is_secret_name(key) else _without(value, secrets)

    return shown(OmegaConf.to_container(config), OmegaConf.to_container(config, resolve=True), "")


def comparable(config: DictConfig) -> dict[str, Any]:
    """public(config), with differences visible: numbers as values, and a short hash after each redacted text."""

    def compared(shown: Any, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: compared(shown[name], item) for name, item in value.items()}
        if isinstance(value, list):
            return [compared(*both) for both in zip(shown, value, strict=True)]
        return f"{shown} (hash {content_hash([value])[:8]})" if isinstance(value, str) and value != shown else value

    return compared(public(config), OmegaConf.to_container(config, resolve=True))
