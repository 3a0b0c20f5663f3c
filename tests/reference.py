"""The papers' equations in plain NumPy, float64, with no code shared.

Keras orientation throughout: a kernel is `(input_dim, output_dim)`, so that
the papers' `W x` reads `x @ kernel` here, their `B A` reads `a @ b`, and

    A of the paper, (r, in)   is  a.T  with  a = lora_kernel_a (in, r)
    B of the paper, (out, r)  is  b.T  with  b = lora_kernel_b (r, out)

[L] is Lin et al. 2024, arXiv 2404.09610. Forward passes form the full masked
matrix, as the equations are written; only the gradients, which are derived by
hand, use the factored order. `test_reference.py` holds one against the other.
"""

import dataclasses

import numpy as np


def bernoulli(draws, rate):
    """`m ~ Bern(1 - p)` from uniform draws in `[0, 1)`: 1 keeps, 0 drops."""
    return (np.asarray(draws, "float64") >= rate).astype("float64")


def balanced(draws):
    """Latin hypercube sampling: N evenly spaced draws of N + 1 independent.

    Entry by entry, the n-th smallest of the first N goes to the n-th of N
    equal intervals, and the last one says where in the interval it lies.
    """
    *values, place = np.asarray(draws, "float64")
    order = np.argsort(values, axis=0, kind="stable")
    found = np.empty_like(values)
    for stratum, which in enumerate(order):
        points = (stratum + place) / len(values)
        np.put_along_axis(found, which[None], points[None], axis=0)
    return found


def inverted(mask, rate, rescale):
    """What multiplies the factors: the mask, or the mask over `1 - p`."""
    return np.asarray(mask, "float64") / ((1 - rate) if rescale else 1.0)


def mean_mask(size, rate, rescale):
    """The expectation of `inverted(mask)`; it makes the mean network."""
    return np.full(size, 1.0 if rescale else 1.0 - rate)


def masked_factors(a, b, mask_a, mask_b):
    """[L] Eq. 2: rows of `a` and columns of `b` are dropped, ranks never."""
    return np.diag(mask_a) @ a, b @ np.diag(mask_b)


def delta_matrix(a, b, mask_a, mask_b, scaling):
    """The delta of [L] Eq. 3 as a full `(input_dim, output_dim)` matrix."""
    masked_a, masked_b = masked_factors(a, b, mask_a, mask_b)
    return scaling * (masked_a @ masked_b)


def adapted_product(x, kernel, a, b, mask_a, mask_b, scaling):
    """[L] Eq. 3, `h = W0 x + B^ A^ x`, before bias and activation."""
    return x @ (kernel + delta_matrix(a, b, mask_a, mask_b, scaling))


def einsum_delta_matrix(equation, kernel_shape, a, b, mask_a, mask_b, scaling):
    """The delta of an einsum kernel, in the kernel's own shape.

    The factors act on all contracted axes and on all kept ones, each in the
    order in which the kernel has them.
    """
    left, outputs = equation.split("->")
    kernel = left.split(",")[1]
    size = dict(zip(kernel, kernel_shape, strict=True))
    kept = "".join(c for c in kernel if c in outputs)
    contracted = "".join(c for c in kernel if c not in outputs)
    masked_a, masked_b = masked_factors(a, b, mask_a, mask_b)
    masked_a = masked_a.reshape([*(size[c] for c in contracted), -1])
    masked_b = masked_b.reshape([-1, *(size[c] for c in kept)])
    return scaling * np.einsum(
        f"{contracted}R,R{kept}->{kernel}", masked_a, masked_b
    )


def einsum_product(equation, x, kernel, a, b, mask_a, mask_b, scaling):
    """[L] Eq. 3 for `keras.layers.EinsumDense`, before bias and activation."""
    delta = einsum_delta_matrix(
        equation, kernel.shape, a, b, mask_a, mask_b, scaling
    )
    return np.einsum(equation, x, kernel + delta)


def adalora_delta_matrix(q, lam, p, mask_q, mask_p, scaling=1.0):
    """[L] Eq. 4-6: `P^ Lambda Q^`; the singular values are never masked.

    Args:
        q: Array `(input_dim, rank)`, the transpose of the paper's Q.
        lam: Array `(rank,)`, the diagonal of Lambda.
        p: Array `(rank, output_dim)`, the transpose of the paper's P.
        mask_q: Array `(input_dim,)`.
        mask_p: Array `(output_dim,)`.
        scaling: `alpha / rank`.
    """
    masked_q, masked_p = masked_factors(q, p, mask_q, mask_p)
    return scaling * (masked_q @ np.diag(lam) @ masked_p)


def two_factors(*factors):
    """`A, B`, or `Q Lambda, P` of AdaLoRA: two factors with the same delta."""
    a, *middle, b = factors
    for singular_values in middle:
        a = a @ np.diag(singular_values)
    return a, b


