"""Files of text looked through before they are parsed: UTF-8, header, quotation marks."""

from __future__ import annotations

import codecs
import csv
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_nlp.errors import UsageError, shown

SEPARATORS = {".csv": ",", ".tsv": "\t"}
_MOST_COLUMNS = 10_000


def check_quotes(file: Path, columns: Mapping[str, Sequence[Any]], first_row: int = 0) -> None:
    """Refuses a row of a tsv that has taken in those after it, from a quotation mark to the next.

    Many such files are written without quotes, and a field may begin with a mark of its own. The lines within the field
    then have as many tabs as rows have from and up to its column, and a value that other rows have in one of theirs.

    Args:
        file: that they are of.
        columns: all of them.
        first_row: number of their first row in the file.
    """
    names = list(columns)
    for place, name in enumerate(names if len(names) > 1 else ()):
        for row, value in enumerate(columns[name], first_row):
            if not isinstance(value, str) or "\n" not in value:
                continue
            first, *inner, last = (line.split("\t") for line in value.split("\n"))
            if [len(first), len(last)] != [len(names) - place, place + 1] or any(len(i) != len(names) for i in inner):
                continue
            cells = [*zip(names[place + 1 :], first[1:], strict=True), *zip(names, last[:-1], strict=False)]
            if any(cell in map(str, columns[other]) for other, cell in cells):
                raise UsageError(
                    f"data: row {row} of {file} holds lines that look like rows, {shown(value)}: a field begins with a "
                    "quotation mark; put fields that have some in quotes and double theirs, or write the file as jsonl"
                )


def check_header(file: Path, separator: str) -> None:
    """Refuses a name that stands twice, whose second column would be renamed in silence, and columns without end."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            names = next(csv.reader(lines, delimiter=separator), [])
    except csv.Error:
        # The parser says what and where.
        return
    finally:
        csv.field_size_limit(limit)
    if len(names) > _MOST_COLUMNS:
        raise UsageError(
            f"data: {file} has {len(names):,} columns, at most {_MOST_COLUMNS:,} are read; keep those needed"
        )
    if twice := next((name for i, name in enumerate(names) if name and name in names[:i]), None):
        raise UsageError(f"data: {file} names the column {shown(twice)} twice; keep one")


def check_utf8(file: Path) -> None:
    """Reads a file through once, and names the line where it stops being text in UTF-8.

    Raises:
        UsageError: the file is not UTF-8, or has a NUL byte, which parsers end a text at.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            try:
                decoder.decode(chunk, final=False)
            except UnicodeDecodeError as error:
                line += chunk[: error.start].count(b"\n")
                raise UsageError(
                    f"data: {file} is not UTF-8 (line {line}); convert it, e.g. "
                    f"iconv -f latin1 -t utf-8 {os.path.basename(file)}"
                ) from None
            if (place := chunk.find(b"\0")) >= 0:
                line += chunk[:place].count(b"\n")
                raise UsageError(
                    f"data: {file} has a NUL byte (line {line}); it is no text in UTF-8, or a damaged one: take it out"
                )
            line += chunk.count(b"\n")
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise UsageError(f"data: {file} is not UTF-8 (it ends within a character)") from None
