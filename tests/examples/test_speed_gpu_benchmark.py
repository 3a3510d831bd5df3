"""The benchmark of speed on a GPU: its table, and its error without a GPU."""

import pytest
import speed_gpu as benchmark

from hf_quantnoise.modeling.kernels import triton_products


def test_table_shows_what_was_measured(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- report: speed_gpu -->\nold\n<!-- end of report -->\n")
    flags = ["--table", "--results", str(tmp_path / "none.jsonl"), "--page", str(page)]
    benchmark.main(flags)
    assert "\nNot measured: no GPU.\n" in page.read_text()
    variants = {
        "dense float32": {"ms": 0.5, "speed": 1.0},
        "packed, bf16": {"ms": 0.2, "speed": 2.5},
    }
    line = {"key": {"case": "Linear"}, "variants": variants, "command": "c", "machine": "m"}
    assert "| Linear | 0.5 | 2.50 |" in benchmark.table([line])


@pytest.mark.skipif(triton_products.is_available(), reason="there is a GPU")
def test_measuring_without_a_gpu_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"needs a CUDA GPU of compute capability 8\.0"):
        benchmark.main(["--results", str(tmp_path / "none.jsonl")])


def test_variants_differ_in_dtype_and_kernels(monkeypatch):
    monkeypatch.setattr(benchmark.nn.Module, "to", lambda self, device, dtype: self.type(dtype))
    found = benchmark.variants((64, 256), 4, 0)
    assert next(iter(found)) == benchmark.BASE and len(found) == 7
    assert not found["packed, bf16, decode only"].kernels and found["packed, bf16"].kernels
