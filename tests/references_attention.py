"""Attention maps and relations between tokens as loops over numbers in float64, written from the papers' formulas."""

from __future__ import annotations

import math

from helpers import reference_map, softmax_row, to_numpy


def over_heads(maps, heads: str):
    """One row's maps, [head][query][key], as they are or as one mean or sum."""
    if heads == "each":
        return maps
    count, tokens = len(maps), len(maps[0])
    divisor = count if heads == "mean" else 1
    return [
        [[sum(maps[a][i][j] for a in range(count)) / divisor for j in range(tokens)] for i in range(tokens)],
    ]


def reference_attention_heads(student, teacher, mask, kind: str, heads: str) -> float:
    """One pair of layers, each given as (query, key), with the maps taken by head, averaged or summed."""
    student_maps, teacher_maps = reference_map(*student, mask), reference_map(*teacher, mask)
    rows = []
    for b, real_row in enumerate(to_numpy(mask)):
        real = [i for i, seen in enumerate(real_row) if seen]
        one, other = over_heads(student_maps[b], heads), over_heads(teacher_maps[b], heads)
        values = []
        for p, q in zip(one, other, strict=True):
            for i in real:
                if kind == "kl":
                    values.append(sum(q[i][j] * math.log(q[i][j] / p[i][j]) for j in real))
                else:
                    values.append(sum((p[i][j] - q[i][j]) ** 2 for j in real) / len(real))
        rows.append(sum(values) / len(values))
    return sum(rows) / len(rows)


def token_vectors(heads, row: int, token: int) -> list[float]:
    """All heads of one token, one after the other."""
    return [float(x) for head in heads[row] for x in head[token]]


def reference_token_relations(student, teacher, mask, relation_heads: int) -> float:
    """One relation of one pair of layers, from arXiv:2012.15828: student and teacher `(B, A, S, D)`.

    `1 / (R |x|) · Σ_r Σ_t KL(A_teacher[r, t] ‖ A_student[r, t])` with `A[r] = softmax(X_r X_rᵀ / √d_r)`.
    """
    student, teacher = to_numpy(student), to_numpy(teacher)
    rows = []
    for b, real_row in enumerate(to_numpy(mask)):
        real = [i for i, seen in enumerate(real_row) if seen]
        total = 0.0
        for r in range(relation_heads):
            for i in real:
                distributions = []
                for heads in (teacher, student):
                    scores = []
                    for j in real:
                        x, y = token_vectors(heads, b, i), token_vectors(heads, b, j)
                        size = len(x) // relation_heads
                        part = range(r * size, (r + 1) * size)
                        scores.append(sum(x[c] * y[c] for c in part) / math.sqrt(size))
                    distributions.append(softmax_row(scores))
                total += sum(t * math.log(t / s) for t, s in zip(*distributions, strict=True))
        rows.append(total / (relation_heads * len(real)))
    return sum(rows) / len(rows)
