"""Saving, loading and pushing a config, as in PEFT."""

from __future__ import annotations

import os
import tempfile
from typing import Any, ClassVar

from huggingface_hub import ModelCard, ModelCardData, upload_folder

from ..argument_checks import require_output_folder
from ..files.durable import write_text
from ..files.reading import read_json
from ..repository import CARD, HOME, LIBRARY, TAG, create_repository, existing_card, find_file


class HubConfigMixin:
    """Mixin with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` for a config."""

    file_name: ClassVar[str]
    to_json_string: Any  # a method of the config, as is from_dict
    from_dict: Any

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the config's JSON file into a folder, which is created if missing."""
        save_directory = require_output_folder("save_directory", save_directory)
        os.makedirs(save_directory, exist_ok=True)
        write_text(self.to_json_string(), os.path.join(save_directory, self.file_name))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load the config from a folder, a Hub repository or a JSON file.

        Args:
            path: folder, repository or file.
            kwargs: arguments of ``hf_hub_download`` (``subfolder``, ``revision``, ``token``,
                ``cache_dir``, ``local_files_only``, ...).

        Raises:
            FileNotFoundError: naming the missing file.
            ValueError: naming the file, if it is damaged, or an invalid field.
            TypeError: if the file is a config of another class, or the path has another type.
        """
        hint = f"write it with {cls.__name__}.save_pretrained(folder) or push_to_hub(repo_id)"
        file_name = find_file(path, cls.file_name, hint, **kwargs)
        config = cls.from_dict(read_json(file_name))
        if not isinstance(config, cls):
            kind = type(config).__name__
            raise TypeError(f"{file_name} is an {kind}; load it with {kind}.from_pretrained")
        return config

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Upload the config to a repository, which is created if missing.

        A repository without a model card gets one that describes the file.

        Returns:
            A ``huggingface_hub.CommitInfo``.
        """
        repo_id = create_repository(
            repo_id, private=private, token=token, revision=revision, create_pr=create_pr
        )
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if existing_card(repo_id, revision, token) is None:
                self._card(repo_id).save(os.path.join(folder, CARD))
            return upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                token=token,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                revision=revision,
                create_pr=create_pr,
            )

    def _card(self, repo_id: str) -> ModelCard:
        name = type(self).__name__
        data = ModelCardData(library_name=LIBRARY, tags=[TAG])
        return ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n"
            f"# {repo_id.split('/')[-1]}\n\n"
            f"A `{name}` for [hf_quantnoise]({HOME}) (no model).\n\n"
            "```python\n"
            f"from hf_quantnoise import {name}\n\n"
            f'config = {name}.from_pretrained("{repo_id}")\n'
            "```\n\n"
            f"`{self.file_name}`:\n\n```json\n{self.to_json_string()}```\n"
        )
