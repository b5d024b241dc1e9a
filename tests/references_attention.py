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


def reference_map_with_bias(query, key, bias, mask) -> list:
    """`softmax(Q Kᵀ / √d + bias)`, [row][head][query token][key token], with `bias` (A, S, S) the same for all rows."""
    query, key, bias, mask = (to_numpy(tensor) for tensor in (query, key, bias, mask))
    rows, heads, tokens, size = query.shape
    maps = [[[[0.0] * tokens for _ in range(tokens)] for _ in range(heads)] for _ in range(rows)]
    for b in range(rows):
        real = [k for k in range(tokens) if mask[b, k]]
        for a in range(heads):
            for i in range(tokens):
                scores = []
                for k in real:
                    dot = sum(query[b, a, i, c] * key[b, a, k, c] for c in range(size))
                    scores.append(dot / math.sqrt(size) + bias[a, i, k])
                for k, value in zip(real, softmax_row(scores), strict=True):
                    maps[b][a][i][k] = value
    return maps


def reference_attention_heads(student, teacher, mask, kind: str, heads: str) -> float:
    """One pair of layers, each (query, key) or (query, key, bias), with the maps by head, averaged or summed."""
    student_maps, teacher_maps = (
        (reference_map if len(side) == 2 else reference_map_with_bias)(*side, mask) for side in (student, teacher)
    )
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
