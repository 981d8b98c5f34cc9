"""Check that the packages of the loggers are installed."""

from importlib.util import find_spec

from engine.settings.schema import Settings
from utils import UserError

PACKAGES = {"mlflow": "mlflow==3.17.2", "trackio": "trackio==0.43.0"}  # not in requirements.txt; tested with these


def check_loggers(settings: Settings) -> None:
    """Check the packages of the enabled loggers.

    Raises:
        UserError: CONFIG if one is not installed.
    """
    for name, package in PACKAGES.items():
        if getattr(settings, name).enabled and not settings.debug and find_spec(name) is None:
            problem = f"{name}.enabled=true needs the package {name}"
            raise UserError("CONFIG", problem, f"pip install {package}, or set {name}.enabled=false")
