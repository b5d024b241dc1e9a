"""Two gloo processes on the CPU against one, over the same global batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_run
import pytest
import torch
from helpers import ALL_WEIGHTS, largest_difference

pytestmark = pytest.mark.slow
SCENARIOS = list(distributed_run.SCENARIOS)
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two ranks has left: (results, parameters)."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*command, str(TESTS / "distributed_run.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [
        (json.loads((folder / f"results-{rank}.json").read_text()), torch.load(folder / f"states-{rank}.pt"))
        for rank in (0, 1)
    ]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """One process with the same global batch."""
    return distributed_run.train(
        tmp_path_factory.mktemp("single"), per_device_train_batch_size=distributed_run.GLOBAL_BATCH
    )


def test_there_are_two_ranks_under_ddp(ranks):
    for results, _ in ranks:
        for name in SCENARIOS:
            assert results[name]["world_size"] == 2
            assert results[name]["ddp"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_global_batches_are_those_of_one_process(ranks, single, scenario):
    per_step = distributed_run.SCENARIOS[scenario].get("gradient_accumulation_steps", 1)
    for step, whole in enumerate(single["batches"][:6]):
        parts = [
            row
            for results, _ in ranks
            for micro_batch in results[scenario]["batches"][step * per_step : (step + 1) * per_step]
            for row in micro_batch
        ]
        assert sorted(parts) == sorted(whole)
        assert len(parts) == distributed_run.GLOBAL_BATCH


@pytest.mark.parametrize("scenario", [*SCENARIOS, "resumed"])
def test_ranks_are_bit_identical(ranks, scenario):
    assert largest_difference(ranks[0][1][scenario], ranks[1][1][scenario]) == 0


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_parameters_equal_those_of_one_process(ranks, single, scenario):
    """Student and projections, with the rows without a label on one of the ranks only."""
    assert any(name.startswith("objective.") for name in single["state"])
    assert largest_difference(ranks[0][1][scenario], single["state"]) < 1e-5


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_logged_terms_equal_those_of_one_process(ranks, single, scenario):
    names = ("loss", *(f"loss_{term}" for term in ALL_WEIGHTS))
    logs = ranks[0][0][scenario]["logs"]
    assert len(logs) == 3
    for entry, whole in zip(logs, single["logs"], strict=True):
        assert {n: entry[n] for n in names} == pytest.approx({n: whole[n] for n in names}, rel=1e-4)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_evaluation_equals_that_of_one_process(ranks, single, scenario):
    assert ranks[0][0][scenario]["metrics"]["eval_loss"] == pytest.approx(single["metrics"]["eval_loss"], rel=1e-4)


def test_resuming_two_ranks_reproduces_their_uninterrupted_run(ranks):
    results, states = ranks[0]
    assert largest_difference(states["resumed"], states["plain"]) == 0
    assert results["resumed"]["logs"][-1]["loss_hidden"] == results["plain"]["logs"][-1]["loss_hidden"]
