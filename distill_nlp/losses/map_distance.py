"""How far the maps of two models are apart, head by head, with the gradient written out, a few maps at a time.

A map of one layer is `(B, A, S, S)`, and autograd over it reads and writes several tensors of that size. Both distances
have a short derivative with respect to the scores before the softmax, so that each chunk of maps is passed over as
seldom as PyTorch's kernels allow, in four buffers that the whole batch shares. What is kept for backward is the
gradient of what the scores were computed from, S/D times smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from distill_nlp.losses.chunking import elements_per_chunk
from distill_nlp.losses.maps import additive, both, rows_of


@dataclass(frozen=True)
class Scores:
    """What the maps of one model are the softmax of: `left rightᵀ · scaling + bias` over the tokens that may be seen.

    Args:
        left, right: `(B, A, S, D)`; D may differ between the models.
        scaling: factor on the products.
        mask: broadcastable to `(B, A, S, S)`, boolean (True = may be seen) or additive, or None.
        bias: broadcastable likewise, or None.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@torch.compiler.disable
def map_distance(kind: str, student: Scores, teacher: Scores, tokens: torch.Tensor | None) -> torch.Tensor:
    """The distance of each row of a map to the teacher's, a mean over heads, over a text's real tokens, and over texts.

    kl: `Σ_k t_k log(t_k / s_k)`; mse: `mean_k (s_k - t_k)²` over the real keys. What the student may not see is hidden
    from the teacher's map too, which then sums to 1 over the rest.

    Args:
        kind: "kl" or "mse".
        student: its tensors get gradients, where they require them.
        teacher: with as many heads; gets none.
        tokens: `(B, S)`, 1 for real tokens and 0 for padding; None where all are real.

    Returns:
        A scalar, computed in at least float32. It can be differentiated once.
    """
    tensors = [student.left, student.right, student.bias]
    if not torch.is_grad_enabled():
        # `needs_input_grad` does not know of no_grad.
        tensors = [None if tensor is None else tensor.detach() for tensor in tensors]
    return _MapDistance.apply(kind, student, teacher, tokens, *tensors)


class _MapDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kind: str, student: Scores, teacher: Scores, tokens: torch.Tensor | None, *tensors):
        batch, heads, length, _ = student.left.shape
        dtype = torch.float32
        for tensor in (student.left, student.right, teacher.left, teacher.right):
            dtype = torch.promote_types(dtype, tensor.dtype)
        weights = _weights(kind, tokens, (batch, heads, length), dtype, student.left.device)
        # Not in float16, where gradients that backward has not multiplied with the loss scale yet would vanish.
        for_left, for_right, for_bias = gradients = [
            torch.zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, dtype), device=tensor.device)
            if wanted
            else None
            for tensor, wanted in zip(tensors, ctx.needs_input_grad[4:], strict=True)
        ]
        chunks = list(_chunks(batch, heads, length, elements_per_chunk(student.left.device)))
        largest = max(chunk.maps * chunk.height for chunk in chunks) * length
        buffers = [torch.empty(largest, dtype=dtype, device=student.left.device) for _ in range(4)]
        values, rows = [], None
        for chunk in chunks:
            if chunk.rows != rows:
                # Once for all heads.
                rows = chunk.rows
                seen, seen_by_both = _masks_of(rows, student, teacher, dtype)
            shape = (chunk.maps, chunk.height, length)
            scores, goal, a, b = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
            left, right = _write_scores(scores, student, chunk, seen)
            _write_scores(goal, teacher, chunk, seen_by_both)
            weight = chunk.of(weights).expand(*chunk.grid, -1, -1).reshape(chunk.maps, chunk.height, 1)
            distance, gradient = _DISTANCES[kind](scores, goal, a, b, any(ctx.needs_input_grad))
            values.append(distance.mul_(weight).sum())
            # The weights go where there are least numbers.
            if for_left is not None:
                found = (gradient @ right).mul_(weight)
                chunk.of(for_left).add_(found.view(*chunk.grid, *found.shape[1:]), alpha=student.scaling)
            if for_right is not None:
                found = gradient.mT @ left.mul_(weight)
                chunk.of(for_right, queries=False).add_(found.view(*chunk.grid, *found.shape[1:]))
            if for_bias is not None:
                part = chunk.of(for_bias)
                part.add_(gradient.mul_(weight).view(*chunk.grid, *shape[1:]).sum_to_size(part.shape))
        ctx.save_for_backward(*gradients)
        return torch.stack(values).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: torch.Tensor):
        """Autograd brings the products into the dtype of the inputs."""
        gradients = (None if gradient is None else gradient * upstream for gradient in ctx.saved_tensors)
        return None, None, None, None, *gradients


