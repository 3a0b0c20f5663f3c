"""`adapter_summary`: what was adapted, as a table."""

import rich.console
import rich.table

from keras_lora_dropout.conversion.trainable import count_entries
from keras_lora_dropout.core import validation

_UNLIMITED = 10_000  # Columns: no line of text is as long.


class AdapterSummary:
    """Mixin of `AdaptedModel`: a table of its adapters."""

    def adapter_summary(self, line_length=None, print_fn=None):
        """Print a table of the adapted layers, in the manner of `summary`.

        Of each layer it has the path, the features that its kernel maps, the
        rank (of AdaLoRA, how many of the ranks are kept), the strength
        `scaling`, the weights of the adapter, and their share of all that
        trains. Totals follow.

        Args:
            line_length: Positive integer, characters of a line. `None`: as
                many as a terminal has, or else as the table needs.
            print_fn: Function of a string that prints it; `None`: to standard
                output.

        Raises:
            TypeError: If `print_fn` is no function.
            ValueError: If the model is not built, or `line_length` is not
                positive.

        Example:

        >>> model = keras.Sequential([
        ...     keras.Input((16,)),
        ...     keras.layers.Dense(32, name="hidden"),
        ...     keras.layers.Dense(2, name="head"),
        ... ])
        >>> model = enable_lora_dropout(model, rank=4)
        >>> model.adapter_summary(print_fn=lambda text: print(text[:7]))
        Adapter
        """
        if line_length is not None:
            validation.positive_integer("line_length", line_length)
        if print_fn is not None and not callable(print_fn):
            raise TypeError(
                "`print_fn` must be a function of a string, or None. Received: "
                f"print_fn={validation.shown(print_fn)} (of type "
                f"{type(print_fn).__name__})."
            )
        self._require_built()
        console = rich.console.Console(highlight=False, markup=False)
        if line_length is None and print_fn is None and console.is_terminal:
            line_length = console.width
        console.width = line_length or _UNLIMITED
        with console.capture() as captured:
            console.print(f'Adapters of model "{self.name}"')
            console.print(_table(self))
            for line in _totals(self):
                console.print(line)
        (print_fn or print)(captured.get().rstrip("\n"))


def _table(model):
    table = rich.table.Table()
    table.add_column("Layer", overflow="fold")
    for title in ("Kernel", "Rank", "Scaling", "Params", "Of trainable"):
        table.add_column(title, justify="right")
    kept = model.rank_pattern()
    trainable = count_entries(model.trainable_weights)
    for path, layer in model.adapted_layers:
        count = count_entries(layer.factors)
        trains = count_entries(f for f in layer.factors if f.trainable)
        ranks = [kept[path], layer.lora_rank]
        table.add_row(
            path,
            " -> ".join(map(str, layer.mask_sizes)),
            " of ".join(map(str, dict.fromkeys(ranks))),
            f"{layer.scaling:.4g}",
            f"{count:,}",
            f"{trains / max(trainable, 1):.2%}",
        )
    return table


def _totals(model):
    layers = [layer for _, layer in model.adapted_layers]
    factors = [factor for layer in layers for factor in layer.factors]
    ours = {id(factor) for factor in factors}
    total, trainable = (
        model.count_params(),
        count_entries(model.trainable_weights),
    )
    others = [w for w in model.trainable_weights if id(w) not in ours]
    settings = model.lora_dropout
    kind = " or ".join(sorted({layer.kind for layer in layers}))
    rates = " or ".join(sorted({f"{layer.dropout_rate:g}" for layer in layers}))
    yield f"Adapter: {kind}, dropout rate {rates}, N = {settings.num_samples}"
    yield f"Adapter params: {count_entries(factors):,} in {len(layers)} layers"
    initial = [weight for layer in layers for weight in layer.initial_factors]
    if initial:
        yield f"Initial factors: {count_entries(initial):,} params, frozen"
    yield f"Other trainable params: {count_entries(others):,}"
    yield f"Non-trainable params: {total - trainable:,}"
    yield f"Trainable: {trainable / total:.2%} of {total:,}"
