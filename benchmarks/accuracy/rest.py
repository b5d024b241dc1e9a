"""The training texts that a sample leaves, as a pool without labels."""

from __future__ import annotations

from pathlib import Path

from distill_nlp.data import sample, texts_of
from distill_nlp.data_files import load_split


def write_rest(dataset: Path, target: Path, size: int, seed: int = 0) -> None:
    """Writes the texts of `train` that teacher and students have not learned from.

    Args:
        dataset: folder of a data set, its texts in the column `text`.
        target: parquet file with the one column `text`.
        size: `data.max_train_samples`; a text that stands in the sample is not in the rest, however often it occurs.
        seed: `data.seed`, by which the sample is drawn.
    """
    texts = load_split(str(dataset), "train").select_columns(["text"])
    taken = texts_of(sample(texts, size, seed))
    rest = texts.filter(lambda text: (text,) not in taken, input_columns="text")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.tmp")
    rest.to_parquet(partial)
    partial.replace(target)
