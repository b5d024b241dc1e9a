"""Nothing is let in (code, pickles), nothing gets out (tokens, paths, markup): what SECURITY.md claims."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from bad_inputs.generators import Planted
from helpers import BINARY, label_config, make_student, make_tokenizer, make_trainer
from hub_server import HubServer

from distill_nlp.cli import main
from distill_nlp.config import Experiment
from distill_nlp.errors import UsageError, one_line
from distill_nlp.hub.private import MASK, masked, secret_in
from distill_nlp.loading import load_classifier, load_config, load_tokenizer, trust_remote_code
from distill_nlp.output_folder import check_can_be_made, check_no_way_out
from distill_nlp.report.earlier import PREDICTIONS_FILE, _logits
from distill_nlp.report.write import _cell
from distill_nlp.yaml_text import read_yaml

PACKAGE = Path(__file__).parent.parent / "distill_nlp"
TOKEN = "hf_" + "pLaNtEd0" * 4
OWN = "a-token-of-no-known-form"


@pytest.fixture
def trusted_again():
    yield
    trust_remote_code(False)


# ---- code that comes with a model ----

CODE = """
from pathlib import Path
from transformers import PretrainedConfig
Path(__file__).with_name("pwned").touch()
Path("{mark}").touch()
class Config(PretrainedConfig):
    model_type = "evil"
