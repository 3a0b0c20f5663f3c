"""What PEFT's AdaLoRA and ours are both fed.

The layers, the runs, and the parameters and gradients of each step, in Keras
orientation: lists with one `(lora_kernel_a, lora_lambda, lora_kernel_b)` for
each layer.
"""

import dataclasses

import numpy as np

# Name -> (input_dim, output_dim), in forward order; first and last are alike.
LAYERS = {"first": (8, 8), "second": (8, 6), "third": (6, 8), "last": (8, 8)}
# Large enough for pruned triplets to come back.
LEARNING_RATE = 0.5
FORWARD_ALPHA = 3


@dataclasses.dataclass(frozen=True)
class Run:
    """One rank schedule, in the words of `RankBudget`."""

    name: str
    initial_rank: int
    target_rank: int
    warmup_steps: int
    final_steps: int
    mask_interval: int
    total_steps: int
    beta_1: float = 0.85
    beta_2: float = 0.85
    num_layers: int = len(LAYERS)

    @property
    def freeze_step(self):
        return self.total_steps - self.final_steps

    @property
    def triplets(self):
        return self.num_layers * self.initial_rank

    @property
    def steps(self):
        return range(1, self.total_steps + 1)


# Fed new parameters at every step.
SCORE_RUNS = [
    Run("every_step", 4, 2, 3, 6, 1, 24),
    Run("no_phases", 5, 2, 0, 0, 3, 20, beta_1=0.9, beta_2=0.6),
    Run("to_zero", 4, 0, 5, 5, 4, 22, beta_1=0.5, beta_2=0.95),
]
# Whose parameters evolve under plain SGD.
CLOSED_RUN = Run("closed", 4, 1, 2, 5, 1, 22)
RESUMED_STEP = 10
REGROWTH_RUN = Run("regrowth", 4, 2, 1, 4, 3, 20)
# Few steps and smoothing by halves, so that no score is rounded.
TIES_RUN = Run("ties", 4, 1, 1, 2, 1, 7, beta_1=0.5, beta_2=0.5)
EQUAL_RUN = Run("equal", 4, 4, 2, 3, 1, 10)


def budget_runs():
    """Schedules for the budget alone: the edges, and random ones."""
    runs = [
        Run("odd_ranks", 7, 3, 5, 11, 3, 61, num_layers=3),
        Run("no_warmup", 3, 1, 0, 20, 1, 60),
        Run("no_final", 3, 1, 20, 0, 10, 60),
        Run("one_step_between", 4, 1, 5, 4, 1, 10),
        Run("two_steps_between", 4, 1, 5, 4, 1, 11),
        Run("nothing_pruned", 3, 3, 2, 3, 1, 12),
        Run("to_zero", 5, 0, 2, 3, 1, 40),
        Run("one_triplet", 2, 1, 0, 0, 1, 9, num_layers=1),
        # 125 * (1 - 4 / 10)**3 is 27, but 26 in double precision.
        Run("rounded", 25, 0, 0, 10, 1, 20, num_layers=5),
        Run("long", 12, 8, 800, 3500, 10, 7000, num_layers=6),
    ]
    generator = np.random.default_rng(7)
    for index in range(30):
        total = int(generator.integers(2, 300))
        warmup = int(generator.integers(0, total))
        final = int(generator.integers(0, total - warmup))
        rank = int(generator.integers(1, 13))
        runs.append(
            Run(
                f"random_{index}",
                initial_rank=rank,
                target_rank=int(generator.integers(0, rank + 1)),
                warmup_steps=warmup,
                final_steps=final,
                mask_interval=int(generator.integers(1, 9)),
                total_steps=total,
                num_layers=int(generator.integers(1, 7)),
            )
        )
    return runs


def random_factors(rank, *seed):
    """Factors, or gradients, of all layers; normal values."""
    generator = np.random.default_rng(seed)

    def normal(*shape):
        return generator.normal(size=shape).astype("float32")

    return [
        (normal(inputs, rank), normal(rank), normal(rank, outputs))
        for inputs, outputs in LAYERS.values()
    ]


def step_values(run, step):
    """Return `(parameters, gradients)` of a step, step 0 being the start.

    Some triplets have larger gradients than others, so that the layers end
    with different ranks.
    """
    sizes = np.random.default_rng(6).lognormal(
        -2, 0.3, (len(LAYERS), run.initial_rank)
    )
    sizes = sizes.astype("float32")
    gradients = [
        (a * size, lam * size, b * size[:, None])
        for (a, lam, b), size in zip(
            random_factors(run.initial_rank, step, 1), sizes, strict=True
        )
    ]
    return random_factors(run.initial_rank, step, 0), gradients


def tied_values(rank):
    """The same value everywhere: all triplets are equally important."""
    return [
        tuple(np.full_like(factor, 0.5) for factor in layer)
        for layer in random_factors(rank, 0)
    ]


def forward_inputs(signed):
    """Inputs, kernel, bias and factors of one layer."""
    generator = np.random.default_rng(3)

    def values(*shape):
        drawn = generator.uniform(0.5, 1.5, shape)
        if signed:
            drawn *= generator.choice([-1, 1], shape)
        return drawn.astype("float32")

    return {
        "x": values(5, 6),
        "kernel": values(6, 8) * np.float32(signed),
        "bias": values(8) * np.float32(signed),
        "lora_kernel_a": values(6, 2),
        "lora_lambda": values(2),
        "lora_kernel_b": values(2, 8),
    }


def flat(rows):
    """Put the rows of all layers behind one another."""
    return np.concatenate([np.ravel(layer) for layer in rows])
