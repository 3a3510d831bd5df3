"""The builder of the page of examples/browser: what it replaces, refuses and writes."""

import json
import re
import shutil

import pytest
from browser import build
from page_server import make_server
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from hf_quantnoise import IPQConfig, quantize_model


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Empty files in place of the npm packages."""
    folder = tmp_path / "node_modules"
    for name in (*build.CODE, build.WASM):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    monkeypatch.setattr(build, "PACKAGES", folder)


def test_missing_npm_packages_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "PACKAGES", tmp_path / "node_modules")
    with pytest.raises(SystemExit, match=r"needs npm packages.*run: npm ci --ignore-scripts"):
        build.main(["--output", str(tmp_path / "site")])
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    ("files", "inner", "reason"),
    [
        (["notes.txt"], None, "has other files than a page .*notes.txt"),
        (["config.json", "model.safetensors"], None, "has other files than a page"),
        # The folder of the script has page.js, too.
        (["page.js", "index.html", "package.json"], None, "has other files than a page"),
        (["page.js", "runtime/ort.wasm"], "text/model/config.json", "contains the model of --text"),
    ],
)
def test_output_with_other_files_is_not_replaced(files, inner, reason, tmp_path):
    pytest.importorskip("onnxscript")
    site = tmp_path / "site"
    names = [*files, inner] if inner else files
    for name in names:
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("{}")
    model = str(site / "text" / "model") if inner else "missing/model"
    with pytest.raises(SystemExit, match=f"error: --output '.*site'.*{reason}"):
        build.main(["--text", model, "--image", "", "--output", str(site)])
    assert sorted(p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()) == sorted(
        names
    )


def test_a_page_is_replaced(tmp_path, packages):
    site = tmp_path / "site"
    build.write_page(site)
    (site / "models.json").write_text("{}")
    build.check_output(site, build.parse(["--text", "a/b"]))
    build.write_page(site)
    assert not (site / "models.json").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--text", "missing/model"], "invalid --text 'missing/model': no folder"),
        (["--text", "ENCODER"], "invalid --text .*would be random"),
        (["--text", "DENSE", "--text_float32", "ENCODER"], "--text_float32 .*would be random"),
        (["--text", "DENSE", "--text_float32", "PACKED"], "--text_float32 .*is compressed"),
        (["--text", "DENSE", "--text_labels", "one"], "has 1 names, .* has 2 classes"),
        (["--text", "REGRESSION"], "invalid --text .*one output"),
        (["--text", "NO_TOKENIZER"], "invalid --text .*only special tokens"),
        (["--text", "DENSE", "--block_size", "5"], "block_size"),
        (["--text", ""], "no models: pass --text or --image"),
    ],
)
def test_models_that_a_page_cannot_show_are_an_error(
    flags, reason, tiny_model, tmp_path, packages, monkeypatch
):
    config = AutoConfig.from_pretrained(tiny_model, num_hidden_layers=1)
    for name, labels in (("DENSE", 2), ("NO_TOKENIZER", 2), ("REGRESSION", 1)):
        config.num_labels = labels
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / name)
        if name != "NO_TOKENIZER":
            AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / name)
    shutil.copytree(tiny_model, tmp_path / "ENCODER")
    packed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "DENSE")
    quantize_model(packed, IPQConfig(block_size=4, n_centroids=16), progress=False)
    packed.save_pretrained(tmp_path / "PACKED")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        build.main([*flags, "--image", "", "--output", "site"])
    assert re.search(rf"^error: .*{reason}", str(ended.value)), ended.value


def test_port_in_use_is_an_error_before_the_page_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "build", lambda _: pytest.fail("the page was built"))
    with make_server(tmp_path) as server:
        port = server.server_address[1]
        with pytest.raises(SystemExit, match=f"error: --serve {port}: .* in use"):
            build.main(["--serve", str(port), "--output", str(tmp_path / "site")])


def test_tokenizer_is_limited_to_the_positions_of_the_model(tiny_model, tmp_path, packages):
    pytest.importorskip("onnxscript")
    folder = tmp_path / "model"
    config = AutoConfig.from_pretrained(tiny_model, num_hidden_layers=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model, model_max_length=10**30).save_pretrained(folder)
    build.main(["--text", str(folder), "--image", "", "--output", str(tmp_path / "site")])
    for name in ("compressed", "float32"):
        written = AutoTokenizer.from_pretrained(tmp_path / "site" / "text" / name)
        assert written.model_max_length == config.max_position_embeddings


def test_packages_are_pinned_and_from_the_default_registry():
    lock = json.loads((build.HERE / "package-lock.json").read_text())["packages"]
    named = json.loads((build.HERE / "package.json").read_text())["dependencies"]
    for name, version in named.items():
        assert lock[f"node_modules/{name}"]["version"] == version
    for name, package in lock.items():
        assert not name or package["integrity"].startswith("sha512-")
        assert package.get("resolved", "https://registry.npmjs.org/").startswith(
            "https://registry.npmjs.org/"
        )
