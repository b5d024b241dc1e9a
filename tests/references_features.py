"""References of the losses of features and of relations between examples: loops over numbers in float64."""

from __future__ import annotations

import math

import torch
from helpers import to_numpy

from distill_nlp.losses import ModelShape

STUDENT = ModelShape(num_labels=3, num_layers=2, hidden_size=4, num_attention_heads=2)
TEACHER = ModelShape(num_labels=3, num_layers=4, hidden_size=6, num_attention_heads=3)
SAME_WIDTH = ModelShape(num_labels=3, num_layers=4, hidden_size=4, num_attention_heads=2)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])


def states(seed, width, layers=(0, 1, 2, 3, 4), shape=(3, 5), dtype=torch.float32):
    """Layer -> `(B, S, width)`."""
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(*shape, width, generator=generator).to(dtype) for layer in layers}


def with_gradient(hidden_states):
    return {layer: tensor.clone().requires_grad_() for layer, tensor in hidden_states.items()}


def padded_with_garbage(hidden_states, seed, tokens=4, left=False):
    """The same with more tokens, large ones, at the end or at the start."""
    rows, _, width = next(iter(hidden_states.values())).shape
    garbage = states(seed, width, shape=(rows, tokens))
    return {
        layer: torch.cat([garbage[layer] * 50, tensor] if left else [tensor, garbage[layer] * 50], dim=1)
        for layer, tensor in hidden_states.items()
    }


def padded_mask(mask, tokens=4, left=False):
    zeros = torch.zeros(len(mask), tokens, dtype=mask.dtype)
    return torch.cat([zeros, mask] if left else [mask, zeros], dim=1)


def real_tokens(mask, row) -> list[int]:
    return [s for s in range(mask.shape[1]) if mask[row, s]]


