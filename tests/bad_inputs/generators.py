"""Inputs that do not stand well in YAML: binary ones, large ones, broken checkpoints. Each writes below `here`."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import datasets
import helpers
import pandas as pd
import safetensors.torch
import torch
import yaml


def _file(here: Path, path: str) -> Path:
    """The path, without the files that the base keeps for the same split."""
    file = here / path
    file.parent.mkdir(parents=True, exist_ok=True)
    for other in file.parent.glob(f"{file.name.partition('.')[0]}.*"):
        other.unlink()
    return file


def encoded(here: Path, path: str, text: str, encoding: str) -> None:
    _file(here, path).write_bytes(text.encode(encoding))


def latin1(here: Path, path: str, text: str) -> None:
    encoded(here, path, text, "latin-1")


def random_bytes(here: Path, path: str, size: int) -> None:
    _file(here, path).write_bytes(random.Random(0).randbytes(size))


def repeated(here: Path, path: str, head: str = "", line: str = "", times: int = 1, tail: str = "") -> None:
    _file(here, path).write_text(head + line * times + tail, encoding="utf-8", newline="")


# ---- configs ----


def billion_laughs(here: Path, path: str, levels: int = 30) -> None:
    """2^levels strings, of which YAML itself makes references, and whatever prints or checks them does not."""
    lines = ["a0: &a0 [lol, lol]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels)]
    _file(here, path).write_text("\n".join(["output_dir: run", *lines, f"seeds: *a{levels - 1}"]) + "\n")


def billion_merges(here: Path, path: str, levels: int = 30) -> None:
    lines = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, levels)]
    _file(here, path).write_text("\n".join(["output_dir: run", *lines]) + "\n")


def large_yaml(here: Path, path: str, megabytes: int) -> None:
    repeated(here, path, "output_dir: run\nseeds:\n", "- 1234567\n", megabytes * 100_000)


def nested_yaml(here: Path, path: str, levels: int) -> None:
    repeated(here, path, "output_dir: run\nseeds: ", "[", levels, "]" * levels + "\n")


def long_number(here: Path, path: str, digits: int) -> None:
    repeated(here, path, "output_dir: run\nseeds: [", "7", digits, "]\n")


def long_value(here: Path, path: str, size: int) -> None:
    repeated(here, path, "output_dir: run\nseeds: ", "x", size, "\n")


def long_output(here: Path, path: str, size: int) -> None:
    text = (here / path).read_text(encoding="utf-8")
    (here / path).write_text(text.replace("output_dir: run", f"output_dir: {'x' * size}"), encoding="utf-8")


# ---- data ----


def table(here: Path, path: str, columns: dict[str, list[Any]]) -> None:
    """Columns of a parquet file."""
    pd.DataFrame(columns).to_parquet(_file(here, path))


def saved_classes(here: Path, path: str, names: list[str]) -> None:
    """A saved data set with names for its classes."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    rows = datasets.Dataset.from_dict({"text": ["w5", "w6", "w7", "w8"], "label": [0, 1, 0, 1]}, features=features)
    datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows)).save_to_disk(here / path)


def repeated_table(here: Path, path: str, text: str, rows: int = 8, times: int = 1) -> None:
    """Rows labeled in turns, the first of one long text."""
    texts = [f"w{10 + i} " + text * (times if i == 0 else 1) for i in range(rows)]
    pd.DataFrame({"text": texts, "label": [i % 2 for i in range(rows)]}).to_parquet(_file(here, path))


def wide_csv(here: Path, path: str, columns: int) -> None:
    """Columns beyond counting, and two that count."""
    names = ["text", "label", *(f"c{i}" for i in range(columns))]
    rows = [[f"w{10 + i}", str(i % 2), *("1" for _ in range(columns))] for i in range(4)]
    _file(here, path).write_text("\n".join(",".join(row) for row in [names, *rows]) + "\n")


def truncated(here: Path, path: str, of: str, share: float = 0.5) -> None:
    """The first part of a file."""
    content = (here / of).read_bytes() if (here / of).is_file() else Path(of).read_bytes()
    _file(here, path).write_bytes(content[: int(len(content) * share)])


def flipped(here: Path, path: str, of: str, at: float = 0.5) -> None:
    """A file with 64 bytes changed, at a part of its length."""
    content = bytearray((here / of).read_bytes() if (here / of).is_file() else Path(of).read_bytes())
    middle = int(len(content) * at)
    content[middle : middle + 64] = b"\xff" * 64
    _file(here, path).write_bytes(content)


