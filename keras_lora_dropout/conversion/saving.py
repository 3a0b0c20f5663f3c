"""Whole models and their weights in files, from which training goes on."""

import contextlib
import inspect
import logging
import os

import keras
import numpy as np
from keras import ops

from keras_lora_dropout.core.turns import in_turn
from keras_lora_dropout.storage.atomic import replacing
from keras_lora_dropout.storage.atomic import reserve
from keras_lora_dropout.training.backend import global_random_states
from keras_lora_dropout.training.backend import set_global_random_states

logger = logging.getLogger("keras_lora_dropout")

_RANDOM_STATES = "random_states"
_EPOCHS = "finished_epochs"
_INACTIVE = "inactive_adapter_"
_GLOBAL = "global_random_state_"
_WIDEST = 4  # Bytes of a number; hardly any has more.
_HDF5_ENTRY = 4096  # Bytes of an entry's own, at most.


class Saving:
    """Mixin of `AdaptedModel`: what a file holds besides Keras's weights.

    These are the state of every random generator in the model, dropout layers
    included, and of torch's own, which Keras's dropout uses there; the adapters
    that are not active; and after which epoch the file was written.
    """

    _finished_epochs = 0
    _restored_epochs = None  # Set while callbacks restore a run.
    _restored_states = None  # Set until the `fit` after loading.

    @in_turn
    def save(self, filepath, overwrite=True, zipped=None, **kwargs):
        """As `keras.Model.save`, adapters and all; the file is atomic.

        `keras.saving.load_model` gives the adapted model back, with
        `keras_lora_dropout` imported, on any backend: its adapters and
        settings, the optimizer, the state of masks, dropout and ranks. `fit`
        goes on where it was.

        Raises:
            ValueError: If `filepath` is an HDF5 file, which holds too little.
        """
        if str(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(
                "An adapted model is saved in the Keras format, whose files "
                f"end in `.keras`. Received: filepath={str(filepath)!r}. Write "
                '`model.save("model.keras")`, or keep the weights alone with '
                '`model.save_weights("model.weights.h5")`.'
            )
        with _target(filepath, overwrite, ".keras") as path:
            super().save(path, overwrite=overwrite, zipped=zipped, **kwargs)

    @in_turn
    def save_weights(self, filepath, overwrite=True, max_shard_size=None):
        """As `keras.Model.save_weights`; a file that is not sharded is atomic.

        It holds the optimizer's state, too, and that of masks, dropout and
        ranks, so that a compiled model can train on after `load_weights`.

        Raises:
            OSError: If the disk has no room for the file.
        """
        with _target(filepath, overwrite, ".weights.h5") as path:
            if path is not filepath:
                # HDF5 crashes the process when it cannot write.
                reserve(path, self._size_of_weights())
            super().save_weights(
                path, overwrite=overwrite, max_shard_size=max_shard_size
            )

    @in_turn
    def _size_of_weights(self):
        """Most bytes that HDF5 needs for all weights."""
        variables = list(self.variables)
        if self.compiled:
            variables += self.optimizer.variables
        sizes = [np.prod(v.shape, dtype=int) * _WIDEST for v in variables]
        sizes += [array.nbytes for _, array in self._inactive_arrays()]
        return int(sum(sizes)) + _HDF5_ENTRY * len(sizes)

    def load_weights(self, *args, **kwargs):
        """As `keras.Model.load_weights`; a compiled model can train on.

        Keras leaves the optimizer's state out if the optimizer has not taken a
        step yet; here it is built first.
        """
        if self.built and self.compiled and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        return super().load_weights(*args, **kwargs)

    def __reduce__(self):
        # Keras unpickles by a method of the class, which has to have a name
        # that can be imported.
        function, arguments = super().__reduce__()
        return getattr(keras.Model, function.__name__), arguments

    def get_compile_config(self):
        """As `keras.Model.get_compile_config`, for every backend and task.

        Arguments of a task's own `compile`, such as a sampler, are kept, too.
        """
        config = super().get_compile_config()
        if not config:
            return config
        for name in inspect.signature(self.compile).parameters:
            if name not in config and getattr(self, name, None) is not None:
                config[name] = keras.saving.serialize_keras_object(
                    getattr(self, name)
                )
        _name_publicly(config["optimizer"])
        if config.get("jit_compile") and keras.config.backend() != "torch":
            # Elsewhere it is the default; there it is another compiler.
            config["jit_compile"] = "auto"
        return config

    def compile_from_config(self, config):
        """Compile the model as it was, so that the optimizer has its state.

        Keras leaves that out for a model with a `compile` of its own, as
        KerasHub's tasks have.
        """
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def save_own_variables(self, store):
        self._find_allocator()
        super().save_own_variables(store)
        store[_RANDOM_STATES] = self._random_states()
        store[_EPOCHS] = np.array(self._finished_epochs)
        for device, state in global_random_states().items():
            store[f"{_GLOBAL}{device}"] = state
        for key, array in self._inactive_arrays():
            store[key] = array

    def load_own_variables(self, store):
        self._find_allocator()
        keys = set(store.keys())
        inactive = {key for key in keys if key.startswith(_INACTIVE)}
        states = {key for key in keys if key.startswith(_GLOBAL)}
        ours = inactive | states | {_RANDOM_STATES, _EPOCHS}
        # Keras counts the entries of weights alone.
        super().load_own_variables({key: store[key] for key in keys - ours})
        if _RANDOM_STATES in keys:
            self._set_random_states(np.array(store[_RANDOM_STATES]))
        if _EPOCHS in keys:
            self._finished_epochs = int(np.array(store[_EPOCHS]))
            self._restored_epochs = self._finished_epochs
        self._restored_states = {
            key.removeprefix(_GLOBAL): np.array(store[key]) for key in states
        }
        self._load_inactive(store, inactive)

    def _go_on_with_random_states(self):
        """Let the first `fit` after loading draw what the saved one would."""
        if self._restored_states is not None:
            set_global_random_states(self._restored_states)
        self._restored_states = None

    def _generators(self):
        """States of all seed generators of the model, in a fixed order."""
        known = {id(v) for v in (*self.weights, *self.metrics_variables)}
        return [v for v in self.variables if id(v) not in known]

    def _random_states(self):
        states = [ops.convert_to_numpy(state) for state in self._generators()]
        return np.stack(states).astype("int64")

    def _set_random_states(self, states):
        generators = self._generators()
        if len(states) != len(generators):
            logger.warning(
                "The state of masks and dropout is not restored: the file has "
                "%d random generators, but model %r has %d. A run that goes on "
                "from here draws other masks.",
                len(states),
                self.name,
                len(generators),
            )
            return
        for generator, state in zip(generators, states, strict=True):
            generator.assign(state.astype(generator.dtype))

    def _inactive_arrays(self):
        """Yield `(key, array)` of all tensors of inactive adapters."""
        position = 0
        for name in sorted(self._inactive_adapters):
            tensors = self._inactive_adapters[name].tensors
            for array in tensors.values():
                yield f"{_INACTIVE}{position}", array
                position += 1

    def _load_inactive(self, store, keys):
        expected = dict(self._inactive_arrays())
        if set(expected) != keys or any(
            tuple(store[key].shape) != array.shape
            for key, array in expected.items()
        ):
            raise ValueError(
                f'Model "{self.name}" has not the adapters that the file has. '
                f"Received: a file with {len(keys)} tensors of inactive "
                f"adapters; the model has {len(expected)}, of the adapters "
                f"{sorted(self._inactive_adapters)}. Call `add_adapter` as "
                "before `save_weights`, or keep the whole model with `save`."
            )
        for key, array in expected.items():
            array[...] = np.array(store[key]).astype(array.dtype)


def _name_publicly(config):
    """Let a serialized optimizer name the class that every backend has.

    On torch, Keras gives each of its optimizers a subclass, which other
    backends cannot load.
    """
    if not isinstance(config, dict):
        return
    if str(config.get("module")).startswith("keras.src.backend."):
        config.update(module="keras.optimizers", registered_name=None)
    for value in config.values():
        _name_publicly(value)


@contextlib.contextmanager
def _target(filepath, overwrite, suffix):
    """Yield the path that Keras is to write to."""
    path = os.fspath(filepath)
    is_plain_file = path.endswith(suffix) and "://" not in path
    # Keras asks before it overwrites; sharded files and folders are its own.
    asks = os.path.exists(path) and not overwrite
    if not is_plain_file or asks or os.path.isdir(path):
        yield filepath
        return
    directory = os.path.dirname(path)
    if directory:
        os.makedirs(directory, exist_ok=True)
    with replacing(path, suffix) as temporary:
        yield temporary
