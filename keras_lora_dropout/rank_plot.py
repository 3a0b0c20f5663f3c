"""The heat map of `plot_rank_history`: its numbers, its rows, its drawing."""

import collections
import collections.abc

import numpy as np

from keras_lora_dropout.conversion.model import AdaptedModel

_PRUNED = "0.88"  # Grey: a layer without ranks.
_LINE = "0.6"
_LARGEST, _SMALLEST = 9, 5  # Font sizes of the rows, in points.
_GAP = 6  # Points between the axes, names and brackets.
_BAR_HEIGHT = 200  # At most, in points.


def recorded_ranks(history):
    """Check a rank history and return it as arrays.

    Args:
        history: What `plot_rank_history` takes.

    Returns:
        Tuple of the steps `(records,)`, the layer paths, and the kept ranks
        `(layers, records)`.
    """
    if isinstance(history, AdaptedModel):
        history = history.rank_history()
    if not _is_history(history):
        raise TypeError(
            "`history` must be a model with a `rank_budget`, or what its "
            '`rank_history()` returned: {"step": steps, "ranks": {layer path: '
            f"ranks}}}}. Received: {_described(history)}."
        )
    steps, ranks = history["step"], history["ranks"]
    if not len(steps) or not ranks:
        raise ValueError(
            "No ranks are recorded yet. Received: a history of "
            f"{len(ranks)} layers and {len(steps)} steps. Train the model with "
            "`fit` first."
        )
    for path, values in ranks.items():
        if len(values) != len(steps):
            raise ValueError(
                "A rank history needs one entry per step for each layer. "
                f'Received: {len(steps)} steps, and {len(values)} entries of "'
                f'{path}". Pass what one call of `rank_history` returned.'
            )
    steps = _counts("step", steps)
    if (np.diff(steps, prepend=0) <= 0).any():
        raise ValueError(
            "The steps of a rank history must be positive and grow. Received: "
            f"step={steps.tolist()}. Pass the history of one run."
        )
    kept = [_counts(f'ranks["{path}"]', ranks[path]) for path in ranks]
    return steps, [str(path) for path in ranks], np.stack(kept)


def _is_history(value):
    def is_row(entry):
        return isinstance(entry, (list, tuple, np.ndarray))

    mapping = collections.abc.Mapping
    return (
        isinstance(value, mapping)
        and is_row(value.get("step"))
        and isinstance(value.get("ranks"), mapping)
        and all(map(is_row, value["ranks"].values()))
    )


def _described(value):
    kind = f"an object of type {type(value).__name__}"
    if isinstance(value, collections.abc.Mapping):
        return f"{kind} with the keys {list(value)}"
    return kind


def _counts(name, values):
    """Return whole numbers, 0 or more, as an integer array."""
    array = np.asarray(values)
    is_number = array.ndim == 1 and array.dtype.kind in "iuf"
    if not is_number or (array < 0).any() or (array != np.floor(array)).any():
        raise ValueError(
            f"`{name}` of a rank history must hold whole numbers, 0 or more. "
            f"Received: {values!r}."
        )
    return array.astype("int64")


def row_names(paths):
    """Short names for layers, which tell them apart.

    What all paths have in common at either end is dropped. What is left is
    divided into a group, such as `layer_0`, and a name within the group, such
    as `query`. A layer that is alone in its group has no group.

    Args:
        paths: List of strings, layer paths.

    Returns:
        List of `(group, name)`; the group is `None` for layers without one.
    """
    parts = [path.split("/") for path in paths]
    start = _shared(parts)
    stop = _shared([row[start:][::-1] for row in parts])
    parts = [row[start : len(row) - stop] for row in parts]

    groups = ["/".join(row[: _group_length(row)]) for row in parts]
    members = collections.defaultdict(list)
    for group, row in zip(groups, parts, strict=True):
        members[group].append(row)
    groups = [
        group if group and len(members[group]) > 1 else None for group in groups
    ]
    shortened = _shortened([group for group in groups if group])
    return [
        (shortened[group], _ending(row, members[group]))
        if group
        else (None, "/".join(row))
        for group, row in zip(groups, parts, strict=True)
    ]


def _shared(rows):
    """How many leading entries all rows have in common, but for the last."""
    longest = min(map(len, rows)) - 1
    same = [len(set(column)) == 1 for column in zip(*rows, strict=False)]
    return [*same[:longest], False].index(False)


def _group_length(row):
    """How many parts of a path name its block: up to the last number.

    A path without numbers is in the block of its first part.
    """
    ends = [i + 1 for i, part in enumerate(row[:-1]) if part[-1:].isdigit()]
    return ends[-1] if ends else min(1, len(row) - 1)


def _ending(row, others):
    """The fewest last parts of a path that no other path ends in."""
    for length in range(1, len(row)):
        ends = [other[-length:] for other in others]
        if ends.count(row[-length:]) == 1:
            return "/".join(row[-length:])
    return "/".join(row)


def _shortened(groups):
    """Drop the words that all groups start with, but for the last two."""
    words = {group: group.split("_") for group in groups}
    start = 0
    if len(words) > 1:
        shared = _shared(list(words.values()))
        start = max(0, min(shared, min(map(len, words.values())) - 2))
    return {group: "_".join(split[start:]) for group, split in words.items()}


def figure_size(layers):
    """Width and height of a new figure, in inches."""
    return 7.5, float(np.clip(1 + 0.2 * layers, 1.8, 10))


