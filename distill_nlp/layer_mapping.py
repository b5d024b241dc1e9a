"""Which student layer learns from which teacher layer."""

from __future__ import annotations

import re
from collections.abc import Sequence

LayerPairs = list[tuple[int, int]]
STRATEGIES = ("uniform", "last", "first", "every_<k>")
_EVERY = re.compile(r"every_([1-9]\d*)")


def map_layers(
    layers: str | Sequence[Sequence[int]],
    student_depth: int,
    teacher_depth: int,
    first_layer: int = 1,
) -> LayerPairs:
    """Turns a strategy or explicit pairs into validated (student layer, teacher layer) pairs.

    Layers are numbered as people count them: 0 is the output of the embeddings, 1 the first transformer
    block, `depth` the last. Attention maps have no layer 0.

    Args:
        layers: "uniform": student layer i learns from teacher layer round(i * teacher_depth / student_depth), the
            last from the last; "last": only the last from the last; "first": layer i from layer i; "every_2" and the
            like: layer i from layer 2i, as far as both go; or pairs `[[student, teacher], ...]`.
        student_depth: number of transformer blocks of the student.
        teacher_depth: number of transformer blocks of the teacher.
        first_layer: the lowest layer number allowed in explicit pairs: 0 for hidden states, 1 for attention.

    Raises:
        ValueError: what `check_layers` refuses, a layer out of range, or a strategy that needs a deeper teacher.
    """
    check_layers(layers)
    depths = f"the student has {student_depth} layers and the teacher {teacher_depth}"
    if isinstance(layers, str):
        if layers == "uniform":
            # Halves are rounded up: Python's round() would take the even neighbour, now up and now down.
            # A student more than twice as deep would reach 0, which is not a block.
            return [(i, max(1, int(i * teacher_depth / student_depth + 0.5))) for i in range(1, student_depth + 1)]
        if layers == "last":
            return [(student_depth, teacher_depth)]
        if every := _EVERY.fullmatch(layers):
            step = int(every[1])
            if step > teacher_depth:
                raise ValueError(f'layers: "{layers}" finds no layer; {depths}')
            return [(i, i * step) for i in range(1, min(student_depth, teacher_depth // step) + 1)]
        if student_depth > teacher_depth:
            raise ValueError(f'layers: "first" needs a teacher as deep as the student; {depths}')
        return [(i, i) for i in range(1, student_depth + 1)]

    pairs: LayerPairs = []
    for pair in layers:
        student_layer, teacher_layer = pair
        for name, layer, depth in (
            ("student", student_layer, student_depth),
            ("teacher", teacher_layer, teacher_depth),
        ):
            if not first_layer <= layer <= depth:
                raise ValueError(
                    f"layers: {name} layer {layer} of pair {list(pair)} is not within {first_layer}..{depth}; {depths}"
                )
        pairs.append((student_layer, teacher_layer))
    return pairs


def check_layers(layers: str | Sequence[Sequence[int]]) -> None:
    """Refuses what is wrong whatever the two models are.

    Raises:
        ValueError: unknown strategy, something that is no pair of numbers, the same pair twice, or no pair at all.
    """
    if isinstance(layers, str):
        if layers not in STRATEGIES[:3] and not _EVERY.fullmatch(layers):
            raise ValueError(f"layers must be one of {', '.join(STRATEGIES)} or a list of pairs, got {layers!r}")
        return
    if not isinstance(layers, Sequence) or not layers:
        raise ValueError(f"layers must be one of {', '.join(STRATEGIES)} or at least one pair, got {layers!r}")
    for pair in layers:
        is_pair = isinstance(pair, Sequence) and len(pair) == 2
        if not is_pair or not all(isinstance(i, int) and not isinstance(i, bool) for i in pair):
            raise ValueError(f"layers: each pair must be [student layer, teacher layer], got {pair!r}")
    if len({tuple(pair) for pair in layers}) < len(layers):
        raise ValueError(f"layers: the same pair stands twice in {layers!r}")


def format_pairs(pairs: LayerPairs) -> str:
    """One short line of the mapping, student on the left: `1→2, 2→4`."""
    return ", ".join(f"{s}→{t}" for s, t in pairs)
