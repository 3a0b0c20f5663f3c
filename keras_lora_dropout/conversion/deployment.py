"""`as_ensemble`: the ensemble as one Keras model, to serve or export."""

import dataclasses

import keras

from keras_lora_dropout.core.keras_internals import list_parameters
from keras_lora_dropout.core.turns import in_turn
from keras_lora_dropout.inference.fixed_ensemble import FixedEnsemble


class Deployment:
    """Mixin of `AdaptedModel`: models to deploy, made from an adapted one."""

    @in_turn
    def as_ensemble(self, num_samples=None, seed=None, *, average="output"):
        """Make a Keras model that averages N fixed mask instances.

        Its outputs are those of `ensemble_predict` with the same arguments,
        before a task decodes them, as detectors do.
        The masks are drawn now and become constants of the new model: it has
        no random state, and `export` writes it as one graph. Its other weights
        are those of this model, not copies; training this model further
        changes the ensemble's outputs, too.

        The model takes what this model takes after preprocessing. With a
        KerasHub task, apply `model.preprocessor` to raw text or images first;
        it is not part of the graph.

        The N instances run one after another, in the memory of one.

        Args:
            num_samples: Positive integer or `None` for the model's own N.
            seed: Integer or `None`. The same seed gives the same instances,
                here and in `ensemble_predict`; `None` draws new ones.
            average: `"output"` or `"probability"`, as in `ensemble_predict`.

        Returns:
            A functional `keras.Model`, not compiled.

        Raises:
            ValueError: If an argument is out of range, or the model's inputs
                are not known because it was never called.
        """
        request = self._ensemble_request(num_samples, average)
        request = dataclasses.replace(request, as_outputs=False)
        draws = self._instances(num_samples, seed)
        inputs = _inputs_like(self)
        name = f"{self.name}_ensemble"
        layer = FixedEnsemble(self, draws, request, name=name)
        ensemble = keras.Model(inputs, layer(inputs), name=name)
        ensemble(inputs)  # Keras exports no model that was never called.
        return ensemble

    @in_turn
    def export(self, *args, **kwargs):
        """As `keras.Model.export`; the mean network is what is written."""
        if self.built and getattr(self, "inputs", None):
            # Keras exports no model that was never called, and on JAX does
            # not count `fit` and `predict`.
            self(_inputs_like(self))
        list_parameters(self)
        return super().export(*args, **kwargs)


def _inputs_like(model):
    """Return new symbolic inputs, in the structure of a model's own."""
    if isinstance(model, keras.Sequential):
        return _input_like(model.inputs[0])
    if getattr(model, "inputs", None):
        return keras.tree.map_structure(_input_like, model.input)
    shapes = model.get_build_config() or {}
    if "input_shape" not in shapes:
        raise ValueError(
            f'What the inputs of model "{model.name}" look like is not known. '
            "It must have been called on a batch of data; its `call` must have "
            "one argument for them, which may be a list or a dictionary."
        )
    return _inputs_of_shape(shapes["input_shape"], model.input_dtype)


def _input_like(tensor):
    return keras.Input(
        batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name
    )


def _inputs_of_shape(shape, dtype):
    """Make inputs of a structure of shapes; of any batch size."""
    if isinstance(shape, dict):
        return {
            key: _inputs_of_shape(value, dtype) for key, value in shape.items()
        }
    if any(isinstance(entry, list | tuple | dict) for entry in shape):
        return [_inputs_of_shape(entry, dtype) for entry in shape]
    return keras.Input(shape[1:], dtype=dtype)
