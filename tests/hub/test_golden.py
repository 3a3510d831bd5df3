"""Checkpoints of earlier versions of the package still load, with the same logits."""

import json
import shutil

import pytest
import torch
from golden.make import CASES, EXPECTED, HERE
from safetensors.torch import load_file

from hf_quantnoise import AutoQuantizedModel


@pytest.mark.parametrize("name", CASES)
def test_golden_checkpoint_loads_with_same_logits(name, tmp_path):
    """Matrix products are summed in another order on other processors and in other versions of
    torch: hence a tolerance of 1e-6 for logits of about one. Stored tensors are compared
    exactly."""
    batch = load_file(HERE / name / EXPECTED)
    expected = batch.pop("logits")
    model, info = AutoQuantizedModel.from_pretrained(HERE / name, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-6, atol=1e-6)
    assert expected.std() > 0.1, "logits of another model would differ by more than the tolerance"

    model.save_pretrained(tmp_path)
    old, new = (
        load_file(HERE / name / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    if name == "renamed":  # newer files have packed tensors under the model's own names
        assert stored_values(old) == stored_values(new) and old.keys() != new.keys()
        return
    for key, tensor in old.items():
        if tensor.numel() == 1 and key.endswith(".weight"):
            continue  # the sentinel; newer files have one for each part
        assert new[key].dtype == tensor.dtype and torch.equal(new[key], tensor), key


def stored_values(tensors):
    return sorted((str(t.dtype), t.shape, t.numpy().tobytes()) for t in tensors.values())


def test_golden_cases_cover_all_kinds_of_storage():
    configs = [json.loads((HERE / name / "config.json").read_text()) for name in CASES]
    stored = [config["quantization_config"] for config in configs]
    entries = [entry for each in stored for entry in each["plan"].values()]
    assert {each["scheme"] for each in stored} == {"ipq", "fixed_point"}
    assert {entry["scheme"] for entry in entries} == {"pq", "additive", "int", "row_groups"}
    assert {entry.get("codebook_bits") for entry in entries} >= {8, 16, 32}
    assert any(entry.get("activation_bits") for entry in entries)
    assert any(entry.get("tied_to") for entry in entries)
    assert any(entry.get("row_scale") for entry in entries)
    assert any(each["shared_layers"] for each in stored)
    assert any(each["pruned_layers"] for each in stored)
    assert {each.get("leftover_bits") for each in stored} >= {None, 8}
    assert any(name in each["plan"] for each in stored for name in each["left_dense"])
    files = [file for file in HERE.rglob("*") if file.suffix in (".json", ".safetensors")]
    assert sum(file.stat().st_size for file in files) < 150_000


def test_golden_comparison_detects_changed_config(tmp_path):
    shutil.copytree(HERE / "ipq", tmp_path / "ipq")
    path = tmp_path / "ipq" / "config.json"
    config = json.loads(path.read_text())
    config["layer_norm_eps"] = 1e-4
    path.write_text(json.dumps(config))
    batch = load_file(HERE / "ipq" / EXPECTED)
    expected = batch.pop("logits")
    model = AutoQuantizedModel.from_pretrained(tmp_path / "ipq")
    with torch.no_grad():
        assert (model(**batch).logits - expected).abs().max() > 1e-5
