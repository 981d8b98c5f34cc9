"""Turn errors of Hydra and OmegaConf into one line for users."""

import re
import sys
from collections.abc import Sequence

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from engine.settings.hydra_launchers import PACKAGES
from engine.settings.keys import all_keys, unknown_key
from engine.settings.messages import bracketed, did_you_mean, nearest
from engine.settings.presets import CONFIG_DIR
from utils import UserError

GROUPS = ["model", "loss", "peft", "wandb", "mlflow", "trackio"]
HELP = "python train.py --help lists every key"


def explain_hydra_error(error: BaseException) -> UserError:
    """The error of a command line or of composing its config, as a UserError."""
    if isinstance(error, UserError):
        return error
    message, _, advice = str(error).partition("\n")
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        return missing_preset(error.missing_cfg_file, error.options)
    if isinstance(error, OverrideParseException):
        fix = "write key=value, and put a value with special characters in two pairs of quotes: exp_name=\"'a=b'\""
        return UserError("CONFIG", f"cannot read {error.override!r} on the command line", fix)
    unknown = re.match(r"Could not (?:override|delete from config\.) '([^']+)'", message)
    if isinstance(error, ConfigCompositionException) and unknown:
        key = unknown[1]
        if (CONFIG_DIR / key).is_dir():
            return UserError("CONFIG", f"{key}: has no default to override", f"add one: +{key}=NAME")
        return unknown_override(key)
    if message.startswith("Config group override must be a string or a list"):
        return wrong_preset()
    if isinstance(error, OmegaConfBaseException) and error.full_key and error.full_key not in message:
        message = f"{error.full_key}: {message}"
    if error.__cause__:
        message = f"{message}: {error.__cause__}"
    return UserError("CONFIG", message or type(error).__name__, advice or HELP)


def missing_preset(file: str, options: Sequence[str]) -> UserError:
    group, _, name = file.rpartition("/")
    if group == "hydra/launcher" and name in PACKAGES:
        fix = f"pip install {PACKAGES[name]}==1.2.0, or leave the launcher out"
        return UserError("CONFIG", f"{group}={name}: the package {PACKAGES[name]} is not installed", fix)
    guess = bracketed(did_you_mean(nearest(name, options)))
    return UserError("CONFIG", f"{group}={name}: no such preset{guess}", f"choose one of {', '.join(options)}")


def unknown_override(key: str) -> UserError:
    group = key.partition(".")[0]
    is_swept = any(argument.startswith(f"{group}=") and "," in argument for argument in sys.argv[1:])
    fix = f"in a sweep over {group}, write ++{key}=..." if is_swept else HELP
    return UserError("CONFIG", f"{key}: {unknown_key(key, [*all_keys(), *GROUPS])}", fix)


def wrong_preset() -> UserError:
    groups = {"", "hydra", *(path.name for path in CONFIG_DIR.iterdir() if path.is_dir())}
    overrides = [override for override in sys.argv[1:] if override.partition("=")[0].lstrip("+") in groups]
    listed = ", ".join(overrides) or "a group"
    return UserError("CONFIG", f"{listed}: a preset must be a string or a list, such as loss=dpo", HELP)
