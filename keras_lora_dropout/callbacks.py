"""Callbacks for models with LoRA Dropout."""

import keras


class EnsembleEvaluation(keras.callbacks.Callback):
    """Evaluates the ensemble at the end of each epoch.

    Calls `ensemble_evaluate` and adds its results to the epoch's logs, as
    `ensemble_val_loss`, `ensemble_val_accuracy` and so on, where later
    callbacks (`EarlyStopping(monitor="ensemble_val_loss")`), the progress bar
    and the history find them.

    Args:
        validation_data: Tuple `(x, y)` or `(x, y, sample_weight)`, or a data
            set, as in `fit`.
        num_samples: Positive integer or `None` for the model's own N.
        batch_size: Integer or `None`, as in `evaluate`.
        seed: Integer or `None`. Defaults to 0: each epoch is measured with the
            same masks, so that curves show the model and not the draw.
        average: `"output"` or `"probability"`, as in `ensemble_evaluate`.

    Raises:
        TypeError: When training starts, if the model has no ensemble.

    Example:

    >>> model = enable_lora_dropout(keras.Sequential([
    ...     keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)
    ... ]), rank=1)
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((4, 3)), np.ones((4, 1))
    >>> history = model.fit(
    ...     x, y, callbacks=[EnsembleEvaluation((x, y))], verbose=0
    ... )
    >>> sorted(history.history)
    ['ensemble_val_loss', 'loss']
    """

    def __init__(
        self,
        validation_data,
        num_samples=None,
        *,
        batch_size=None,
        seed=0,
        average="output",
    ):
        super().__init__()
        self.validation_data = validation_data
        self.options = {
            "num_samples": num_samples,
            "batch_size": batch_size,
            "seed": seed,
            "average": average,
        }

    def on_train_begin(self, logs=None):
        if not hasattr(self.model, "ensemble_evaluate"):
            raise TypeError(
                "`EnsembleEvaluation` needs a model with LoRA Dropout. Call "
                "`enable_lora_dropout(model)` or build a `LoRADropoutModel`. "
                f"Received: a model of type {type(self.model).__name__}."
            )

    def on_epoch_end(self, epoch, logs=None):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
            self.validation_data
        )
        results = self.model.ensemble_evaluate(
            x,
            y,
            sample_weight=sample_weight,
            verbose=0,
            return_dict=True,
            **self.options,
        )
        if logs is not None:
            for name, value in results.items():
                logs[f"ensemble_val_{name}"] = value
