"""Tokens for two readers, and when two tokenizers are one."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import string
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Value
from helpers import make_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from distill_nlp.tokenization import tokenize
from distill_nlp.tokenizers_compared import _probe, token_difference, tokenizer_hash

REAL = Path(__file__).parent.parent.parent / "shared" / "models" / "bert-base-uncased-tokenizer"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no tokenizer at {REAL}")

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "movie", "##ing", "caf", "caf\u00e9", "Rome", "\u4e2d", "\u6587", "12", "##3"]
LETTERS = [f"{mark}{c}" for c in string.ascii_lowercase for mark in ("", "##")]
PIECES = [*SPECIAL, *WORDS, *string.punctuation, *LETTERS]
NAMES = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def template(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1"):
    special = [("[CLS]", 2), ("[SEP]", 3)]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)


def wordpiece(edit=None, pieces=PIECES, kind=PreTrainedTokenizerFast, **names):
    """A small BERT tokenizer; `edit` changes its backend."""
    model = models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    return wrapped(model, edit, kind, **names)


def wrapped(model, edit=None, kind=PreTrainedTokenizerFast, **names):
    backend = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = template()
    tokenizer = kind(tokenizer_object=backend, **{k: v for k, v in (NAMES | names).items() if v is not None})
    if edit is not None:
        edit(tokenizer.backend_tokenizer)
    return tokenizer


def setting(**rules):
    def edit(backend):
        for name, rule in rules.items():
            setattr(backend, name, rule)

    return edit


def model_setting(**settings):
    def edit(backend):
        for name, value in settings.items():
            setattr(backend.model, name, value)

    return edit


def rewritten(change):
    """A tokenizer from the file of the small one, changed by `change`."""
    parts = json.loads(wordpiece().backend_tokenizer.to_str())
    change(parts)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), **NAMES)


# ---- tokens ----

TEXTS = {"text": ["w4 w5 w6 w7", "w8"], "text_pair": ["w9", "w10 w11"], "labels": [0, -100]}


def test_tokenizing_cuts_and_keeps_pairs_apart():
    tokens = tokenize(Dataset.from_dict(TEXTS), make_tokenizer(), max_length=6, token_type_ids=True)
    assert tokens.column_names == ["labels", "input_ids", "token_type_ids", "attention_mask"]
    assert [len(ids) for ids in tokens["input_ids"]] == [6, 6]
    assert tokens["input_ids"][1] == [2, 8, 3, 10, 11, 3]
    assert tokens["token_type_ids"][1] == [0, 0, 0, 1, 1, 1]
    assert tokens["labels"] == [0, -100]


@pytest.mark.parametrize("prefix", ["teacher_", "teacher_2_"])
def test_a_second_reader_gets_columns_of_its_own(prefix):
    rows = Dataset.from_dict(TEXTS)
    alone = tokenize(rows, wordpiece(), 5, token_type_ids=True)
    student = tokenize(rows, make_tokenizer(), 32, token_type_ids=True)
    both = tokenize(rows, wordpiece(), 5, token_type_ids=True, prefix=prefix, keep_texts=True)
    assert both["text"] == TEXTS["text"]
    assert both["text_pair"] == TEXTS["text_pair"]
    both = tokenize(both, make_tokenizer(), 32, token_type_ids=True)
    assert set(both.column_names) == set(student.column_names) | {
        f"{prefix}{name}" for name in ("input_ids", "token_type_ids", "attention_mask")
    }
    for name in student.column_names:
        assert both[name] == student[name]
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert both[f"{prefix}{name}"] == alone[name] != student[name]


def test_readers_that_share_one_tokenizer_are_each_cut_at_their_own_length():
    rows = Dataset.from_dict({"text": [" ".join(f"w{i}" for i in range(4, 4 + n)) for n in (20, 3, 9, 14)]})
    tokenizer = make_tokenizer()
    # State of an earlier use.
    tokenizer(rows["text"][:], padding="max_length", truncation=True, max_length=4)
    both = tokenize(rows, tokenizer, 8, prefix="teacher_", keep_texts=True)
    both = tokenize(both, tokenizer, 16, keep_texts=True)
    both = tokenize(both, tokenizer, 6, prefix="teacher_2_")
    for prefix, length in (("teacher_", 8), ("", 16), ("teacher_2_", 6)):
        ids = both[f"{prefix}input_ids"]
        assert [len(row) for row in ids] == [min(n + 2, length) for n in (20, 3, 9, 14)]
        assert all(row == [2, *range(4, 2 + len(row)), 3] for row in ids)
        assert [len(row) for row in both[f"{prefix}attention_mask"]] == [len(row) for row in ids]


def test_segments_are_made_where_they_are_asked_for():
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    rows = Dataset.from_dict(TEXTS)
    assert "token_type_ids" not in tokenize(rows, tokenizer, 8).column_names
    assert "teacher_token_type_ids" in tokenize(rows, tokenizer, 8, True, prefix="teacher_").column_names
    assert "token_type_ids" in tokenize(rows, make_tokenizer(), 8).column_names


def test_rows_may_have_no_labels_and_class_labels_become_numbers():
    rows = Dataset.from_dict({"text": ["w4", "w5"]})
    assert tokenize(rows, make_tokenizer(), 8).column_names == ["input_ids", "token_type_ids", "attention_mask"]
    labeled = rows.add_column("labels", [1, 0]).cast_column("labels", ClassLabel(names=["a", "b"]))
    assert tokenize(labeled, make_tokenizer(), 8).features["labels"] == Value("int64")


def test_what_the_rows_have_already_is_not_overwritten():
    rows = tokenize(Dataset.from_dict(TEXTS), make_tokenizer(), 8, keep_texts=True)
    expected = "have attention_mask, input_ids, token_type_ids already; expected another prefix than ''"
    with pytest.raises(ValueError, match=expected):
        tokenize(rows, make_tokenizer(), 8)


def test_rows_that_lost_their_texts_are_refused():
    rows = tokenize(Dataset.from_dict(TEXTS), make_tokenizer(), 8)
    with pytest.raises(ValueError, match="expected a column text, got labels, input_ids.* by keep_texts=True"):
        tokenize(rows, make_tokenizer(), 8, prefix="teacher_", keep_texts=True)


# ---- the hash ----


def test_the_hash_is_that_of_the_file_without_the_state_of_the_last_call():
    tokenizer = make_tokenizer()
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    assert parts.pop("truncation") is None
    assert parts.pop("padding") is None
    expected = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    assert tokenizer_hash(tokenizer) == expected
    tokenizer(["w4"], padding="max_length", truncation=True, max_length=4)
    assert json.loads(tokenizer.backend_tokenizer.to_str())["truncation"] is not None
    assert tokenizer_hash(tokenizer) == expected
    assert tokenizer_hash(wordpiece()) != expected


# ---- the same tokenizer, written in two ways ----


def used(tokenizer):
    tokenizer(["the"], padding="max_length", truncation=True, max_length=4)
    return tokenizer


def reloaded(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def with_settings(**settings):
    tokenizer = wordpiece()
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return tokenizer


def last_added_first(parts):
    parts["added_tokens"].reverse()


class OtherClass(PreTrainedTokenizerFast):
    pass


SAME = {
    "itself": wordpiece,
    "used": lambda: used(wordpiece()),
    "cut on the left": lambda: with_settings(truncation_side="left", model_max_length=7),
    "another class": lambda: wordpiece(kind=OtherClass),
    "BertProcessing": lambda: wordpiece(setting(post_processor=processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)))),
    "accents said": lambda: wordpiece(setting(normalizer=normalizers.BertNormalizer(strip_accents=True))),
    "in a sequence": lambda: wordpiece(setting(normalizer=normalizers.Sequence([normalizers.BertNormalizer()]))),
    "pre-tokenizer in parts": lambda: wordpiece(
        setting(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]))
    ),
    "order of added tokens": lambda: rewritten(last_added_first),
    "an added word that is an entry": lambda: with_token("the", single_word=True, normalized=False),
}


@pytest.mark.parametrize("name", SAME)
def test_one_tokenizer_written_in_two_ways_is_one(name):
    assert token_difference(wordpiece(), SAME[name]()) is None


def test_a_saved_tokenizer_is_the_same(tmp_path):
    assert token_difference(wordpiece(), reloaded(used(wordpiece()), tmp_path)) is None


def slow(folder, **settings):
    (folder / "vocab.txt").write_text("\n".join(PIECES), encoding="utf-8")
    return BertTokenizerLegacy(str(folder / "vocab.txt"), **settings)


def test_a_slow_tokenizer_is_compared_by_what_it_does(tmp_path):
    assert token_difference(wordpiece(), slow(tmp_path)) is None
    assert token_difference(slow(tmp_path), slow(tmp_path)) is None
    cased = token_difference(slow(tmp_path), slow(tmp_path, do_lower_case=False))
    assert f"the same {len(PIECES)} entries, but other rules: " in cased
    shorter = wordpiece(model_setting(max_input_chars_per_word=99))
    difference = token_difference(slow(tmp_path), shorter)
    assert re.search(r"'(\w)\1{70,}\.\.\. is '\[CLS\] \w ##", difference), difference


def bpe(merges, **settings):
    entries = [*SPECIAL, "a", "b", "c", "ab", "bc", "abc"]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    return wrapped(models.BPE(vocabulary, merges, unk_token="[UNK]", **settings))


MERGES = [("a", "b"), ("b", "c"), ("ab", "c")]


def unigram(score=-2.0, unk=1):
    scores = [(piece, 0.0) for piece in SPECIAL] + [("a", score), ("b", -3.5), ("ab", -4.0)]
    return wrapped(models.Unigram(scores, unk_id=unk))


def test_settings_that_say_nothing_are_none():
    assert token_difference(bpe(MERGES), bpe(MERGES, continuing_subword_prefix="", dropout=0.0)) is None


def in_and_outside_the_model(make, content, **flags):
    """Two tokenizers with an added token of one id: in the first the model has it too."""
    parts = json.loads(make().backend_tokenizer.to_str())
    entries = parts["model"]["vocab"]
    number = len(entries)
    parts["added_tokens"].append(parts["added_tokens"][-1] | {"id": number, "content": content} | flags)
    outside = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), **NAMES)
    if isinstance(entries, dict):
        entries[content] = number
    else:
        entries.append([content, 0.0])
    inside = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), **NAMES)
    assert inside.get_vocab()[content] == outside.get_vocab()[content] == number
    assert inside.backend_tokenizer.get_vocab_size(False) == outside.backend_tokenizer.get_vocab_size(False) + 1
    return inside, outside


@pytest.mark.parametrize("make", [wordpiece, unigram])
def test_an_added_token_may_be_an_entry_of_the_model_or_not(make):
    assert token_difference(*in_and_outside_the_model(make, "[X]")) is None


# ---- tokenizers that differ ----


def swapped(one, other):
    return [{one: other, other: one}.get(piece, piece) for piece in PIECES]


def with_token(content, **flags):
    tokenizer = wordpiece()
    tokenizer.add_tokens([AddedToken(content, **flags)])
    return tokenizer


def normalizer(**settings):
    return lambda: wordpiece(setting(normalizer=normalizers.BertNormalizer(**settings)))


def replacing(one, other):
    rule = normalizers.Sequence([normalizers.BertNormalizer(), normalizers.Replace(one, other)])
    return lambda: wordpiece(setting(normalizer=rule))


DIFFERENT = {
    "fewer entries": (
        lambda: wordpiece(pieces=PIECES[:-1]),
        f"^{len(PIECES)} and {len(PIECES) - 1} entries; '##z' is {len(PIECES) - 1} in the first and missing in",
    ),
    "more entries": (
        lambda: wordpiece(pieces=[*PIECES, "new"]),
        f"entries; 'new' is missing in the first and {len(PIECES)} in the second$",
    ),
    "two ids exchanged": (
        lambda: wordpiece(pieces=swapped("the", "movie")),
        f"^{len(PIECES)} entries each; 'the' is 5 in the first and 6 in the second$",
    ),
    "an entry replaced": (
        lambda: wordpiece(pieces=["film" if piece == "movie" else piece for piece in PIECES]),
        "entries each; '(film|movie)' is (6|missing) in the first and (6|missing) in the second$",
    ),
    "padding": (lambda: wordpiece(pad_token="[MASK]"), "the id of padding is 0 in the first and 4 in the second"),
    "no padding": (lambda: wordpiece(pad_token=None), "the id of padding is 0 in the first and missing in the second"),
    "longest word": (
        lambda: wordpiece(model_setting(max_input_chars_per_word=120)),
        "another model: max_input_chars_per_word is 100 in the first and 120 in the second$",
    ),
    "unknown token": (
        lambda: wordpiece(model_setting(unk_token="[MASK]")),
        r"another model: unk_token is '\[UNK\]' in the first and '\[MASK\]' in the second$",
    ),
    "continuing prefix": (
        lambda: wordpiece(model_setting(continuing_subword_prefix="@@")),
        "another model: continuing_subword_prefix is '##' in the first and '@@' in the second$",
    ),
    "model": (
        lambda: wrapped(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]")),
        "another model: type is 'WordPiece' in the first and 'WordLevel' in the second$",
    ),
    "case": (normalizer(lowercase=False, strip_accents=True), "another normalizer: 'A' is '\\[CLS\\] a "),
    "accents": (normalizer(strip_accents=False), "another normalizer: 'Caf\u00e9' is '\\[CLS\\] caf ##e \\[SEP\\]' in"),
    "control": (normalizer(clean_text=False), "another normalizer: 'bell\\\\x07' is"),
    "cjk": (normalizer(handle_chinese_chars=False), "another normalizer: '\u4e2d\u6587' is '.*\u4e2d \u6587 "),
    "one entry": (replacing("movie", "film"), "another normalizer: 'movie' is"),
    "a rare character": (replacing("\u2117", "p"), "another normalizer: '\u2117' is"),
    "a late character": (replacing("\ufe62", "p"), "another normalizer: '\ufe62' is"),
    "no normalizer": (lambda: wordpiece(setting(normalizer=None)), "another normalizer"),
    "pre-tokenizer": (
        lambda: wordpiece(setting(pre_tokenizer=pre_tokenizers.Whitespace())),
        "another pre-tokenizer: ",
    ),
    "split at white space only": (
        lambda: wordpiece(setting(pre_tokenizer=pre_tokenizers.WhitespaceSplit())),
        "another pre-tokenizer: ",
    ),
    "digits": (
        lambda: wordpiece(
            setting(
                pre_tokenizer=pre_tokenizers.Sequence(
                    [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
                )
            )
        ),
        "another pre-tokenizer: '12' is",
    ),
    "no end": (
        lambda: wordpiece(setting(post_processor=template(single="[CLS] $A"))),
        r"another template: '' is '\[CLS\] \[SEP\]' in the first and '\[CLS\]' in the second$",
    ),
    "pairs": (
        lambda: wordpiece(setting(post_processor=template(pair="[CLS] $A [SEP] [SEP] $B:1 [SEP]:1"))),
        r"another template: the pair \('', ",
    ),
    "segments": (
        lambda: wordpiece(setting(post_processor=template(pair="[CLS] $A [SEP] $B:0 [SEP]:0"))),
        r"another template: the segments of the pair \('', .* is \[0, 1, 1.*\] in the first and \[0, 0, 0",
    ),
    "an entry added": (lambda: with_token("the"), "another list of added tokens: .*the.* is"),
    "special tokens are texts": (
        lambda: with_settings(split_special_tokens=True),
        "another treatment of special tokens in texts: ",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_tokenizers_that_differ_are_told_apart_with_an_example(name):
    make, expected = DIFFERENT[name]
    difference = token_difference(wordpiece(), make())
    assert re.search(expected, difference), difference
    assert "\n" not in difference
    assert len(difference) < 400
    assert token_difference(make(), wordpiece()) is not None


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (bpe(MERGES), bpe([MERGES[1], MERGES[0], MERGES[2]]), r"merge 0 is \['a', 'b'\] in the first and \['b', 'c'\]"),
        (bpe(MERGES), bpe(MERGES[:2]), r"merge 2 is \['ab', 'c'\] in the first and missing in the second$"),
        (bpe(MERGES), bpe(MERGES, dropout=0.5), "dropout is missing in the first and 0.5 in the second$"),
        (unigram(), unigram(score=-3.0), "the score of 'a' is -2.0 in the first and -3.0 in the second$"),
        (unigram(unk=0), unigram(), "unk_id is 0 in the first and 1 in the second$"),
        (unigram(unk=0), unigram(unk=None), "unk_id is 0 in the first and missing in the second$"),
    ],
)
def test_parameters_of_the_model_are_compared_as_they_are(one, other, expected):
    difference = token_difference(one, other)
    assert re.search(f"^the same .* entries, but another model: {expected}", difference), difference


@pytest.mark.parametrize("flags", [{"single_word": True}, {"lstrip": True}, {"rstrip": True}, {"normalized": False}])
def test_each_flag_of_an_added_token_counts_where_it_shows(flags):
    """With white space and case kept, so that all flags show."""
    rules = {"pre_tokenizer": pre_tokenizers.Split(" ", "isolated"), "normalizer": normalizers.Lowercase()}
    tokenizers = []
    for given in ({}, flags):
        tokenizer = wordpiece(setting(**rules), pieces=[*PIECES, " "])
        tokenizer.add_tokens([AddedToken("Rome", **({"normalized": True} | given))])
        tokenizers.append(tokenizer)
    assert "another list of added tokens: " in token_difference(*tokenizers)


def test_an_entry_of_one_model_counts_where_it_shows():
    """The added token is matched as it is written, the model's entry in any case."""
    difference = token_difference(*in_and_outside_the_model(wordpiece, "xy"))
    assert "another list of the model's own entries: 'XY' is '[CLS] xy [SEP]' in the first and" in difference


