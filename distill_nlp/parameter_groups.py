"""The student part by part: learning rates that shrink from the head down, and parts that do not learn yet or at all.

A part is told by the names of the parameters: the blocks are those that a list numbers, `...layer.3...`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from distill_nlp.modeling import bare_model, is_peft_model

# The outermost number counts: T5 numbers sublayers inside its blocks.
_BLOCK = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.")
_LAYERS = re.compile(r"layer\.(\d+)(?:-(\d+))?")


def parameter_levels(model: nn.Module) -> tuple[dict[str, int], int]:
    """The level of each parameter, and the number of blocks.

    Level 0 is the embeddings, 1 the first block, `depth` the last, and `depth + 1` what lies above: pooler, final norm,
    head.

    Args:
        model: with a `base_model_prefix` as Transformers models have it, all that lies outside of it is head.

    Returns:
        parameter name -> level, in the model's order, and the depth. It is 0 where no blocks are numbered from 0 in one
        list (ALBERT has one block for all layers, BART two lists); then only the embeddings are told from the rest.
    """
    names = [name for name, _ in model.named_parameters()]
    body = _body_prefix(model)
    found = {name: match for name in names if name.startswith(body) and (match := _BLOCK.search(name))}
    numbers = {int(match[1]) for match in found.values()}
    stems = {name[: match.start(1)] for name, match in found.items()}
    depth = len(numbers) if len(stems) == 1 and numbers == set(range(len(numbers))) else 0
    levels, below = {}, depth > 0
    for name in names:
        if depth and name in found:
            levels[name] = int(found[name][1]) + 1
            below = False
        else:
            # GPT-2's embeddings tell themselves by their place only, DeBERTa's relative ones by their name only.
            is_embedding = name.startswith(body) and (below or "embed" in name)
            levels[name] = 0 if is_embedding else depth + 1
    return levels, depth


def layer_factors(student: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Factor of each parameter on the learning rate: `decay^(depth + 1 - n)` of level n, as in ELECTRA and BEiT.

    The head (and what else lies above the blocks) has 1, the last block `decay`, the first `decay^depth`, the
    embeddings `decay^(depth + 1)`. (arXiv 2003.10555 app. A, arXiv 2106.08254; ELECTRA's code puts one power more
    between head and last block.)

    Raises:
        ValueError: the student's blocks are not numbered.

    Example:
        >>> factors = layer_factors(student, decay=0.8)
    """
    student = bare_model(student)
    levels, depth = parameter_levels(student)
    if not depth:
        raise ValueError(
            f"layer_learning_rate_decay needs one list of numbered blocks, which {type(student).__name__} has not; "
            "leave it at 1"
        )
    return {parameter: decay ** (depth + 1 - levels[name]) for name, parameter in student.named_parameters()}


def scale_by_layer(optimizer: torch.optim.Optimizer, factors: dict[nn.Parameter, float]) -> None:
    """Cuts the optimizer's groups so that each parameter has its factor on the learning rate, and all else as it was.

    Args:
        factors: by parameter; one that is not there (a projection's) keeps its learning rate. What has the factor 1
            stays in its group, so that the rate in the log is still that of the head.
    """
    for group in list(optimizer.param_groups):
        by_factor: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(factors.get(parameter, 1.0), []).append(parameter)
        rules = {key: value for key, value in group.items() if key != "params"}
        group["params"] = by_factor.pop(1.0, [])
        if not group["params"]:
            optimizer.param_groups.remove(group)
        for factor in sorted(by_factor, reverse=True):
            optimizer.add_param_group(rules | {"lr": rules["lr"] * factor, "params": by_factor[factor]})


def check_parts(student: nn.Module, settings: Any, reads_answers: bool) -> None:
    """Refuses parts that the student does not have, and a student of which nothing would learn, before it is trained.

    Args:
        student: of the training.
        settings: with `freeze`, `unfreeze_every` and `layer_learning_rate_decay`.
        reads_answers: whether a loss reads the logits: else the head does not learn.

    Raises:
        ValueError: with the setting.
    """
    if settings.layer_learning_rate_decay != 1:
        layer_factors(student, settings.layer_learning_rate_decay)
    if not settings.freeze:
        return
    frozen = Freezing(student, settings.freeze, settings.unfreeze_every).for_good
    body = _body_prefix(student)
    learning = {name for name, parameter in student.named_parameters() if parameter.requires_grad} - frozen
    if body and not reads_answers and not any(name.startswith(body) for name in learning):
        raise ValueError(
            f"freeze: {', '.join(settings.freeze)} leaves the head alone to learn, and no loss reads the answers"
        )


