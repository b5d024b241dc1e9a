"""Losses over (S, S) maps, a few rows of the batch at a time, with their gradients computed on the way forward.

A map of one layer is `(B, A, S, S)`: at 8 x 12 x 512 x 512 it is 100 MB, and a loss of it needs several. A loss that is
computed row by row needs none of them later on: its gradient with respect to queries and keys, which are S/D times
smaller, is known as soon as its value is, up to the factor that backward will bring. So the maps of a few rows exist at
a time, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from distill_nlp.losses.base import upcast
from distill_nlp.losses.maps import rows_of

ELEMENTS_PER_CHUNK = 1 << 19
"""Numbers in one map of a chunk on a CPU (2 MB in float32): few enough for the cache of a core."""

ELEMENTS_PER_CHUNK_ON_ACCELERATORS = 1 << 23
"""On other devices (32 MB in float32): enough that a kernel takes longer than its launch."""

RowLoss = Callable[..., torch.Tensor]
"""`(rows: slice, *parts) -> (rows,)`: the loss of each of these rows of the batch, from their part of each tensor."""


def elements_per_chunk(device: torch.device) -> int:
    """The most numbers of a map that are computed together there."""
    return ELEMENTS_PER_CHUNK if device.type == "cpu" else ELEMENTS_PER_CHUNK_ON_ACCELERATORS


@torch.compiler.disable
def rowwise(loss: RowLoss, elements_per_row: int, *tensors: torch.Tensor) -> torch.Tensor:
    """Gives the mean of `loss(rows, *(tensor[rows] for tensor in tensors))` over all rows, computed a chunk at a time.

    Args:
        loss: what it reads besides `tensors` gets no gradient; it must compute each row from that row alone.
        elements_per_row: size of the largest intermediate of one row, which decides how many rows go together.
        *tensors: the first `(B, ...)`, the others too or `(1, ...)`, which is shared by all rows; those that require
            gradient get it. `loss` gets them in at least float32.
    """
    elements = elements_per_chunk(tensors[0].device)
    if not torch.is_grad_enabled():
        # `needs_input_grad` does not know of no_grad.
        tensors = tuple(tensor.detach() for tensor in tensors)
    return _Rowwise.apply(loss, max(1, elements // max(1, elements_per_row)), *tensors)


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: RowLoss, chunk: int, *tensors: torch.Tensor) -> torch.Tensor:
        wanted = ctx.needs_input_grad[2:]
        count = len(tensors[0])
        # Not in float16, where gradients that backward has not multiplied with the loss scale yet would vanish.
        gradients = [
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) if want else None
            for tensor, want in zip(tensors, wanted, strict=True)
        ]
        values = []
        for start in range(0, count, chunk):
            rows = slice(start, start + chunk)
            with torch.set_grad_enabled(any(wanted)):
                parts = [
                    upcast(rows_of(tensor, rows).detach()).requires_grad_(want)
                    for tensor, want in zip(tensors, wanted, strict=True)
                ]
                value = loss(rows, *parts).sum() / count
                leaves = [part for part in parts if part.requires_grad]
                found = iter(torch.autograd.grad(value, leaves) if leaves else ())
            values.append(value.detach())
            for gradient in gradients:
                if gradient is not None:
                    rows_of(gradient, rows).add_(next(found))
        ctx.save_for_backward(*gradients)
        return torch.stack(values).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: torch.Tensor):
        """The factor of a mean is the same for all rows, so that a shared tensor needs the sum of their gradients only.

        Autograd brings the products into the dtype of the inputs.
        """
        return None, None, *(None if gradient is None else gradient * upstream for gradient in ctx.saved_tensors)
