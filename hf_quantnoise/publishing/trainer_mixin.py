"""What ``QuantNoiseTrainer`` does otherwise than ``Trainer`` on its way to the Hub."""

from __future__ import annotations

import inspect
import os
from dataclasses import replace
from typing import Any, ClassVar

from transformers import PreTrainedModel, Trainer

from ..configuration import QuantNoiseConfig
from ..hub.card import CARD_ATTRIBUTE
from ..repository import CARD, read_card, upload_folder
from .card import QuantNoiseCard
from .push import merged, write_model_card
from .tables import changed_fields

_TRAINING = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim",
    "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "seed",
)  # fmt: skip
_NOT_ON_CARDS = ("plots", "teacher_device")


class PublishingMixin:
    """Over a ``Trainer``: cards by this package, with metrics of the model as it stands and no
    others, and an upload without what a pass keeps to be resumed.

    Attributes:
        unpublished: patterns of files below ``output_dir`` that are not uploaded.
    """

    unpublished: ClassVar[tuple[str, ...]] = ()

    qn_config: QuantNoiseConfig | None
    compression_history: list[dict[str, Any]]
    compression_args: Any = None
    _measured: ClassVar[dict[str, float]] = {}
    _has_trained: bool = False

    def quantnoise_card(self) -> QuantNoiseCard:
        """What the trainer knows of its model."""
        values = {name: getattr(self.args, name) for name in _TRAINING}
        settings = {name: getattr(value, "value", value) for name, value in values.items()}
        if self._has_trained:
            by_steps = self.args.max_steps > 0
            length = "max_steps" if by_steps else "num_train_epochs"
            settings[length] = getattr(self.args, length)
        return QuantNoiseCard(
            repo_id=self.hub_model_id,
            before=self.compression_history[0]["metric"] if self.compression_history else {},
            after=dict(self._measured),
            noise=self.qn_config,
            training=settings,
            compression=_pass_settings(self.compression_args),
            history=self.compression_history,
        )

    def _has_measured(self, metrics: dict[str, float]) -> None:
        """Keeps the metrics of the model as it stands now, on a compressed model too."""
        self._measured = metrics
        if self.compression_history:
            setattr(self.model, CARD_ATTRIBUTE, self.quantnoise_card())

    def train(self, *args: Any, **kwargs: Any):
        """``Trainer.train``; what was measured before is no figure of the model afterwards."""
        output = super().train(*args, **kwargs)
        self._has_trained = True
        self._has_measured({})
        return output

    def evaluate(self, eval_dataset=None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """``Trainer.evaluate``; the metrics on the trainer's own data go onto the card."""
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        if eval_dataset is None and any(name.startswith("eval_") for name in metrics):
            self._has_measured(metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """``Trainer.save_model``, with a card beside a compressed model."""
        super().save_model(output_dir, _internal_call)
        if self.compression_history and not _internal_call and self.is_world_process_zero():
            write_model_card(self.model, output_dir or self.args.output_dir, self.quantnoise_card())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the package's card into ``output_dir``; takes what ``Trainer``'s does.

        The metadata that ``Trainer`` finds (language, license, base model, data) are kept.
        """
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero() or not isinstance(self.model, PreTrainedModel):
            return
        given = inspect.signature(Trainer.create_model_card).bind(self, *args, **kwargs).arguments
        card = replace(
            self.quantnoise_card(),
            title=given.get("model_name"),
            base_model=given.get("finetuned_from"),
            task=_first(given.get("tasks")),
            dataset=_first(given.get("dataset")),
            dataset_id=_first(given.get("dataset_tags")),
        )
        path = os.path.join(self.args.output_dir, CARD)
        theirs = read_card(path)
        # Its text has the same settings; its results are the last logged, of whatever model.
        theirs.text = ""
        theirs.data.eval_results = theirs.data.model_name = theirs.data.metrics = None
        merged(card.render(self.model), theirs).save(path)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ):
        """``Trainer.push_to_hub`` without the folder in which a pass keeps the dense model and its
        checkpoints. Takes and returns the same."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            if private is not None:  # no argument of init_hf_repo before transformers 5.23
                self.args.hub_private_repo = private
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        kwargs.setdefault("model_name", (self.hub_model_id or "").split("/")[-1] or None)
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return upload_folder(
            self.args.output_dir,
            self.hub_model_id,
            token=token,
            ignore_patterns=self.unpublished,
            commit_message=commit_message,
            revision=self.args.hub_revision if revision is None else revision,
            run_as_future=not blocking,
        )


def _first(value: str | list[str] | None) -> str | None:
    return value[0] if isinstance(value, (list, tuple)) and value else value or None


def _pass_settings(arguments: Any) -> dict[str, Any]:
    """What decides a pass's finetuning: ``CompressionArguments`` that are not the defaults, and its
    length and teacher in any case."""
    if arguments is None:
        return {}
    changed = changed_fields(arguments, without=_NOT_ON_CARDS)
    length = {} if arguments.stage_steps is not None else {"stage_epochs": arguments.stage_epochs}
    return {**length, "distill": arguments.distill, **changed}