def _masks_of(
    rows: slice, student: Scores, teacher: Scores, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The student's mask of these rows, and one that hides what either mask hides; both to be added."""
    seen = rows_of(student.mask, rows)
    masks = seen, seen if teacher.mask is student.mask else both(rows_of(teacher.mask, rows), seen)
    return tuple(None if mask is None else additive(mask, dtype) for mask in masks)


def _write_scores(
    out: torch.Tensor, of: Scores, chunk: _Chunk, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes the scores of the chunk into `out`, `(maps, queries, S)`, and gives what they are the product of.

    Args:
        mask: of the chunk's rows, to be added.
    """
    left = (chunk.of(of.left).to(out.dtype) * of.scaling).flatten(0, 1)
    right = chunk.of(of.right, queries=False).to(out.dtype).flatten(0, 1)
    torch.bmm(left, right.mT, out=out)
    grid = out.view(*chunk.grid, *out.shape[1:])
    for added in (chunk.of(of.bias), chunk.of(mask, rows=False)):
        if added is not None:
            grid.add_(added)
    return left, right


def _kl(
    scores: torch.Tensor, goal: torch.Tensor, a: torch.Tensor, b: torch.Tensor, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The distance of each row, and its derivative with respect to the scores: of `Σ t log(t / s)` it is `s - t`.

    Args:
        scores, goal: of the student and of the teacher, `(maps, queries, S)`; written over, as are `a` and `b`.
        wanted: the derivative, too.
    """
    torch.log_softmax(scores, dim=-1, out=a)
    torch.log_softmax(goal, dim=-1, out=b)
    torch.exp(b, out=goal)
    distance = b.sub_(a).mul_(goal).sum(dim=-1, keepdim=True)
    return distance, a.exp_().sub_(goal) if wanted else None


def _mse(
    scores: torch.Tensor, goal: torch.Tensor, a: torch.Tensor, b: torch.Tensor, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same of `Σ (s - t)²`: with `d = s - t` it is `2 (d s - s Σ d s)`."""
    torch.softmax(scores, dim=-1, out=a)
    torch.softmax(goal, dim=-1, out=b)
    difference = torch.sub(a, b, out=b)
    distance = torch.mul(difference, difference, out=goal).sum(dim=-1, keepdim=True)
    if not wanted:
        return distance, None
    along = torch.mul(difference, a, out=goal)
    return distance, along.addcmul_(a, along.sum(dim=-1, keepdim=True), value=-1).mul_(2)


_DISTANCES = {"kl": _kl, "mse": _mse}


def _weights(
    kind: str, tokens: torch.Tensor | None, size: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """What each row of a map counts, so that the sum is the mean: `(B or 1, 1, S, 1)`."""
    batch, heads, length = size
    if tokens is None:
        weights, keys = torch.full((1, length), 1 / length, dtype=dtype, device=device), length
    else:
        real = tokens.to(dtype)
        keys = real.sum(dim=1, keepdim=True).clamp(min=1)
        weights = real / keys
    return (weights if kind == "kl" else weights / keys)[:, None, :, None] / (batch * heads)


@dataclass(frozen=True)
class _Chunk:
    """Maps that go together: rows of the batch with all of their heads, or heads of one row, or queries of one map."""

    rows: slice
    heads: slice
    queries: slice

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.heads.stop - self.heads.start

    @property
    def maps(self) -> int:
        return math.prod(self.grid)

    @property
    def height(self) -> int:
        return self.queries.stop - self.queries.start

    def of(self, tensor: torch.Tensor | None, rows: bool = True, queries: bool = True) -> torch.Tensor | None:
        """What belongs to the chunk of a tensor `(B or 1, A or 1, S or 1, ...)`.

        Args:
            rows, queries: without them, all of the first or of the third dimension.
        """
        if tensor is None:
            return None
        wanted = (self.rows if rows else slice(None), self.heads, self.queries if queries else slice(None))
        return tensor[tuple(slice(None) if n == 1 else s for n, s in zip(tensor.shape, wanted, strict=False))]


def _chunks(batch: int, heads: int, length: int, elements: int) -> Iterator[_Chunk]:
    """All maps, in chunks of at most so many numbers, or of one row of a map where that has more."""
    maps = elements // length**2
    rows, together = max(1, maps // heads), max(1, min(maps, heads))
    queries = length if maps else max(1, elements // length)
    for row in _slices(batch, rows):
        for head in _slices(heads, together):
            for query in _slices(length, queries):
                yield _Chunk(row, head, query)


def _slices(count: int, most: int) -> Iterator[slice]:
    """As few as there can be, of about one size."""
    size = -(-count // -(-count // most))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
