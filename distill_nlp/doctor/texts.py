"""What the tokenizer makes of the texts: how much is cut off, how much is unknown, whether the models read it alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_nlp.doctor.findings import Finding

SAMPLE_ROWS = 2000
"""Rows of a split that are tokenized whole: a share of 10% is known to 1.3 points."""

CUT_WARNING, CUT_AIM, CUT_LEFT = 0.10, 0.05, 0.30
UNKNOWN_WARNING, UNKNOWN_STOP = 0.02, 0.30


@dataclass(frozen=True)
class TextSample:
    """Texts of one split, tokenized whole.

    Args:
        lengths: tokens of each text, special ones included: (N,).
        unknown: unknown tokens of each text: (N,).
        rows: of the whole split.
        rare: up to three words that became unknown tokens.
    """

    lengths: np.ndarray
    unknown: np.ndarray
    rows: int
    rare: tuple[str, ...] = ()


def sample_texts(
    columns: Sequence[Sequence[str]], tokenizer: Any, rows: int = SAMPLE_ROWS, seed: int = 0
) -> TextSample:
    """Tokenizes a random sample of a split without cutting.

    Args:
        columns: the texts, and the second texts of pairs.
        tokenizer: left as it was.
        rows: of the sample.
        seed: of the sample; numbers of its own, no global generator is touched.

    Raises:
        ValueError: no texts.
    """
    total = len(columns[0])
    if not total:
        raise ValueError("there are no texts to tokenize")
    chosen = sample_indices(total, rows, seed)
    parts = [[column[i] for i in chosen] for column in columns]
    with unchanged(tokenizer):
        # verbose: a text longer than the model reads is what is counted here, nothing to be warned of.
        encoded = tokenizer(*parts, truncation=False, padding=False, return_attention_mask=False, verbose=False)
    ids = encoded["input_ids"]
    unknown_id = tokenizer.unk_token_id
    unknown = [0 if unknown_id is None else row.count(unknown_id) for row in ids]
    rare: list[str] = []
    for i, count in enumerate(unknown):
        if count and len(rare) < 3 and encoded.is_fast:
            rare += _unknown_words(encoded, i, parts, unknown_id)
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    return TextSample(lengths, np.asarray(unknown), total, tuple(dict.fromkeys(rare))[:3])


def sample_indices(total: int, rows: int, seed: int) -> np.ndarray:
    """Row numbers in rising order: all, or a random choice."""
    if rows >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, size=rows, replace=False))


@contextmanager
def unchanged(tokenizer: Any) -> Iterator[None]:
    """Keeps a fast tokenizer's truncation and padding: each call sets them, and `save_pretrained` writes them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
        backend.enable_padding(**padding) if padding else backend.no_padding()


def check_truncation(
    samples: Mapping[str, TextSample],
    max_length: int,
    truncation_side: str = "right",
    readable: int | None = None,
    setting: str = "data.max_length",
) -> Finding:
    """How many rows are cut at `max_length` tokens, and how many tokens are lost with it.

    Args:
        samples: split -> its sample.
        readable: tokens that the models can read at most, where they have a limit.
        setting: name of the setting that holds `max_length`.

    Returns:
        A warning where more than 10% of the rows of a split are cut, with the length that would cut 5%; else ok.
    """
    shares = {name: float(np.mean(s.lengths > max_length)) for name, s in samples.items()}
    lost = {name: float((s.lengths - max_length).clip(min=0).sum() / s.lengths.sum()) for name, s in samples.items()}
    longest = max(int(s.lengths.max()) for s in samples.values())
    parts = ", ".join(f"{name} {shares[name]:.1%} ({lost[name]:.1%} of its tokens)" for name in samples)
    what = f"rows cut at {max_length} tokens: {parts}; the longest has {longest:,}; {_rows_said(samples)}"
    worst = max(shares, key=lambda name: shares[name])
    if shares[worst] <= CUT_WARNING:
        return Finding("ok", "truncation", what)
    wanted = int(np.quantile(samples[worst].lengths, 1 - CUT_AIM, method="higher"))
    if readable is not None and wanted > readable:
        fix = f"{wanted:,} tokens would cut 5%, the models read {readable:,}"
        if readable > max_length:
            fix += f": --{setting} {readable}"
    else:
        fix = f"--{setting} {wanted} would cut 5%"
    if truncation_side == "right" and shares[worst] > CUT_LEFT:
        fix += "; --data.truncation_side left keeps the ends, where a review says what it thinks"
    return Finding(
        "warning", "truncation", what, "what is cut off is seen by neither model, in training or in use", fix
    )


