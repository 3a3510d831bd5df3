"""README, CONTRIBUTING and docs: links, paths and code refer to things that exist."""

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from transformers import BertConfig

import hf_quantnoise
from hf_quantnoise import CompressionArguments, FixedPointConfig, IPQConfig, QuantNoiseConfig
from hf_quantnoise.cli import COMMANDS, build_parser
from hf_quantnoise.cli.tasks import task_module

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
CONFIGS = {
    kind.__name__: {field.name for field in dataclasses.fields(kind) if field.init}
    for kind in (CompressionArguments, FixedPointConfig, IPQConfig, QuantNoiseConfig)
}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


SCRIPTS = {"run_glue.py": "glue", "run_clm.py": "clm", "run_image_classification.py": "images"}


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_links_and_anchors_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_paths_in_backticks_exist(page):
    """Paths are relative to the repository or to the package."""
    for path in re.findall(r"`([\w.]+(?:/[\w.]+)*/?)`", prose(page)):
        is_figure = re.fullmatch(r"compression/[a-z_]+", path)  # of a log
        if (
            not path.startswith("out/")
            and not is_figure
            and re.search(r"\w/|\w\.(py|toml|jsonl)$", path)
        ):
            places = (ROOT / path, ROOT / "hf_quantnoise" / path, ROOT / "examples" / path)
            assert any(place.exists() for place in places), path


@every_page
def test_python_code_parses_and_uses_existing_names(page):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom) and node.module == "hf_quantnoise":
            assert {alias.name for alias in node.names} <= set(hf_quantnoise.__all__)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = {keyword.arg for keyword in node.keywords}
            assert names <= CONFIGS.get(node.func.id, names), node.func.id


@every_page
def test_commands_parse(page, monkeypatch):
    """Each hf-quantnoise and examples/run_*.py command of a page has valid flags and values."""
    text = re.sub(r" *\\\n *", " ", prose(page))
    for line in re.findall(r"^    (?:hf-quantnoise|python examples/)(.+)$", text, re.MULTILINE):
        name, *words = shlex.split(line.partition(" > ")[0], comments=True)
        task = SCRIPTS.get(name) or (name == "finetune" and words.pop(0))
        if "--help" in words or not (task or name in COMMANDS):
            continue
        if task:
            pytest.importorskip("datasets")
            # --recipe reads the config of the model, which may be on the Hub.
            monkeypatch.setattr(
                "hf_quantnoise.runs.arguments.load_config", lambda *_, **__: BertConfig()
            )
            task_module(task, "finetune").example.parse(words)
        else:
            build_parser().parse_args([name, *words])


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_page_begins_with_title_and_paragraph(page):
    title, paragraph = page.read_text().split("\n\n")[:2]
    assert re.fullmatch(r"# .+", title)
    assert re.match(r"\w|`\w", paragraph), paragraph
