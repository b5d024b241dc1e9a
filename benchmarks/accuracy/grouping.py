"""Several classes taken for one, as the makers of a data set do."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write_grouped(
    source: Path, target: Path, column: str, names: list[str], groups: dict[str, list[str]], single: bool = False
) -> None:
    """Copies the splits of a data set of several labels per text, with groups in the place of its classes.

    Args:
        source: folder of parquet files with a column of lists of class indices.
        target: folder for files of the same names, with the texts and lists of group indices.
        column: of the labels.
        names: of the classes, by index.
        groups: name -> classes in it, in the order of the new indices; each class stands in one.
        single: only the texts of one group, whose index is their label instead of a list.

    Raises:
        ValueError: a class in no group, or in two.
    """
    members = [name for group in groups.values() for name in group]
    if wrong := [name for name in sorted({*members, *names}) if members.count(name) != names.count(name)]:
        raise ValueError(f"each class must stand in one group; there are none or two for {', '.join(wrong)}")
    place = {names.index(name): i for i, group in enumerate(groups.values()) for name in group}
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("*.parquet")):
        table = pq.read_table(file)
        labels = [sorted({place[label] for label in row}) for row in table[column].to_pylist()]
        if single:
            alone = [len(row) == 1 for row in labels]
            table, labels = table.filter(pa.array(alone)), [row[0] for row in labels if len(row) == 1]
        kind = pa.int64() if single else pa.list_(pa.int64())
        made = pa.table({"text": table["text"], column: pa.array(labels, kind)})
        partial = target / f".{file.name}.tmp"
        pq.write_table(made, partial)
        partial.replace(target / file.name)
