"""Weights of 8 bits: activations measured batch by batch, or beforehand on real rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from distill_nlp.errors import DistillError, first_line
from distill_nlp.export.graph import quiet

# Linear layers and embeddings. Sums, norms and softmax in 8 bits cost accuracy (0.852 → 0.776 of a 3-layer student on
# IMDB) and gain no speed.
_OPERATORS = ["MatMul", "Gemm", "Gather"]
# Products of two activations (queries and keys) stay in float.
_OPTIONS = {"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT}
_CALIBRATION_BATCH = 8

Batch = dict[str, np.ndarray]


def quantize(source: Path, target: Path, reduce_range: bool, calibration: Sequence[Batch] | None = None) -> None:
    """Writes a graph with int8 weights, one scale for each output channel.

    Args:
        source: the graph in float32.
        target: to write.
        reduce_range: weights of 7 bits.
        calibration: batches to fix the ranges of activations on (`calibration_batches`); None: each batch its own.

    Raises:
        DistillError: ONNX Runtime cannot.
    """
    settings: dict[str, Any] = {
        "op_types_to_quantize": _OPERATORS,
        "per_channel": True,
        "reduce_range": reduce_range,
        "weight_type": QuantType.QInt8,
        "extra_options": _OPTIONS,
    }
    with quiet():
        try:
            if calibration is None:
                quantize_dynamic(source, target, **settings)
            else:
                reader = _Reader(calibration)
                quantize_static(
                    source, target, reader, quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8, **settings
                )
        except OSError:
            raise
        except Exception as error:
            raise DistillError(f"ONNX Runtime cannot quantize the model: {first_line(error)}") from error


def calibration_batches(
    tokenizer: Any, rows: Sequence[dict[str, Any]], names: list[str]
) -> list[dict[str, np.ndarray]]:
    """Encoded rows as padded batches of the graph's inputs, (B, S) int64 each."""
    starts = range(0, len(rows), _CALIBRATION_BATCH)
    batches = [tokenizer.pad(list(rows[i : i + _CALIBRATION_BATCH]), return_tensors="np") for i in starts]
    return [{name: batch[name].astype(np.int64) for name in names} for batch in batches]


class _Reader(CalibrationDataReader):
    def __init__(self, batches: Sequence[Batch]) -> None:
        self._left = iter(batches)

    def get_next(self) -> Batch | None:
        return next(self._left, None)
