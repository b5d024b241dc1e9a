"""Texts to token ids, once for each reader."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from distill_nlp.modeling import accepted_arguments

TEXT_COLUMNS = ("text", "text_pair")


def tokenize(
    dataset: Any,
    tokenizer: Any,
    max_length: int | None,
    token_type_ids: bool = False,
    prefix: str = "",
    keep_texts: bool = False,
) -> Any:
    """Adds the token ids of one reader, cut at `max_length` and not padded; rows stay in order.

    Args:
        dataset: a `datasets.Dataset` with the column `text`, and `text_pair` where the rows are pairs.
        tokenizer: the reader's.
        max_length: longest row in tokens, those of the template included; None: no limit.
        token_type_ids: makes them even where the tokenizer does not by itself.
        prefix: before the names of the new columns; "" for the student, "teacher_" for a teacher that reads other
            tokens.
        keep_texts: keeps the columns of text, for another reader.

    Raises:
        ValueError: there is no column `text`, or a new column is there already.

    Example:
        >>> rows = tokenize(rows, student_tokenizer, 128, keep_texts=True)
        >>> rows = tokenize(rows, teacher_tokenizer, 512, prefix="teacher_")
        >>> rows.column_names
        ['labels', 'input_ids', 'attention_mask', 'teacher_input_ids', 'teacher_attention_mask']
    """
    from datasets import Value

    names = dataset.column_names
    if "text" not in names:
        raise ValueError(
            f"expected a column text, got {', '.join(names)}; an earlier reader must keep it by keep_texts=True"
        )
    columns = [c for c in TEXT_COLUMNS if c in names]

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokens = encode_texts(batch, tokenizer, max_length, token_type_ids, prefix)
        if taken := sorted(tokens.keys() & set(names)):
            raise ValueError(f"the rows have {', '.join(taken)} already; expected another prefix than {prefix!r}")
        return tokens

    tokens = dataset.map(encode, batched=True, remove_columns=None if keep_texts else columns, desc="Tokenizing")
    # Lists, of several labels per text, are numbers already; a class index leaves the names of the classes behind.
    one_label = "labels" in tokens.column_names and not hasattr(tokens.features["labels"], "feature")
    return tokens.cast_column("labels", Value("int64")) if one_label else tokens


def encode_texts(
    batch: Mapping[str, list[Any]],
    tokenizer: Any,
    max_length: int | None,
    token_type_ids: bool = False,
    prefix: str = "",
) -> dict[str, list[list[int]]]:
    """Token ids of texts and, where they are there, their pairs; arguments as of `tokenize`.

    Example:
        >>> encode_texts({"text": ["good", "very bad"]}, tokenizer, 128)["input_ids"]
        [[2, 4, 3], [2, 5, 6, 3]]
    """
    encoded = tokenizer(
        *(batch[c] for c in TEXT_COLUMNS if c in batch),
        truncation=True,
        max_length=max_length,
        return_token_type_ids=token_type_ids or None,
    )
    return {f"{prefix}{name}": rows for name, rows in encoded.items()}


def with_segments(tokenizer: Any, model: Any) -> Any:
    """The tokenizer to deliver with a model of pairs: it tells the two texts apart without being asked to.

    Args:
        tokenizer: left as it is.
        model: that reads its tokens.

    Returns:
        The tokenizer itself where it makes `token_type_ids` already, or the model has no segments to tell apart; else
        a copy that makes them, or for a model of one segment alone, which refuses a second, one that does not. So does
        what is loaded after it was saved.
    """
    names, accepted = tokenizer.model_input_names, accepted_arguments(model)
    segments = getattr(getattr(model, "config", None), "type_vocab_size", 2)
    makes = "token_type_ids" in names
    wanted = segments >= 2 and (accepted is None or "token_type_ids" in accepted)
    if makes == wanted or (makes and segments != 1):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_input_names = [n for n in names if n != "token_type_ids"] + ["token_type_ids"] * wanted
    # What is saved.
    tokenizer.init_kwargs["model_input_names"] = list(tokenizer.model_input_names)
    return tokenizer
