"""A bottleneck behind a linear layer: the adapter of Houlsby and Pfeiffer."""

import functools
import random

import keras
from keras import ops

from keras_lora_dropout.core.keras_internals import unlocked
from keras_lora_dropout.layers.adapter import next_seed

# Houlsby et al., section 3.6: near the identity, a tenth or less does as well.
_DEVIATION = 1e-2
_NAMES = (
    "adapter_down_kernel",
    "adapter_down_bias",
    "adapter_up_kernel",
    "adapter_up_bias",
)


class BottleneckAdapter:
    """Mixin of a linear layer whose output passes a bottleneck.

    Where the layer's own output is `y`, with `d` features, this one's is
    `y + up(activation(down(y)))`; the kernel of `down` has the shape `(d, b)`,
    that of `up` `(b, d)`. Weights are float32, arithmetic runs in the compute
    dtype.

    Reference: [Houlsby et al., 2019](https://arxiv.org/abs/1902.00751),
    section 2.1.
    """

    @property
    def bottleneck_weights(self):
        """The adapter's weights; without `use_bias` there are no biases."""
        return [getattr(self, name) for name in _NAMES if hasattr(self, name)]

    def call(self, inputs, training=None):
        y = super().call(inputs, training=training)
        x = self._project(y, "down")
        x = self._project(self._bottleneck_activation(x), "up")
        return ops.add(y, x)

    def _project(self, x, name):
        kernel = getattr(self, f"adapter_{name}_kernel")
        x = ops.matmul(x, ops.cast(kernel, self.compute_dtype))
        bias = getattr(self, f"adapter_{name}_bias", None)
        if bias is None:
            return x
        return ops.add(x, ops.cast(bias, self.compute_dtype))

    def save_own_variables(self, store):
        super().save_own_variables(store)
        for name in _NAMES:
            if hasattr(self, name):
                store[name] = getattr(self, name)

    def load_own_variables(self, store):
        super().load_own_variables(store)
        for name in _NAMES:
            if hasattr(self, name):
                getattr(self, name).assign(store[name])


def add_bottleneck(layer, size, activation, use_bias, seed):
    """Let the output of a built linear layer pass a bottleneck, in place.

    Args:
        layer: A built `Dense` or `EinsumDense`. The last axis of its kernel is
            the last one of its output.
        size: Positive integer. Features of the bottleneck, `b`.
        activation: A Keras activation function.
        use_bias: Boolean. Whether both projections have a bias.
        seed: Integer or `None`.
    """
    layer.__class__ = _bottleneck_class(type(layer))
    dim = layer.kernel.shape[-1]
    streams = random.Random(seed)
    shapes = (dim, size), (size,), (size, dim), (dim,)
    with unlocked(layer):
        for name, shape in zip(_NAMES, shapes, strict=True):
            if len(shape) == 1 and not use_bias:
                continue
            initializer = "zeros"
            if len(shape) == 2:
                initializer = keras.initializers.TruncatedNormal(
                    stddev=_DEVIATION, seed=next_seed(streams)
                )
            weight = layer.add_weight(
                name=name, shape=shape, initializer=initializer, dtype="float32"
            )
            setattr(layer, name, weight)
    layer._bottleneck_activation = activation


@functools.cache
def _bottleneck_class(cls):
    namespace = {"__module__": cls.__module__}
    return type(
        f"Bottleneck{cls.__name__}", (BottleneckAdapter, cls), namespace
    )
