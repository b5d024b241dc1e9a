"""A teacher's answers on disk, found by content: of which teacher, for which token ids.

A folder holds one output of one teacher in one precision: its logits, or its states of a layer as one vector per text.
Its shards are written once and never changed; each has the hash of its bytes in its name, so that any number of
processes can add to a folder, and damage shows when it is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import nn

from distill_nlp.durable_files import write_bytes, write_json
from distill_nlp.losses.base import ModelShape
from distill_nlp.modeling import bare_model

logger = logging.getLogger(__name__)

FORMAT = 1
KEY_BYTES = 16
MANIFEST = "manifest.json"
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Mixed precision as accelerate names it -> dtype of the autocast."""

# Of a config: what does not change the answers, or is not the same before and after saving.
_NO_ANSWER = {
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "dtype",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
}


def _hash(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=KEY_BYTES).hexdigest()


# ---- which teacher ----


def weights_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of names, dtypes, shapes and values; the same for a state dict and for the files that it was saved in."""
    lines = []
    for name, tensor in tensors:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_hash(raw.data)}")
    return _hash("\n".join(sorted(lines)).encode())


def model_tensors(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """What a checkpoint of the model would hold: names that are tied to another are not saved."""
    model = bare_model(model)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return ((name, tensor) for name, tensor in model.state_dict().items() if name not in tied)


def teacher_identity(config: Any, model_class: str, weights: str, mixed_precision: str = "no") -> dict[str, Any]:
    """All that a teacher's answers depend on besides its inputs, as plain values.

    Args:
        config: of the teacher; its labels in their order are part of it.
        model_class: name of the class that computes the logits.
        weights: their `weights_hash`.
        mixed_precision: "no", "bf16" or "fp16": the autocast that it runs under.

    Raises:
        ValueError: an unknown precision.
    """
    if mixed_precision not in PRECISIONS:
        raise ValueError(f"mixed_precision must be one of {', '.join(PRECISIONS)}, got {mixed_precision!r}")
    values = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    settings = {str(k): v for k, v in values.items() if k not in _NO_ANSWER}
    return {
        "format": FORMAT,
        "class": model_class,
        "weights": weights,
        "mixed_precision": mixed_precision,
        "problem_type": ModelShape.from_config(config).problem_type,
        "labels": [str(config.id2label[i]) for i in range(config.num_labels)],
        "config": _hash(json.dumps(settings, sort_keys=True, default=str).encode()),
    }


# ---- one output of it ----

STORAGES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Names of what numbers are kept in -> dtype. The nearest to the float32 that was computed differs from it by

- float32: nothing;
- float16 (11 significant bits): at most 2^-11 of itself, or 2^-25 below 2^-14 in size; up to 65504 in size;
- bfloat16 (8 significant bits): at most 2^-8 of itself, or 2^-134 below 2^-126 in size; up to 3.389e38.
"""


def output_identity(teacher: dict[str, Any], output: str = "logits", storage: str = "float32") -> dict[str, Any]:
    """What tells the caches of one teacher's outputs from each other; logits in float32 have the teacher's identity.

    Args:
        teacher: see `teacher_identity`.
        output: "logits", or the name of pooled states.
        storage: one of `STORAGES`.

    Raises:
        ValueError: an unknown storage.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
    identity = dict(teacher)
    if output != "logits":
        identity["output"] = output
    if storage != "float32":
        identity["storage"] = storage
    return identity


def not_to_be_kept(values: np.ndarray, storage: str) -> np.ndarray:
    """(N,) booleans: rows of (N, W) that hold a number which is not finite in this storage."""
    return ~torch.from_numpy(values).to(STORAGES[storage]).isfinite().all(dim=1).numpy()


# ---- the folder ----


class AnswerCache:
    """What is kept of one output of one teacher: a vector per row. What is added is seen after the next `read`.

    Args:
        root: folder of all caches; this one's is a sub-folder, named by the identity.
        identity: see `output_identity`.
    """

    def __init__(self, root: str | Path, identity: dict[str, Any]) -> None:
        self.identity = identity
        self.folder = Path(root).expanduser() / _hash(json.dumps(identity, sort_keys=True).encode())
        self.output = identity.get("output", "logits")
        self.storage = identity.get("storage", "float32")
        self.largest_error = 0.0
        self._name = "logits" if self.output == "logits" else "states"
        self._read: set[str] = set()
        self._rows: dict[bytes, int] = {}
        self._blocks: list[torch.Tensor] = []
        # Number of the first row of each block, and of the next one.
        self._starts = [0]

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def read(self) -> None:
        """Takes in the shards that were not there at the last call; one that is damaged is set aside."""
        for path in self.shards():
            if path.name in self._read:
                continue
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                # Another process has set it aside.
                continue
            if _hash(data) != path.stem.rpartition("-")[2]:
                self._set_aside(path)
                continue
            shard = load(data)
            keys, count = shard["keys"].numpy().tobytes(), self._starts[-1]
            for i in range(len(shard["keys"])):
                self._rows[keys[KEY_BYTES * i : KEY_BYTES * (i + 1)]] = count + i
            self._blocks.append(shard[self._name])
            self._starts.append(count + len(shard["keys"]))
            if "error" in shard:
                self.largest_error = max(self.largest_error, shard["error"].item())
            self._read.add(path.name)

    def shards(self) -> list[Path]:
        """The files of vectors, in the order of their names."""
        return sorted(self.folder.glob("shard-*.safetensors"))

    def _set_aside(self, path: Path) -> None:
        try:
            os.replace(path, path.with_suffix(".damaged"))
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("teacher cache: %s is damaged and cannot be set aside: %s", path, error)
            return
        logger.warning("teacher cache: %s is damaged and set aside; its rows are computed again", path)

    def add(self, keys: Sequence[bytes], values: np.ndarray, rank: int = 0) -> None:
        """Writes a shard.

        Args:
            keys: of its rows.
            values: (N, W), without a row that is `not_to_be_kept`.
            rank: in a launch of several processes.
        """
        values = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        stored = values.to(STORAGES[self.storage])
        shard = {"keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)}
        shard[self._name] = stored
        if self.storage != "float32":
            shard["error"] = (stored.float() - values).abs().max().view(1)
        data = save(shard)
        write_bytes(self.folder / f"shard-{rank:05d}-{_hash(data)}.safetensors", data)

    def values_of(self, keys: Sequence[bytes]) -> np.ndarray:
        """(N, W) in float32, the vectors of these rows; logits in the teacher's own order of labels.

        Raises:
            KeyError: a row that is not kept.
        """
        rows = np.fromiter((self._rows[key] for key in keys), dtype=np.int64, count=len(keys))
        values = np.empty((len(rows), self._blocks[0].shape[1] if self._blocks else 0), dtype=np.float32)
        order = np.argsort(rows)
        parts = np.split(order, np.searchsorted(rows[order], self._starts[1:-1]))
        for block, start, places in zip(self._blocks, self._starts, parts, strict=False):
            values[places] = block[torch.from_numpy(rows[places] - start)].float().numpy()
        return values

    def size(self) -> int:
        """Bytes of all shards."""
        return sum(path.stat().st_size for path in self.shards())

    def write_manifest(self, teacher: str) -> None:
        """Says in words what the folder holds; nothing reads it but people.

        Args:
            teacher: name or folder that it came from.
        """
        held: dict[str, Any] = {"rows": len(self), "shards": len(self.shards()), "bytes": self.size()}
        if self.storage != "float32":
            held["largest_error"] = self.largest_error
        record = {"teacher": teacher, **self.identity, **held}
        write_json(self.folder / MANIFEST, record)
