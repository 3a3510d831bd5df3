"""What pyproject.toml allows and what constraints.txt installs agree."""

from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(*extras: str) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"]]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return {canonicalize_name(line.name): line for line in map(Requirement, lines)}


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in (raw.split("#")[0].strip() for raw in lines) if line]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def makefile_variable(name: str) -> str:
    (line,) = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(f"{name} ")
    ]
    return line.split(":=")[1].strip()


def test_all_that_is_installed_is_pinned_within_its_bounds():
    pinned = pins()
    for name, requirement in requirements(*makefile_variable("EXTRAS").split(",")).items():
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert pinned[name] in requirement.specifier, f"constraints.txt: {requirement}"
