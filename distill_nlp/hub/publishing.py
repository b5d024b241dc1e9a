"""`push_to_hub` of a trainer: the student by the allow-list, with its card, and not what training left beside it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from distill_nlp.hub.card import RECIPE, CardFacts, model_card
from distill_nlp.hub.client import commit, create_repository
from distill_nlp.hub.files import CARD, HubFile, checked, student_files
from distill_nlp.hub.private import Private, hub_name, is_local_path
from distill_nlp.losses.base import MULTI_LABEL, ModelShape

logger = logging.get_logger(__name__)


class PublishingTrainer(Trainer):
    """A Trainer whose pushes hold config, weights, tokenizer and card of the student, and nothing else.

    The stock one sends its whole output folder, `training_args.bin` and logs included, and with `hub_strategy`
    "checkpoint" the optimizer's state. Here that strategy sends the student of each checkpoint alone; a training is
    continued from its own folder. A new repository is private unless `hub_private_repo` is False.
    """

    @cached_property
    def _hub(self) -> HfApi:
        # One for all pushes: those in the background wait for each other in it.
        return HfApi(token=self.args.hub_token)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository `args.hub_model_id`, private unless told otherwise."""
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        private = self.args.hub_private_repo if private is None else private
        wanted = True if private is None else private
        api = HfApi(token=token) if token else self._hub
        self.hub_model_id, is_private = create_repository(api, name, wanted, logger.warning)
        if wanted and not is_private:
            logger.warning(f"{self.hub_model_id} was there already, and is public: anyone can see what is pushed")
        self.push_in_progress = None

    def create_model_card(self, *arguments: Any, **settings: Any) -> None:
        """Writes README.md into the output folder; takes `language`, `license`, `model_name`, `dataset` of a Trainer's.

        Raises:
            ValueError: something private would stand in it.
        """
        if self.is_world_process_zero():
            card = self._card(*arguments, **settings)
            Path(self.args.output_dir, CARD).write_bytes(card.content)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | Future | None:
        """Sends the student to `args.hub_model_id`, in one commit.

        Args:
            commit_message: its first line.
            blocking: wait until it is done.
            token: instead of `args.hub_token`.
            revision: branch, made where it is missing; else `args.hub_revision`, else main.
            private: of a new repository; private where neither this nor `args.hub_private_repo` says otherwise.
            **kwargs: of the card: `language`, `license`, `model_name`, `dataset`.

        Returns:
            The address of the commit; a `Future` of it where not `blocking`; None on other ranks.

        Raises:
            ValueError: a file holds a token or a local path that cannot be taken out.
            HfHubHTTPError: the Hub refuses, or fails after several tries.

        Example:
            >>> trainer.push_to_hub(license="apache-2.0", language="en")
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        files = self._files(Path(self.args.output_dir))
        files.append(HubFile(CARD, Path(self.args.output_dir, CARD).read_bytes()))
        self._finish_current_push()
        api = HfApi(token=token) if token else self._hub
        revision = revision or self.args.hub_revision
        message = commit_message or "End of training"
        what = (api, self.hub_model_id, files, message, revision, logger.warning)
        return commit(*what) if blocking else api.run_as_future(commit, *what)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Sends the student of a checkpoint in the background, unless the last one is still on its way."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # The checkpoint may be deleted before it is sent: the links keep its files.
        kept = tempfile.TemporaryDirectory(prefix=".push-", dir=self.args.output_dir, ignore_cleanup_errors=True)
        try:
            link_files(Path(checkpoint_folder), Path(kept.name))
            files = [*self._files(Path(kept.name)), self._card()]
            prefix = {HubStrategy.CHECKPOINT: "last-checkpoint/"}.get(strategy, f"{Path(checkpoint_folder).name}/")
            if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                files += self._files(Path(kept.name), prefix)
        except BaseException:
            kept.cleanup()
            raise
        message = f"Training in progress, step {self.state.global_step}"
        revision = self.args.hub_revision
        job = self._hub.run_as_future(commit, self._hub, self.hub_model_id, files, message, revision, logger.warning)
        job.add_done_callback(lambda done: _clean_up(done, kept))
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress([job])
        else:
            self.push_in_progress.jobs.append(job)

    def _private(self) -> Private:
        tokens = (self.args.hub_token, self._hub.token if isinstance(self._hub.token, str) else None, get_token())
        return Private([self.args.output_dir], tokens)

    def _files(self, folder: Path, prefix: str = "") -> list[HubFile]:
        return student_files(folder, self._private(), prefix)

    def _card(
        self,
        language: str | Sequence[str] | None = None,
        license: str | None = None,
        tags: Any = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: Any = None,
        dataset_tags: Any = None,
        dataset: str | None = None,
        dataset_args: Any = None,
    ) -> HubFile:
        """Takes what the stock Trainer's takes; its tags, tasks and their arguments are not used."""
        config = getattr(self.student, "config", None)
        teacher_config = getattr(self.teacher, "config", None)
        evaluations = [entry for entry in self.state.log_history if "eval_loss" in entry]
        skipped = ("runtime", "per_second")
        validation = {
            name.removeprefix("eval_"): float(value)
            for name, value in (evaluations[-1] if evaluations else {}).items()
            if name.startswith("eval_") and not name.endswith(skipped) and isinstance(value, int | float)
        }
        origin = finetuned_from or getattr(config, "_name_or_path", None)
        repo = self.hub_model_id or self.args.hub_model_id
        is_adapter = hasattr(self.student, "peft_config")
        facts = CardFacts(
            name=model_name or (repo or Path(self.args.output_dir).absolute().name).rpartition("/")[2],
            labels=[str(name) for _, name in sorted(getattr(config, "id2label", {}).items())],
            several_labels=config is not None and ModelShape.from_config(config).problem_type == MULTI_LABEL,
            repo_id=repo,
            loads_by_auto_classes=config is not None,
            library="peft" if is_adapter else "transformers",
            base_model=hub_name(origin or None),
            teacher=_teacher_name(teacher_config),
            dataset=hub_name(dataset),
            dataset_name=dataset if dataset and not is_local_path(dataset) else None,
            languages=[language] if isinstance(language, str) else list(language or ()),
            license=license,
            objective=self.objective.formula(),
            recipe={name: _value(getattr(self.args, name)) for name in (*RECIPE, "seed") if hasattr(self.args, name)},
            parameters=sum(p.numel() for p in self.student.parameters()),
            validation=validation,
            versions={
                package: sys.modules[package].__version__ for package in ("distill_nlp", "torch", "transformers")
            },
        )
        return checked(HubFile(CARD, model_card(facts).encode()), self._private())


def link_files(folder: Path, into: Path) -> None:
    """Hard links of the files of a folder; copies where the file system has none."""
    for path in folder.iterdir():
        if path.is_file() and path.suffix in (".json", ".safetensors", ".txt", ".model", ".codes"):
            try:
                os.link(path, into / path.name)
            except OSError:
                shutil.copy(path, into / path.name)


def _clean_up(done: Future, kept: tempfile.TemporaryDirectory) -> None:
    kept.cleanup()
    if not done.cancelled() and (error := done.exception()) is not None:
        # Training goes on; else nobody would hear of it.
        logger.warning(f"a checkpoint was not pushed: {str(error).strip().splitlines()[0]}")


def _teacher_name(config: Any) -> str | None:
    if config is None:
        return None
    kind = f"a {config.model_type} classifier" if getattr(config, "model_type", None) else "a larger classifier"
    return hub_name(getattr(config, "_name_or_path", None) or None) or kind


def _value(value: Any) -> Any:
    return getattr(value, "value", value)
