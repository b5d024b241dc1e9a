"""The texts that an export is compared on: real rows with their labels, or a few built-in ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill_nlp.config import SYNTHETIC, DataSection
from distill_nlp.data import as_classes, load_rows
from distill_nlp.errors import UsageError
from distill_nlp.labels import label_names
from distill_nlp.losses.base import ModelShape

# Of several lengths, kinds and scripts; written for this.
_BUILT_IN = (
    "Wonderful.",
    "No.",
    "???",
    "I would not call it bad, but I would not watch it again either.",
    "The delivery was two days late and the box was crushed; the lamp itself works.",
    "Thanks a lot for the quick answer, that solved it!",
    "Shares fell by 3.2 percent on Tuesday after the company cut its outlook for the second time this year.",
    "Wer hat an der Uhr gedreht? Das Essen war kalt, der Kellner unfreundlich, die Rechnung falsch.",
    "Une soirée magnifique, du premier au dernier mot.",
    "とても良い映画でした。",
    "Лучше бы я остался дома.",
    "so so good 😂😂 cant wait for part 2!!!",
    "My account was charged twice (order 48213) and nobody answers the phone. Please refund one of the payments.",
    "<b>Click here</b> to claim your prize: http://example.com/?id=1&x=2",
    "The committee met on 4 May. It discussed the budget, the roof of the old library and the bus line to the harbour, "
    "and it put off all three until autumn.",
    "An hour in I was ready to leave. Then the sister comes home, nobody says a word for five minutes, and everything "
    "that seemed slow and pointless before turns out to have been the point. I have thought about it every day since.",
    "Cheap materials, loud motor, a manual that seems to have been translated by a machine, and a plug that fits no "
    "socket of ours. It did make coffee, once. When I asked for my money back they offered a voucher for the same "
    "shop, which is a joke, and then stopped replying altogether. Avoid.",
    "How do I change the time zone of a calendar without moving all of its events?",
    "The striker limped off after twenty minutes, and with him went every idea that the team had had.",
    "It is what it is.",
    "Not the worst, not the best, not worth the price, not that I would mind seeing it on a plane.",
    "Researchers report a gene variant that lowers the risk by a fifth; the sample was small.",
    "LOVE LOVE LOVE this phone, battery lasts forever, camera is insane, only wish it came in green",
    "We walked along the river until the path ended, ate our bread under a bridge in the rain, missed the last train, "
    "slept in a station, lost a shoe, found a dog, gave the dog back, and agreed at breakfast that it had been our "
    "best holiday in years, though none of us could have said why, and none of us has ever proposed to do it again. "
    * 4,
)


@dataclass(frozen=True)
class Texts:
    """Texts to compare on.

    Args:
        texts: N of them.
        labels: (N,) class indices of the model, or (N, C) 0 and 1, or None.
        source: what they are, for the record.
        pairs: the N second texts, or None where there are single ones.
    """

    texts: list[str]
    labels: np.ndarray | None
    source: str
    pairs: list[str] | None = None


def built_in_texts(pairs: bool = False) -> Texts:
    """Texts for the case that no data are given, or pairs of them; none has a label."""
    if pairs:
        return Texts(list(_BUILT_IN), None, "built-in pairs", list(reversed(_BUILT_IN)))
    return Texts(list(_BUILT_IN), None, "built-in texts")


def load_texts(
    data: str,
    split: str | None,
    text_column: str,
    label_column: str,
    max_rows: int,
    config: Any,
    labeled: bool = True,
    text_pair_column: str | None = None,
) -> Texts:
    """Rows of a split with their labels, as class indices of the model.

    Args:
        data: folder, file or Hub id, or `synthetic`.
        split: where not given, `test`, or the only one of a file.
        text_column, label_column: labels are left out where there is no such column.
        max_rows: drawn at random, always the same.
        config: of the model.
        labeled: whether labels are wanted.
        text_pair_column: of the second texts, where the rows are pairs.

    Raises:
        UsageError: no such data, split or column, or labels that are not the model's.
    """
    split = split or ("train" if Path(data).expanduser().is_file() else "test")
    section = DataSection(
        dataset=data, text_column=text_column, text_pair_column=text_pair_column, label_column=label_column
    )
    rows, has_labels = load_rows(section, split, labeled)
    if has_labels:
        try:
            rows = as_classes(rows, section, split, label_names(config), ModelShape.from_config(config).problem_type)
        except UsageError as error:
            raise UsageError(
                f"{error}; a --label_column that is not there compares without labels",
            ) from None
    if max_rows < len(rows):
        rows = rows.shuffle(seed=0).select(range(max_rows))
    name = SYNTHETIC if data == SYNTHETIC else Path(data).name
    return Texts(
        list(rows["text"]),
        np.asarray(rows["labels"]) if has_labels else None,
        f"{name}, {split}",
        None if text_pair_column is None else list(rows["text_pair"]),
    )
