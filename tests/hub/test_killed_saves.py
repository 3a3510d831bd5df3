"""A process that is killed while it saves leaves the old model, the new one, or an error."""

import json
import os
from pathlib import Path

import pytest
from support import killed_saves
from support.processes import torchrun

OF_TRANSFORMERS = killed_saves.OF_TRANSFORMERS
QUICK = ("shards over single",)
SLOW = (
    "shards over shards", "single over shards", "trainer, packed", "trainer, dense", "compress",
    "convert",
)  # fmt: skip

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing")


def results_of(folder: Path, *scenarios: str) -> dict:
    """Run scenarios and print the number of kills in each."""
    output = torchrun(Path(killed_saves.__file__), str(folder), *scenarios, processes=1)
    results = json.loads(output.partition("RESULTS")[2])
    for scenario, result in results.items():
        kills = sum(result["counts"].values()) - 1
        print(f"{scenario}: {kills} kills; found after them and the last, complete save: "
              f"{result['counts']}")  # fmt: skip
    return results


def require_all_or_nothing(results: dict) -> None:
    for scenario, result in results.items():
        assert result["counts"]["old"] > 5 and result["counts"]["new"] > 1, scenario
        assert result["lost"] == [], scenario
        if scenario not in ("trainer, dense", "convert"):  # read without this package
            assert all("interrupted-save" in error for error in result["errors"]), scenario


def test_killed_saves_leave_the_old_or_the_new_model(tmp_path):
    """If neither loads, the new model is complete in a subfolder, which the error names."""
    results = results_of(tmp_path, *QUICK, OF_TRANSFORMERS)
    of_transformers = results.pop(OF_TRANSFORMERS)
    require_all_or_nothing(results)
    # transformers' method is not all or nothing, but what it leaves is not taken for a model.
    assert of_transformers["counts"]["error"] > 2
    assert any("invalid weights_id" in error for error in of_transformers["errors"])


@pytest.mark.slow
def test_killed_saves_leave_the_old_or_the_new_model_in_all_scenarios(tmp_path):
    require_all_or_nothing(results_of(tmp_path, *SLOW))
