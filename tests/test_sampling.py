"""Batches of like lengths, and with a part of unlabelled rows: in one process, resumed, and in two gloo processes.

The two processes run this file: torchrun --standalone --nproc_per_node 2 tests/test_sampling.py FOLDER
"""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from helpers import largest_difference, make_arguments, make_dataset, make_student, parameters_of
from transformers import DataCollatorWithPadding

from distill_nlp import CrossEntropyLoss, arrow_columns, sampling
from distill_nlp.arrow_columns import labeled_rows
from distill_nlp.sampling import GroupedSampler, MixedSampler, grouped_sampler, mixed_sampler


def mask(labeled: int, unlabeled: int, seed: int = 0) -> np.ndarray:
    """Rows of both kinds, mixed up."""
    return np.random.default_rng(seed).permutation([True] * labeled + [False] * unlabeled)


def some_lengths(rows: int, seed: int = 1) -> np.ndarray:
    """No two rows are of one length."""
    return 10 + np.random.default_rng(seed).permutation(rows)


def order_of(labeled, epoch=0, size=4, ratio=0.5, seed=0, **settings) -> list[int]:
    return list(MixedSampler(labeled, size, ratio, seed, lambda: epoch, **settings))


def batches_of(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


KINDS_OF_ORDER = ("random", "sequential", "group_by_length")


def settings_of(strategy: str, rows: int) -> dict:
    lengths = some_lengths(rows) if strategy == "group_by_length" else None
    return {"shuffle": strategy != "sequential", "lengths": lengths}


# ---- the sampler ----


@pytest.mark.parametrize("strategy", KINDS_OF_ORDER)
@pytest.mark.parametrize(
    ("size", "ratio", "unlabeled"),
    [(8, 0.5, 4), (8, 0.25, 2), (8, 0.3, 2), (8, 0.33, 3), (8, 0.01, 1), (8, 0.99, 7), (2, 0.9, 1), (3, 0.5, 2)],
)
def test_every_batch_holds_the_ratio(size, ratio, unlabeled, strategy):
    labeled = mask(60, 36)
    for epoch in range(3):
        batches = batches_of(order_of(labeled, epoch, size, ratio, **settings_of(strategy, 96)), size)
        assert len(batches) == 96 // size
        assert {sum(not labeled[row] for row in batch) for batch in batches} == {unlabeled}


@pytest.mark.parametrize("strategy", KINDS_OF_ORDER)
@pytest.mark.parametrize(
    ("rest", "unlabeled"), [(1, (0,)), (2, (1,)), (3, (1,)), (4, (1,)), (5, (1,)), (6, (2,)), (7, (2,))]
)
def test_a_last_batch_that_is_smaller_keeps_the_ratio_as_nearly_as_it_can(rest, unlabeled, strategy):
    labeled = mask(40, 40 + rest)
    order = order_of(labeled, size=8, ratio=0.27, **settings_of(strategy, 80 + rest))
    assert len(order) == 80 + rest
    assert sum(not labeled[row] for row in order[80:]) in unlabeled


@pytest.mark.parametrize(("ratio", "unlabeled"), [(0.4, 0), (0.6, 1)])
def test_a_last_batch_of_one_row_is_of_the_larger_kind(ratio, unlabeled):
    labeled = mask(4, 5)
    assert sum(not labeled[row] for row in order_of(labeled, size=8, ratio=ratio)[8:]) == unlabeled


@pytest.mark.parametrize("strategy", KINDS_OF_ORDER)
def test_an_epoch_has_as_many_rows_as_the_data(strategy):
    labeled = mask(20, 57)
    sampler = MixedSampler(labeled, 8, 0.4, 0, **settings_of(strategy, 77))
    assert len(sampler) == len(list(sampler)) == 77


@pytest.mark.parametrize("strategy", KINDS_OF_ORDER)
@pytest.mark.parametrize(("labeled", "unlabeled"), [(20, 57), (57, 20), (3, 90), (1, 30), (5, 2)])
def test_no_row_comes_again_before_all_of_its_kind_came_over_all_epochs(labeled, unlabeled, strategy):
    labels = mask(labeled, unlabeled)
    rows = len(labels)
    epochs = [order_of(labels, epoch, size=8, ratio=0.4, **settings_of(strategy, rows)) for epoch in range(6)]
    for kind in (True, False):
        counts = Counter()
        for order in epochs:
            counts.update(row for row in order if labels[row] == kind)
            seen = [counts[row] for row in np.flatnonzero(labels == kind)]
            assert max(seen) - min(seen) <= 1


def test_a_pass_over_a_kind_is_cut_by_epochs_and_nothing_else():
    labels = mask(20, 57)
    orders = [order_of(labels, epoch, size=8, ratio=0.4) for epoch in range(6)]
    for kind, rows in ((True, 20), (False, 57)):
        stream = [row for order in orders for row in order if labels[row] == kind]
        passes = batches_of(stream, rows)
        whole = [one for one in passes if len(one) == rows]
        assert len(whole) > 1
        assert all(sorted(one) == np.flatnonzero(labels == kind).tolist() for one in whole)
        assert len({tuple(one) for one in whole}) == len(whole)


def test_sequential_keeps_the_order_of_the_data_in_both_kinds_and_goes_on_in_the_next_epoch():
    labels = np.array([True, False, False, True, False, False, False, True])
    first, second = (order_of(labels, epoch, size=4, ratio=0.5, shuffle=False) for epoch in (0, 1))
    assert [row for row in first if labels[row]] == [0, 3, 7, 0]
    assert [row for row in second if labels[row]] == [3, 7, 0, 3]
    assert [row for row in first if not labels[row]] == [1, 2, 4, 5]
    assert [row for row in second if not labels[row]] == [6, 1, 2, 4]


@pytest.mark.parametrize("strategy", KINDS_OF_ORDER)
def test_the_order_depends_on_seed_and_epoch_alone(strategy):
    labels = mask(60, 36)
    settings = settings_of(strategy, 96)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    order = order_of(labels, 3, seed=7, **settings)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert order_of(labels, 3, seed=7, **settings) == order
    assert order_of(labels, 4, seed=7, **settings) != order
    assert (order_of(labels, 3, seed=8, **settings) == order) == (strategy == "sequential")


def test_a_sampler_asks_for_the_epoch_each_time_that_it_begins():
    now = [0]
    sampler = MixedSampler(mask(60, 36), 4, 0.5, 0, lambda: now[0])
    first = list(sampler)
    assert list(sampler) == first
    now[0] = 1
    assert list(sampler) == order_of(mask(60, 36), 1) != first


def test_the_two_kinds_are_shuffled_independently():
    labels = np.array([True, False] * 50)
    order = order_of(labels, size=2)
    assert [row // 2 for row in order[0::2]] != [row // 2 for row in order[1::2]]


@pytest.mark.parametrize("seed", [-1, 2**40])
def test_any_seed_of_torch_will_do(seed):
    labels = mask(60, 36)
    assert order_of(labels, seed=seed) not in [order_of(labels, seed=other) for other in (0, 1, 2**39)]


@pytest.mark.parametrize(("size", "ratio", "pieces"), [(8, 0.5, 2), (8, 0.5, 4), (12, 0.33, 3), (16, 0.2, 4)])
def test_pieces_of_a_batch_keep_the_ratio_to_within_a_row(size, ratio, pieces):
    labels = mask(50, 46)
    for batch in batches_of(order_of(labels, size=size, ratio=ratio), size):
        share = sum(not labels[row] for row in batch) / pieces
        for piece in batches_of(batch, size // pieces):
            assert abs(sum(not labels[row] for row in piece) - share) < 1


# ---- like lengths together ----


def reference_batches(labels, lengths, size, unlabeled, mega, epoch) -> list[list[int]]:
    """Groups of rows of like lengths, by loops: the rows of the epoch are those of the sampler that only shuffles."""
    order = order_of(labels, epoch, size, unlabeled / size)
    full = len(order) // size
    kinds = [[row for row in order if labels[row]], [row for row in order if not labels[row]]]
    batches, last = [], []
    starts = [m * mega for m in range(max(1, full // mega))]
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        parts = []
        for kind, per_batch in zip(kinds, (size - unlabeled, unlabeled), strict=True):
            part = kind[start * per_batch : None if end is None else end * per_batch]
            parts.append(sorted(part, key=lambda row: -lengths[row]))
        for _ in range((full if end is None else end) - start):
            batches.append([])
            for k, per_batch in enumerate((size - unlabeled, unlabeled)):
                batches[-1] += parts[k][:per_batch]
                parts[k] = parts[k][per_batch:]
        last += parts[0] + parts[1]
    return sorted(map(sorted, batches)), sorted(last)


@pytest.mark.parametrize(
    ("rows", "ranks", "mega"),
    [(30, 1, 1), (67, 1, 4), (67, 2, 4), (1027, 1, 50), (1027, 2, 64), (2403, 2, 100), (3, 1, 1), (9, 4, 4)],
)
@pytest.mark.parametrize("epoch", [0, 3])
def test_rows_of_like_lengths_go_together_as_in_a_loop(rows, ranks, mega, epoch):
    labels, lengths = mask(rows - rows // 3, rows // 3), some_lengths(rows)
    order = order_of(labels, epoch, size=4, ratio=0.25, lengths=lengths, ranks=ranks)
    full = rows // 4 * 4
    batches, last = reference_batches(labels, lengths, 4, 1, mega, epoch)
    assert sorted(map(sorted, batches_of(order[:full], 4))) == batches
    assert sorted(order[full:]) == last


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("rows", [70, 403])
def test_the_longest_row_of_the_epoch_is_in_the_first_batches(rows, ranks):
    labels = mask(rows - 30, 30)
    for seed in range(10):
        lengths = some_lengths(rows, seed)
        order = order_of(labels, seed % 3, size=4, ratio=0.25, seed=seed, lengths=lengths, ranks=ranks)
        assert max(lengths[order]) == max(lengths[order[: 4 * ranks]])


def test_the_order_of_batches_is_shuffled_anew_each_epoch():
    labels, lengths = mask(300, 100), some_lengths(400)
    for epoch in (0, 1):
        order = order_of(labels, epoch, size=4, ratio=0.25, lengths=lengths)
        longest = [max(lengths[batch]) for batch in batches_of(order, 4)]
        falls = np.mean(np.diff(longest) < 0)
        assert 0.3 < falls < 0.7


def test_the_order_of_batches_depends_on_seed_and_epoch():
    batches = np.arange(120).reshape(40, 3)

    def order(seed, epoch):
        return sampling._shuffled(batches, np.ones(120), 1, [seed, 2, epoch]).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 1) != order(0, 0) != order(1, 0)


def test_batches_of_one_step_of_all_ranks_are_of_like_lengths():
    labels, lengths = mask(600, 200), some_lengths(800)
    order = order_of(labels, size=4, ratio=0.25, lengths=lengths, ranks=4)
    longest = np.array([max(lengths[batch]) for batch in batches_of(order, 4)])
    within = np.ptp(longest.reshape(-1, 4), axis=1).mean()
    assert within < 0.2 * np.ptp(longest[::4])
    across = np.ptp(longest[2:-2].reshape(-1, 4), axis=1).mean()
    assert across > 2 * within


def test_fewer_batches_than_ranks_are_handed_out_all_the_same():
    labels = mask(8, 4)
    assert len(order_of(labels, size=4, lengths=some_lengths(12), ranks=4)) == 12


# ---- reading the data ----


@pytest.mark.parametrize("kind", [Value("int64"), Value("int8"), Value("float32")])
def test_a_row_labeled_minus_100_is_unlabelled(kind):
    data = Dataset.from_dict({"labels": [1, -100, 0, -100, -1]}, features=Features({"labels": kind}))
    assert labeled_rows(data).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("kind", [List(Value("float32")), List(Value("int64"), length=2)])
def test_a_row_with_a_list_of_labels_is_unlabelled_where_any_of_them_is(kind):
    rows = [[1, 0], [-100, -100], [0, -100], [1, 1]]
    data = Dataset.from_dict({"labels": rows}, features=Features({"labels": kind}))
    assert labeled_rows(data).tolist() == [True, False, False, True]
    assert labeled_rows(data.select([2, 3, 0])).tolist() == [False, True, True]


@pytest.mark.parametrize("as_list", [False, True])
def test_labels_of_many_chunks_and_of_selected_rows_are_read_in_their_order(as_list, monkeypatch):
    monkeypatch.setattr(arrow_columns, "_CHUNK", 3)
    labels = np.random.default_rng(0).choice([-100, 0, 1], 20)
    data = Dataset.from_dict({"labels": [[v, 1] for v in labels.tolist()] if as_list else labels})
    rows = np.random.default_rng(1).permutation(20)[:17]
    assert labeled_rows(data).tolist() == (labels != -100).tolist()
    assert labeled_rows(data.select(rows)).tolist() == (labels[rows] != -100).tolist()
    assert labeled_rows(data.select([])).tolist() == []


def grouped(tmp_path, data, **settings) -> np.ndarray:
    settings = {"train_sampling_strategy": "group_by_length", "unlabeled_ratio": 0.5} | settings
    return mixed_sampler(data, make_arguments(tmp_path, **settings), 4, lambda: 0)._lengths


def test_lengths_are_those_of_the_tokens_or_of_the_column_that_the_arguments_name(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_columns, "_CHUNK", 3)
    data = make_dataset(11, unlabeled=(1, 6, 7)).select([5, 7, 6, 1, 0, 10, 9])
    tokens = [len(row) for row in data["input_ids"]]
    assert grouped(tmp_path, data).tolist() == tokens
    data = data.add_column("length", list(range(7))).add_column("chars", list(range(20, 27)))
    assert grouped(tmp_path, data).tolist() == list(range(7))
    assert grouped(tmp_path, data, length_column_name="chars").tolist() == list(range(20, 27))
    assert grouped(tmp_path, data, length_column_name="words").tolist() == tokens
    data = data.remove_columns("length")
    assert grouped(tmp_path, data, length_column_name="chars").tolist() == list(range(20, 27))
    assert grouped(tmp_path, data).tolist() == tokens


@pytest.mark.parametrize("strategy", KINDS_OF_ORDER)
def test_the_arguments_become_a_sampler(tmp_path, strategy):
    data = make_dataset(40, unlabeled=tuple(range(0, 40, 3)))
    args = make_arguments(tmp_path, unlabeled_ratio=0.25, train_sampling_strategy=strategy, seed=5)
    lengths = np.array([len(row) for row in data["input_ids"]]) if strategy == "group_by_length" else None
    expected = order_of(
        labeled_rows(data), 2, ratio=0.25, seed=5, lengths=lengths, shuffle=strategy != "sequential", size=8
    )
    assert list(mixed_sampler(data, args, 8, lambda: 2)) == expected


@pytest.mark.parametrize("data_seed", [0, 11])
def test_a_data_seed_takes_the_place_of_the_seed(tmp_path, data_seed):
    data = make_dataset(40, unlabeled=tuple(range(0, 40, 3)))

    def order(**settings):
        settings |= {"unlabeled_ratio": 0.25, "train_sampling_strategy": "random"}
        return list(mixed_sampler(data, make_arguments(tmp_path, **settings), 8, lambda: 0))

    assert order(seed=1, data_seed=data_seed) == order(seed=2, data_seed=data_seed) == order(seed=data_seed)
    assert order(seed=1) != order(seed=2)


def endless():
    return IterableDataset.from_generator(lambda: iter([{"input_ids": [1], "labels": 0}]))


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (make_dataset(8), {}, "no row is unlabelled: for unlabeled_ratio add rows with the label -100"),
        (make_dataset(4, unlabeled=(0, 1, 2, 3)), {}, "no row has a label: unlabeled_ratio mixes"),
        (make_dataset(8).remove_columns("labels"), {}, "no column labels .* only input_ids, .*: rename the column"),
        (endless(), {}, "needs a datasets.Dataset whose rows can be picked by number, got IterableDataset: make one"),
        (make_dataset(8).to_list(), {}, "needs a datasets.Dataset .* got list: make one by datasets.Dataset.from_list"),
        (
            make_dataset(8, unlabeled=(0,)),
            {"size": 1},
            "at least 2 rows in a batch, one of each kind, got 1: raise",
        ),
        (
            make_dataset(8, unlabeled=(0,)).remove_columns("input_ids"),
            {"train_sampling_strategy": "group_by_length"},
            "group_by_length needs the column input_ids .* there is: token_type_ids, .*; or set",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused_with_what_to_do(tmp_path, data, settings, message):
    size = settings.pop("size", 4)
    args = make_arguments(tmp_path, unlabeled_ratio=0.5, **settings)
    with pytest.raises(ValueError, match=message):
        mixed_sampler(data, args, size, lambda: 0)


def test_another_strategy_of_the_trainer_is_refused(tmp_path):
    args = make_arguments(tmp_path, unlabeled_ratio=0.5)
    args.train_sampling_strategy = "batch_rebalance"
    with pytest.raises(ValueError, match="strategy random, sequential, group_by_length, got batch_rebalance: choose"):
        mixed_sampler(make_dataset(8, unlabeled=(0,)), args, 4, lambda: 0)


# ---- in a trainer ----

UNLABELED = (*range(3, 22, 2), 24, 25)
ROWS = 30


def watched(trainer) -> list[list[int]]:
    """Grows by the rows of each micro-batch that the trainer takes, by their number in the data."""
    data = trainer.train_dataset
    number = {tuple(ids): row for row, ids in enumerate(data["input_ids"])}
    if len(number) != len(data):
        raise AssertionError("two rows are alike")
    seen, real = [], trainer.get_batch_samples

    def get_batch_samples(*args):
        batches, counts = real(*args)
        for batch in batches:
            rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
            seen.append([number[tuple(t for t, m in zip(ids, is_real, strict=True) if m)] for ids, is_real in rows])
        return batches, counts

    trainer.get_batch_samples = get_batch_samples
    return seen


def trained(folder, resume_from=None, **settings):
    """8 steps in each of two epochs, with dropout; checkpoint 11 lies inside the second."""
    settings = {
        "train_sampling_strategy": "random",
        "unlabeled_ratio": 0.5,
        "max_steps": -1,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 11,
        "lr_scheduler_type": "linear",
    } | settings
    trainer = helpers.make_trainer(
        folder,
        student=make_student(dropout=0.1),
        losses={"ce": CrossEntropyLoss()},
        data=make_dataset(ROWS, unlabeled=UNLABELED),
        **settings,
    )
    seen = watched(trainer)
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer, seen


def unlabeled_in(batches) -> list[int]:
    return [sum(row in UNLABELED for row in batch) for batch in batches]


def expected_order(epoch, strategy="random", ranks=1):
    data = make_dataset(ROWS, unlabeled=UNLABELED)
    lengths = np.array([len(row) for row in data["input_ids"]]) if strategy == "group_by_length" else None
    return order_of(labeled_rows(data), epoch, seed=3, lengths=lengths, ranks=ranks, shuffle=strategy != "sequential")


@pytest.mark.parametrize("strategy", KINDS_OF_ORDER)
def test_a_training_takes_the_batches_of_the_sampler_epoch_by_epoch(tmp_path, strategy):
    trainer, seen = trained(tmp_path, train_sampling_strategy=strategy)
    assert trainer.state.global_step == 16
    assert unlabeled_in(seen) == ([2] * 7 + [1]) * 2
    assert [row for batch in seen for row in batch] == [r for epoch in (0, 1) for r in expected_order(epoch, strategy)]


def test_accumulated_batches_and_a_second_training_begin_with_the_first_epoch(tmp_path):
    trainer, seen = trained(tmp_path, gradient_accumulation_steps=2, save_strategy="no")
    assert trainer.state.global_step == 8
    assert [row for batch in seen for row in batch] == expected_order(0) + expected_order(1)
    seen.clear()
    trainer.train()
    assert [row for batch in seen for row in batch] == expected_order(0) + expected_order(1)


def test_without_a_ratio_the_rows_come_as_the_trainer_deals_them(make_trainer):
    sampler = make_trainer(train_sampling_strategy="random", data=make_dataset(8))._get_train_sampler()
    assert type(sampler) is torch.utils.data.RandomSampler


def test_a_batch_size_that_the_trainer_found_is_that_of_the_sampler(make_trainer):
    data = make_dataset(ROWS, unlabeled=UNLABELED)
    trainer = make_trainer(data=data, unlabeled_ratio=0.3, train_sampling_strategy="random")
    trainer._train_batch_size = 6
    assert list(trainer._get_train_sampler()) == order_of(labeled_rows(data), size=6, ratio=0.3, seed=3)
    assert [len(batch["labels"]) for batch in trainer.get_train_dataloader()] == [6] * 5


def test_the_data_given_to_the_trainers_method_are_those_that_are_mixed(make_trainer):
    trainer = make_trainer(data=make_dataset(8, unlabeled=(1, 4)), unlabeled_ratio=0.5)
    assert len(trainer._get_train_sampler(make_dataset(ROWS, unlabeled=UNLABELED))) == ROWS


@pytest.mark.parametrize("strategy", KINDS_OF_ORDER)
def test_a_run_resumed_inside_its_second_epoch_is_bit_identical(tmp_path, strategy):
    whole, seen = trained(tmp_path / "whole", train_sampling_strategy=strategy)
    checkpoint = tmp_path / "whole" / "checkpoint-11"
    resumed, later = trained(tmp_path / "resumed", str(checkpoint), train_sampling_strategy=strategy)
    assert later == seen[11:]
    assert len(later) == 5
    assert largest_difference(parameters_of(resumed.model), parameters_of(whole.model)) == 0


def test_a_run_resumed_between_two_epochs_is_bit_identical(tmp_path):
    whole, seen = trained(tmp_path / "whole", save_steps=8)
    resumed, later = trained(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-8"))
    assert later == seen[8:]
    assert largest_difference(parameters_of(resumed.model), parameters_of(whole.model)) == 0


# ---- batches of like lengths ----

GROUPED = {"train_sampling_strategy": "group_by_length", "unlabeled_ratio": None}


def grouped_order(lengths, size=4, seed=0, epoch=0, **settings) -> list[int]:
    return list(GroupedSampler(lengths, size, seed, lambda: epoch, **settings))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 31, 64, 257])
def test_each_row_comes_once_an_epoch_in_a_new_order(rows, ranks):
    lengths = some_lengths(rows)
    orders = [grouped_order(lengths, epoch=epoch, ranks=ranks) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(rows)) for order in orders)
    assert len(GroupedSampler(lengths, 4, 0)) == rows
    if rows > 30:
        assert orders[0] != orders[1]


def test_batches_have_like_lengths_and_the_longest_comes_first():
    """400 rows, two mega-batches of 25 batches: sorted within each, a batch spans about a 25th of the lengths."""
    lengths = some_lengths(400)
    batches = [lengths[batch] for batch in batches_of(grouped_order(lengths, size=8), 8)]
    assert max(batch.max() - batch.min() for batch in batches) < 60
    assert batches[0].max() == lengths.max()
    # And the rest in no order of length.
    firsts = [batch.max() for batch in batches[1:]]
    assert firsts not in (sorted(firsts), sorted(firsts, reverse=True))


def test_batches_that_run_at_the_same_time_have_like_lengths():
    """Parts of 24 batches are sorted: the 4 batches of a step span about a sixth of the lengths."""
    lengths = some_lengths(400)
    batches = [lengths[batch] for batch in batches_of(grouped_order(lengths, ranks=4), 16)]
    assert max(batch.max() - batch.min() for batch in batches) < 120


def test_the_order_of_like_lengths_takes_nothing_from_the_global_generator():
    lengths = some_lengths(40)
    before = torch.random.get_rng_state()
    assert grouped_order(lengths, seed=-7) == grouped_order(lengths, seed=-7)
    assert grouped_order(lengths, seed=1) != grouped_order(lengths, seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_lengths_are_those_of_their_column_or_of_the_tokens(tmp_path):
    data = make_dataset(ROWS)
    args = make_arguments(tmp_path, train_sampling_strategy="group_by_length", seed=5)
    tokens = np.array([len(row) for row in data["input_ids"]])
    assert list(grouped_sampler(data, args, 4, lambda: 2)) == grouped_order(tokens, seed=5, epoch=2)
    other = some_lengths(ROWS)
    assert list(grouped_sampler(data.add_column("length", other), args, 4, lambda: 0)) == grouped_order(other, seed=5)
    args.data_seed = 9
    assert list(grouped_sampler(data, args, 4, lambda: 0)) == grouped_order(tokens, seed=9)


def test_data_without_lengths_in_columns_are_left_to_the_trainer(make_trainer, tmp_path):
    args = make_arguments(tmp_path, train_sampling_strategy="group_by_length")
    assert grouped_sampler([{"input_ids": [1, 2]}], args, 4, lambda: 0) is None
    assert grouped_sampler(Dataset.from_dict({"pixels": [[1], [2]]}), args, 4, lambda: 0) is None
    trainer = make_trainer(train_sampling_strategy="group_by_length", data=make_dataset(8).to_list())
    assert len(trainer._get_train_sampler()) == 8


def test_a_training_of_like_lengths_resumed_inside_an_epoch_is_bit_identical(tmp_path):
    """With dropout, which draws from the generator that Transformers' own order comes from."""
    whole, seen = trained(tmp_path / "whole", **GROUPED)
    assert sorted(row for batch in seen[:8] for row in batch) == list(range(ROWS))
    resumed, later = trained(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-11"), **GROUPED)
    assert later == seen[11:]
    assert largest_difference(parameters_of(resumed.model), parameters_of(whole.model)) == 0


# ---- two processes ----

PADDED = {"padding": "max_length", "max_length": 12}
SCENARIOS = {
    **{strategy: {"train_sampling_strategy": strategy, "save_steps": 6} for strategy in KINDS_OF_ORDER},
    "grouped": GROUPED | {"save_steps": 6},
    "split": {"per_device_train_batch_size": 8, "accelerator_config": {"split_batches": True}, "save_steps": 6},
    # Batches that are sent from one process must be of one width.
    "dispatched": {"accelerator_config": {"dispatch_batches": True}, "data_collator": PADDED, "save_strategy": "no"},
}


def run_of_ranks(folder, resume_from=None, **settings):
    if "data_collator" in settings:
        settings["data_collator"] = DataCollatorWithPadding(helpers.make_tokenizer(), **settings["data_collator"])
    # An optimizer with state cannot be resumed on several CPU ranks in Transformers 5.6.
    trainer, seen = trained(folder, resume_from, optim="sgd", learning_rate=0.02, **settings)
    results = {"batches": seen, "world_size": trainer.accelerator.num_processes, "steps": trainer.state.global_step}
    return results, parameters_of(trainer.model)


def main():
    folder = Path(sys.argv[1])
    results, states = {}, {}
    for name, settings in SCENARIOS.items():
        results[name], states[name] = run_of_ranks(folder / name, **settings)
        if "save_steps" in settings:
            checkpoint = str(folder / name / "checkpoint-6")
            again = f"{name}-resumed"
            results[again], states[again] = run_of_ranks(folder / again, checkpoint, **settings)
    rank = torch.distributed.get_rank()
    torch.save(states, folder / f"states-{rank}.pt")
    (folder / f"results-{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two ranks has left: (results, parameters)."""
    folder = tmp_path_factory.mktemp("mixed_ranks")
    tests = Path(__file__).parent
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", ""), str(tests.parent)]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*command, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [
        (json.loads((folder / f"results-{rank}.json").read_text()), torch.load(folder / f"states-{rank}.pt"))
        for rank in (0, 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "grouped"])
def test_each_of_two_ranks_keeps_the_ratio_in_its_batches(ranks, scenario):
    for results, _ in ranks:
        assert results[scenario]["world_size"] == 2
        assert results[scenario]["steps"] == 8
        batches = results[scenario]["batches"]
        # What is left for the last step is completed, but cut into 3 and 3 where one process deals.
        whole = [2, 2, 2, 1 if scenario == "dispatched" else 2]
        assert [len(batch) for batch in batches] == [4, 4, 4, 3 if scenario == "dispatched" else 4] * 2
        for count, expected in zip(unlabeled_in(batches), whole * 2, strict=True):
            assert expected <= count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("scenario", KINDS_OF_ORDER)
def test_two_ranks_share_the_batches_of_the_sampler(ranks, scenario):
    one, other = (results[scenario]["batches"] for results, _ in ranks)
    dealt = [row for step in zip(one, other, strict=True) for batch in step for row in batch]
    for epoch in (0, 1):
        assert dealt[32 * epoch :][:ROWS] == expected_order(epoch, scenario, ranks=2)


@pytest.mark.slow
def test_two_ranks_share_the_rows_of_like_lengths(ranks):
    """Dropout on the CPU lets their generators part."""
    one, other = (results["grouped"]["batches"] for results, _ in ranks)
    dealt = [row for step in zip(one, other, strict=True) for batch in step for row in batch]
    for epoch in (0, 1):
        assert sorted(dealt[32 * epoch :][:ROWS]) == list(range(ROWS))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [*KINDS_OF_ORDER, "grouped", "split"])
def test_two_ranks_resumed_inside_their_second_epoch_are_bit_identical(ranks, scenario):
    """Accelerate's `set_epoch` does not come through to the sampler here."""
    for results, states in ranks:
        assert results[f"{scenario}-resumed"]["batches"] == results[scenario]["batches"][6:]
        assert largest_difference(states[f"{scenario}-resumed"], states[scenario]) == 0
    assert largest_difference(ranks[0][1][scenario], ranks[1][1][scenario]) == 0


if __name__ == "__main__":
    main()


def test_a_stream_is_refused_when_the_trainer_is_made(make_trainer):
    stream = make_dataset(unlabeled=(1, 3, 5)).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"unlabeled_ratio needs a datasets\.Dataset"):
        make_trainer(data=stream, unlabeled_ratio=0.5)