def test_whether_an_added_token_is_special_does_not_count():
    assert token_difference(with_token("the", special=True), with_token("the", special=False, normalized=False)) is None


# ---- the probe ----


def test_the_probe_has_each_entry_by_itself_in_the_other_case_and_within_a_word():
    words = {word for texts, _ in _probe(wordpiece(), wordpiece()) for text in texts for word in text.split()}
    for entry in PIECES:
        surface = entry.removeprefix("##") or entry
        assert entry in words
        assert surface.swapcase() in words
        assert any(surface in word and word.lower() not in (entry, surface) for word in words), entry


@pytest.mark.parametrize("content", ["[MASK]", "[PAD]"])
def test_each_added_token_is_tried_within_words_in_a_large_vocabulary_too(content):
    """The two are neighbours in the order of entries: a part of the vocabulary leaves one of them out."""
    pieces = [*PIECES, *(f"entry{i}" for i in range(20_000))]
    other = wordpiece(pieces=pieces)
    parts = json.loads(other.backend_tokenizer.to_str())
    for token in parts["added_tokens"]:
        token["single_word"] = token["content"] == content
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)))
    other.pad_token = "[PAD]"
    difference = token_difference(wordpiece(pieces=pieces), other)
    assert "another list of added tokens: " in difference
    assert content in difference


