"""Finds and reads the splits of a data set: from the Hub, from local files, from a `save_to_disk` folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill_nlp.errors import DistillError, UsageError, first_line, shown
from distill_nlp.text_files import SEPARATORS, check_header, check_quotes, check_utf8

# Ending -> loader of the datasets library with its arguments.
LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Without pandas' own list of words for "missing": a review may say "None" or "N/A".
    ".csv": ("csv", {"keep_default_na": False, "na_values": [""]}),
    ".tsv": ("csv", {"sep": "\t", "keep_default_na": False, "na_values": [""]}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
_BLOCK = 1000
_UNLABELED = "unsup"
_TEXT_ENDINGS = {".csv", ".tsv", ".json", ".jsonl", ".txt"}


def load_split(dataset: str, split: str, config_name: str | None = None, revision: str | None = None) -> Any:
    """Loads one split as a `datasets.Dataset`.

    Args:
        dataset: a local folder or file, or a Hub id.
        split: of a folder, a file `split.ext`, else files `split-*.ext`, or a sub-folder `split/` (for txt with one
            folder per label). A single file is the split "train".
        config_name, revision: of a Hub data set.

    Raises:
        UsageError: not there, no such split, or a file that cannot be read, with the place.
        DistillError: the Hub cannot be reached.
    """
    path = local_path(dataset, "data.dataset")
    if path.exists():
        try:
            return _load_local(path, split)
        except OSError as error:
            raise UsageError(f"data.dataset: cannot read {dataset}: {error.strerror or error}") from error
    if path.is_absolute() or dataset.startswith((".", "~")) or dataset.count("/") > 1 or path.suffix in LOADERS:
        raise UsageError(f"data.dataset: no file or folder {dataset}")
    return _load_from_hub(dataset, split, config_name, revision)


def local_path(name: str, setting: str) -> Path:
    """A name as a path that may or may not be there.

    Raises:
        UsageError: it can be no path, and nothing on the Hub either: empty, too long, or with unprintable characters.
    """
    try:
        path = Path(name).expanduser()
        # Also of an id on the Hub; asking finds names that the system does not take.
        os.path.lexists(path) and path.stat()
        if not name.strip() or not name.isprintable() or max(map(len, [*path.parts, ""])) > 255:
            raise ValueError
    except (OSError, ValueError, RuntimeError):
        raise UsageError(f"{setting}: {shown(name)} is not the name of a file, a folder or a repository") from None
    return path


def _load_local(path: Path, split: str) -> Any:
    if is_saved(path):
        return load_saved(path, split)
    if folders := label_folders(path, split):
        return _read_label_folders(folders)
    return _read(split_files(path, split))


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def split_files(path: Path, split: str) -> list[Path]:
    """The files of a split, all of one kind, in their order.

    Args:
        path: a file or folder that is there.
        split: its name.

    Raises:
        UsageError: there is no such split, files of several kinds, or none that is read.
    """
    if path.is_file():
        if split != "train":
            raise UsageError(f"data.dataset: {path} is one file, the split train; there is no split {split!r}")
        if path.suffix not in LOADERS:
            raise UsageError(f"data.dataset: {path} is of no kind that is read: {', '.join(LOADERS)}")
        return [path]
    files = _files_of(path, split)
    if not files and (path / split).is_dir():
        files = sorted(p for p in (path / split).iterdir() if p.suffix in LOADERS and not p.name.startswith("."))
    if not files:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
        raise UsageError(f"data: no split {split!r} in {path} (a file {split}.csv, .parquet, ...); there is: {there}")
    if len({p.suffix for p in files}) > 1:
        raise UsageError(f"data: the split {split!r} has files of several kinds: {', '.join(p.name for p in files)}")
    return files


def _files_of(path: Path, split: str) -> list[Path]:
    """Of just its name; else its shards, `train-00000-of-00002`; else all that begin with its name and a hyphen.

    Beside `train.csv`, a `train-small.csv` is another split.
    """
    files = [p for p in path.iterdir() if p.suffix in LOADERS]
    parts = [p for p in files if p.stem.startswith(f"{split}-")]
    shards = [p for p in parts if p.stem.removeprefix(f"{split}-")[:1].isdecimal()]
    return sorted([p for p in files if p.stem == split] or shards or parts)


def label_folders(path: Path, split: str) -> list[Path]:
    """Folders below that of the split, where that is what it is made of, and not tables that lie beside them.

    None that a system or an editor leaves (`.ipynb_checkpoints`, `__MACOSX`). The IMDB archive has lists as txt there.

    Raises:
        UsageError: it may be made of either.
    """
    if path.is_file() or not (path / split).is_dir() or _files_of(path, split):
        return []
    inside = sorted(p for p in (path / split).iterdir() if not p.name.startswith((".", "__")))
    folders = [p for p in inside if p.is_dir() and p.name != _UNLABELED]
    tables = [p for p in inside if p.suffix in LOADERS and p.suffix != ".txt"]
    if not tables:
        return folders
    with_texts = [p.name for p in folders if next(p.glob("*.txt"), None) is not None]
    if len(with_texts) > 1:
        raise UsageError(
            f"data: {path / split} has texts in a folder per label ({', '.join(with_texts[:3])}) and beside them "
            f"{tables[0].name}; keep one of the two there"
        )
    return []


def unlabeled_folder(dataset: str, split: str) -> Path | None:
    """The texts without labels that the original IMDB archive has among the folders of its labels."""
    path = Path(dataset).expanduser()
    folder = path / split / _UNLABELED
    return folder if folder.is_dir() and label_folders(path, split) else None


def load_saved(path: Path, split: str) -> Any:
    """One split of a folder written by `save_to_disk`; its rows stay on the disk.

    Raises:
        UsageError: it cannot be read, or has no such split.
    """
    from datasets import Dataset, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"data.dataset: {path} cannot be read as a saved data set: {first_line(error)}") from error
    if isinstance(saved, Dataset):
        saved = {"train": saved}
    if split not in saved:
        raise UsageError(f"data: no split {split!r} in {path}; there is: {', '.join(saved)}")
    return saved[split]


def _read(files: list[Path]) -> Any:
    from datasets import load_dataset

    ending = files[0].suffix
    for file in files:
        if file.stat().st_size == 0:
            raise UsageError(f"data: {file} is empty")
        if ending in _TEXT_ENDINGS:
            check_utf8(file)
        if ending in SEPARATORS:
            check_header(file, SEPARATORS[ending])
    loader, arguments = LOADERS[ending]
    names = ", ".join(str(f) for f in files)
    try:
        if ending == ".parquet" and not _rows_of_parquet(files):
            raise UsageError(f"data: {names} has no rows")
        rows = load_dataset(loader, data_files=[str(f) for f in files], split="train", **arguments)
        if ending == ".tsv":
            for first, block in enumerate(rows.iter(_BLOCK)):
                check_quotes(files[0] if len(files) == 1 else files[0].parent, block, first * _BLOCK)
        return rows
    except UsageError:
        raise
    except Exception as error:
        # The datasets library wraps the parser's error, sometimes twice; the innermost says what is wrong.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if "corresponds to no data" in str(error):
            raise UsageError(f"data: {names} has no rows") from error
        raise UsageError(f"data: cannot read {names} as {ending[1:]}: {first_line(cause)}") from error


def _rows_of_parquet(files: list[Path]) -> int:
    """Rows by the files' own record; of none, the datasets library says something about batch sizes."""
    from pyarrow.parquet import read_metadata

    return sum(read_metadata(file).num_rows for file in files)