def affine(x, weight=None, bias=None) -> list[float]:
    """`W x + b` of one state."""
    if weight is None:
        return [float(value) for value in x]
    weight = to_numpy(weight)
    bias = [0.0] * len(weight) if bias is None else to_numpy(bias)
    return [sum(w * value for w, value in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def dot(x, y) -> float:
    return sum(float(p) * float(q) for p, q in zip(x, y, strict=True))


def of_length_one(x) -> list[float]:
    length = math.sqrt(dot(x, x))
    return [value / length for value in x] if length > 0 else [0.0 for _ in x]


def huber(x, y) -> float:
    return (x - y) ** 2 / 2 if abs(x - y) <= 1 else abs(x - y) - 0.5


def reference_normalized(student, teacher, mask, weight=None, bias=None) -> float:
    """Squared difference of states brought to mean 0 and variance 1: a mean over width, tokens of a row, rows."""
    student, teacher = to_numpy(student), to_numpy(teacher)

    def standard(x):
        mean = sum(x) / len(x)
        variance = sum((value - mean) ** 2 for value in x) / len(x)
        return [(value - mean) / math.sqrt(variance) for value in x]

    rows = []
    for b in range(len(student)):
        values = []
        for s in real_tokens(mask, b):
            x, y = standard(affine(student[b, s], weight, bias)), standard(teacher[b, s])
            values.append(sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) / len(y))
        rows.append(sum(values) / len(values))
    return sum(rows) / len(rows)


def reference_pkd(student, teacher, mask, weight=None, bias=None) -> float:
    """Squared distance of the first real tokens' directions."""
    student, teacher = to_numpy(student), to_numpy(teacher)
    total = 0.0
    for b in range(len(student)):
        first = real_tokens(mask, b)[0]
        x, y = of_length_one(affine(student[b, first], weight, bias)), of_length_one(teacher[b, first])
        total += sum((p - q) ** 2 for p, q in zip(x, y, strict=True))
    return total / len(student)


def reference_nst(student, teacher, mask) -> float:
    """Squared maximum mean discrepancy of neurons, by its three double sums."""
    student, teacher = to_numpy(student), to_numpy(teacher)
    total = 0.0
    for b in range(len(student)):
        tokens = real_tokens(mask, b)

        def neurons(states, b=b, tokens=tokens):
            return [of_length_one([states[b, s, h] for s in tokens]) for h in range(states.shape[-1])]

        f_t, f_s = neurons(teacher), neurons(student)
        total += sum(dot(f, g) ** 2 for f in f_t for g in f_t) / len(f_t) ** 2
        total += sum(dot(f, g) ** 2 for f in f_s for g in f_s) / len(f_s) ** 2
        total -= 2 * sum(dot(f, g) ** 2 for f in f_t for g in f_s) / (len(f_t) * len(f_s))
    return total / len(student)


def reference_fsp(student, teacher, mask, projections=None) -> float:
    """One pair of neighbours: `student` and `teacher` are each (states of layer a, states of layer b)."""
    student, teacher = [to_numpy(s) for s in student], [to_numpy(t) for t in teacher]
    projections = projections or [(None, None)] * 2
    rows = []
    for b in range(len(student[0])):
        tokens = real_tokens(mask, b)
        x = [[affine(layer[b, s], *p) for s in tokens] for layer, p in zip(student, projections, strict=True)]
        y = [[layer[b, s] for s in tokens] for layer in teacher]
        width, total = len(y[0][0]), 0.0
        for h in range(width):
            for k in range(width):
                g_s = sum(first[h] * second[k] for first, second in zip(*x, strict=True)) / len(tokens)
                g_t = sum(first[h] * second[k] for first, second in zip(*y, strict=True)) / len(tokens)
                total += (g_s - g_t) ** 2
        rows.append(total / width**2)
    return sum(rows) / len(rows)


def reference_representation(states, mask, representation) -> list[list[float]]:
    """What stands for each example: its first real token's state, or the mean of its real tokens' states."""
    states = to_numpy(states)
    examples = []
    for b in range(len(states)):
        tokens = real_tokens(mask, b)
        if representation == "first":
            examples.append([float(value) for value in states[b, tokens[0]]])
        else:
            examples.append([sum(states[b, s, h] for s in tokens) / len(tokens) for h in range(states.shape[-1])])
    return examples


def reference_rkd_distance(student, teacher) -> float:
    """Over ordered pairs of different rows; student (B, H_student), teacher (B, H_teacher)."""
    student, teacher = to_numpy(student), to_numpy(teacher)
    pairs = [(i, j) for i in range(len(student)) for j in range(len(student)) if i != j]

    def distances(x):
        found = [math.sqrt(sum((p - q) ** 2 for p, q in zip(x[i], x[j], strict=True))) for i, j in pairs]
        mean = sum(found) / len(found)
        return [value / mean if mean > 0 else 0.0 for value in found]

    return sum(map(huber, distances(student), distances(teacher))) / len(pairs)


def reference_rkd_angle(student, teacher) -> float:
    """Over ordered triplets of different rows."""
    student, teacher = to_numpy(student), to_numpy(teacher)
    rows = range(len(student))
    triplets = [(i, j, k) for i in rows for j in rows for k in rows if i != j and j != k and i != k]

    def cosine(x, i, j, k):
        to_i = of_length_one([p - q for p, q in zip(x[i], x[j], strict=True)])
        to_k = of_length_one([p - q for p, q in zip(x[k], x[j], strict=True)])
        return dot(to_i, to_k)

    return sum(huber(cosine(student, *t), cosine(teacher, *t)) for t in triplets) / len(triplets)


def reference_similarity(student, teacher) -> float:
    """Squared difference of the rows of `x xᵀ`, each of length 1, over B²."""
    student, teacher = to_numpy(student), to_numpy(teacher)
    total = 0.0
    for i in range(len(student)):
        x = of_length_one([dot(student[i], other) for other in student])
        y = of_length_one([dot(teacher[i], other) for other in teacher])
        total += sum((p - q) ** 2 for p, q in zip(x, y, strict=True))
    return total / len(student) ** 2
