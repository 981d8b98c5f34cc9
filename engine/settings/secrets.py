"""Keep secrets out of what a run writes."""

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from omegaconf import DictConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from utils import content_hash

REDACTED = "<redacted>"
MIN_LENGTH = 6  # a shorter secret would match inside ordinary text: only whole words are redacted
MIN_WORD = 4  # a shorter one is an ordinary word too: only whole quoted texts are redacted
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


class EnvironmentRead(NamedTuple):
    """A use of ${oc.env:NAME}, in any of its forms.

    Args:
        key: the dotted key with the interpolation.
        name: of the environment variable.
        value: of the variable, or else the default.
    """

    key: str
    name: str
    value: str

    @property
    def is_secret(self) -> bool:
        is_place = self.key.partition("[")[0] in PLACES
        return is_secret_name(self.name) or not (is_place or _is_plain(self.value))


_recording = threading.RLock()  # OmegaConf has one resolver for all threads


@contextmanager
def _environment_reads() -> Iterator[list[EnvironmentRead]]:
    """Record each ${oc.env:NAME} resolved inside a with block. Its syntax has many forms; its resolver is one."""
    reads: list[EnvironmentRead] = []

    def env(name: str, default: Any = oc._DEFAULT_MARKER_, *, _node_: Node) -> Any:
        value = oc.env(name, default)
        reads.append(EnvironmentRead(_node_._get_full_key(None), name, value if isinstance(value, str) else ""))
        return value

    with _recording:
        OmegaConf.register_new_resolver("oc.env", env, replace=True)
        try:
            yield reads
        finally:
            OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def secrets_of(config: DictConfig | None = None) -> set[str]:
    """Secrets of the environment and of a config. No run may write them."""
    return _secrets_in([] if config is None else _leaves(config))


def _secrets_in(leaves: "list[Leaf]") -> set[str]:
    found = {value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= MIN_LENGTH}
    for leaf in leaves:
        if is_secret_name(leaf.key):
            found |= {*leaf.values}
        if secret_reads := [read for read in leaf.reads if read.is_secret]:
            found |= {read.value for read in secret_reads}
            if len(leaf.values) > 1:  # a variable of several values, by oc.decode
                found |= {value for value in leaf.values if not _is_plain(value)}
    return found - {""}


def keys_with_secrets(config: DictConfig) -> list[str]:
    """Keys of secrets, by key name, by the form of the value, or by the name of the environment variable in it."""
    return [
        leaf.key
        for leaf in _leaves(config)
        if is_secret_name(leaf.key)
        or any(is_secret_name(read.name) for read in leaf.reads if read.key == leaf.key)
        or any(pattern.search(text) for pattern in (TOKENS, URL_PASSWORD) for text in (leaf.written, *leaf.values))
    ]


def _is_plain(value: str) -> bool:
    """Whether a value is a number, an existing path or a short word, and so reveals nothing."""
    return bool(re.fullmatch(r"[-+.\deE_]+|[A-Za-z]{,10}\d{,3}", value)) or os.path.exists(value)


class Leaf(NamedTuple):
    """A text of a config.

    Args:
        key: dotted.
        written: the text, interpolations unresolved.
        values: the texts in its resolved value; none for errors and other types.
        reads: of the environment, those of other keys it refers to included.
    """

    key: str
    written: str
    values: list[str]
    reads: list[EnvironmentRead]


def _leaves(config: DictConfig) -> list[Leaf]:
    """The texts of a config."""
    leaves: list[Leaf] = []

    def walk(node: Any, key: str) -> None:
        if isinstance(node, dict):
            for name, item in node.items():
                walk(item, f"{key}.{name}" if key else str(name))
        elif isinstance(node, list):
            for index, item in enumerate(node):
                walk(item, f"{key}[{index}]")
        elif isinstance(node, str):
            value = None
            start = len(reads)
            with suppress(OmegaConfBaseException):  # the interpolated key does not exist
                value = OmegaConf.select(config, key)
                if OmegaConf.is_config(value):
                    value = OmegaConf.to_container(value, resolve=True)
            leaves.append(Leaf(key, node, _texts(value), reads[start:]))

    with _environment_reads() as reads:
        walk(OmegaConf.to_container(config), "")
    return leaves


def _texts(value: Any) -> list[str]:
    """The texts in a value."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def redact(text: str, config: DictConfig | None = None) -> str:
    """Text without secrets: those of the environment and of config, and anything in the form of one."""
    return _without(text, secrets_of(config))


def _without(text: str, secrets: set[str]) -> str:
    if text in secrets:
        return REDACTED
    for secret in sorted(secrets, key=len, reverse=True):
        # As it is, in JSON, as a Python literal, and on one line: messages use all of these forms.
        for form in {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], " ".join(secret.split())} - {""}:
            if len(secret) >= MIN_LENGTH:
                text = text.replace(form, REDACTED)
            else:
                before, after = (r"(?<!\w)", r"(?!\w)") if len(secret) >= MIN_WORD else ("(?<=[\"'])", "(?=[\"'])")
                text = re.sub(before + re.escape(form) + after, REDACTED, text)
    text = URL_PASSWORD.sub(REDACTED, TOKENS.sub(REDACTED, text))
    return ASSIGNMENT.sub(lambda match: match[1] + REDACTED if is_secret_name(match[2]) else match[0], text)


def public(config: DictConfig) -> dict[str, Any]:
    """The values of a config without secrets; values of the environment stay names, ${oc.env:NAME}."""
    leaves = _leaves(config)
    secrets = _secrets_in(leaves)
    from_environment = {leaf.key for leaf in leaves if any(read.key == leaf.key for read in leaf.reads)}

    def shown(written: Any, value: Any, key: str) -> Any:
        if isinstance(written, str) and key in from_environment:
            return _without(written, secrets)
        if isinstance(value, dict):
            members = written if isinstance(written, dict) else {}
            return {name: shown(members.get(name), item, f"{key}.{name}".strip(".")) for name, item in value.items()}
        if isinstance(value, list):
            items = written if isinstance(written, list) else [None] * len(value)
            return [shown(*both, f"{key}[{index}]") for index, both in enumerate(zip(items, value, strict=True))]
        if not isinstance(value, str):
            return value
        return REDACTED if is_secret_name(key) else _without(value, secrets)

    return shown(OmegaConf.to_container(config), OmegaConf.to_container(config, resolve=True), "")


def comparable(config: DictConfig) -> dict[str, Any]:
    """public(config), with differences visible: numbers as values, and a short hash after each redacted text."""

    def compared(shown: Any, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(shown, dict):
            return {name: compared(shown[name], item) for name, item in value.items()}
        if isinstance(value, list) and isinstance(shown, list):
            return [compared(*both) for both in zip(shown, value, strict=True)]
        is_hidden = isinstance(shown, str) and isinstance(value, str | list | dict) and value != shown
        return f"{shown} (hash {content_hash([value])[:8]})" if is_hidden else value

    return compared(public(config), OmegaConf.to_container(config, resolve=True))
