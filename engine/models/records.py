"""Schemas of the JSON and YAML that a run leaves and reads back."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Ge, Le, Len
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel, StringConstraints, ValidationError

from utils import UserError, clipped

Natural = Annotated[int, Ge(0), Le(sys.maxsize)]
PlainName = Annotated[str, StringConstraints(pattern=r"^[^/\\]+$")]  # of a file in the same directory


def check_inside(name: str) -> str:
    """The relative path of a file below a directory: tokenizers keep several chat templates in a folder."""
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{clipped(name)} is outside the directory")
    return name


InnerPath = Annotated[str, AfterValidator(check_inside)]


class Record(BaseModel):
    """A mapping read back; keys of other versions are kept."""

    model_config = ConfigDict(strict=True, extra="allow")


# ---- training_state.json ----


class ExampleCounter(Record):
    examples: Natural


class ModelState(Record):
    """The part of a training state that tells how a model was trained."""

    counters: ExampleCounter
    chat_template: str | None = None  # the text of the run's Jinja file
    reward_mean: float | None = None  # of a reward model, on held-out responses
    reward_std: float | None = None


class Counters(ExampleCounter):
    updates: Natural
    skipped: Natural = 0


class StateSettings(Record):
    optimizer: str


class BestRecord(Record):
    metric: str
    value: float
    checkpoint: Annotated[str, StringConstraints(pattern=r"^step-\d+$")]
    measured_with: dict[str, Any] = {}


class TrainingState(ModelState):
    """What a run needs to resume."""

    counters: Counters
    evaluation_due: bool
    log_sizes: dict[str, Natural]
    settings: StateSettings
    data: str
    token_budget: Annotated[Natural, Ge(1)]
    reference: str | None = None
    base: str | None = None
    best: BestRecord | Annotated[dict[str, Any], Len(0, 0)]
    loss_state: dict[str, float] = {}


# ---- Other files ----


class WrittenFile(Record):
    bytes: Natural
    sha256: str


class Manifest(Record):
    checkpoint: str
    files: dict[InnerPath, WrittenFile]


class MetricsRow(Record):
    __pydantic_extra__: dict[str, float] = Field(init=False)
    examples: Natural = Field(alias="counters/examples")


class AdapterConfig(Record):
    base_model_name_or_path: str | None = None
    peft_type: str | None = None
    task_type: str | None = None
    target_modules: list[str] | str | None = None


class ModelStart(Record):
    """A path in the settings, and the model it stood for when the run started."""

    given: str
    taken: str


class ModelStarts(RootModel[dict[str, ModelStart]]):
    """By key of the settings."""


class Pin(Record):
    """A run that builds on a checkpoint, and its path from there."""

    run: str
    relative: str | None = None


class ShardIndex(Record):
    weight_map: dict[str, PlainName]


class ModelSection(Record):
    name_or_path: str | None = None
    tokenizer_name_or_path: str | None = None
    archive: str | None = None


class LossSection(Record):
    name: str | None = None


class RunConfig(Record):
    datasets: list[str] | str | None = None  # text: an interpolation, of the environment for example
    chat_template: str | None = None
    model: ModelSection | None = None
    loss: LossSection | None = None


# ---- Reading ----


def parse_record(schema: type[BaseModel], data: bytes, *, is_yaml: bool = False) -> dict[str, Any]:
    """Parse JSON or YAML, and check it by a schema.

    Raises:
        ValueError: with the problem and its field, on one line.
    """
    try:
        value = yaml.safe_load(data) if is_yaml else json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    try:
        schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"{clipped(field)}: {first['msg']}" if field else first["msg"]) from error
    return value


def read_record(schema: type[Record], path: Path, subject: str, fix: str) -> dict[str, Any]:
    """Read a JSON or YAML file, and check it by a schema.

    Args:
        subject: of the message, such as the key of the config.
        fix: the remedy in the error.

    Raises:
        UserError: CHECKPOINT.
    """
    try:
        return parse_record(schema, path.read_bytes(), is_yaml=path.suffix == ".yaml")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError("CHECKPOINT", f"{subject}: {path} cannot be read ({reason})", fix) from error


def check_shard_index(directory: Path, subject: str) -> None:
    """Refuse an index of weight files that names files outside its directory.

    Raises:
        UserError: CHECKPOINT.
    """
    for path in sorted(directory.glob("*.index.json")):
        read_record(ShardIndex, path, subject, "give an intact model; an index names files beside it only")
