"""Text from files is escaped before it reaches a terminal, an error or Markdown."""

import json
import shutil

import pytest
from golden.make import HERE as GOLDEN

from hf_quantnoise import AutoQuantizedModel, QuantNoiseCard
from hf_quantnoise.cli import main
from hf_quantnoise.text import markdown, markdown_code, printable

UNSAFE = {
    "escape": "\x1b[2J",
    "newline": "a\nb",
    "carriage return": "a\rb",
    "bell": "\a",
    "backspace": "a\b",
    "C1": "\x9b31m",
    "right to left": "\u202egnp.exe",
    "isolate": "\u2066a",
    "zero width": "a\u200bb",
    "line separator": "a\u2028b",
    "surrogate": "\ud800",
    "no character": "\uffff",
}


@pytest.mark.parametrize("text", UNSAFE.values(), ids=UNSAFE)
def test_printable_escapes_unsafe_characters(text):
    assert printable(text).isprintable()
    assert printable(text) == repr(text)[1:-1]


def test_printable_keeps_other_text():
    for text in ("bert.encoder.layer.0", "größe", "層", r"a\d+", "it's", ""):
        assert printable(text) == text


def test_markdown_escapes_markup():
    assert markdown("a|b") == r"a\|b"
    assert markdown("<!-- x -->") == r"\<!-- x --\>"
    assert markdown("[a](http://b)") == r"\[a\](http://b)"
    assert markdown("in_proj: 'ffn' (0.3%)") == "in_proj: 'ffn' (0.3%)"


def test_markdown_code_cannot_be_closed_from_within():
    assert markdown_code("a.b") == "`a.b`"
    assert markdown_code("`<b>`") == "`` `<b>` ``"
    assert markdown_code("a\n\n# b") == r"`a\n\n# b`"


@pytest.fixture(params=UNSAFE.values(), ids=UNSAFE)
def unsafe(request, tmp_path):
    """A checkpoint with a text in every place of its config that takes any text."""
    shutil.copytree(GOLDEN / "shared", tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text())
    stored = values["quantization_config"]
    stored["left_dense"]["classifier"] = request.param
    stored["left_dense"][request.param] = "a reason"
    stored["pruned_layers"][request.param] = 1
    stored["target_modules"] = request.param
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path, request.param


@pytest.mark.parametrize("flags", [[], ["--per", "layer"], ["--json"]])
def test_report_escapes_text_of_files(unsafe, flags, capsys):
    folder, text = unsafe
    assert main(["report", str(folder), *flags]) == 0
    for stream in capsys.readouterr():
        assert all(line.isprintable() for line in stream.split("\n"))
        assert text not in stream


def test_plot_shows_any_text(unsafe, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder, _ = unsafe
    file = tmp_path / "sizes.png"
    assert main(["report", str(folder), "--png", str(file), "--per", "layer"]) == 0
    assert file.stat().st_size > 1_000


def test_card_escapes_text_of_files(unsafe):
    folder, text = unsafe
    card = QuantNoiseCard(title=text, dataset=text, after={"eval_x": 1.0}, training={text: text})
    rendered = card.render(AutoQuantizedModel.from_pretrained(folder)).text
    assert all(line.isprintable() for line in rendered.split("\n"))
    assert printable(text) in rendered.replace("\\[", "[").replace("\\\\", "\\")


@pytest.mark.parametrize("text", ["<!-- end of hf_quantnoise -->", "`<script>`", "[a](b)", "a|b"])
def test_card_shows_markup_of_files_as_text(text, tmp_path):
    shutil.copytree(GOLDEN / "ipq", tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"]["left_dense"]["classifier"] = text
    (tmp_path / "config.json").write_text(json.dumps(values))
    rendered = QuantNoiseCard().render(AutoQuantizedModel.from_pretrained(tmp_path)).text
    assert markdown(text) in rendered
    assert rendered.count("<!-- end of hf_quantnoise -->") == 1


@pytest.mark.parametrize("text", UNSAFE.values(), ids=UNSAFE)
def test_errors_escape_values_of_files(text, tmp_path, capsys):
    shutil.copytree(GOLDEN / "ipq", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    stored = config["quantization_config"]
    cases = [
        {"scheme": text},
        {text: 1},
        {"format_version": 9, "requires": text},
        {"format_version": text},
        {"observer": text},
        {"shared_layers": {text: 1}},
        {"plan": {**stored["plan"], text: next(iter(stored["plan"].values()))}},
        {"plan": {name: {**entry, "scheme": text} for name, entry in stored["plan"].items()}},
        {"plan": {name: {**entry, text: 1} for name, entry in stored["plan"].items()}},
    ]
    for case in cases:
        config["quantization_config"] = {**stored, **case}
        (tmp_path / "config.json").write_text(json.dumps(config))
        message = ""
        try:
            AutoQuantizedModel.from_pretrained(tmp_path)
        except ValueError as error:
            message = str(error)
        assert message.isprintable()
        capsys.readouterr()
        main(["report", str(tmp_path)])
        assert all(line.isprintable() for line in "".join(capsys.readouterr()).split("\n"))
