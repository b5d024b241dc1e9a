"""Half precision in the cache: the stated bounds, measured; what is said of the rounding; what is refused."""

import ast
import inspect
import json
import re

import numpy as np
import pytest
import torch
from cache_run import cached, counted
from helpers import make_dataset, make_teacher

from distill_nlp import teacher_cache
from distill_nlp.errors import DistillError
from distill_nlp.teacher_cache import STORAGES, AnswerCache, not_to_be_kept, output_identity
from distill_nlp.teacher_source import TeacherSource

# Largest relative error, smallest normal number, largest absolute error below it: as `STORAGES` states them.
BOUNDS = {"float16": (2.0**-11, 2.0**-14, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-126, 2.0**-134)}
HALVES = pytest.mark.parametrize("storage", BOUNDS)
STATES = [(4, "first"), (2, "mean")]


def identity(storage):
    return output_identity(TeacherSource(make_teacher()).identity("no"), storage=storage)


def kept(folder, values, storage):
    """The numbers as the cache gives them back, and the cache."""
    writer, reader = AnswerCache(folder, identity(storage)), AnswerCache(folder, identity(storage))
    keys = [i.to_bytes(16, "little") for i in range(len(values))]
    writer.add(keys, values)
    reader.read()
    return reader.values_of(keys), reader


def all_numbers(storage):
    """Every finite number of the storage, ascending, as float64."""
    bits = np.arange(2**16, dtype=np.uint16)
    numbers = torch.from_numpy(bits.view(np.int16)).view(STORAGES[storage]).double().numpy()
    return np.unique(numbers[np.isfinite(numbers)])


@HALVES
def test_numbers_of_the_storage_come_back_as_they_were(tmp_path, storage):
    numbers = all_numbers(storage).astype(np.float32).reshape(-1, 1)
    found, cache = kept(tmp_path, numbers, storage)
    assert len(numbers) > 60_000
    assert np.array_equal(found, numbers)
    assert cache.largest_error == 0


@HALVES
def test_halfway_between_two_numbers_of_the_storage_goes_to_the_even_one(tmp_path, storage):
    """All of them, and the float32 next to each on either side, which go to the nearest."""
    numbers = all_numbers(storage)
    low, high = numbers[:-1], numbers[1:]
    halves = (low + high) / 2
    middle = halves.astype(np.float32)
    exact = middle.astype(np.float64) == halves
    assert exact.mean() > 0.99
    low, high, middle = low[exact], high[exact], middle[exact]
    found, _ = kept(tmp_path, middle.reshape(-1, 1), storage)
    found = found[:, 0].astype(np.float64)
    patterns = torch.from_numpy(found).to(STORAGES[storage]).view(torch.int16)
    assert np.all((found == low) | (found == high))
    assert torch.all(patterns % 2 == 0)
    above, _ = kept(tmp_path / "above", np.nextafter(middle, np.float32(np.inf)).reshape(-1, 1), storage)
    below, _ = kept(tmp_path / "below", np.nextafter(middle, np.float32(-np.inf)).reshape(-1, 1), storage)
    assert np.array_equal(above[:, 0], high.astype(np.float32))
    assert np.array_equal(below[:, 0], low.astype(np.float32))


@HALVES
def test_the_bound_holds_for_many_numbers_and_is_no_larger_than_it_has_to_be(tmp_path, storage):
    relative, smallest, absolute = BOUNDS[storage]
    rng = np.random.default_rng(3)
    top = np.log2(float(torch.finfo(STORAGES[storage]).max))
    exponents = rng.uniform(np.log2(smallest) - 8, top, 400_000)
    numbers = (rng.choice([-1, 1], exponents.shape) * 2.0**exponents).astype(np.float32)
    # The worst of all: halfway above a power of two.
    worst = np.float32(2.0 ** np.arange(-10, 10) * (1 + relative))
    numbers = np.concatenate([numbers, worst])
    found, cache = kept(tmp_path, numbers.reshape(-1, 1), storage)
    exact = numbers.astype(np.float64)
    errors = np.abs(found[:, 0].astype(np.float64) - exact)
    normal = np.abs(exact) >= smallest
    assert 0 < (~normal).mean() < 0.5
    assert np.all(errors[normal] <= relative * np.abs(exact[normal]))
    assert np.all(errors[~normal] <= absolute)
    assert (errors[normal] / np.abs(exact[normal])).max() > 0.99 * relative
    assert errors[~normal].max() > 0.99 * absolute
    assert cache.largest_error == errors.max()


