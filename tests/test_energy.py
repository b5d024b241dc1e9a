"""Energy from counters: sums, wraps, what cannot be read; never a guess."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from test_conveniences import make_job

from distill_nlp import energy
from distill_nlp.energy import Counter, EnergyMeter, machine_counters


def counter(values, **settings):
    steps = iter(values)
    return Counter(settings.pop("name", "package-0"), lambda: next(steps), **settings)


def test_joules_are_the_differences_of_all_counters():
    with EnergyMeter([counter([100.0, 130.0]), counter([5.0, 7.5], name="gpu")]) as meter:
        assert meter.record is None
    assert meter.record == {"joules": 32.5, "sources": ["package-0", "gpu"]}


def test_a_counter_that_wrapped_is_added_up():
    with EnergyMeter([counter([90.0, 10.0], wraps_at=100.0)]) as meter:
        pass
    assert meter.record["joules"] == 20.0


def test_a_long_stage_is_read_in_between(monkeypatch):
    monkeypatch.setattr(energy, "_SECONDS_BETWEEN", 0.01)
    readings = []

    def read():
        # Wraps twice between the start and the end.
        readings.append((len(readings) * 60.0) % 100.0)
        return readings[-1]

    with EnergyMeter([Counter("package-0", read, 100.0)]) as meter:
        while len(readings) < 6:
            pass
    assert meter.record["joules"] == pytest.approx((len(readings) - 1) * 60.0)


def test_nothing_is_said_where_nothing_can_be_read():
    with EnergyMeter([]) as meter:
        pass
    assert meter.record is None


def test_a_counter_that_fails_on_the_way_gives_no_figure():
    def read():
        if calls.append(1) or len(calls) > 1:
            raise OSError
        return 1.0

    calls = []
    with EnergyMeter([Counter("package-0", read)]) as meter:
        pass
    assert meter.record is None


def test_an_error_of_the_stage_goes_on():
    with pytest.raises(ZeroDivisionError), EnergyMeter([counter([1.0, 2.0])]):
        _ = 1 / 0


def zone(root, name, label, micro="5000000", largest="262143328850"):
    folder = root / name
    folder.mkdir()
    (folder / "name").write_text(label + "\n")
    (folder / "energy_uj").write_text(micro + "\n")
    (folder / "max_energy_range_uj").write_text(largest + "\n")


def test_packages_are_read_once_and_their_parts_not_again(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    zone(tmp_path, "intel-rapl:0", "package-0")
    zone(tmp_path, "intel-rapl:0:0", "core")
    zone(tmp_path, "intel-rapl:1", "package-1", micro="7500000")
    zone(tmp_path, "intel-rapl:2", "psys")
    zone(tmp_path, "intel-rapl:3", "package-3", micro="locked")
    found = machine_counters(tmp_path)
    assert [(c.name, c.read(), c.wraps_at) for c in found] == [
        ("package-0", 5.0, pytest.approx(262143.32885)),
        ("package-1", 7.5, pytest.approx(262143.32885)),
    ]
    assert machine_counters(tmp_path / "nothing") == []


def nvml(**changes):
    class NVMLError(Exception):
        pass

    return SimpleNamespace(
        **{
            "NVMLError": NVMLError,
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda i: i,
            "nvmlDeviceGetName": lambda i: f"GPU {i}",
            "nvmlDeviceGetTotalEnergyConsumption": lambda i: 1500 + i,
        }
        | changes
    )


def test_the_gpus_that_may_be_used_are_read_in_joules(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [(c.name, c.read()) for c in machine_counters(tmp_path)] == [("GPU 0", 1.5), ("GPU 1", 1.501)]
    assert machine_counters(tmp_path, gpus=False) == []


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("1", [1]), ("1, 0", [1, 0]), ("", []), ("-1", []), ("0,-1,1", [0]), ("0,7,1", [0]), ("GPU-7f", [0, 1])],
)
def test_what_cuda_may_not_use_is_not_counted(tmp_path, monkeypatch, visible, expected):
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [c.name for c in machine_counters(tmp_path)] == [f"GPU {i}" for i in expected]


def test_a_stage_on_the_cpu_counts_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    job = make_job(tmp_path, max_steps=1)
    job.run(lambda line: None)
    found = job.folder.record()["energy"] or {"sources": []}
    assert not {"GPU 0", "GPU 1"} & set(found["sources"])


def test_gpus_without_a_counter_are_left_out(tmp_path, monkeypatch):
    def refuse(handle):
        raise module.NVMLError("not supported")

    module = nvml(nvmlDeviceGetTotalEnergyConsumption=refuse)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert machine_counters(tmp_path) == []
