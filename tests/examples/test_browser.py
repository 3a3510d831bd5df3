"""The page of examples/browser, in a headless Chromium: answers, bytes, requests."""

import json
import os
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import in_browser
import pytest
import torch
from browser import build
from chromium import Chromium, find_chromium
from datasets import Dataset
from page_server import make_server
from support.tiny import IMAGE_SIZE
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
)

from hf_quantnoise import IPQConfig, quantize_model

SENTENCE = "the film was very good and the plot was not dull"
REFUSED = "https://example.org/"  # by the content security policy of the page
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True, "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "resample": 2,
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip


def save_models(folder: Path, tiny_model: str):
    """Save a dense and a packed BERT, and a packed ViT; return the models by name."""
    torch.manual_seed(0)
    labels = {0: "negative", 1: "positive"}
    config = AutoConfig.from_pretrained(
        tiny_model, num_hidden_layers=1, id2label=labels,
        initializer_range=0.3,  # so that answers differ
    )  # fmt: skip
    dense = AutoModelForSequenceClassification.from_config(config).eval()
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "dense")
    dense.save_pretrained(folder / "dense")
    packed = AutoModelForSequenceClassification.from_pretrained(folder / "dense").eval()
    packed = quantize_model(packed, IPQConfig(block_size=4, n_centroids=16), progress=False)
    packed.save_pretrained(folder / "packed")
    image = ViTForImageClassification(
        ViTConfig(
            image_size=IMAGE_SIZE, patch_size=8, hidden_size=32, intermediate_size=64,
            num_hidden_layers=1, num_attention_heads=2, num_labels=6,
        )
    ).eval()  # fmt: skip
    image = quantize_model(image, IPQConfig(block_size=4, n_centroids=16), progress=False)
    image.save_pretrained(folder / "image")
    (folder / "image" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return {"dense": dense, "packed": packed, "image": image}


@pytest.fixture(scope="module")
def page(tmp_path_factory, tiny_model):
    """Build the page with tiny models and open it; the browser has loaded the packed BERT."""
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    if not (chromium := find_chromium()):
        pytest.skip("needs Chromium: apt install chromium, or set CHROMIUM to its path")
    if not build.PACKAGES.is_dir():
        pytest.skip(f"needs npm packages: npm ci --ignore-scripts --prefix {build.HERE}")
    folder = tmp_path_factory.mktemp("browser")
    models, site = save_models(folder, tiny_model), folder / "site"
    build.main([
        *("--text", str(folder / "packed"), "--text_float32", str(folder / "dense")),
        *("--image", str(folder / "image"), "--output", str(site)),
    ])  # fmt: skip
    with make_server(site) as server, Chromium(chromium) as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        rate = {"latency": 0, "downloadThroughput": 10_000_000, "uploadThroughput": -1}
        browser.send("Network.emulateNetworkConditions", offline=False, **rate)
        browser.open(url)
        browser.wait_for("document.querySelector('footer .bytes')?.textContent")
        value = "document.querySelector('footer progress').value"
        progress = [browser.evaluate(value) for _ in range(20)]
        browser.wait_for("document.querySelectorAll('#text li').length > 0")
        yield SimpleNamespace(
            browser=browser, url=url, site=site, models=models, progress=progress,
            tokenizer=AutoTokenizer.from_pretrained(folder / "dense"),
        )  # fmt: skip
        server.shutdown()
        assert not [text for text in browser.problems if REFUSED not in text]


def card(folder: str) -> str:
    return f"document.querySelector('[data-folder=\"{folder}\"]')"


def in_page(page, folder: str, task: str, body: str):
    """Return the value of JavaScript that uses the pipeline of a model as ``classify``."""
    return page.browser.evaluate(f"""(async () => {{
        const {{ load }} = await import("./page.js");
        const classify = await load("{task}", {{ folder: "{folder}" }});
        {body}
    }})()""")


def write(page, sentence: str) -> None:
    """Write into the field as a user does."""
    page.browser.evaluate(f"""{{
        const field = document.querySelector("textarea");
        field.value = "{sentence}";
        field.dispatchEvent(new Event("input"));
    }}""")


@torch.no_grad()
def expected(page, name: str, sentence: str) -> torch.Tensor:
    return page.models[name](**page.tokenizer(sentence, return_tensors="pt")).logits[0]


@pytest.mark.parametrize(("folder", "name"), [("compressed", "packed"), ("float32", "dense")])
def test_logits_of_text_equal_those_of_torch(page, folder, name):
    logits = in_page(
        page, f"text/{folder}", "text-classification",
        f"""const {{ logits }} = await classify.model(classify.tokenizer("{SENTENCE}"));
        return [...logits.data];""",
    )  # fmt: skip
    torch.testing.assert_close(
        torch.tensor(logits), expected(page, name, SENTENCE), rtol=0, atol=1e-5
    )


def test_logits_of_a_picture_equal_those_of_torch(page):
    pixels, shape, logits = in_page(
        page, "image/compressed", "image-classification",
        """const { RawImage } = await import("@huggingface/transformers");
        const inputs = await classify.processor(await RawImage.read("samples/china.jpg"));
        const { logits } = await classify.model(inputs);
        const { data, dims } = inputs.pixel_values;
        return [[...data], dims, [...logits.data]];""",
    )  # fmt: skip
    assert shape == [1, 3, IMAGE_SIZE, IMAGE_SIZE]
    with torch.no_grad():
        wanted = page.models["image"](torch.tensor(pixels).view(shape)).logits[0]
    torch.testing.assert_close(torch.tensor(logits), wanted, rtol=0, atol=1e-4)


def test_answer_follows_the_sentence(page):
    answers = {}
    for sentence in ("boring", SENTENCE):
        write(page, sentence)
        scores = expected(page, "packed", sentence).softmax(-1)
        best = int(scores.argmax())
        wanted = f"{['negative', 'positive'][best]}{100 * scores[best]:.1f} %"
        first = f"{card('text/compressed')}.querySelector('li').textContent"
        page.browser.wait_for(f"{first} === '{wanted}'", 10)
        answers[sentence] = wanted
    assert len(set(answers.values())) == 2


def test_bytes_shown_are_those_of_the_files(page):
    page.browser.evaluate(f"{card('text/float32')}.querySelector('button').click()")
    page.browser.wait_for(f"{card('text/float32')}.querySelector('li')?.textContent")
    for folder in ("text/compressed", "text/float32", "runtime"):
        files = [path for path in (page.site / folder).rglob("*") if path.is_file()]
        size = sum(os.path.getsize(path) for path in files)
        element = "document.querySelector('footer')" if folder == "runtime" else card(folder)
        shown, value, text = page.browser.evaluate(f"""[
            {element}.dataset.bytes, {element}.querySelector("progress").value,
            {element}.querySelector(".bytes").textContent]""")
        assert (int(shown), value) == (size, 1)
        megabytes = f"{size / 1e6:.{2 if size < 1e7 else 1}f} MB"
        assert text == f"{megabytes} of {megabytes} downloaded"
    small, large = (
        page.site / f"text/{name}/onnx/model.onnx" for name in ("compressed", "float32")
    )
    assert small.stat().st_size < large.stat().st_size


def test_progress_grows_while_files_arrive(page):
    assert page.progress == sorted(page.progress)
    assert any(0 < value < 1 for value in page.progress)


def test_picture_can_be_dropped_and_samples_chosen(page):
    page.browser.evaluate("document.querySelector('#tab-image').click()")
    list_ = f"{card('image/compressed')}.querySelector('ol').textContent"
    first = page.browser.wait_for(list_)
    page.browser.evaluate("""(async () => {
        const canvas = new OffscreenCanvas(64, 48);
        const context = canvas.getContext("2d");
        context.fillStyle = "red";
        context.fillRect(0, 0, 40, 48);
        const file = new File([await canvas.convertToBlob()], "red.png", { type: "image/png" });
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(file);
        document.querySelector(".picture").dispatchEvent(new DragEvent("drop", { dataTransfer }));
    })()""")
    assert page.browser.evaluate("document.querySelector('#picture').src").startswith("blob:")
    page.browser.wait_for(f"{list_} !== {json.dumps(first)}", 10)
    page.browser.evaluate("document.querySelector('#samples button').click()")
    page.browser.wait_for(f"{list_} === {json.dumps(first)}", 10)
    page.browser.evaluate("document.querySelector('#tab-text').click()")


def test_tabs_are_reached_with_arrow_keys(page):
    press = {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39}
    page.browser.evaluate("document.querySelector('#tab-text').focus()")
    for selected in ("tab-image", "tab-text"):
        page.browser.send("Input.dispatchKeyEvent", type="keyDown", **press)
        page.browser.send("Input.dispatchKeyEvent", type="keyUp", **press)
        assert page.browser.evaluate("document.activeElement.id") == selected
        assert (
            page.browser.evaluate("document.querySelector('[aria-selected=true]').id") == selected
        )


def test_benchmark_measures_in_the_page(page, tmp_path):
    data = Dataset.from_dict({"sentence": ["boring", SENTENCE, "a warm film"]})
    answers = in_browser.measure_answers(page.browser, "text/compressed", data)
    assert answers == [int(expected(page, "packed", s).argmax()) for s in data["sentence"]]
    folders = {"small": "text/compressed", "large": "text/float32"}
    times = in_browser.measure_times(page.browser, folders, 1)
    assert {*times} == {*folders}
    row = {
        "key": {"variant": "small"}, "ms": {str(n): ms for n, ms in times["small"].items()},
        "download": in_browser.downloads(page.site, "text/compressed"), "accuracy": 0.5,
        "agreement": 1.0, "wasm_bytes": 17e6, "browser": "Chrome/1", "command": "c", "machine": "m",
    }  # fmt: skip
    size = (page.site / "text/compressed/onnx/model.onnx").stat().st_size
    assert f"| small | {size / 1e6:.2f} |" in in_browser.table([row])
    assert all(part["gzip"] < part["bytes"] for part in row["download"].values())


@pytest.fixture
def reopened(page):
    """Load the page again; problems that it logs in the test are expected."""
    known = list(page.browser.problems)
    page.browser.open(page.url)
    page.browser.wait_for("document.querySelectorAll('#text li').length > 0")
    yield page
    page.browser.problems[:] = known


def test_failed_download_is_announced_and_can_be_repeated(reopened):
    browser, part = reopened.browser, card("text/float32")
    browser.send("Network.setBlockedURLs", urls=["*/text/float32/onnx/*"])
    browser.evaluate(f"{part}.querySelector('button').click()")
    browser.wait_for(f"{part}.querySelector('[aria-live]').textContent.startsWith('Failed')")
    browser.send("Network.setBlockedURLs", urls=[])
    assert not browser.evaluate(f"{part}.querySelector('button').hidden")
    browser.evaluate(f"{part}.querySelector('button').click()")
    browser.wait_for(f"{part}.querySelectorAll('meter').length == 2")
    assert browser.evaluate(f"{part}.querySelector('button').hidden")


def test_failed_runtime_is_downloaded_again(page):
    known, browser, part = list(page.browser.problems), page.browser, card("text/compressed")
    wasm = page.site / "runtime" / Path(build.WASM).name
    wasm.rename(page.site / "moved")
    browser.open(page.url)
    browser.wait_for(f"{part}?.textContent.includes('{wasm.name}: status 404')")
    (page.site / "moved").rename(wasm)
    browser.evaluate(f"{part}.querySelector('button').click()")
    browser.wait_for(f"{part}.querySelectorAll('meter').length == 2")
    browser.problems[:] = known


def test_answer_is_removed_with_its_sentence(reopened):
    browser, part = reopened.browser, card("text/compressed")
    write(reopened, " ")
    browser.wait_for(f"{part}.querySelector('ol').textContent === ''")
    assert browser.evaluate(f"{part}.querySelector('.time').textContent") == ""
    write(reopened, SENTENCE)
    browser.wait_for(f"{part}.querySelectorAll('meter').length == 2")


def test_picture_that_cannot_be_read_replaces_the_answer(reopened):
    browser, part = reopened.browser, card("image/compressed")
    browser.evaluate("document.querySelector('#tab-image').click()")
    browser.wait_for(f"{part}.querySelectorAll('meter').length > 0")
    browser.evaluate("""{
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File(["no picture"], "a.png", { type: "image/png" }));
        document.querySelector(".picture").dispatchEvent(new DragEvent("drop", { dataTransfer }));
    }""")
    browser.wait_for(f"{part}.querySelector('ol').textContent.startsWith('Failed')")
    assert browser.evaluate(f"{part}.querySelectorAll('meter').length") == 0
    browser.evaluate("document.querySelector('#samples button').click()")
    browser.wait_for(f"{part}.querySelectorAll('meter').length > 0")


def test_no_request_leaves_the_loopback(page):
    assert page.browser.evaluate(f"fetch('{REFUSED}').then(() => false, () => true)")
    assert any(f"'{REFUSED}' violates" in text for text in page.browser.problems)
    hosts = {re.match(r"(data|blob|https?://[^/]+)", url)[1] for url in page.browser.requests}
    assert hosts <= {page.url.rstrip("/"), "data", "blob"}
    assert f"{page.url}text/compressed/onnx/model.onnx" in page.browser.requests
