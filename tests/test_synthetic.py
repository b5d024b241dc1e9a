"""The generated reviews: the same everywhere, honestly split, and not to be solved by counting words."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distill_nlp.synthetic import LABEL_NAMES, LABEL_NOISE, SPLITS, UNLABELED, generate, train_tokenizer

ROOT = Path(__file__).parent.parent
SMALL = {"test": 300, "validation": 100, "train": 200, "unlabeled": 300, "teacher_train": 600}


@pytest.fixture(scope="module")
def clean():
    """Text -> label before noise, and before the pool lost its labels where a labelled split can be asked."""
    splits = generate(0, noise=False)
    return {row["text"]: row["label"] for name, rows in splits.items() if name != "unlabeled" for row in rows}


def in_processes(code: str) -> set[str]:
    outputs = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        outputs.add(run.stdout.strip())
    return outputs


def test_same_reviews_in_every_process():
    code = (
        "import hashlib; from distill_nlp.synthetic import generate; "
        f"print(hashlib.sha256(repr(generate(3, {SMALL!r})).encode()).hexdigest())"
    )
    assert in_processes(code) == {hashlib.sha256(repr(generate(3, SMALL)).encode()).hexdigest()}


def test_another_seed_gives_other_reviews():
    first, second = ({row["text"] for row in generate(seed, SMALL)["test"]} for seed in (0, 1))
    assert len(first & second) < len(first) / 4  # short reviews may recur


def test_importing_needs_no_heavy_module():
    code = (
        "import sys, distill_nlp.synthetic as s; s.generate(0, dict.fromkeys(s.SPLITS, 2)); "
        "print(sorted({'torch', 'transformers', 'tokenizers', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    assert in_processes(code) == {"[]"}


def test_no_text_occurs_twice():
    splits = generate(0)
    assert {name: len(rows) for name, rows in splits.items()} == SPLITS
    texts = [row["text"] for rows in splits.values() for row in rows]
    # Lower-cased and without punctuation, as a model would see them.
    assert len({re.sub(r"\W+", " ", text.lower()) for text in texts}) == sum(SPLITS.values())


def test_reviews_are_one_to_four_sentences(clean):
    for text in clean:
        assert re.fullmatch(r"([A-Z][A-Za-z ,-]*\. ?){1,4}", text), text


def test_measured_splits_do_not_depend_on_the_size_of_the_others():
    few, many = generate(0, SMALL), generate(0, {**SMALL, "train": 500, "unlabeled": 0, "teacher_train": 0})
    assert few["test"] == many["test"]
    assert few["validation"] == many["validation"]
    assert many["unlabeled"] == many["teacher_train"] == []


@pytest.mark.parametrize(("sizes", "match"), [({"dev": 10}, "dev"), ({"test": -1}, ">= 0")])
def test_impossible_sizes_are_refused(sizes, match):
    with pytest.raises(ValueError, match=match):
        generate(0, sizes)


def test_classes_are_balanced_and_noise_is_as_stated():
    noisy, clean = generate(0, SMALL), generate(0, SMALL, noise=False)
    assert LABEL_NAMES == ["negative", "positive"]
    for name, rows in noisy.items():
        assert [row["text"] for row in rows] == [row["text"] for row in clean[name]]
        if name == "unlabeled":
            assert {row["label"] for row in rows} == {UNLABELED}
            continue
        assert sum(row["label"] for row in clean[name]) == SMALL[name] / 2
        flipped = [old["label"] != new["label"] for old, new in zip(clean[name], rows, strict=True)]
        assert sum(flipped) == round(LABEL_NOISE.get(name, 0.0) * SMALL[name])
        # Spread over the split, not gathered in its first half.
        if any(flipped):
            assert 0.2 < sum(flipped[: len(flipped) // 2]) / sum(flipped) < 0.8


# Read and labelled by a person. They change with the grammar, and must be read again then.
@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Although the dessert had a lot of appeal, the coffee had a lot of faults.", 0),
        ("I would not call the dialogue sharp. I liked the cast, but the pacing was disappointing.", 0),
        ("My flatmate called the battery dismal. The performance was never terrible. I can only recommend it.", 1),
        (
            "I have to call the build quality disappointing. Still, the manual was not at all cryptic, and that is "
            "what counts. Luckily the design was not horrible.",
            1,
        ),
        (
            "The service was attentive, but I hated the soup. I wish the dessert had been fantastic. The advert for "
            "it was splendid.",
            0,
        ),
        ("The handle was never less than firm, but that could not save the build quality.", 0),
        ("I have to call the design lousy, although the packaging was anything but wasteful.", 0),
        (
            "I can only call the atmosphere dreadful, but the service more than made up for it. The bread was simply "
            "fantastic.",
            1,
        ),
        (
            "I had feared that the wine list would be awful, but it was not. The coffee was clearly weak, but anyone "
            "would call the pasta wonderful.",
            1,
        ),
        ("My sister said that the service was disappointing, quite wrongly. The dessert was undeniably good.", 1),
        (
            "The dialogue was never wonderful. The humour was anything but mediocre, but the ending was anything but "
            "remarkable.",
            0,
        ),
    ],
)
def test_read_by_hand(clean, text, label):
    assert clean[text] == label


GOOD = "(good|great|excellent|wonderful|superb|brilliant|fantastic|pleasant|remarkable|satisfying)"
BAD = "(bad|awful|terrible|poor|dreadful|disappointing|horrible|lousy|unpleasant|annoying)"
NOT = "(not|not at all|never|hardly|by no means|far from|anything but)"
IT = "[Tt]he [a-z ]+?"


@pytest.mark.parametrize(
    ("pattern", "label"),
    [
        (f"{IT} was {GOOD}", 1),
        (f"{IT} was {BAD}", 0),
        (f"{IT} was {NOT} {BAD}", 1),
        (f"{IT} was {NOT} {GOOD}", 0),
        (f"{IT} was (nothing short of|never less than|without doubt) {BAD}", 0),
        (f"{IT} had (no|hardly any) (flaws|faults|problems|defects)", 1),
        (f"{IT} had (no|hardly any) (charm|character|merit|style)", 0),
        (f"I did not (hate|dislike|loathe|detest) {IT}", 1),
        (f"(Nobody could|I cannot|I would not) call {IT} {GOOD}", 0),
        (f".+, (but|yet) {IT} was {GOOD}", 1),
        (f".+, (but|yet) {IT} was {NOT} {GOOD}", 0),
        (f".+, but {IT} more than made up for it", 1),
        (f".+, but that could not save {IT}", 0),
        (f".+ However, {IT} was {BAD}", 0),
        (f"Although .+, {IT} was {GOOD}", 1),
        (f"{IT} was {BAD}, although .+", 0),
        (f"(I wish|If only) {IT} had been {GOOD}", 0),
        (f"I expected {IT} to be {BAD}, but it was not", 1),
        (f"I expected {IT} to be {BAD}, and so it was", 0),
        (f"M[a-z ]+ said that {IT} was {BAD}, (and I disagree|quite wrongly)", 1),
        (f"M[a-z ]+ said that {IT} was {BAD}, (and I agree|quite rightly)", 0),
    ],
)
def test_a_phenomenon_decides_the_label(clean, pattern, label):
    found = {text: got for text, got in clean.items() if re.fullmatch(rf"{pattern}\.", text)}
    assert len(found) >= 5
    assert {text for text, got in found.items() if got != label} == set()


@pytest.mark.parametrize("verbs", ["loved|liked|enjoyed|admired", "hated|disliked|loathed|detested"])
def test_what_others_felt_says_nothing(clean, verbs):
    heard = re.compile(rf"(brother|sister|neighbour|colleague|flatmate|uncle|friend|boss|cousin) ({verbs}) it\.")
    labels = [label for text, label in clean.items() if heard.search(text)]
    assert len(labels) > 100
    assert 0.4 < sum(labels) / len(labels) < 0.6


def test_counting_words_does_not_solve_it():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    splits = generate(0, {"teacher_train": 10000}, noise=False)
    texts, labels = ({name: [row[key] for row in rows] for name, rows in splits.items()} for key in ("text", "label"))
    words = CountVectorizer()
    model = LogisticRegression(max_iter=500).fit(words.fit_transform(texts["teacher_train"]), labels["teacher_train"])
    assert 0.65 < model.score(words.transform(texts["test"]), labels["test"]) < 0.85


@pytest.fixture(scope="module")
def texts():
    return [row["text"] for row in generate(0, SMALL)["teacher_train"]]


def test_tokenizer_is_read_again_by_auto_tokenizer(texts, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    batch = tokenizer(texts[:50])
    assert dict(batch) == dict(again(texts[:50]))
    assert set(batch) == {"input_ids", "attention_mask"}  # DistilBERT has no token types
    assert again.model_max_length == tokenizer.model_max_length
    assert again.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_tokenizer_spells_what_it_never_saw(texts):
    tokenizer = train_tokenizer(texts, vocab_size=300)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert len(tokenizer) == 300
    assert tokenizer("QUIZZICAL Zebra 1984")["input_ids"] == tokenizer("quizzical zebra 1984")["input_ids"]
    ids = tokenizer("quizzical zebra 1984. " + " ".join(texts))["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("quizzical zebra 1984.")
    # Whole words where there is room for them.
    assert train_tokenizer(texts).tokenize("The plot was awful.") == ["the", "plot", "was", "awful", "."]


def test_same_tokenizer_from_the_same_texts(texts):
    first = train_tokenizer(texts, vocab_size=400).get_vocab()
    for _ in range(3):
        assert train_tokenizer(iter(texts), vocab_size=400).get_vocab() == first


@pytest.mark.slow
def test_same_tokenizer_in_every_process():
    code = (
        "from distill_nlp.synthetic import *; "
        f"texts = [row['text'] for row in generate(0, {SMALL!r})['teacher_train']]; "
        "print(sorted(train_tokenizer(texts, 400).get_vocab().items()))"
    )
    assert len(in_processes(code)) == 1