def gz_bomb(here: Path, path: str, megabytes: int) -> None:
    """A few kilobytes that unpack to a thousand times as much: one row of zeros without an end."""
    file = _file(here, path)
    with gzip.open(file, "wb", compresslevel=9) as stream:
        stream.write(b"text,label\n")
        for _ in range(megabytes):
            stream.write(b"0" * 1_000_000)


def gz(here: Path, path: str, text: str) -> None:
    with gzip.open(_file(here, path), "wb") as stream:
        stream.write(text.encode())


def link(here: Path, path: str, to: str) -> None:
    file = here / path
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    file.symlink_to(to)


def folders(here: Path, paths: list[str]) -> None:
    for path in paths:
        (here / path).mkdir(parents=True)


def remove(here: Path, paths: list[str]) -> None:
    for path in paths:
        target = here / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()


def long_dataset(here: Path, path: str, size: int) -> None:
    text = (here / path).read_text(encoding="utf-8")
    (here / path).write_text(text.replace("dataset: data", f"dataset: {'x' * size}"), encoding="utf-8")


def many_classes(here: Path, path: str, rows: int) -> None:
    _file(here, path).write_text("text,label\n" + "".join(f"w{i % 90 + 4},{i}\n" for i in range(rows)))


def truncated_text(here: Path, path: str, text: str, cut: int) -> None:
    _file(here, path).write_bytes(text.encode()[:-cut])


# ---- checkpoints ----


def model(
    here: Path,
    of: str,
    to: str = "model",
    drop: tuple[str, ...] = (),
    files: dict[str, str] | None = None,
    latin1: dict[str, str] | None = None,
    cut: dict[str, float] | None = None,
    copy: dict[str, str] | None = None,
    settings: dict[str, Any] | None = None,
    tokenizer_settings: dict[str, Any] | None = None,
    nan: bool = False,
    swapped: bool = False,
    rebuild: str | None = None,
    without: tuple[str, ...] = (),
) -> None:
    """A copy of a checkpoint with something about it changed.

    Args:
        of, to: folders.
        drop: files that are not copied.
        files, latin1: name -> content of files that are added or changed.
        cut: file -> the part of it that is left.
        copy: file -> what takes its place.
        settings, tokenizer_settings: of config.json and tokenizer_config.json; null takes one out.
        nan: makes one weight NaN.
        swapped: gives it a tokenizer with two entries in each other's place.
        rebuild: weights made anew by the changed config.
        without: tensors that are taken out of the weights.
    """
    folder = here / to
    shutil.copytree(of, folder)
    for name in drop:
        (folder / name).unlink()
    for name, text in (files or {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, text in (latin1 or {}).items():
        (folder / name).write_bytes(text.encode("latin-1"))
    for name, share in (cut or {}).items():
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])
    for name, other in (copy or {}).items():
        shutil.copy(other, folder / name)
    for name, changes in (("config.json", settings), ("tokenizer_config.json", tokenizer_settings)):
        if changes:
            changed = json.loads((folder / name).read_text(encoding="utf-8")) | changes
            kept = {key: value for key, value in changed.items() if value is not None}
            (folder / name).write_text(json.dumps(kept), encoding="utf-8")
    if swapped:
        helpers.swapped_tokenizer().save_pretrained(folder)
    if nan or without:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        if nan:
            next(iter(weights.values())).view(-1)[0] = float("nan")
        weights = {name: weight for name, weight in weights.items() if name not in without}
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if rebuild:
        helpers.make_teacher(**helpers.label_config(helpers.BINARY), **(settings or {})).save_pretrained(folder)


def pickled_model(here: Path, of: str) -> None:
    """Honest weights, as `pytorch_model.bin` alone."""
    model(here, of, drop=("model.safetensors",))
    torch.save(safetensors.torch.load_file(Path(of, "model.safetensors")), here / "model" / "pytorch_model.bin")


class Planted:
    """Unpickled, it would write the file `pwned`."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def malicious_model(here: Path, of: str) -> None:
    """A pickle for weights that writes a file when it is loaded."""
    model(here, of, drop=("model.safetensors",))
    (here / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(here / "pwned")))


def unfinished_run(here: Path, path: str) -> None:
    """A run's folder that has its config and nothing else."""
    settings = yaml.safe_load((here / "config.yaml").read_text(encoding="utf-8"))
    (here / path).mkdir()
    (here / path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
