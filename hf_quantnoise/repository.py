"""Downloads from and uploads to the Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    ModelCard,
    constants,
    get_token,
    hf_hub_download,
    is_offline_mode,
    upload_folder,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects, validate_repo_id
from transformers.utils import logging

from .argument_checks import require_path, require_repo_id, shorten
from .files.model_folders import stale_weights
from .text import printable

# Tag of all repositories with files of this package.
TAG = "quant-noise"
# library_name of repositories that cannot be used without this package.
LIBRARY = "hf-quantnoise"
HOME = "https://github.com/hf-quantnoise/hf_quantnoise"
CARD = "README.md"
# Files with passwords and tokens, in any folder. They are never uploaded.
SECRETS = tuple(f"{folder}{name}" for folder in ("", "*/") for name in (".env", ".env.*", ".envrc"))
_NOT_THERE = (
    EntryNotFoundError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError,
)  # fmt: skip

logger = logging.get_logger(__name__)

# Why a repository cannot be read, and what to do; the first that applies.
_REFUSALS = (
    (GatedRepoError, "it is gated, and this account has no access",
     "request access on its page, and log in with `hf auth login`"),
    (RevisionNotFoundError, "it has no such branch, tag or commit", "check the revision"),
    (RepositoryNotFoundError, "it does not exist, or is private",
     "check the name, or log in with `hf auth login`"),
)  # fmt: skip


def refusal(error: BaseException) -> str | None:
    """Return why the Hub refused to serve a repository, and the remedy, or None if it did not.

    Args:
        error: the error of the Hub's client, or one that was raised because of it.
    """
    causes = _causes(error)
    for kind, reason, remedy in _REFUSALS:
        if any(isinstance(cause, kind) for cause in causes):
            return f"{reason}; {remedy}"
    return None


def _causes(error: BaseException, with_context: bool = False) -> list[BaseException]:
    """Return an error and what it was raised from; with context, also what it was raised during."""
    causes = [error]
    while cause := causes[-1].__cause__ or (causes[-1].__context__ if with_context else None):
        causes.append(cause)
    return causes


def missing_model(path: str, error: BaseException) -> str:
    """Return the message for a model that is neither a folder nor readable as a repository."""
    causes = _causes(error, with_context=True)
    name = printable(path)
    if not is_repository_name(path):
        return f"no folder {name!r}, and not a valid name of a repository; check the path"
    if reason := refusal(error):
        return f"no folder {name!r}, and cannot read the repository of this name: {reason}"
    unreachable = (LocalEntryNotFoundError, OfflineModeIsEnabled)
    if is_offline_mode() and any(isinstance(cause, unreachable) for cause in causes):
        return (
            f"no folder {name!r}, and no repository of this name with these files in the cache "
            "(offline: HF_HUB_OFFLINE is set); check the path, or unset HF_HUB_OFFLINE to "
            "download it"
        )
    # The client's message that it is not in the cache follows from the one of the network.
    first = next((each for each in reversed(causes) if str(each)), error)
    cause = first if isinstance(error, OSError) else error
    reason = shorten(printable(" ".join(str(cause).split()))).rstrip(".")
    return (
        f"no folder {name!r}, and cannot read the repository of this name ({reason}); check the "
        "path and the network"
    )


def find_file(path: str | os.PathLike, file_name: str, hint: str, **kwargs: Any) -> str:
    """Return the path of a file in a folder or Hub repository, or ``path`` if it is a file.

    ``hint`` ends the FileNotFoundError with how to create the file; ``kwargs`` are those of
    ``hf_hub_download``.
    """
    path = require_path("path", path)
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        found = os.path.join(path, kwargs.get("subfolder") or "", file_name)
        if not os.path.isfile(found):
            raise FileNotFoundError(f"{found} is missing; {hint}")
        return found
    if not is_repository_name(path):
        raise FileNotFoundError(
            f"{path!r} is neither a folder nor a valid name of a repository; {hint}"
        )
    try:
        return hf_hub_download(path, file_name, **kwargs)
    except GatedRepoError as error:
        raise PermissionError(f"cannot read repository {path!r}: {refusal(error)}") from error
    except _NOT_THERE as error:
        raise FileNotFoundError(
            f"{os.path.join(path, file_name)} is missing: the folder does not exist, and the Hub "
            f"answered {type(error).__name__}; {hint}"
        ) from error


def is_repository_name(name: str | None) -> bool:
    """Whether a name is a valid repository name and not an existing folder."""
    if not name or os.path.isdir(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def existing_card(repo_id: str, revision: str | None = None, token: str | None = None):
    """Return the model card of a repository, or None if it has none or does not exist.

    The card of a branch that does not exist is the main one's, of which a new branch is a copy.
    """
    try:
        path = hf_hub_download(repo_id, CARD, revision=revision, token=token)
    except (LocalEntryNotFoundError, GatedRepoError):
        raise  # the Hub cannot be read: a card may exist, and must not be overwritten
    except RevisionNotFoundError:
        return None if revision is None else existing_card(repo_id, token=token)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    return read_card(path, f"{CARD} of repository {repo_id!r}")


def read_card(path: str | os.PathLike, name: str | None = None) -> ModelCard:
    """Return the model card in a file, without metadata that are invalid on the Hub.

    Raises:
        ValueError: with the name of the file, if its metadata cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        card: Any = ModelCard(text, ignore_metadata_errors=True)
    except OSError:
        raise
    except Exception as error:  # the parser of the metadata has its own types
        name = name or repr(os.fspath(path))
        reason = shorten(printable(" ".join(str(error).split())))
        raise ValueError(
            f"invalid model card {name}: {reason}; correct its metadata, and save it in UTF-8"
        ) from error
    card.data.language = _languages(card.data.language)
    return card


