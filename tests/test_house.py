"""The rules of the house that a reader relies on: which way imports run, and what no module does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "distill_nlp"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
EACH = pytest.mark.parametrize("name", MODULES)
MAX_LINES = 320

# Each imports only from its own floor or below. What is not named here stands between the trainer and the pipeline,
# or beside them, and no floor below may import it.
FLOORS = {
    "outputs": 0,
    "durable_files": 0,
    "interruption": 0,
    "manifests": 1,
    "layer_mapping": 0,
    "schedules": 0,
    "losses": 1,
    "balancing": 1,
    "terms": 1,
    "objective": 2,
    "cpu_attention": 0,
    "capture": 3,
    "modeling": 3,
    "collation": 3,
    "ensemble": 3,
    "labels": 3,
    "teacher": 3,
    "teacher_cache": 3,
    "checkpoints": 3,
    "projections": 3,
    "gradient_meter": 3,
    "nonfinite": 3,
    "resume_state": 3,
    "hub": 3,
    "arguments": 4,
    "arrow_columns": 4,
    "combinations": 4,
    "resumable": 4,
    "parameter_groups": 4,
    "sample_batches": 4,
    "row_numbers": 4,
    "row_order": 4,
    "sampling": 4,
    "trainer": 4,
    "pipeline": 6,
    "sweep": 7,
    "cli": 7,
    "cli_output": 7,
    "cli_results": 7,
    "cli_export": 7,
    "cli_push": 5,
    "cli_settings": 5,
    "__main__": 7,
}
BESIDE = 5


def floor(name: str) -> int:
    parts = name.split(".")
    return FLOORS.get(parts[1], BESIDE) if len(parts) > 1 else BESIDE


def imports_of(name: str, everywhere: bool = True) -> set[str]:
    """Modules that this one imports; without `everywhere`, only those that importing it imports too."""
    tree, found = TREES[name], set()
    skipped = set()
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if (lazy and not everywhere) or typing_only:
            skipped.update(map(id, ast.walk(node)))
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                base = f"{package}.{base}" if base else package
            # `from distill_nlp import trainer` imports a module too.
            submodules = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
            found.update(submodules or {base})
    return found


def test_the_package_was_found():
    assert {"distill_nlp", "distill_nlp.losses.logits", "distill_nlp.trainer"} <= MODULES.keys()
    assert "distill_nlp.losses.base" in imports_of("distill_nlp.losses.logits")


@EACH
def test_imports_run_one_way(name):
    wrong = {other for other in imports_of(name) & MODULES.keys() if floor(other) > floor(name)}
    # The package's own front door imports nothing until it is asked.
    assert name == "distill_nlp" or not wrong, f"{name} imports {sorted(wrong)}"


def test_there_is_no_circle():
    graph = {name: imports_of(name, everywhere=False) & MODULES.keys() for name in MODULES}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name] - {name}):
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize("name", [name for name in MODULES if floor(name) <= FLOORS["trainer"]])
def test_the_core_knows_no_configuration_file_and_no_command_line(name):
    foreign = {"yaml", "argparse", "pydantic", "rich", "datasets", "evaluate"}
    assert not {other.partition(".")[0] for other in imports_of(name)} & foreign


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("distill_nlp.losses")])
def test_a_loss_knows_tensors_only(name):
    allowed = {"torch", "math", "collections", "dataclasses", "typing", "__future__"}
    ours = {"distill_nlp.outputs", "distill_nlp.layer_mapping", "distill_nlp.schedules"}
    for other in imports_of(name):
        assert other.partition(".")[0] in allowed or other.startswith("distill_nlp.losses") or other in ours, other


@EACH
def test_a_module_says_what_it_is_for(name):
    assert ast.get_docstring(TREES[name])


@EACH
def test_a_module_is_of_a_length_to_be_read(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@EACH
def test_no_assert_that_python_minus_o_takes_out(name):
    assert [node.lineno for node in ast.walk(TREES[name]) if isinstance(node, ast.Assert)] == []


@EACH
def test_no_module_knows_of_images(name):
    # They are distilled by examples/distill_image_classifier.py: the package looks at outputs, not at what is read.
    text = MODULES[name].read_text(encoding="utf-8").casefold()
    assert not {"image", "pixel", "pillow", "torchvision"} & set(re.findall("[a-z]+", text))


@EACH
def test_nothing_prints_but_the_command(name):
    if floor(name) == FLOORS["cli"]:
        return
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"] == []


def test_importing_the_package_does_not_import_torch():
    code = "import sys, distill_nlp; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_everything_the_package_exports_is_there():
    import distill_nlp

    for name in distill_nlp.__all__:
        assert getattr(distill_nlp, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = distill_nlp.Nonsense
    type_checked = next(node for node in TREES["distill_nlp"].body if isinstance(node, ast.If))
    names = {alias.name for node in type_checked.body for alias in node.names}
    assert names == set(distill_nlp.__all__) - {"__version__"}


def test_what_ci_installs_has_hashes_and_the_versions_of_the_constraints():
    lines = (PACKAGE.parent / ".ci" / "requirements.txt").read_text(encoding="utf-8").splitlines()[1:]
    locked = dict(re.fullmatch(r"(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}", line).groups() for line in lines)
    pinned = dict(
        re.findall(r"^([\w.-]+)==([^;\s]+)", (PACKAGE.parent / "constraints.txt").read_text(), flags=re.MULTILINE)
    )
    known = {name.lower().replace("_", "-"): version for name, version in locked.items()}
    assert {name: known.get(name.lower().replace("_", "-")) for name in pinned if name != "torch"} == {
        name: version for name, version in pinned.items() if name != "torch"
    }


def test_the_long_files_of_tests_are_there():
    """Else one of another name would come last, and all would wait for it."""
    from conftest import LONG

    names = {path.name for path in Path(__file__).parent.rglob("test_*.py")}
    assert names >= set(LONG)
