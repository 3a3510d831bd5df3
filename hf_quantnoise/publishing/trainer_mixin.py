"""Model cards and uploads for ``QuantNoiseTrainer``."""

from __future__ import annotations

import inspect
import os
import shutil
from dataclasses import replace
from typing import Any, ClassVar

from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..compat import finish_current_push
from ..configuration import QuantNoiseConfig
from ..files.model_folders import replaced_model
from ..hub.card import CARD_ATTRIBUTE, DENSE
from ..hub.processing import remember_processing
from ..repository import (
    CARD,
    card_in,
    create_repository,
    existing_card,
    read_card,
    upload_model,
)
from .card import START, QuantNoiseCard
from .push import RESULT_FIELDS, add_missing, merge_cards, own_text, write_model_card
from .tables import changed_fields

_TRAINING = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim",
    "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "seed",
)  # fmt: skip
_NOT_ON_CARDS = ("plots", "teacher_device")
# Argument of create_model_card -> field of the metadata.
_METADATA = {
    "language": "language", "license": "license", "finetuned_from": "base_model",
    "tasks": "pipeline_tag", "dataset_tags": "datasets",
}  # fmt: skip

logger = logging.get_logger(__name__)


class PublishingMixin(Trainer):
    """Mixin for ``Trainer`` that writes this package's cards and uploads only the final model.

    A card reports metrics only if they were measured on the model in its current state.

    Attributes:
        unpublished: patterns of files in ``output_dir`` that are not uploaded.
        card_template: path of a Jinja template of the card; None is the package's.
        dense_metrics: result of ``evaluate`` for the model before it was trained with noise of rate
            1; the "original" of the card in that case.
    """

    model: PreTrainedModel
    unpublished: ClassVar[tuple[str, ...]] = ()
    card_template: str | os.PathLike | None = None
    dense_metrics: dict[str, float] = {}  # noqa: RUF012  replaced, never changed

    qn_config: QuantNoiseConfig | None
    compression_history: list[dict[str, Any]]
    compression_args: Any = None
    _card_metrics: dict[str, float] = {}  # noqa: RUF012  replaced, never changed
    _has_trained: bool = False
    _plots: tuple[str, ...] | list[str] = ()

    def quantnoise_card(self) -> QuantNoiseCard:
        """Return a card with everything the trainer knows about its model."""
        values = {name: getattr(self.args, name) for name in _TRAINING}
        settings = {name: getattr(value, "value", value) for name, value in values.items()}
        if self._has_trained:
            by_steps = self.args.max_steps > 0
            length = "max_steps" if by_steps else "num_train_epochs"
            settings[length] = getattr(self.args, length)
        return QuantNoiseCard(
            repo_id=self.hub_model_id,
            before=self._metrics_before_compression(),
            after=dict(self._card_metrics),
            noise=self.qn_config,
            training=settings,
            compression=_compression_settings(self.compression_args),
            history=self.compression_history,
            plot=next(iter(self._plots), None),
            template=self.card_template,
        )

    def _metrics_before_compression(self) -> dict[str, float]:
        if not self.compression_history:
            return {}
        first = self.compression_history[0]
        metrics: dict[str, float] = first["metric"]
        if first["stage"] == DENSE:
            return metrics
        return {name: value for name, value in self.dense_metrics.items() if name in metrics}

    def _set_card_metrics(self, metrics: dict[str, float]) -> None:
        """Set the metrics of the current model, and update the card on a compressed model."""
        self._card_metrics = metrics
        if self.compression_history:
            setattr(self.model, CARD_ATTRIBUTE, self.quantnoise_card())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as ``Trainer`` does; metrics measured before are removed from the card."""
        output = super().train(*args, **kwargs)
        self._has_trained = True
        self._set_card_metrics({})
        return output

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as ``Trainer`` does; metrics on its own dataset are put on the card."""
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        if eval_dataset is None and any(name.startswith("eval_") for name in metrics):
            self._set_card_metrics(metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as ``Trainer`` does, all or nothing, with a card if the model is compressed."""
        folder = str(output_dir or self.args.output_dir)
        remember_processing(self.model, self.processing_to_save())
        if not self.args.should_save or self.is_deepspeed_enabled:  # it writes on all ranks
            super().save_model(folder, True)
        else:
            with replaced_model(folder) as part:
                super().save_model(part, True)
                if self.compression_history and not _internal_call and self.is_world_process_zero():
                    if os.path.isfile(existing := os.path.join(folder, CARD)):
                        shutil.copyfile(existing, os.path.join(part, CARD))
                    write_model_card(self.model, part, self.quantnoise_card())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def processing_to_save(self) -> Any:
        """Return the tokenizer or processor that ``Trainer`` saves with the model, or None."""
        if self.processing_class is not None:
            return self.processing_class
        return getattr(self.data_collator, "tokenizer", None)

    def create_model_card(
        self, *args: Any, dataset_split: str | None = None, **kwargs: Any
    ) -> None:
        """Write this package's card to ``output_dir``, with the arguments of ``Trainer``'s method.

        The metadata that ``Trainer`` collects (language, license, base model, dataset) is kept, and
        those of an existing card, together with its text outside the package's markers.
        ``dataset_args`` is the configuration of the dataset, ``dataset_split`` the split of it that
        was evaluated.
        """
        path = os.path.join(str(self.args.output_dir), CARD)
        existing = card_in(str(self.args.output_dir))
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero() or not isinstance(self.model, PreTrainedModel):
            return
        values = inspect.signature(Trainer.create_model_card).bind(self, *args, **kwargs).arguments
        card = replace(
            self.quantnoise_card(),
            title=values.get("model_name"),
            base_model=values.get("finetuned_from"),
            task=_first(values.get("tasks")),
            dataset=_first(values.get("dataset")),
            dataset_id=_first(values.get("dataset_tags")),
            dataset_config=_first(values.get("dataset_args")),
            dataset_split=dataset_split,
        )
        card.copy_plot(str(self.args.output_dir))
        trainer_card = read_card(path)
        # Its text repeats the settings; its results are the last logged, maybe of another model.
        trainer_card.text = ""
        for name in RESULT_FIELDS:
            setattr(trainer_card.data, name, None)
        merged: Any = merge_cards(card.render(self.model), trainer_card)
        if existing is not None and (START in existing.text or own_text(existing)):
            for argument, name in _METADATA.items():
                if values.get(argument) or (name == "base_model" and merged.data.base_model):
                    setattr(existing.data, name, None)
            merged = merge_cards(merged, existing)
        merged.save(path)

    def _read_card_of_repository(self, revision: str | None, token: str | None) -> None:
        """Add to the card in ``output_dir`` what only the one of the repository has."""
        repo_id, path = str(self.hub_model_id), os.path.join(str(self.args.output_dir), CARD)
        if (other := existing_card(repo_id, revision, token)) is None:
            return
        card = card_in(str(self.args.output_dir)) or other
        if own_text(card) and own_text(other) not in ("", own_text(card)):
            logger.warning(
                f"the text of {path!r} replaces that of the card of {repo_id!r}, which remains in "
                "the history of the repository"
            )
        if card is not other:
            add_missing(card, other)
        card.save(path)

    def init_hf_repo(self, token: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Create the repository as ``Trainer`` does, and its branch ``hub_revision``."""
        super().init_hf_repo(token, *args, **kwargs)
        # Trainer uploads checkpoints to the branch, and does not report if that fails.
        if self.args.push_to_hub and self.is_world_process_zero():
            self._create_branch(self.args.hub_revision, token)

    def _create_branch(self, revision: str | None, token: str | None) -> None:
        if revision is not None:
            create_repository(
                str(self.hub_model_id),
                private=self.args.hub_private_repo,
                token=self.args.hub_token if token is None else token,
                revision=revision,
            )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload as ``Trainer`` does, but without checkpoints and the files of compression runs.

        Files that may hold secrets (``.env``) are not uploaded either, with a warning. The branch
        ``revision`` is created if it does not exist.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            if private is not None:  # init_hf_repo has this argument since transformers 5.23
                self.args.hub_private_repo = private
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        kwargs.setdefault("model_name", (self.hub_model_id or "").split("/")[-1] or None)
        revision = self.args.hub_revision if revision is None else revision
        self._create_branch(revision, token)
        self._read_card_of_repository(revision, token)
        self.create_model_card(**kwargs)
        finish_current_push(self)
        run_as_future: Any = not blocking  # upload_folder has an overload for each value
        return upload_model(
            str(self.hub_model_id),
            str(self.args.output_dir),
            token=token,
            ignore_patterns=self.unpublished,
            commit_message=commit_message,
            revision=revision,
            run_as_future=run_as_future,
        )


def _first(value: str | list[str] | None) -> str | None:
    if isinstance(value, str | None):
        return value or None
    return value[0] if value else None


def _compression_settings(arguments: Any) -> dict[str, Any]:
    """Return the non-default ``CompressionArguments``, and always the length and ``distill``."""
    if arguments is None:
        return {}
    changed = changed_fields(arguments, without=_NOT_ON_CARDS)
    length = {} if arguments.stage_steps is not None else {"stage_epochs": arguments.stage_epochs}
    return {**length, "distill": arguments.distill, **changed}