def test_the_doc_of_the_storages_states_these_bounds():
    nodes = ast.parse(inspect.getsource(teacher_cache)).body
    place = next(i for i, node in enumerate(nodes) if "STORAGES" in ast.unparse(node)[:9])
    doc = nodes[place + 1].value.value
    for name, (relative, smallest, absolute) in BOUNDS.items():
        (line,) = [line for line in doc.splitlines() if line.startswith(f"- {name} ")]
        for number in (relative, smallest, absolute):
            assert f"2^{int(np.log2(number))} " in line
        stated = float(re.search(r"up to (\d[\d.e]*\d)", line).group(1))
        assert stated == pytest.approx(torch.finfo(STORAGES[name]).max, rel=2e-4)


def test_float32_comes_back_as_it_was_and_has_no_rounding(tmp_path):
    numbers = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    found, cache = kept(tmp_path, numbers, "float32")
    assert np.array_equal(found, numbers)
    assert cache.largest_error == 0
    assert found.dtype == np.float32


@HALVES
def test_the_column_is_float32_and_half_as_large_on_disk(tmp_path, storage):
    rows, (line,) = cached(tmp_path, storage=storage, states=STATES)
    plain, _ = cached(tmp_path, states=STATES)
    assert "0.0% there" in line
    sizes = {}
    for path in tmp_path.glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        sizes[manifest.get("output", "logits"), manifest.get("storage", "float32")] = manifest["bytes"]
    assert len(sizes) == 6
    for name in ("teacher_logits", "teacher_first_4", "teacher_mean_2"):
        assert rows.features[name].feature.dtype == "float32"
        found, exact = np.array(rows[name][:]), np.array(plain[name][:])
        relative = BOUNDS[storage][0]
        # The two were computed apart, which float32 does not notice beyond 1e-6.
        assert np.all(np.abs(found - exact) <= relative * np.abs(exact) + 1e-5)
        assert np.array_equal(torch.tensor(found).to(STORAGES[storage]).double().numpy(), found)
        assert not np.array_equal(found, exact)
        output = name.removeprefix("teacher_")
        width = found.shape[1]
        assert sizes[output, "float32"] - sizes[output, storage] == pytest.approx(16 * width * 2, abs=100)


@HALVES
def test_the_largest_rounding_is_said_and_in_the_manifest(tmp_path, storage):
    rows, (line,) = cached(tmp_path, storage=storage, states=STATES)
    plain, _ = cached(tmp_path / "plain", states=STATES)
    manifests = {}
    for path in tmp_path.glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifests[manifest.get("output", "logits")] = manifest
    for output, manifest in manifests.items():
        name = f"teacher_{output}"
        errors = np.abs(np.array(rows[name][:]) - np.array(plain[name][:]))
        assert manifest["storage"] == storage
        assert manifest["largest_error"] == pytest.approx(errors.max(), rel=1e-3, abs=1e-6)
        assert manifest["largest_error"] > 0
        assert f" as {storage}, off by at most {manifest['largest_error']:.1e}, in " in line
    assert line.count("off by at most") == 3
    # It is of all that is kept, whoever computed it.
    _, (again,) = cached(tmp_path, data=make_dataset(2), storage=storage, states=STATES)
    assert "100.0% there" in again
    for manifest in manifests.values():
        assert f"off by at most {manifest['largest_error']:.1e}," in again


