"""What a model has once its transformer blocks drop, and how it loses it."""

import contextlib
import dataclasses

from keras_lora_dropout.architectures.attention_softmax import softmax_of
from keras_lora_dropout.architectures.attention_softmax import unfuse
from keras_lora_dropout.architectures.blocks import output_layers
from keras_lora_dropout.conversion.targets import layer_paths
from keras_lora_dropout.core import mixed_classes
from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.keras_internals import forget_attributes
from keras_lora_dropout.core.keras_internals import unlocked
from keras_lora_dropout.core.structured_dropout import DropoutDraws
from keras_lora_dropout.layers import transformer_dropout as layers
from keras_lora_dropout.layers.recorded_inputs import RecordedInputs
from keras_lora_dropout.training.consistency import CONSISTENCY
from keras_lora_dropout.training.consistency import Consistency
from keras_lora_dropout.training.consistency import ConsistencyMetric

_ATTENTION = {
    "DropKey": layers.DropKey,
    "DropAttention": layers.DropAttention,
}


@dataclasses.dataclass(frozen=True)
class TransformerDropout:
    """How the transformer blocks of a model drop.

    Attributes:
        attention: `DropKey`, `DropAttention` or `None`.
        hidden: `HiddenCut` or `None`.
        consistency: `Consistency` or `None`.
        attention_layers: Tuple of the paths of the attention layers that drop.
        hidden_layers: Tuple of the paths of the layers whose inputs drop.
    """

    attention: layers.AttentionDropout | None = None
    hidden: layers.HiddenCut | None = None
    consistency: Consistency | None = None
    attention_layers: tuple = ()
    hidden_layers: tuple = ()


class TransformerDropping:
    """Mixin of `AdaptedModel`: its side of `enable_transformer_dropout`.

    Attributes:
        transformer_dropout: `TransformerDropout`, or `None` if no block drops.
    """

    transformer_dropout = None
    _transformer_dropout_disabled = False

    @property
    def consistency(self):
        """The `Consistency` that training has now, or `None`."""
        if self.transformer_dropout is None:
            return None
        if self._transformer_dropout_disabled:
            return None
        return self.transformer_dropout.consistency

    def next_dropout_seed(self):
        """Return the seed of one pass; `None` if no block drops in it."""
        settings = self.transformer_dropout
        if settings is None or self._transformer_dropout_disabled:
            return None
        if not settings.attention_layers and not settings.hidden_layers:
            return None
        return self.mask_seed_generator.next()

    def next_dropout(self):
        """Return the `DropoutDraws` of one pass; `None` if no block drops."""
        seed = self.next_dropout_seed()
        return None if seed is None else DropoutDraws(seed)

    def remove_transformer_dropout(self):
        """Undo `enable_transformer_dropout`, in place.

        The adapters, and what they have learnt, stay.

        Raises:
            ValueError: If no transformer dropout is enabled.
        """
        self._check_has_transformer_dropout("remove_transformer_dropout")
        self._drop_transformer_dropout()

    @contextlib.contextmanager
    def disable_transformer_dropout(self):
        """Context in which the model trains as without transformer dropout.

        Raises:
            ValueError: If no transformer dropout is enabled.
        """
        self._check_has_transformer_dropout("disable_transformer_dropout")
        outer = self._transformer_dropout_disabled
        self._transformer_dropout_disabled = True
        self.train_function = None
        try:
            yield
        finally:
            self._transformer_dropout_disabled = outer
            self.train_function = None

    def get_metrics_result(self):
        """As `keras.Model.get_metrics_result`; consistency is for training."""
        results = super().get_metrics_result()
        if self.transformer_dropout is not None:
            results.pop(CONSISTENCY, None)
        return results

    def _check_has_transformer_dropout(self, what):
        if self.transformer_dropout is None:
            raise ValueError(
                f"`{what}` needs what drops. Received: model "
                f'"{self.name}", which has no transformer dropout. Call '
                "`enable_transformer_dropout` first."
            )

    def _put_transformer_dropout(self, settings):
        """Let the layers drop that settings name; with `None`, none."""
        self._drop_transformer_dropout()
        if settings is None:
            return
        paths = layer_paths(self)
        stream = 0
        for path in settings.attention_layers:
            unfuse(paths[path])
            softmax = softmax_of(paths[path])
            layers.add_attention_dropout(softmax, settings.attention, stream)
            stream += 1
        for path in settings.hidden_layers:
            layers.add_hidden_dropout(paths[path], settings.hidden, stream)
            stream += 1
        if settings.consistency is not None:
            for layer in output_layers(self):
                mixed_classes.mix_in(layer, RecordedInputs)
            with unlocked(self):
                self.consistency_metric = ConsistencyMetric(name=CONSISTENCY)
        self.transformer_dropout = settings

    def _drop_transformer_dropout(self):
        for layer in descendants(self):
            if mixed_classes.has_mixin(layer):
                layer.__class__ = mixed_classes.unmixed(type(layer))
                layers.forget_dropout(layer)
        names = "transformer_dropout", "consistency_metric"
        forget_attributes(self, [name for name in names if name in vars(self)])
        # Whatever was compiled, or planned, knows which layers drop.
        self._mask_plan = None
        self.train_function = None
        self._ensemble_state.forget()


def as_data(settings):
    """Return `TransformerDropout` as plain data; `None` stays `None`."""
    if settings is None:
        return None
    data = dataclasses.asdict(settings)
    if settings.attention is not None:
        data["attention"]["kind"] = type(settings.attention).__name__
    return {
        **data,
        "attention_layers": list(settings.attention_layers),
        "hidden_layers": list(settings.hidden_layers),
    }


def from_data(data):
    """Return the `TransformerDropout` that `as_data` has written."""
    if data is None:
        return None
    attention, hidden = data["attention"], data["hidden"]
    consistency = data["consistency"]
    if attention is not None:
        attention = dict(attention)
        attention = _ATTENTION[attention.pop("kind")](**attention)
    return TransformerDropout(
        attention,
        hidden and layers.HiddenCut(**hidden),
        consistency and Consistency(**consistency),
        tuple(data["attention_layers"]),
        tuple(data["hidden_layers"]),
    )
