"""How far the maps of two models are apart, head by head, with the gradient written out, a few maps at a time.

A map of one layer is `(B, A, S, S)`, and autograd over it reads and writes several tensors of that size. Both distances
have a short derivative with respect to the scores before the softmax, so that each chunk of maps is passed over few
times, in three buffers that the whole batch shares. What is kept for backward is the gradient of what the scores were
computed from, S/D times smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from distill_nlp.losses.chunking import elements_per_chunk
from distill_nlp.losses.maps import additive, both


@dataclass(frozen=True)
class Scores:
    """What the maps of one model are the softmax of: `left rightᵀ · scaling + bias` over the tokens that may be seen.

    Args:
        left, right: `(B, A, S, D)`; D may differ between the models.
        scaling: factor on the products.
        mask: `(B or 1, A or 1, S or 1, S)`, boolean (True = may be seen) or additive, or None.
        bias: `(B or 1, A or 1, S or 1, S)`, or None.
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
        teacher: of as many texts, heads and tokens; gets none.
        tokens: `(B, S)`, 1 for real tokens and 0 for padding; None where all are real.

    Returns:
        A scalar, computed in at least float32. It can be differentiated once.

    Raises:
        ValueError: the two models' maps are not of one size.
    """
    sizes = [tuple(side.left.shape[:3]) for side in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the student has maps of {sizes[0]} (texts, heads, tokens), the teacher of {sizes[1]}: they cannot be "
            "compared head by head"
        )
    # One tensor on both sides has one gradient.
    tensors = [student.left, None if student.right is student.left else student.right, student.bias]
    if not torch.is_grad_enabled():
        # `needs_input_grad` does not know of no_grad.
        tensors = [None if tensor is None else tensor.detach() for tensor in tensors]
    return _MapDistance.apply(kind, student, teacher, tokens, *tensors)


class _MapDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kind: str, student: Scores, teacher: Scores, tokens: torch.Tensor | None, *tensors):
        batch, heads, length, _ = student.left.shape
        dtype = torch.float32
        for tensor in (student.left, student.right, student.bias, teacher.left, teacher.right, teacher.bias):
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
        weights = _weights(kind, tokens, (batch, heads, length), dtype, student.left.device)
        # Not in float16, where gradients that backward has not multiplied with the loss scale yet would vanish.
        for_left, for_right, for_bias = gradients = [
            torch.zeros_like(tensor, dtype=dtype) if wanted else None
            for tensor, wanted in zip(tensors, ctx.needs_input_grad[4:], strict=True)
        ]
        if student.right is student.left:
            for_right = for_left
        chunks = list(_chunks(batch, heads, length, elements_per_chunk(student.left.device)))
        largest = max(chunk.maps * chunk.height for chunk in chunks) * length
        buffers = [torch.empty(largest, dtype=dtype, device=student.left.device) for _ in range(3)]
        values, before = [], None
        for chunk in chunks:
            if (chunk.rows, chunk.queries) != before:
                # Once for all heads.
                before = chunk.rows, chunk.queries
                seen, seen_by_both = _masks_of(chunk, student, teacher, dtype)
            shape = (chunk.maps, chunk.height, length)
            scores, goal, spare = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
            left, right = _write_scores(scores, student, chunk, seen)
            _write_scores(goal, teacher, chunk, seen_by_both)
            weight = chunk.of(weights).expand(*chunk.grid, -1, -1).reshape(chunk.maps, chunk.height, 1)
            distance, gradient = _DISTANCES[kind](scores, goal, spare, any(ctx.needs_input_grad))
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
    chunk: _Chunk, student: Scores, teacher: Scores, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The student's mask of these rows and queries, and one that hides what either mask hides; both to be added."""
    seen = chunk.of(student.mask, heads=False)
    masks = seen, seen if teacher.mask is student.mask else both(chunk.of(teacher.mask, heads=False), seen)
    return tuple(None if mask is None else additive(mask, dtype) for mask in masks)


def _write_scores(
    out: torch.Tensor, side: Scores, chunk: _Chunk, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes the scores of the chunk into `out`, `(maps, queries, S)`, and gives the two that they are the product of.

    Args:
        mask: of the chunk's rows and queries, to be added.
    """
    # Scaled, and so a tensor of its own.
    left = (chunk.of(side.left).to(out.dtype) * side.scaling).flatten(0, 1)
    right = chunk.of(side.right, queries=False).to(out.dtype).flatten(0, 1)
    torch.bmm(left, right.mT, out=out)
    grid = out.view(*chunk.grid, *out.shape[1:])
    for added in (chunk.of(side.bias), chunk.of(mask, rows=False, queries=False)):
        if added is not None:
            grid.add_(added)
    return left, right


def _kl(
    scores: torch.Tensor, goal: torch.Tensor, spare: torch.Tensor, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The distance of each row, and its derivative with respect to the scores: of `Σ t log(t / s)` it is `s - t`.

    Args:
        scores, goal: of the student and of the teacher, `(maps, queries, S)`; written over, as is `spare`.
        wanted: the derivative, too.
    """
    student = torch.log_softmax(scores, dim=-1, out=spare)
    teacher = torch.log_softmax(goal, dim=-1, out=scores)
    probabilities = torch.exp(teacher, out=goal)
    distance = teacher.sub_(student).mul_(probabilities).sum(dim=-1, keepdim=True)
    return distance, student.exp_().sub_(probabilities) if wanted else None


def _mse(
    scores: torch.Tensor, goal: torch.Tensor, spare: torch.Tensor, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same of `Σ (s - t)²`: with `d = s - t` it is `2 (d s - s Σ d s)`."""
    student = torch.softmax(scores, dim=-1, out=spare)
    difference = torch.sub(student, torch.softmax(goal, dim=-1, out=scores), out=scores)
    distance = torch.mul(difference, difference, out=goal).sum(dim=-1, keepdim=True)
    if not wanted:
        return distance, None
    along = difference.mul_(student)
    return distance, along.addcmul_(student, along.sum(dim=-1, keepdim=True), value=-1).mul_(2)


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

    def of(
        self, tensor: torch.Tensor | None, rows: bool = True, heads: bool = True, queries: bool = True
    ) -> torch.Tensor | None:
        """What belongs to the chunk of a tensor `(B or 1, A or 1, S or 1, ...)`.

        Args:
            rows, heads, queries: False for all that there are.
        """
        if tensor is None:
            return None
        wanted = ((rows, self.rows), (heads, self.heads), (queries, self.queries))
        cuts = zip(tensor.shape, wanted, strict=False)
        return tensor[tuple(part if cut and size > 1 else slice(None) for size, (cut, part) in cuts)]


def _chunks(batch: int, heads: int, length: int, elements: int) -> Iterator[_Chunk]:
    """All maps, in chunks of at most so many numbers, or of one row of a map where that has more; heads innermost."""
    maps = elements // length**2
    together, height = (maps, length) if maps else (1, max(1, elements // length))
    for rows in _slices(batch, max(1, maps // heads)):
        for queries in _slices(length, height):
            for part in _slices(heads, together):
                yield _Chunk(rows, part, queries)


def _slices(count: int, most: int) -> Iterator[slice]:
    """As few as there can be, of one size but for the last."""
    size = -(-count // -(-count // most))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
