"""What the stages of an experiment share: whether one is done, where it lies, and how a training is set up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from distill_nlp.arguments import DistillationArguments
from distill_nlp.config import Experiment
from distill_nlp.errors import UsageError
from distill_nlp.materials import Materials
from distill_nlp.stage_training import Say, TrainingJob
from distill_nlp.stages import Fingerprint, StageFolder, few_of
from distill_nlp.teacher_parts import TeacherPart
from distill_nlp.tokenization import with_segments
from distill_nlp.training_rows import StreamedRows, validation_rows


class StageRunner:
    """Every rank of a distributed launch runs the same code; the main one writes and speaks.

    Args:
        experiment: validated settings.
        materials: of the experiment.
        say: gets one line for the user at each event; called on the main rank only.
    """

    def __init__(self, experiment: Experiment, materials: Materials, say: Say) -> None:
        self.experiment = experiment
        self.materials = materials
        self.root = Path(experiment.output_dir).expanduser()
        self.state = PartialState(cpu=experiment.training.use_cpu)
        # Of every training, beside those of the stage itself.
        self.callbacks: list[TrainerCallback] = []
        # As they are kept with the run; none before all of them are decided.
        self.run_settings: dict[str, Any] = {}
        self.tell = say

    def say(self, stage: str, line: str) -> None:
        """One line for the user, from the main rank."""
        if self.state.is_main_process:
            self.tell(f"{stage:<20} {line}")

    def is_done(self, folder: StageFolder, fingerprint: Fingerprint, name: str) -> bool:
        """Whether the stage can be left out; says so, and why not where settings changed. The same on all ranks."""
        # One rank looks: two could see the folder at different moments, and one train while the other leaves.
        changes = broadcast_object_list([folder.changes(fingerprint)])[0]
        if changes == []:
            if self.state.is_main_process:
                folder.tidy()
            self.say(name, f"done already: {folder.path}")
            return True
        if changes:
            self.say(name, f"settings changed, so it is done again ({few_of(changes)})")
        return False

    def finished(self, path: Path, fingerprint: Fingerprint, stage: str) -> Path:
        """The folder of a stage that is finished with just these settings.

        Raises:
            UsageError: it is not finished, or was made with other settings.
        """
        changes = StageFolder(path).changes(fingerprint)
        if changes is None:
            raise UsageError(
                f"there is no finished {stage} in {path}; run the stage {stage} first (distill-nlp run CONFIG --stages "
                f"{stage})"
            )
        if changes:
            raise UsageError(
                f"the {stage} in {path} was made with other settings ({'; '.join(changes[:3])}); run the stage {stage} "
                "again, or go back to its settings"
            )
        return path

    def _of_a_stream(self, arguments: DistillationArguments, has_teacher: bool) -> str:
        evaluated = "not evaluated in training"
        if arguments.eval_strategy == IntervalStrategy.STEPS:
            evaluated = f"evaluated every {arguments.eval_steps:g} of {arguments.max_steps:,} steps"
        live = f"; the teacher runs in every step: {self.materials.live_because}" if has_teacher else ""
        return f"rows are streamed, {evaluated}{live}"

    def job(
        self, name: str, folder: StageFolder, fingerprint: Fingerprint, reader: TeacherPart | None = None, **parts: Any
    ) -> TrainingJob:
        """A training, on the tokens of this teacher, else on the student's."""
        materials = self.materials
        _ = materials.readers
        tokenizer = materials.tokenizer if reader is None else reader.tokenizer
        if "text_pair" in materials.splits.train.features:
            tokenizer = with_segments(tokenizer, parts["model"])
        if isinstance(parts["train"], StreamedRows):
            parts["train"], parts["arguments"] = parts["train"].for_training(parts["arguments"])
            self.say(name, self._of_a_stream(parts["arguments"], parts.get("teacher") is not None))
        return TrainingJob(
            name=name,
            folder=folder,
            fingerprint=fingerprint,
            validation=validation_rows(materials, reader),
            tokenizer=tokenizer,
            max_length=self.experiment.data.max_length if reader is None else reader.max_length,
            callbacks=self.callbacks,
            **parts,
        )
