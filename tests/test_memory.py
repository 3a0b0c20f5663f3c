"""Memory of training: instances in turn, and gradient checkpointing."""

import contextlib
import weakref

import keras
import keras_hub
import numpy as np
import pytest
from helpers import BACKEND
from helpers import assert_close
from helpers import randomize

import keras_lora_dropout as kld

LENGTH = 16
X = {
    "token_ids": np.arange(4 * LENGTH).reshape(4, LENGTH) % 30,
    "padding_mask": np.ones((4, LENGTH), int),
}
Y = np.array([0, 1, 0, 1])
BLOCKS = [f"disentangled_attention_encoder_layer_{n}" for n in range(3)]


def deberta(checkpointed=False, **options):
    keras.utils.set_random_seed(0)
    scope = contextlib.nullcontext()
    if checkpointed:
        scope = keras.RematScope("list_of_layers", layer_names=BLOCKS)
    with scope:
        backbone = keras_hub.models.DebertaV3Backbone(
            vocabulary_size=30,
            num_layers=3,
            num_heads=2,
            hidden_dim=16,
            intermediate_dim=64,
            max_sequence_length=LENGTH,
            bucket_size=LENGTH // 2,
            dropout=0.0,
        )
        model = keras_hub.models.DebertaV3TextClassifier(
            backbone, num_classes=2, dropout=0.0
        )
    kld.enable_lora_dropout(model, rank=2, seed=0, **options)
    randomize(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.5), loss, metrics=[])
    return model


# In a graph, TensorFlow's checkpointing takes no keyword arguments.
checkpointing = pytest.mark.skipif(
    BACKEND == "tensorflow", reason="Keras's own layers fail there"
)


@checkpointing
@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_checkpointed_blocks_take_the_same_steps(sampling):
    losses = [
        [np.ravel(model.train_on_batch(X, Y))[0] for _ in range(3)]
        for model in (
            deberta(num_samples=2, sampling=sampling),
            deberta(checkpointed=True, num_samples=2, sampling=sampling),
        )
    ]
    assert losses[0][0] - losses[0][2] > 0.01
    assert_close(*losses, 1e-5)


class SavedBytes:
    """Counts the bytes that torch holds for the backward pass, at their peak.

    A tensor that several operations save counts once.
    """

    def __init__(self):
        self.now = self.peak = 0
        self._holders = weakref.WeakValueDictionary()

    def pack(self, tensor):
        key = tensor.untyped_storage().data_ptr()
        holder = self._holders.get(key)
        if holder is None:
            holder = self._holders[key] = _Holder(self, tensor)
        return holder, tensor

    @staticmethod
    def unpack(packed):
        return packed[1]

    def measure(self, model):
        import torch

        model.train_on_batch(X, Y)
        hooks = torch.autograd.graph.saved_tensors_hooks
        with hooks(self.pack, self.unpack):
            model.train_on_batch(X, Y)
        return self.peak


class _Holder:
    def __init__(self, count, tensor):
        self.count = count
        self.size = tensor.untyped_storage().nbytes()
        count.now += self.size
        count.peak = max(count.peak, count.now)

    def __del__(self):
        self.count.now -= self.size


@pytest.mark.skipif(BACKEND != "torch", reason="counts what torch saves")
def test_what_torch_saves_for_the_backward_pass():
    one, in_turn, at_once, checkpointed = (
        SavedBytes().measure(model)
        for model in (
            deberta(num_samples=1),
            deberta(num_samples=4, sampling="sequential"),
            deberta(num_samples=4),
            deberta(checkpointed=True, num_samples=4),
        )
    )
    assert in_turn <= 1.1 * one
    assert at_once > 2 * one
    assert checkpointed < 0.5 * at_once


@pytest.mark.skipif(BACKEND != "torch", reason="autocast is torch's own")
def test_autocast():
    import torch

    plain, cast = deberta(num_samples=2), deberta(num_samples=2)
    expected = [np.ravel(plain.train_on_batch(X, Y))[0] for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        losses = [np.ravel(cast.train_on_batch(X, Y))[0] for _ in range(3)]
    assert_close(losses, expected, 0.05)
    assert np.abs(np.subtract(losses, expected)).max() > 0
    for _, layer in cast.adapted_layers:
        for factor in layer.factors:
            assert factor.value.dtype == torch.float32
