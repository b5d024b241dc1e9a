"""Numbers of classes mean the same in all splits, however each split numbers its own."""

from __future__ import annotations

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from distill_nlp.config import DataSection
from distill_nlp.data import load_splits
from distill_nlp.data_streams import load_streamed_splits
from distill_nlp.errors import UsageError

TRAIN = ["a", "b", "c"] * 4
TEST = ["c", "a", "c", "a"]


def rows(labels, names=None, split="train"):
    """Texts that hold their label; labels as numbers of these names, or as they are."""
    values = [names.index(label) for label in labels] if names else labels
    made = Dataset.from_dict({"text": [f"{split} {i} {label}" for i, label in enumerate(labels)], "label": values})
    return made.cast_column("label", ClassLabel(names=names)) if names else made


def saved(folder, **splits):
    DatasetDict(splits).save_to_disk(str(folder))
    return DataSection(dataset=str(folder), validation_fraction=0.25)


def meant(splits, part):
    """The label of each row by its number, and as its text says."""
    return [(splits.label_names[row["labels"]], row["text"][-1]) for row in getattr(splits, part)]


def check(splits, *parts):
    for part in parts:
        found = meant(splits, part)
        assert found
        assert [name for name, _ in found] == [label for _, label in found], part


def test_a_split_that_lacks_a_class_and_was_encoded_by_itself(tmp_path):
    """What `DatasetDict.class_encode_column` makes of words: names of their own in each split."""
    words = DatasetDict(train=rows(TRAIN), test=rows(TEST, split="test"))
    encoded = words.class_encode_column("label")
    assert encoded["train"].features["label"].names == ["a", "b", "c"]
    assert encoded["test"].features["label"].names == ["a", "c"]
    encoded.save_to_disk(str(tmp_path / "data"))
    splits = load_splits(DataSection(dataset=str(tmp_path / "data"), validation_fraction=0.25))
    assert splits.label_names == ["a", "b", "c"]
    check(splits, "train", "validation", "test")


@pytest.mark.parametrize("names", [["a", "c"], ["c", "b", "a"], ["C", "A"], ["a", "b", "c", "unused"]])
def test_names_of_another_order_or_another_case_are_found(tmp_path, names):
    test = rows([label.upper() if names[0] == "C" else label for label in TEST], names, "test")
    splits = load_splits(saved(tmp_path / "data", train=rows(TRAIN, ["a", "b", "c"]), test=test))
    assert [name for name, _ in meant(splits, "test")] == TEST


def test_names_beside_words_are_found_and_so_are_words_beside_names(tmp_path):
    splits = load_splits(saved(tmp_path / "1", train=rows(TRAIN), test=rows(TEST, ["c", "a"], "test")))
    check(splits, "train", "test")
    splits = load_splits(saved(tmp_path / "2", train=rows(TRAIN, ["c", "b", "a"]), test=rows(TEST, None, "test")))
    check(splits, "train", "test")


def test_names_that_the_config_gives_stand_for_those_of_train(tmp_path):
    config = saved(tmp_path / "data", train=rows(TRAIN, ["a", "b", "c"]), test=rows(TEST, ["a", "c"], "test"))
    splits = load_splits(config.model_copy(update={"label_names": ["first", "second", "third"]}))
    assert splits.test["labels"][:] == [2, 0, 2, 0]
    # Of numbers that nothing names, the config says what they are.
    numbers = Dataset.from_dict({"text": [f"{i} {label}" for i, label in enumerate(TRAIN)], "label": [0, 1, 2] * 4})
    config = saved(tmp_path / "numbers", train=numbers, test=rows(TEST, ["a", "c"], "test"))
    splits = load_splits(config.model_copy(update={"label_names": ["a", "b", "c"]}))
    check(splits, "train", "test")


def test_names_that_say_nothing_leave_the_order_as_it_is(tmp_path):
    numbers = Dataset.from_dict({"text": [f"{i} x" for i in range(12)], "label": [0, 1, 2] * 4})
    splits = load_splits(saved(tmp_path / "data", train=numbers, test=rows(TEST, ["a", "b", "c"], "test")))
    assert splits.test["labels"][:] == [2, 0, 2, 0]


