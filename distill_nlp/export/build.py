"""An export from end to end: graph, numbers, comparison, speed, and the folder in one rename."""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from distill_nlp.config import CONFIG_FILE, ReportSection
from distill_nlp.durable_files import read_json, remove_leftovers, sync_tree, write_json
from distill_nlp.errors import DistillError, UsageError
from distill_nlp.export.graph import write_graph
from distill_nlp.export.parity import compare, problems, score
from distill_nlp.export.quantize import calibration_batches, quantize
from distill_nlp.export.settings import FP16, INT8, ExportSettings
from distill_nlp.export.texts import Texts, built_in_texts, load_texts
from distill_nlp.inference import encoded_rows, predict_logits
from distill_nlp.labels import label_order
from distill_nlp.lengths import longest_input
from distill_nlp.loading import check_classifier, checkpoint_print, load_classifier, load_config, load_tokenizer
from distill_nlp.losses.base import MULTI_LABEL, ModelShape
from distill_nlp.onnx_model import EXPORT_FILE, MODEL_FILE, OnnxClassifier, is_exported
from distill_nlp.output_folder import check_can_be_made
from distill_nlp.report.build import machine
from distill_nlp.report.speed import Run, measure_speed
from distill_nlp.stages import STAGE_FILE
from distill_nlp.tokenization import with_segments

Say = Callable[[str], None]
# Small, so that a comparison of few rows has batches of several sizes and lengths too.
_BATCH = 16
_CALIBRATION_ROWS = 128
_SPEED = ReportSection(latency_samples=20, throughput_batch_size=16, throughput_batches=9)


@dataclass
class _Original:
    """What is exported, with its answers."""

    model: nn.Module
    tokenizer: Any
    max_length: int | None
    texts: Texts
    rows: list[dict[str, Any]]
    logits: np.ndarray

    @property
    def several(self) -> bool:
        return ModelShape.from_config(self.model.config).problem_type == MULTI_LABEL


def export_model(settings: ExportSettings, say: Say = lambda line: None) -> dict[str, Any]:
    """Writes a classifier as an ONNX folder with tokenizer and config, unless its answers drift.

    The folder is written under a temporary name; it takes its own, and the place of an earlier export, when all of it
    is there and the comparison has passed.

    Args:
        settings: what and how.
        say: gets a line for each step that takes a while.

    Returns:
        What `export.json` says: `parity`, `size_mb`, `speed`, `quantization`, `settings`, `versions`, ...

    Raises:
        UsageError: the model is no classifier, data are wrong, or the folder is taken.
        DistillError: the model cannot be exported, the disk is full, or the export's answers lie beyond the tolerances.

    Example:
        >>> record = export_model(ExportSettings("runs/imdb/student/seed-42", quantize="int8", data="data/imdb"))
        >>> record["parity"]["flips"]
    """
    folder = settings.folder
    _bring_back(folder)
    _check_free(folder)
    original = _load(settings, say)
    work = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        work.mkdir(parents=True)
        record = _write(work, original, settings, say)
        _put_in_place(work, folder)
    except OSError as error:
        raise DistillError(f"cannot write {folder}: {error.strerror or error}; nothing was written") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return record


def _bring_back(folder: Path) -> None:
    """What a killed export had put aside is there again, and what it had begun is gone."""
    with suppress(OSError):
        # Another export may be at it. What was being removed when its process was killed is no export any more.
        whole = [path for path in _beside(folder, "old") if is_exported(str(path))]
        if whole and not folder.exists():
            max(whole, key=lambda path: path.stat().st_mtime).rename(folder)
        for path in _beside(folder, "tmp"):
            remove_leftovers(folder.parent, path.name.removeprefix(".").removesuffix(".tmp"))


