"""Classifiers for inference: of an exported folder, run by ONNX Runtime, or of a checkpoint, by PyTorch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from distill_nlp.durable_files import read_json
from distill_nlp.errors import UsageError, first_line
from distill_nlp.loading import load_classifier, load_config

MODEL_FILE = "model.onnx"
EXPORT_FILE = "export.json"


class OnnxClassifier(nn.Module):
    """A classifier in ONNX, called as its PyTorch original is; it answers on the CPU and cannot be trained.

    It has no parameters, and runs in as many threads as PyTorch would.

    Args:
        file: of the graph, with the inputs `input_ids`, `attention_mask` and maybe `token_type_ids`.
        config: the Transformers config of the original.

    Shapes:
        input_ids, attention_mask, token_type_ids: (B, S). logits: (B, C), float32.

    Raises:
        UsageError: ONNX Runtime is not installed, or cannot read the file.

    Example:
        >>> model = load_for_inference("runs/imdb/student/seed-42-onnx-int8")
        >>> rows = [dict(tokenizer("What a waste of two hours."))]
        >>> predict_logits(model, tokenizer, rows)  # (1, C)
    """

    def __init__(self, file: Path, config: Any) -> None:
        super().__init__()
        if find_spec("onnxruntime") is None:
            raise UsageError(f"{file} needs onnxruntime: pip install 'distill-nlp[export]'")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # As OpenMP's threads here: on a machine that is shared, spinning ones slow each other down.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Warnings name nodes of the graph, which say nothing to its user.
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        # Its exceptions share no class but this one.
        except Exception as error:
            raise UsageError(f"ONNX Runtime cannot read {file}: {first_line(error)}") from error
        self.config = config
        self._inputs = [value.name for value in self.session.get_inputs()]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """The logits; every token is real without a mask, and of the first segment without types."""
        given = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            "token_type_ids": torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
        }
        feed = {name: given[name].cpu().numpy().astype(np.int64) for name in self._inputs}
        return SequenceClassifierOutput(logits=torch.from_numpy(self.session.run(["logits"], feed)[0]))


def is_exported(name: str) -> bool:
    """Whether a name is a local folder that `distill-nlp export` wrote."""
    folder = Path(name).expanduser()
    return (folder / MODEL_FILE).is_file() and (folder / EXPORT_FILE).is_file()


def export_record(folder: str | Path, model: dict[str, Any]) -> dict[str, Any] | None:
    """What an export says of itself; None where it is of other weights, or does not say of which.

    Args:
        folder: of the export.
        model: `checkpoint_print` of the model that it should be of.
    """
    record = read_json(Path(folder) / EXPORT_FILE)
    of = record.get("model") if isinstance(record, dict) else None
    return record if isinstance(of, dict) and of.get("content", "") == model["content"] else None


def exported_size(name: str) -> dict[str, Any]:
    """`parameters` of the original, and megabytes (10^6) of the export, `size_mb` on disk and `weights_mb` to load.

    Raises:
        UsageError: its record is torn.
    """
    record = read_json(Path(name).expanduser() / EXPORT_FILE)
    try:
        size = record["size_mb"]["exported"]
        return {"parameters": record["parameters"], "size_mb": size, "weights_mb": size}
    except (KeyError, TypeError):
        raise UsageError(f"{name}/{EXPORT_FILE} is not that of an export; export the model again") from None


def load_for_inference(name: str, revision: str | None = None) -> nn.Module:
    """A classifier to ask, not to train: an `OnnxClassifier` of an exported folder, else the checkpoint in float32.

    Either has a `config`, and answers to `predict_logits`.

    Args:
        name: an exported folder, or a folder or Hub id of a checkpoint.
        revision: on the Hub.

    Raises:
        UsageError, DistillError: it cannot be loaded.
    """
    if is_exported(name):
        return OnnxClassifier(Path(name).expanduser() / MODEL_FILE, load_config(name))
    return load_classifier(name, revision)
