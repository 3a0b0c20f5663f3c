"""Turn the files of `speed.py` into a page of tables, and a plot of each.

The published page is written by

    python examples/benchmarks/speed_report.py --output docs/benchmarks
"""

import argparse
import json
import pathlib
import shutil

from speed_plot import draw
from tables import conditions
from tables import failures
from tables import ratio_table
from tables import time_table
from tables import title

PAGE = "speed.md"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--input", default="demo-output/benchmarks", help="where the files are"
    )
    parser.add_argument(
        "--output", help="where all of it goes; without it, the same folder"
    )
    options = parser.parse_args()
    source = pathlib.Path(options.input)
    target = pathlib.Path(options.output or source)
    paths = sorted(source.glob("speed_*.json"))
    if not paths:
        parser.error(f"no speed_*.json in {source}; run speed.py first")
    contents = {path.stem: json.loads(path.read_text()) for path in paths}
    target.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if target != source:
            shutil.copy(path, target)
        draw(contents[path.stem], target / f"{path.stem}.png")
    (target / PAGE).write_text(page(contents))
    print(f"Written: {target / PAGE} and {len(contents)} plots")


def page(contents):
    """The page: all quotients, then each file."""
    parts = [
        "# Speed and memory",
        "Written by `examples/benchmarks/speed_report.py`; "
        "[what it means](../benchmarks.md).",
        "## Ratios",
        ratio_table(list(contents.values())),
    ]
    for name, content in contents.items():
        parts += [f"## {title(content)}", conditions(content)]
        if not content["finished"]:
            parts.append("The run was interrupted.")
        parts += [f"![Times and memory]({name}.png)", time_table(content)]
        parts.append(failures(content))
        parts.append(f"All samples: [{name}.json]({name}.json).")
    return "\n\n".join(filter(None, parts)) + "\n"


if __name__ == "__main__":
    main()
