"""Blocks of a page that are replaced one by one: the tables of what was run anew, those of the rest as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from distill_nlp.durable_files import write_text


def put_blocks(page: Path, mark: str, word: str, blocks: Mapping[str, str]) -> None:
    """Puts each block in the place of its former one, or beside the others, in the order of their names.

    Args:
        page: file with the lines `<!-- MARK: begin -->` and `<!-- MARK: end -->`; what is not between them stays.
        mark: of the place.
        word: before a block's name, in the line `<!-- WORD NAME -->` that begins it.
        blocks: name, without spaces -> Markdown.

    Raises:
        SystemExit: the file has no such marks.
    """
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    there, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{page} has no lines {begin} and {end} to put the tables between")
    _, *parts = re.split(rf"<!-- {word} (\S+) -->", there)
    kept = {name: body.strip() for name, body in zip(parts[::2], parts[1::2], strict=True)}
    body = "\n\n".join(f"<!-- {word} {name} -->\n{text}" for name, text in sorted({**kept, **blocks}.items()))
    write_text(page, f"{before}{begin}\n{body}\n{end}{after}")