class Freezing:
    """Parts of a student that do not learn: for good, or until their turn comes, from the top down (ULMFiT).

    For good, they need no gradient. Those whose turn comes have one in every step, as DDP wants the same parameters in
    each, and it is dropped before it is clipped or applied: the optimizer passes over them and keeps no state of them.

    Args:
        student: not wrapped by PEFT, which freezes by itself.
        parts: "embeddings"; "layer.1", the first block; "layer.1-3"; "body", all but the head; or the name of a
            parameter or of a module.
        every: optimizer steps between two releases; None: for good. The highest frozen block is released first, with
            what is frozen above it, the embeddings last.

    Raises:
        ValueError: a part that the student does not have, nothing left to train, blocks that are not numbered where
            they are to be released one by one, or a PEFT student.

    Example:
        >>> freezing = Freezing(student, ["embeddings", "layer.1-2"], every=500)
        >>> len(freezing.held(step=1200))  # the embeddings' parameters
        5
    """

    def __init__(self, student: nn.Module, parts: Sequence[str] = (), every: int | None = None) -> None:
        if parts and is_peft_model(student):
            raise ValueError("freeze is not for a PEFT student: PEFT has frozen all but its adapters and the head")
        levels, depth = parameter_levels(student)
        frozen = {name for part in parts for name in _names_of(part, student, levels, depth)}
        learning = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        if frozen and not learning - frozen:
            raise ValueError(f"freeze leaves nothing of the student to train: {', '.join(parts)}")
        if frozen and every is not None and not depth:
            raise ValueError(
                f"unfreeze_every needs one list of numbered blocks, which {type(student).__name__} has not; leave it "
                "out"
            )
        self.every = every
        # A parameter that was frozen before is not to be released.
        self._parameters = {name: p for name, p in student.named_parameters() if name in frozen & learning}
        # What lies above the blocks alone (a pooler) is no step on the way down.
        self._turns = sorted({min(levels[name], depth) for name in self._parameters}, reverse=True)
        self._turn_of = {name: self._turns.index(min(levels[name], depth)) for name in self._parameters}

    @property
    def for_good(self) -> set[str]:
        """Names of the parameters that never learn."""
        return set(self._parameters) if self.every is None else set()

    def begin(self) -> None:
        """Before the optimizer is made: takes the gradient from what is frozen for good."""
        self._set_requires_grad(False)

    def end(self) -> None:
        """After training: leaves the student as it was, for a training that freezes other parts."""
        self._set_requires_grad(True)

    def _set_requires_grad(self, value: bool) -> None:
        if self.every is None:
            for parameter in self._parameters.values():
                parameter.requires_grad_(value)

    def held(self, step: int) -> list[nn.Parameter]:
        """Parameters that wait for their turn in this optimizer step, counted from 0."""
        if self.every is None:
            return []
        released = step // self.every
        return [parameter for name, parameter in self._parameters.items() if self._turn_of[name] >= released]

    def drop_gradients(self, step: int) -> None:
        """After a backward pass: what waits for its turn has no gradient."""
        for parameter in self.held(step):
            parameter.grad = None


def _body_prefix(model: nn.Module) -> str:
    """What the names of all parameters but the head's begin with; empty where there is no such thing."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def _names_of(part: str, student: nn.Module, levels: dict[str, int], depth: int) -> set[str]:
    """Names of the parameters of a part."""
    body, found = _body_prefix(student), set()
    if part == "embeddings":
        found = {name for name, level in levels.items() if level == 0}
    elif part == "body":
        found = {name for name, level in levels.items() if (name.startswith(body) if body else level <= depth)}
    elif match := _LAYERS.fullmatch(part):
        first, last = int(match[1]), int(match[2] or match[1])
        if 1 <= first <= last <= depth:
            found = {name for name, level in levels.items() if first <= level <= last}
    else:
        found = {name for name in levels if name == part or name.startswith(f"{part}.")}
    if not found:
        blocks = ["layer.1" if depth == 1 else f"layer.1 to layer.{depth}"] if depth else []
        # Names one level down where all but the head has one name.
        names = dict.fromkeys(
            ".".join(name.split(".")[: 2 if body and name.startswith(body) else 1]) for name in levels
        )
        raise ValueError(
            f"freeze: {part!r} is no part of the student; there are {', '.join(['body', 'embeddings', *blocks])}, and "
            f"names of modules such as {', '.join(names)}"
        )
    return found
