"""Weights that follow the gradients: each term pulls at the student as hard as its weight says."""

from __future__ import annotations

import torch
from torch import nn


class GradientBalance(nn.Module):
    """Factors on the weights of the terms, such that the norms of the weighted gradients are in the weights' ratio.

    With `g_i` the norm of term i's gradient on the student and `w_i` its weight, the factor is `G / g_i`,
    `G = Σ w_i g_i / Σ w_i`: the sum of the weighted norms stays what it was. The norms are smoothed over measurements
    (in logarithms, 0.9 of the old). A term whose gradient is zero or not finite keeps its factor and sets no norm.
    The goal is that of GradNorm (Chen et al. 2018, arXiv:1711.02257) without its training rates; the smoothed norms are
    saved with checkpoints.

    Args:
        names: of the terms.
    """

    momentum = 0.9

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.register_buffer("log_norms", torch.full((len(names),), float("nan")))
        self.register_buffer("factors", torch.ones(len(names)))

    def factor(self, name: str) -> torch.Tensor:
        """Factor of a term, a scalar on the device."""
        return self.factors[self.names.index(name)]

    @torch.no_grad()
    def observe(self, norms: dict[str, torch.Tensor]) -> None:
        """Takes in new gradient norms of the unweighted terms; `apply` makes them count."""
        for name, norm in norms.items():
            i = self.names.index(name)
            old, new = self.log_norms[i], norm.to(self.log_norms).log()
            smoothed = torch.where(old.isfinite(), self.momentum * old + (1 - self.momentum) * new, new)
            self.log_norms[i] = torch.where(new.isfinite(), smoothed, old)

    @torch.no_grad()
    def apply(self, weights: dict[str, float]) -> None:
        """Sets the factors by the norms seen so far; a term without norm, or of weight 0, keeps its factor."""
        # Filled on the device: a copy from the host would wait for it.
        weight = torch.stack([self.log_norms.new_full((), weights.get(name, 0.0)) for name in self.names])
        known = self.log_norms.isfinite() & (weight > 0)
        norm = torch.where(known, self.log_norms, 0.0).exp()
        goal = (weight * norm * known).sum() / (weight * known).sum()
        # Not in place: a graph may still hold the old ones.
        self.factors = torch.where(known, goal / norm, self.factors)
