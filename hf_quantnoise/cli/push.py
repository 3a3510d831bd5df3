"""``hf-quantnoise push``."""

from __future__ import annotations

import os
import shutil
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..configuration import QUANT_METHOD
from ..publishing.card import REPO_PLACEHOLDER
from ..repository import CARD, create_repository
from ..trainer import QuantNoiseTrainer
from .checkpoints import Checkpoint
from .command import COMMANDS, Command
from .sizes import report_of

# HTTP status of the Hub if the user may not write to, or see, a repository.
_NOT_ALLOWED = (401, 403, 404)


@COMMANDS.register("push")
class Push(Command):
    """Upload a folder with a packed model to the Hub, in one commit.

    The files are checked to be a packed model and uploaded unchanged, except that the name of the
    repository is inserted into a model card without one. Log in with `hf auth login`; HF_ENDPOINT
    sets another Hub.
    """

    examples = (
        "hf-quantnoise push out/compressed me/small",
        "hf-quantnoise push out/compressed me/small --private --revision ipq-8",
    )

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("folder", metavar="FOLDER", help="Folder of the packed model.")
        parser.add_argument("repo", metavar="REPO", help="Repository; created if missing.")
        parser.add_argument("--private", action="store_true", help="Make the repository private.")
        parser.add_argument("--revision", help="Branch; created if missing.")

    @staticmethod
    def run(args: Namespace) -> None:
        check_packed(args.folder)
        with _explained(args.repo):
            repo = create_repository(
                args.repo, private=args.private or None, revision=args.revision
            )
            with _card_with_name(repo, args.folder) as folder:
                done = upload_folder(
                    repo_id=repo,
                    folder_path=folder,
                    revision=args.revision,
                    commit_message="Upload a model compressed by hf_quantnoise",
                    ignore_patterns=[*QuantNoiseTrainer.unpublished],
                )
        print(done.commit_url)


@contextmanager
def _card_with_name(repo: str, folder: str) -> Iterator[str]:
    """Yield a folder whose card names the repository: the given one, or a copy with links."""
    card = os.path.join(folder, CARD)
    text = ""
    if os.path.isfile(card):
        with open(card, encoding="utf-8") as file:
            text = file.read()
    if REPO_PLACEHOLDER not in text:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        same = shutil.copytree(folder, os.path.join(scratch, "model"), copy_function=_link)
        os.remove(os.path.join(same, CARD))  # a link: writing to it would change the original
        with open(os.path.join(same, CARD), "w", encoding="utf-8") as file:
            file.write(text.replace(REPO_PLACEHOLDER, repo))
        yield same


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another disk, or without support for links
        shutil.copyfile(source, target)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Raise errors of the Hub with repository, endpoint and remedy."""
    try:
        yield
    except HFValidationError:
        raise  # an invalid name, which the error explains
    except Exception as error:  # any type, depending on the HTTP client
        remedy = "check the network and HF_ENDPOINT, the address of the Hub"
        if isinstance(error, HfHubHTTPError) and error.response.status_code in _NOT_ALLOWED:
            remedy = "log in with `hf auth login` as a user who may write there"
        raise ConnectionError(
            f"{repo!r} could not be pushed to {constants.ENDPOINT}: {error}; {remedy}"
        ) from error


def check_packed(folder: str) -> None:
    """Raise a ``ValueError`` unless a folder is a packed model.

    The layers of its plan are created and compared with the size of the files.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"invalid FOLDER {folder!r}: expected a folder written by save_pretrained")
    checkpoint = Checkpoint(folder)
    if checkpoint.quant_method != QUANT_METHOD:
        raise ValueError(
            f"invalid FOLDER {folder!r}: not a model packed by {QUANT_METHOD} (quant_method="
            f"{checkpoint.quant_method!r} in config.json); compress it first, or use `hf upload`"
        )
    if checkpoint.headers is None:
        raise ValueError(f"invalid FOLDER {folder!r}: no *.safetensors file; save the model again")
    _, note = report_of(checkpoint)
    if note is not None:
        raise ValueError(
            f"invalid FOLDER {folder!r}: the files do not match config.json ({note}); save the "
            "model again"
        )
