"""Energy that a stage took, from the counters of processor and GPUs; nothing is guessed where there are none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

POWERCAP = Path("/sys/class/powercap")
# A RAPL counter wraps, at 200 W after some 20 minutes.
_SECONDS_BETWEEN = 30.0


@dataclass
class Counter:
    """One counter of energy.

    Args:
        name: of what it counts.
        read: joules so far.
        wraps_at: joules at which it begins at 0 again; None: never.
    """

    name: str
    read: Callable[[], float]
    wraps_at: float | None = None


class EnergyMeter:
    """Joules between entering and leaving, of all counters that can be read.

    They count what the whole machine takes on its processors and GPUs, other programs' work included, and not the rest
    of it (memory, disks, fans, losses of the power supply).

    Args:
        counters: by default those of this machine, see `counters`.

    Attributes:
        record: None before the end and where nothing can be read; else `joules` and `sources`, their names.

    Example:
        >>> with EnergyMeter() as meter:
        ...     trainer.train()
        >>> meter.record
        {'joules': 81234.5, 'sources': ['package-0', 'NVIDIA H100 80GB HBM3']}
    """

    def __init__(self, counters: list[Counter] | None = None) -> None:
        self.counters = machine_counters() if counters is None else counters
        self.record: dict[str, Any] | None = None
        self._end = threading.Event()
        self._joules = 0.0
        self._failed = False

    def __enter__(self) -> EnergyMeter:
        self._last = [counter.read() for counter in self.counters]
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        if self.counters:
            self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(_SECONDS_BETWEEN):
            self._add()

    def _add(self) -> None:
        try:
            now = [counter.read() for counter in self.counters]
        except (OSError, ValueError):
            # A sum with a hole in it would look like a saving.
            self._failed = True
            return
        for counter, before, after in zip(self.counters, self._last, now, strict=True):
            wrapped = counter.wraps_at if after < before and counter.wraps_at is not None else 0.0
            self._joules += after - before + wrapped
        self._last = now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        if not self.counters:
            return
        self._watcher.join()
        self._add()
        if not self._failed:
            sources = [counter.name for counter in self.counters]
            self.record = {"joules": round(self._joules, 1), "sources": sources}


def machine_counters(root: Path = POWERCAP, gpus: bool = True) -> list[Counter]:
    """The counters of this machine that can be read: RAPL's packages (often by root alone) and NVIDIA's GPUs.

    Args:
        root: of the packages' files.
        gpus: whether they are used; else what they take is not this program's.
    """
    return [*_rapl(root), *(_nvidia() if gpus else ())]


def _rapl(root: Path) -> list[Counter]:
    found = []
    # `intel-rapl:0` is a package, also of AMD's; `intel-rapl:0:0` a part of it, which would count twice.
    for zone in sorted(root.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:
            continue
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
            largest = int((zone / "max_energy_range_uj").read_text(encoding="ascii")) / 1e6
            counter = Counter(name, lambda zone=zone: _microjoules(zone), largest)
            counter.read()
        except (OSError, ValueError):
            continue
        # `psys` holds the packages again.
        if name.startswith("package"):
            found.append(counter)
    return found


def _microjoules(zone: Path) -> float:
    return int((zone / "energy_uj").read_text(encoding="ascii")) / 1e6


def _nvidia() -> list[Counter]:
    try:
        import pynvml
    except ImportError:
        return []
    found = []
    try:
        pynvml.nvmlInit()
        for i in _visible(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(i)
            name = pynvml.nvmlDeviceGetName(handle)
            counter = Counter(str(name), lambda handle=handle: _millijoules(pynvml, handle))
            counter.read()
            found.append(counter)
    except (pynvml.NVMLError, OSError):
        return []
    return found


def _millijoules(pynvml: Any, handle: Any) -> float:
    try:
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except pynvml.NVMLError as error:
        raise OSError(str(error)) from error


def _visible(count: int) -> list[int]:
    """The GPUs that this process may use, as NVML numbers them; all where they are named by UUID.

    "" and -1 are none, and what comes after a number that no GPU has is not read, as in CUDA.
    """
    import os

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None or named.strip().startswith(("GPU-", "MIG-")):
        return list(range(count))
    parts = (part.strip() for part in named.split(","))
    return [int(part) for part in takewhile(lambda part: part.isdigit() and int(part) < count, parts)]
