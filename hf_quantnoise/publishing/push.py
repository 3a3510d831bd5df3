"""Write a model card to a folder; upload a model with its card to the Hub."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from ..argument_checks import require_instance, require_model, require_output_folder
from ..files.durable import new_file
from ..hub.card import CARD_ATTRIBUTE, TAGS
from ..hub.processing import remember_processing, save_processing
from ..repository import CARD, LIBRARY, create_repository, existing_card, read_card, upload_model
from .card import END, START, QuantNoiseCard
from .template import read_template

# Metadata fields of a card that hold evaluation results.
RESULT_FIELDS = ("eval_results", "model_name", "metrics")


def card_of(model: PreTrainedModel) -> QuantNoiseCard:
    """Return the card that compression stored on a model, or an empty one."""
    return getattr(model, CARD_ATTRIBUTE, None) or QuantNoiseCard()


def merge_cards(new: ModelCard, existing: ModelCard | None) -> ModelCard:
    """Merge a new card into an existing one and return it.

    The text between the package's markers is replaced, all other text is kept. Metadata of the
    existing card is kept and tags are combined. However, results and ``base_model_relation`` of a
    card that this package wrote are dropped, since they may describe another model, as is its
    ``library_name`` and that of transformers' own cards.
    """
    if existing is None:
        return new
    data: Any = new.data
    old: Any = existing.data
    if old.library_name in ("transformers", LIBRARY):
        old.library_name = None
    replaced = {*RESULT_FIELDS, "base_model_relation"} if START in existing.text else set()
    if data.eval_results:
        replaced.update(RESULT_FIELDS)
    for name, value in vars(old).items():
        if name == "tags":
            data.tags += [tag for tag in value or [] if tag not in (*data.tags, *TAGS)]
        elif value and name not in replaced:
            data[name] = value
    head, start, rest = existing.text.partition(START)
    _, end, tail = rest.partition(END)
    if start and end:
        new.text = f"{head}{new.text.strip()}{tail}"
    elif existing.text.strip():
        new.text = f"{new.text.rstrip()}\n\n{existing.text.lstrip()}"
    return new


def _require_card_of_model(model: Any, card: Any) -> None:
    """Raise a ``TypeError`` unless these are a model (or an adapter) and a card."""
    if not hasattr(model, "get_base_model"):
        require_model(model)
    if card is not None:
        way_out = "pass e.g. QuantNoiseCard(title='...')"
        require_instance("card", card, QuantNoiseCard, "a QuantNoiseCard", way_out)


def write_model_card(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    card: QuantNoiseCard | None = None,
    template: str | os.PathLike | None = None,
) -> str:
    """Write a model card (``README.md``) to the folder of a saved model.

    transformers' ``save_pretrained`` does not write one.

    Args:
        model: a model, compressed or not.
        folder: the folder. In an existing card, text outside the package's markers is kept.
        card: facts for the card. Default: ``model.quantnoise_card``, set by compression.
        template: path of a Jinja template of the card. Default: that of ``card``, or the package's.

    Returns:
        The path of the file.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if the template is invalid.
    """
    _require_card_of_model(model, card)
    folder = require_output_folder("folder", folder)
    path = os.path.join(folder, CARD)
    existing = read_card(path) if os.path.isfile(path) else None
    card = _with_template(card or card_of(model), template)
    merged = merge_cards(card.render(model, folder), existing)
    card.copy_plot(folder)
    with new_file(path) as part:
        merged.save(part)
    return path


def _with_template(card: QuantNoiseCard, template: str | os.PathLike | None) -> QuantNoiseCard:
    return card if template is None else replace(card, template=template)


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    card: QuantNoiseCard | None = None,
    processing_class: Any = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    template: str | os.PathLike | None = None,
) -> Any:
    """Upload a model with its card to the Hub, in one commit.

    ``model.push_to_hub`` uploads the same files but writes transformers' own card, unless the
    repository already has a card.

    Args:
        model: a model, compressed or not.
        repo_id: the repository; created if it does not exist. In an existing card, text outside the
            package's markers is kept.
        card: facts for the card. Default: ``model.quantnoise_card``, set by compression.
        processing_class: tokenizer or image processor to upload with the model. Default: the one
            that the model was compressed with, or that of the folder it was loaded from.
        commit_message, private, token, create_pr: as in ``model.push_to_hub``.
        revision: the branch; created if it does not exist.
        max_shard_size: maximum size of one weight file.
        template: path of a Jinja template of the card. Default: that of ``card``, or the package's.

    Returns:
        A ``huggingface_hub.CommitInfo``.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if ``repo_id`` is not a valid name, or the template is invalid.
    """
    _require_card_of_model(model, card)
    card = _with_template(card or card_of(model), template)
    read_template(card.template)  # raises before anything is created
    repo_id = create_repository(
        repo_id, private=private, token=token, revision=revision, create_pr=create_pr
    )
    existing = existing_card(repo_id, revision, token)
    remember_processing(model, processing_class)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        save_processing(model, folder)
        card = replace(card, repo_id=repo_id)
        card.copy_plot(folder)
        merge_cards(card.render(model, folder), existing).save(os.path.join(folder, CARD))
        return upload_model(
            repo_id,
            folder,
            token=token,
            commit_message=commit_message or f"Upload {type(model).__name__}",
            revision=revision,
            create_pr=create_pr,
        )
