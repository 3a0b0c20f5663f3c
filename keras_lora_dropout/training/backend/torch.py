"""The training step on torch: gradients add up in the parameters."""

import contextlib
import functools

import keras
import torch

from keras_lora_dropout.core import instances
from keras_lora_dropout.core.host_memory import free_host_memory
from keras_lora_dropout.core.interrupts import interrupts_held
from keras_lora_dropout.core.masks import use_draws
from keras_lora_dropout.training import objective
from keras_lora_dropout.training.backend import torch_processes as processes


class NSampleTrainStep:
    """Mixin: `train_step` on the N-sample objective."""

    _exchanges_metrics = False

    def make_train_function(self, force=False):
        if self.train_function is None or force:
            super().make_train_function(force)
            self.train_function = _whole(self.train_function)

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        share = processes.share_of_batch(self, x)
        passes = objective.draw_passes(self, x, share)
        with torch.no_grad():
            partner = objective.partner(self, x, share)
        # A `fit` inside `torch.autocast` would go on with the weights that the
        # first step has cast, whatever the optimizer makes of them; or with
        # those of the pass above, which have no gradients.
        torch.clear_autocast_cache()
        kept = objective.kept_prefix(self, x, passes)

        def run_pass(drawn):
            # Gradient checkpointing runs the forward pass again in `backward`
            # and needs its masks there.
            with use_draws(objective.pass_draws(self, x, drawn)):
                total, losses, outputs = objective.pass_loss(
                    self, x, y, sample_weight, kept, partner
                )
                (total / len(passes)).backward()
            return keras.tree.map_structure(_detach, (losses, outputs))

        weights = list(self.trainable_weights)
        # Keras lists parameters by path, so `zero_grad` misses one of two that
        # have the same, as layers of nested models may.
        for weight in weights:
            weight.value.grad = None
        losses, outputs = instances.mean(run_pass(drawn) for drawn in passes)
        gradients = [w.value.grad for w in weights]
        with torch.no_grad():
            gradients, losses = processes.averaged(
                weights, gradients, losses, share
            )
            with objective.around_update(self, weights, gradients):
                self.optimizer.apply(gradients, weights)
        with processes.metrics_exchanged(self, share is not None):
            return objective.update_metrics(
                self, x, y, outputs, sample_weight, losses, share
            )

    def test_step(self, data):
        # Shares of the data may have unequal numbers of batches here.
        with processes.metrics_exchanged(self, False):
            return super().test_step(data)

    def get_metrics_result(self):
        with processes.summed_metrics(self):
            return super().get_metrics_result()


def state_kept(model):
    """Variables keep their values here, whatever happens."""
    return contextlib.nullcontext()


def free_memory():
    """Return the free bytes where new tensors lie; `None` if not known."""
    device = keras.ops.zeros(()).device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory() if device.type == "cpu" else None


def writes_files():
    """Each process is asked for itself; see the guide to several of them."""
    return True


def global_random_states():
    """State of torch's own generators, which Keras's dropout draws from.

    Returns:
        Dictionary of device -> array of bytes.
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda:{index}"] = state
    return {device: state.numpy() for device, state in states.items()}


def set_global_random_states(states):
    """Restore what `global_random_states` returned, where devices are alike."""
    for device, state in states.items():
        state = torch.from_numpy(state)
        if device == "cpu":
            torch.set_rng_state(state)
        elif int(device.partition(":")[2]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)


def _whole(step):
    """Let no interrupt end a step when part of the weights is updated."""

    @functools.wraps(step)
    def whole(data):
        with interrupts_held():
            return step(data)

    return whole


def _detach(tensor):
    if tensor is None:
        return None
    detached = tensor.detach()
    instances.copy_mask(tensor, detached)
    return detached