def test_a_class_that_train_lacks_is_refused_with_its_row(tmp_path):
    config = saved(tmp_path / "data", train=rows(TRAIN, ["a", "b", "c"]), test=rows([*TEST, "d"], ["a", "c", "d"], "t"))
    with pytest.raises(UsageError, match=r"row 4 of the split 'test' has the label 'd', which is not among \['a', 'b'"):
        load_splits(config)


def test_a_missing_label_is_still_one(tmp_path):
    test = rows(TEST, ["a", "c"], "test").cast_column("label", ClassLabel(names=["a", "c"]))
    test = test.map(lambda row, i: {"label": -1 if i == 1 else row["label"]}, with_indices=True)
    config = saved(tmp_path / "data", train=rows(TRAIN, ["a", "b", "c"]), test=test)
    with pytest.raises(UsageError, match="row 1 of the split 'test' has the label -1, outside"):
        load_splits(config)


def lists(labels, names=None):
    values = [[names.index(label) for label in row] if names else list(row) for row in labels]
    kind = ClassLabel(names=names) if names else Value("string")
    texts = [f"{i} {''.join(row)}" for i, row in enumerate(labels)]
    return Dataset.from_dict(
        {"text": texts, "label": values}, features=Features({"text": Value("string"), "label": List(kind)})
    )


