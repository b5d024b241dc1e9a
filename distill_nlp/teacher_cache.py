"""The teacher's logits on disk, found by content: of which teacher, for which token ids.

A folder holds the logits of one teacher in one precision. Its shards are written once and never changed; each has the
hash of its bytes in its name, so that any number of processes can add to a folder, and damage shows when it is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import nn

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
    """All that a teacher's logits depend on besides its inputs, as plain values.

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


# ---- which row ----


def row_keys(columns: Mapping[str, np.ndarray], ends: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    """The key and the length of each row, both without the padding at its end.

    Args:
        columns: name -> whole numbers of all rows, one after the other; `attention_mask` is told by its name. A mask
            of ones is no part of the key: it says no more than that there is no padding.
        ends: (N,), where each row ends.
    """
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64) if len(ends) else ends.astype(np.int64)
    stops, gaps = ends.astype(np.int64), np.zeros(len(ends), dtype=bool)
    mask = columns.get("attention_mask")
    if mask is not None and not mask.all():
        real = np.flatnonzero(mask)
        rows = np.searchsorted(ends, real, side="right")
        # Of several values for one row numpy keeps the last. A row of padding alone is left as it is.
        stops = stops.copy()
        stops[rows] = real + 1
        gaps = np.bincount(rows, minlength=len(ends)) < stops - starts
    names = sorted(columns.keys() - {"attention_mask"})
    values = [memoryview(np.ascontiguousarray(columns[name], dtype="<i4")).cast("B") for name in names]
    plain = hashlib.blake2b(",".join(names).encode(), digest_size=KEY_BYTES)
    masked = hashlib.blake2b(",".join([*names, "attention_mask"]).encode(), digest_size=KEY_BYTES)
    keys = []
    for start, stop, gap in zip(starts.tolist(), stops.tolist(), gaps.tolist(), strict=True):
        key = (masked if gap else plain).copy()
        for column in values:
            key.update(column[4 * start : 4 * stop])
        if gap:
            key.update((mask[start:stop] != 0).tobytes())
        keys.append(key.digest())
    return keys, stops - starts


# ---- the folder ----


class LogitsCache:
    """The logits that are kept of one teacher; what is added is seen after the next `read`.

    Args:
        root: folder of all caches; this one's is a sub-folder, named by the identity.
        identity: see `teacher_identity`.
    """

    def __init__(self, root: str | Path, identity: dict[str, Any]) -> None:
        self.identity = identity
        self.folder = Path(root).expanduser() / _hash(json.dumps(identity, sort_keys=True).encode())
        self._read: set[str] = set()
        self._rows: dict[bytes, int] = {}
        self._logits = np.empty((0, len(identity["labels"])), dtype=np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def read(self) -> None:
        """Takes in the shards that were not there at the last call; one that is damaged is set aside."""
        blocks, count = [self._logits], len(self._logits)
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
            keys = shard["keys"].tobytes()
            for i in range(len(shard["logits"])):
                self._rows[keys[KEY_BYTES * i : KEY_BYTES * (i + 1)]] = count + i
            blocks.append(shard["logits"])
            count += len(shard["logits"])
            self._read.add(path.name)
        self._logits = np.concatenate(blocks)

    def shards(self) -> list[Path]:
        """The files of logits, in the order of their names."""
        return sorted(self.folder.glob("shard-*.safetensors"))

    def _set_aside(self, path: Path) -> None:
        try:
            os.replace(path, path.with_suffix(".damaged"))
        except FileNotFoundError:
            return
        logger.warning("teacher cache: %s is damaged and set aside; its rows are computed again", path)

    def add(self, keys: Sequence[bytes], logits: np.ndarray, rank: int = 0) -> None:
        """Writes a shard: logits (N, C) of the rows with these keys."""
        shard = {
            "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES),
            "logits": np.ascontiguousarray(logits, dtype=np.float32),
        }
        data = save(shard)
        _write(self.folder / f"shard-{rank:05d}-{_hash(data)}.safetensors", data)

    def logits_of(self, keys: Sequence[bytes]) -> np.ndarray:
        """(N, C), the logits of these rows, in the teacher's own order of labels.

        Raises:
            KeyError: a row that is not kept.
        """
        return self._logits[[self._rows[key] for key in keys]]

    def size(self) -> int:
        """Bytes of all shards."""
        return sum(path.stat().st_size for path in self.shards())

    def write_manifest(self, teacher: str) -> None:
        """Says in words what the folder holds; nothing reads it but people.

        Args:
            teacher: name or folder that it came from.
        """
        held = {"rows": len(self), "shards": len(self.shards()), "bytes": self.size()}
        record = {"teacher": teacher, **self.identity, **held}
        _write(self.folder / MANIFEST, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    """Writes to a temporary name, to the disk itself, and renames: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
