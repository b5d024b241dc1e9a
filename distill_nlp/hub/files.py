"""Which files of a student's folder go to the Hub: an allow-list; each is looked through before it goes."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill_nlp.hub.private import Private, is_local_path

CARD = "README.md"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
REPORTS = ("report.md", "report.html", "report.json")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "bpe.codes",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_MODEL_FILES = ("config.json", WEIGHTS, INDEX, ADAPTER_CONFIG, ADAPTER, *_TOKENIZER_FILES)
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_ONNX_WEIGHTS = re.compile(r"[\w.-]+\.onnx(?:[._]data)?")
_ONNX_FILES = ("config.json", "export.json", *_TOKENIZER_FILES)
_NUMBERS = (".safetensors", ".onnx", ".onnx_data", ".onnx.data")
# Of one student alone: none of them may stay beside the weights of another.
_REPLACED = (WEIGHTS, INDEX, ADAPTER_CONFIG, ADAPTER, *REPORTS)
# Where a model or a tokenizer was loaded from, which Transformers may write into its own files.
_ORIGINS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")
# These are looked through, but what looks like a path in them is an entry of the vocabulary.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")


@dataclass
class HubFile:
    """A file as it will be in the repository: a path here, or the bytes themselves where they had to be changed."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def student_files(folder: Path, private: Private, prefix: str = "") -> list[HubFile]:
    """Config, weights and tokenizer of a student's folder, scrubbed.

    Args:
        folder: of a finished student, or a training checkpoint.
        private: what must not leave.
        prefix: of the names in the repository, such as `last-checkpoint/`.

    Raises:
        ValueError: there are no weights, or a file holds something private that cannot be taken out of it.
    """
    names = [name for name in _MODEL_FILES if (folder / name).is_file()]
    if INDEX in names:
        names += _shards(folder)
    if not {WEIGHTS, INDEX, ADAPTER} & set(names):
        raise ValueError(f"{folder} has no {WEIGHTS}: give the folder of a finished student")
    return [checked(HubFile(prefix + name, folder / name), private) for name in names]


def _shards(folder: Path) -> list[str]:
    named = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    for name in named:
        if not _SHARD.fullmatch(name) or not (folder / name).is_file():
            raise ValueError(f"{folder / INDEX} names the weights {name!r}, which are not there; save the model again")
    return named


def report_files(run: Path, private: Private) -> list[HubFile]:
    """The report of a run as Markdown, HTML and JSON, what there is of it, scrubbed; raises as `student_files`."""
    found = [HubFile(name, run / name) for name in REPORTS if (run / name).is_file()]
    return [checked(file, private) for file in found]


def onnx_files(folder: Path, private: Private, name_there: str = "onnx") -> list[HubFile]:
    """An exported model with its config and tokenizer, in a folder of its own there; raises as `student_files`."""
    names = sorted(path.name for path in folder.iterdir() if _ONNX_WEIGHTS.fullmatch(path.name) and path.is_file())
    if not any(name.endswith(".onnx") for name in names):
        raise ValueError(f"{folder} has no .onnx file: export the student first")
    names += [name for name in _ONNX_FILES if (folder / name).is_file()]
    return [checked(HubFile(f"{name_there}/{name}", folder / name), private) for name in names]


def left_over(there: Collection[str], files: Sequence[HubFile]) -> list[str]:
    """Weights, adapters, reports and exports that earlier pushes left in a repository and that this one does not send.

    Beside other weights they mislead: with an `adapter_config.json` the adapter's base is loaded, and a report is on
    another student. All else may be the user's own.

    Args:
        there: names of all files of the branch.
        files: that are sent.

    Example:
        >>> left_over(["adapter_config.json", "notes.md"], [HubFile("model.safetensors", b"")])
        ['adapter_config.json']
    """
    sent, found = {file.name for file in files}, []
    for name in sorted(set(there) - sent):
        folder, _, last = name.rpartition("/")
        of_student = last in _REPLACED or _SHARD.fullmatch(last)
        is_export = re.fullmatch(r"onnx[^/]*", folder) and f"{folder}/export.json" in there
        of_export = is_export and (last in _ONNX_FILES or _ONNX_WEIGHTS.fullmatch(last))
        if of_export if folder else of_student:
            found.append(name)
    return found


def checked(file: HubFile, private: Private) -> HubFile:
    """The file, with what is private taken out of its JSON or Markdown.

    Raises:
        ValueError: something private is left in it, or its JSON cannot be read.
    """
    name = file.name.rpartition("/")[2]
    if name.endswith(".json") and name not in _VOCABULARIES:
        content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        if name == ADAPTER_CONFIG:
            _refuse_local_base(content)
        try:
            cleaned = private.clean_json(content, drop=[key for key in _ORIGINS if _is_local_origin(content, key)])
        except ValueError as error:
            raise ValueError(f"{file.name} is no JSON: {error}") from error
        if cleaned != content:
            file = HubFile(file.name, cleaned)
    elif name in ("report.md", "report.html") and isinstance(file.content, Path):
        content = text = file.content.read_bytes()
        for folder in sorted(private.folders, key=len, reverse=True):
            text = text.replace(folder.encode() + b"/", b"")
        if text != content:
            file = HubFile(file.name, text)
    if what := _private_thing(file, private):
        raise ValueError(f"{file.name} holds {what}, which must not leave this machine: take it out, or leave the file")
    return file


def _is_local_origin(content: bytes, key: str) -> bool:
    """Whether a config tells where on this machine it came from, which is dropped; an id on the Hub stays."""
    value = json.loads(content)
    origin = value.get(key) if isinstance(value, dict) else None
    return isinstance(origin, str) and (is_local_path(origin) or Path(origin).exists())


def _refuse_local_base(content: bytes) -> None:
    base = json.loads(content).get("base_model_name_or_path")
    if isinstance(base, str) and base and (is_local_path(base) or Path(base).exists()):
        raise ValueError(
            "the adapter belongs to a base model in a local folder, which nobody else has: merge it into the student "
            "(merge_and_unload), or start from a model on the Hub"
        )


def _private_thing(file: HubFile, private: Private) -> str | None:
    if isinstance(file.content, bytes) or not file.size:
        return private.found_in(file.content if isinstance(file.content, bytes) else b"")
    # Weights are looked through where they lie: they may be larger than what is free in memory.
    with open(file.content, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return private.found_in(content, weights=file.name.endswith(_NUMBERS))


def listing(files: Sequence[HubFile]) -> list[str]:
    """One line for each file, its size in front, and their sum."""
    lines = [f"{file.size:>14,}  {file.name}" for file in files]
    return [*lines, f"{sum(file.size for file in files):>14,}  bytes in {len(files)} files"]