def cross_entropy(logits, labels):
    """Mean softmax cross-entropy and its gradient by the logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    one_hot = np.eye(logits.shape[1])[labels]
    loss = -np.mean(np.sum(one_hot * (shifted - log_sum), axis=1))
    return loss, (np.exp(shifted - log_sum) - one_hot) / len(logits)


def mean_squared_error(outputs, targets):
    """Mean of all squared errors and its gradient by the outputs."""
    error = outputs - targets
    return np.mean(error**2), 2 * error / error.size


def softmax(logits):
    """Probabilities of the last axis."""
    exponential = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponential / exponential.sum(axis=-1, keepdims=True)


@dataclasses.dataclass
class AdaptedDense:
    """A dense layer `(in, out)` with a LoRA Dropout adapter and tanh."""

    kernel: np.ndarray
    bias: np.ndarray
    a: np.ndarray
    b: np.ndarray
    scaling: float

    def forward(self, x, mask_a, mask_b):
        """Apply [L] Eq. 3 with one mask for each example of `x`."""
        rows = [
            adapted_product(
                row, self.kernel, self.a, self.b, m_a, m_b, self.scaling
            )
            for row, m_a, m_b in zip(x, mask_a, mask_b, strict=True)
        ]
        return np.tanh(np.stack(rows) + self.bias)

    def backward(self, x, y, mask_a, mask_b, gradient):
        """Gradients by `a`, `b` and `x`, given `y = forward(x)` and its own.

        With `u = x * mask_a`, `v = u @ a`, `w = v @ b`:
        `y = tanh(x @ kernel + bias + scaling * w * mask_b)`.
        """
        before_tanh = gradient * (1 - y**2)
        masked = x * mask_a
        by_w = self.scaling * before_tanh * mask_b
        by_v = by_w @ self.b.T
        by_x = before_tanh @ self.kernel.T + (by_v @ self.a.T) * mask_a
        return masked.T @ by_v, (masked @ self.a).T @ by_w, by_x


@dataclasses.dataclass
class Network:
    """Adapted dense layers, then a trainable dense head without adapter.

    `masks` is, for one mask instance, a list of `(mask_a, mask_b)`, one pair
    for each layer, of shapes `(1 or examples, features)`: one mask for the
    whole batch or one for each example.
    """

    layers: list
    head_kernel: np.ndarray
    head_bias: np.ndarray

    def outputs(self, x, masks):
        """`M(x; theta0 + delta(m))` for one mask instance m."""
        return self._activations(x, masks)[-1] @ self.head_kernel + (
            self.head_bias
        )

    def mean_network_outputs(self, x, rate, rescale):
        """The deterministic pass: every mask at its expectation."""
        masks = [
            (
                mean_mask((1, len(layer.a)), rate, rescale),
                mean_mask((1, layer.b.shape[1]), rate, rescale),
            )
            for layer in self.layers
        ]
        return self.outputs(x, masks)

    def ensemble_outputs(self, x, instances):
        """[L] Eq. 8: the mean output over the mask instances."""
        return np.mean([self.outputs(x, masks) for masks in instances], axis=0)

    def objective(self, x, y, instances, loss):
        """[L] Eq. 7: the mean loss over the mask instances."""
        losses = [loss(self.outputs(x, masks), y)[0] for masks in instances]
        return sum(losses) / len(losses)

    def gradients(self, x, y, instances, loss):
        """Gradients of [L] Eq. 7, a dictionary keyed as `parameters`."""
        total = {k: np.zeros_like(v) for k, v in self.parameters().items()}
        for masks in instances:
            for key, value in self._gradients(x, y, masks, loss).items():
                total[key] += value / len(instances)
        return total

    def parameters(self):
        """The trainable arrays: both factors of each layer, and the head."""
        found = {"head_kernel": self.head_kernel, "head_bias": self.head_bias}
        for i, layer in enumerate(self.layers):
            found[f"a{i}"] = layer.a
            found[f"b{i}"] = layer.b
        return found

    def _activations(self, x, masks):
        found = [x]
        for layer, pair in zip(self.layers, masks, strict=True):
            found.append(layer.forward(found[-1], *_per_example(pair, len(x))))
        return found

    def _gradients(self, x, y, masks, loss):
        activations = self._activations(x, masks)
        outputs = activations[-1] @ self.head_kernel + self.head_bias
        by_outputs = loss(outputs, y)[1]
        found = {
            "head_kernel": activations[-1].T @ by_outputs,
            "head_bias": by_outputs.sum(axis=0),
        }
        gradient = by_outputs @ self.head_kernel.T
        for i in reversed(range(len(self.layers))):
            found[f"a{i}"], found[f"b{i}"], gradient = self.layers[i].backward(
                activations[i],
                activations[i + 1],
                *_per_example(masks[i], len(x)),
                gradient,
            )
        return found


def _per_example(pair, examples):
    return [np.broadcast_to(m, (examples, m.shape[1])) for m in pair]
