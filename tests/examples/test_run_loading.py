"""Errors of loading models name them, and give the reason that applies."""

import pytest

from hf_quantnoise.runs.loading import errors_name_model

START = "invalid --dense"


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("me/small", ValueError("it lacks 2 weights"), "'me/small': it lacks 2 weights"),
        ("me/small", OSError("no config.json"), "'me/small': no folder 'me/small', and cannot"),
        (
            "a/b/c",
            ValueError("Repo id must be"),
            "'a/b/c': no folder 'a/b/c', and not a valid name",
        ),
        ("folder", OSError("no config.json"), "'folder': no config.json"),
    ],
)
def test_reason_is_a_missing_model_only_if_nothing_was_read(name, error, message):
    with pytest.raises(ValueError, match=START) as raised, errors_name_model(START, name):
        raise error
    assert str(raised.value).startswith(f"{START} {message}")
