"""The training step on TensorFlow: one gradient tape for each pass."""

import contextlib

import keras
import tensorflow as tf

from keras_lora_dropout.core import instances
from keras_lora_dropout.core.host_memory import free_host_memory
from keras_lora_dropout.core.masks import use_draws
from keras_lora_dropout.training import objective


class NSampleTrainStep:
    """Mixin: `train_step` on the N-sample objective."""

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        weights = list(self.trainable_weights)
        passes = objective.draw_passes(self, x)
        kept = objective.kept_prefix(self, x, passes)
        partner = objective.partner(self, x)

        def run_pass(drawn):
            # Gradient checkpointing runs the forward pass again in `gradient`
            # and needs its masks there.
            with use_draws(objective.pass_draws(self, x, drawn)):
                with tf.GradientTape() as tape:
                    total, losses, outputs = objective.pass_loss(
                        self, x, y, sample_weight, kept, partner
                    )
                gradients = tape.gradient(total, weights)
            gradients = [_dense(gradient) for gradient in gradients]
            return losses, outputs, gradients

        losses, outputs, gradients = instances.mean(
            run_pass(drawn) for drawn in passes
        )
        with objective.around_update(self, weights, gradients):
            self.optimizer.apply(gradients, weights)
        return objective.update_metrics(
            self, x, y, outputs, sample_weight, losses
        )


def free_memory():
    """Return the free bytes where new tensors lie; `None` if not known."""
    if tf.config.list_logical_devices("GPU"):
        return None  # TensorFlow takes all of it, and tells what it uses.
    return free_host_memory()


def writes_files():
    """There is one process."""
    return True


def global_random_states():
    """All random state is in the model's own generators here."""
    return {}


def set_global_random_states(states):
    """There is none to restore, whatever another backend has written."""


def state_kept(model):
    """Variables keep their values here, whatever happens."""
    return contextlib.nullcontext()


def _dense(gradient):
    """Densify the gradient of an embedding; `None` if the loss ignores it."""
    return None if gradient is None else tf.convert_to_tensor(gradient)