def _read_label_folders(folders: list[Path]) -> Any:
    """A folder per label, a text per file: the layout of the original IMDB archive."""
    from datasets import Dataset

    rows: dict[str, list[str]] = {"text": [], "label": []}
    for folder in folders:
        for file in sorted(folder.glob("*.txt")):
            check_utf8(file)
            rows["text"].append(file.read_text(encoding="utf-8"))
            rows["label"].append(folder.name)
    return Dataset.from_dict(rows)


def _load_from_hub(dataset: str, split: str, config_name: str | None, revision: str | None) -> Any:
    from datasets import load_dataset

    with asking_hub(dataset):
        return load_dataset(dataset, config_name, split=split, revision=revision)


@contextmanager
def asking_hub(dataset: str) -> Iterator[None]:
    """Says in a line why a data set of that name did not come from the Hub.

    Raises:
        UsageError: there is none, or it has no such configuration or split.
        DistillError: the Hub cannot be reached.
    """
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield
    except DatasetNotFoundError as error:
        raise UsageError(f"data.dataset: {first_line(error)}; is it a local folder that is missing?") from error
    except (ConnectionError, OSError) as error:
        raise DistillError(
            f"data.dataset: cannot load {dataset!r}: {first_line(error)}. It is no local folder, so the Hub was "
            "asked; check the network, or name a local folder"
        ) from error
    except ValueError as error:
        raise UsageError(f"data.dataset {dataset!r}: {first_line(error)}") from error