def test_lists_of_labels_are_moved_alike(tmp_path):
    train = lists(["a", "bc", "", "c", "ab"] * 3, ["a", "b", "c"])
    config = saved(tmp_path / "data", train=train, test=lists(["ca", "c", ""], ["c", "a"]))
    assert load_splits(config).test["labels"][:] == [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


# ---- numbers beside words ----


def files(folder, **splits):
    folder.mkdir()
    for split, labels in splits.items():
        texts = [f"{split} text {i}" for i in range(len(labels))]
        pd.DataFrame({"text": texts, "label": labels}).to_csv(folder / f"{split}.csv", index=False)
    return DataSection(dataset=str(folder), validation_fraction=0.25)


def test_numbers_beside_words_are_refused_unless_their_order_is_said(tmp_path):
    """AG News: World is 0 in its numbers, and the last one by the alphabet."""
    names = ["World", "Sports", "Business"]
    config = files(tmp_path / "data", train=names * 4, test=[0, 1, 2, 0])
    with pytest.raises(UsageError) as error:
        load_splits(config)
    assert "row 0 of the split 'test' has the label 0, and other splits have names: ['Business', " in str(error.value)
    assert "data.label_names" in str(error.value)
    splits = load_splits(config.model_copy(update={"label_names": names}))
    assert [splits.label_names[i] for i in splits.test["labels"]] == ["World", "Sports", "Business", "World"]


def test_a_stream_of_numbers_beside_words_is_refused(tmp_path):
    config = files(tmp_path / "data", train=[0, 1, 2] * 4, test=["World", "Sports", "Business"], validation=["World"])
    config = config.model_copy(update={"streaming": True, "validation_split": "validation"})
    with pytest.raises(UsageError, match="row 0 of the split 'train' has the label 0, and other splits have names"):
        load_streamed_splits(config)
    streamed = load_streamed_splits(config.model_copy(update={"label_names": ["World", "Sports", "Business"]}))
    assert streamed.test["labels"][:] == [0, 1, 2]


def test_a_stream_holds_the_other_splits_to_its_numbers(tmp_path):
    splits = {"train": rows(TRAIN, ["a", "b", "c"]), "test": rows(TEST, ["a", "c"], "test")}
    splits |= {"validation": rows(TEST, ["c", "a"], "validation"), "teacher": rows(TRAIN, ["c", "b", "a"], "teacher")}
    config = saved(tmp_path / "data", **splits)
    config = config.model_copy(update={"streaming": True, "validation_split": "validation"})
    check(load_streamed_splits(config), "train", "validation", "test")
    with pytest.raises(UsageError, match=r"split 'teacher' numbers its classes as \['c', 'b', 'a'\], and train as"):
        load_streamed_splits(config, "teacher")


def test_other_names_beside_words_are_refused_and_not_taken_by_their_numbers(tmp_path):
    config = saved(tmp_path / "data", train=rows(TRAIN), test=rows(["y", "x"], ["x", "y"], "test"))
    with pytest.raises(UsageError, match=r"row 0 of the split 'test' has the label 'y', which is not among \['a', 'b'"):
        load_splits(config)


STARS = ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("train_names", [STARS, None])
def test_names_that_are_numbers_are_found_too(tmp_path, train_names):
    """Stars from 1 to 5, made names by `class_encode_column`; some splits lack some."""
    config = saved(tmp_path / "data", train=rows(STARS * 4, train_names), test=rows(["5", "3", "1"], ["1", "3", "5"]))
    splits = load_splits(config)
    assert splits.label_names == STARS
    check(splits, "train", "test")


def test_given_names_are_those_of_unnamed_numbers(tmp_path):
    numbers = Dataset.from_dict({"text": [f"{i} x" for i in range(12)], "label": [0, 1, 2] * 4})
    config = saved(tmp_path / "data", train=numbers, test=rows(["3", "1"], ["1", "3"], "test"))
    assert load_splits(config.model_copy(update={"label_names": ["1", "2", "3"]})).test["labels"][:] == [2, 0]
    # One that they lack is not the class of its number; where none is known, the numbers are all there is.
    config = saved(tmp_path / "other", train=numbers, test=rows(["b", "d"], ["a", "b", "d"], "test"))
    with pytest.raises(UsageError, match="row 1 of the split 'test' has the label 'd', which is not among"):
        load_splits(config.model_copy(update={"label_names": ["a", "b", "c"]}))
    assert load_splits(config.model_copy(update={"label_names": ["x", "y", "z"]})).test["labels"][:] == [1, 2]


def test_a_stream_that_names_its_numbers_stands_beside_words(tmp_path):
    splits = {"train": rows(TRAIN, ["c", "b", "a"]), "test": rows(TEST, None, "test")}
    splits |= {"validation": rows(TEST, None, "validation")}
    config = saved(tmp_path / "data", **splits)
    config = config.model_copy(update={"streaming": True, "validation_split": "validation"})
    check(load_streamed_splits(config), "train", "validation", "test")


def test_a_streamed_split_of_the_teachers_own_is_held_to_it_too(tmp_path):
    names = ["World", "Sports", "Business"]
    config = files(tmp_path / "data", train=names * 4, test=names, validation=names, teacher=[0, 1, 2])
    config = config.model_copy(update={"streaming": True, "validation_split": "validation"})
    with pytest.raises(UsageError, match="row 0 of the split 'teacher' has the label 0, and other splits have names"):
        load_streamed_splits(config, "teacher")


def test_names_that_are_just_the_numbers_leave_the_order_as_it_is(tmp_path):
    numbers = Dataset.from_dict({"text": [f"{i} x" for i in range(20)], "label": [0, 1, 2, 3, 4] * 4})
    config = saved(tmp_path / "data", train=numbers, test=rows(["4", "0", "2"], ["0", "1", "2", "3", "4"], "test"))
    assert load_splits(config.model_copy(update={"label_names": STARS})).test["labels"][:] == [4, 0, 2]


def test_given_names_bring_the_splits_of_a_stream_together(tmp_path):
    numbers = Dataset.from_dict({"text": [f"{i} {label}" for i, label in enumerate(TRAIN)], "label": [0, 1, 2] * 4})
    splits = {"train": numbers, "validation": rows(TEST, ["a", "c"], "v"), "test": rows(TEST, ["c", "a"], "test")}
    config = saved(tmp_path / "data", **splits)
    config = config.model_copy(update={"streaming": True, "validation_split": "validation"})
    check(
        load_streamed_splits(config.model_copy(update={"label_names": ["a", "b", "c"]})), "train", "validation", "test"
    )


def test_a_streamed_split_without_labels_is_refused_by_its_column(tmp_path):
    texts = Dataset.from_dict({"text": ["a text", "another"]})
    splits = {"train": rows(TRAIN), "validation": rows(TEST, None, "v"), "test": rows(TEST, None, "test")}
    config = saved(tmp_path / "data", **splits, teacher=texts)
    config = config.model_copy(update={"streaming": True, "validation_split": "validation"})
    with pytest.raises(UsageError, match="the split 'teacher' of .* has no column 'label'"):
        load_streamed_splits(config, "teacher")
