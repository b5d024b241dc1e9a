"""The collator: each reader's columns are padded by that reader's tokenizer, all others as Transformers does it."""

from __future__ import annotations

import logging
import pickle
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import make_dataset, make_tokenizer
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from distill_nlp.collation import DistillationCollator


def other_tokenizer(side: str = "left", pad: str = "w9", **changes):
    """Pads with 9 on the left; the second kind of token in padding is 7."""
    tokenizer = make_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = side, pad
    # XLNet has one of its own; Transformers gives no other way to set it.
    tokenizer._pad_token_type_id = 7
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def rows(count: int = 4, seed: int = 0, teachers=(("teacher_", 20),), **more) -> list[dict]:
    """Ragged rows of the student and of teachers that read longer ones; `more` are columns by name."""
    result = make_dataset(count, seed=seed, unlabeled=(1,)).to_list()
    for i, (prefix, length) in enumerate(teachers):
        for row, other in zip(result, make_dataset(count, seed=seed + 50 + i, max_length=length), strict=True):
            row.update({f"{prefix}{name}": other[name] for name in other if name != "labels"})
    for name, values in more.items():
        for row, value in zip(result, values, strict=True):
            row[name] = value
    return result


def padded(values, width, pad, side) -> list[list[int]]:
    fill = [[pad] * (width - len(row)) for row in values]
    return [row + f if side == "right" else f + row for row, f in zip(values, fill, strict=True)]