def test_the_largest_rounding_is_that_of_all_shards(tmp_path):
    cache = AnswerCache(tmp_path, identity("float16"))
    for i, value in enumerate((0.1, 1000.1, 0.3)):
        cache.add([bytes([i] * 16)], np.full((1, 3), value, dtype=np.float32))
    cache.read()
    assert cache.largest_error == abs(float(np.float16(1000.1)) - float(np.float32(1000.1)))


def test_float32_says_nothing_of_rounding_and_is_the_teachers_own_folder(tmp_path):
    _, (line,) = cached(tmp_path)
    assert " as " not in line
    assert "off by" not in line
    (path,) = tmp_path.glob("*/manifest.json")
    assert json.loads(path.read_text()).keys().isdisjoint({"storage", "largest_error", "output"})
    teacher = TeacherSource(make_teacher()).identity("no")
    assert output_identity(teacher) == teacher
    assert len({json.dumps(output_identity(teacher, o, s)) for o in ("logits", "first_4") for s in STORAGES}) == 6


def test_another_storage_is_another_folder_and_is_found_again(tmp_path):
    for storage in STORAGES:
        teacher, seen = counted(make_teacher())
        cached(tmp_path, teacher, storage=storage)
        assert len(seen) == 16
    assert len(list(tmp_path.iterdir())) == 3
    for storage in STORAGES:
        teacher, seen = counted(make_teacher())
        cached(tmp_path, teacher, storage=storage)
        assert seen == []
    with pytest.raises(ValueError, match="storage must be one of float32, float16, bfloat16, got 'int8'"):
        cached(tmp_path, storage="int8")


def large_teacher(size, row):
    """Answers one row with a number of this size."""
    teacher = make_teacher()
    ids = make_dataset()["input_ids"][row]

    def enlarge(_, args, kwargs, outputs):
        for i, found in enumerate(kwargs["input_ids"].tolist()):
            if found[: len(ids)] == ids:
                outputs.logits[i, 2] = size
        return outputs

    teacher.register_forward_hook(enlarge, with_kwargs=True)
    return teacher


@pytest.mark.parametrize(("size", "printed"), [(65520.0, "65520"), (-1e6, "1e\\+06")])
def test_what_is_too_large_for_float16_is_refused_and_nothing_is_lost(tmp_path, size, printed):
    data = make_dataset()
    order = sorted(range(16), key=lambda i: -len(data[i]["input_ids"]))
    match = (
        rf"the teacher's logits of row {order[9]} are too large for float16 \(at most 65504, got {printed}\), as for 1 "
        "of the 4 rows computed together; store them in bfloat16 or float32. What was computed before is kept"
    )
    with pytest.raises(DistillError, match=match):
        cached(tmp_path, large_teacher(size, order[9]), batch_size=4, storage="float16")
    teacher, seen = counted(make_teacher())
    cached(tmp_path, teacher, batch_size=4, storage="float16")
    assert len(seen) == 16 - 8
    for storage in ("bfloat16", "float32"):
        rows, _ = cached(tmp_path / storage, large_teacher(size, order[9]), storage=storage)
        assert rows["teacher_logits"][order[9]][2] == pytest.approx(size, rel=2**-8)


def test_what_is_too_large_for_bfloat16_is_refused(tmp_path):
    with pytest.raises(DistillError, match=r"row 3 are too large for bfloat16 .* together; store them in float32\. "):
        cached(tmp_path, large_teacher(3.4e38, 3), storage="bfloat16")


@pytest.mark.parametrize(
    ("storage", "largest", "next_one"),
    [("float16", 65519.99, 65520.0), ("bfloat16", 3.3961e38, 3.3962e38), ("float32", 3.4028e38, np.inf)],
)
def test_a_row_can_be_kept_where_all_its_numbers_stay_finite(storage, largest, next_one):
    values = np.array([[1, largest], [next_one, 0], [-largest, 0], [0, -next_one], [np.nan, 0]], dtype=np.float32)
    assert not_to_be_kept(values, storage).tolist() == [False, True, False, True, True]
