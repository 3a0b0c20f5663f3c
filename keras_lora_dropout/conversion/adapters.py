"""Adapters of a model: in files, and several of them on one base."""

import dataclasses
import logging
import random

from keras_lora_dropout.conversion import adapter_settings
from keras_lora_dropout.conversion import adapter_state
from keras_lora_dropout.conversion import stable_paths
from keras_lora_dropout.conversion.adapter_state import AdapterState
from keras_lora_dropout.conversion.starting_factors import INITIAL
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.rank_budget import check_rank_budget
from keras_lora_dropout.core.rank_budget import check_target
from keras_lora_dropout.core.turns import in_turn
from keras_lora_dropout.layers import adapt
from keras_lora_dropout.storage.adapter_files import read_adapter_files
from keras_lora_dropout.storage.adapter_files import write_adapter_files
from keras_lora_dropout.training.backend import writes_files

logger = logging.getLogger("keras_lora_dropout")

_OPTIMIZER = "optimizer/"


class Adapters:
    """Mixin of `AdaptedModel`: save, load, add, choose and delete adapters.

    Attributes:
        active_adapter: Name of the adapter that trains and predicts.
    """

    active_adapter = "default"

    @property
    def adapter_names(self):
        """List of the names of all adapters, the active one first."""
        return [self.active_adapter, *self._inactive_adapters]

    @in_turn
    def save_adapters(self, path):
        """Write the active adapter to a directory.

        It holds the factors, the head (whatever else trains), the settings, the
        rank pattern, the state by which AdaLoRA chooses ranks, and a
        fingerprint of the base model, as safetensors and JSON. An earlier
        adapter in the same directory is replaced, and stays whole if the
        writing is stopped at any moment.

        In several processes of JAX, all call it, since each may hold a part of
        the weights, and the first one writes.

        Args:
            path: Path of the directory, made if it is not there.

        Raises:
            ValueError: If the model is not built, or if `path` is a file.
        """
        self._require_built()
        state = adapter_state.take(self)
        settings = {
            **state.settings,
            "model": type(self).__name__,
            "sampling": dataclasses.asdict(self.lora_dropout),
            "rank_pattern": self.rank_pattern(),
            "base_fingerprint": adapter_state.fingerprint(self),
        }
        state = stable_paths.to_file(
            self, AdapterState(settings, state.tensors)
        )
        if writes_files():
            write_adapter_files(path, state.settings, state.tensors)

    @in_turn
    def load_adapters(self, path, *, check_fingerprint=True):
        """Read an adapter into the place of the active one.

        The model must be the one that the adapter was trained on: the same base
        weights, the same adapted layers, kinds and ranks. AdaLoRA layers may
        have fewer ranks in the file, as after `compact_ranks`, and take on
        those of the file. Strength, dropout rate and rescaling are taken from
        the file, and a difference is logged. How masks are sampled
        (`num_samples` and so on) stays as it is. The optimizer starts anew if
        anything but values changes.

        Args:
            path: Path of a directory that `save_adapters` wrote.
            check_fingerprint: Boolean. Whether the base weights must be those
                that the adapter was trained on, bit for bit. `False` is meant
                for the same base in another precision.

        Raises:
            FileNotFoundError: If there is no adapter in the directory.
            ValueError: If a file is damaged, or if the adapter does not fit the
                model; all differences are named. The model is unchanged then.
        """
        validation.boolean("check_fingerprint", check_fingerprint)
        self._require_built()
        state, fingerprint = _read(self, path)
        found = adapter_state.differences(self, state)
        found += adapter_state.kind_differences(self, state)
        self._check_fit(path, found, fingerprint, check_fingerprint)
        self._log_settings(state)
        self._put(state)

    @in_turn
    def add_adapter(
        self,
        name,
        *,
        path=None,
        rank=None,
        alpha=None,
        dropout_rate=None,
        rescale=None,
        rank_budget=None,
        seed=None,
    ):
        """Give the model another adapter, for `set_adapter` to make active.

        It covers the same layers as the active one, starts at zero effect, and
        takes a copy of the head. Training, prediction and ensembles use the
        active adapter alone.

        Args:
            name: String. Name of the new adapter.
            path: `None`, or path of a directory that `save_adapters` wrote. It
                brings its own settings, so all of the following stay `None`.
            rank, alpha, dropout_rate, rescale: As in `enable_lora_dropout`;
                `None` means those of the active adapter, layer by layer (for
                `alpha` with a given rank: the rank).
            rank_budget: `RankBudget` or `None`, as in `enable_lora_dropout`.
            seed: Integer or `None`. Seed of the initial factors.

        Raises:
            FileNotFoundError: If there is no adapter at `path`.
            ValueError: If the name is taken, an argument is out of range, or
                the adapter at `path` is damaged or does not fit.
        """
        _check_name(name)
        if name in self.adapter_names:
            raise ValueError(
                f'Model "{self.name}" already has an adapter of that name. '
                f"Received: name={name!r}. Its adapters are "
                f"{self.adapter_names}. Choose another name, or call "
                "`delete_adapter` first."
            )
        self._require_built()
        options = {
            "rank": rank,
            "alpha": alpha,
            "dropout_rate": dropout_rate,
            "rescale": rescale,
            "rank_budget": rank_budget,
            "seed": seed,
        }
        if path is None:
            state = self._fresh_adapter(options)
        else:
            given = [key for key, value in options.items() if value is not None]
            if given:
                raise ValueError(
                    "An adapter from a file has settings of its own. Received: "
                    f"path={str(path)!r} and {', '.join(given)}. Leave the "
                    "latter out."
                )
            state, fingerprint = _read(self, path)
            found = adapter_state.differences(self, state)
            self._check_fit(path, found, fingerprint)
        self._inactive_adapters[name] = state

    @in_turn
    def set_adapter(self, name):
        """Make an adapter the active one.

        The other keeps its factors, head, ranks and, if the model trains with
        the same optimizer on return, the optimizer's state.

        Args:
            name: String, one of `adapter_names`.

        Raises:
            ValueError: If there is no such adapter.
        """
        self._check_known(name)
        if name == self.active_adapter:
            return
        old = adapter_state.take(self)
        old.tensors.update(_optimizer_tensors(self))
        new = self._inactive_adapters.pop(name)
        self._put(new)
        self._inactive_adapters[self.active_adapter] = old
        self.active_adapter = name

    @in_turn
    def delete_adapter(self, name):
        """Delete an adapter that is not active.

        Args:
            name: String, one of `adapter_names` besides `active_adapter`.

        Raises:
            ValueError: If there is no such adapter, or if it is active.
        """
        self._check_known(name)
        if name == self.active_adapter:
            raise ValueError(
                f'Adapter "{name}" is active, so it cannot be deleted. Make '
                "another one of "
                f"{list(self._inactive_adapters)} active with `set_adapter`, "
                "or take all adapters off with `merge_adapters`."
            )
        del self._inactive_adapters[name]

    def _check_known(self, name):
        if not isinstance(name, str) or name not in self.adapter_names:
            raise ValueError(
                f'Model "{self.name}" has no such adapter. Received: '
                f"name={name!r}. Its adapters are {self.adapter_names}; "
                "`add_adapter` gives it another one."
            )

    def _fresh_adapter(self, options):
        """A new adapter as a state: made of the real layers, and taken back."""
        streams = random.Random(validation.seed(options["seed"]))
        budget = check_rank_budget(options["rank_budget"])
        old = adapter_state.take(self)
        settings = {
            path: _layer_options(path, own, options, budget, streams)
            for path, own in old.settings["layers"].items()
        }
        tensors = {
            name: array
            for name, array in old.tensors.items()
            if name.startswith("head/")
        }
        for path, layer in self.adapted_layers:
            new = settings[path]
            fresh = adapt.fresh_factors(
                layer,
                kind=new["kind"],
                rank=new["rank"],
                seed=new["seed"],
            )
            for name, value in fresh.items():
                tensors[f"adapters/{path}/{name}"] = value
        return AdapterState(
            {
                "layers": settings,
                "rank_budget": budget and dataclasses.asdict(budget),
                "rank_record": None,
            },
            tensors,
        )

    def _check_fit(self, path, found, fingerprint, check_fingerprint=True):
        if check_fingerprint and fingerprint != adapter_state.fingerprint(self):
            found = [
                *found,
                "the base weights are not those that the adapter was trained "
                "on (pass `check_fingerprint=False` to `load_adapters` if they "
                "are the same in another precision)",
            ]
        if found:
            raise ValueError(
                f"The adapter in {str(path)!r} does not fit model "
                f'"{self.name}", which is unchanged. Differences:\n'
                + "\n".join(f"- {difference}" for difference in found)
                + "\nBuild the same base model, and call "
                "`enable_lora_dropout` with the same arguments."
            )

    def _log_settings(self, state):
        for path, layer in self.adapted_layers:
            own = adapter_state.layer_settings(layer)
            new = state.settings["layers"][path]
            changed = {
                name: f"{own[name]} -> {new[name]}"
                for name in ("alpha", "dropout_rate", "rescale")
                if own[name] != new[name]
            }
            if changed:
                logger.warning(
                    "load_adapters: layer %r takes settings from the file: %s",
                    path,
                    changed,
                )

    def _put(self, state):
        """Make a state the active adapter, and forget what was compiled."""
        optimizer = {
            name.removeprefix(_OPTIMIZER): array
            for name, array in state.tensors.items()
            if name.startswith(_OPTIMIZER)
        }
        if adapter_state.put(self, state):
            self._forget_compiled_state()
        else:
            self._restart_optimizer()
        _restore_optimizer(self, optimizer)


