"""Learned maps from the student's width to the teacher's, and their start by least squares."""

from __future__ import annotations

import torch
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
        return nn.Sequential(nn.Linear(student_width, rank, bias=False), nn.Linear(rank, teacher_width))
    if kind == "orthogonal":
        return orthogonal(nn.Linear(student_width, teacher_width, bias=False))
    return nn.Linear(student_width, teacher_width)


class LeastSquares:
    """Finds the projections that bring given student states closest to given teacher states.

    Linear and shared: `W, b = argmin Σ ‖W x + b - y‖²`; low rank: the same among maps of that rank (reduced-rank
    regression); orthogonal: among those with orthonormal columns (Procrustes). Only sums over tokens are kept, which
    can be added over batches and over ranks.

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
        x = torch.nn.functional.pad(student.detach().double().cpu(), (0, 1), value=1.0)  # (N, H_student + 1)
        self.squares[i] += x.T @ x
        self.products[i] += x.T @ teacher.detach().double().cpu()

    @torch.no_grad()
    def solve(self) -> None:
        """Sets the projections.

        Raises:
            ValueError: nothing was taken in.
        """
        for projection, squares, products in zip(self.projections, self.squares, self.products, strict=True):
            if not squares[-1, -1] > 0:
                raise ValueError("least squares got no tokens to fit the projections to")
            if self.projections.kind == "orthogonal":
                u, _, v = torch.linalg.svd(products[:-1].T, full_matrices=False)
                projection.weight = (u @ v).to(projection.weight)
                continue
            # A trace of ridge: fewer tokens than widths, or states that lie in a plane, leave the sums singular.
            ridge = 1e-8 * squares.diagonal().mean() * torch.eye(len(squares), dtype=torch.float64)
            solution = torch.linalg.solve(squares + ridge, products)  # (H_student + 1, H_teacher)
            if self.projections.kind == "low_rank":
                self._set_low_rank(projection, solution, squares)
            else:
                projection.weight.copy_(solution[:-1].T)
                projection.bias.copy_(solution[-1])

    @staticmethod
    def _set_low_rank(projection: nn.Sequential, solution: torch.Tensor, squares: torch.Tensor) -> None:
        first, second = projection
        mean = squares[:-1, -1] / squares[-1, -1]  # (H_student,)
        covariance = squares[:-1, :-1] / squares[-1, -1] - torch.outer(mean, mean)
        weight = solution[:-1].T  # (H_teacher, H_student)
        # The directions in which the full solution's answers vary most.
        _, directions = torch.linalg.eigh(weight @ covariance @ weight.T)
        top = directions[:, -first.out_features :]  # (H_teacher, rank)
        first.weight.copy_(top.T @ weight)
        second.weight.copy_(top)
        target_mean = weight @ mean + solution[-1]
        second.bias.copy_(target_mean - top @ (top.T @ (weight @ mean)))