def draw_ranks(ax, steps, paths, kept):
    """Draw the kept ranks `(layers, records)` as a heat map."""
    edges = _edges(steps)
    colormap, norm = _colors(kept.max())
    mesh = ax.pcolormesh(
        edges, np.arange(len(paths) + 1) - 0.5, kept, cmap=colormap, norm=norm
    )
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set(
        xlabel="optimizer step",
        xlim=(edges[0], edges[-1]),
        ylim=(len(paths) - 0.5, -0.5),
    )
    ax.xaxis.get_major_locator().set_params(integer=True)
    _name_rows(ax, row_names(paths), kept[:, -1])
    bar = ax.figure.colorbar(
        mesh,
        ax=ax,
        label="kept ranks",
        ticks=_ticks(kept.max(), min(_BAR_HEIGHT, _height(ax))),
        shrink=min(1, _BAR_HEIGHT / _height(ax)),
        aspect=15,
        pad=0.07,
        anchor=(0, 1),
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(which="both", length=0)


def _edges(steps):
    """Where the columns begin and end: each one ends with its own step.

    The first column is as wide as the second, but begins at 0 if it is alone
    or would reach beyond.
    """
    width = steps[1] - steps[0] if len(steps) > 1 else steps[0]
    return np.concatenate([[max(0, steps[0] - width)], steps])


def _colors(most):
    """One colour per rank, the darker the more; 0 is grey."""
    import matplotlib as mpl

    shades = mpl.colormaps["viridis_r"](np.linspace(0, 1, max(most, 2)))
    colormap = mpl.colors.ListedColormap([_PRUNED, *shades[-most:]])
    bounds = np.arange(most + 2) - 0.5
    return colormap, mpl.colors.BoundaryNorm(bounds, most + 1)


def _ticks(most, height):
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(
        nbins=max(1, min(12, height // 14)),
        steps=[1, 2, 4, 5, 8, 10],
        integer=True,
    )
    ticks = locator.tick_values(0, max(most, 1))
    return [int(tick) for tick in ticks if tick <= most]


def _name_rows(ax, names, last):
    """Write names at the left, as many as fit, and the last ranks at right."""
    row_height = _height(ax) / len(names)  # In points.
    spans = _spans([group for group, _ in names])
    size = min(_LARGEST, 0.8 * row_height)
    if size < _SMALLEST:
        edges = [row for group, *ends in spans if group for row in ends]
        _separate(ax, edges, min(1, row_height / 4))
        _name_spans(ax, names, spans, row_height)
        return
    _separate(ax, range(len(names)), 0.6)
    _separate(ax, [start for _, start, _ in spans], 2)
    ax.set_yticks(range(len(names)), [name for _, name in names], fontsize=size)
    ax.tick_params(axis="y", length=0, pad=_GAP)
    for row, rank in enumerate(last):
        _write(ax, str(rank), (1, row), _GAP, ha="left", fontsize=size)
    width = _GAP + max(map(_width, ax.get_yticklabels()))
    for group, start, stop in spans:
        if group is not None:
            _draw_bracket(ax, start, stop, -width - _GAP)
            centre = (0, (start + stop - 1) / 2)
            _write(
                ax, group, centre, -width - 2 * _GAP, ha="right", fontsize=size
            )


def _name_spans(ax, names, spans, row_height):
    """Name groups, or single layers, that are not too near to the last one."""
    ticks, labels = [], []
    for group, start, stop in spans:
        centre = (start + stop - 1) / 2
        if not ticks or (centre - ticks[-1]) * row_height > 1.3 * _SMALLEST:
            ticks.append(centre)
            labels.append(names[start][1] if group is None else group)
    distance = min(np.diff(ticks), default=len(names)) * row_height
    ax.set_yticks(ticks, labels, fontsize=min(_LARGEST, 0.75 * distance))
    ax.tick_params(axis="y", length=0, pad=_GAP)


def _spans(groups):
    """List of `(group, start, stop)` of neighbouring rows of one group."""
    spans = []
    for row, group in enumerate(groups):
        if group is not None and spans and spans[-1][0] == group:
            spans[-1] = group, spans[-1][1], row + 1
        else:
            spans.append((group, row, row + 1))
    return spans


def _separate(ax, rows, width):
    """Draw white lines above rows."""
    lines = np.array([row for row in rows if row]) - 0.5
    ax.hlines(lines, *ax.get_xlim(), color="white", lw=width)


def _draw_bracket(ax, start, stop, offset):
    from matplotlib import lines
    from matplotlib import transforms

    transform = transforms.offset_copy(
        ax.get_yaxis_transform(), ax.figure, x=offset, units="points"
    )
    ends = [start - 0.3, stop - 0.7]
    ax.add_artist(
        lines.Line2D(
            [0, 0], ends, color=_LINE, lw=1, transform=transform, clip_on=False
        )
    )


def _write(ax, text, position, offset, **style):
    """Write text beside the axes, some points off its left or right edge."""
    ax.annotate(
        text,
        position,
        (offset, 0),
        xycoords=ax.get_yaxis_transform(),
        textcoords="offset points",
        va="center_baseline",
        **style,
    )


def _width(text):
    """Width of a drawn text, in points; fonts differ from file to file."""
    return 1.03 * text.get_window_extent().width * 72 / text.figure.dpi


def _height(ax):
    """Height of the axes, in points."""
    return ax.get_window_extent().height * 72 / ax.figure.dpi
