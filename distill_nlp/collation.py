"""Batches of rows that hold the tokens of several readers: each padded by its own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import BatchEncoding, DataCollatorWithPadding, PreTrainedTokenizerBase

# What `tokenizer.pad` makes longer, whether or not the tokenizer makes it by itself.
PADDED_NAMES = frozenset({"attention_mask", "token_type_ids", "special_tokens_mask"})


@dataclass
class DistillationCollator:
    """Pads the student's tokens, and those of each teacher that reads others, and stacks the other columns.

    A column is a teacher's if its name is that teacher's prefix before the name of a model input, the longest prefix
    first: `teacher_input_ids` is one, `teacher_logits` is not. Each teacher's columns become (B, S_teacher) with its
    own padding id, side and width; where the rows have none, as in evaluation, the batch has none. All other columns
    become what `DataCollatorWithPadding` makes of them: the student's tokens (B, S), the rest stacked, `label` and
    `label_ids` as `labels`. A value of None counts as absent.

    Args:
        tokenizer: the student's.
        teacher_tokenizers: prefix -> tokenizer, for the teachers that read tokens of their own.
        pad_to_multiple_of: widths are multiples of it, for the student and for each teacher.

    Raises:
        ValueError: a prefix is empty or a tokenizer has no padding token; when called, a row lacks what another has, a
            teacher's mask has no ids beside it, or a column's values are of several lengths and no tokens.

    Example:
        >>> collator = DistillationCollator(student_tokenizer, {"teacher_": teacher_tokenizer})
        >>> trainer = DistillationTrainer(..., data_collator=collator)
    """

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizers: Mapping[str, PreTrainedTokenizerBase] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        self.teacher_tokenizers = dict(self.teacher_tokenizers)
        if "" in self.teacher_tokenizers:
            raise ValueError('the prefix "" is the student\'s; a teacher that reads its tokens needs no tokenizer here')
        for prefix, tokenizer in {"": self.tokenizer, **self.teacher_tokenizers}.items():
            if tokenizer.pad_token_id is None:
                reader = f"teacher {prefix!r}" if prefix else "student"
                raise ValueError(f"the tokenizer of the {reader} has no padding token; set its pad_token")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> BatchEncoding:
        """The batch of the rows.

        Raises:
            ValueError: see the class.
        """
        names = _common_names(features)
        groups: dict[str, dict[str, str]] = {"": {}}
        for name in names:
            prefix = self._prefix_of(name)
            groups.setdefault(prefix, {})[name] = name.removeprefix(prefix)
        self._refuse_ragged(features, groups[""])
        batch = self._pad(features, groups.pop(""), self.tokenizer)
        for prefix, group in groups.items():
            tokenizer = self.teacher_tokenizers[prefix]
            main = f"{prefix}{tokenizer.model_input_names[0]}"
            if main not in group:
                raise ValueError(f"the rows have {', '.join(group)}, and no {main} beside it; does a step drop it?")
            for name, values in self._pad(features, group, tokenizer).items():
                batch[f"{prefix}{name}"] = values
        return batch

    def _prefix_of(self, name: str) -> str:
        for prefix in sorted(self.teacher_tokenizers, key=len, reverse=True):
            inputs = PADDED_NAMES.union(self.teacher_tokenizers[prefix].model_input_names)
            if name.startswith(prefix) and name.removeprefix(prefix) in inputs:
                return prefix
        return ""

    def _refuse_ragged(self, features: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> None:
        padded = PADDED_NAMES.union(self.tokenizer.model_input_names)
        for name in [name for name in names if name not in padded]:
            lengths = {_length(row[name]) for row in features}
            if len(lengths) > 1:
                known = ", ".join(map(repr, self.teacher_tokenizers)) or "none"
                raise ValueError(
                    f"the column {name} has values of {min(lengths)} to {max(lengths)} entries, and can only be padded "
                    f"as tokens of a teacher; teacher_tokenizers has the prefixes: {known}"
                )

    def _pad(self, features: Sequence[Mapping[str, Any]], names: Mapping[str, str], tokenizer: Any) -> BatchEncoding:
        rows = [{short: row[name] for name, short in names.items()} for row in features]
        return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=self.pad_to_multiple_of)(rows)


def _common_names(features: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of the rows, all of which must have the same."""
    present = [[name for name, value in row.items() if value is not None] for row in features]
    everywhere = set().union(*present)
    for i, names in enumerate(present):
        if missing := sorted(everywhere - set(names)):
            raise ValueError(f"row {i} of the batch has no {', '.join(missing)}, which other rows have")
    return present[0]


def _length(value: Any) -> int:
    """Entries of a list or array, 0 for a number."""
    return len(value) if isinstance(value, list | tuple) else next(iter(getattr(value, "shape", ())), 0)
