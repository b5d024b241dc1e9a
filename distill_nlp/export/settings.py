"""What an export is asked for, and how far it may drift."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distill_nlp.errors import UsageError

FP32, FP16, INT8 = "fp32", "fp16", "int8"


@dataclass(frozen=True)
class Tolerances:
    """How far an export's answers may lie from the original's.

    Args:
        difference: of two logits, at most; None: any.
        flips: rows that get another label, as a share of all.
        score_loss: what accuracy may lose (macro-F1 of a model of several labels), 0.005 being half a point.
        row: whether a single row may always flip: it is more than the share where rows are few.
    """

    difference: float | None
    flips: float
    score_loss: float
    row: bool


# Another order of sums moves logits by about 1e-6. Fewer bits move them further, which counts where a label goes along.
TOLERANCES = {
    FP32: Tolerances(difference=1e-3, flips=0.0, score_loss=0.0, row=False),
    FP16: Tolerances(difference=None, flips=0.005, score_loss=0.002, row=True),
    INT8: Tolerances(difference=None, flips=0.02, score_loss=0.005, row=True),
}


@dataclass(frozen=True)
class ExportSettings:
    """One export.

    Args:
        model: folder or Hub id of a classifier.
        output: folder to write; where not given, the model's name with `-onnx` and the kind of numbers behind it.
        quantize: `int8`, or None.
        fp16: weights and sums in float16, for processors that calculate in it; on others it halves the file only.
        reduce_range: weights of 7 bits, which processors without VNNI do not overflow; None: what drifts less here.
        calibrate: data for fixed activation ranges; where not given, each batch finds its own.
        data: to compare on: a folder, file or Hub id, or `synthetic`; where not given, a few built-in texts.
        split: of `data`; where not given, `test`, or a file's only one.
        text_column, label_column: of `data` and `calibrate`; without a column of labels nothing is scored.
        text_pair_column: second text of a pair, of both; without `data` built-in pairs are compared on.
        max_rows: of `data`, drawn at random.
        teacher: also timed and scored, in PyTorch.
        speed: whether to measure it.
        max_difference, max_flips, max_score_loss: instead of `TOLERANCES`.

    Raises:
        UsageError: settings that exclude each other.
    """

    model: str
    output: str | None = None
    quantize: str | None = None
    fp16: bool = False
    reduce_range: bool | None = None
    calibrate: str | None = None
    data: str | None = None
    split: str | None = None
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    max_rows: int = 500
    teacher: str | None = None
    speed: bool = True
    max_difference: float | None = None
    max_flips: float | None = None
    max_score_loss: float | None = None

    def __post_init__(self) -> None:
        if self.quantize not in (None, INT8):
            raise UsageError(f"--quantize takes {INT8}, got {self.quantize!r}")
        if self.quantize and self.fp16:
            raise UsageError("--quantize int8 and --fp16 exclude each other: export twice, into two folders")
        if not self.quantize and (self.calibrate or self.reduce_range is not None):
            raise UsageError("--calibrate and --reduce-range are for --quantize int8")
        for name in ("max_difference", "max_flips", "max_score_loss"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UsageError(f"--{name} must be >= 0, got {value}")

    @property
    def numbers(self) -> str:
        """What the weights are: fp32, fp16 or int8."""
        return INT8 if self.quantize else FP16 if self.fp16 else FP32

    @property
    def folder(self) -> Path:
        """Where the export goes."""
        if self.output is not None:
            return Path(self.output).expanduser()
        suffix = "-onnx" if self.numbers == FP32 else f"-onnx-{self.numbers}"
        source = Path(self.model).expanduser()
        if not source.is_dir():
            return Path(source.name + suffix)
        # A folder may be given as a dot, which has no name.
        return source.resolve().with_name(source.resolve().name + suffix)

    @property
    def tolerances(self) -> Tolerances:
        """Those of the kind of numbers, with what was given in their place."""
        usual = TOLERANCES[self.numbers]
        given = (self.max_difference, self.max_flips, self.max_score_loss)
        usual_values = (usual.difference, usual.flips, usual.score_loss)
        difference, flips, loss = (u if g is None else g for g, u in zip(given, usual_values, strict=True))
        # Who names a share means it.
        named = self.max_flips is not None or self.max_score_loss is not None
        return Tolerances(difference, flips, loss, usual.row and not named)