def check_unknown_tokens(samples: Mapping[str, TextSample], unknown_token: str | None) -> Finding:
    """The share of unknown tokens.

    Returns:
        A stop above 30% in a split, a warning above 2%, each with examples of the words; else ok.
    """
    if unknown_token is None:
        return Finding("ok", "unknown tokens", "the tokenizer has none: it can spell every text")
    shares = {name: float(s.unknown.sum() / max(s.lengths.sum(), 1)) for name, s in samples.items()}
    worst = max(shares, key=lambda name: shares[name])
    parts = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
    what = f"tokens that are {unknown_token}: {parts}; {_rows_said(samples)}"
    if shares[worst] <= UNKNOWN_WARNING:
        return Finding("ok", "unknown tokens", what)
    if samples[worst].rare:
        what += f"; such as {', '.join(map(repr, samples[worst].rare))}"
    return Finding(
        "stop" if shares[worst] > UNKNOWN_STOP else "warning",
        "unknown tokens",
        what,
        "all words that are unknown look the same to the models: another language or script, or a small vocabulary",
        "models of the texts' language by --teacher.model and --student.model, another --data.tokenizer, or a larger "
        "--data.vocab_size where it is trained here",
    )


def check_special_tokens(tokenizer: Any) -> Finding:
    """Whether the tokenizer frames a text by the special tokens that it has.

    Returns:
        A stop without a padding token, a warning where its [CLS] or [SEP] is not in an encoded text, else ok.
    """
    if tokenizer.pad_token_id is None:
        return Finding(
            "stop",
            "special tokens",
            "the tokenizer has no padding token",
            "rows of different lengths cannot form a batch",
            "set pad_token in its tokenizer_config.json, or take another --data.tokenizer",
        )
    with unchanged(tokenizer):
        ids = tokenizer("text", truncation=False, padding=False)["input_ids"]
    framing = {
        "[CLS]": (tokenizer.cls_token, tokenizer.cls_token_id),
        "[SEP]": (tokenizer.sep_token, tokenizer.sep_token_id),
    }
    absent = [token for token, number in framing.values() if number is not None and number not in ids]
    if absent:
        return Finding(
            "warning",
            "special tokens",
            f"the tokenizer has {' and '.join(absent)}, and does not put them around a text",
            "a classifier reads the state of the first token, which it knows as a special one",
            "another --data.tokenizer: the one that came with the teacher's checkpoint",
        )
    present = [token for token, number in framing.values() if number is not None]
    return Finding("ok", "special tokens", f"{', '.join([*present, tokenizer.pad_token])} present")


def check_vocabularies(
    teacher_tokenizer: Any, student_tokenizer: Any, token_level: Sequence[str] = (), teacher: str = "the teacher"
) -> Finding:
    """Whether teacher and student read the same tokens.

    Args:
        token_level: names of the losses that compare token by token.
        teacher: what to call it.

    Returns:
        A stop where the tokens differ and a loss compares them, else ok.
    """
    from distill_nlp.tokenizers_compared import token_difference

    same = teacher_tokenizer is student_tokenizer
    difference = None if same else token_difference(teacher_tokenizer, student_tokenizer)
    if difference is None:
        return Finding(
            "ok", "vocabularies", f"{teacher} and the student read the same {len(student_tokenizer):,} tokens"
        )
    if token_level:
        return Finding(
            "stop",
            "vocabularies",
            f"{teacher} and the student read different tokens ({difference}), and {', '.join(token_level)} compares "
            "them one by one",
            "token i of one model is another piece of text in the other",
            f"leave {', '.join(token_level)} out ("
            + " ".join(f"--losses.{name}.weight 0" for name in token_level)
            + "), or make the student by --student.from_teacher.layers",
        )
    return Finding("ok", "vocabularies", f"{difference}; {teacher} gets tokens of its own")


def check_vocabulary_size(models: Mapping[str, tuple[int, int]]) -> Finding:
    """Whether each model has an embedding for every token id.

    Args:
        models: name -> highest id of its tokenizer, and rows of its embeddings (`vocab_size`).

    Returns:
        A stop where a model has too few rows, else ok.
    """
    counts = ", ".join(f"{name}: ids up to {highest:,}, {rows:,} rows" for name, (highest, rows) in models.items())
    if not [name for name, (highest, rows) in models.items() if rows <= highest]:
        return Finding("ok", "embeddings", counts)
    return Finding(
        "stop",
        "embeddings",
        counts,
        "an id without a row ends the run at the first text that holds it",
        "the tokenizer that came with the checkpoint by --data.tokenizer, or config.vocab_size as large as it",
    )


def _rows_said(samples: Mapping[str, TextSample]) -> str:
    """Which rows were looked at."""
    part = [f"{len(s.lengths):,} of {s.rows:,} {name} rows" for name, s in samples.items() if len(s.lengths) < s.rows]
    return f"a sample of {', '.join(part)}" if part else "all rows"


def _unknown_words(encoded: Any, row: int, parts: Sequence[Sequence[str]], unknown_id: int) -> list[str]:
    """The pieces of one text (or pair) that became unknown tokens."""
    words = []
    encoding = encoded[row]
    for token, (start, end), part in zip(encoding.ids, encoding.offsets, encoding.sequence_ids, strict=True):
        if token == unknown_id and part is not None and len(words) < 3:
            words.append(parts[part][row][start:end])
    return words