def _check_name(name):
    if not isinstance(name, str) or not name:
        raise ValueError(
            "`name` must be a string with at least one character. Received: "
            f"name={name!r}."
        )


def _read(model, path):
    """Return the `AdapterState` and the base's fingerprint of a directory."""
    settings, tensors = read_adapter_files(path)
    settings = adapter_settings.checked_settings(settings, path)
    fingerprint = settings.pop("base_fingerprint")
    state = AdapterState(settings, tensors)
    return stable_paths.from_file(model, state), fingerprint


def _layer_options(path, own, options, budget, streams):
    """Settings of one layer of a new adapter."""
    new = dict(own, seed=streams.randrange(validation.MAX_SEED))
    if budget is not None:
        new["kind"] = "AdaLoRA"
    elif own["kind"] == "AdaLoRA":
        new["kind"] = "LoRA"
    new.pop(INITIAL, None)  # It starts at zero.
    rank = options["rank"]
    if budget is not None and budget.initial_rank is not None:
        rank = budget.initial_rank
    if rank is not None:
        new["rank"] = validation.positive_integer("rank", rank)
        new["alpha"] = float(rank)
        validation.rank_fits(
            rank, own["input_dim"], own["output_dim"], f'layer "{path}"'
        )
    if new["rank"] == 0:
        raise ValueError(
            f'Layer "{path}" has no rank left in the active adapter. Received: '
            "rank=None. Pass the rank of the new adapter."
        )
    if options["alpha"] is not None:
        new["alpha"] = validation.alpha(options["alpha"], new["rank"])
    if options["dropout_rate"] is not None:
        new["dropout_rate"] = validation.dropout_rate(options["dropout_rate"])
    if options["rescale"] is not None:
        new["rescale"] = validation.boolean("rescale", options["rescale"])
    if budget is not None:
        check_target(budget.target_rank, new["rank"])
    return new


def _optimizer_tensors(model):
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or not optimizer.built:
        return {}
    return {
        f"{_OPTIMIZER}{index}": adapter_state.array_of(variable)
        for index, variable in enumerate(optimizer.variables)
    }


def _restore_optimizer(model, arrays):
    """Give the optimizer an earlier state if it is one of the same kind."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or not arrays:
        return
    optimizer.build(model.trainable_variables)
    values = [arrays[str(index)] for index in range(len(arrays))]
    if [tuple(v.shape) for v in optimizer.variables] == [
        value.shape for value in values
    ]:
        for variable, value in zip(optimizer.variables, values, strict=True):
            variable.assign(value)
