"""Settings and places that fail late, or in silence."""

from __future__ import annotations

import os
from pathlib import Path

from distill_nlp.doctor.findings import Finding

LOWEST_RATE, HIGHEST_RATE = 1e-6, 1e-2


def check_learning_rate(rate: float, setting: str = "training.learning_rate") -> Finding:
    """Whether a peak learning rate lies where transformers learn: from 1e-6 to 1e-2."""
    if LOWEST_RATE <= rate <= HIGHEST_RATE:
        return Finding("ok", "learning rate", f"{setting} {rate:g}")
    return Finding(
        "warning",
        "learning rate",
        f"{setting} is {rate:g}, outside {LOWEST_RATE:g} to {HIGHEST_RATE:g}",
        "the model diverges" if rate > HIGHEST_RATE else "the model hardly moves from where it starts",
        f"--{setting} 5e-5 for a checkpoint, 1e-3 for a small model from scratch",
    )


def check_precision(mixed_precision: str, device: str, bf16_supported: bool) -> Finding:
    """Whether the device computes in the precision that is asked for.

    Args:
        mixed_precision: "no", "bf16" or "fp16".
        device: type of the device.
        bf16_supported: whether it computes in bfloat16 by itself.
    """
    if mixed_precision == "bf16" and not bf16_supported:
        return Finding(
            "warning",
            "precision",
            f"bf16 on {device}, which does not compute in it",
            "it is emulated: several times slower than float32",
            "--training.precision fp32" + (", or --training.precision fp16" if device == "cuda" else ""),
        )
    if mixed_precision == "fp16" and device == "cpu":
        return Finding(
            "warning",
            "precision",
            "fp16 on the CPU",
            "loss scaling is for GPUs; most processors compute float16 slowly",
            "--training.precision fp32, or --training.precision bf16",
        )
    return Finding("ok", "precision", f"{'float32' if mixed_precision == 'no' else mixed_precision} on {device}")


def check_output_folder(folder: Path) -> Finding:
    """Whether the run's folder can be written, and how much room there is. Nothing is written to find out."""
    from shutil import disk_usage

    existing = folder.expanduser().absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        problem = "cannot be written" if existing.is_dir() else "is a file"
        return Finding(
            "stop",
            "output folder",
            f"{folder}: {existing} {problem}",
            "the first stage would be lost when it is saved",
            "--output_dir FOLDER that can be written",
        )
    return Finding("ok", "output folder", f"{folder}: {disk_usage(existing).free / 1e9:,.0f} GB free")
