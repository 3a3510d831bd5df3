"""Checks the package's structure: import order, import cycles, length of files and functions."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_quantnoise

ROOT = Path(hf_quantnoise.__file__).parent
# Files and folders of the package, lowest layer first: each imports only from its own layer and the
# layers before it.
LAYERS = (
    "version",
    "deferred_imports",
    "compat",
    "registry",
    "argument_checks",
    "text",
    "tables",
    "argument_parsing",
    "patterns",
    "files",
    "distributed",
    "dynamic_subclass",
    "module_modes",
    "layer_types",
    "blocks",
    "structure",
    "sharing",
    "pruning",
    "repository",
    "configuration",
    "lookups",
    "quantizers",
    "noise",
    "modeling",
    "batch_norm",
    "training_statistics",
    "hub",
    "registration",
    "size",
    "export",
    "publishing",
    "callback",
    "compression",
    "model_families",
    "recipes",
    "trainer_arguments",
    "metric_modules",
    "trainer",
    "runs",
    "cli",
    "__main__",
)
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50  # without the docstring
# Exceptions, each with the reason. Shorten or split a file before adding one.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}

FILES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for path in sorted(ROOT.rglob("*.py"))
}


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but those under `if TYPE_CHECKING`, which never run and cannot form a cycle.

    Imports inside functions do run and count: they only hide a cycle.
    """
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for node in child.orelse:
                yield from runtime_nodes(node)
        else:
            yield from runtime_nodes(child)


def file_of(module: tuple[str, ...]) -> str | None:
    """Return the file of a module of the package, or None if there is none."""
    names = ("/".join(module) + ".py", "/".join([*module, "__init__.py"]))
    return next((name for name in names if name in FILES), None)


def imported_files(file: str) -> set[str]:
    """Return the files of the package that a file imports, by relative or absolute imports."""
    package = tuple(file.split("/")[:-1])
    found = set()
    for node in runtime_nodes(FILES[file]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            base += tuple((node.module or "").split(".")) if node.module else ()
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == ROOT.name:
            base = tuple(node.module.split(".")[1:])
        else:
            continue
        for alias in node.names:
            # Either a module, or a name that the base module defines.
            imported = file_of((*base, alias.name)) or file_of(base)
            assert imported, f"{file} imports {'.'.join(base)}, which does not exist"
            found.add(imported)
    return found - {file}


def layer_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_layer_imports_only_lower_layers(file):
    layer = LAYERS.index(layer_of(file))
    for other in imported_files(file):
        assert other != "__init__.py", f"{file} imports from the package's __init__.py"
        assert LAYERS.index(layer_of(other)) <= layer, f"{file} imports {other}"


def test_imports_form_no_cycle():
    graph = {file: imported_files(file) for file in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_imported_files_resolves_relative_imports():
    assert imported_files("trainer.py") >= {"callback.py", "compression/__init__.py"}
    assert imported_files("hub/quantizer.py") >= {"configuration/__init__.py", "sharing.py"}
    assert imported_files("configuration/__init__.py") <= {
        file for file in FILES if file.startswith("configuration/")
    }


def test_imported_files_skips_type_checking_blocks():
    tree = ast.parse("if TYPE_CHECKING:\n    import a\nelse:\n    import b\ndef f():\n    import c")
    names = {alias.name for node in runtime_nodes(tree) for alias in getattr(node, "names", ())}
    assert names == {"b", "c"}


@pytest.mark.parametrize("file", FILES)
def test_file_length(file):
    lines = len((ROOT / file).read_text().splitlines())
    assert lines <= MAX_FILE_LINES or file in LONG_FILES


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines of a function, without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


@pytest.mark.parametrize("file", FILES)
def test_function_length(file):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = {
        f"{file}:{node.name}": length(node)
        for node in ast.walk(FILES[file])
        if isinstance(node, functions)
    }
    long = {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}
    assert long.keys() <= LONG_FUNCTIONS.keys()


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith(("quantizers/", "noise/"))])
def test_noise_and_quantizers_do_not_import_trainer(file):
    for node in ast.walk(FILES[file]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            assert not any("Trainer" in alias.name for alias in node.names)
