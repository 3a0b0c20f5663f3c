"""What a model gains with a `RankBudget`: ranks that adapt while it trains."""

import logging

from keras_lora_dropout.core.keras_internals import unlocked
from keras_lora_dropout.core.out_of_memory import memory_advice
from keras_lora_dropout.core.rank_budget import check_rank_budget
from keras_lora_dropout.core.rank_budget import check_target
from keras_lora_dropout.core.turns import in_turn
from keras_lora_dropout.layers.adalora_dropout import AdaLoRAFactors
from keras_lora_dropout.training.rank_allocator import RankAllocator

logger = logging.getLogger("keras_lora_dropout")


class AdaptiveRank:
    """Mixin of `AdaptedModel`: AdaLoRA's budget, pattern and compaction.

    Attributes:
        rank_budget: The `RankBudget`, or `None` for fixed ranks.
        rank_allocator: The `RankAllocator`; `None` without a budget, or before
            the layers are built.
    """

    rank_budget = None
    rank_allocator = None

    def _start_allocation(self, budget):
        """Set the budget; create the allocator if the layers are built."""
        self.rank_budget = check_rank_budget(budget)
        self._find_allocator()

    def _find_allocator(self):
        """Create the allocator at the first call that finds the layers built.

        Raises:
            ValueError: If budget and layers do not go together.
        """
        if self.rank_budget is None or self.rank_allocator is not None:
            return
        adapted = self.adapted_layers
        if not adapted or not all(layer.built for _, layer in adapted):
            return
        self._check_layers(self._adaptive_layers())
        self._add_allocator()

    def _adaptive_layers(self):
        return [
            (path, layer)
            for path, layer in self.adapted_layers
            if isinstance(layer, AdaLoRAFactors)
        ]

    def _add_allocator(self, record=None):
        with unlocked(self):
            self.rank_allocator = RankAllocator(
                self, self._adaptive_layers(), self.rank_budget, record
            )

    def _replace_allocation(self, budget, record):
        """Start another budget; with a `record`, one that is compact already.

        Args:
            budget: `RankBudget` or `None`.
            record: `None`, or what `RankAllocator.record_as_data` returned.
        """
        if self.rank_allocator is not None:
            self.rank_allocator.forget(self)
        self.rank_allocator = None
        self.rank_budget = budget
        if budget is not None:
            self._add_allocator(record)

    def _check_layers(self, adaptive):
        if not adaptive:
            raise ValueError(
                f'Model "{self.name}" has a `rank_budget`, but no layer whose '
                "rank adapts. Build it from `AdaLoRADropoutDense` or "
                "`AdaLoRADropoutEinsumDense`, or leave `rank_budget` out."
            )
        ranks = {path: layer.lora_rank for path, layer in adaptive}
        budget = self.rank_budget
        given = budget.initial_rank
        if given is not None and any(rank != given for rank in ranks.values()):
            raise ValueError(
                "`initial_rank` differs from the ranks that the layers have. "
                f"Received: RankBudget(initial_rank={budget.initial_rank}) and "
                f"layers of ranks {ranks}. Leave `initial_rank` out."
            )
        check_target(budget.target_rank, sum(ranks.values()) / len(ranks))

    def _require_allocator(self, method):
        """Raise if the schedule cannot start; warn if there is none at all."""
        self._find_allocator()
        if self.rank_allocator is not None:
            return
        if self.rank_budget is not None:
            raise ValueError(
                f'Model "{self.name}" is not built, so `{method}` cannot start '
                "the rank schedule of its layers. Call the model on a batch "
                "of data first."
            )
        fixed = [path for path, _ in self._adaptive_layers()]
        if fixed:
            logger.warning(
                "Model %r has AdaLoRA layers but no `rank_budget`: no rank "
                "will be pruned. Pass `rank_budget=RankBudget(...)` to let "
                "them adapt. The layers are:\n%s",
                self.name,
                "\n".join(f"  {path}" for path in fixed),
            )

    def rank_pattern(self):
        """Return how many ranks each adapted layer keeps at present.

        Returns:
            Dictionary of layer path -> integer, in forward order.
        """
        pattern = {path: lyr.lora_rank for path, lyr in self.adapted_layers}
        self._find_allocator()
        if self.rank_allocator is not None:
            pattern.update(self.rank_allocator.pattern())
        return pattern

    def rank_history(self):
        """Return how the kept ranks changed over the training so far.

        The run is cut into at most 200 equal parts; of each part, the ranks
        after its last step are recorded. A resumed run goes on recording.
        `keras_lora_dropout.plots.plot_rank_history` draws the result.

        Returns:
            Dictionary with `"step"`, an integer array `(records,)` of
            optimizer steps, and `"ranks"`, a dictionary of layer path ->
            integer array `(records,)`.

        Raises:
            ValueError: If the model has no `rank_budget`.
        """
        return self._allocator_of("rank_history").recorded()

    @in_turn
    def compact_ranks(self):
        """Drop the pruned triplets from the adapters, in place.

        The outputs stay the same, seeded ensembles included; the adapters
        shrink to the ranks that they keep, and the scores that ranks are
        chosen by are dropped. It ends the rank schedule: a model that trains
        on does so with the ranks that it has. Its optimizer starts anew, with
        the same settings.

        Raises:
            ValueError: If the model has no `rank_budget`.
        """
        allocator = self._allocator_of("compact_ranks")
        if not allocator.is_open:
            return
        before = allocator.count_factors()
        allocator.close(self)
        self._forget_compiled_state()
        logger.info(
            "compact_ranks: the adapters of model %r have %s weights, of %s "
            "before.",
            self.name,
            f"{allocator.count_factors():,}",
            f"{before:,}",
        )

    def _allocator_of(self, method):
        self._find_allocator()
        if self.rank_allocator is None:
            raise ValueError(
                f"`{method}` needs ranks that adapt, and model "
                f'"{self.name}" has none. Pass `rank_budget=RankBudget(...)` '
                "to `enable_lora_dropout` or `LoRADropoutModel`; a subclassed "
                "model must be called on a batch of data first."
            )
        return self.rank_allocator

    def _start_schedule(self, params):
        """Start the schedule, now that `fit` knows how many steps it has."""
        self._require_allocator("fit")
        if self.rank_allocator is not None:
            self.rank_allocator.start(
                self.optimizer, params.get("epochs"), params.get("steps")
            )

    def _prune(self):
        """Set what is pruned to zero, whatever changed it in the meantime."""
        if self.rank_allocator is not None:
            self.rank_allocator.prune()

    @in_turn
    def train_on_batch(self, *args, **kwargs):
        """As `keras.Model.train_on_batch`, on the N-sample objective."""
        self._check_enabled("train_on_batch")
        if self.train_function is None:
            self._require_allocator("train_on_batch")
        if self.rank_allocator is not None:
            self.rank_allocator.check_started()
        settings = self.lora_dropout
        with memory_advice(
            "train_on_batch", settings.sampling, settings.num_samples
        ):
            return super().train_on_batch(*args, **kwargs)
