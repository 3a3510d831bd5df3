"""Validation of a model card by the Hub, which does not need a repository."""

from __future__ import annotations

from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from ..argument_checks import shorten
from ..text import printable


def rejected_metadata(card: str, token: str | None = None) -> str | None:
    """Return why the Hub rejects the metadata of a model card, or None if they are valid.

    ``ModelCard.validate`` does the same without a token, and in huggingface_hub 1 at a fixed
    address instead of ``HF_ENDPOINT``.

    Args:
        card: the content of the file.
        token: as in ``push_to_hub``.
    """
    response = get_session().post(
        f"{constants.ENDPOINT}/api/validate-yaml",
        json={"repoType": constants.REPO_TYPE_MODEL, "content": card},
        headers={**build_hf_headers(token=token), "Accept": "text/plain"},
    )
    if response.status_code == 400:
        return shorten(printable(" ".join(response.text.split()))).rstrip(".")
    hf_raise_for_status(response)
    return None
