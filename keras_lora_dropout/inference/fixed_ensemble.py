"""An ensemble whose mask instances are part of the model, for deployment."""

import keras
from keras import ops

from keras_lora_dropout.core import masks
from keras_lora_dropout.inference.ensemble import EnsembleRequest
from keras_lora_dropout.inference.ensemble import combine
from keras_lora_dropout.inference.ensemble import runner


@keras.saving.register_keras_serializable("keras_lora_dropout")
class FixedEnsemble(keras.layers.Layer):
    """Runs an adapted model under N fixed mask instances and averages.

    Computes [L] Eq. 8, `mean_n model(x; mask_n)`, with masks that were drawn
    when the layer was made. The instances run one after another: in this form
    a pass is N times the model's own and nothing else, whatever the exporter
    makes of shapes that it does not know, in the memory of one instance. All
    of them read the model's own weights.

    Args:
        model: The adapted model.
        draws: The `Draws` of the N instances.
        request: The `EnsembleRequest` that says how to average.

    Call arguments:
        inputs: What the model takes, after its preprocessing.
    """

    def __init__(self, model, draws, request, **kwargs):
        # The model converts its inputs itself.
        super().__init__(dtype=model.dtype_policy, autocast=False, **kwargs)
        self.model = model
        self._plan = model.mask_plan
        self._request = request
        # Draws in the compute dtype would be rounded, and make other masks.
        self.mask_draws = self.add_weight(
            name="mask_draws",
            shape=tuple(draws.values.shape),
            initializer="zeros",
            dtype="float32",
            trainable=False,
            autocast=False,
        )
        self.mask_draws.assign(draws.values)
        self.built = True

    def get_config(self):
        model = keras.saving.serialize_keras_object(self.model)
        model.pop("compile_config", None)
        return {
            "name": self.name,
            "model": model,
            "num_samples": self._request.num_samples,
            "links": self._request.links,
        }

    @classmethod
    def from_config(cls, config):
        model = keras.saving.deserialize_keras_object(config["model"])
        links = config["links"]
        count = config["num_samples"]
        # The draws are weights, which come later.
        draws = masks.Draws(
            model.mask_plan, ops.zeros((count, model.mask_plan.width))
        )
        request = EnsembleRequest(count, links=links and tuple(links))
        return cls(model, draws, request, name=config["name"])

    def call(self, inputs):
        if getattr(self.model, "lora_dropout", None) is None:
            raise ValueError(
                f'Model "{self.model.name}" has lost its adapters since '
                "`as_ensemble` was called, so there are no instances to "
                "average. Call `unmerge_adapters`, or make the ensemble of a "
                "copy: `copy.deepcopy(model).as_ensemble()`."
            )
        values = ops.convert_to_tensor(self.mask_draws)
        run = runner(
            self._plan, lambda: self.model(inputs, training=False), values
        )
        return combine(run, values, self._request)

    def compute_output_spec(self, inputs):
        # The graph of a functional model knows; tracing KerasHub's layers with
        # a sequence length that is not known would fail.
        outputs = self.model.compute_output_spec(inputs)
        return keras.tree.map_structure(self._averaged_spec, outputs)

    def _averaged_spec(self, output):
        dtype = output.dtype
        if self._request.links is not None or "float" not in dtype:
            dtype = keras.backend.result_type(dtype, "float32")
        return keras.KerasTensor(output.shape, dtype)
