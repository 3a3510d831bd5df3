"""What pyproject.toml allows, what the two files of constraints install, and what CI runs agree."""

from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What the package hangs on from release to release. torch has one pin in both files, the build for
# CPUs that was tested.
AT_THEIR_BOUND = ("transformers", "huggingface_hub", "accelerate", "safetensors")


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
    (line,) = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(f"{name} ")
    ]
    return line.split(":=")[1].strip()


@pytest.mark.parametrize(
    ("file", "extras"),
    [("constraints.txt", "EXTRAS"), ("constraints-oldest.txt", "OLDEST_EXTRAS")],
)
def test_all_that_is_installed_is_pinned_within_its_bounds(file, extras):
    pinned = pins(file)
    for name, requirement in requirements(*makefile_variable(extras).split(",")).items():
        assert name in pinned, f"{file} does not pin {name}"
        assert pinned[name] in requirement.specifier, f"{file}: {requirement}"


@pytest.mark.parametrize("name", AT_THEIR_BOUND)
def test_the_oldest_set_is_the_lower_bounds(name):
    name = canonicalize_name(name)
    bound, pinned = lower_bound(requirements()[name]), pins("constraints-oldest.txt")[name]
    assert pinned == bound, f"{name} is allowed from {bound} on, and tested from {pinned} on"


def test_both_sets_have_one_torch():
    assert pins("constraints.txt")["torch"] == pins("constraints-oldest.txt")["torch"]


def test_ci_runs_both_sets_and_the_slow_tests():
    script = (ROOT / ".ci" / "run").read_text()
    assert "\nmake test |" in script
    assert "\nmake test-slow\n" in script and "\nmake test-oldest\n" in script
