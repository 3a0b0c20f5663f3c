"""Losses that are means over rows, so that N instances need one computation."""

import keras

_ROW_LOSSES = (
    keras.losses.BinaryCrossentropy,
    keras.losses.BinaryFocalCrossentropy,
    keras.losses.CategoricalCrossentropy,
    keras.losses.CategoricalFocalCrossentropy,
    keras.losses.CategoricalHinge,
    keras.losses.Hinge,
    keras.losses.Huber,
    keras.losses.KLDivergence,
    keras.losses.LogCosh,
    keras.losses.MeanAbsoluteError,
    keras.losses.MeanAbsolutePercentageError,
    keras.losses.MeanSquaredError,
    keras.losses.MeanSquaredLogarithmicError,
    keras.losses.Poisson,
    keras.losses.SparseCategoricalCrossentropy,
    keras.losses.SquaredHinge,
)
_FUNCTIONS = {
    keras.losses.get(name)
    for name in (
        "binary_crossentropy",
        "categorical_crossentropy",
        "mae",
        "mse",
        "sparse_categorical_crossentropy",
    )
}
_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


def is_mean_over_rows(model):
    """Whether a model's loss on N blocks of rows is the mean of their losses.

    So it is for Keras's own losses of single rows, averaged; another loss may
    compare the rows of a batch, or add them up.
    """
    if type(model).compute_loss is not keras.Model.compute_loss:
        return False
    losses = keras.tree.flatten(model.loss)
    return bool(losses) and all(map(_is_mean_of_row_losses, losses))


def _is_mean_of_row_losses(loss):
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    if not isinstance(loss, keras.losses.Loss):
        return callable(loss) and loss in _FUNCTIONS
    if type(loss) not in _ROW_LOSSES or loss.reduction not in _MEANS:
        return False
    return loss.get_config().get("axis", -1) == -1
