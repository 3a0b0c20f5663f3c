"""What the files of `speed.py` say, as Markdown."""

from comparisons import BACKEND_NAMES
from comparisons import comparisons
from comparisons import quartiles
from comparisons import ratio

MODEL_NAMES = {"deberta": "DeBERTaV3", "bert": "BERT", "llama": "Llama"}
DEVICE_NAMES = {"cpu": "CPU", "cuda": "CUDA"}
TIMES = {
    "train": "training step",
    "predict": "`predict`",
    "four_predicts": "four `predict`",
    "ensemble_predict": "`ensemble_predict`",
}
PEAKS = ["train", "predict", "ensemble_predict"]
NOTHING = "-"


def title(content):
    model = MODEL_NAMES[content["model"]]
    where = DEVICE_NAMES[content["device"]]
    if content.get("keeps_memory"):
        where += ", memory kept"
    return f"{model}, {content['scale']}, {where}"


def conditions(content):
    """A sentence on how a file came about."""
    devices = {device["name"] for device in content["devices"].values()} - {
        "cpu"
    }
    versions = {}
    for known in content["versions"].values():
        versions |= known
    return (
        f"{content['batch']} x {content['length']} tokens, rank "
        f"{content['rank']}, {content['dtype']}, {content['threads']} threads; "
        f"{', '.join(sorted(devices)) or content['processor']}; "
        f"{content['date']}, commit {content['commit']}; "
        f"{', '.join(f'{name} {v}' for name, v in sorted(versions.items()))}."
    )


def ratio_table(contents):
    """Quotients with quartiles: a row for each question, a column per file.

    Nothing if no file has both times of any quotient.
    """
    columns = [title(content) for content in contents]
    rows = []
    for backend in ("jax", "torch"):
        for comparison in comparisons(backend):
            cells = [ratio(content, comparison) for content in contents]
            if any(cells):
                rows.append([comparison.label, *map(_ratio_cell, cells)])
    return _table(["time / time", *columns], rows) if rows else ""


def _ratio_cell(ratio):
    if not ratio:
        return NOTHING
    low, median, high = ratio
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def time_table(content):
    """Median milliseconds with quartiles, and peaks of memory."""
    header = ["contender", "backend"]
    header += [f"{name}, ms" for name in TIMES.values()]
    header += [f"peak in {TIMES[action]}, MiB" for action in PEAKS]
    rows = []
    for about in content["contenders"]:
        found = rows_of(content, about)
        row = [about["label"], BACKEND_NAMES[about["backend"]]]
        row += [_time_cell(found.get(action)) for action in TIMES]
        row += [_memory_cell(found.get(action)) for action in PEAKS]
        rows.append(row)
    return _table(header, rows)


def rows_of(content, about):
    """The results of one contender, by action."""
    wanted = about["backend"], about["contender"]
    return {
        row["action"]: row
        for row in content["results"]
        if (row["backend"], row["contender"]) == wanted
    }


def _time_cell(row):
    if row is None:
        return NOTHING
    if not row["ms"]:
        return "failed" if row["failed"] else "not yet"
    low, median, high = quartiles(row["ms"])
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def _memory_cell(row):
    if row is None or row["memory"] is None:
        return NOTHING
    return f"{row['memory']['excess'] / 2**20:,.0f}"


def failures(content):
    """A list of the contenders that failed; nothing if none did."""
    items = []
    for about in content["contenders"]:
        reasons = {}
        for action, row in rows_of(content, about).items():
            if row["failed"]:
                reasons.setdefault(row["failed"], []).append(TIMES[action])
        for reason, actions in reasons.items():
            where = f"{about['label']}, {BACKEND_NAMES[about['backend']]}"
            items.append(f"- {where}: no {', '.join(actions)}: {reason}")
    return "\n".join(items)


def _table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