def card_in(folder: str | os.PathLike) -> ModelCard | None:
    """Return the model card in a folder, or None; raise a ``ValueError`` if it is invalid."""
    path = os.path.join(folder, CARD)
    return read_card(path) if os.path.isfile(path) else None


def _languages(value: Any) -> Any:
    """Return languages as the Hub reads them: no is Norwegian, which YAML 1.1 reads as False."""
    if isinstance(value, list):
        return [*map(_languages, value)]
    return "no" if value is False else value


def full_name(repo_id: str, token: str | None = None) -> str:
    """Return the name of a repository with its owner, by default the user.

    Raises:
        PermissionError: if no token is set; the token determines the user.
    """
    require_repo_id(repo_id)
    if "/" in repo_id:
        return repo_id
    if not (token or get_token()):
        raise _token_required(repo_id)
    return f"{HfApi(token=token).whoami()['name']}/{repo_id}"


def _token_required(repo_id: str) -> PermissionError:
    return PermissionError(
        f"{repo_id!r} cannot be pushed to {constants.ENDPOINT} without a token; log in with "
        "`hf auth login`, or set HF_TOKEN"
    )


def create_repository(
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Create a repository and a branch if they are missing; return its full name.

    A ``revision`` like refs/pr/1 is that of a pull request, and cannot be created.

    Raises:
        PermissionError: if the Hub wants a token and there is none.
    """
    require_repo_id(repo_id)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    except HfHubHTTPError as error:
        if error.response.status_code != 401 or token or get_token():
            raise
        raise _token_required(repo_id) from error
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def stale_weights_in_repository(
    repo_id: str, folder: str, revision: str | None = None, token: str | None = None
) -> list[str]:
    """Return the weight files of a repository that the model in a folder replaces."""
    try:
        names = HfApi(token=token).list_repo_files(repo_id, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return []
    return stale_weights(names, os.listdir(folder))


def files_to_upload(folder: str, ignore_patterns: Sequence[str] = ()) -> list[str]:
    """Return the names of the files of a folder that are uploaded; warn about secrets.

    Args:
        folder: the folder.
        ignore_patterns: patterns of files that are not uploaded, besides Git's and ``SECRETS``.
    """
    found = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    paths = (path.relative_to(folder).as_posix() for path in found)
    patterns = [*DEFAULT_IGNORE_PATTERNS, *ignore_patterns]
    names = list(filter_repo_objects(paths, ignore_patterns=patterns))
    public = list(filter_repo_objects(names, ignore_patterns=list(SECRETS)))
    if secrets := [repr(name) for name in names if name not in public]:
        logger.warning(
            f"files of {folder!r} that may hold secrets are not uploaded: {', '.join(secrets)}"
        )
    return public


def upload_model(
    repo_id: str,
    folder: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    ignore_patterns: Sequence[str] = (),
    **kwargs: Any,
) -> Any:
    """Upload the model in a folder, and delete the repository's old weights in the same commit.

    Files that may hold secrets are not uploaded, with a warning.

    ``kwargs`` are further arguments of ``upload_folder``, whose result is returned.
    """
    files_to_upload(folder, ignore_patterns)  # warns; upload_folder selects them by patterns
    return upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        token=token,
        ignore_patterns=[*ignore_patterns, *SECRETS],
        # None rather than an empty list: then the repository is not listed again.
        delete_patterns=stale_weights_in_repository(repo_id, folder, revision, token) or None,
        **kwargs,
    )
