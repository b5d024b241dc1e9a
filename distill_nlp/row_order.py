"""A Trainer whose rows come in an order that is known: in training by seed and epoch, in prediction as they stand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, SequentialSampler
from transformers.trainer_utils import has_length

from distill_nlp.arguments import setting_of
from distill_nlp.arrow_columns import known_lengths
from distill_nlp.resumable import ResumableTrainer
from distill_nlp.row_numbers import large_random_order
from distill_nlp.sampling import grouped_sampler, mixed_sampler


class OrderedTrainer(ResumableTrainer):
    """Orders training rows alike on all ranks, evaluates batches of like lengths, and predicts row by row.

    With `group_by_length`, the stock Trainer shuffles the rows of `evaluate` and of `predict`, too, whose answers then
    are those of other rows than the caller's.
    """

    _in_order = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's sampler, but where its order would differ over ranks, or where batches keep a ratio."""
        data = self.train_dataset if train_dataset is None else train_dataset
        own = (data, self.args, self._train_batch_size, lambda: int(self.state.epoch or 0))
        if setting_of(self.args, "unlabeled_ratio") is not None:
            return mixed_sampler(*own)
        strategy, ordered = self.args.train_sampling_strategy, None
        if strategy == "group_by_length":
            ordered = grouped_sampler(*own)
        elif strategy == "random":
            ordered = large_random_order(data, self.args, own[-1])
        return super()._get_train_sampler(train_dataset) if ordered is None else ordered

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """With `group_by_length` the longest rows first, where lengths are known and no caller counts on the order."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        if eval_dataset is None or not has_length(eval_dataset):
            return None
        lengths = None if self._in_order else known_lengths(eval_dataset, self.args)
        if lengths is not None:
            return np.argsort(-lengths, kind="stable").tolist()
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As the Trainer's, its rows as they stand."""
        with _changed(self, _in_order=True), _changed(self.args, dataloader_persistent_workers=False):
            return super().get_test_dataloader(test_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the Trainer's; workers persist for its own data alone.

        It would take those for any other data too, and accelerate keeps each loader, and so its workers, to the end.
        """
        own = eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset
        persist = own and self.args.dataloader_persistent_workers
        with _changed(self.args, dataloader_persistent_workers=persist):
            return super().get_eval_dataloader(eval_dataset)


@contextmanager
def _changed(what: Any, **values: Any) -> Iterator[None]:
    """Attributes of an object as they are to be for now."""
    before = {name: getattr(what, name) for name in values}
    vars(what).update(values)
    try:
        yield
    finally:
        vars(what).update(before)
