"""Where the two factors of an adapter start, on NumPy arrays.

Each function returns `lora_kernel_a (input_dim, rank)` and `lora_kernel_b
(rank, output_dim)`. PEFT has the same ones under the same names, on transposed
matrices (`LoraLayer.reset_lora_parameters`, `orthogonal_init`, `pissa_init`,
`olora_init`).
"""

import re

import numpy as np

DEFAULT = "he_uniform"
INITIALIZATIONS = (DEFAULT, "gaussian", "orthogonal", "pissa", "olora")
# Those that take the factors from the kernel, whose product is not zero.
FROM_KERNEL = ("pissa", "olora")

_FAST_PISSA = re.compile("pissa_niter_([1-9][0-9]{0,2})")
# Vectors beside those that are asked for, with which they are found sooner.
_OVERSAMPLES = 10
_ORTHOGONAL_SCALE = 0.1  # PEFT's.


def pissa_iterations(word):
    """Return the n of `"pissa_niter_n"`, or `None` of anything else."""
    match = isinstance(word, str) and _FAST_PISSA.fullmatch(word)
    return int(match[1]) if match else None


def is_from_kernel(word):
    """Whether the factors are taken from the kernel."""
    return word in FROM_KERNEL or pissa_iterations(word) is not None


def gaussian(input_dim, output_dim, rank, generator):
    """A of standard deviation `1 / rank`, B of zeros."""
    a = generator.normal(0.0, 1.0 / rank, (input_dim, rank))
    return a, np.zeros((rank, output_dim))


def orthogonal(input_dim, output_dim, rank, generator):
    """Factors that are both random, with a product of zero up to rounding.

    The rows of A lie in the span of one half of an orthonormal basis, the
    columns of B in that of the other. PEFT insists on an even rank, so that
    the halves are equal, which nothing needs: of an odd rank A gets one vector
    more. Masks on inputs and outputs leave the product zero.

    Reference: https://datta0.github.io/posts/rethink-lora-init

    Raises:
        ValueError: If the rank is 1: there is no second half then.
    """
    if rank < 2:
        raise ValueError(
            'init_lora_weights="orthogonal" needs a rank of 2 or more: of rank '
            "1, a product of two factors is zero only if one of them is. "
            f"Received: rank={rank}."
        )
    basis, _ = np.linalg.qr(generator.normal(size=(rank, rank)))
    first, second = basis[0::2], basis[1::2]
    a = generator.normal(size=(input_dim, len(first))) @ first
    b = second.T @ generator.normal(size=(len(second), output_dim))
    return _ORTHOGONAL_SCALE * a, _ORTHOGONAL_SCALE * b


def pissa(kernel, rank, scale, iterations=None, generator=None):
    """The principal part of a kernel, halved between the factors.

    `scale * a @ b` is the kernel's best approximation of that rank. Of the
    singular values S and vectors U, V of the kernel, `a = U sqrt(S / scale)`
    and `b = sqrt(S / scale) V^T`.

    Reference: [Meng et al., 2024](https://arxiv.org/abs/2404.02948), Eq. 2-3,
    where `scale` is 1.

    Args:
        kernel: Array of shape `(input_dim, output_dim)`.
        rank: Positive integer.
        scale: Positive number, multiplier of the product of the factors.
        iterations: `None` for the full decomposition, or how often a random
            subspace is multiplied by the kernel and its transpose to find the
            vectors of the largest values alone.
        generator: `np.random.Generator` of that subspace.

    Raises:
        ValueError: If the kernel has fewer singular values that are not zero.
    """
    _check_finite(kernel)
    if iterations is None:
        left, values, right = np.linalg.svd(kernel, full_matrices=False)
    else:
        left, values, right = _principal_svd(
            kernel, rank, iterations, generator
        )
    present = int(np.count_nonzero(values))
    if present < rank:
        raise ValueError(
            'init_lora_weights="pissa" takes as many singular values as ranks '
            f"from the kernel, which has {present} that are not zero; the "
            f"other ranks would never train. Received: rank={rank}. Choose a "
            'rank that it has, or init_lora_weights="he_uniform", or leave the '
            "layer out with `exclude_layers`."
        )
    root = np.sqrt(values[:rank] / scale)
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _principal_svd(kernel, rank, iterations, generator):
    """Find the largest singular values by randomized subspace iteration.

    Reference: [Halko et al., 2011](https://arxiv.org/abs/0909.4061),
    Algorithms 4.4 and 5.1.
    """
    count = min(rank + _OVERSAMPLES, *kernel.shape)
    start = generator.normal(size=(kernel.shape[1], count))
    basis, _ = np.linalg.qr(kernel @ start.astype(kernel.dtype))
    for _ in range(iterations):
        basis, _ = np.linalg.qr(kernel.T @ basis)
        basis, _ = np.linalg.qr(kernel @ basis)
    left, values, right = np.linalg.svd(basis.T @ kernel, full_matrices=False)
    return basis @ left, values, right


def olora(kernel, rank):
    """The first vectors of the QR decomposition of the transposed kernel.

    The rows of `b` are orthonormal, those of `a.T` triangular.

    Reference: [Büyükakyüz, 2024](https://arxiv.org/abs/2406.01775), Sec. 3.

    Args:
        kernel: Array of shape `(input_dim, output_dim)`.
        rank: Positive integer.

    Raises:
        ValueError: If the kernel is not finite.
    """
    _check_finite(kernel)
    q, r = np.linalg.qr(kernel.T)
    return r[:rank].T, q[:, :rank].T


def _check_finite(kernel):
    if not np.isfinite(kernel).all():
        raise ValueError(
            "The kernel holds values that are not finite (NaN or infinite), so "
            "it cannot be decomposed. Load the model's weights again."
        )
