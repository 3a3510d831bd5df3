"""``hf-quantnoise push``."""

from __future__ import annotations

import os
import shutil
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..configuration import QUANT_METHOD
from ..publishing.card import REPO_PLACEHOLDER
from ..repository import CARD, create_repository, upload_folder
from ..trainer import QuantNoiseTrainer
from .checkpoints import Checkpoint
from .command import COMMANDS, Command
from .sizes import report_of

# What the Hub answers to one who may not write there, or may not even know of the repository.
_NOT_ALLOWED = (401, 403, 404)


@COMMANDS.register("push")
class Push(Command):
    """Uploads a folder with a packed model to the Hub, in one commit.

    The files go as they stand, after a look at whether they are a packed model; only a card that
    was written before the model had a repository is given its name. Log in with `hf auth login`;
    HF_ENDPOINT names another Hub.
    """

    examples = (
        "hf-quantnoise push out/compressed me/small",
        "hf-quantnoise push out/compressed me/small --private --revision ipq-8",
    )

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("folder", metavar="FOLDER", help="Folder of the packed model.")
        parser.add_argument("repo", metavar="REPO", help="Repository; made where it is missing.")
        parser.add_argument("--private", action="store_true", help="Make the repository private.")
        parser.add_argument("--revision", help="Branch; made where it is missing.")

    @staticmethod
    def run(args: Namespace) -> None:
        check_packed(args.folder)
        with _named(args.repo):
            repo = create_repository(
                args.repo, private=args.private or None, revision=args.revision
            )
            with _naming_on_card(repo, args.folder) as folder:
                done = upload_folder(
                    folder,
                    repo,
                    revision=args.revision,
                    commit_message="Upload a model compressed by hf_quantnoise",
                    ignore_patterns=QuantNoiseTrainer.unpublished,
                )
        print(done.commit_url)


@contextmanager
def _naming_on_card(repo: str, folder: str) -> Iterator[str]:
    """The folder to upload: the given one, or where its card does not know the repository yet one
    that has the same files and a card that does."""
    card = os.path.join(folder, CARD)
    text = ""
    if os.path.isfile(card):
        with open(card, encoding="utf-8") as file:
            text = file.read()
    if REPO_PLACEHOLDER not in text:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        same = shutil.copytree(folder, os.path.join(scratch, "model"), copy_function=_linked)
        os.remove(os.path.join(same, CARD))  # a link: to write to it would change the other
        with open(os.path.join(same, CARD), "w", encoding="utf-8") as file:
            file.write(text.replace(REPO_PLACEHOLDER, repo))
        yield same


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another disk, or where there are no links
        shutil.copyfile(source, target)


@contextmanager
def _named(repo: str) -> Iterator[None]:
    """Names repository and endpoint in what the Hub or its client says, and the way out."""
    try:
        yield
    except HFValidationError:
        raise  # of the repository's name, which it says
    except Exception as error:  # of a client's own kind, where the Hub is not reached
        way_out = "see that the network and HF_ENDPOINT, the Hub's address, are right"
        if isinstance(error, HfHubHTTPError) and error.response.status_code in _NOT_ALLOWED:
            way_out = "see that `hf auth whoami` is one who may write there, or `hf auth login`"
        raise ConnectionError(
            f"{repo!r} could not be pushed to {constants.ENDPOINT}: {error}; {way_out}"
        ) from error


def check_packed(folder: str) -> None:
    """Whether a folder holds a packed model that loads: its config is read, the layers of its plan
    are made, and the files hold as many bytes.

    Raises:
        ValueError: if it does not.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder!r} is no folder; give the one that save_pretrained wrote")
    checkpoint = Checkpoint(folder)
    if checkpoint.quant_method != QUANT_METHOD:
        raise ValueError(
            f"{folder!r} holds no model packed by {QUANT_METHOD} (quant_method="
            f"{checkpoint.quant_method!r} in its config.json); compress it first, or upload it "
            "with `hf upload`"
        )
    if checkpoint.headers is None:
        raise ValueError(f"{folder!r} holds no *.safetensors file; save the model there again")
    _, note = report_of(checkpoint)
    if note is not None:
        raise ValueError(
            f"{folder!r}: the files are not those of its config.json: {note}; save the model again"
        )