def _beside(folder: Path, ending: str) -> list[Path]:
    """What processes left for this folder, and for no other whose name begins with its."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.\d+\.{ending}")
    return [path for path in folder.parent.iterdir() if name.fullmatch(path.name)]


def _check_free(folder: Path) -> None:
    if folder.exists() and not is_exported(str(folder)):
        raise UsageError(f"{folder} exists and is no earlier export; give another --output")
    check_can_be_made(folder.parent, "--output")


def _put_in_place(work: Path, folder: Path) -> None:
    sync_tree(work)
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    try:
        work.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _load(settings: ExportSettings, say: Say) -> _Original:
    name = settings.model
    if is_exported(name):
        raise UsageError(f"{name} is an export already; give the checkpoint that it was made from")
    config = load_config(name)
    check_classifier(name, config)
    tokenizer, model = load_tokenizer(name, config=config), load_classifier(name)
    of_run = _pair_column_of_run(name)
    pairs = settings.text_pair_column is not None or of_run is not None
    if settings.data is None:
        texts = built_in_texts(pairs)
        say(f"no --data: compared on {len(texts.texts)} {texts.source}, which have no labels")
    else:
        if settings.text_pair_column is None and of_run is not None:
            say(
                f"the model was trained on pairs, and is compared on single texts; give --text_pair_column (in its run "
                f"{of_run!r})"
            )
        texts = _texts(settings.data, settings.split, settings, settings.max_rows, config)
    length = longest_input(config, tokenizer)
    if pairs:
        tokenizer = with_segments(tokenizer, model)
    rows = encoded_rows(tokenizer, texts.texts, texts.pairs, length)
    logits = predict_logits(model, tokenizer, rows, _BATCH, "Answers of the original")
    return _Original(model, tokenizer, length, texts, rows, logits)


def _texts(
    data: str, split: str | None, settings: ExportSettings, rows: int, config: Any, labeled: bool = True
) -> Texts:
    columns = (settings.text_column, settings.label_column)
    return load_texts(data, split, *columns, rows, config, labeled, settings.text_pair_column)


def _pair_column_of_run(model: str) -> str | None:
    """The column of second texts in the run that a model lies in; None where it has none, or there is no run."""
    folder = Path(model).expanduser().absolute()
    # A student keeps the settings of its run; those in the run's own folder are of the last one begun there.
    if own := (read_json(folder / STAGE_FILE) or {}).get("run_settings"):
        return (own.get("data") or {}).get("text_pair_column")
    # A teacher lies in the run itself, students one level further down.
    for run in folder.parents[:2]:
        data = (read_json(run / CONFIG_FILE) or {}).get("data")
        if isinstance(data, dict) and (run / folder.relative_to(run) / STAGE_FILE).is_file():
            return data.get("text_pair_column")
    return None


def _write(work: Path, original: _Original, settings: ExportSettings, say: Say) -> dict[str, Any]:
    say(f"tracing {type(original.model).__name__}")
    # Tracing changes the attention; the original is timed as it is used.
    traced = copy.deepcopy(original.model)
    inputs = write_graph(traced.half() if settings.numbers == FP16 else traced, original.tokenizer, work / MODEL_FILE)
    quantization = _quantize(work, original, inputs, settings, say) if settings.numbers == INT8 else None
    exported = OnnxClassifier(work / MODEL_FILE, original.model.config)
    logits = predict_logits(exported, original.tokenizer, original.rows, _BATCH, "Answers of the export")
    parity = compare(original.logits, logits, original.texts.labels, original.several)
    if wrong := problems(parity, settings.tolerances):
        raise DistillError(
            f"the {settings.numbers} export of {settings.model} drifts on {original.texts.source}: {'; '.join(wrong)}; "
            "nothing was written"
        )
    original.model.config.save_pretrained(work)
    original.tokenizer.save_pretrained(work)
    teacher = None if settings.teacher is None else _teacher(settings.teacher, original)
    speed = _speed(original, exported, teacher, say) if settings.speed else None
    record = {
        "model": {"architecture": type(original.model).__name__, **_name_or_content(settings.model)},
        "parameters": sum(p.numel() for p in original.model.parameters()),
        "numbers": settings.numbers,
        "inputs": inputs,
        "max_length": original.max_length,
        "quantization": quantization,
        "parity": {
            "source": original.texts.source,
            **parity,
            "tolerances": asdict(settings.tolerances),
            **({} if teacher is None or "metric" not in parity else {"teacher": teacher[1]}),
        },
        "size_mb": {
            "original": _megabytes(original.model),
            **({} if teacher is None else {"teacher": _megabytes(teacher[0].model)}),
            "exported": round((work / MODEL_FILE).stat().st_size / 1e6, 2),
        },
        "speed": speed,
        "versions": _versions(),
    }
    write_json(work / EXPORT_FILE, record)
    return record


def _quantize(work: Path, original: _Original, inputs: list[str], settings: ExportSettings, say: Say) -> dict[str, Any]:
    """Puts int8 weights in the place of the float ones: of 8 bits or 7, whichever drifts less on this processor."""
    file, config = work / MODEL_FILE, original.model.config
    calibration = None
    if settings.calibrate is not None:
        found = _texts(settings.calibrate, "train", settings, _CALIBRATION_ROWS, config, labeled=False)
        rows = encoded_rows(original.tokenizer, found.texts, found.pairs, original.max_length)
        calibration = calibration_batches(original.tokenizer, rows, inputs)
    say("quantizing" if calibration is None else f"quantizing, calibrated on {len(rows)} rows of {found.source}")
    # Without VNNI, sums of 8-bit products overflow 16 bits, and 7 bits are nearer the truth.
    ranges = (False, True) if settings.reduce_range is None else (settings.reduce_range,)
    tried = []
    for reduce_range in ranges:
        candidate = work / f"reduced-{reduce_range}.onnx"
        quantize(file, candidate, reduce_range, calibration)
        logits = predict_logits(OnnxClassifier(candidate, config), original.tokenizer, original.rows, _BATCH)
        found_here = compare(original.logits, logits, None, original.several)
        tried.append({"reduce_range": reduce_range, "mean_difference": found_here["mean_difference"]})
    best = min(tried, key=lambda one: one["mean_difference"])["reduce_range"]
    os.replace(work / f"reduced-{best}.onnx", file)
    for reduce_range in ranges:
        (work / f"reduced-{reduce_range}.onnx").unlink(missing_ok=True)
    return {
        "activations": "dynamic" if calibration is None else "calibrated",
        "calibration_rows": None if calibration is None else len(rows),
        "per_channel": True,
        "reduce_range": best,
        "tried": tried,
    }


def _teacher(name: str, original: _Original) -> tuple[Run, float | None]:
    """The teacher with the rows as it reads them, and its score where there are labels."""
    tokenizer = load_tokenizer(name)
    model = load_classifier(name)
    texts = original.texts
    rows = encoded_rows(tokenizer, texts.texts, texts.pairs, longest_input(model.config, tokenizer))
    run = Run(model, tokenizer, rows)
    if original.texts.labels is None:
        return run, None
    try:
        order = label_order(model.config, original.model.config, restrict=True)
    except ValueError as error:
        raise UsageError(f"--teacher {name}: {error}") from None
    logits = predict_logits(model, tokenizer, rows, _BATCH, "Answers of the teacher")
    logits = logits if order is None else logits[:, order]
    return run, score(logits, original.texts.labels, original.several)


def _speed(
    original: _Original, exported: OnnxClassifier, teacher: tuple[Run, float | None] | None, say: Say
) -> dict[str, Any]:
    """Latency and throughput on the CPU, in turns, and the throughput relative to the first in the list."""
    say("timing")
    timed = {} if teacher is None else {"teacher": [teacher[0]]}
    timed["original"] = [Run(original.model, original.tokenizer, original.rows)]
    timed["exported"] = [Run(exported, original.tokenizer, original.rows)]
    found = measure_speed(timed, _SPEED, "cpu")
    first = next(iter(found.values()))["throughput"]
    for figures in found.values():
        figures["speed_up"] = round(figures["throughput"] / first, 2)
    return {"batch_size": _SPEED.throughput_batch_size, "machine": machine("cpu"), **found}


def _megabytes(model: nn.Module) -> float:
    return round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6, 2)


def _name_or_content(name: str) -> dict[str, Any]:
    """Without the path, which is nobody's business where the folder goes."""
    return checkpoint_print(name) or {}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import distill_nlp

    names = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript")
    return {"distill_nlp": distill_nlp.__version__, **{name: version(name) for name in names}}
