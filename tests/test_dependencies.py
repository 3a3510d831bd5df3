"""Checks that pyproject.toml, the constraints files and the CI script agree."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
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


@pytest.mark.parametrize(
    "target", ["lint", "test", "test-slow", "test-oldest", "docs", "wheel", "demo"]
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
