"""Draws charts: a list of Vega-Lite specifications as JSON on stdin, a list of SVG texts as JSON on stdout.

A process of its own: the converter takes some 250 MB, which go back when it ends.
"""

import json
import sys


def main() -> None:
    import vl_convert

    charts = [vl_convert.vegalite_to_svg(spec, vl_version="5.21") for spec in json.load(sys.stdin)]
    json.dump(charts, sys.stdout)


if __name__ == "__main__":
    main()
