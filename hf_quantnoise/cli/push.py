"""``hf-quantnoise push``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .command import COMMANDS, Command, add_trust_argument


@COMMANDS.register("push")
class Push(Command):
    """Upload a folder with a packed model to the Hub, in one commit.

    The files are checked to be a packed model and uploaded unchanged, except that the name of the
    repository is inserted into a model card without one. Files that may hold secrets (`.env`) are
    not uploaded, with a warning. Log in with `hf auth login`; HF_ENDPOINT sets another Hub.
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
        add_trust_argument(parser)

    @staticmethod
    def run(args: Namespace) -> None:
        from .uploading import upload

        private, trusted = args.private, args.trust_remote_code
        print(upload(args.folder, args.repo, args.revision, private, trusted))
