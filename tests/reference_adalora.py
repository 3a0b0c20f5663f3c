"""AdaLoRA in plain NumPy, float64: one training run written out.

[A] is Zhang et al. 2023, arXiv 2303.10512. A layer's parameters are `q (in,
r)`, `lam (r,)`, `p (r, out)`: the transposes of the paper's Q and P, and the
diagonal of its Lambda. Losses and gradients come from `reference.py`, which
knows two factors only: `q @ diag(lam)` and `p`.
"""

import copy
import dataclasses

import numpy as np
import reference


def budget(step, schedule, initial, target):
    """`b(t)`, [A] Eq. 12, with `schedule = (t_i, t_f, interval, T)`."""
    warmup, final, _, total = schedule
    if step <= warmup:
        return initial
    if step > total - final:
        return target
    left = 1 - (step - warmup) / (total - final - warmup)
    return int((initial - target) * left**3 + target)


def chooses(step, schedule):
    """Whether ranks are chosen after a step."""
    warmup, final, interval, total = schedule
    if step == total - final:
        return True
    return warmup < step < total - final and step % interval == 0


def orthogonality(layer):
    """`R(P, Q)` of one layer, [A] Eq. 4, and its gradients by `q` and `p`."""
    q, _, p = layer
    by_q = q.T @ q - np.eye(q.shape[1])
    by_p = p @ p.T - np.eye(p.shape[0])
    value = np.sum(by_q**2) + np.sum(by_p**2)
    return value, 4 * q @ by_q, 4 * by_p @ p


@dataclasses.dataclass
class Run:
    """Training with SGD on the N-sample objective plus the penalty.

    Attributes:
        network: A `reference.Network`; its factors are set before each use.
        layers: List of `[q, lam, p]`.
        schedule: `(warmup_steps, final_steps, mask_interval, total_steps)`.
        target: Triplets kept at the end.
        scaling: `alpha / rank`.
    """

    network: reference.Network
    layers: list
    schedule: tuple
    target: int
    learning_rate: float
    penalty: float
    betas: tuple = (0.85, 0.85)
    step: int = 0

    def __post_init__(self):
        self.sensitivity = [[0 * w for w in layer] for layer in self.layers]
        self.uncertainty = copy.deepcopy(self.sensitivity)
        self.kept = [np.ones(len(lam), bool) for _, lam, _ in self.layers]

    def train_step(self, x, y, instances, loss):
        """Take one step; return the loss and the penalty before it."""
        self._set_factors()
        value = self.network.objective(x, y, instances, loss)
        found = self.network.gradients(x, y, instances, loss)
        gradients, penalty = [], 0.0
        for index, (q, lam, p) in enumerate(self.layers):
            by_a, by_b = found[f"a{index}"], found[f"b{index}"]
            r, by_q, by_p = orthogonality((q, lam, p))
            penalty += r
            gradients.append(
                [
                    by_a * lam + self.penalty * by_q,
                    np.sum(by_a * q, axis=0),
                    by_b + self.penalty * by_p,
                ]
            )
        self.network.head_kernel -= self.learning_rate * found["head_kernel"]
        self.network.head_bias -= self.learning_rate * found["head_bias"]
        for layer, gradient in zip(self.layers, gradients, strict=True):
            for weight, by_weight in zip(layer, gradient, strict=True):
                weight -= self.learning_rate * by_weight
        self._allocate(gradients)
        self._set_factors()
        return value, penalty

    def _set_factors(self):
        for layer, factors in zip(
            self.network.layers, self.layers, strict=True
        ):
            layer.a, layer.b = reference.two_factors(*factors)

    def _allocate(self, gradients):
        self.step += 1
        total, final = self.schedule[3], self.schedule[1]
        if self.step < total - final:
            self._update_scores(gradients)
        if chooses(self.step, self.schedule):
            self._choose()
        for (_, lam, _), kept in zip(self.layers, self.kept, strict=True):
            lam[~kept] = 0.0

    def _update_scores(self, gradients):
        """[A] Eq. 8-10."""
        b1, b2 = self.betas
        for i, layer in enumerate(self.layers):
            for j, weight in enumerate(layer):
                now = np.abs(weight * gradients[i][j])
                mean = b1 * self.sensitivity[i][j] + (1 - b1) * now
                self.sensitivity[i][j] = mean
                self.uncertainty[i][j] = b2 * self.uncertainty[i][j] + (
                    1 - b2
                ) * np.abs(now - mean)

    def importance(self):
        """[A] Eq. 7 and 11, one array for each layer."""
        found = []
        for sensitivity, uncertainty in zip(
            self.sensitivity, self.uncertainty, strict=True
        ):
            q, lam, p = (
                s * u for s, u in zip(sensitivity, uncertainty, strict=True)
            )
            found.append(lam + q.mean(axis=0) + p.mean(axis=1))
        return found

    def _choose(self):
        """[A] Eq. 6: the triplets of highest importance over all layers."""
        scores = np.concatenate(self.importance())
        keep = budget(self.step, self.schedule, len(scores), self.target)
        chosen = np.zeros(len(scores), bool)
        chosen[np.argsort(-scores, kind="stable")[:keep]] = True
        sizes = [len(lam) for _, lam, _ in self.layers]
        self.kept = np.split(chosen, np.cumsum(sizes)[:-1])
