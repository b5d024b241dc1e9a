"""Rows outside of training: predictions in their order, evaluations by length, and of the data that were asked for."""

import numpy as np
import pytest
import torch
from helpers import make_dataset, make_student, make_tokenizer

GROUPED = {"train_sampling_strategy": "group_by_length"}


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_predictions_come_in_the_order_of_the_rows(make_trainer, strategy):
    """Under `group_by_length` the stock Trainer gives them shuffled."""
    data, student = make_dataset(16), make_student(dropout=0.0)
    assert len({len(row["input_ids"]) for row in data}) > 1
    trainer = make_trainer("run", student=student, train_sampling_strategy=strategy, per_device_eval_batch_size=4)
    found = trainer.predict(data)
    student.eval()
    with torch.no_grad():
        expected = [student(input_ids=torch.tensor([row["input_ids"]])).logits[0].numpy() for row in data]
    np.testing.assert_allclose(found.predictions, expected, atol=1e-5)
    assert found.label_ids.tolist() == list(data["labels"])


def lengths_of(loader) -> list[int]:
    return [n for batch in loader for n in batch["attention_mask"].sum(dim=1).tolist()]


def test_evaluations_take_the_longest_rows_first_under_group_by_length(make_trainer):
    data = make_dataset(16)
    trainer = make_trainer("run", eval_dataset=data, per_device_eval_batch_size=4, **GROUPED)
    expected = sorted((len(row["input_ids"]) for row in data), reverse=True)
    assert lengths_of(trainer.get_eval_dataloader()) == expected
    trainer.predict(data)
    assert lengths_of(trainer.get_eval_dataloader()) == expected
    # Whatever the order, the metrics are of the same rows.
    plain = make_trainer("plain", eval_dataset=data).evaluate()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)


def test_data_without_columns_are_evaluated_as_they_stand(make_trainer):
    rows = make_dataset(16).to_list()
    trainer = make_trainer("run", data=rows, eval_dataset=rows, per_device_eval_batch_size=4, **GROUPED)
    assert lengths_of(trainer.get_eval_dataloader()) == [len(row["input_ids"]) for row in rows]


def test_workers_that_persist_serve_the_trainers_own_data_alone(make_trainer):
    """The stock Trainer gives the loader of the first data to any others."""
    own, other = make_dataset(8, seed=4), make_dataset(12, seed=9)
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make_trainer("run", eval_dataset=own, processing_class=make_tokenizer(), **workers)
    expected = {len(data): make_trainer(f"plain-{len(data)}").evaluate(data)["eval_loss"] for data in (own, other)}
    assert expected[8] != pytest.approx(expected[12])
    # The other first, between, and last.
    for data in (other, None, other, None, other):
        found = trainer.evaluate(data)["eval_loss"]
        assert found == pytest.approx(expected[len(own if data is None else data)])
    assert trainer.get_eval_dataloader() is trainer.get_eval_dataloader()
    # Accelerate keeps every loader: the others' workers would stay for good.
    kept = [loader.persistent_workers for loader in trainer.accelerator._dataloaders]
    assert kept.count(True) == 1
    assert not trainer.get_test_dataloader(other).persistent_workers
    assert trainer.args.dataloader_persistent_workers
