"""Lists of labels: read, named, checked row by row, and kept as numbers through splits, samples and tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from helpers import TOPICS, make_tokenizer, write_rows_of_several_labels

from distill_nlp.arrow_columns import labeled_rows
from distill_nlp.collation import DistillationCollator
from distill_nlp.config import DataSection
from distill_nlp.data import content_hash, load_splits, read_problem_type
from distill_nlp.errors import UsageError
from distill_nlp.tokenization import tokenize

MULTI_LABEL = "multi_label_classification"
ROWS = [[0], [1, 2], [], [0, 1, 2], [2]]


def section(folder, **changes) -> DataSection:
    settings = {"label_column": "labels", "validation_split": "validation"} | changes
    return DataSection(dataset=str(folder), **settings)


def write(folder, **splits):
    """`write(folder, train=[labels of a row, ...])`: jsonl; splits that are not named have ROWS."""
    folder.mkdir(exist_ok=True)
    for split, rows in ({"train": ROWS, "validation": ROWS, "test": ROWS} | splits).items():
        lines = [json.dumps({"text": f"w{4 + i} {split}", "labels": labels}) for i, labels in enumerate(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def labels_of(dataset) -> list[list[float]]:
    return [list(row) for row in dataset["labels"]]


# ---- what is accepted ----


def test_lists_of_indices_become_a_number_for_each_class(tmp_path):
    splits = load_splits(section(write(tmp_path)))
    assert splits.problem_type == MULTI_LABEL
    assert splits.label_names == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert labels_of(splits.train) == [[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1]]
    for split in (splits.train, splits.validation, splits.test, splits.teacher_train):
        assert split.features["labels"] == List(Value("float32"))
        assert len(split) == 5
    assert splits.notes == []


def test_lists_of_names_are_numbered_in_their_order_or_that_of_the_config(tmp_path):
    named = [[TOPICS[c] for c in row] for row in ROWS]
    write(tmp_path, train=named, validation=named, test=named)
    splits = load_splits(section(tmp_path))
    assert splits.label_names == ["food", "money", "sport"]
    assert labels_of(splits.test)[1] == [0, 1, 1]
    splits = load_splits(section(tmp_path, label_names=["sport", "other", "money", "food"]))
    assert splits.label_names == ["sport", "other", "money", "food"]
    assert labels_of(splits.test)[1] == [1, 0, 1, 0]


def test_a_label_that_stands_twice_in_a_row_counts_once(tmp_path):
    splits = load_splits(section(write(tmp_path, train=[[0, 0], [1, 2], [2, 2, 1]], test=[[1, 1]])))
    assert labels_of(splits.train) == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert labels_of(splits.test) == [[0, 1, 0]]


@pytest.mark.parametrize("given", [None, ["a", "b", "c"]])
def test_lists_of_class_labels_bring_their_names(tmp_path, given):
    kind = Features({"text": Value("string"), "labels": List(ClassLabel(names=["x", "y", "z"]))})
    rows = Dataset.from_dict({"text": [f"w{i}" for i in range(5)], "labels": ROWS}, features=kind)
    DatasetDict({split: rows for split in ("train", "validation", "test")}).save_to_disk(str(tmp_path / "saved"))
    splits = load_splits(section(tmp_path / "saved", label_names=given))
    assert splits.label_names == (given or ["x", "y", "z"])
    assert labels_of(splits.train)[1] == [0, 1, 1]
    with pytest.raises(UsageError, match="data.label_names has 2 names, the data set has 3 classes"):
        load_splits(section(tmp_path / "saved", label_names=["a", "b"]))


def test_a_split_of_empty_lists_alone_is_one_of_rows_without_any_class(tmp_path):
    splits = load_splits(section(write(tmp_path, test=[[], []])))
    assert labels_of(splits.test) == [[0, 0, 0]] * 2


def test_single_labels_stay_what_they_were(tmp_path):
    splits = load_splits(section(write(tmp_path, train=[0, 1], validation=[1], test=[0])))
    assert splits.problem_type == "single_label_classification"
    assert splits.train.features["labels"] == ClassLabel(names=["LABEL_0", "LABEL_1"])
    assert read_problem_type(section(tmp_path)) == splits.problem_type


def test_the_kind_of_task_is_read_from_train_alone(tmp_path):
    write(tmp_path)
    (tmp_path / "test.jsonl").unlink()
    assert read_problem_type(section(tmp_path)) == MULTI_LABEL


# ---- what is refused ----

ACCEPTED = (
    r"a row of several labels lists their indices or names, .* a vector with a number for each class is not taken"
)


@pytest.mark.parametrize(
    ("rows", "names", "expected"),
    [
        ([[0], None, [1]], None, r"row 1 of the split 'train' has no label in labels; \[\] says that none applies"),
        ([[0], [1, None]], None, r"row 1 of the split 'train' has None \(NoneType\) among its labels"),
        ([[0], [1, 3]], ["a", "b"], r"row 1 of the split 'train' has the label 3, outside 0\.\.1 \(\['a', 'b'\]\)$"),
        ([[0], [2]], ["a", "b"], r"row 1 of the split 'train' has the label 2, outside 0\.\.1"),
        ([[0], [1, -1]], None, "row 1 .* has the label -1, outside .*; rows without a label go into data.unlabeled"),
        ([["a"], ["b", "c"]], ["a", "b"], r"row 1 .* has the label 'c', which is not among \['a', 'b'\]"),
        ([[0], [3]], None, r"the labels of train are \[0, 3\], and no row has 1; .* or set data.label_names"),
        (
            [[0.0, 1.0], [1.0, 0.0]],
            None,
            rf"row 0 of the split 'train' has 0\.0 \(float\) among its labels; {ACCEPTED}",
        ),
        ([[False, True], [True, False]], None, rf"row 0 .* has False \(bool\) among its labels; {ACCEPTED}"),
        ([[0, 1, 0], [1, 1, 0]], None, rf"row 0 of the split 'train' has the labels \[0, 1, 0\]; {ACCEPTED}"),
        ([[0, 1], [1, 1]], ["a", "b"], rf"row 1 of the split 'train' has the labels \[1, 1\]; {ACCEPTED}"),
        ([[1, 0], [0, 1], [1, 0]], None, r"all 3 rows of the split 'train' have the labels \['LABEL_0', 'LABEL_1'\]"),
        ([[], []], ["a", "b"], r"all 2 rows of the split 'train' have the labels \[\]; .* rows that differ"),
        ([[0], []], None, r"the lists of train name 1 classes \(\['LABEL_0'\]\), at least 2 are needed"),
        ([["a"], []], None, r"the lists of train name 1 classes \(\['a'\]\)"),
        ([[], []], None, r"the lists of train name 0 classes \(\[\]\), at least 2 are needed"),
    ],
)
def test_wrong_lists_are_refused_with_their_row(tmp_path, rows, names, expected):
    with pytest.raises(UsageError, match=expected) as caught:
        load_splits(section(write(tmp_path, train=rows, validation=[[]], test=[[]]), label_names=names))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["validation", "test", "more"])
def test_lists_in_one_split_and_single_labels_in_another_are_refused(tmp_path, split):
    write(tmp_path, **{split: [0, 1]})
    more = "more" if split == "more" else None
    expected = (
        f"labels holds one label per row in the split '{split}', and lists of labels in 'train'; write them alike"
    )
    with pytest.raises(UsageError, match=expected):
        load_splits(section(tmp_path), more)
    write(tmp_path, **{"train": [0, 1, 2], "validation": [0], "test": [1], split: ROWS})
    with pytest.raises(UsageError, match=f"lists of labels in the split '{split}', and one label per row in 'train'"):
        load_splits(section(tmp_path), more)


@pytest.mark.parametrize("train", [[0, 1], ROWS])
def test_a_split_without_any_label_is_refused_by_its_row(tmp_path, train):
    splits = {"train": train, "validation": train, "test": [None, None]}
    with pytest.raises(UsageError, match="row 0 of the split 'test' has no label in labels"):
        load_splits(section(write(tmp_path, **splits)))


@pytest.mark.parametrize("cells", [('"[0, 2]"', "[1]"), ("\"['a', 'b']\"", "['b']")])
def test_lists_in_the_text_of_a_csv_are_refused(tmp_path, cells):
    for split in ("train", "validation", "test"):
        lines = "\n".join(f"w{i},{cell}" for i, cell in enumerate(cells))
        (tmp_path / f"{split}.csv").write_text(f"text,labels\n{lines}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"labels of train holds lists as text, such as .\[.*\].; write them as lists"):
        load_splits(section(tmp_path))


def test_names_in_brackets_are_names(tmp_path):
    write(tmp_path, **{split: ["[pos]", "[neg]"] for split in ("train", "validation", "test")})
    assert load_splits(section(tmp_path)).label_names == ["[neg]", "[pos]"]


def test_a_gate_by_confidence_is_refused_before_anything_is_trained(tmp_path):
    write(tmp_path, pool=[[0]])
    changes = {"unlabeled": "pool", "unlabeled_min_confidence": 0.9}
    with pytest.raises(UsageError, match="data.unlabeled_min_confidence is defined for one label per text"):
        load_splits(section(tmp_path, **changes))


# ---- splits ----


def test_rows_are_carved_sampled_and_cleaned_as_single_labels_are(tmp_path):
    folder = write_rows_of_several_labels(tmp_path / "topics")
    splits = load_splits(section(folder, validation_split=None, max_train_samples=20, max_test_samples=10))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 5, 10)
    assert not set(splits.train["text"]) & set(splits.validation["text"])
    assert splits.notes[0] == "5 validation rows carved from train, 43 left"
    again = load_splits(section(folder, validation_split=None, max_train_samples=20, max_test_samples=10))
    assert content_hash(again.train) == content_hash(splits.train)
    other = load_splits(section(folder, validation_split=None, max_train_samples=20, max_test_samples=10, seed=1))
    assert content_hash(other.train) != content_hash(splits.train)
    by_row = {json.loads(line)["text"]: json.loads(line)["labels"] for line in open(folder / "train.jsonl")}  # noqa: SIM115
    for row in (*splits.train, *splits.validation):
        assert [name for name, value in zip(TOPICS, row["labels"], strict=True) if value] == by_row[row["text"]]


def test_a_fraction_of_few_rows_is_one_row_however_many_classes(tmp_path):
    splits = load_splits(section(write(tmp_path), validation_split=None, label_names=list("abcdef")))
    assert (len(splits.train), len(splits.validation)) == (4, 1)
    write(tmp_path, train=[[0, 2], [1]])
    with pytest.raises(UsageError, match="2 training rows are too few to carve 1 for validation"):
        load_splits(section(tmp_path, validation_split=None))


def test_the_pool_has_rows_without_labels_and_none_that_is_held_out(tmp_path):
    write(tmp_path)
    (tmp_path / "pool.jsonl").write_text('{"text": "new"}\n{"text": "w4 test"}\n{"text": "newer"}\n', encoding="utf-8")
    splits = load_splits(section(tmp_path, unlabeled="pool"))
    assert splits.unlabeled["text"] == ["new", "newer"]
    assert labels_of(splits.unlabeled) == [[-100] * 3] * 2
    assert splits.unlabeled.features["labels"] == splits.train.features["labels"]
    assert splits.notes == ["1 unlabeled rows dropped: their texts stand in validation or test"]


def test_classes_that_no_row_has_are_noted(tmp_path):
    write(tmp_path, more=[[0], [1]])
    splits = load_splits(section(tmp_path, label_names=["a", "b", "c", "d"]), "more")
    assert splits.notes == ["no row of more has c, d", "no row of train has d"]


# ---- what becomes of them ----


def test_tokens_keep_the_lists_and_batches_are_floats(tmp_path):
    from datasets import concatenate_datasets

    write(tmp_path, pool=[[0], [1]])
    splits = load_splits(section(tmp_path, unlabeled="pool"))
    rows = tokenize(concatenate_datasets([splits.train, splits.unlabeled]), make_tokenizer(), 16)
    assert labeled_rows(rows).tolist() == [True] * 5 + [False] * 2
    batch = DistillationCollator(make_tokenizer())([rows[i] for i in (1, 6)])
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [[0, 1, 1], [-100] * 3]


def test_a_trainer_counts_rows_whose_labels_are_known(make_trainer):
    batch = {"labels": torch.tensor([[0.0, 1.0], [-100.0, -100.0], [0.0, 0.0]])}
    assert make_trainer()._count_rows(batch).tolist() == [3, 2]


def test_rows_of_labels_are_hashed_with_their_labels(tmp_path):
    hashes = set()
    for labels in ([0], [1], [0, 1]):
        write(tmp_path, train=[*ROWS, labels])
        hashes.add(content_hash(load_splits(section(tmp_path)).train))
    assert len(hashes) == 3
    assert np.isfinite(load_splits(section(tmp_path)).train.with_format("numpy")["labels"][:]).all()
