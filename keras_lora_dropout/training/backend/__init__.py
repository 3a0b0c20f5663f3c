"""What depends on the backend that Keras runs on.

One gradient step, safe state, and several processes that train one model.
"""

import keras

if keras.config.backend() == "jax":
    from keras_lora_dropout.training.backend.jax import NSampleTrainStep
    from keras_lora_dropout.training.backend.jax import each_in_turn
    from keras_lora_dropout.training.backend.jax import free_memory
    from keras_lora_dropout.training.backend.jax import global_random_states
    from keras_lora_dropout.training.backend.jax import set_global_random_states
    from keras_lora_dropout.training.backend.jax import state_kept
    from keras_lora_dropout.training.backend.jax import writes_files
elif keras.config.backend() == "torch":
    from keras_lora_dropout.training.backend.torch import NSampleTrainStep
    from keras_lora_dropout.training.backend.torch import free_memory
    from keras_lora_dropout.training.backend.torch import global_random_states
    from keras_lora_dropout.training.backend.torch import (
        set_global_random_states,
    )
    from keras_lora_dropout.training.backend.torch import state_kept
    from keras_lora_dropout.training.backend.torch import writes_files
    from keras_lora_dropout.training.backend.torch_processes import begin_run
    from keras_lora_dropout.training.backend.torch_processes import end_run
    from keras_lora_dropout.training.backend.torch_processes import finish_run
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
    from keras_lora_dropout.training.backend.tensorflow import writes_files
else:
    raise ImportError(
        "keras_lora_dropout trains on the Keras backends jax, torch and "
        f"tensorflow. Received: KERAS_BACKEND={keras.config.backend()!r}. Set "
        "KERAS_BACKEND to one of these before importing Keras."
    )

if keras.config.backend() != "torch":
    from keras_lora_dropout.training.backend.one_process import begin_run
    from keras_lora_dropout.training.backend.one_process import end_run
    from keras_lora_dropout.training.backend.one_process import finish_run
if keras.config.backend() != "jax":
    from keras_lora_dropout.training.backend.python_loop import each_in_turn

__all__ = [
    "NSampleTrainStep",
    "begin_run",
    "each_in_turn",
    "end_run",
    "finish_run",
    "free_memory",
    "global_random_states",
    "set_global_random_states",
    "state_kept",
    "writes_files",
]
