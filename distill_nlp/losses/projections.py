"""Learned maps from the student's width to the teacher's, and their start by least squares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

PROJECTIONS = ("auto", "none", "linear", "shared", "low_rank", "orthogonal")


class Projections(nn.ModuleList):
    """One projection per pair of layers, or one for all.

    Args:
        kind: "none": the identity, for equal widths; "linear": an affine map for each pair; "shared": one for all
            pairs; "low_rank": two linear maps with `rank` numbers between; "orthogonal": a linear map that keeps
            lengths and angles (as far as the widths allow); "auto": "none" where the widths are equal, else "linear".
        pairs: number of pairs of layers.
        student_width, teacher_width: H_student and H_teacher.
        rank: of "low_rank".

    Raises:
        ValueError: "none" with different widths; a rank that is not below both widths.
    """

    def __init__(self, kind: str, pairs: int, student_width: int, teacher_width: int, rank: int = 64) -> None:
        widths = student_width, teacher_width
        if kind == "auto":
            kind = "none" if student_width == teacher_width else "linear"
        if kind == "none" and student_width != teacher_width:
            raise ValueError(
                f'projection "none" needs equal widths; the student has {widths[0]}, the teacher {widths[1]}: use '
                'projection "auto"'
            )
        if kind == "low_rank" and not rank < min(widths):
            raise ValueError(
                f'projection "low_rank" needs a rank below both widths ({widths[0]} and {widths[1]}), got {rank}'
            )
        count = {"none": 0, "shared": 1}.get(kind, pairs)
        super().__init__(_build(kind, student_width, teacher_width, rank) for _ in range(count))
        self.kind = kind
        self.widths = widths

    def project(self, pair: int, states: torch.Tensor) -> torch.Tensor:
        """`(..., H_student)` -> `(..., H_teacher)` for the pair of this index."""
        return self[self.index(pair)](states) if len(self) else states

    def index(self, pair: int) -> int:
        """Which projection serves the pair of this index."""
        return pair % len(self)


def _build(kind: str, student_width: int, teacher_width: int, rank: int) -> nn.Module:
    if kind == "low_rank":
        return nn.Sequential(_Linear(student_width, rank, bias=False), _Linear(rank, teacher_width))
    if kind == "orthogonal":
        # PyTorch's own choice for unequal widths, "householder", cuts a trained diagonal of -1 to whole numbers: under
        # any weight decay that is 0, and so is the projection.
        projection = orthogonal(_Linear(student_width, teacher_width, bias=False), orthogonal_map="cayley")
        _set_orthogonal(projection, projection.weight)
        return projection
    return _Linear(student_width, teacher_width)


class _Linear(nn.Linear):
    """A linear map in the precision of what comes in: FSDP and DeepSpeed may hold its parameters in bfloat16."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(states.dtype)
        return F.linear(states, self.weight.to(states.dtype), bias)


@torch.no_grad()
def _set_orthogonal(projection: nn.Module, weight: torch.Tensor) -> None:
    """Starts an orthogonal projection at this weight."""
    # Contiguous, both here and below: safetensors refuses anything else.
    projection.weight = weight.contiguous()
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    projection.parametrizations.weight[0].base = torch.cat([tall, _complement(tall)], dim=1).contiguous()