"""


@pytest.fixture
def with_code(tmp_path):
    """A model whose config is a class of its own, which leaves a mark when it is imported."""
    folder = tmp_path / "with_code"
    make_student().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "code_of_its_own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code_of_its_own.py").write_text(CODE.format(mark=tmp_path / "pwned"))
    return folder


def test_code_of_a_model_is_not_run_unless_it_is_trusted(with_code, tmp_path, trusted_again, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(UsageError, match="with_code .*code of its own.*trust_remote_code"):
        load_config(str(with_code))
    assert not (tmp_path / "pwned").exists()
    said = []
    trust_remote_code(True, said.append)
    assert load_config(str(with_code)).model_type == "evil"
    assert (tmp_path / "pwned").exists()
    assert said == ["trust_remote_code is on: code that comes with models and tokenizers is run as you"]


def test_a_user_at_a_terminal_is_not_asked_whether_to_run_code(with_code, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(UsageError, match="trust_remote_code"):
        load_config(str(with_code))


def test_trust_is_a_setting_and_a_switch_that_say_so(experiment, with_code, tmp_path, capsys, trusted_again):
    words = ["run", str(experiment()), "--stages", "report", "--no-doctor"]
    assert main(words) == 2
    assert "trust_remote_code is on" not in capsys.readouterr().err
    assert main([*words, "--trust_remote_code", "true"]) == 2
    assert "trust_remote_code is on: code" in capsys.readouterr().err
    # The next run in this process is its own.
    assert main(words) == 2
    assert "trust_remote_code is on" not in capsys.readouterr().err
    with pytest.raises(UsageError, match="code of its own"):
        load_config(str(with_code))
    for command in (["predict", "./nowhere", "w4"], ["compare", "./a", "./b", "--data", "c"], ["export", "./nowhere"]):
        assert main([*command, "--trust_remote_code"]) == 2
        assert "trust_remote_code is on: code" in capsys.readouterr().err
        assert main(command) == 2
        assert "trust_remote_code is on" not in capsys.readouterr().err


# ---- pickles ----


def test_a_planted_pickle_would_run(tmp_path):
    """What the tests below plant does what they look for."""
    file = _plant(tmp_path / "state.pt", tmp_path / "pwned")
    with suppress(RuntimeError):
        # It finds no tensors, too late.
        torch.load(file, weights_only=False)
    assert (tmp_path / "pwned").exists()


def _plant(file: Path, mark: Path) -> Path:
    file.write_bytes(pickle.dumps(Planted(mark)))
    return file


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_pickle_planted_in_a_checkpoint_is_not_run(name, tmp_path):
    make_trainer(tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=2).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    _plant(checkpoint / name, tmp_path / "pwned")
    asked, load = [], torch.load

    def watched(file, *arguments, **settings):
        asked.append((Path(file).name, settings.get("weights_only")))
        return load(file, *arguments, **settings)

    trainer = make_trainer(tmp_path / "run", save_strategy="no", max_steps=4)
    with pytest.MonkeyPatch.context() as patch, suppress(Exception):
        patch.setattr(torch, "load", watched)
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "pwned").exists()
    assert all(weights_only is True for _, weights_only in asked)


def test_a_pickle_for_weights_is_refused_unread(tmp_path, monkeypatch):
    make_student(**label_config(BINARY)).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    _plant(tmp_path / "model" / "pytorch_model.bin", tmp_path / "pwned")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(UsageError, match=r"pickle alone \(pytorch_model.bin\).*convert it to safetensors"):
        load_classifier(str(tmp_path / "model"))
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path):
    make_student(**label_config(BINARY)).save_pretrained(tmp_path / "model")
    _plant(tmp_path / "model" / "pytorch_model.bin", tmp_path / "pwned")
    load_classifier(str(tmp_path / "model"))
    assert not (tmp_path / "pwned").exists()


def test_predictions_with_a_planted_pickle_are_not_read(tmp_path):
    planted = np.array([Planted(tmp_path / "pwned")], dtype=object)
    np.savez(tmp_path / PREDICTIONS_FILE, labels=planted, teacher=planted)
    assert _logits(tmp_path / PREDICTIONS_FILE, np.zeros(1)) is None
    assert not (tmp_path / "pwned").exists()
    with np.load(tmp_path / PREDICTIONS_FILE, allow_pickle=True) as file, suppress(Exception):
        _ = file["labels"]
    assert (tmp_path / "pwned").exists()


FORBIDDEN_MODULES = {"pickle", "joblib", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
FORBIDDEN_SETTINGS = {
    ("allow_pickle", True),
    ("weights_only", False),
    ("trust_remote_code", True),
    ("shell", True),
    ("use_safetensors", False),
}


def dangers(tree: ast.AST) -> list[str]:
    """What unpickles, evaluates, or takes more than is safe, as it is written."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            found += sorted(FORBIDDEN_MODULES & names)
        elif isinstance(node, ast.Call):
            found += [name] if (name := ast.unparse(node.func)) in FORBIDDEN_CALLS else []
            settings = [(k.arg, k.value.value) for k in node.keywords if isinstance(k.value, ast.Constant)]
            found += [f"{name}={value}" for name, value in settings if (name, value) in FORBIDDEN_SETTINGS]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_unpickles_or_evaluates(path):
    assert dangers(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line", ["import pickle", "from joblib import load", "torch.load(f)", "np.load(f, allow_pickle=True)", "eval(x)"]
)
def test_what_would_be_found(line):
    assert dangers(ast.parse(line))


@pytest.mark.parametrize("tag", ["python/object/apply:os.system", "python/name:os.system", "python/module:os"])
def test_yaml_makes_no_objects(tag, tmp_path):
    with pytest.raises(yaml.YAMLError, match="python"):
        read_yaml(f"a: !!{tag} ['touch {tmp_path}/pwned']")
    assert not (tmp_path / "pwned").exists()


# ---- where files are written ----


