"""Random settings and random batches: a config, or one line; a batch, or what a naive reference says of it."""

from __future__ import annotations

import copy
import time

import pytest
import torch
import yaml
from helpers import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_nlp.collation import DistillationCollator
from distill_nlp.config import Experiment
from distill_nlp.config_file import leaves, load_experiment
from distill_nlp.errors import LONGEST_LINE, UsageError, one_line

# The same examples each time: a run of CI must not fail for what no change of it did.
FIXED = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
# Of processor time, which does not grow on a machine that does other things.
SECONDS = 2.0

REAL = {
    "output_dir": "run",
    "seeds": [0, 1],
    "data": {"dataset": "data", "max_length": 16, "label_names": ["bad", "good"]},
    "teacher": {"model": "teacher", "ensemble": [{"seed": 1}], "training": {"max_steps": 4}},
    "student": {"from_teacher": {"layers": 2}},
    "losses": {"ce": {"weight": 0.3}, "kl": {"weight": 0.7, "temperature": 2.0}, "hidden": {"layers": "uniform"}},
    "training": {"max_steps": 3, "learning_rate": 1e-4, "eval_strategy": "no"},
    "phases": [{"losses": {"kl": {}}, "training": {"num_train_epochs": 1}}],
}

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.dates()
    | st.binary(max_size=8)
    | st.sampled_from(["", "${HOME}", "\x00", "a\nb", "hf_" + "a" * 20, "https://a:b@c", "auto", "1e-4", "../x", "~a"])
)
NAMES = st.sampled_from(sorted({part for name, _ in leaves() for part in name.split(".")} | {"kl", "layers"}))
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def places(tree, path=()):
    """Every path into a tree."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def mutated(draw):
    """A config that is right but for one to three places: replaced, taken out, or beside something new."""
    tree = copy.deepcopy(REAL)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([path for path in places(tree) if path]))
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "remove", "add"]))
        if kind == "replace":
            parent[path[-1]] = draw(TREES)
        elif kind == "remove":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[draw(NAMES | st.text(max_size=8))] = draw(TREES)
    return tree


def config_or_lines(path):
    """A config, or the lines of an error as the terminal gets them; within bounded time."""
    started = time.process_time()
    try:
        return load_experiment(path)
    except UsageError as error:
        lines = [one_line(line) for line in error.lines]
        assert all(0 < len(line) <= LONGEST_LINE and line.isprintable() for line in lines)
        assert len(lines) == 1 or lines[0].endswith(f"{len(lines) - 1} settings are wrong")
        assert "hf_aaaa" not in "".join(lines)
        return lines
    finally:
        assert time.process_time() - started < SECONDS


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "config.yaml"


def test_the_config_that_is_mutated_is_right(path):
    path.write_text(yaml.safe_dump(REAL), encoding="utf-8")
    assert isinstance(load_experiment(path), Experiment)


@FIXED
@given(tree=mutated())
def test_a_mutated_config_is_a_config_or_one_line(path, tree):
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    assert config_or_lines(path)


@FIXED
@given(tree=TREES)
def test_any_tree_is_a_config_or_one_line(path, tree):
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    assert isinstance(config_or_lines(path), list)


@FIXED
@given(content=st.binary(max_size=200) | st.text(alphabet="&*[]{}:,-?!|>'\"#%@ \n\ta1~<", max_size=120).map(str.encode))
def test_any_bytes_are_a_config_or_one_line(path, content):
    path.write_bytes(content)
    assert isinstance(config_or_lines(path), list)


# ---- the collator ----

TOKENS = st.lists(st.integers(4, 99), min_size=1, max_size=9)
KINDS = st.sampled_from(["one label", "several labels", "no label"])


@st.composite
def batches(draw):
    """Ragged rows, with a label, with several, or without; as pairs; with a teacher's own tokens; to a multiple."""
    kind, pairs, teacher = draw(KINDS), draw(st.booleans()), draw(st.booleans())
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        row = {}
        for prefix in ("", "teacher_") if teacher else ("",):
            tokens = draw(TOKENS)
            row[f"{prefix}input_ids"] = tokens
            row[f"{prefix}attention_mask"] = [1] * len(tokens)
            if pairs:
                cut = draw(st.integers(0, len(tokens)))
                row[f"{prefix}token_type_ids"] = [0] * cut + [1] * (len(tokens) - cut)
        if kind == "one label":
            row["labels"] = draw(st.sampled_from([0, 1, 2, -100]))
        elif kind == "several labels":
            row["labels"] = draw(st.just([-100.0] * 3) | st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3))
        rows.append(row)
    return rows, draw(st.sampled_from([None, 4, 8])), draw(st.sampled_from(["right", "left"]))


def padded(rows, name, fill, side, multiple):
    """A column as loops make it."""
    width = max(len(row[name]) for row in rows)
    while multiple and width % multiple:
        width += 1
    table = []
    for row in rows:
        more = [fill] * (width - len(row[name]))
        table.append(row[name] + more if side == "right" else more + row[name])
    return torch.tensor(table)


@FIXED
@given(batch=batches())
def test_a_batch_is_what_loops_make_of_its_rows(batch):
    rows, multiple, side = batch
    # Another padding id and side than the student's, as another model's tokenizer has.
    student, teacher = make_tokenizer(), make_tokenizer()
    student.padding_side, teacher.padding_side, teacher.pad_token = side, "left", "[UNK]"
    kept = copy.deepcopy(rows)
    found = DistillationCollator(student, {"teacher_": teacher}, pad_to_multiple_of=multiple)(rows)
    assert rows == kept
    assert set(found) == set(rows[0])
    for name in rows[0]:
        if name == "labels":
            expected = torch.tensor([row["labels"] for row in rows])
        elif name.startswith("teacher_"):
            expected = padded(rows, name, 1 if name.endswith("input_ids") else 0, "left", multiple)
        else:
            expected = padded(rows, name, 0, side, multiple)
        assert found[name].shape == expected.shape, name
        assert found[name].dtype == expected.dtype, name
        assert torch.equal(found[name], expected), name


@FIXED
@given(batch=batches(), data=st.data())
def test_a_batch_of_rows_that_lack_a_column_is_refused_by_name(batch, data):
    rows, multiple, _ = batch
    # Twice, as one row alone lacks nothing that another has.
    rows = [copy.deepcopy(row) for row in rows + rows]
    name = data.draw(st.sampled_from(sorted(rows[0])))
    row = data.draw(st.integers(0, len(rows) - 1))
    rows[row][name] = None
    collator = DistillationCollator(make_tokenizer(), {"teacher_": make_tokenizer()}, pad_to_multiple_of=multiple)
    with pytest.raises(ValueError, match=rf"row {row} of the batch has no {name}, which other rows have"):
        collator(rows)
