"""Head, softmax and cross-entropy as one step that never stores the logits.

Logits are the largest tensor of a small model: V of them per token, where a block keeps a few times its width. They go
through head and softmax in chunks of rows that stay in cache (CPU) or are small beside the activations (GPU), and the
gradient of each chunk is taken right away. Shapes: M tokens, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from qpipe.memory import GPU_LOGITS

if torch.cuda.is_available():
    from qpipe import triton_kernels

CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": GPU_LOGITS}
"""Logits held at once: 2 MiB in float32 on CPU (about a level-2 cache), 0.5 GiB in bfloat16 on a GPU."""

_ROW_TILE = 256
"""Rows that fill tiles of matrix products on GPUs."""


@torch.compiler.disable
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, rounded: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy of `hidden @ weight.T` against `targets` without storing the logits.

    Parameters
    ----------
    hidden
        Features, shape (M, D).
    weight
        Head, shape (V, D).
    targets
        Correct classes, shape (M,), int64.
    rounded
        The head in autocast's precision, if it is there already.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, rounded)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss, row chunk by row chunk, with the gradients taken on the way.

    d loss / d logits = (softmax - onehot) / M needs nothing but the chunk itself, so its two products (with the head
    for the features, with the features for the head) are formed while the chunk is still in cache. Backward only
    scales them. Matmuls run in autocast's precision, softmax and sums in float32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rounded: Tensor | None) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            features, head = hidden.to(dtype), weight.to(dtype) if rounded is None else rounded
            rows = chunk_rows(hidden.device, weight.shape[0])
            losses = torch.empty(len(features), dtype=torch.float32, device=hidden.device)
            hidden_gradient = torch.empty_like(features)
            weight_gradient = torch.empty_like(weight)
            for start in range(0, len(features), rows):
                chunk = slice(start, start + rows)
                part, target = features[chunk], targets[chunk, None]
                gradient = _gradient(part @ head.T, target, 1 / len(features), losses[chunk])
                torch.mm(gradient, head, out=hidden_gradient[chunk])
                _add_product(weight_gradient, gradient, part, first=start == 0)
                del gradient  # so that the next chunk of logits takes its place
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.dtype = hidden.dtype
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        times = triton_kernels.times_ if hidden_gradient.is_cuda else torch.mul
        return times(hidden_gradient.to(ctx.dtype), outputs[0]), times(weight_gradient, outputs[0]), None, None


def _gradient(logits: Tensor, target: Tensor, scale: float, losses: Tensor) -> Tensor:
    """Put cross-entropies of logits (M, V) and classes (M, 1) into `losses` (M); return `scale` times their gradient.

    The logits may be overwritten.
    """
    if logits.is_cuda:
        triton_kernels.softmax_gradient_(logits, target, scale, losses)
        return logits
    # Softmax's exponential is faster than the library's exp. The likeliest class, at least 1 / V, tells the sum of all.
    top, correct = logits.amax(1).float(), logits.gather(1, target)[:, 0].float()
    whole = logits.dtype == torch.float32
    probability = torch.softmax(logits, -1, out=logits) if whole else torch.softmax(logits, -1, dtype=torch.float32)
    torch.sub(top.sub_(probability.amax(1).log_()), correct, out=losses)
    probability.scatter_add_(1, target, probability.new_full((), -1.0).expand_as(target))
    return probability.mul_(scale).to(logits.dtype)


def _add_product(total: Tensor, gradient: Tensor, part: Tensor, *, first: bool) -> None:
    """Add gradient^T part to the float32 `total`, accumulating in float32 whatever the factors' precision.

    The first product replaces what is there.
    """
    if gradient.dtype == total.dtype:
        torch.addmm(total, gradient.T, part, beta=0 if first else 1, out=total)
    elif total.is_cuda and first:
        torch.mm(gradient.T, part, out_dtype=total.dtype, out=total)
    elif total.is_cuda:
        torch.addmm(total, gradient.T, part, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(gradient.T @ part)
    else:
        total += gradient.T @ part


def chunk_rows(device: torch.device, vocab_size: int) -> int:
    """Return how many rows of logits to hold at once on a device.

    On GPUs a multiple of `_ROW_TILE`, where they are that many: products of other sizes run up to a fifth slower.
    """
    rows = max(16, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) // vocab_size)
    return rows - rows % _ROW_TILE if device.type == "cuda" and rows > _ROW_TILE else rows
