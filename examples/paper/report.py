"""Writes what the runs of a study gave: tables and figures."""

import figures
import numpy as np
from methods import METHODS
from scores import PERCENT
from scores import TITLES
from summaries import NETWORKS
from summaries import is_published
from summaries import summarize
from tasks import TASKS

from keras_lora_dropout.storage.atomic import write_atomically

SHOWN = (
    "exact_match",
    "f1",
    "pearson",
    "spearman",
    "ece",
    "nll",
    "brier",
    "mse",
)


def write(name, plan, store, folder):
    """Write `<name>.md` and `<name>.png`, from the results that there are.

    Args:
        name: Key of `STUDIES`.
        plan: `Plan`.
        store: `Store`.
        folder: Path.

    Returns:
        List of the paths that were written.

    Raises:
        SystemExit: If there is no result at all.
    """
    summaries = summarize(plan, store)
    if not summaries:
        raise SystemExit(
            f"There are no results of {name} in {store.folder} for these "
            "options. Run it without --report, or pass the options of the run."
        )
    figure = folder / f"{name}.png"
    figures.draw(name, summaries, figure)
    missing = sum(cell not in store for cell in plan.cells(store))
    page = folder / f"{name}.md"
    text = _page(name, plan, summaries, store, missing, figure.name)
    write_atomically(page, text.encode())
    return [page, figure]


def _page(name, plan, summaries, store, missing, figure):
    parts = [
        f"# {name.capitalize().replace('-', ' ')}: {plan.study.title}",
        _conditions(plan, summaries),
    ]
    if missing:
        parts.append(f"Not finished: {missing} runs are missing.")
    parts.append(f"![{plan.study.title}]({figure})")
    if len({(s.task, s.split) for s in summaries}) > 1:
        parts += ["## Overview", _overview(summaries)]
    for task in plan.tasks:
        for split in TASKS[task].splits:
            rows = [s for s in summaries if (s.task, s.split) == (task, split)]
            if rows:
                of = "" if split == "validation" else f", {split}"
                parts += [f"## {TASKS[task].title}{of}", _table(task, rows)]
                parts += _searches(plan, store, task, split, rows)
    return "\n\n".join(parts) + "\n"


def _conditions(plan, summaries):
    run = summaries[0].runs[0]
    cell = run["cell"]
    commands = sorted({r["command"] for s in summaries for r in s.runs})
    examples = sorted({s.runs[0]["examples"]["train"] for s in summaries})
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
    lines = [
        f"`{cell['preset']}`, {' or '.join(map(str, examples))} training "
        f"examples, {cell['epochs']} epochs, batches of {cell['batch_size']}, "
        f"{cell['dtype_policy']}; mean and standard deviation over "
        f"{len(plan.seeds)} seeds, each with its own examples, head and masks. "
        f"{versions}; {run['machine']}.",
        "Learning rates: chosen for each method on the first seed, by "
        f"{cell['selection_examples']} other training examples."
        if any(plan.searched(s.task, s.variant.method) for s in summaries)
        else "Learning rates: given, not chosen by results.",
        "Scores are those after the last epoch; accuracy, F1, Matthews, "
        "correlations and ECE (15 bins) in percent, NLL in nats. Weights: "
        "those of the backbone that train, after pruning. Seconds: training "
        "alone, compilation included, the median; CPU seconds: of all cores "
        "together, whatever else ran beside.",
        "\n".join(f"    {command}" for command in commands),
    ]
    return "\n\n".join(lines)


def _overview(summaries):
    """Like Table 1: a row for each method, a column for each task."""
    columns = list(dict.fromkeys((s.task, s.split) for s in summaries))
    lines = {}
    for s in summaries:
        label = _label(s)
        lines.setdefault(label, {})[s.task, s.split] = s
    heads = [
        TASKS[task].title
        + (f" {split.partition('_')[2]}" if "_" in split else "")
        + f", {TITLES[TASKS[task].metric]}"
        for task, split in columns
    ]
    rows = [
        [label, *(_main(of.get(column)) for column in columns)]
        for label, of in lines.items()
    ]
    return markdown(["method", *heads], rows)


def _table(task, summaries):
    metric = TASKS[task].metric
    names = [n for n in SHOWN if n in summaries[0].scores and n != metric]
    heads = [
        "method",
        "weights",
        TITLES[metric],
        *(TITLES[name] for name in names),
        "learning rate",
        "seconds",
        "CPU seconds",
    ]
    rows = [
        [
            _label(s) + _diverged(s),
            f"{s.weights:,}",
            *(_number(name, s.scores[name]) for name in [metric, *names]),
            f"{s.learning_rate:g}",
            *(_median(s, clock) for clock in ("seconds", "cpu_seconds")),
        ]
        for s in summaries
    ]
    return markdown(heads, rows)


def _searches(plan, store, task, split, summaries):
    """What each learning rate gave on the first seed, whichever was chosen."""
    metric = TASKS[task].metric
    rows, rates = {}, []
    for s in summaries:
        cells = plan.searched(task, s.variant.method)
        if not cells or s.network == "test_dropout":
            continue
        rates = [cell.learning_rate for cell in cells]
        row = [f"{METHODS[s.variant.method].label}, {NETWORKS[s.network]}"]
        for cell in cells:
            scores = store.read(cell)["scores"][split][s.network]
            loss = "nll" if "nll" in scores else "mse"
            text = (
                f"{_number(metric, [scores[metric]])}, "
                f"{_number(loss, [scores[loss]])}"
            )
            chosen = cell.learning_rate == s.learning_rate
            row.append(f"**{text}**" if chosen else text)
        # All variants of a method share its search.
        rows[row[0]] = row
    if not rows:
        return []
    heads = ["method", *(f"{rate:g}" for rate in rates)]
    return [
        f"Learning rates, on the first seed: {TITLES[metric]} and "
        f"{TITLES[loss]}; the chosen one is bold.",
        markdown(heads, list(rows.values())),
    ]


def _median(summary, clock):
    return f"{np.median([run[clock] for run in summary.runs]):.0f}"


def _label(summary):
    network = NETWORKS[summary.network]
    alone = summary.network == "mean" and is_published(summary)
    return summary.variant.label + ("" if alone else f", {network}")


def _diverged(summary):
    count = sum(run["diverged"] for run in summary.runs)
    return f" ({count} of {len(summary.runs)} diverged)" if count else ""


def _main(summary):
    if summary is None:
        return "-"
    metric = TASKS[summary.task].metric
    return _number(metric, summary.scores[metric])


def _number(name, values):
    factor, digits = (100, 1) if name in PERCENT else (1, 3)
    return spread(factor * np.array(values), digits)


def spread(values, digits):
    """Mean and standard deviation (of a sample), as they are written."""
    text = f"{np.mean(values):.{digits}f}"
    if len(values) < 2:
        return text
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}"


def markdown(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
