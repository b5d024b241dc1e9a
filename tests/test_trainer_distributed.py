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
MORE = list(distributed_run.MORE)
WHOLE = {"per_device_train_batch_size": distributed_run.GLOBAL_BATCH}
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two ranks has left: (results, parameters)."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", ""), str(TESTS.parent)]),
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
    return distributed_run.train(tmp_path_factory.mktemp("single"), **WHOLE)


@pytest.fixture(scope="module")
def more_single(tmp_path_factory):
    """The same of the other scenarios: name -> results."""
    folder = tmp_path_factory.mktemp("more_single")
    scenarios = distributed_run.MORE | {"balanced": distributed_run.BALANCED}
    return {name: distributed_run.train(folder / name, **WHOLE, **settings) for name, settings in scenarios.items()}


def test_there_are_two_ranks_under_ddp(ranks):
    for results, _ in ranks:
        for name in (*SCENARIOS, *MORE, "balanced"):
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


@pytest.mark.parametrize("scenario", [*SCENARIOS, "resumed", *MORE, "balanced"])
def test_ranks_are_bit_identical(ranks, scenario):
    assert largest_difference(ranks[0][1][scenario], ranks[1][1][scenario]) == 0


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_parameters_equal_those_of_one_process(ranks, single, scenario):
    """Student and projections, with the rows without a label on one of the ranks only."""
    assert any(name.startswith("objective.") for name in single["state"])
    assert largest_difference(ranks[0][1][scenario], single["state"]) < 1e-5


@pytest.mark.parametrize("scenario", MORE)
def test_all_losses_schedules_and_fitted_projections_equal_one_process(ranks, more_single, scenario):
    """Also a loss whose weight is 0 at first, and losses that do not reach the classifier's head."""
    whole = more_single[scenario]
    assert largest_difference(ranks[0][1][scenario], whole["state"]) < 1e-5
    for entry, expected in zip(ranks[0][0][scenario]["logs"], whole["logs"], strict=True):
        names = {name for name in expected if name.startswith(("loss", "weight"))}
        assert names == {name for name in entry if name.startswith(("loss", "weight"))}
        assert {n: entry[n] for n in names} == pytest.approx({n: expected[n] for n in names}, rel=1e-4)


def test_the_scenarios_do_what_their_names_say(ranks, tmp_path):
    results, states = ranks[0]
    terms = [{name.removeprefix("loss_") for name in e if "loss_" in name} for e in results["scheduled"]["logs"]]
    names = set(distributed_run.MEANS)
    assert terms == [names - {"hidden"}, names, names]
    initial = distributed_run.build(tmp_path, **distributed_run.MORE["inner"], **WHOLE)[0].model.state_dict()
    moved = {name for name, tensor in states["inner"].items() if not torch.equal(tensor, initial[name])}
    assert {name for name in initial if name not in moved} == {name for name in initial if "classifier" in name}
    assert {name.split(".")[2] for name in moved if name.startswith("objective.")} == {"hidden", "pkd", "fsp"}


def test_projections_start_by_the_same_least_squares_as_in_one_process(ranks, more_single):
    """After two logged steps of a small learning rate they still explain what random ones do not."""
    fitted, random = ranks[0][0]["fitted"]["logs"][0], ranks[0][0]["plain"]["logs"][0]
    assert fitted["loss_hidden"] < 0.8 * random["loss_hidden"]
    assert fitted["loss_hidden"] == pytest.approx(more_single["fitted"]["logs"][0]["loss_hidden"], rel=1e-4)


def test_balance_and_gradient_norms_are_the_same_on_both_ranks_and_near_one_process(ranks, more_single):
    """Near: the norms are those of the first micro-batch, which on the first rank has no label."""
    names = [f"{kind}_{term}" for kind in ("gradient_norm", "weight") for term in ALL_WEIGHTS]
    for entry, whole in zip(ranks[0][0]["balanced"]["logs"], more_single["balanced"]["logs"], strict=True):
        for name in names:
            assert 0.3 < entry[name] / whole[name] < 3, name
    states = [rank[1]["balanced"] for rank in ranks]
    assert largest_difference(*states) == 0
    assert states[0]["objective.balance.factors"].ne(1).all()


def test_only_the_first_rank_writes(ranks):
    writes = [results["writes"] for results, _ in ranks]
    assert writes[0] > 0
    assert writes[1] == 0


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
