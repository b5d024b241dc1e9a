"""`DistillationTrainer`: a stock `transformers.Trainer` whose model carries its own distillation objective."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.trainer_utils import load_sharded_checkpoint
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from distill_nlp.arguments import DistillationArguments
from distill_nlp.losses.base import IGNORE_INDEX, DistillationLoss
from distill_nlp.modeling import DistillationModel, accepted_arguments
from distill_nlp.objective import DistillationObjective, Shares
from distill_nlp.outputs import DistillationOutput
from distill_nlp.teacher import Teacher

logger = logging.getLogger(__name__)

OBJECTIVE_WEIGHTS_NAME = "objective.safetensors"


class DistillationTrainer(Trainer):
    """Trains a student on a teacher's answers and features; used as any `Trainer`.

    `evaluate` and `predict` give the student's plain task loss and metrics; the teacher does not run. `save_model`
    leaves a plain checkpoint of the student; training checkpoints also hold the projections. `trainer.student` is the
    bare student, `trainer.model` the `DistillationModel` around it.

    The loss of a step is the mean over its global batch, however that is cut into micro-batches and ranks. Each term is
    logged as `loss_<name>`, unweighted: the mean of that over the steps of the logging window.

    Args:
        model: the student.
        teacher: the fine-tuned teacher; None where no loss needs one.
        losses: name -> loss.
        loss_weights: name -> factor; 1 where not given, 0 leaves the loss out.
        args: `DistillationArguments` (or plain `TrainingArguments`).
        **kwargs: everything else that `Trainer` takes.

    Raises:
        ValueError: losses that do not fit the two models, models that do not fit each other, or several GPUs in one
            process.

    Example:
        >>> trainer = DistillationTrainer(
        ...     model=student, teacher=teacher, losses={"ce": CrossEntropyLoss(), "kl": KLDivergenceLoss()},
        ...     loss_weights={"ce": 0.3, "kl": 0.7}, args=args, train_dataset=train, processing_class=tokenizer,
        ... )
        >>> trainer.train()
    """

    # compute_loss returns parts of the global batch's mean; the Trainer must not divide them once more.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None = None,
        losses: dict[str, DistillationLoss] | None = None,
        loss_weights: dict[str, float] | None = None,
        args: DistillationArguments | None = None,
        **kwargs: Any,
    ) -> None:
        for unsupported in ("model_init", "compute_loss_func"):
            if kwargs.get(unsupported) is not None:
                raise ValueError(f"DistillationTrainer does not take {unsupported}: pass model= and losses= instead")
        if args is None:
            args = DistillationArguments(output_dir="distilled_student")
        if args.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor would be ignored: use losses={'ce': CrossEntropyLoss(label_smoothing=...)}"
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process would be DataParallel, which cannot split the teacher's features; "
                "start with `accelerate launch`, or show one GPU by CUDA_VISIBLE_DEVICES=0"
            )
        objective = DistillationObjective(losses or {}, loss_weights)
        if objective.needs_teacher and teacher is None:
            needing = [name for name, loss in objective.losses.items() if loss.needs_teacher]
            raise ValueError(f"losses {', '.join(needing)} need a teacher; pass teacher=")
        if objective.needs_teacher and not set(model.parameters()).isdisjoint(teacher.parameters()):
            raise ValueError("the student and the teacher share parameters, which would be frozen; pass a copy of one")
        # The Trainer seeds itself only later; the projections are drawn here.
        set_seed(args.seed)
        wrapped = DistillationModel(model, objective, teacher.config if objective.needs_teacher else None)
        # Before the Trainer looks at the columns of the data: the teacher's inputs count as used.
        self.teacher = Teacher(teacher, model.config, objective) if objective.needs_teacher else None
        super().__init__(model=wrapped, args=args, **kwargs)
        # A micro-batch's own length would be wrong on the Trainer's older path, which divides where this is False.
        self.model_accepts_loss_kwargs = True
        if self.teacher is not None:
            self.teacher.model.to(self.args.device)
        self._term_sums: dict[str, torch.Tensor] = {}
        self._term_steps = 0
        self._saving_checkpoint = False
        logger.info("objective: %s", objective.formula())

    @property
    def student(self) -> nn.Module:
        """The bare student."""
        return self._distillation_model.student

    @property
    def objective(self) -> DistillationObjective:
        """The losses with their projections."""
        return self._distillation_model.objective

    @property
    def _distillation_model(self) -> DistillationModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # ---- one step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """Collects the micro-batches of a step, and counts rows and labeled rows of the global batch."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        self._term_steps += bool(batches)
        counts = torch.zeros(2, device=device)
        for batch in batches:
            counts = counts + self._count_rows(batch).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return batches, counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, DistillationOutput]:
        """In training the objective's part of the global batch's mean, in evaluation the plain task loss."""
        if not model.training:
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

        teacher_features = None
        if self.teacher is not None:
            with self.accelerator.autocast():
                teacher_features = self.teacher(inputs)
        shares: Shares | None = None
        if num_items_in_batch is not None:
            # DDP averages gradients over ranks, so that a rank's share is of the mean over its own part of the sum.
            rows = self._count_rows(inputs) * self.args.world_size / num_items_in_batch.clamp(min=1)
            shares = {"rows": rows[0], "labeled_rows": rows[1]}
        outputs = model(teacher=teacher_features, shares=shares, **inputs)
        for name, value in outputs.terms.items():
            self._term_sums[name] = self._term_sums.get(name, 0.0) + value
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _count_rows(self, batch: dict[str, Any]) -> torch.Tensor:
        """(rows, labeled rows) of one batch, on its device."""
        labels = batch.get("labels")
        if labels is None:
            some_input = next(v for v in batch.values() if isinstance(v, torch.Tensor))
            return torch.tensor([float(len(some_input)), 0.0], device=some_input.device)
        labeled = (labels.view(len(labels), -1) != IGNORE_INDEX).all(dim=1)
        return torch.stack([torch.full_like(labeled, 1, dtype=torch.float32).sum(), labeled.sum().float()])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each term since the last log, over ranks; the one place that reads them off the device."""
        if "loss" in logs and self._term_sums:
            names = list(self._term_sums)
            means = torch.stack([self._term_sums[name] for name in names]) / self._term_steps
            if self.args.world_size > 1:
                means = self.accelerator.reduce(means, reduction="mean")
            logs.update({f"loss_{name}": value for name, value in zip(names, means.tolist(), strict=True)})
            self._term_sums, self._term_steps = {}, 0
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._term_sums, self._term_steps = {}, 0
        return super().train(*args, **kwargs)

    # ---- data and optimizer ----

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the columns that either model takes: a BERT teacher reads token_type_ids, its DistilBERT does not."""
        if self._signature_columns is not None:
            return
        models = [self.student] + ([self.teacher.model] if self.teacher is not None else [])
        columns: set[str] = set()
        for model in models:
            accepted = accepted_arguments(model)
            # A model that takes anything takes what its tokenizer makes.
            columns |= set(getattr(self.processing_class, "model_input_names", [])) if accepted is None else accepted
        self._signature_columns = sorted(columns | {"labels", "label", "label_ids"} | set(self.label_names))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer; the projections in groups of their own where they have their own learning rate."""
        optimizer = super().create_optimizer(model)
        rate = getattr(self.args, "projection_learning_rate", None)
        if rate is not None and not self.is_deepspeed_enabled:
            projections = {id(p) for n, p in (model or self.model).named_parameters() if n.startswith("objective.")}
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in projections]
                if own:
                    group["params"] = [p for p in group["params"] if id(p) not in projections]
                    optimizer.add_param_group(
                        {k: v for k, v in group.items() if k != "params"} | {"params": own, "lr": rate}
                    )
        return optimizer

    # ---- saving and loading ----

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._saving_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the bare student as any Transformers checkpoint, and into training checkpoints the objective too.

        Unlike the Trainer's own, it writes no `training_args.bin`: that is a pickle, and it holds paths and tokens.
        """
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        model = self._distillation_model
        student_state, objective_state = model.split_state_dict(state_dict or model.state_dict())
        os.makedirs(output_dir, exist_ok=True)
        if isinstance(self.student, PreTrainedModel):
            self.student.save_pretrained(output_dir, state_dict=student_state)
        else:
            student_state = {k: v.detach().cpu().clone().contiguous() for k, v in student_state.items()}
            save_file(student_state, os.path.join(output_dir, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        if self._saving_checkpoint and objective_state:
            objective_state = {k: v.detach().cpu().contiguous() for k, v in objective_state.items()}
            save_file(objective_state, os.path.join(output_dir, OBJECTIVE_WEIGHTS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_weights(self.state.best_model_checkpoint)

    def _load_weights(self, folder: str) -> None:
        """The one loader, strict: the Trainer's own ignores keys that match nothing, and all would, unprefixed.

        Raises:
            ValueError: weights are missing in the folder, or belong to another student or other losses.
        """
        weights = os.path.join(folder, SAFE_WEIGHTS_NAME)
        objective_weights = os.path.join(folder, OBJECTIVE_WEIGHTS_NAME)
        try:
            if os.path.isfile(weights):
                load_model(self.student, weights, strict=True)
            elif os.path.isfile(os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)):
                load_sharded_checkpoint(self.student, folder, strict=True)
            else:
                raise ValueError(f"no {SAFE_WEIGHTS_NAME} there")
            if os.path.isfile(objective_weights):
                self.objective.load_state_dict(load_file(objective_weights), strict=True)
            elif self.objective.state_dict():
                raise ValueError(f"no {OBJECTIVE_WEIGHTS_NAME} there; it was saved by `save_model`, not by training")
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"cannot load the checkpoint {folder}: {error}") from error
