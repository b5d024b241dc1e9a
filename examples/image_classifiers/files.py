"""Images of a folder or of parquet files, with their classes, splits and pixels; for distill_image_classifier.py."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from distill_nlp.errors import UsageError

NO_LABEL = -100
"""What the trainer takes for a row without a label."""
FRACTIONS = {"validation": 0.2, "test": 0.1}
"""Of the images of a folder, or of one parquet file; the rest is for training."""
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}


@dataclass
class Rows:
    """Images that are not decoded yet.

    Args:
        names: of the images, as the report shows them.
        images: of each a file, its encoded bytes, or a grey (H, W) array.
        labels: (N,) number of the class, or `NO_LABEL`.
    """

    names: list[str]
    images: Sequence[Path | bytes | np.ndarray]
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> Rows:
        return Rows([self.names[i] for i in rows], [self.images[i] for i in rows], self.labels[rows])


@dataclass
class Source:
    """Train, validation and test rows, and the names of the classes by number."""

    splits: dict[str, Rows]
    classes: list[str]


class Images(Dataset):
    """Decoded images, as the trainer reads them: rows of `pixel_values` (C, S, S) and `labels`.

    Args:
        names: of the images.
        pixels: (N, C, S, S), uint8.
        labels: (N,), `NO_LABEL` where a row has none.
        mean, std: of each channel, in [0, 1], by which pixels are normalized.
    """

    def __init__(
        self, names: list[str], pixels: torch.Tensor, labels: np.ndarray, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.names, self.pixels, self.labels = names, pixels, np.asarray(labels)
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values([row])[0], "labels": int(self.labels[row])}

    def pixel_values(self, rows: Sequence[int]) -> torch.Tensor:
        """(n, C, S, S), normalized float32."""
        return (self.pixels[torch.as_tensor(rows)].float() / 255 - self.mean) / self.std

    def take(self, rows: np.ndarray, labeled: np.ndarray | None = None) -> Images:
        """These rows in this order; with `labeled` (n,), the others of them lose their labels."""
        labels = self.labels[rows]
        labels = labels if labeled is None else np.where(labeled, labels, NO_LABEL)
        pixels, names = self.pixels[torch.as_tensor(rows)], [self.names[i] for i in rows]
        return Images(names, pixels, labels, self.mean.flatten().tolist(), self.std.flatten().tolist())

    def fingerprint(self) -> str:
        """Of pixels, labels and normalization."""
        found = hashlib.sha256(self.pixels.numpy().tobytes())
        for part in (self.labels, self.mean.numpy(), self.std.numpy()):
            found.update(part.tobytes())
        return found.hexdigest()


def open_source(path: Path, image_column: str, label_column: str, seed: int) -> Source:
    """Finds images, classes and splits; decodes nothing.

    Args:
        path: a folder with a folder per class, one with parquet files, or a parquet file.
        image_column, label_column: of parquet files.
        seed: of the split, where the data have none.

    Raises:
        UsageError: no such data, fewer than two classes, a missing column, or a class too small to be split.
    """
    if path.is_file():
        source = _of_parquet({"train": [path]}, image_column, label_column)
    elif not path.is_dir():
        raise UsageError(f"{path}: no such file or folder")
    elif files := sorted(path.glob("*.parquet")):
        source = _of_parquet(_by_split(path, files), image_column, label_column)
    else:
        source = _of_folder(path)
    if len(source.classes) < 2:
        raise UsageError(f"{path} has one class, {source.classes[0]}; a classifier needs two or more")
    if "test" not in source.splits:
        source.splits |= _cut(source, path, seed)
    for split in ("validation", "test"):
        if split in source.splits and (source.splits[split].labels == NO_LABEL).any():
            raise UsageError(f"{path}: a row of {split} has no label; only training rows may lack theirs")
    return source


def _of_folder(path: Path) -> Source:
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise UsageError(f"{path} has neither sub-folders, one per class, nor parquet files")
    images, labels = [], []
    for label, folder in enumerate(folders):
        own = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not own:
            raise UsageError(
                f"{folder} has no images ({' '.join(sorted(SUFFIXES))}); the sub-folders of --data must be the classes"
            )
        images += own
        labels += [label] * len(own)
    names = [str(image.relative_to(path)) for image in images]
    return Source({"train": Rows(names, images, np.array(labels))}, [folder.name for folder in folders])


def _by_split(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    """`train.parquet`, `test-00000-of-00002.parquet` and the like; a single file of another name is to be split."""
    found = {split: [f for f in files if f.stem.split("-")[0].lower() in words] for split, words in SPLITS.items()}
    found = {split: own for split, own in found.items() if own}
    if not found and len(files) == 1:
        return {"train": files}
    if "train" not in found:
        raise UsageError(f"{path} has no train.parquet, only {', '.join(f.name for f in files)}")
    if "validation" in found and "test" not in found:
        raise UsageError(f"{path} has rows of validation and none of test; leave both to the split, or give both")
    return found


def _of_parquet(files: dict[str, list[Path]], image_column: str, label_column: str) -> Source:
    tables = {split: [_table(f, (image_column, label_column)) for f in own] for split, own in files.items()}
    raw = {
        split: [label for table in own for label in _labels(table[label_column], files[split][0], label_column)]
        for split, own in tables.items()
    }
    known = {label for label in raw["train"] if label is not None}
    if len({type(label) for label in known}) > 1:
        raise UsageError(f"{files['train'][0]}: the column {label_column} mixes numbers and names")
    names = _class_names(tables["train"][0], label_column)
    names = names if names and {type(label) for label in known} == {int} else None
    classes = list(range(len(names))) if names else sorted(known)
    if not classes:
        raise UsageError(f"{files['train'][0]}: no row has a label in the column {label_column}")
    number = {label: i for i, label in enumerate(classes)}
    splits = {}
    for split, own in tables.items():
        if unknown := sorted({str(label) for label in raw[split] if label is not None and label not in number}):
            raise UsageError(f"{files[split][0]} has the class {unknown[0]}, which train has not")
        labels = [NO_LABEL if label is None else number[label] for label in raw[split]]
        images = [
            image for table, f in zip(own, files[split], strict=True) for image in _images(table[image_column], f)
        ]
        rows = [f"{f.name}, row {i}" for table, f in zip(own, files[split], strict=True) for i in range(len(table))]
        splits[split] = Rows(rows, images, np.array(labels, dtype=np.int64))
    return Source(splits, [str(name) for name in names or classes])


def _table(file: Path, columns: tuple[str, str]) -> pa.Table:
    try:
        there = pq.read_schema(file).names
        for column, option in zip(columns, ("--image_column", "--label_column"), strict=True):
            if column not in there:
                raise UsageError(f"{file} has no column {column}, only {', '.join(there)}; name it by {option}")
        return pq.read_table(file, columns=list(columns)).combine_chunks()
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"cannot read {file}: {_line(error)}") from None


def _class_names(table: pa.Table, column: str) -> list[str] | None:
    """Names that `datasets` wrote for the numbers of a column."""
    try:
        info = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]
        return list(info["features"][column]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _labels(column: pa.ChunkedArray, file: Path, name: str) -> list[int | str | None]:
    """Numbers or names; None where a row has none (null, or below 0)."""
    if pa.types.is_floating(column.type):  # whole numbers among nulls, as pandas writes them
        column = column.cast(pa.int64(), safe=False)
    if not (
        pa.types.is_integer(column.type) or pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    ):
        raise UsageError(f"{file}: the column {name} holds {column.type}; an image must have one label, number or name")
    return [None if isinstance(label, int) and label < 0 else label for label in column.to_pylist()]


def _images(column: pa.ChunkedArray, file: Path) -> list[bytes | np.ndarray]:
    """Encoded images, alone or as `datasets` keeps them; bytes of a fixed number are grey squares of raw pixels."""
    kind = column.type
    if pa.types.is_fixed_size_binary(kind):
        side = math.isqrt(kind.byte_width)
        if side * side != kind.byte_width or column.null_count:
            raise UsageError(
                f"{file}: {kind.byte_width} raw bytes are no square of grey pixels, or some rows have none"
            )
        return [np.frombuffer(image, dtype=np.uint8).reshape(side, side) for image in column.to_pylist()]
    values = column.to_pylist()
    if pa.types.is_struct(kind):
        values = [(value or {}).get("bytes") for value in values]
    elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UsageError(f"{file}: images must be bytes, or records with bytes as datasets writes them, not {kind}")
    if None in values:
        raise UsageError(f"{file}: row {values.index(None)} has no image bytes")
    return values


def _cut(source: Source, path: Path, seed: int) -> dict[str, Rows]:
    """All three splits out of train: the same part of each class, by chance."""
    rows, rng = source.splits["train"], np.random.default_rng(seed)
    if (rows.labels == NO_LABEL).any():
        raise UsageError(f"{path}: rows without labels need a test split of their own, in test.parquet")
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
    for label, name in enumerate(source.classes):
        own = rng.permutation(np.flatnonzero(rows.labels == label))
        if len(own) < 3:
            raise UsageError(f"{path}: the class {name} has {len(own)} images; to be split it needs at least 3")
        test, validation = (max(1, round(FRACTIONS[split] * len(own))) for split in ("test", "validation"))
        for split, part in zip(parts, np.split(own, [len(own) - test - validation, len(own) - test]), strict=True):
            parts[split].append(part)
    return {split: rows.take(np.sort(np.concatenate(own))) for split, own in parts.items()}


def natural_shape(source: Source) -> tuple[int | None, int]:
    """(side, channels) of the first image: a side only where it is raw, which models of any size can read as it is."""
    first = source.splits["train"].images[0]
    if isinstance(first, np.ndarray):
        return first.shape[0], 1
    with _opened(first, source.splits["train"].names[0]) as image:
        return None, 1 if image.mode in ("1", "L") else 3


def decode(rows: Rows, size: int, channels: int, mean: Sequence[float], std: Sequence[float], what: str) -> Images:
    """Decodes all, each resized to a square as Transformers' ViT processor does it; they stay in memory.

    Raises:
        UsageError: an image cannot be read; which one.
    """
    try:
        pixels = torch.empty((len(rows.names), channels, size, size), dtype=torch.uint8)
    except RuntimeError:
        gigabytes = len(rows.names) * channels * size**2 / 1e9
        raise UsageError(f"the images of {what} would take {gigabytes:,.0f} GB; lower --image_size") from None
    bar = tqdm(zip(rows.images, rows.names, strict=True), total=len(rows.names), desc=f"Reading {what}", disable=None)
    for i, (image, name) in enumerate(bar):
        with _opened(image, name) as opened:
            try:
                found = opened.convert("L" if channels == 1 else "RGB").resize((size, size), Image.Resampling.BILINEAR)
            except Exception as error:  # whatever the code behind a format raises: the file is broken
                raise UsageError(f"cannot read the image {name}: {_line(error)}") from None
        pixels[i] = torch.from_numpy(np.array(found)).view(size, size, channels).permute(2, 0, 1)
    return Images(rows.names, pixels, rows.labels, mean, std)


def _opened(image: Path | bytes | np.ndarray, name: str) -> Image.Image:
    opening: Callable[[Any], Image.Image] = Image.fromarray if isinstance(image, np.ndarray) else Image.open
    try:
        return opening(io.BytesIO(image) if isinstance(image, bytes) else image)
    except Exception as error:
        raise UsageError(f"cannot read the image {name}: {_line(error)}") from None


def _line(error: Exception) -> str:
    """A library's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