def test_white_space_at_the_ends_is_tried_on_words_that_the_tokenizer_knows():
    """Of all other texts each is one unknown token."""
    pieces = [(piece, 0.0) for piece in [*SPECIAL, "\u2581omega", "omega"]]
    tokenizers = [wrapped(models.Unigram(pieces, unk_id=1)) for _ in range(2)]
    stripped = normalizers.Replace(Regex(r"^\s+(?=\S)"), "")
    for tokenizer, rule in zip(tokenizers, (None, stripped), strict=True):
        tokenizer.backend_tokenizer.normalizer = rule
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    assert r"another normalizer: '\nomega\n' is" in token_difference(*tokenizers)


def test_long_texts_of_the_probe_are_not_warned_of(caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert token_difference(*(with_settings(model_max_length=7), wordpiece(kind=OtherClass))) is None
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.records == []


# ---- the tokenizer of BERT ----


@real
def test_the_tokenizer_of_bert_in_two_files():
    bert = AutoTokenizer.from_pretrained(REAL)
    other = PreTrainedTokenizerFast(tokenizer_file=str(REAL / "tokenizer.json"), **NAMES)
    other.backend_tokenizer.post_processor = processors.BertProcessing(("[SEP]", 102), ("[CLS]", 101))
    assert token_difference(bert, other) is None


@real
def test_the_tokenizer_of_bert_and_another():
    bert, cased = (AutoTokenizer.from_pretrained(REAL) for _ in range(2))
    cased.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    assert token_difference(bert, cased).startswith("the same 30,522 entries, but another normalizer: ")
    assert token_difference(bert, wordpiece()).startswith(f"30,522 and {len(PIECES)} entries; '[unused0]' is 1 in")


def test_a_slow_tokenizer_has_a_hash_of_what_it_does(tmp_path):
    found = tokenizer_hash(slow(tmp_path))
    assert tokenizer_hash(slow(tmp_path)) == found
    assert tokenizer_hash(slow(tmp_path, do_lower_case=False)) != found
    (tmp_path / "vocab.txt").write_text("\n".join([*PIECES, "more"]), encoding="utf-8")
    assert tokenizer_hash(BertTokenizerLegacy(str(tmp_path / "vocab.txt"))) != found
