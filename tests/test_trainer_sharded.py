"""FSDP2 and DeepSpeed, with the configurations of configs/accelerate, against one process over the same rows.

FSDP2 runs on as many GPUs as there are, up to two, or as two gloo ranks on the CPU. DeepSpeed needs a GPU, or
DS_ACCELERATOR=cpu with ninja and a C++ compiler.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_run
import torch
from helpers import ALL_WEIGHTS, free_port, largest_difference, step_logs
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent
GPUS = min(torch.cuda.device_count(), 2)
DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or not (GPUS or os.environ.get("DS_ACCELERATOR") == "cpu"),
    reason="needs a GPU (or DS_ACCELERATOR=cpu) and DeepSpeed, which is not installed with the package",
)
LAUNCHES = {
    "fsdp2": (GPUS or 2, ["--config_file", "configs/accelerate/fsdp2.yaml"]),
    "zero2": (GPUS or 1, ["--config_file", "configs/accelerate/deepspeed_zero2.yaml"]),
    "zero3": (GPUS or 1, ["--config_file", "configs/accelerate/deepspeed_zero3.yaml"]),
}


KINDS = [
    "fsdp2",
    pytest.param("zero2", marks=DEEPSPEED),
    pytest.param("zero3", marks=DEEPSPEED),
]


@pytest.fixture(scope="module", params=KINDS)
def sharded(request, tmp_path_factory):
    """(folder, what each rank has left) of one launch."""
    folder = tmp_path_factory.mktemp(request.param)
    ranks, options = LAUNCHES[request.param]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--num_processes", str(ranks)]
    command += ["--main_process_port", str(free_port())]
    run = subprocess.run(
        # The comparison is one of float32.
        [*command, "--mixed_precision", "no", str(TESTS / "sharded_run.py"), str(folder), str(ranks)],
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", ""), str(TESTS.parent)]),
        },
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    results = [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(ranks)]
    assert [result["world_size"] for result in results] == [ranks] * ranks
    return folder, results


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """(folder, trainers) of one process that shards nothing."""
    folder = tmp_path_factory.mktemp("single")
    trainers = {
        "whole": sharded_run.build(folder / "whole", 1, use_cpu=True),
        "scheduled": sharded_run.build(folder / "late", 1, **sharded_run.scheduled() | {"use_cpu": True}),
    }
    for name, trainer in trainers.items():
        trainer.train()
        trainer.save_model(str(folder / name / "saved"))
    return folder, trainers


def weights(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def test_parameters_are_sharded(sharded):
    """ZeRO-2 cuts gradients and optimizer state only."""
    folder, results = sharded
    for result in results:
        assert result["sharded"] == (not folder.name.startswith("zero2"))
        assert result["distributed_type"].endswith(("FSDP", "DEEPSPEED"))


def test_parameters_equal_those_of_one_process(sharded, single):
    """Of the student and of the projections, after 2 and after 4 steps."""
    for step in (2, 4):
        for name in ("model", "objective"):
            ours, plain = (weights(folder / "whole" / f"checkpoint-{step}", name) for folder in (sharded[0], single[0]))
            assert largest_difference(ours, plain) < 1e-5


def test_terms_equal_those_of_one_process(sharded, single):
    names = ("loss", *(f"loss_{term}" for term in ALL_WEIGHTS))
    entries = sharded[1][0]["logs"]["whole"]
    assert len(entries) == 4
    for entry, plain in zip(entries, step_logs(single[1]["whole"]), strict=True):
        assert {n: entry[n] for n in names} == pytest.approx({n: plain[n] for n in names}, rel=1e-4)


def test_a_weight_that_is_zero_at_first_trains_later(sharded, single):
    """The projections of that loss have no gradient at first, and those of another are orthogonal."""
    folder, results = sharded
    assert largest_difference(weights(folder / "scheduled"), weights(single[0] / "scheduled" / "saved")) < 1e-5
    assert [entry["weight_hidden"] for entry in results[0]["logs"]["scheduled"]] == [0, 0, 1, 1]


def test_the_best_model_is_loaded_at_the_end(sharded):
    folder, results = sharded
    best, last = folder / "whole" / "checkpoint-2", folder / "whole" / "checkpoint-4"
    assert {result["best"] for result in results} == {str(best)}
    assert largest_difference(weights(folder / "best"), weights(best)) == 0
    assert largest_difference(weights(folder / "best"), weights(last)) > 1e-4


def test_resuming_reproduces_the_uninterrupted_run(sharded):
    folder, results = sharded
    for name in ("model", "objective"):
        resumed, whole = (weights(folder / run / "checkpoint-4", name) for run in ("resumed", "whole"))
        assert largest_difference(resumed, whole) == 0
    for result in results:
        resumed, whole = ([e["loss"] for e in result["logs"][run][-2:]] for run in ("resumed", "whole"))
        assert resumed == whole


def test_the_saved_student_is_a_plain_checkpoint(sharded, single):
    folder, results = sharded
    files = {path.name for path in (folder / "saved").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    model, info = AutoModelForSequenceClassification.from_pretrained(folder / "saved", output_loading_info=True)
    assert {name: keys for name, keys in info.items() if keys} == {}
    assert model.dtype == torch.float32
    assert model.config.architectures == ["DistilBertForSequenceClassification"]
    expected = single[1]["whole"].evaluate()["eval_loss"]
    assert results[0]["metrics"]["eval_loss"] == pytest.approx(expected, rel=1e-4)
