"""Draw charts as SVG and PNG, in a child process."""

import base64
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils import UserError

WORKER = Path(__file__).with_name("chart_worker.py")
MAX_SECONDS = 120
SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
# For all charts. Colours of text and lines are left to the style of the page.
COMMON = {"$schema": SCHEMA, "background": None}
STYLE = {"view": {"stroke": None}, "axis": {"labelFontSize": 11, "titleFontWeight": "normal"}}


class Drawing(NamedTuple):
    """A drawn chart.

    Args:
        svg: its text.
        png: None unless asked for.
    """

    svg: str
    png: bytes | None


def draw(specs: Sequence[Mapping[str, Any]], with_png: bool = False) -> list[Drawing]:
    """Draw Vega-Lite specifications.

    Raises:
        UserError: CONFIG, if the converter cannot run.
    """
    if not specs:
        return []
    # -P: modules beside the worker may have names of the standard library.
    command = [sys.executable, "-P", str(WORKER)]
    task = json.dumps({"specs": specs, "png": with_png})
    try:
        done = subprocess.run(command, input=task, capture_output=True, text=True, timeout=MAX_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
        fix = "pip install -r requirements.txt, or make no page (report=null, or without page=)"
        raise UserError("CONFIG", f"page: its charts cannot be drawn ({reason})", fix) from error
    return [
        Drawing(drawing["svg"], base64.b64decode(drawing["png"]) if with_png else None)
        for drawing in json.loads(done.stdout)
    ]