def _complement(tall: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that fill up others to a square matrix: (n, k) -> (n, n - k).

    PyTorch takes random ones, and those of a QR decomposition change their signs by rounding: training would differ
    between ranks or machines. These follow the given columns smoothly.
    """
    rows, columns = tall.shape
    given = tall.detach().double().cpu()
    filling = torch.randn(rows, rows - columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rest, triangle = torch.linalg.qr(filling - given @ (given.T @ filling))
    return (rest * triangle.diagonal().sign()).to(tall)


class LeastSquares:
    """Finds the projections that bring given student states closest to given teacher states.

    Linear and shared: `W, b = argmin Σ ‖W x + b - y‖²`; low rank: the same among maps of that rank (reduced-rank
    regression); orthogonal: among those with orthonormal columns (Procrustes), or, where the student is the wider one,
    the map with orthonormal rows for which `Σ yᵀ W x` is largest. Only sums over tokens are kept, which can be added
    over batches and over ranks.

    Args:
        projections: those to set.
    """

    def __init__(self, projections: Projections) -> None:
        self.projections = projections
        student_width, teacher_width = projections.widths
        # On the CPU in float64: squares of states lose half of the digits, and not every accelerator has float64.
        self.squares = torch.zeros(len(projections), student_width + 1, student_width + 1, dtype=torch.float64)
        self.products = torch.zeros(len(projections), student_width + 1, teacher_width, dtype=torch.float64)

    @torch.no_grad()
    def add(self, pair: int, student: torch.Tensor, teacher: torch.Tensor) -> None:
        """Takes in tokens: `(N, H_student)` and `(N, H_teacher)` of the pair of this index."""
        if not len(self.projections):
            return
        i = self.projections.index(pair)
        x = F.pad(student.cpu().double(), (0, 1), value=1.0)  # (N, H_student + 1)
        self.squares[i] += x.T @ x
        self.products[i] += x.T @ teacher.cpu().double()

    @torch.no_grad()
    def solve(self) -> None:
        """Sets the projections.

        Raises:
            ValueError: nothing was taken in, or states that are not finite.
        """
        for projection, squares, products in zip(self.projections, self.squares, self.products, strict=True):
            tokens = squares[-1, -1]
            if not tokens > 0:
                raise ValueError("least squares got no tokens to fit the projections to")
            if not (squares.isfinite().all() and products.isfinite().all()):
                raise ValueError(
                    "least squares got hidden states that are not finite; float16 overflows, bfloat16 does not"
                )
            if self.projections.kind == "orthogonal":
                _set_orthogonal(projection, _procrustes(products[:-1].T).to(projection.weight))
                continue
            mean, target_mean = squares[:-1, -1] / tokens, products[-1] / tokens
            covariance = squares[:-1, :-1] / tokens - torch.outer(mean, mean)
            weight = _regression(covariance, products[:-1] / tokens - torch.outer(mean, target_mean), mean)
            if self.projections.kind == "low_rank":
                first, last = projection
                # The directions in which the full solution's answers vary most.
                _, directions = torch.linalg.eigh(weight @ covariance @ weight.T)
                top = directions[:, -first.out_features :]  # (H_teacher, rank)
                first.weight.copy_(top.T @ weight)
                last.weight.copy_(top)
                weight = top @ top.T @ weight
            else:
                last = projection
                last.weight.copy_(weight)
            last.bias.copy_(target_mean - weight @ mean)


def _procrustes(cross: torch.Tensor) -> torch.Tensor:
    """The orthogonal map closest to this one: (H_teacher, H_student) -> the same."""
    u, sizes, v = torch.linalg.svd(cross)
    kept = int((sizes > 1e-6 * sizes[0]).sum())
    weight = u[:, :kept] @ v[:kept]
    if kept < len(sizes):
        # Directions that the student's states lack, as after a layer norm, where they add up to a constant: any map is
        # as good there, and rounding would choose. This one is closest to the identity.
        left, right = u[:, kept:], v[kept:]
        a, _, b = torch.linalg.svd(left.T @ torch.eye(*cross.shape).to(cross) @ right.T, full_matrices=False)
        weight = weight + left @ a @ b @ right
    return weight


def _regression(covariance: torch.Tensor, products: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Least squares for centered numbers: (H_student, H_student), (H_student, H_teacher) -> (H_teacher, H_student)."""
    variance = covariance.diagonal()
    # Each coordinate in units of its own spread, as some are a hundred times larger than others. One that is constant
    # up to rounding explains nothing.
    spread = torch.where(variance > 1e-12 * (variance + mean.square()), variance, torch.inf).sqrt()
    values, directions = torch.linalg.eigh(covariance / torch.outer(spread, spread))
    # Fewer tokens than widths, or states that lie in a plane (after a layer norm they add up to a constant), leave
    # directions in which there is rounding only: they get no weight, or it would be another on each machine.
    directions, values = directions[:, values > 1e-9 * values[-1]], values[values > 1e-9 * values[-1]]
    solution = directions @ (directions.T @ (products / spread[:, None]) / values[:, None])
    return (solution / spread[:, None]).T
