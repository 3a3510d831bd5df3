"""``hf-quantnoise completion``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _SubParsersAction

from .command import COMMANDS, Command

SHELLS = ("bash", "zsh", "tcsh")
_FILES = ("png", "save", "config")
_FOLDERS = ("model", "models", "dense", "out", "folder", "output_dir", "cache_dir")


@COMMANDS.register("completion")
class Completion(Command):
    """Print a script for shell completion of commands, flags, choices and files.

    Requires pip install 'hf-quantnoise[completion]'. Write it again after an update.
    """

    examples = (
        "hf-quantnoise completion bash",
        "hf-quantnoise completion zsh",
    )

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("shell", choices=SHELLS, help="Shell.")

    @staticmethod
    def run(args: Namespace) -> None:
        try:
            import shtab
        except ImportError:
            raise ImportError(
                "completion requires shtab; run pip install 'hf-quantnoise[completion]'"
            ) from None
        from .parser import build_parser

        parser = build_parser(completes=True)
        _complete_files(parser, shtab.FILE, shtab.DIRECTORY)
        print(shtab.complete(parser, args.shell))


def _complete_files(parser: ArgumentParser, file: dict, folder: dict) -> None:
    """Mark the arguments that are files or folders."""
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for subparser in action.choices.values():
                _complete_files(subparser, file, folder)
        elif action.dest in _FILES or action.dest.endswith("_file"):
            action.complete = file  # type: ignore[attr-defined]
        elif action.dest in _FOLDERS or action.dest.endswith("name_or_path"):
            action.complete = folder  # type: ignore[attr-defined]
