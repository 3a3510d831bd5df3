"""The benchmark of speed: one line per case, ratios to the dense model, tables on a page."""

import pytest
import speed as benchmark
import speed_models
from results_file import read_lines

from hf_quantnoise.modeling.kernels import int8
from hf_quantnoise.quantizers import ProductQuantizer

needs_vnni = pytest.mark.skipif(not int8.is_available(), reason="the processor has no VNNI")


@needs_vnni
def test_cases_are_measured_once_and_written_to_a_page(tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- report: speed -->\nold\n<!-- end of report -->\nafter\n")
    flags = [
        *("--case", "tiny", "--threads", "1", "--repetitions", "2"),
        *("--results", str(tmp_path / "r.jsonl"), "--page", str(page)),
    ]
    monkeypatch.setattr(benchmark, "SHORTEST", 0)
    benchmark.main(flags)
    (line,) = read_lines(tmp_path / "r.jsonl")
    figures = line["variants"]
    assert figures["dense float32"]["speed"] == 1
    for name, found in figures.items():
        assert found["ms"] > 0 and found["quartiles"][0] <= found["speed"] <= found["quartiles"][1]
        assert name == "dense float32" or found["bytes"] != figures["dense float32"]["bytes"]
    assert figures["packed"]["bytes"] < figures['optimized, "int8"']["bytes"]
    assert figures['optimized, "int8"']["bytes"] < figures['optimized, "bf16"']["bytes"]
    assert set(line["load"]) < set(figures)
    monkeypatch.setattr(benchmark, "measure", None)  # a finished case is not measured again
    benchmark.main(flags)
    assert read_lines(tmp_path / "r.jsonl") == [line]
    written = page.read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    row = f"| tiny, 1x8 tokens | {figures['dense float32']['ms']:.3g} | "
    assert row in written and row in capsys.readouterr().out


@needs_vnni
def test_all_variants_of_a_linear_run_and_agree(monkeypatch):
    monkeypatch.setattr(speed_models, "LINEAR", (32, 96))
    subject = speed_models.linear(5, 8)
    monkeypatch.setattr(
        speed_models,
        "ProductQuantizer",
        lambda d, k, *rest, **named: ProductQuantizer(d, 16, *rest, **named),
    )
    models = speed_models.variants(subject, 0)
    outputs = {name: subject.run(model).detach().float() for name, model in models.items()}
    packed = [name for name in outputs if "packed" in name or "optimized" in name]
    for name in packed:
        assert (outputs[name] - outputs["packed"]).std() < 0.1 * outputs["packed"].std()


def test_empty_table_is_an_error():
    with pytest.raises(ValueError, match="no finished case"):
        benchmark.table([])