LOGITS = np.arange(12, dtype=np.float32).reshape(4, 3)
CASES = {
    "plain": rows(teachers=()),
    "one row": rows(1, teachers=()),
    "no labels": [{k: v for k, v in row.items() if k != "labels"} for row in rows(teachers=())],
    "no segments": [{k: row[k] for k in ("input_ids", "attention_mask")} for row in rows(teachers=())],
    "no mask": [{k: row[k] for k in ("input_ids", "labels")} for row in rows(teachers=())],
    "cached logits": rows(teachers=(), teacher_logits=LOGITS.tolist()),
    "multi-label": rows(teachers=(), labels=[[0.0, 1.0], [1.0, 1.0], [-100.0, -100.0], [0.5, 0.0]]),
    "label": [{"label": row.pop("labels"), **row} for row in rows(teachers=())],
    "label_ids": [{"label_ids": row.pop("labels"), **row} for row in rows(teachers=())],
    "more columns": rows(teachers=(), weight=[0.5, 1.5, 2.5, 3.5], index=[4, 3, 2, 1]),
    "special tokens mask": [{**row, "special_tokens_mask": row["attention_mask"]} for row in rows(teachers=())],
    "tensors": Dataset.from_list(rows(teachers=(), teacher_logits=LOGITS.tolist())).with_format("torch"),
    "arrays": Dataset.from_list(rows(teachers=(), teacher_logits=LOGITS.tolist())).with_format("numpy"),
}


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("tokenizer", [make_tokenizer, other_tokenizer])
@pytest.mark.parametrize("case", CASES)
def test_without_teachers_it_gives_what_transformers_gives(case, tokenizer, multiple):
    features = [CASES[case][i] for i in range(len(CASES[case]))]
    batch = DistillationCollator(tokenizer(), pad_to_multiple_of=multiple)(features)
    expected = DataCollatorWithPadding(tokenizer(), pad_to_multiple_of=multiple)(features)
    assert list(batch) == list(expected)
    for name, tensor in expected.items():
        assert batch[name].dtype == tensor.dtype
        assert torch.equal(batch[name], tensor), name


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_reader_has_its_own_padding(side, multiple):
    features = rows(teacher_logits=LOGITS.tolist())
    collator = DistillationCollator(make_tokenizer(), {"teacher_": other_tokenizer(side)}, multiple)
    batch = collator(features)
    for prefix, pads, its_side in (("", (0, 0), "right"), ("teacher_", (9, 7), side)):
        longest = max(len(row[f"{prefix}input_ids"]) for row in features)
        width = longest if multiple is None else -(-longest // multiple) * multiple
        for name, pad in zip(("input_ids", "token_type_ids", "attention_mask"), (*pads, 0), strict=True):
            values = [row[f"{prefix}{name}"] for row in features]
            assert batch[f"{prefix}{name}"].tolist() == padded(values, width, pad, its_side)
    assert batch["input_ids"].shape != batch["teacher_input_ids"].shape
    assert batch["labels"].tolist() == [row["labels"] for row in features]
    assert -100 in batch["labels"]
    assert torch.equal(batch["teacher_logits"], torch.from_numpy(LOGITS))
    assert all(tensor.dtype == torch.long for name, tensor in batch.items() if name != "teacher_logits")


def test_two_teachers_of_two_tokenizers():
    features = rows(teachers=(("teacher_", 20), ("teacher_2_", 30)))
    tokenizers = {"teacher_": other_tokenizer(), "teacher_2_": other_tokenizer("right", pad="w8")}
    batch = DistillationCollator(make_tokenizer(), tokenizers)(features)
    for prefix, pad, side in (("teacher_", 9, "left"), ("teacher_2_", 8, "right")):
        values = [row[f"{prefix}input_ids"] for row in features]
        assert batch[f"{prefix}input_ids"].tolist() == padded(values, max(map(len, values)), pad, side)
    assert len({batch[f"{prefix}input_ids"].shape for prefix in ("", "teacher_", "teacher_2_")}) == 3


@pytest.mark.parametrize("order", [1, -1])
def test_the_longest_prefix_wins(order):
    """The first teacher's tokenizer calls an input `2_input_ids`, as the second one's column is."""
    first = other_tokenizer(model_input_names=["input_ids", "attention_mask", "token_type_ids", "2_input_ids"])
    tokenizers = dict([("teacher_", first), ("teacher_2_", other_tokenizer("right", pad="w8"))][::order])
    features = rows(teachers=(("teacher_", 20), ("teacher_2_", 30)))
    batch = DistillationCollator(make_tokenizer(), tokenizers)(features)
    values = [row["teacher_2_input_ids"] for row in features]
    assert batch["teacher_2_input_ids"].tolist() == padded(values, max(map(len, values)), 8, "right")


def test_rows_without_a_teachers_columns_make_a_batch_without_them():
    features = rows(teachers=())
    collator = DistillationCollator(make_tokenizer(), {"teacher_": other_tokenizer()})
    expected = DataCollatorWithPadding(make_tokenizer())(features)
    for given in (features, [{**row, "teacher_input_ids": None, "teacher_attention_mask": None} for row in features]):
        batch = collator(given)
        assert list(batch) == list(expected)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_cached_logits_are_no_tokens_of_the_teacher():
    features = rows(teachers=(), teacher_logits=LOGITS.tolist())
    batch = DistillationCollator(make_tokenizer(), {"teacher_": other_tokenizer()})(features)
    assert torch.equal(batch["teacher_logits"], torch.from_numpy(LOGITS))
    assert "teacher_attention_mask" not in batch


def test_segments_are_padded_for_a_tokenizer_that_does_not_make_them_by_itself():
    features = rows()
    names = ["input_ids", "attention_mask"]
    collator = DistillationCollator(
        make_tokenizer(), {"teacher_": other_tokenizer(side="right", model_input_names=names)}
    )
    values = [row["teacher_token_type_ids"] for row in features]
    assert collator(features)["teacher_token_type_ids"].tolist() == padded(values, max(map(len, values)), 7, "right")


def test_a_mask_is_made_where_the_rows_have_none():
    features = [{k: v for k, v in row.items() if k != "teacher_attention_mask"} for row in rows()]
    batch = DistillationCollator(make_tokenizer(), {"teacher_": other_tokenizer()})(features)
    lengths = [len(row["teacher_input_ids"]) for row in features]
    assert batch["teacher_attention_mask"].sum(dim=1).tolist() == lengths


def test_inputs_of_other_names_are_found_by_the_tokenizers_own():
    tokenizer = other_tokenizer("right", model_input_names=["tokens", "attention_mask"])
    features = [{"teacher_tokens": row.pop("teacher_input_ids"), **row} for row in rows()]
    batch = DistillationCollator(make_tokenizer(), {"teacher_": tokenizer})(features)
    assert batch["teacher_tokens"].shape == batch["teacher_attention_mask"].shape
    assert "teacher_input_ids" not in batch


@pytest.mark.parametrize("missing", ["teacher_input_ids", "teacher_attention_mask", "labels", "teacher_logits"])
@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("gone", [True, False])
def test_a_row_that_lacks_what_others_have_is_refused_in_one_line(missing, row, gone):
    features = rows(teacher_logits=LOGITS.tolist())
    if gone:
        del features[row][missing]
    else:
        features[row][missing] = None
    with pytest.raises(ValueError, match=f"^row {row} of the batch has no {missing}, which other rows have$"):
        DistillationCollator(make_tokenizer(), {"teacher_": other_tokenizer()})(features)


def test_a_mask_without_ids_is_refused():
    features = [{k: v for k, v in row.items() if k != "teacher_input_ids"} for row in rows()]
    with pytest.raises(ValueError, match="teacher_attention_mask, and no teacher_input_ids beside it"):
        DistillationCollator(make_tokenizer(), {"teacher_": other_tokenizer()})(features)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_tokens_of_a_teacher_that_it_was_not_told_of_are_refused_by_name(kind):
    tokens = [row["teacher_input_ids"] for row in rows()]
    features = rows(teachers=(), teacher_input_ids=map(kind, tokens))
    lengths = [len(row) for row in tokens]
    expected = f"the column teacher_input_ids has values of {min(lengths)} to {max(lengths)} entries.*: 'other_'$"
    with pytest.raises(ValueError, match=expected):
        DistillationCollator(make_tokenizer(), {"other_": other_tokenizer()})(features)
    with pytest.raises(ValueError, match="prefixes: none$"):
        DistillationCollator(make_tokenizer())(features)


def test_what_cannot_pad_is_refused_at_once():
    bare = other_tokenizer(pad_token=None)
    with pytest.raises(ValueError, match="^the tokenizer of the student has no padding token; set its pad_token$"):
        DistillationCollator(bare)
    with pytest.raises(ValueError, match="^the tokenizer of the teacher 'teacher_' has no padding token"):
        DistillationCollator(make_tokenizer(), {"teacher_": bare})
    with pytest.raises(ValueError, match="is the student's; a teacher that reads its tokens needs no tokenizer"):
        DistillationCollator(make_tokenizer(), {"": other_tokenizer()})


def test_it_warns_nowhere_and_leaves_the_rows_as_they_are(caplog):
    caplog.set_level(logging.DEBUG)
    logging.getLogger("transformers").addHandler(caplog.handler)
    features, before = rows(), rows()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            DistillationCollator(make_tokenizer(), {"teacher_": other_tokenizer()})(features)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.records == []
    assert features == before


def test_it_survives_pickling_and_the_mapping_that_it_was_given_may_change():
    tokenizers = {"teacher_": other_tokenizer()}
    collator = DistillationCollator(make_tokenizer(), tokenizers, pad_to_multiple_of=4)
    tokenizers.clear()
    restored = pickle.loads(pickle.dumps(collator))
    expected, batch = collator(rows()), restored(rows())
    assert list(batch) == list(expected)
    assert "teacher_input_ids" in batch
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_it_serves_the_workers_of_a_loader():
    collator = DistillationCollator(make_tokenizer(), {"teacher_": other_tokenizer()})
    loader = DataLoader(rows(6), batch_size=4, collate_fn=collator, num_workers=1, multiprocessing_context="fork")
    batches = list(loader)
    assert [len(batch["teacher_input_ids"]) for batch in batches] == [4, 2]
    assert torch.equal(batches[0]["teacher_input_ids"], collator(rows(6)[:4])["teacher_input_ids"])
