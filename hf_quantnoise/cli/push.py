"""``hf-quantnoise push``."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace

from huggingface_hub import HfApi

from ..configuration import QUANT_METHOD
from .checkpoints import Checkpoint
from .command import COMMANDS, Command
from .sizes import report_of

# Checkpoints and the work of a pass are no part of a model.
UNPUBLISHED = ("checkpoint-*", "checkpoint-*/**", "compression/**")


@COMMANDS.register("push")
class Push(Command):
    """Uploads a folder with a packed model to the Hub, in one commit.

    The files go as they stand, after a look at whether they are a packed model. Log in with `hf
    auth login`; HF_ENDPOINT names another Hub.
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
        api = HfApi()
        repo = api.create_repo(args.repo, private=args.private or None, exist_ok=True).repo_id
        if args.revision is not None:
            api.create_branch(repo, branch=args.revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=args.folder,
            revision=args.revision,
            commit_message="Upload a model compressed by hf_quantnoise",
            ignore_patterns=list(UNPUBLISHED),
        )
        print(done.commit_url)


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
