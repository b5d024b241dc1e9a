"""What is kept of each term between two log entries."""

import json
import logging

import torch

from distill_nlp.terms import TermLog


def same(tensor):
    return tensor


def test_a_term_is_the_mean_over_the_steps_in_which_it_was_computed():
    terms = TermLog()
    terms.begin_step(["a", "b"])
    for value in (1.0, 2.0):  # two micro-batches of one step
        terms.add("a", torch.tensor(value))
        terms.add("b", torch.tensor(10.0))
    terms.begin_step(["a"])
    terms.add("a", torch.tensor(5.0))
    assert terms.read(same) == {"loss_a": 4.0, "loss_b": 20.0}


def test_small_parts_in_bfloat16_add_up():
    """As FSDP gives them: a sum in bfloat16 would end at 256."""
    terms = TermLog()
    for _ in range(1000):
        terms.begin_step(["a"])
        terms.add("a", torch.tensor(1.0, dtype=torch.bfloat16))
    assert terms.state()["sums"] == {"a": 1000.0}


def test_reading_begins_anew():
    terms = TermLog()
    terms.begin_step(["a"])
    terms.add("a", torch.tensor(3.0))
    terms.add_norm("a", torch.tensor(7.0))
    assert terms.read(same) == {"loss_a": 3.0, "gradient_norm_a": 7.0}
    assert terms.read(same) == {}
    terms.begin_step(["a"])
    terms.add("a", torch.tensor(5.0))
    assert terms.read(same) == {"loss_a": 5.0}


def test_norms_are_a_mean_over_measurements():
    terms = TermLog()
    for norm in (1.0, 2.0):
        terms.begin_step(["a"])
        terms.add("a", torch.tensor(1.0))
        terms.add_norm("a", torch.tensor(norm))
    assert terms.read(same)["gradient_norm_a"] == 1.5


def test_ranks_are_asked_once_for_all_entries():
    calls = []

    def reduce(tensor):
        calls.append(tensor)
        return tensor * 2

    terms = TermLog()
    terms.begin_step(["a", "b"])
    terms.add("a", torch.tensor(1.0))
    terms.add("b", torch.tensor(2.0))
    terms.add_norm("b", torch.tensor(3.0))
    assert terms.read(reduce) == {"loss_a": 2.0, "loss_b": 4.0, "gradient_norm_b": 6.0}
    assert len(calls) == 1


def test_no_graph_is_kept():
    value = torch.ones((), requires_grad=True) * 2
    terms = TermLog()
    terms.begin_step(["a"])
    terms.add("a", value)
    assert not any(total.requires_grad for total in terms._sums.values())


def test_a_term_that_is_zero_is_named_once(caplog):
    terms = TermLog()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            terms.begin_step(["a", "b"])
            terms.add("a", torch.tensor(0.0))
            terms.add("b", torch.tensor(1e-30))
            terms.read(same)
    assert ["the loss 'a' is exactly zero" in record.message for record in caplog.records] == [True]


def test_an_open_window_goes_on_from_numbers():
    one = TermLog()
    one.begin_step(["a"])
    one.add("a", torch.tensor(1 / 3))
    one.add_norm("a", torch.tensor(0.1))
    # As JSON, which a checkpoint holds.
    other = TermLog()
    other.restore(json.loads(json.dumps(one.state())), "cpu")
    for terms in (one, other):
        terms.begin_step(["a"])
        terms.add("a", torch.tensor(0.7))
        terms.add_norm("a", torch.tensor(0.3))
    assert one.read(same) == other.read(same)
