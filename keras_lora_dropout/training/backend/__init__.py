"""One gradient step and safe state, for the backend that Keras runs on."""

import keras

if keras.config.backend() == "jax":
    from keras_lora_dropout.training.backend.jax import NSampleTrainStep
    from keras_lora_dropout.training.backend.jax import free_memory
    from keras_lora_dropout.training.backend.jax import global_random_states
    from keras_lora_dropout.training.backend.jax import set_global_random_states
    from keras_lora_dropout.training.backend.jax import state_kept
elif keras.config.backend() == "torch":
    from keras_lora_dropout.training.backend.torch import NSampleTrainStep
    from keras_lora_dropout.training.backend.torch import free_memory
    from keras_lora_dropout.training.backend.torch import global_random_states
    from keras_lora_dropout.training.backend.torch import (
        set_global_random_states,
    )
    from keras_lora_dropout.training.backend.torch import state_kept
elif keras.config.backend() == "tensorflow":
    from keras_lora_dropout.training.backend.tensorflow import NSampleTrainStep
    from keras_lora_dropout.training.backend.tensorflow import free_memory
    from keras_lora_dropout.training.backend.tensorflow import (
        global_random_states,
    )
    from keras_lora_dropout.training.backend.tensorflow import (
        set_global_random_states,
    )
    from keras_lora_dropout.training.backend.tensorflow import state_kept
else:
    raise ImportError(
        "keras_lora_dropout trains on the Keras backends jax, torch and "
        f"tensorflow. Received: KERAS_BACKEND={keras.config.backend()!r}. Set "
        "KERAS_BACKEND to one of these before importing Keras."
    )

__all__ = [
    "NSampleTrainStep",
    "free_memory",
    "global_random_states",
    "set_global_random_states",
    "state_kept",
]
