"""Draws charts: JSON on stdin, {"specs": Vega-Lite specifications, "png": bool}; a JSON list on stdout.

Each element is {"svg": text}, with "png" in base64 if asked for. A process of its own: the converter takes some 250 MB,
which go back when it ends.
"""

import base64
import json
import sys

PNG_SCALE = 3.0  # for print


def main() -> None:
    import vl_convert

    task = json.load(sys.stdin)
    drawings = []
    for spec in task["specs"]:
        drawing = {"svg": vl_convert.vegalite_to_svg(spec, vl_version="5.21")}
        if task["png"]:
            paper = spec | {"background": "white"}
            png = vl_convert.vegalite_to_png(paper, vl_version="5.21", scale=PNG_SCALE)
            drawing["png"] = base64.b64encode(png).decode()
        drawings.append(drawing)
    json.dump(drawings, sys.stdout)


if __name__ == "__main__":
    main()
