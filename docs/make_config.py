"""Write docs/config.md from the comments of config/: python -m docs.make_config."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from engine.settings.annotations import describe
from engine.settings.keys import key_types
from engine.settings.presets import CONFIG_DIR

PAGE = CONFIG_DIR.parent / "docs" / "config.md"
INTRO = """# Every key

How do I set a key? Each key is set as `key=value` on the command line:

```bash
python train.py lr=1e-6 loss=dpo loss.beta=0.1
python train.py --help
```

All problems of a command are reported at once, before anything is loaded. This page is made by `make docs` from the
comments of `config/`."""
GROUPS = {"model": "The model", "loss": "The loss", "peft": "Trained parameters"}


@dataclass
class Entry:
    """A key of a YAML file, its default and the comment above it."""

    key: str
    default: str
    comment: str


def entries(path: Path, prefix: str) -> Iterator[Entry | str]:
    """The keys of a YAML file in its order; before them, as strings, the titles of sections."""
    text = path.read_text(encoding="utf-8")
    values = OmegaConf.load(path)
    comment: list[str] = []
    group = ""
    prefix = "" if "# @package _global_" in text else prefix
    for line in text.partition("\nhydra:")[0].splitlines():
        if title := re.fullmatch(r"# ---- (.*) ----", line):
            yield title[1]
        elif line.lstrip().startswith("#"):
            comment.append(line.strip().removeprefix("#").strip())
        elif key := re.match(r"( *)(\w+):(.*)", line):
            group = group if key[1] else ""
            name = f"{group}{key[2]}"
            value = OmegaConf.select(values, name) if "???" not in line and "${" not in line else None
            if OmegaConf.is_dict(value):
                group = f"{name}."
            elif name != "defaults" and key[2] != "name":
                default = key[3].partition(" #")[0].strip() or f"[{', '.join(value or ())}]"
                yield Entry(prefix + name, default, " ".join(comment))
            comment = []
        else:
            comment = []


def first_comment(path: Path) -> str:
    """The comment that a preset begins with, without its command."""
    lines = path.read_text(encoding="utf-8").splitlines()
    texts = (line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return " ".join(text for text in texts if not text.startswith(("@package", "python ")))


def cell(text: str) -> str:
    """Text in a cell of a table, as it stands."""
    return re.sub(r"([|<*])", r"\\\1", text)


def row(entry: Entry, types: dict[str, Any]) -> str:
    default = "required" if entry.default == "???" else f"`{entry.default}`"
    value = describe(types[entry.key])
    return f"| `{entry.key}` | {default} | {cell(value)} | {cell(entry.comment)} |"


TABLE = ["", "| key | default | value | |", "| --- | --- | --- | --- |"]


def table(path: Path, prefix: str, types: dict[str, Any]) -> list[str]:
    """The table of a preset's own keys, under its comment."""
    rows = [row(entry, types) for entry in entries(path, prefix) if isinstance(entry, Entry)]
    return ["", first_comment(path), *(TABLE + rows if rows else [])]


def page() -> str:
    """The text of docs/config.md."""
    lines = [INTRO]
    types = key_types()
    for entry in entries(CONFIG_DIR / "config.yaml", ""):
        lines += ["", f"## {entry}", *TABLE] if isinstance(entry, str) else [row(entry, types)]
    for group, title in GROUPS.items():
        lines += ["", f"## {title}: `{group}=`"]
        paths = sorted((CONFIG_DIR / group).glob("*.yaml"))
        for path in [CONFIG_DIR / "model" / "blank_model.yaml"] if group == "model" else paths:
            loss, peft = (path.stem if group == name else None for name in ("loss", "peft"))
            lines += ["", f"### `{group}={path.stem}`", *table(path, f"{group}.", key_types(loss, peft))]
        if group == "model":
            lines += ["", "| `model=` | |", "| --- | --- |"]
            lines += [f"| `{path.stem}` | {first_comment(path)} |" for path in paths if path.stem != "blank_model"]
    lines += ["", "## Whole runs: `+experiment=`", "", "| `+experiment=` | |", "| --- | --- |"]
    for path in sorted((CONFIG_DIR / "experiment").glob("*.yaml")):
        lines.append(f"| `{path.stem}` | {first_comment(path)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
