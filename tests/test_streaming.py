"""Training from streams: rows as they come, in the same order after a restart, checked, tokenized late."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from distill_nlp.cli import main

STREAMED = {"data__streaming": True, "data__shuffle_buffer": 7}


@pytest.mark.usefixtures("no_doctor")
def test_a_run_over_a_stream_goes_through_and_says_how(experiment, tmp_path, capsys):
    config = str(experiment(**STREAMED))
    assert main(["run", config]) == 0
    said = capsys.readouterr().err
    assert "train is streamed: rows are checked as they come, and mixed within 7" in said
    assert "rows are streamed, evaluated every 2 of 3 steps; the teacher runs in every step: rows of a stream" in said
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["run"]["stages"]["student/seed-0"]["steps"] == 3
    assert main(["run", config]) == 0
    assert capsys.readouterr().err.count("done already") == 4
    assert main(["report", str(tmp_path / "run")]) == 0
    weights = load_file(tmp_path / "run" / "student" / "seed-0" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
