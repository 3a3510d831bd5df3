"""Checks that pyproject.toml, the constraints files and the CI script agree."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(TEXT)["project"]
# The dependencies whose releases can break the package. torch is not one of them: both files pin
# the same version, the CPU build that was tested.
PINNED_AT_LOWER_BOUND = ("transformers", "huggingface_hub", "accelerate", "safetensors")


def requirements(*extras: str) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"]]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return {canonicalize_name(line.name): line for line in map(Requirement, lines)}


def pins(file: str) -> dict[str, Version]:
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = [part.version for part in requirement.specifier if part.operator == ">="]
    return Version(bound)


def makefile_variable(name: str) -> str:
    lines = (ROOT / "Makefile").read_text().replace("\\\n", "").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name} ")]
    return line.split(":=")[1].strip()


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yield the packages that a module imports, and whether at its top level."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            yield name.partition(".")[0], node in tree.body


def imported(*folders: str, top_level: bool) -> dict[str, str]:
    """Return distribution -> a file that imports it, without the standard library and this one."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    own = {"hf_quantnoise", *(file.stem for file in files)}
    distributions = packages_distributions()
    found = {}
    for file in files:
        for name, is_top_level in imports(ast.parse(file.read_text())):
            if is_top_level == top_level and name not in sys.stdlib_module_names | own:
                found[canonicalize_name(distributions.get(name, [name])[0])] = file.name
    return found


USERS_EXTRAS = sorted(PROJECT["optional-dependencies"].keys() - {"test", "docs", "dev"})


def test_imports_at_the_top_of_the_package_are_dependencies():
    """Except for ``runs/`` (extra: examples), a kernel (cpu), and triton, which torch requires."""
    needed = imported("hf_quantnoise", top_level=True)
    kernel = imported("hf_quantnoise/modeling/kernels/compiled", top_level=True)
    assert kernel.keys() - requirements().keys() == {"llvmlite"} <= requirements("cpu").keys()
    del needed["llvmlite"]
    runs = imported("hf_quantnoise/runs", "examples", top_level=True)
    assert "numpy" in needed and "numpy" in requirements()
    assert needed.keys() - requirements().keys() - runs.keys() == {"triton"}
    declared = requirements("examples", "trl", "sentence-transformers", "space").keys()
    assert {name: file for name, file in runs.items() if name not in declared} == {}


def test_imports_inside_functions_are_declared_as_extras():
    needed = imported("hf_quantnoise", "examples", top_level=False)
    declared = requirements(*USERS_EXTRAS).keys()
    assert {name: file for name, file in needed.items() if name not in declared} == {}


def test_dependencies_are_imported():
    everything = imported("hf_quantnoise", top_level=True)
    everything |= imported("hf_quantnoise", top_level=False)
    assert requirements().keys() <= everything.keys()


def test_lower_bounds_say_why():
    block = re.search(r"^dependencies = \[\n(.*?)^\]", TEXT, re.DOTALL | re.MULTILINE)[1]
    bare, comment = [], False
    for line in block.splitlines():
        if not line.lstrip().startswith("#") and not comment and "#" not in line:
            bare.append(line)
        comment = line.lstrip().startswith("#")
    assert not bare


def test_bounds_that_transformers_sets_are_its_own():
    """At the oldest supported version; newer ones may require more."""
    if Version(version("transformers")) != lower_bound(requirements()["transformers"]):
        pytest.skip("checked with the oldest supported transformers, by make test-oldest")
    theirs = {canonicalize_name(r.name): r for r in map(Requirement, requires("transformers"))}
    for line in re.findall(r'"(.+)",  # required by transformers', TEXT):
        own = Requirement(line)
        assert lower_bound(own) == lower_bound(theirs[canonicalize_name(own.name)]), line


@pytest.mark.parametrize(
    ("file", "extras"),
    [("constraints.txt", "EXTRAS"), ("constraints-oldest.txt", "OLDEST_EXTRAS")],
)
def test_constraints_pin_every_requirement_within_its_bounds(file, extras):
    pinned = pins(file)
    for name, requirement in requirements(*makefile_variable(extras).split(",")).items():
        assert name in pinned, f"{file} does not pin {name}"
        assert pinned[name] in requirement.specifier, f"{file}: {requirement}"


@pytest.mark.parametrize("name", PINNED_AT_LOWER_BOUND)
def test_oldest_constraints_are_the_lower_bounds(name):
    name = canonicalize_name(name)
    bound, pinned = lower_bound(requirements()[name]), pins("constraints-oldest.txt")[name]
    assert pinned == bound, f"{name} is allowed from {bound}, but tested from {pinned}"


def test_both_constraints_pin_the_same_torch():
    assert pins("constraints.txt")["torch"] == pins("constraints-oldest.txt")["torch"]


def test_wheel_is_tried_without_and_with_the_extra_of_the_demo():
    """In an environment that has nothing else, see `make wheel`."""
    recipe = (ROOT / "Makefile").read_text().partition("\nwheel: ")[2].partition("\nclean: ")[0]
    steps = ["dist/*.whl\n", "q.__all__", "bin/hf-quantnoise --help", ")[examples]", "demo.py"]
    assert [recipe.find(step) for step in steps] == sorted(recipe.find(step) for step in steps)
    assert all(step in recipe for step in steps)


@pytest.mark.parametrize(
    "target", ["lint", "test", "test-slow", "test-oldest", "test-space", "docs", "wheel", "demo"]
)
def test_ci_runs_every_check(target):
    commands = [line.split("#")[0].split() for line in (ROOT / ".ci/run").read_text().splitlines()]
    assert ["make", target] in [command[:2] for command in commands]


def test_version_independent_tests_exist():
    missing = [
        name
        for name in makefile_variable("VERSION_INDEPENDENT").split()
        if not (ROOT / name).exists()
    ]
    assert not missing
