"""`DistillationTrainer`: a stock `transformers.Trainer` whose model carries its own distillation objective."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, set_seed

from distill_nlp.arguments import DistillationArguments, refuse_data_parallel, setting_of
from distill_nlp.capture import enable_quick_attention
from distill_nlp.checkpoints import load_weights, save_objective, save_student
from distill_nlp.collation import DistillationCollator
from distill_nlp.combinations import refuse_layer_decay, refuse_untrained_projections, refuse_where_sharded
from distill_nlp.ensemble import TeacherEnsemble
from distill_nlp.gradient_meter import GradientMeter
from distill_nlp.labels import check_data_labels
from distill_nlp.losses.base import IGNORE_INDEX, DistillationLoss
from distill_nlp.modeling import DistillationModel, accepted_arguments, autocast_of, bare_model
from distill_nlp.objective import DistillationObjective, Shares
from distill_nlp.outputs import DistillationOutput
from distill_nlp.parameter_groups import Freezing, layer_factors, scale_by_layer
from distill_nlp.projections import fit_projections, projected_losses, separate_projections
from distill_nlp.row_order import OrderedTrainer
from distill_nlp.sample_batches import sample_batches
from distill_nlp.schedules import Setting
from distill_nlp.teacher import TEACHER_PREFIX, CachedTeacher, Teacher, bind_teacher
from distill_nlp.terms import FormulaPrinter


class DistillationTrainer(OrderedTrainer):
    """Trains a student on a teacher's answers and features; used as any `Trainer`.

    `evaluate` and `predict` give the student's plain task loss and metrics; the teacher does not run. `save_model`
    leaves a plain checkpoint of the student; training checkpoints also hold the projections. `trainer.student` is the
    bare student, `trainer.model` the `DistillationModel` around it.

    The loss of a step is the mean over its global batch, however that is cut into micro-batches and ranks. Each term is
    logged as `loss_<name>`, unweighted: the mean of that over the steps of the logging window in which it was computed;
    weights that change are logged as `weight_<name>`.

    Args:
        model: the student.
        teacher: the fine-tuned teacher; a `Teacher` where it reads tokens of its own or has more labels; a
            `TeacherEnsemble`; a `CachedTeacher`; None where no loss needs one.
        losses: name -> loss.
        loss_weights: name -> factor, or a schedule such as `{"schedule": "linear", "start": 1.0, "end": 0.0}` (see
            `schedules.build_schedule`); 1 where not given, 0 leaves the loss out.
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
        teacher: nn.Module | Teacher | TeacherEnsemble | CachedTeacher | None = None,
        losses: dict[str, DistillationLoss] | None = None,
        loss_weights: dict[str, Setting] | None = None,
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
        refuse_data_parallel(args)
        balance = setting_of(args, "loss_balancing") != "none"
        objective = DistillationObjective(losses or {}, loss_weights, balance)
        if objective.needs_teacher and teacher is None:
            needing = [name for name, loss in objective.losses.items() if loss.needs_teacher]
            raise ValueError(f"losses {', '.join(needing)} need a teacher; pass teacher=")
        if objective.needs_teacher and not set(model.parameters()).isdisjoint(teacher.parameters()):
            raise ValueError("the student and the teacher share parameters, which would be frozen; pass a copy of one")
        refuse_layer_decay(args, model, kwargs.get("optimizers", (None, None))[0] is not None)
        self._freezing = Freezing(model, setting_of(args, "freeze"), setting_of(args, "unfreeze_every"))
        if args.device.type == "cpu":
            enable_quick_attention(bare_model(model))
        # The Trainer seeds itself only later; the projections are drawn here.
        set_seed(args.seed)
        teacher_config = teacher.config if objective.needs_teacher else None
        # What DDP, FSDP or a compiler wrap: to unwrap theirs anew in each step takes longer than it looks.
        self._distillation_model = wrapped = DistillationModel(model, objective, teacher_config)
        refuse_untrained_projections(kwargs.get("optimizers", (None, None))[0], objective)
        # Before the Trainer looks at the columns of the data: the teacher's inputs count as used.
        student_config = getattr(model, "config", None)
        self.teacher = bind_teacher(teacher, student_config, objective) if objective.needs_teacher else None
        if self.teacher is not None and self.teacher.tokenizers and kwargs.get("data_collator") is None:
            kwargs["data_collator"] = DistillationCollator(kwargs.get("processing_class"), self.teacher.tokenizers)
        if isinstance(self.teacher, CachedTeacher):
            kwargs["train_dataset"] = self.teacher.quick_to_read(kwargs.get("train_dataset"))
        if student_config is not None:
            check_data_labels(kwargs.get("train_dataset"), student_config)
        super().__init__(model=wrapped, args=args, **kwargs)
        # A micro-batch's own length would be wrong on the Trainer's older path, which divides where this is False.
        self.model_accepts_loss_kwargs = True
        if self.teacher is not None:
            self.teacher.prepare(self.args.device, self.train_dataset)
        if self.train_dataset is not None and setting_of(self.args, "unlabeled_ratio") is not None:
            self._get_train_sampler()  # refuses data that it cannot serve; of a stream, the Trainer would never ask
        self._begin_training()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            refuse_where_sharded(self.args, objective, self.accelerator, measures=self._meter.every > 0)
        if self.args.torch_compile and self._meter.every:
            # Else a compiled backward gives its buffers away, and the gradient of the next term finds none.
            torch._functorch.config.donated_buffer = False
        self._fitted = False
        self.add_callback(FormulaPrinter(objective.formula))
        if (patience := setting_of(self.args, "early_stopping_patience")) is not None:
            self.add_callback(EarlyStoppingCallback(patience, setting_of(self.args, "early_stopping_threshold")))

    def _begin_training(self) -> None:
        self._freezing.begin()
        self._begin_checks()
        every = setting_of(self.args, "term_gradient_norm_steps")
        self._meter = GradientMeter(self.objective, self.student, every, self.terms, self.accelerator)

    @property
    def student(self) -> nn.Module:
        """The bare student."""
        return self._distillation_model.student

    @property
    def objective(self) -> DistillationObjective:
        """The losses with their projections."""
        return self._distillation_model.objective

    # ---- one step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """Begins a step: collects its micro-batches, and counts rows and labeled rows of the global batch."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        if batches:
            self._meter.begin_step(self.state.global_step, self.state.max_steps)
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
        asked, inputs = inputs, {name: x for name, x in inputs.items() if not name.startswith(TEACHER_PREFIX)}
        if not model.training:
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

        teacher_features = None
        if self.teacher is not None and self.objective.needs_teacher_now:
            with autocast_of(self.accelerator):
                teacher_features = self.teacher(asked)
        shares: Shares | None = None
        if num_items_in_batch is not None:
            # DDP averages gradients over ranks, so that a rank's share is of the mean over its own part of the sum.
            rows = self._count_rows(inputs) * self.args.world_size / num_items_in_batch.clamp(min=1)
            shares = {"rows": rows[0], "labeled_rows": rows[1]}
        outputs = model(teacher=teacher_features, shares=shares, keep_graph=self._meter.due, **inputs)
        teacher_logits = None if teacher_features is None else teacher_features.logits
        self.nonfinite.add(self.state.global_step, outputs.terms, outputs.logits, teacher_logits)
        for name, value in outputs.terms.items():
            self.terms.add(name, self.nonfinite.take(value))
        if self._meter.due:
            self._meter.take(outputs.terms, shares, self._freezing.held(self.state.global_step))
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer.training_step`; what is frozen for now has no gradient that could be clipped or applied."""
        loss = super().training_step(*args, **kwargs)
        self._freezing.drop_gradients(self.state.global_step)
        return self.nonfinite.take(loss)

    def _count_rows(self, batch: dict[str, Any]) -> torch.Tensor:
        """(rows, labeled rows) of one batch, on its device."""
        labels = batch.get("labels")
        if labels is None:
            some_input = next(v for v in batch.values() if isinstance(v, torch.Tensor))
            counts = torch.zeros(2, device=some_input.device)
            # Filled where it lies: a copy from the host would wait for the device.
            counts[0].fill_(len(some_input))
            return counts
        labeled = (labels.view(len(labels), -1) != IGNORE_INDEX).all(dim=1)
        return torch.stack([torch.full_like(labeled, 1, dtype=torch.float32).sum(), labeled.sum().float()])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what became of each term since the last log, over ranks."""
        if "loss" in logs:
            several = self.args.world_size > 1
            logs.update(self.terms.read(lambda x: self.accelerator.reduce(x, reduction="mean") if several else x))
            weights = self.objective.current_weights()
            logs.update({f"weight_{name}": weight.item() for name, weight in weights.items()})
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; projections that start by least squares are fitted before the first step, once."""
        self._begin_training()
        if not (resume_from_checkpoint or self._fitted) and projected_losses(self.objective):
            several, device = self.args.world_size > 1, self.args.device
            fit_projections(
                self._distillation_model,
                self.teacher,
                sample_batches(self, setting_of(self.args, "projection_init_batches")),
                lambda x: self.accelerator.reduce(x.to(device), reduction="sum").cpu() if several else x,
            )
        self._fitted = True
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._freezing.end()

    # ---- data and optimizer ----

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the columns that either model takes: a BERT teacher reads token_type_ids, its DistilBERT does not."""
        if self._signature_columns is not None:
            return
        columns: set[str] = set()
        for accepted in [accepted_arguments(self.student)] + ([self.teacher.accepted] if self.teacher else []):
            # A model that takes anything takes what its tokenizer makes.
            columns |= set(getattr(self.processing_class, "model_input_names", [])) if accepted is None else accepted
        self._signature_columns = sorted(columns | {"labels", "label", "label_ids"} | set(self.label_names))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer; blocks and projections in groups of their own where they have rules of their own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        layer_decay = setting_of(self.args, "layer_learning_rate_decay")
        if is_new and layer_decay != 1.0:
            scale_by_layer(optimizer, layer_factors(self.student, layer_decay))
        factor = setting_of(self.args, "projection_learning_rate_factor")
        decay = setting_of(self.args, "projection_weight_decay")
        if is_new and (factor != 1.0 or decay is not None):
            named = (model or self.model).named_parameters()
            projections = {parameter for name, parameter in named if ".objective." in f".{name}"}
            separate_projections(optimizer, projections, factor, decay, self.args.weight_decay)
        return optimizer

    # ---- saving and loading ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the bare student as any Transformers checkpoint, and into training checkpoints the objective too.

        Unlike the Trainer's own, it writes no `training_args.bin`: that is a pickle, and it holds paths and tokens.
        """
        if not self.args.should_save:
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        model = self._distillation_model
        state_dict = model.state_dict() if state_dict is None else state_dict
        student_state, objective_state = model.split_state_dict(state_dict)
        save_student(self.student, student_state, output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        if self._saving_checkpoint:
            save_objective(objective_state, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.student, self.objective, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_weights(self.student, self.objective, self.state.best_model_checkpoint)
