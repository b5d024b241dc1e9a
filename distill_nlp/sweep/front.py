"""What is worth its cost: points that no other point beats in both."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one dominates, cheapest first.

    A point dominates another if its score is at least as high and its cost at most as high, and one of them better.
    Equal points are all kept.

    Args:
        points: (score to maximise, cost to minimise).

    Example:
        >>> pareto_front([(0.9, 10.0), (0.8, 5.0), (0.7, 7.0)])
        [1, 0]
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][0]))
    front: list[int] = []
    for i in order:
        if not front or points[i][0] > points[front[-1]][0] or points[i] == points[front[-1]]:
            front.append(i)
    return front
