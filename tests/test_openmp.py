"""torch's OpenMP library: how it is found, and functions that run on its threads."""

import ctypes
import io
from pathlib import Path

import pytest
import torch

from hf_quantnoise.compat import openmp


def test_openmp_runs_a_function_on_threads_of_torch():
    library = openmp.openmp()
    if library is None:
        pytest.skip("the OpenMP library of torch is unknown")
    numbers, before = [], torch.get_num_threads()
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
        lambda _: numbers.append((library.omp_get_thread_num(), library.omp_get_num_threads()))
    )
    library.GOMP_parallel(function, None, 2, 0)
    assert sorted(numbers) == [(0, 2), (1, 2)]
    torch.set_num_threads(3)
    assert openmp.usable_threads() == 3
    torch.set_num_threads(before)


@pytest.mark.parametrize("is_deleted", [False, True])
def test_openmp_is_found_in_folders_with_spaces_unless_deleted(is_deleted, tmp_path, monkeypatch):
    if openmp.openmp() is None:
        pytest.skip("the OpenMP library of torch is unknown")
    real = Path(openmp.openmp()._name)
    copied = tmp_path / "my env" / "libgomp" / real.name  # a folder of such a name, too
    copied.parent.mkdir(parents=True)
    copied.write_bytes(real.read_bytes())
    shown = f"{copied} (deleted)" if is_deleted else str(copied)
    lines = Path("/proc/self/maps").read_text().splitlines(keepends=True)
    # Other tests may have loaded another package's OpenMP.
    maps = "".join(line.replace(str(real), shown) for line in lines if str(real) in line)
    other = f"{lines[0].rpartition(' ')[0]} {copied.parent / 'libother.so'}\n"
    monkeypatch.setattr(openmp, "open", lambda *_, **__: io.StringIO(maps + other), raising=False)
    found = openmp.openmp.__wrapped__()
    assert found is None if is_deleted else found._name == str(copied)
