"""Reads from a compiled program what its devices send to each other."""

import math
import re

_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|"
    r"reduce-scatter|collective-broadcast|ragged-all-to-all)(-start)?\("
)
_SHAPE = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")


def collectives(text):
    """List what each collective operation of a program gives to a device.

    Args:
        text: The program, as `compiled.as_text()` prints it. The body of a
            loop counts once.

    Returns:
        List of `(kind, bytes)`, such as `("all-reduce", 4)`.
    """
    found = []
    for shapes, kind, is_start in _COLLECTIVE.findall(text):
        sizes = [_bytes(*shape) for shape in _SHAPE.findall(shapes)]
        # What starts to gather or permute lists operand and result.
        is_pair = is_start and kind in ("all-gather", "collective-permute")
        found.append((kind, max(sizes) if is_pair else sum(sizes)))
    return found


def _bytes(dtype, dimensions):
    bits = int(re.sub(r"\D", "", dtype) or 8)
    return math.prod(map(int, filter(None, dimensions.split(",")))) * bits // 8
