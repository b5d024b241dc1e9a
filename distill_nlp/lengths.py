"""How many tokens a model reads at most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill_nlp.errors import UsageError

# Models that number the positions from the padding's id on (`create_position_ids_from_input_ids` in their source):
# the rows of the table up to that one are of no token.
_COUNT_FROM_PADDING = {
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "layoutlmv3",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}

# What a tokenizer without a limit has for one is above it, and above what its Rust takes.
_NO_LIMIT = 10**20


def most_positions(config: Any) -> int | None:
    """The most tokens of a row that a model has positions for, those of the template included; None: no limit.

    Args:
        config: of the model; None, or one that does not name positions, sets no limit.

    Example:
        >>> most_positions(RobertaConfig(max_position_embeddings=514, pad_token_id=1))
        512
    """
    table = getattr(config, "max_position_embeddings", None)
    # XLNet says -1.
    if not table or table < 0:
        return None
    kind = getattr(config, "model_type", None)
    # DeBERTa as it is published has no table: its positions are relative.
    if kind in ("deberta", "deberta-v2") and not getattr(config, "position_biased_input", True):
        return None
    if kind not in _COUNT_FROM_PADDING:
        return table
    # MPNet's code has the number itself.
    padding = 1 if kind == "mpnet" else config.pad_token_id or 0
    return table - padding - 1


def longest_input(config: Any, tokenizer: Any, max_length: int | None = None) -> int | None:
    """The most tokens of a text that model, tokenizer and `max_length` all allow; None: no limit."""
    limits = [max_length, tokenizer.model_max_length, most_positions(config)]
    return min((n for n in limits if n and n < _NO_LIMIT), default=None)


def refuse_too_long(teachers: Sequence[tuple[str, Any, int]], student: Any, max_length: int) -> None:
    """Refuses rows longer than a model reads.

    Args:
        teachers: name, config, and the length of its rows in tokens.
        student: its config.
        max_length: of the student's rows.

    Raises:
        UsageError: with the setting and the model.
    """
    for role, config, length in (*teachers, ("student", student, max_length)):
        longest = most_positions(config)
        if longest is not None and longest < length:
            own = role != "student" and length != max_length
            setting = "teacher.max_length" if own else "data.max_length"
            raise UsageError(f"{setting} is {length}, but the {role} reads at most {longest} tokens")
