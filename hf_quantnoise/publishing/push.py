"""Writing a card into a folder, and a whole repository to the Hub."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from ..hub.card import CARD_ATTRIBUTE, TAGS
from ..repository import (
    CARD,
    create_repository,
    existing_card,
    read_card,
    upload_folder,
)
from .card import END, START, QuantNoiseCard

_RESULTS = ("eval_results", "model_name", "metrics")


def card_of(model: PreTrainedModel) -> QuantNoiseCard:
    """The card that a pass left on a model, or an empty one."""
    return getattr(model, CARD_ATTRIBUTE, None) or QuantNoiseCard()


def merged(own: ModelCard, existing: ModelCard | None) -> ModelCard:
    """A card over one that was there: text between the package's marks is written anew, all other
    text stays, metadata that somebody set wins, and tags are united. Results, and that the model is
    quantized, are never taken from a card of the package's: they were another model's."""
    if existing is None:
        return own
    anew = (*_RESULTS, "base_model_relation") if START in existing.text else ()
    if own.data.eval_results:
        anew += _RESULTS
    for name, value in existing.data.__dict__.items():
        if name == "tags":
            own.data.tags += [tag for tag in value or [] if tag not in (*own.data.tags, *TAGS)]
        elif value and name not in anew:
            own.data[name] = value
    head, start, rest = existing.text.partition(START)
    _, end, tail = rest.partition(END)
    if start and end:
        own.text = f"{head}{own.text.strip()}{tail}"
    elif existing.text.strip():
        own.text = f"{own.text.rstrip()}\n\n{existing.text.lstrip()}"
    return own


def write_model_card(
    model: PreTrainedModel, folder: str | os.PathLike, card: QuantNoiseCard | None = None
) -> str:
    """Writes ``README.md`` beside a saved model: transformers' ``save_pretrained`` writes none.

    Args:
        model: the model, compressed or not.
        folder: where it was saved. A card there keeps what is not between the package's marks.
        card: what to say; None takes what the pass left on the model.

    Returns:
        The file's path.
    """
    path = os.path.join(folder, CARD)
    existing = read_card(path) if os.path.isfile(path) else None
    merged((card or card_of(model)).render(model), existing).save(path)
    return path


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
):
    """Uploads a model with its card, in one commit.

    ``model.push_to_hub`` uploads the same files with transformers' own card, which nothing can
    write into; a card of this package that is in the repository it keeps.

    Args:
        model: the model, compressed or not.
        repo_id: the repository; it is made where it is missing. A card there keeps what is not
            between the package's marks.
        card: what to say; None takes what the pass left on the model.
        processing_class: tokenizer or image processor, uploaded beside the model.
        commit_message, private, token, create_pr: as in ``model.push_to_hub``.
        revision: the branch; it is made where it is missing.
        max_shard_size: most that one file of weights may have.

    Returns:
        A ``huggingface_hub.CommitInfo``.
    """
    repo_id = create_repository(
        repo_id, private=private, token=token, revision=revision, create_pr=create_pr
    )
    there = existing_card(repo_id, revision, token)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        own = replace(card or card_of(model), repo_id=repo_id)
        merged(own.render(model), there).save(os.path.join(folder, CARD))
        return upload_folder(
            folder,
            repo_id,
            token=token,
            commit_message=commit_message or f"Upload {type(model).__name__}",
            revision=revision,
            create_pr=create_pr,
        )