def test_the_name_of_a_chat_template_writes_nothing_elsewhere(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    templates = [{"name": "default", "template": "a"}, {"name": "../../../pwned", "template": "b"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    before = set(tmp_path.iterdir())
    load_tokenizer(str(tmp_path / "model")).save_pretrained(tmp_path / "saved")
    assert set(tmp_path.iterdir()) - before == {tmp_path / "saved"}
    assert not list(tmp_path.rglob("*.jinja"))


@pytest.mark.parametrize("link", ["student", "config.json", "student/seed-0", "baseline/seed-0", "report.html"])
def test_a_link_out_of_the_runs_folder_is_refused_before_anything_is_written(link, experiment, tmp_path, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    place = tmp_path / "run" / link
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(outside)
    assert main(["run", str(experiment()), "--no-doctor"]) == 2
    assert f"{place} is a link that leads out of the run's folder" in capsys.readouterr().err
    assert [path.name for path in outside.iterdir()] == ["precious"]


def test_links_within_the_folder_and_to_the_folder_itself_are_fine(tmp_path):
    real = tmp_path / "disk" / "run"
    (real / "student" / "seed-0").mkdir(parents=True)
    (tmp_path / "run").symlink_to(real)
    (real / "latest").symlink_to(real / "student" / "seed-0")
    check_no_way_out(tmp_path / "run")
    # A folder whose name only begins alike lies outside.
    (tmp_path / "disk" / "run-2").mkdir()
    finished = tmp_path / "disk" / "teacher"
    finished.mkdir(parents=True)
    (finished / "stage.json").write_text("{}")
    (real / "teacher").symlink_to(finished)
    check_no_way_out(tmp_path / "run")
    (real / "other").symlink_to(tmp_path / "disk" / "run-2")
    with pytest.raises(UsageError, match="leads out"):
        check_no_way_out(tmp_path / "run")


def test_a_file_or_a_dead_link_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    check_can_be_made(tmp_path / "a" / "b", "output_dir")
    assert not (tmp_path / "a").exists()
    for name, what in (("file", "a file"), ("file/below", "a file"), ("dead", "a link that leads nowhere")):
        with pytest.raises(UsageError, match=f"output_dir: .* is {what}"):
            check_can_be_made(tmp_path / name, "output_dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="nothing may be written"):
        check_can_be_made(tmp_path / "locked" / "run", "output_dir")


def test_names_of_labels_and_stages_become_no_paths(experiment, tmp_path, no_doctor):
    """Classes named as paths: every file that a run leaves lies where it would anyway."""
    evil = ["../../pwned", "/tmp/pwned"]
    config = experiment(data__label_names=evil, losses={"kl": {}})
    before = {path for path in tmp_path.rglob("*") if "run" not in path.parts[len(tmp_path.parts) :][:1]}
    assert main(["run", str(config)]) == 0
    after = {path for path in tmp_path.rglob("*") if "run" not in path.parts[len(tmp_path.parts) :][:1]}
    assert after == before
    assert not [path for path in (tmp_path / "run").rglob("*") if "pwned" in path.name]


# ---- tokens ----


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"as {TOKEN} is", f"as {MASK} is"),
        ("https://alice:secret@example.org/a", f"https://{MASK}@example.org/a"),
        (f"https://{TOKEN}@example.org", f"https://{MASK}@example.org"),
        ("ssh://git@example.org", f"ssh://{MASK}@example.org"),
        ("mail alice@example.org about hf_short", "mail alice@example.org about hf_short"),
        (f"a {OWN} b", f"a {MASK} b"),
        ("half of a pair \ud83d", "half of a pair \ud83d"),
    ],
)
def test_tokens_and_credentials_are_masked(text, clean, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWN)
    assert masked(text) == clean
    assert masked(clean) == clean


def test_a_token_too_short_to_be_one_masks_no_words(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a")
    assert masked("a data set") == "a data set"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"training": {"hub_token": "anything"}}, "training.hub_token"),
        ({"training": {"report_to": ["none", TOKEN]}}, "training.report_to.1"),
        ({"data": {"dataset": "https://alice:secret@example.org/a.csv"}}, "data.dataset"),
        ({"student": {"config": {"pad_token": "[PAD]", "password": "x"}}}, "student.config.password"),
        ({"training": {"hub_token": None}, "student": {"config": {"pad_token": "[PAD]"}}}, None),
        ({"data": {"dataset": "alice/reviews"}, "teacher": {"model": "https://example.org/a"}}, None),
    ],
)
def test_secrets_in_settings_are_found_by_name_and_form(settings, name):
    assert secret_in(settings) == name


