"""Whether two tokenizers read alike, and a hash of how one reads."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of vocabulary and rules, without the truncation and padding that the last call left set.

    Of a tokenizer without a `backend_tokenizer`, whose rules are code: of its class, its vocabulary and what it makes
    of some texts.
    """
    if _is_fast(tokenizer):
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = {key: value for key, value in parts.items() if key not in ("truncation", "padding")}
    else:
        words = list(TEXTS) + [f"{text} {text}" for text in TEXTS]
        rules = {
            "class": type(tokenizer).__name__,
            "vocabulary": tokenizer.get_vocab(),
            "padding": tokenizer.pad_token_id,
            "texts": [_encode(tokenizer, words, pairs) for pairs in (None, words[::-1])],
        }
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]


def token_difference(first: Any, second: Any) -> str | None:
    """None where two tokenizers give the same ids and segments for every text, else one line that says what differs.

    Vocabularies with their ids, the id of padding, and the model's parameters (merges, scores, unknown token,
    continuing prefix, longest word) must be equal. The other rules (normalizer, pre-tokenizer, template, added tokens)
    are equal where they are written alike; where they are not, as one template can be written in two ways, what they
    do decides: over a probe of the whole vocabulary (each entry as text, in upper and lower case, run together), words
    around each kind of character (accents, CJK, control characters), added tokens, long words and pairs. A difference
    that none of these texts shows is not found. Tokenizers without a `backend_tokenizer` are compared by vocabulary,
    padding and probe; BERT's in Python and in Rust do differ, in the Greek final sigma.

    How to cut and pad (length, side) is no part of it. Truncation and padding that are set in the backend may be reset,
    as by any call.

    Example:
        >>> token_difference(bert_tokenizer, roberta_tokenizer)
        "30,522 and 50,265 entries; '[PAD]' is 0 in the first and missing in the second"
        >>> token_difference(uncased, cased)
        "the same 30,522 entries, but another normalizer: 'A' is '[CLS] a [SEP]' in the first and ..."
    """
    one, two = first.get_vocab(), second.get_vocab()
    if names := _differing(one, two):
        entry = min(names, key=lambda name: (one.get(name, two.get(name)), name))
        count = f"{len(one):,} entries each" if len(one) == len(two) else f"{len(one):,} and {len(two):,} entries"
        return f"{count}; {_side_by_side(repr(entry), one.get(entry), two.get(entry))}"
    same = f"the same {len(one):,} entries, but "
    if first.pad_token_id != second.pad_token_id:
        return same + _side_by_side("the id of padding", first.pad_token_id, second.pad_token_id)
    changed: list[str] = []
    if _is_fast(first) and _is_fast(second):
        (model, rules), (other_model, other_rules) = _model_and_rules(first), _model_and_rules(second)
        if difference := _model_difference(model, other_model):
            return f"{same}another model: {difference}"
        changed = [name for name in rules if rules[name] != other_rules[name]]
        if not changed and type(first) is type(second):
            return None
    for texts, pairs in _probe(first, second):
        if example := _example(first, second, texts, pairs):
            rule = f"another {' and '.join(changed)}" if changed else "other rules"
            return f"{same}{rule}: {example}"
    return None


def _is_fast(tokenizer: Any) -> bool:
    return getattr(tokenizer, "backend_tokenizer", None) is not None


def _differing(one: dict[Any, Any], two: dict[Any, Any]) -> list[Any]:
    return [] if one == two else [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)]


def _side_by_side(subject: str, one: Any, two: Any) -> str:
    said = ["missing" if value is None else repr(value) for value in (one, two)]
    return f"{subject} is {said[0]} in the first and {said[1]} in the second"


