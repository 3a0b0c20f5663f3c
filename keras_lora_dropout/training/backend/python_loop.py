"""A loop of Python's, for backends that compute in the order of the program."""


def each_in_turn(step, carry, values, first=0):
    """Take steps one after another; what one needs is free before the next.

    Args:
        step: Function of a structure of tensors, an index and the values of
            that index, of shape `(1, ...)`. It returns the next structure and
            what is to be kept of the step.
        carry: The first structure, or `None`.
        values: Tensor of shape `(count, ...)`.
        first: Integer. Index of the first step; all others follow.

    Returns:
        The last structure, and the list of what was to be kept.
    """
    kept = []
    for n in range(first, values.shape[0]):
        carry, result = step(carry, n, values[n : n + 1])
        kept.append(result)
    return carry, kept
