"""`distill-nlp predict`: texts in, labels out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from distill_nlp.data_files import load_split
from distill_nlp.errors import UsageError
from distill_nlp.inference import encoded_rows, predict_logits
from distill_nlp.lengths import longest_input
from distill_nlp.loading import check_classifier, load_config, load_tokenizer
from distill_nlp.losses.base import MULTI_LABEL, ModelShape
from distill_nlp.onnx_model import load_for_inference
from distill_nlp.text_files import check_utf8

_COLUMN_FILES = {".csv", ".tsv", ".json", ".jsonl", ".parquet"}
# Texts that are sorted by length together: memory stays flat on files of any size.
_WINDOW = 2048

Text = str | tuple[str, str]
"""One text, or the two of a pair."""


def read_texts(arguments: list[str], text_column: str = "text", text_pair_column: str | None = None) -> Iterator[Text]:
    """The texts of the command line: themselves, the rows of a file, or the lines of stdin.

    Args:
        arguments: texts, one file, or `-`.
        text_column, text_pair_column: of a file with columns; with the second one each row is a pair.

    Raises:
        UsageError: a file without that column, without texts in it, or not in UTF-8; or pairs of what has no columns.
    """
    no_columns = f"--text_pair_column is for one file with columns ({', '.join(sorted(_COLUMN_FILES))})"
    if arguments == ["-"]:
        if text_pair_column is not None:
            raise UsageError(f"{no_columns}, not for stdin")
        for number, line in enumerate(sys.stdin.buffer, start=1):
            try:
                yield line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise UsageError(f"line {number} of stdin is not UTF-8") from None
        return
    for argument in arguments:
        path = Path(argument)
        with suppress(RuntimeError):
            # A text may begin with a tilde.
            path = path.expanduser()
        # A name that was meant as a file must not be classified as a text.
        looks_like_file = path.suffix.lower() in {*_COLUMN_FILES, ".txt"} and not any(c.isspace() for c in argument)
        # Unlike `Path.exists`, it takes a text that is longer than a name may be.
        exists = bool(argument) and os.path.exists(path)
        if (exists or looks_like_file) and not (len(arguments) == 1 and exists and path.is_file()):
            problem = "there is no such file" if not exists else "give one file, or texts"
            raise UsageError(f"cannot read texts from {argument}: {problem}")
    is_file = len(arguments) == 1 and exists
    if text_pair_column is not None and not (is_file and path.suffix.lower() in _COLUMN_FILES):
        raise UsageError(f"{no_columns}, not for {path.name if is_file else 'texts'}")
    if text_pair_column == text_column:
        raise UsageError(f"--text_column and --text_pair_column are both {text_column!r}; a pair has two columns")
    if not is_file:
        yield from arguments
        return
    if path.suffix.lower() not in _COLUMN_FILES:
        check_utf8(path)
        with open(path, encoding="utf-8") as lines:
            yield from (line.rstrip("\n") for line in lines)
        return
    rows = load_split(str(path), "train")
    columns = [name for name in (text_column, text_pair_column) if name is not None]
    for name in columns:
        if name not in rows.column_names:
            raise UsageError(f"{path} has no column {name!r}; there is: {', '.join(rows.column_names)}")
    for i, texts in enumerate(zip(*(rows[name] for name in columns), strict=True)):
        for name, text in zip(columns, texts, strict=True):
            if not isinstance(text, str):
                raise UsageError(f"row {i} of {path} has no text in {name}: {text!r}")
        yield texts[0] if text_pair_column is None else texts


def predict(
    model: str, texts: Iterable[Text], as_json: bool = False, batch_size: int = 32, max_length: int | None = None
) -> Iterator[str]:
    """One line for each text or pair, in order: `label<TAB>score<TAB>text`, or JSON with the scores of all labels.

    A pair stands as `text ||| second text`, in JSON as `text` and `text_pair`.

    A multi-label model gives all labels whose probability is above 0.5, the most probable first, joined by commas as
    their scores are, and `-` in both places where there is none; in JSON a list `labels`.

    Args:
        model: folder or Hub id of a classifier, or an exported folder.
        texts: read as they are needed; all of them single texts, or all of them pairs.
        as_json: JSON lines instead of text.
        batch_size: texts of one forward pass.
        max_length: in tokens; what the tokenizer or the model allows where not given.

    Raises:
        UsageError: the model is no classifier, or a regression.
    """
    config = load_config(model)
    check_classifier(model, config)
    classifier = load_for_inference(model).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(model, config=config)
    limit = longest_input(config, tokenizer, max_length)
    stream = iter(texts)
    while window := list(islice(stream, _WINDOW)):
        columns = [window, None] if isinstance(window[0], str) else list(zip(*window, strict=True))
        rows = encoded_rows(tokenizer, *columns, limit)
        logits = torch.from_numpy(predict_logits(classifier, tokenizer, rows, batch_size))
        several = ModelShape.from_config(config).problem_type == MULTI_LABEL
        scores = torch.sigmoid(logits) if several else torch.softmax(logits, dim=-1)
        for text, row in zip(window, scores.tolist(), strict=True):
            named = {config.id2label[i]: score for i, score in enumerate(row)}
            ranked = sorted(named, key=lambda name: -named[name])
            chosen = [name for name in ranked if named[name] > 0.5] if several else ranked[:1]
            yield _as_json(text, named, chosen, several) if as_json else _as_text(text, named, chosen)


def _as_json(text: Text, scores: dict[str, float], chosen: list[str], several: bool) -> str:
    rounded = {name: round(score, 6) for name, score in scores.items()}
    answer: dict[str, Any] = {"labels": chosen} if several else {"label": chosen[0], "score": rounded[chosen[0]]}
    texts = {"text": text} if isinstance(text, str) else dict(zip(("text", "text_pair"), text, strict=True))
    return json.dumps({**texts, **answer, "scores": rounded}, ensure_ascii=False)


def _as_text(text: Text, scores: dict[str, float], chosen: list[str]) -> str:
    labels, shown = ",".join(chosen) or "-", ",".join(f"{scores[name]:.4f}" for name in chosen) or "-"
    parts = [text] if isinstance(text, str) else text
    return f"{labels}\t{shown}\t{' ||| '.join(' '.join(part.split()) for part in parts)}"