PLACES = {
    "training.hub_token": TOKEN,
    "teacher.training.hub_token": OWN,
    "data.dataset": f"https://user:{OWN}@example.org/data.csv",
    "teacher.model": f"https://{TOKEN}@example.org/model",
    "student.overrides": {"api_key": OWN},
    "training.run_name": f"run {TOKEN}",
    "output_dir": f"run-{OWN}",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_token_in_a_config_is_refused_and_shown_nowhere(place, experiment, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWN)
    config = experiment()
    settings = yaml.safe_load(config.read_text())
    *parents, last = place.split(".")
    inner = settings
    for name in parents:
        inner = inner.setdefault(name, {})
    inner[last] = PLACES[place]
    config.write_text(yaml.safe_dump(settings))
    assert main(["run", str(config)]) == 2
    out, err = capfd.readouterr()
    assert f"{place}" in err
    assert "HF_TOKEN" in err
    assert len(err.splitlines()) == 1
    assert TOKEN not in out + err
    assert OWN not in out + err
    assert not (tmp_path / "run").exists()


def test_an_experiment_made_in_python_refuses_a_token_too():
    with pytest.raises(ValueError, match="training.hub_token: a token or password does not belong"):
        Experiment.model_validate({"training": {"hub_token": TOKEN}})


def test_a_token_on_the_command_line_is_not_shown(experiment, capfd):
    config = str(experiment())
    for words in (["--training.hub_token", TOKEN], ["--data.max_length", TOKEN], [f"--{TOKEN}", "1"], [TOKEN]):
        assert main(["run", config, *words]) == 2
        assert TOKEN not in "".join(capfd.readouterr())


def test_a_run_its_report_and_its_push_hold_no_token(experiment, tmp_path, capfd, monkeypatch, no_doctor):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    config, run = str(experiment(losses={"kl": {}}, data__unlabeled="pool")), tmp_path / "run"
    assert main(["run", config]) == 0
    assert main(["report", str(run)]) == 0
    with HubServer(token=TOKEN) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        pushed = main(["push", str(run), "--repo-id", "tester/student", "--include-report"])
        wrong = main(["push", str(run), "--repo-id", f"tester/{TOKEN}/x"])
        received = hub.all_bytes
    said = "".join(capfd.readouterr())
    assert pushed == 0, said
    assert wrong == 2
    assert TOKEN not in said
    assert TOKEN.encode() not in received
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


# ---- markup ----


def test_what_users_named_is_no_markup_in_markdown():
    cell = _cell("a|b\nc `d` <script>alert(1)</script> [x](http://evil) **e** \\ _f_")
    assert "\n" not in cell
    assert re.search(r"(?<!\\)[|<`*_\[\]]", cell) is None


@pytest.mark.parametrize("text", ["a\x1b]0;title\x07", "a\rerror: other", "a\x9b31m", "a\u202eb", "a\u2028b"])
def test_no_text_moves_the_terminals_cursor_or_turns_its_direction(text):
    assert one_line(text).isprintable()


@pytest.mark.plots
def test_a_run_of_hostile_names_and_texts_shows_them_as_text(experiment, tmp_path, no_doctor):
    evil = "</script><script>owned()</script><img src=x onerror=owned()>|`\n# x"
    config = experiment(data__label_names=[evil, "good"], losses={"kl": {}})
    lines = [json.dumps({"text": f"w4 {evil} w{10 + i}", "label": i % 2}) for i in range(16)]
    for old in (tmp_path / "data").glob("test.*"):
        old.unlink()
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(lines))
    assert main(["run", str(config)]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    body = page.split("<script>")[0]
    # One script, our own; no element or attribute that a name or a text made.
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "owned()" in body
    markdown = (tmp_path / "run" / "report.md").read_text()
    assert not re.search(r"(?<!\\)<(?:script|img)", markdown)
    table = [line for line in markdown.splitlines() if "owned" in line]
    assert table
    assert all(line.startswith("| ") and line.endswith(" |") for line in table)
