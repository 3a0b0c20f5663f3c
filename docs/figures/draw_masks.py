"""Draw `masks.svg`: what LoRA Dropout masks, and what is averaged.

    python docs/figures/draw_masks.py

The drawing is plain text without a date, so that it changes only when this
file does.
"""

import argparse
import pathlib

FROZEN, A, B, DELTA = "#9aa5b1", "#3b7dd8", "#e08a2e", "#7656b8"
INK, LINE, ZERO = "#1f2933", "#c3ccd6", "#ffffff"

# 1 keeps, 0 drops; one pair (mask_a, mask_b) for each instance.
INSTANCES = [
    ("11011101", "1101011011"),
    ("10110111", "0111101101"),
    ("01111011", "1011011110"),
    ("11100110", "1110110101"),
]


def cells(x, y, rows, columns, size, colour):
    """A grid; `rows` and `columns` are masks, dropped cells stay white."""
    parts = []
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            kept = row == "1" and column == "1"
            parts.append(
                f'<rect x="{x + j * size}" y="{y + i * size}" width="{size}" '
                f'height="{size}" fill="{colour if kept else ZERO}" '
                f'stroke="{LINE}" stroke-width="0.8"/>'
            )
    return parts


def strip(x, y, mask, size, colour, vertical):
    """A mask as a row or column of 0 and 1."""
    parts = []
    for k, bit in enumerate(mask):
        left, top = (x, y + k * size) if vertical else (x + k * size, y)
        colour_of_bit = colour if bit == "1" else LINE
        parts += text(
            left + size / 2, top + size / 2 + 4.5, bit, 13, colour_of_bit, True
        )
    return parts


def text(x, y, words, size=14, colour=INK, bold=False, anchor="middle"):
    weight = ' font-weight="bold"' if bold else ""
    return [
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" '
        f'text-anchor="{anchor}"{weight}>{words}</text>'
    ]


def words_left(y, words, size=14, bold=False):
    return text(20, y, words, size, INK, bold, "start")


def box(x, y, width, height, words, colour=INK, fill="#f4f6f8"):
    lines = words.split("|")
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" '
        f'fill="{fill}" stroke="{colour}" stroke-width="1.2"/>'
    ]
    top = y + height / 2 + 5 - 9 * (len(lines) - 1)
    for k, line in enumerate(lines):
        parts += text(x + width / 2, top + 18 * k, line)
    return parts


def arrow(x1, y1, x2, y2):
    return [
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" '
        'stroke-width="1.2" marker-end="url(#tip)"/>'
    ]


def layer(top):
    """The upper half: one layer under one mask instance."""
    mask_a, mask_b = INSTANCES[0]
    ranks, size = "111", 16
    grid = top + 52
    middle = grid + 4 * size
    parts = words_left(top, "One layer, one mask instance", 16, True)

    parts += strip(32, grid, mask_a, size, A, True)
    parts += text(46, grid - 10, "mask_a", 14, A, True)
    parts += cells(58, grid, mask_a, ranks, size, A)
    parts += text(92, grid - 10, "A", 15, A, True)
    parts += text(82, grid + 8 * size + 20, "(in, rank)", 13)
    parts += text(124, middle + 5, "@", 16)

    b_top = middle - 1.5 * size
    parts += strip(140, b_top - size - 4, mask_b, size, B, False)
    parts += text(180, b_top - size - 12, "mask_b", 14, B, True)
    parts += cells(140, b_top, ranks, mask_b, size, B)
    parts += text(280, b_top - size - 12, "B", 15, B, True)
    parts += text(220, b_top + 3 * size + 20, "(rank, out)", 13)
    parts += text(322, middle + 5, "=", 18)

    parts += cells(344, grid, mask_a, mask_b, size, DELTA)
    parts += text(424, grid - 10, "masked delta", 14, DELTA, True)
    parts += text(424, grid + 8 * size + 20, "(in, out), never formed", 13)

    small = 8
    row = middle - 4 * small
    parts += text(671, row - 14, "weight in this pass", 14, INK, True)
    parts += cells(544, row, "1" * 8, "1" * 10, small, FROZEN)
    parts += text(584, row + 8 * small + 20, "kernel, frozen", 13)
    parts += text(671, middle + 5, "+ scaling *", 13)
    parts += cells(716, row, mask_a, mask_b, small, DELTA)
    parts += words_left(
        grid + 8 * size + 54,
        "A loses whole rows, B loses whole columns; the rank axis is never "
        "masked. White cells are 0.",
    )
    return parts


def model(top):
    """The lower half: N instances of the whole model."""
    parts = words_left(top, "The whole model, N mask instances", 16, True)
    row = top + 40
    parts += box(20, row + 8, 70, 44, "batch x")
    for below in (84, 144):
        parts += box(132, row + below, 432, 40, "", LINE, ZERO)
    labels = ["1", "2", "3", "N"]
    for k, (number, masks) in enumerate(zip(labels, INSTANCES, strict=True)):
        left = 140 + 112 * k
        centre = left + 40
        parts += cells(left, row, *masks, 8, DELTA)
        if k == 3:
            parts += text(left - 16, row + 36, "…", 18)
        parts += text(centre, row - 8, f"instance {number}", 13)
        parts += arrow(centre, row + 66, centre, row + 86)
        parts += box(left, row + 90, 80, 28, f"output {number}")
        parts += arrow(centre, row + 120, centre, row + 148)
        parts += box(left, row + 150, 80, 28, f"loss {number}")
    parts += arrow(92, row + 30, 134, row + 30)
    parts += arrow(566, row + 104, 596, row + 104)
    parts += box(598, row + 82, 192, 44, "mean output: Eq. 8|ensemble_predict")
    parts += arrow(566, row + 164, 596, row + 164)
    parts += box(598, row + 142, 192, 44, "mean loss: Eq. 7|one optimizer step")
    parts += words_left(
        row + 222,
        "Every adapted layer has masks of its own; all layers change them "
        "together, from instance to instance.",
    )
    return parts


def drawing():
    """The figure as the text of an SVG file."""
    width, height = 810, 566
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="DejaVu Sans, Verdana, Helvetica, Arial, sans-serif">',
        "<title>What LoRA Dropout masks, and what is averaged</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" '
        'markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 Z" fill="{INK}"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *layer(30),
        f'<line x1="20" y1="284" x2="{width - 20}" y2="284" stroke="{LINE}"/>',
        *model(318),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path(__file__).with_name("masks.svg"),
    )
    parser.parse_args().output.write_text(drawing())
