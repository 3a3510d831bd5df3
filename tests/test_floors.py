"""The house: who may import whom, and how large a file may grow."""

import ast
from pathlib import Path

import pytest

import hf_quantnoise

ROOT = Path(hf_quantnoise.__file__).parent
FLOORS = (
    "version",
    "registry",
    "distributed",
    "dynamic_subclass",
    "layer_types",
    "blocks",
    "structure",
    "sharing",
    "pruning",
    "validation",
    "repository",
    "configuration",
    "quantizers",
    "noise",
    "modeling",
    "hub",
    "size",
    "export",
    "publishing",
    "callback",
    "compression",
    "trainer",
    "runs",
    "cli",
    "__main__",
)
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def floor_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_floors(path: Path) -> set[str]:
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(*base, *name.split("."))[0] for name in names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_floor_imports_only_from_the_floors_above_it(path):
    own = FLOORS.index(floor_of(path))
    for name in imported_floors(path):
        assert FLOORS.index(name) <= own, f"{path.name} imports from {name}"


def test_the_walk_sees_relative_imports():
    assert imported_floors(ROOT / "trainer.py") >= {"callback", "compression", "configuration"}
    assert imported_floors(ROOT / "hub" / "quantizer.py") >= {"modeling", "sharing"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_grows_past_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def test_noise_and_quantizers_know_nothing_of_trainer():
    for folder in ("quantizers", "noise"):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                    "transformers"
                ):
                    assert not any("Trainer" in alias.name for alias in node.names)
