"""From a run to a student that others load: report, export, comparison, Hub, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN
from huggingface_hub import snapshot_download
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill_nlp.cli import main

pytest.importorskip("onnxruntime")
from distill_nlp.onnx_model import load_for_inference

REPO = "tester/delivered"


@pytest.mark.slow
@pytest.mark.plots
@pytest.mark.usefixtures("no_doctor")
def test_a_run_is_reported_exported_compared_pushed_and_pulled(hub, experiment, tmp_path, capsys):
    run, data = tmp_path / "run", str(tmp_path / "data")
    student = str(run / "student" / "seed-0")
    assert main(["run", str(experiment())]) == 0
    assert "<script" in (run / "report.html").read_text()
    export = ["--quantize", "int8", "--data", data, "--teacher", str(run / "teacher"), "--max_flips", "0.5"]
    assert main(["export", student, *export]) == 0
    assert f"distill-nlp report {run} shows it beside the student" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0
    assert "seed 0, ONNX int8" in capsys.readouterr().out
    (exported,) = json.loads((run / "report.json").read_text())["exports"]
    assert exported["speed"]["times_teacher"] > 0
    assert all("seed 0, ONNX int8" in (run / name).read_text() for name in ("report.md", "report.html"))
    assert main(["compare", student, student + "-onnx-int8", "--data", data, "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)["models"]
    measured = json.loads((run / "report.json").read_text())["models"]["student"]["seeds"]["0"]
    assert compared[student]["accuracy"] == measured["accuracy"]

    assert main(["push", str(run), "--repo-id", REPO, "--include-report", "--include-onnx"]) == 0
    assert f"{measured['accuracy']:.4f}" in hub.files[REPO]["README.md"].decode()
    assert {"report.html", "report.json", "report.md", "onnx-int8/model.onnx"} <= set(hub.files[REPO])
    for private in (str(tmp_path), TOKEN):
        assert [name for name, content in hub.files[REPO].items() if private.encode() in content] == []

    pulled = Path(snapshot_download(REPO, cache_dir=tmp_path / "cache", token=TOKEN))
    tokenizer = AutoTokenizer.from_pretrained(pulled)
    tokens = tokenizer(["w4 w20 w9", "w5"], padding=True, return_tensors="pt")
    tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted = AutoModelForSequenceClassification.from_pretrained(student).eval()(**tokens).logits
        assert torch.equal(AutoModelForSequenceClassification.from_pretrained(pulled).eval()(**tokens).logits, wanted)
    quantized = load_for_inference(str(pulled / "onnx-int8"))(**tokens).logits
    torch.testing.assert_close(quantized, wanted, atol=0.2, rtol=0)
