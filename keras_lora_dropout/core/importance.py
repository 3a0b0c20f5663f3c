"""AdaLoRA's arithmetic: importance of triplets, ranks kept, orthogonality.

Pure functions of tensors. A layer's triplets are the rows of one matrix
`(rank, input_dim + 1 + output_dim)`: row i holds column i of `lora_kernel_a`,
entry i of `lora_lambda` and row i of `lora_kernel_b`. All functions take one
layer or, with a further leading axis, a stack of layers of equal shapes: a
model has dozens of layers, but few shapes.

[A] is Zhang et al. 2023, arXiv 2303.10512.
"""

from keras import ops


def triplets(lora_kernel_a, lora_lambda, lora_kernel_b):
    """Lay three factors, or their gradients, out as one row per triplet.

    Args:
        lora_kernel_a: Tensor `(..., input_dim, rank)`.
        lora_lambda: Tensor `(..., rank)`.
        lora_kernel_b: Tensor `(..., rank, output_dim)`.

    Returns:
        Tensor `(..., rank, input_dim + 1 + output_dim)`.
    """
    return ops.concatenate(
        [
            _transpose(lora_kernel_a),
            ops.expand_dims(lora_lambda, -1),
            lora_kernel_b,
        ],
        axis=-1,
    )


def sensitivity(parameters, gradients):
    """`I = |w * dL/dw|` of every weight, [A] Eq. 8."""
    return ops.abs(parameters * gradients)


def updated_scores(
    smoothed_sensitivity, uncertainty, parameters, gradients, beta_1, beta_2
):
    """Smooth the sensitivity and how far it strays, [A] Eq. 9 and 10.

    Args:
        smoothed_sensitivity: Tensor, zeros before the first step.
        uncertainty: Tensor of the same shape, zeros before the first step.
        parameters: Tensor of the same shape.
        gradients: Tensor of the same shape.
        beta_1: Float in `(0, 1)`, for the sensitivity.
        beta_2: Float in `(0, 1)`, for the uncertainty.

    Returns:
        Tuple of the new smoothed sensitivity and uncertainty.
    """
    current = sensitivity(parameters, gradients)
    smoothed = beta_1 * smoothed_sensitivity + (1 - beta_1) * current
    deviation = ops.abs(current - smoothed)
    return smoothed, beta_2 * uncertainty + (1 - beta_2) * deviation


def importance(smoothed_sensitivity, uncertainty, input_dim):
    """`S` of every triplet, [A] Eq. 7 and 11.

    The score of a weight is its smoothed sensitivity times the uncertainty of
    it; that of a triplet adds the score of its singular value and the mean
    scores of its two vectors.

    Args:
        smoothed_sensitivity: Tensor `(..., rank, input_dim + 1 + output_dim)`.
        uncertainty: Tensor of the same shape.
        input_dim: Integer. Input features of the layer.

    Returns:
        Tensor `(..., rank)`.
    """
    scores = smoothed_sensitivity * uncertainty
    return (
        scores[..., input_dim]
        + ops.mean(scores[..., :input_dim], axis=-1)
        + ops.mean(scores[..., input_dim + 1 :], axis=-1)
    )


def current_budget(step, removal_steps):
    """`b(t)`, [A] Eq. 12: how many triplets to keep after a step.

    Args:
        step: Integer scalar tensor.
        removal_steps: Integer tensor, `RankSchedule.removal_steps`.

    Returns:
        Integer scalar tensor.
    """
    return ops.sum(ops.cast(step < removal_steps, "int32"))


def rank_mask(scores, budget):
    """Keep the triplets of highest importance, [A] Eq. 6.

    Exactly `budget` triplets are kept: of equal scores, the first. A score
    that is no number counts as the least.

    Args:
        scores: Tensor `(triplets,)`, the importance over all layers.
        budget: Integer scalar tensor.

    Returns:
        Tensor `(triplets,)`, 1.0 for what is kept and 0.0 for the rest.
    """
    scores = ops.nan_to_num(scores, nan=-1.0)  # Backends sort NaN differently.
    order = ops.argsort(-scores)  # Stable on all backends.
    return ops.cast(ops.argsort(order) < budget, "float32")


def orthogonal_penalty(pairs, form):
    """How far P and Q of all layers are from orthogonal, [A] Eq. 4.

    Args:
        pairs: List of `(lora_kernel_a, lora_kernel_b)`, one for each layer or
            stack of layers.
        form: `"squared_norms"`: sum of `||P.T P - I||**2 + ||Q Q.T - I||**2`.
            `"mean_norm"`: mean of all these norms, not squared.

    Returns:
        Scalar tensor.
    """
    squares = []
    for a, b in pairs:
        squares.append(_squared_distance(ops.matmul(_transpose(a), a)))
        squares.append(_squared_distance(ops.matmul(b, _transpose(b))))
    squares = ops.concatenate(squares)
    if form == "squared_norms":
        return ops.sum(squares)
    # The root has no gradient at zero.
    return ops.mean(ops.sqrt(ops.maximum(squares, 1e-20)))


def _squared_distance(grams):
    """Squared Frobenius norms of `grams - I`, one for each matrix."""
    identity = ops.eye(grams.shape[-1], dtype=grams.dtype)
    squares = ops.sum(ops.square(grams - identity), axis=(-2, -1))
    return ops.reshape(squares, (-1,))


def _transpose(matrices):
    return ops.swapaxes(matrices, -1, -2)
