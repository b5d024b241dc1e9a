"""Truncation, unknown and special tokens, vocabularies."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import make_tokenizer

from distill_nlp.doctor.texts import (
    TextSample,
    check_special_tokens,
    check_truncation,
    check_unknown_tokens,
    check_vocabularies,
    check_vocabulary_size,
    sample_indices,
    sample_texts,
    unchanged,
)


def words(count, first=4):
    return " ".join(f"w{first + i % 90}" for i in range(count))


def sample(lengths, unknown=None, rows=None, rare=()):
    lengths = np.asarray(lengths)
    unknown = np.zeros_like(lengths) if unknown is None else np.asarray(unknown)
    return TextSample(lengths, unknown, len(lengths) if rows is None else rows, rare)


def test_lengths_are_of_whole_texts_with_their_special_tokens(tokenizer):
    found = sample_texts([[words(1), words(50)]], tokenizer)
    assert found.lengths.tolist() == [3, 52]
    assert found.unknown.tolist() == [0, 0]
    assert found.rows == 2


def test_pairs_count_together(tokenizer):
    assert sample_texts([[words(2)], [words(3)]], tokenizer).lengths.tolist() == [8]


def test_unknown_words_are_counted_and_named(tokenizer):
    found = sample_texts([["w4 hund w5 katze", "w4"], ["maus", "w6"]], tokenizer)
    assert found.unknown.tolist() == [3, 0]
    assert found.rare == ("hund", "katze", "maus")


def test_a_sample_is_random_and_repeatable(tokenizer):
    texts = [words(i + 1) for i in range(60)]
    found = sample_texts([texts], tokenizer, rows=10, seed=3)
    assert found.rows == 60
    assert len(found.lengths) == 10
    assert found.lengths.tolist() == sample_texts([texts], tokenizer, rows=10, seed=3).lengths.tolist()
    assert found.lengths.tolist() != sample_texts([texts], tokenizer, rows=10, seed=4).lengths.tolist()
    assert found.lengths.max() > 12


def test_sampled_rows_are_distinct_and_in_order():
    chosen = sample_indices(100, 30, seed=0)
    assert (np.diff(chosen) > 0).all()
    assert sample_indices(5, 30, seed=0).tolist() == [0, 1, 2, 3, 4]


def test_no_texts_are_refused(tokenizer):
    with pytest.raises(ValueError, match="no texts"):
        sample_texts([[]], tokenizer)


@pytest.mark.parametrize("is_set", [True, False])
def test_the_tokenizer_is_left_as_it_was(tokenizer, is_set):
    if is_set:
        tokenizer.backend_tokenizer.enable_truncation(max_length=7, stride=1)
        tokenizer.backend_tokenizer.enable_padding(length=9)
    before = tokenizer.backend_tokenizer.to_str()
    sample_texts([[words(30)]], tokenizer)
    check_special_tokens(tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_the_tokenizer_is_left_as_it_was_by_what_fails(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()

    def fail():
        with unchanged(tokenizer):
            tokenizer(["w4", "w5 w6"], truncation=True, max_length=4, padding=True)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert tokenizer.backend_tokenizer.to_str() == before


# ---- truncation ----


def test_a_little_truncation_is_ok_with_its_figures():
    found = check_truncation({"train": sample([10] * 9 + [30], rows=50)}, 20)
    assert found.level == "ok"
    assert "rows cut at 20 tokens: train 10.0% (8.3% of its tokens)" in found.what
    assert "longest has 30" in found.what
    assert "a sample of 10 of 50 train rows" in found.what


def test_a_row_of_just_the_length_is_not_cut():
    assert "train 0.0% (0.0%" in check_truncation({"train": sample([20, 20])}, 20).what


def test_the_length_that_would_cut_five_in_a_hundred_is_named():
    lengths = np.arange(1, 101)
    found = check_truncation({"train": sample(lengths), "test": sample([5])}, 80)
    assert found.level == "warning"
    assert found.fix == "--data.max_length 96 would cut 5%"
    assert np.mean(lengths > 96) <= 0.05


def test_the_worst_split_counts():
    found = check_truncation({"train": sample([5] * 10), "test": sample([5] * 8 + [50] * 2)}, 20)
    assert found.level == "warning"
    assert "--data.max_length 50" in found.fix


@pytest.mark.parametrize(("side", "cut", "hint"), [("right", 4, True), ("left", 4, False), ("right", 2, False)])
def test_the_other_side_is_proposed_where_much_is_cut_on_the_right(side, cut, hint):
    found = check_truncation({"train": sample([5] * (10 - cut) + [50] * cut)}, 20, side)
    assert ("--data.truncation_side left" in found.fix) is hint


@pytest.mark.parametrize(
    ("readable", "fix"),
    [
        (40, "50 tokens would cut 5%, the models read 40: --data.max_length 40"),
        (20, "50 tokens would cut 5%, the models read 20"),
        (50, "--data.max_length 50 would cut 5%"),
    ],
)
def test_no_length_is_proposed_that_the_models_cannot_read(readable, fix):
    assert check_truncation({"train": sample([5] * 8 + [50] * 2)}, 20, readable=readable).fix == fix


def test_a_teachers_own_length_has_its_own_setting():
    found = check_truncation({"train": sample([50])}, 20, "left", setting="teacher.max_length")
    assert found.fix.startswith("--teacher.max_length 50")


def test_a_length_far_above_all_texts_is_ok():
    found = check_truncation({"train": sample([12, 9])}, 512)
    assert found.level == "ok"
    assert found.what.endswith("all rows")


# ---- unknown and special tokens ----


@pytest.mark.parametrize(("unknown", "level"), [(0, "ok"), (2, "ok"), (3, "warning"), (30, "warning"), (31, "stop")])
def test_the_share_of_unknown_tokens_decides(unknown, level):
    found = check_unknown_tokens({"train": sample([100], [unknown], rare=("hund",)), "test": sample([9])}, "[UNK]")
    assert found.level == level
    assert f"train {unknown}.00%" in found.what
    assert ("'hund'" in found.what) is (level != "ok")


def test_the_worst_split_decides_on_unknown_tokens():
    found = check_unknown_tokens({"train": sample([100]), "test": sample([100], [40])}, "[UNK]")
    assert found.level == "stop"


def test_a_tokenizer_without_an_unknown_token_spells_everything():
    assert check_unknown_tokens({"train": sample([3])}, None).level == "ok"


def test_special_tokens_that_are_there_are_ok(tokenizer):
    found = check_special_tokens(tokenizer)
    assert (found.level, found.what) == ("ok", "[CLS], [SEP], [PAD] present")


def test_special_tokens_that_frame_no_text_are_a_warning(tokenizer):
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair="$A $B:1", special_tokens=[("[CLS]", 2)]
    )
    found = check_special_tokens(tokenizer)
    assert found.level == "warning"
    assert "has [SEP], and" in found.what


def test_no_padding_token_is_a_stop(tokenizer):
    tokenizer.pad_token = None
    assert check_special_tokens(tokenizer).level == "stop"


# ---- vocabularies ----


@pytest.fixture
def difference(monkeypatch):
    """Sets what `token_difference` says."""

    def put(said):
        module = SimpleNamespace(token_difference=lambda first, second: said)
        monkeypatch.setitem(sys.modules, "distill_nlp.tokenizers_compared", module)

    return put


def test_the_same_tokens_are_ok(difference):
    difference(None)
    found = check_vocabularies(make_tokenizer(), make_tokenizer(), ["hidden"])
    assert found.level == "ok"
    assert "the same 100 tokens" in found.what


def test_the_same_tokenizer_is_not_compared(difference, tokenizer):
    difference("never asked")
    assert "the same" in check_vocabularies(tokenizer, tokenizer).what


def test_different_tokens_are_a_stop_for_losses_that_compare_them(difference):
    difference("100 and 90 entries")
    found = check_vocabularies(make_tokenizer(), make_tokenizer(), ["hidden", "attention"], "teacher-2")
    assert found.level == "stop"
    assert "teacher-2 and the student read different tokens (100 and 90 entries)" in found.what
    assert "--losses.hidden.weight 0 --losses.attention.weight 0" in found.fix


def test_different_tokens_are_ok_for_the_other_losses(difference):
    difference("100 and 90 entries")
    found = check_vocabularies(make_tokenizer(), make_tokenizer())
    assert found.level == "ok"
    assert "100 and 90 entries" in found.what


def test_real_vocabularies_are_compared(tokenizer):
    other = make_tokenizer()
    other.add_tokens(["w1000"])
    assert check_vocabularies(tokenizer, make_tokenizer(), ["hidden"]).level == "ok"
    assert check_vocabularies(tokenizer, other, ["hidden"]).level == "stop"


@pytest.mark.parametrize(("rows", "level"), [(100, "ok"), (101, "ok"), (99, "stop")])
def test_every_token_id_needs_a_row_of_embeddings(rows, level):
    found = check_vocabulary_size({"student": (99, 200), "teacher": (99, rows)})
    assert found.level == level
    assert f"teacher: ids up to 99, {rows} rows" in found.what
