"""A PyTorch classifier as an ONNX graph, by PyTorch's own exporter."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill_nlp.errors import DistillError, first_line
from distill_nlp.modeling import accepted_arguments

# A protobuf message, which a file in ONNX is, ends at 2 GB.
_MOST_BYTES = 2**31 - 2**24


class _Logits(nn.Module):
    """The classifier with inputs by position and the logits alone, in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits.float()


def write_graph(model: Any, tokenizer: Any, file: Path) -> list[str]:
    """Writes the model's graph with its weights in the model's dtype; batch and sequence are of any size.

    Args:
        model: a Transformers classifier on the CPU; its attention is switched to the plain one, whose graph is the
            smallest and, in ONNX Runtime, the fastest.
        tokenizer: says what inputs there are.
        file: to write.

    Returns:
        The names of the inputs.

    Raises:
        DistillError: the exporter cannot trace the model, an operator has no ONNX form, or the model is too large.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > _MOST_BYTES:
        raise DistillError(f"the model has {size / 1e9:.1f} GB of weights, and a file in ONNX holds 2 GB: take --fp16")
    names = input_names(model, tokenizer)
    with quiet():
        # Not all architectures have it; any will do.
        with suppress(AttributeError, ValueError):
            model.set_attn_implementation("eager")
        try:
            program = torch.onnx.export(
                _Logits(model.eval()),
                kwargs=_example(names),
                dynamic_shapes={name: dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) for name in names},
                input_names=names,
                output_names=["logits"],
                dynamo=True,
                verbose=False,
            )
        # Torch raises errors of many classes from within the model's own code.
        except Exception as error:
            raise DistillError(f"cannot export {type(model).__name__} to ONNX: {cause_of(error)}") from error
        graph = program.model_proto
    _tidy(graph)
    file.write_bytes(graph.SerializeToString())
    return names


def input_names(model: nn.Module, tokenizer: Any) -> list[str]:
    """What the tokenizer makes and the model takes; `token_type_ids` is not for all."""
    accepted = accepted_arguments(model)
    types = "token_type_ids" in tokenizer.model_input_names and (accepted is None or "token_type_ids" in accepted)
    return ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]


def cause_of(error: BaseException) -> str:
    """The innermost of an exporter's errors on one line; the outer ones are advice and addresses."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[\d+m", "", str(error)).strip()
    return f"{type(error).__name__}: {first_line(ValueError(text))}" if text else type(error).__name__


def _example(names: list[str]) -> dict[str, torch.Tensor]:
    # Sizes 0 and 1 would be taken for constants, and so would two that are equal.
    inputs = {name: torch.ones(2, 7, dtype=torch.long) for name in names}
    # A mask that hides nothing may be left out of the graph.
    inputs["attention_mask"][1, 4:] = 0
    if "token_type_ids" in inputs:
        inputs["token_type_ids"].zero_()
    return inputs


def _tidy(graph: Any) -> None:
    """Gives the axes their names, and drops what nobody runs: shapes of inner values, which the quantizer finds
    contradictory, and the exporter's notes on each node, which hold paths of this machine.
    """
    del graph.graph.value_info[:]
    graph.doc_string = graph.graph.doc_string = ""
    parts = [graph, graph.graph, *graph.functions]
    for part in (graph.graph, *graph.functions):
        parts += part.node
    parts += [*graph.graph.initializer, *graph.graph.input, *graph.graph.output]
    for part in parts:
        del part.metadata_props[:]
        part.ClearField("doc_string")
    for value in (*graph.graph.input, *graph.graph.output):
        for dimension, name in zip(value.type.tensor_type.shape.dim, ("batch", "sequence"), strict=False):
            if not dimension.HasField("dim_value"):
                dimension.dim_param = name


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps back what torch and onnxruntime log and warn of their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
