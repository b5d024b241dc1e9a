"""Whether one training step of the student fits into the device's memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill_nlp.doctor.findings import Finding

WARNING_SHARE, STOP_SHARE = 0.8, 1.2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training step.

    Args:
        weights: of student and projections.
        gradients: theirs; twice that where ranks exchange them.
        moments: AdamW's two per parameter, in float32.
        teacher_weights: 0 where it does not run.
        activations: kept for backward, of a full batch of the longest rows.
        teacher_peak: of the teacher's forward pass.
    """

    weights: int
    gradients: int
    moments: int
    teacher_weights: int
    activations: int
    teacher_peak: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_memory(
    model: nn.Module,
    activations: int,
    teacher_weights: int = 0,
    teacher_peak: int = 0,
    ranks: int = 1,
    sharded: bool = False,
) -> MemoryEstimate:
    """The estimate for one rank.

    Args:
        model: student and objective.
        activations: bytes, see `measure.activation_bytes`.
        teacher_weights, teacher_peak: bytes of a teacher that runs in each step.
        ranks: of the launch.
        sharded: whether FSDP or DeepSpeed deals weights, gradients and moments out to them.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    share = ranks if sharded else 1
    gradients = tensor_bytes(trained)
    # DDP keeps the buckets that it reduces, beside the gradients.
    buckets = gradients if ranks > 1 and not sharded else 0
    return MemoryEstimate(
        weights=tensor_bytes(model.parameters()) // share,
        gradients=gradients // share + buckets,
        moments=2 * gradients // share,
        teacher_weights=teacher_weights,
        activations=activations,
        teacher_peak=teacher_peak,
    )


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors of storages of their own."""
    return sum(x.numel() * x.element_size() for x in tensors)


def forward_peak(config: Any, rows: int, tokens: int, element_size: int = 4) -> int:
    """Bytes at once in one block's forward pass without gradient: its input, the sum, and the wide layer twice.

    Args:
        config: of the model; 0 for one without hidden_size.
        rows, tokens: of the batch.
        element_size: bytes of a number under autocast.
    """
    width = getattr(config, "hidden_size", None) or 0
    inner = getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None) or 4 * width
    return rows * tokens * (2 * width + 2 * inner) * element_size


def free_memory(device: torch.device, root: Path = Path("/")) -> tuple[int | None, str]:
    """Free bytes of a device and where the number comes from; None where nothing says it.

    On the CPU the smaller of what the system has available and what the control group leaves.

    Args:
        root: where /proc and /sys lie.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device), "GPU"
    if device.type != "cpu":
        return None, device.type
    found = {"system": _available(root), "container": _left_in_group(root)}
    known = {name: value for name, value in found.items() if value is not None}
    if not known:
        return None, "system"
    name = min(known, key=lambda name: known[name])
    return known[name], name


def _available(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _left_in_group(root: Path) -> int | None:
    """What a control group leaves; pages of files that it can drop count as free."""
    for folder, limit, usage in (
        (root / "sys/fs/cgroup", "memory.max", "memory.current"),
        (root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
        # "max", or a number near 2^63: no limit.
        if most.isdigit() and used.isdigit() and int(most) < 2**60:
            stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines() if line.count(" ") == 1)
            droppable = int(stat.get("inactive_file", 0))
            return max(int(most) - int(used) + droppable, 0)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def check_memory(
    estimate: MemoryEstimate,
    free: int | None,
    where: str,
    rows: int,
    tokens: int,
    accumulation: int = 1,
    checkpointing: bool = False,
    bf16: bool = False,
    copies: int = 1,
) -> Finding:
    """Compares an estimate with the free memory.

    Args:
        free: bytes, None where unknown.
        where: what has them.
        rows, tokens: of the batch that the activations are of.
        accumulation: gradient accumulation steps, for the fix.
        checkpointing, bf16: whether they are on already.
        copies: ranks that share the memory.

    Returns:
        A stop above 120% of the free memory, a warning above 80%, else ok.
    """
    total = estimate.total * copies
    parts = ", ".join(
        f"{field.name.replace('_', ' ')} {size_in_words(value)}"
        for field in fields(estimate)
        if (value := getattr(estimate, field.name))
    )
    each = f" for each of {copies} ranks" if copies > 1 else ""
    what = (
        f"one step of the student takes about {size_in_words(total)}: {parts}{each}; activations counted on a few of "
        f"the longest rows and scaled to {rows} of {tokens} tokens"
    )
    if free is None:
        return Finding("ok", "memory", f"{what}; the free memory is not known")
    share = total / max(free, 1)
    what += f"; {size_in_words(free)} free ({where})"
    if share <= WARNING_SHARE:
        return Finding("ok", "memory", what)
    half = max(rows // 2, 1)
    fixes = []
    if half < rows:
        fixes.append(
            f"--training.per_device_train_batch_size {half} --training.gradient_accumulation_steps {2 * accumulation}"
        )
    if not checkpointing:
        fixes.append("--training.gradient_checkpointing true")
    if not bf16:
        fixes.append("--training.precision bf16")
    return Finding(
        "stop" if share > STOP_SHARE else "warning",
        "memory",
        f"{what}: {share:.0%}",
        "the step runs out of memory" if share > STOP_SHARE else "little is left for evaluation and other programs",
        ", or ".join([*fixes, "a smaller --data.max_length"]),
    )


def size_in_words(count: float) -> str:
    """Bytes as people read them: `1.5 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
