"""`distill-nlp export`: families, kinds of numbers, what is written beside the graph, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import (
    BINARY,
    TOPICS,
    VOCAB_SIZE,
    label_config,
    make_student,
    make_teacher,
    make_tokenizer,
    seeded,
    write_rows,
    write_rows_of_several_labels,
)
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ElectraConfig,
    RobertaConfig,
)

pytest.importorskip("onnxruntime")
from distill_nlp.cli import main
from distill_nlp.errors import DistillError, UsageError
from distill_nlp.export import ExportSettings, build, export_model
from distill_nlp.export.quantize import quantize
from distill_nlp.inference import predict_logits
from distill_nlp.loading import load_classifier
from distill_nlp.onnx_model import OnnxClassifier, is_exported, load_for_inference

ROOT = Path(__file__).parent.parent
WIDTHS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "initializer_range": 0.3,
    **label_config(),
}


def of_family(name: str):
    if name == "bert":
        return make_teacher()
    if name == "distilbert":
        return make_student()
    config = {"roberta": RobertaConfig, "electra": ElectraConfig}[name](**WIDTHS)
    return seeded(4, lambda: AutoModelForSequenceClassification.from_config(config))


def saved(folder: Path, model) -> str:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def student(tmp_path):
    """A tiny DistilBERT with two labels."""
    return saved(tmp_path / "model", make_student(**label_config(BINARY)))


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """The graph of `student`, traced once."""
    folder = tmp_path_factory.mktemp("traced")
    export_model(ExportSettings(saved(folder / "model", make_student(**label_config(BINARY))), speed=False))
    return folder / "model-onnx" / "model.onnx"


@pytest.fixture
def traced(monkeypatch, graph):
    """Tracing takes seconds: here the graph of `student` is copied."""

    def copied(model, tokenizer, file):
        shutil.copy(graph, file)
        return ["input_ids", "attention_mask"]

    monkeypatch.setattr(build, "write_graph", copied)


@pytest.fixture
def data(tmp_path):
    return str(write_rows(tmp_path / "data"))


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
def test_each_family_answers_as_its_original_at_any_batch_and_length(tmp_path, family):
    name = saved(tmp_path / "model", of_family(family))
    record = export_model(ExportSettings(name, speed=False))
    folder = tmp_path / "model-onnx"
    assert record == json.loads((folder / "export.json").read_text())
    takes_types = family != "distilbert"
    assert record["inputs"] == ["input_ids", "attention_mask"] + ["token_type_ids"] * takes_types
    assert record["parity"]["max_difference"] < 1e-4
    assert record["parity"]["flips"] == 0
    # The exporter notes for each node where its line of code lies.
    assert b"site-packages" not in (folder / "model.onnx").read_bytes()

    exported, original = load_for_inference(str(folder)), load_classifier(name).eval()
    assert isinstance(exported, OnnxClassifier)
    shapes = {value.name: value.shape for value in exported.session.get_inputs()}
    assert shapes == {name: ["batch", "sequence"] for name in record["inputs"]}
    for rows, length in ((1, 1), (1, 9), (3, 20), (5, 2), (2, 30)):
        ids = torch.from_numpy(np.random.default_rng(length).integers(4, VOCAB_SIZE, (rows, length)))
        mask = torch.ones_like(ids)
        mask[-1, (length + 1) // 2 :] = 0
        given = {"input_ids": ids, "attention_mask": mask}
        if takes_types:
            given["token_type_ids"] = (torch.arange(length) > length // 2).long().expand(rows, -1)
        with torch.inference_mode():
            wanted = original(**given).logits
        torch.testing.assert_close(exported(**given).logits, wanted, atol=1e-4, rtol=0)


def test_what_is_not_given_is_all_real_tokens_of_the_first_segment(tmp_path):
    name = saved(tmp_path / "model", make_teacher())
    export_model(ExportSettings(name, speed=False))
    exported, original = load_for_inference(name + "-onnx"), load_classifier(name).eval()
    ids = torch.arange(4, 12).view(2, 4)
    with torch.inference_mode():
        torch.testing.assert_close(exported(ids).logits, original(ids).logits, atol=1e-4, rtol=0)


def test_tokenizer_labels_and_length_lie_beside_the_graph(tmp_path):
    model = make_student(**label_config(TOPICS), problem_type="multi_label_classification")
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation_side": "left", "model_max_length": 12}))
    record = export_model(ExportSettings(str(tmp_path / "model"), output=str(tmp_path / "out"), speed=False))
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == dict(enumerate(TOPICS))
    assert config.problem_type == "multi_label_classification"
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (read.truncation_side, read.model_max_length) == ("left", 12)
    assert record["max_length"] == 12
    assert left_in(tmp_path / "out") == {
        "config.json",
        "export.json",
        "model.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert left_in(tmp_path) == {"model", "out"}


@pytest.mark.usefixtures("traced")
def test_the_record_holds_sizes_versions_and_no_path(student, data):
    record = export_model(ExportSettings(student, data=data, teacher=student))
    assert record["parity"]["rows"] == 16
    assert record["parity"]["source"] == "data, test"
    assert record["parity"]["original"] == record["parity"]["exported"] == record["parity"]["teacher"]
    weights = sum(p.numel() for p in load_classifier(student).parameters()) * 4 / 1e6
    assert record["size_mb"]["original"] == record["size_mb"]["teacher"] == round(weights, 2)
    assert record["size_mb"]["exported"] == round((Path(student + "-onnx") / "model.onnx").stat().st_size / 1e6, 2)
    assert {"torch", "transformers", "onnx", "onnxruntime", "onnxscript", "distill_nlp"} == set(record["versions"])
    assert record["speed"]["teacher"]["speed_up"] == 1
    both = [record["speed"][name]["throughput"] for name in ("teacher", "exported")]
    assert record["speed"]["exported"]["speed_up"] == pytest.approx(both[1] / both[0], abs=0.01)
    assert str(Path(student).parent) not in json.dumps(record)


@pytest.mark.usefixtures("traced")
def test_accuracy_is_of_the_labels_that_the_data_have(student, data):
    record = export_model(ExportSettings(student, data=data, split="train", speed=False))
    rows = pd.read_parquet(Path(data) / "train.parquet")
    tokenizer = make_tokenizer()
    logits = predict_logits(load_classifier(student), tokenizer, [dict(tokenizer(text)) for text in rows.text])
    assert record["parity"]["original"] == pytest.approx((logits.argmax(1) == rows.label).mean())
    assert 0 < record["parity"]["original"] < 1


@pytest.mark.parametrize("numbers", ["int8", "fp16"])
def test_fewer_bits_make_a_smaller_file_whose_labels_stay(tmp_path, data, numbers):
    # Wide enough for weights to outweigh the graph.
    sizes = {"dim": 192, "hidden_dim": 384, "initializer_range": 0.1}
    name = saved(tmp_path / "model", make_student(**label_config(BINARY), **sizes))
    wanted = {"quantize": "int8"} if numbers == "int8" else {"fp16": True}
    record = export_model(ExportSettings(name, data=data, speed=False, **wanted))
    assert is_exported(f"{name}-onnx-{numbers}")
    assert record["numbers"] == numbers
    part = record["size_mb"]["exported"] / record["size_mb"]["original"]
    assert part < (0.55 if numbers == "int8" else 0.8)
    assert 1e-6 < record["parity"]["max_difference"] < 0.2
    assert record["parity"]["flips"] <= 1
    if numbers == "int8":
        tried = {one["reduce_range"]: one["mean_difference"] for one in record["quantization"]["tried"]}
        assert tried[record["quantization"]["reduce_range"]] == min(tried.values())
        assert record["parity"]["mean_difference"] == pytest.approx(min(tried.values()), rel=1e-3)


def test_each_output_channel_has_its_own_scale(tmp_path, graph):
    import onnx

    quantize(graph, tmp_path / "int8.onnx", reduce_range=True)
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    matrices = [w for name, w in weights.items() if name.endswith("_quantized") and w.dtype == np.int8 and w.ndim == 2]
    assert len(matrices) >= 2 * 6
    scales = [w for name, w in weights.items() if name.endswith("_scale")]
    assert {24, 32} <= {scale.size for scale in scales}
    # 7 bits.
    assert 60 < max(np.abs(matrix).max() for matrix in matrices) <= 64


@pytest.mark.usefixtures("traced")
def test_calibration_fixes_the_ranges_of_activations(tmp_path, student, data):
    import onnx

    settings = {"quantize": "int8", "data": data, "speed": False, "reduce_range": True}
    record = export_model(ExportSettings(student, calibrate=data, **settings))
    assert record["quantization"]["activations"] == "calibrated"
    assert record["quantization"]["calibration_rows"] == 40
    assert [one["reduce_range"] for one in record["quantization"]["tried"]] == [True]
    operators = {node.op_type for node in onnx.load(Path(student + "-onnx-int8") / "model.onnx").graph.node}
    assert "QuantizeLinear" in operators
    assert "DynamicQuantizeLinear" not in operators
    dynamic = export_model(ExportSettings(student, output=str(tmp_path / "other"), **settings))
    assert dynamic["quantization"]["calibration_rows"] is None
    operators = {node.op_type for node in onnx.load(tmp_path / "other" / "model.onnx").graph.node}
    assert "DynamicQuantizeLinear" in operators


@pytest.mark.usefixtures("traced")
def test_weights_of_7_bits_are_taken_where_they_drift_less(student, monkeypatch):
    real = build.quantize

    def overflowing(source, target, reduce_range, calibration):
        real(source, target, reduce_range, calibration)
        if not reduce_range:  # as without VNNI
            import onnx

            graph = onnx.load(target)
            for weight in graph.graph.initializer:
                if weight.name.endswith("_scale"):
                    changed = onnx.numpy_helper.to_array(weight) * np.float32(0.5)
                    weight.CopyFrom(onnx.numpy_helper.from_array(changed.astype(np.float32), weight.name))
            onnx.save(graph, target)

    monkeypatch.setattr(build, "quantize", overflowing)
    record = export_model(ExportSettings(student, quantize="int8", speed=False))
    assert record["quantization"]["reduce_range"] is True
    assert left_in(Path(student + "-onnx-int8")) & {"reduced-True.onnx", "reduced-False.onnx"} == set()


def test_several_labels_are_compared_by_macro_f1(tmp_path, capsys):
    several = {"problem_type": "multi_label_classification", **label_config(TOPICS)}
    name = saved(tmp_path / "model", make_student(**several))
    data = write_rows_of_several_labels(tmp_path / "data")
    assert main(["export", name, "--data", str(data), "--label_column", "labels", "--no-speed"]) == 0
    assert "macro-F1" in capsys.readouterr().out
    parity = json.loads((tmp_path / "model-onnx" / "export.json").read_text())["parity"]
    assert parity["metric"] == "f1_macro"
    assert parity["original"] == parity["exported"] > 0

    texts = ["w4 w6 w20", "w30 w40", "w5"]
    answers = []
    for model in (name, name + "-onnx"):
        assert main(["predict", model, *texts]) == 0
        answers.append([line.split("\t")[0] for line in capsys.readouterr().out.splitlines()])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("numbers", [[], ["--quantize", "int8"]])
@pytest.mark.usefixtures("traced")
def test_predict_takes_exported_folders(student, data, capsys, numbers):
    assert main(["export", student, *numbers, "--data", data, "--no-speed", "--max_flips", "0.2"]) == 0
    capsys.readouterr()
    found = []
    for model in (student, student + "-onnx" + "-int8" * bool(numbers)):
        assert main(["predict", model, str(Path(data) / "test.parquet"), "--format", "jsonl"]) == 0
        found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert len(found[1]) == 16
    for wanted, got in zip(*found, strict=True):
        assert got["text"] == wanted["text"]
        assert got["scores"] == pytest.approx(wanted["scores"], abs=0.05 if numbers else 1e-4)


@pytest.mark.usefixtures("traced")
def test_compare_takes_exported_folders_beside_their_originals(student, data, capsys):
    exported = student + "-onnx"
    assert main(["export", student, "--data", data, "--no-speed"]) == 0
    capsys.readouterr()
    assert main(["compare", student, exported, "--data", data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    original, export = found["models"].values()
    assert found["pairs"][0]["agreement"] == 1.0
    assert export["accuracy"] == original["accuracy"]
    assert export["parameters"] == original["parameters"]
    assert export["size_mb"] == round((Path(exported) / "model.onnx").stat().st_size / 1e6, 2)
    (Path(exported) / "export.json").write_text("{}")
    assert main(["compare", student, exported, "--data", data]) == 2
    assert "is not that of an export" in capsys.readouterr().err


@pytest.mark.usefixtures("traced")
def test_the_command_says_what_it_measured(student, data, capsys):
    arguments = ["export", student, "--to", "onnx", "--data", data, "--teacher", student, "--output", student + "-x"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for wanted in ("accuracy", "rows with another label", "throughput, batch 16", "(1.0×)", f"written to {student}-x"):
        assert wanted in shown


# ---- what must not be written ----


def test_an_export_that_drifts_is_not_written(tmp_path, student, data, monkeypatch, capsys):
    real = build.write_graph

    def other(model, tokenizer, file):
        torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(9))
        return real(model, tokenizer, file)

    monkeypatch.setattr(build, "write_graph", other)
    assert main(["export", student, "--data", data]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: the fp32 export of {student} drifts on data, test: logits differ by ")
    assert error.endswith("nothing was written")
    assert left_in(tmp_path) == {"model", "data"}


@pytest.mark.usefixtures("traced")
def test_a_tolerance_that_is_given_decides(tmp_path, student, data, capsys):
    arguments = ["export", student, "--quantize", "int8", "--data", data, "--no-speed"]
    assert main([*arguments, "--max_difference", "1e-9"]) == 1
    assert "--max_difference 1e-09" in capsys.readouterr().err
    assert left_in(tmp_path) == {"model", "data"}
    assert main([*arguments, "--max_difference", "9"]) == 0


@pytest.mark.usefixtures("traced")
def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path, student, monkeypatch, capsys):
    settings = ExportSettings(student, output=str(tmp_path / "out"), speed=False)
    export_model(settings)
    (tmp_path / "out" / "stale").touch()
    export_model(settings)
    assert "stale" not in left_in(tmp_path / "out")
    assert left_in(tmp_path) == {"model", "out"}

    # One that fails leaves the earlier one.
    before = (tmp_path / "out" / "export.json").read_text()
    monkeypatch.setattr(build, "problems", lambda found, allowed: ["they differ"])
    with pytest.raises(DistillError, match="they differ"):
        export_model(settings)
    assert (tmp_path / "out" / "export.json").read_text() == before

    (tmp_path / "mine").mkdir()
    assert main(["export", student, "--output", str(tmp_path / "mine")]) == 2
    assert "exists and is no earlier export" in capsys.readouterr().err


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, student):
    # The kernel refuses to let any file grow beyond 30 kB, as it refuses where a disk is full.
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); "
        "from distill_nlp.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", limited, "export", student, "--no-speed"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith(f"error: cannot write {student}-onnx: ")
    assert "Traceback" not in run.stderr
    assert left_in(tmp_path) == {"model"}


@pytest.mark.slow
def test_a_model_that_cannot_be_traced_is_one_line(tmp_path, student, monkeypatch, capsys):
    from transformers import DistilBertModel

    real = DistilBertModel.forward

    def by_value(self, input_ids=None, **keywords):
        if input_ids.sum().item() > 10**6:
            raise RuntimeError
        return real(self, input_ids=input_ids, **keywords)

    monkeypatch.setattr(DistilBertModel, "forward", by_value)
    assert main(["export", student]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: cannot export DistilBertForSequenceClassification to ONNX: ")
    assert "\x1b" not in error
    assert left_in(tmp_path) == {"model"}


def test_an_operator_without_onnx_form_is_one_line(tmp_path, student, monkeypatch, capsys):
    from transformers import DistilBertModel

    real = DistilBertModel.forward

    def with_operator(self, input_ids=None, **keywords):
        found = real(self, input_ids=input_ids, **keywords)
        found.last_hidden_state = torch.special.bessel_j0(found.last_hidden_state)
        return found

    monkeypatch.setattr(DistilBertModel, "forward", with_operator)
    assert main(["export", student]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "bessel_j0" in error
    assert left_in(tmp_path) == {"model"}


@pytest.mark.slow
@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_without_the_extra_it_says_what_to_install(student, package):
    missing = (
        "import sys, importlib.util as util; real = util.find_spec; "
        f"util.find_spec = lambda name, *more: None if name == {package!r} else real(name, *more); "
        "from distill_nlp.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", missing, "export", student],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=200,
    )
    assert run.returncode == 2
    assert run.stderr.strip() == f"error: an export needs {package}: pip install 'distill-nlp[export]'"


def test_an_exported_folder_without_onnx_runtime_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("distill_nlp.onnx_model.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'distill-nlp\[export\]'"):
        OnnxClassifier(tmp_path / "model.onnx", None)


@pytest.mark.usefixtures("traced")
def test_a_damaged_graph_is_one_line(student, capsys):
    export_model(ExportSettings(student, speed=False))
    (Path(student + "-onnx") / "model.onnx").write_bytes(b"nothing")
    assert main(["predict", student + "-onnx", "w4"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ONNX Runtime cannot read ")
    assert "\n" not in error


@pytest.mark.usefixtures("traced")
def test_what_is_no_classifier_or_an_export_already_is_refused(tmp_path, student, capsys):
    backbone = saved(tmp_path / "backbone", make_teacher().bert)
    assert main(["export", backbone]) == 2
    assert "is no classifier" in capsys.readouterr().err
    export_model(ExportSettings(student, speed=False))
    assert main(["export", student + "-onnx"]) == 2
    assert "is an export already" in capsys.readouterr().err
    one = saved(tmp_path / "one", make_student(num_labels=1, problem_type="regression"))
    assert main(["export", one]) == 2
    assert "is a regression" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere")]) == 2


def test_a_model_beyond_the_size_of_a_file_is_refused(student, monkeypatch):
    monkeypatch.setattr("distill_nlp.export.graph._MOST_BYTES", 1000)
    with pytest.raises(DistillError, match="a file in ONNX holds 2 GB"):
        export_model(ExportSettings(student))


def test_help_needs_no_torch():
    code = "import sys, distill_nlp.cli as c; c._parser(); print({'torch', 'onnxruntime'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_what_killed_exports_left_is_brought_back_or_removed(tmp_path):
    """One killed between its two renames, which left the earlier export aside; and one while it wrote."""
    names = (
        ".model-onnx.1.old",
        ".model-onnx.2.tmp",
        ".model-onnx.3.tmp",
        ".model-onnx.v2.4.old",
        ".model-onnx.v2.5.tmp",
    )
    aside, begun, at_work, *of_others = (tmp_path / name for name in names)
    for folder in (aside, begun, at_work, *of_others):
        folder.mkdir()
        for name in ("model.onnx", "export.json"):
            (folder / name).write_text(folder.name)
    for folder in (begun, *of_others):
        os.utime(folder, (time.time() - 7200,) * 2)
    build._bring_back(tmp_path / "model-onnx")
    left = {at_work.name, "model-onnx", *(path.name for path in of_others)}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert (tmp_path / "model-onnx" / "model.onnx").read_text() == aside.name
    # What was being removed is no export any more.
    (tmp_path / "model-onnx").rename(aside)
    (aside / "export.json").unlink()
    build._bring_back(tmp_path / "model-onnx")
    assert not (tmp_path / "model-onnx").exists()
    build._bring_back(tmp_path / "not there" / "model-onnx")
