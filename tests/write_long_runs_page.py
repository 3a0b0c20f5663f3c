"""Writes the tables of `docs/long_runs.md` from what the tests found.

    ALL_MODELS=1 KERAS_BACKEND=torch pytest --junitxml=torch.xml
    ALL_MODELS=1 KERAS_BACKEND=jax pytest --junitxml=jax.xml
    python tests/write_long_runs_page.py --torch torch.xml --jax jax.xml

Several files of a backend count as one. A test that failed stops it: the page
shows nothing that was not green.
"""

import argparse
import json
import pathlib
import sys
import xml.etree.ElementTree

from pages import markdown
from pages import replace_part

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "long_runs.md"
KINDS = {"array": "array", "dataset": "data set", "generator": "generator"}
COUNTS = {
    "kills": "kills of one run, at random moments",
    "interrupts": "interrupts of one process, at random moments",
    "fuzzed cases": "calls and files with odd values",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for backend in ("torch", "jax"):
        parser.add_argument(
            f"--{backend}", required=True, nargs="+", help="JUnit files"
        )
    options = parser.parse_args()
    found = {
        "PyTorch": properties(options.torch),
        "JAX": properties(options.jax),
    }
    replace_part(PAGE, "training", training_table(found))
    replace_part(PAGE, "ensembles", ensembles_table(found))
    replace_part(PAGE, "counts", counts_table(found))
    print(f"Written: {PAGE}")


def properties(paths):
    """Return what tests recorded, by name, if all of them passed."""
    found = {}
    for path in paths:
        root = xml.etree.ElementTree.parse(path).getroot()
        for suite in root.iter("testsuite"):
            if int(suite.get("failures")) + int(suite.get("errors")):
                sys.exit(f"{path} has tests that failed.")
        for entry in root.iter("property"):
            found[entry.get("name")] = entry.get("value")
    return found


def training_table(found):
    runs = [json.loads(each["training"]) for each in found.values()]
    (warm, last), *_ = runs
    rows = [
        [
            f"resident memory after {of_all[0]['step']:,} steps, MiB",
            *(f"{record['mib']:.2f}" for record in of_all),
        ]
        for of_all in zip(*runs, strict=True)
    ]
    steps = f"by {warm['step']:,} and {last['step']:,} steps"
    for key, title in (
        ("tensors", f"tensors in memory {steps}"),
        ("compiled", f"functions compiled {steps}"),
    ):
        cells = [f"{first[key]:,}, {then[key]:,}" for first, then in runs]
        rows.append([title, *cells])
    return markdown(["", *found], rows)


def ensembles_table(found):
    heads, columns = ["rows", "result"], []
    for backend, each in found.items():
        for kind, title in KINDS.items():
            heads.append(f"{backend}, {title}")
            columns.append(json.loads(each[f"ensemble of {kind}"]))
    rows = [
        [
            f"{records[0]['rows']:,}",
            f"{records[0]['result_mib']:.1f}",
            *(f"{record['above_mib']:.1f}" for record in records),
        ]
        for records in zip(*columns, strict=True)
    ]
    return markdown(heads, rows)


def counts_table(found):
    rows = [
        [title, *(f"{int(each[name]):,}" for each in found.values())]
        for name, title in COUNTS.items()
    ]
    return markdown(["", *found], rows)


if __name__ == "__main__":
    main()
