"""Who learns from which images: the teacher, the student with its few labels, validation and test."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill_nlp.errors import UsageError
from image_classifiers.files import NO_LABEL, Images, decode, natural_shape, open_source
from image_classifiers.models import Source, agreed


@dataclass
class Data:
    """The images of each training, and of evaluation.

    Args:
        teacher: all labeled training rows.
        labeled: those whose labels the students see.
        student: the same and all others, without labels.
        validation, test: held out from all trainings.
        classes: names, by number.
    """

    teacher: Images
    labeled: Images
    student: Images
    validation: Images
    test: Images
    classes: list[str]

    @property
    def shape(self) -> tuple[int, int]:
        """(channels, size)."""
        return self.test.pixels.shape[1], self.test.pixels.shape[2]


def read_data(options: argparse.Namespace, sources: Sequence[Source]) -> Data:
    """Reads all images, as both models want them, and divides the training rows by who may learn from them."""
    found = open_source(options.data, options.image_column, options.label_column, options.split_seed)
    side, channels = natural_shape(found)
    sides = [options.image_size] if options.image_size else [source.side() for source in sources]
    plain = all(source.config is None for source in sources)
    size = agreed("image sizes", sides, side or (32 if plain else 224))
    channels = agreed("channels", [getattr(source.config, "num_channels", None) for source in sources], channels)
    half = ([0.5] * channels, [0.5] * channels)
    mean, std = agreed("normalizations", [source.normalization for source in sources], half)
    if len(mean) != channels:
        raise UsageError(
            f"the models read {channels} channels, but their preprocessor_config.json normalizes {len(mean)}"
        )
    # The test rows are decoded here too: a broken image shows before the first step, not after the last.
    images = {split: decode(rows, size, channels, mean, std, split) for split, rows in found.splits.items()}
    return divide(images, found.classes, options.labeled, options.validation, options.split_seed)


def divide(
    images: dict[str, Images], classes: list[str], labels: int | None, validation: int | None, seed: int
) -> Data:
    """Who may learn from which rows, by chance; the labels that the students do not see are not looked at.

    Args:
        images: of each split; validation rows are taken out of train where they have none of their own.
        classes: names, by number.
        labels: that the students see, those of validation rows included; None: all.
        validation: rows to take out; a fifth of the labeled rows where not given.
        seed: of the choice.
    """
    train = images["train"]
    order = np.random.default_rng(seed).permutation(np.flatnonzero(train.labels != NO_LABEL))
    carved = "validation" not in images
    own = 0 if carved else len(images["validation"])
    if labels is not None and not own < labels <= own + len(order):
        raise UsageError(
            f"--labeled must be more than {own:,}, the validation rows, and at most {own + len(order):,}, all rows "
            f"with labels; got {labels:,}"
        )
    seen = order if labels is None else order[: labels - own]
    held_out = np.empty(0, dtype=np.int64)
    if carved:
        count = max(1, len(seen) // 5) if validation is None else validation
        if count >= len(seen):
            raise UsageError(f"--validation {count} leaves no training row of the {len(seen):,} labeled ones")
        held_out, seen, order = seen[:count], seen[count:], order[count:]
        images = images | {"validation": train.take(held_out)}
    elif validation is not None:
        raise UsageError("--validation is for data without validation rows; these have some")
    learned = np.setdiff1d(np.arange(len(train)), held_out)
    return Data(
        teacher=train.take(np.sort(order)),
        labeled=train.take(np.sort(seen)),
        student=train.take(learned, labeled=np.isin(learned, seen)),
        validation=images["validation"],
        test=images["test"],
        classes=classes,
    )