def _model_and_rules(tokenizer: Any) -> tuple[dict[str, dict], dict[str, Any]]:
    """What must be equal, and what may be written in several ways."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    # The vocabulary itself has been compared; one file may count an added token as the model's too.
    vocabulary, merges = model.pop("vocab"), model.pop("merges", [])
    scores = dict(vocabulary) if isinstance(vocabulary, list) else {}
    # An empty prefix is none, and a dropout of 0 is none.
    settings = {name: value for name, value in model.items() if value != "" and (value or name != "dropout")}
    rules = {
        "normalizer": parts["normalizer"],
        "pre-tokenizer": parts["pre_tokenizer"],
        "template": parts["post_processor"],
        "list of added tokens": sorted(parts["added_tokens"], key=lambda token: token["id"]),
        "list of the model's own entries": set(scores or vocabulary),
        "treatment of special tokens in texts": tokenizer.split_special_tokens,
    }
    return {"settings": settings, "scores": scores, "merges": dict(enumerate(merges))}, rules


def _model_difference(model: dict[str, dict], other: dict[str, dict]) -> str | None:
    for part, subject in (("settings", "{}"), ("scores", "the score of {!r}"), ("merges", "merge {}")):
        one, two = model[part], other[part]
        if part == "scores":
            one, two = ({piece: each[piece] for piece in one.keys() & two.keys()} for each in (one, two))
        if names := _differing(one, two):
            name = min(names, key=lambda name: (name != "type", name))
            return _side_by_side(subject.format(name), one.get(name), two.get(name))
    return None


# ---- what they do ----

Encoded = tuple[list[int], list[int]]

# Ends, runs and kinds of white space; marks within and around words; numbers; case; composed and decomposed letters.
TEXTS = (
    "",
    " ",
    "a",
    " a",
    "a ",
    "  two  spaces   three ",
    "\tA tab,\na line\r\n\n and\u00a0more\u2003space",
    "It's we're they'LL o'clock don\u2019t \u201cquoted\u201d 'single' ``both''",
    "1 12 123 1234 12345678 1,234.56 -7 3e-10 10% a1b2 1st \u00bd \u00b2 \u0661\u0662",
    "foo_bar fooBar FooBAR foo-bar foo/bar foo.bar@example.com https://example.com/a?b=c#d x+y==z",
    "end. End! end? wait... so--called (this) [that] {those} <br /> &amp; $5 #tag",
    "Caf\u00e9 cafe\u0301 na\u00efve \u0130stanbul STRASSE stra\u00dfe \ufb01ne \uff21\uff22 \u01c5 \u03a3\u03c3\u03c2",
    "\u4e2d\u6587 \u6f22\u5b57\u304b\u306a\u30ab\u30ca mixed\u4e2dwords \ud55c\uad6d\uc5b4",
    "\u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940 \u05e2\u05b4\u05d1",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2603\ufe0f \U0001d54f \U00020000",
    "bell\x07 null\x00 zero\u200bwidth soft\u00adhyphen \ufeffmark \ufffd \ue000",
)
LENGTHS = (16, 32, 50, 63, 64, 65, 99, 100, 101, 127, 128, 129, 199, 200, 201, 255, 256, 257, 511, 512, 513, 1001)
# Every character below CJK and each of the symbols and compatibility forms, samples of the large blocks: those whose
# category has stood since Unicode 3.2. What another one is taken for follows the version that a library was built for.
CHARACTERS = [
    chr(code)
    for code in chain(
        range(0x3400),
        range(0x3400, 0xD800, 61),
        range(0xE000, 0xF900, 997),
        range(0xF900, 0x10000),
        range(0x10000, 0x20000, 7),
        range(0x20000, 0x110000, 4999),
    )
    if unicodedata.ucd_3_2_0.category(chr(code)) == unicodedata.category(chr(code)) != "Cn"
]


def _probe(first: Any, second: Any) -> Iterator[tuple[list[str], list[str] | None]]:
    """Texts that show how a tokenizer works, the telling ones first, then all of the vocabulary; some as pairs."""
    entries = sorted(first.get_vocab())
    # As they stand in a text, without the mark of a word's start or continuation.
    surfaces = [re.sub(r"^(##|\u2581|\u0120)(?=.)", "", entry) for entry in entries]
    words = list(filter(str.isalpha, surfaces)) or list(filter(str.isalnum, surfaces)) or ["a"]
    words = words[:: -(-len(words) // 12)]
    letters = [word for word in surfaces if len(word) == 1 and word.isalnum()][::7] or ["a"]
    added = {str(token) for each in (first, second) for token in each.added_tokens_decoder.values()}
    texts = list(TEXTS)
    for word in words:
        texts += [f" {word}", f"{word} ", f"{word}  {word}", f"\n{word}\n"]
    texts += [letter * length for letter in letters[:2] for length in LENGTHS]
    yield texts, None
    yield texts, texts[::-1]
    a, b = words[0], words[-1]
    yield list(_lines([f"{c} {a}{c} {c}{a} {a}{c}{a}" for c in CHARACTERS], 8)), None
    for form in ("{0}", "{1}{0}{2}", "{1} {0} {2}", "{1}  {0}  {2}", "{1},{0},{2}", "{0}{0}", "{1} {0}{2} {1}{0} {2}"):
        yield [form.format(case, a, b) for token in sorted(added) for case in (token, *_cases(token))], None
    yield list(_lines(entries, 32)), None
    # Of a large vocabulary a part is changed, as each round over all of it takes a second.
    some = surfaces[:: 1 + len(surfaces) // 20_000]
    yield list(_lines([word.swapcase() for word in some], 32)), None
    yield list(_lines([one + two for one, two in zip(some, reversed(some), strict=True)], 32)), None


def _lines(pieces: list[str], size: int) -> Iterator[str]:
    return (" ".join(pieces[start : start + size]) for start in range(0, len(pieces), size))


def _cases(text: str) -> tuple[str, ...]:
    return text.lower(), text.upper(), text.capitalize()


def _encode(tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Encoded]:
    """Ids and segments of each text, uncut."""
    encoded = tokenizer(
        list(texts),
        None if pairs is None else list(pairs),
        padding=False,
        truncation=False,
        return_token_type_ids=True,
        return_attention_mask=False,
        verbose=False,
    )
    return list(zip(encoded["input_ids"], encoded["token_type_ids"], strict=True))


def _example(first: Any, second: Any, texts: list[str], pairs: list[str] | None) -> str | None:
    """The first text that the two read differently, or its first such word, with what each makes of it."""
    ours, theirs = _encode(first, texts, pairs), _encode(second, texts, pairs)
    found = next((i for i, (one, two) in enumerate(zip(ours, theirs, strict=True)) if one != two), None)
    if found is None:
        return None
    if pairs is not None:
        subject = f"the pair ({texts[found]!r}, {pairs[found]!r})"
    elif len(words := texts[found].split()) > 1 and (in_a_word := _example(first, second, words, None)):
        return in_a_word
    else:
        subject = repr(texts[found])
    subject = subject if len(subject) <= 80 else f"{subject[:77]}..."
    (ids, segments), (other_ids, other_segments) = ours[found], theirs[found]
    if ids == other_ids:
        return _side_by_side(f"the segments of {subject}", *_where_they_part(segments, other_segments))
    one, two = _where_they_part(first.convert_ids_to_tokens(ids), second.convert_ids_to_tokens(other_ids))
    return _side_by_side(subject, " ".join(one), " ".join(two))


def _where_they_part(one: list[Any], two: list[Any]) -> tuple[list[Any], list[Any]]:
    """A few of each, from the one before the first that differs."""
    same = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    return one[max(same - 1, 0) :][:6], two[max(same - 1, 0) :][:6]
