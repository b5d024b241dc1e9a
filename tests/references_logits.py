"""The published formulas of the losses of the logits as loops in float64, and tools of their tests."""

from __future__ import annotations

import math

import torch
from helpers import features, softmax_row, to_numpy

from distill_nlp.losses import ModelShape

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"


def random_logits(seed, rows=5, classes=3, scale=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale).to(dtype)


def bound(loss, classes=3, problem_type=SINGLE_LABEL):
    shape = ModelShape(num_labels=classes, problem_type=problem_type)
    loss.bind(shape, shape)
    return loss


def call(loss, student, teacher, labels=None, mask=None):
    return loss(features(student), features(teacher), labels, mask)


def gradient_of(value, tensor):
    return torch.autograd.grad(value, tensor)[0].double().numpy()


def rows_of(*tensors):
    """The rows of each, as lists of floats, side by side."""
    return list(zip(*(to_numpy(tensor).tolist() for tensor in tensors), strict=True))


def each_row(temperature, count) -> list[float]:
    return list(temperature) if isinstance(temperature, list) else [temperature] * count


def standardized(row) -> list[float]:
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((z - mean) ** 2 for z in row) / len(row))
    return [(z - mean) / deviation for z in row]


def kl_of(p, q) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def divergence_of(kind, p_s, p_t) -> float:
    if kind == "kl":
        return kl_of(p_t, p_s)
    if kind == "reverse_kl":
        return kl_of(p_s, p_t)
    if kind == "soft_ce":
        return -sum(t * math.log(s) for s, t in zip(p_s, p_t, strict=True))
    if kind == "js":
        middle = [(s + t) / 2 for s, t in zip(p_s, p_t, strict=True)]
        return 0.5 * kl_of(p_t, middle) + 0.5 * kl_of(p_s, middle)
    raise KeyError(kind)


def answers(row, temperature, multi_label=False, standardize=False) -> list[list[float]]:
    """One distribution over the classes, or (yes, no) for each class."""
    if standardize:
        row = standardized(row)
    if multi_label:
        yes = [1 / (1 + math.exp(-z / temperature)) for z in row]
        return [[p, 1 - p] for p in yes]
    return [softmax_row([z / temperature for z in row])]


def reference_softened(kind, student, teacher, temperature, multi_label=False, standardize=False) -> float:
    """A temperature for all rows, or a list of one for each."""
    pairs = rows_of(student, teacher)
    total = 0.0
    for (s, t), tau in zip(pairs, each_row(temperature, len(pairs)), strict=True):
        ours, wanted = answers(s, tau, multi_label, standardize), answers(t, tau, multi_label, standardize)
        for p_s, p_t in zip(ours, wanted, strict=True):
            total += tau**2 * divergence_of(kind, p_s, p_t) / len(ours)
    return total / len(pairs)


def reference_squared_error(one, other) -> float:
    pairs = rows_of(one, other)
    return sum(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x) for x, y in pairs) / len(pairs)


def reference_decoupled(student, teacher, labels, temperature, alpha, beta) -> float:
    pairs = rows_of(student, teacher)
    total, count = 0.0, 0
    for (s, t), label, tau in zip(pairs, labels, each_row(temperature, len(pairs)), strict=True):
        if label == -100:
            continue
        binary, others = [], []
        for row in (s, t):
            p = softmax_row([z / tau for z in row])
            binary.append([p[label], sum(value for c, value in enumerate(p) if c != label)])
            others.append(softmax_row([z / tau for c, z in enumerate(row) if c != label]))
        total += tau**2 * (alpha * kl_of(binary[1], binary[0]) + beta * kl_of(others[1], others[0]))
        count += 1
    return total / count if count else 0.0


def pearson_of(x, y) -> float:
    """0 where one of them is constant."""
    x, y = [a - sum(x) / len(x) for a in x], [b - sum(y) / len(y) for b in y]
    norms = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / norms if norms else 0.0


def reference_dist(student, teacher, temperature, inter_weight=1.0, intra_weight=1.0) -> float:
    pairs = rows_of(student, teacher)
    p_s = [answers(s, temperature)[0] for s, _ in pairs]
    p_t = [answers(t, temperature)[0] for _, t in pairs]
    between_classes = [pearson_of(s, t) for s, t in zip(p_s, p_t, strict=True)]
    between_rows = [pearson_of(s, t) for s, t in zip(zip(*p_s, strict=True), zip(*p_t, strict=True), strict=True)]
    inter = 1 - sum(between_classes) / len(between_classes)
    intra = 1 - sum(between_rows) / len(between_rows) if len(pairs) > 1 else 0.0
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


def reference_flsw(student, teacher, value, beta, gamma) -> list[float]:
    """Temperatures by focal loss style weights, as TextBrewer publishes them."""
    weights = []
    for s, t in rows_of(student, teacher):
        dot = sum(a * b for a, b in zip(s, t, strict=True))
        cosine = dot / (math.sqrt(sum(a * a for a in s)) * math.sqrt(sum(b * b for b in t)))
        weights.append((1 - cosine) ** gamma)
    return [value + (sum(weights) / len(weights) - w) * beta for w in weights]


def reference_cwsm(student, value, beta) -> list[float]:
    """Temperatures by confidence weights of the student's largest probability, as TextBrewer publishes them."""
    weights = [1 / max(softmax_row(s)) for (s,) in rows_of(student)]
    return [value + (sum(weights) / len(weights) - w) * beta for w in weights]
