"""The settings of a student: from a checkpoint, from a config, or from the teacher's own layers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from distill_nlp.config_checks import Section


class FromTeacher(Section):
    """A student made of the teacher's own layers."""

    layers: int = Field(ge=1, description="number of blocks")
    select: Literal["uniform", "first", "last"] | list[int] = Field(
        "uniform", description="which of the teacher's blocks; a list counts from 1"
    )
    architecture: Literal["distilbert", "same"] = Field("distilbert", description="distilbert (of a BERT) or same")
    weights: Literal["pretrained", "finetuned"] = Field(
        "pretrained", description="the first teacher's before its training, or after it, head included"
    )
    head: Literal["auto", "random"] = Field(
        "auto", description="auto: that of a finished or finetuned teacher; random: drawn"
    )
    width: int | None = Field(None, ge=1, description="of the hidden states, where not the teacher's")
    heads: int | None = Field(None, ge=1, description="attention heads; else as many as keep the size of a head")
    intermediate_size: int | None = Field(None, ge=1, description="feed-forward neurons; 4 x width where not given")

    @field_validator("select", mode="before")
    @classmethod
    def _choice_or_blocks(cls, value: Any) -> Any:
        # Of a union, pydantic would say what is wrong once for each member.
        blocks = isinstance(value, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
        if value in ("uniform", "first", "last") or blocks:
            return value
        raise ValueError(f"expected uniform, first, last, or a list of block numbers, got {value!r}")

    def chosen(self) -> dict[str, Any]:
        """All settings, the optional ones where they are not at their default."""
        first = {"layers", "select", "architecture"}
        return self.model_dump(include=first) | self.model_dump(exclude=first, exclude_defaults=True)


class StudentSection(Section):
    """The student: a checkpoint, a config for one from scratch, or layers of the teacher."""

    model: str | None = Field(None, min_length=1, description="Hub id or folder of a checkpoint")
    revision: str | None = Field(None, description="commit, tag or branch of the model on the Hub")
    config: dict[str, Any] | None = Field(None, description="{model_type: distilbert, dim: 64, ...}, from scratch")
    from_teacher: FromTeacher | None = Field(None, description="copies of the teacher's layers")
    overrides: dict[str, Any] = Field({}, description="settings of the student's config to change")
    attention_dropout: float | Literal["auto"] | None = Field(
        "auto",
        description="of its attention, under whatever name its config has for it; auto: 0, unless config or overrides "
        "have it; null: as the checkpoint has it",
    )

    @field_validator("attention_dropout", mode="before")
    @classmethod
    def _rate_or_auto(cls, value: Any) -> Any:
        # Of a union, pydantic would say what is wrong once for each member.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value in (None, "auto") or (number and 0 <= value < 1):
            return value
        raise ValueError(f"expected auto, null, or a rate from 0 to below 1, got {value!r}")

    @model_validator(mode="after")
    def _one_source(self) -> StudentSection:
        if sum(way is not None for way in (self.model, self.config, self.from_teacher)) != 1:
            raise ValueError("needs exactly one of model, config and from_teacher")
        return self
