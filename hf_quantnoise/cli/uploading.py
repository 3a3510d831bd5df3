"""Upload of a packed model that is in a folder, unchanged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..argument_checks import require_repo_id
from ..hub.processing import processing_files, warn_unknown
from ..publishing.card import REPO_PLACEHOLDER
from ..publishing.validation import rejected_metadata
from ..repository import (
    CARD,
    card_in,
    create_repository,
    files_to_upload,
    stale_weights_in_repository,
)
from ..trainer import QuantNoiseTrainer
from .checkpoints import Checkpoint
from .sizes import report_of


def upload(
    folder: str, repo: str, revision: str | None, private: bool, trust_remote_code: bool
) -> str:
    """Upload a folder with a packed model, in one commit; return the address of the commit."""
    require_repo_id(repo)
    check_packed(folder, trust_remote_code)
    _check_card(folder, repo)
    with _explained(repo):
        repo = create_repository(repo, private=private or None, revision=revision)
        files = _operations(folder, repo, revision)
        message = "Upload a model compressed by hf_quantnoise"
        done = HfApi().create_commit(repo, files, revision=revision, commit_message=message)
    return done.commit_url


def _check_card(folder: str, repo: str) -> None:
    """Raise a ``ValueError`` if the model card in a folder is invalid, also for the Hub."""
    if card_in(folder) is None:  # raises if it cannot be read
        return
    path = os.path.join(folder, CARD)
    with _explained(repo):
        reason = rejected_metadata(_with_name(Path(path), repo).decode())
    if reason is not None:
        raise ValueError(
            f"invalid model card {path!r}: {reason}; correct the lines at the top of {CARD}"
        )


def _with_name(card: Path, repo: str) -> bytes:
    """Return the content of a card with the name of the repository."""
    return card.read_bytes().replace(REPO_PLACEHOLDER.encode(), repo.encode())


def _operations(
    folder: str, repo: str, revision: str | None
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return the files to upload, with the repository's name in the card, and those to delete."""
    files: list[CommitOperationAdd | CommitOperationDelete] = []
    for name in files_to_upload(folder, QuantNoiseTrainer.unpublished):
        path = Path(folder, name)
        content = _with_name(path, repo) if name == CARD else path
        files.append(CommitOperationAdd(name, content))
    stale = stale_weights_in_repository(repo, folder, revision)
    return files + [CommitOperationDelete(name) for name in stale]


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Raise errors of the Hub with repository, endpoint and remedy."""
    try:
        yield
    except (HFValidationError, PermissionError):
        raise  # an invalid name, or no token, which the error explains
    except Exception as error:  # any type, depending on the HTTP client
        remedy = "check the network and HF_ENDPOINT, the address of the Hub"
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        if status in (401, 403, 404):
            remedy = "log in with `hf auth login` as a user who may write there"
        elif 400 <= status < 500:
            remedy = "correct what the Hub names, e.g. another --revision"
        raise ConnectionError(
            f"{repo!r} could not be pushed to {constants.ENDPOINT}: {error}; {remedy}"
        ) from error


def check_packed(folder: str, trust_remote_code: bool = False) -> None:
    """Raise a ``ValueError`` unless a folder is a packed model.

    The layers of its plan are created and compared with the size of the files. A warning is issued
    if the folder has no tokenizer or processor.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"invalid FOLDER {folder!r}: expected a folder written by save_pretrained")
    checkpoint = Checkpoint(folder, trust_remote_code=trust_remote_code)
    checkpoint.require_packed("FOLDER")
    if checkpoint.headers is None:
        raise ValueError(f"invalid FOLDER {folder!r}: no *.safetensors file; save the model again")
    _, note = report_of(checkpoint)
    if note is not None:
        raise ValueError(
            f"invalid FOLDER {folder!r}: the files do not match config.json ({note}); save the "
            "model again"
        )
    if not processing_files(folder):
        warn_unknown(checkpoint.model_class)
