"""Collectives of ``distributed.py``, on two gloo processes and on one."""

import pytest
import torch
from support.processes import needs_gloo, on_two_ranks

from hf_quantnoise.distributed import (
    broadcast_from_rank_0,
    max_over_ranks,
    on_any_rank,
    raise_on_all_ranks,
    sum_over_ranks,
)

PROGRAM = """
from hf_quantnoise.distributed import (
    broadcast_from, broadcast_from_rank_0, max_over_ranks, on_any_rank, raise_on_all_ranks,
    sum_over_ranks,
)

def raise_together(*errors):
    with raise_on_all_ranks():
        if errors[rank] is not None:
            raise errors[rank]

found["none"] = error_of(raise_together, None, None)
found["second"] = error_of(raise_together, None, ValueError("field=2: too large"))
found["both"] = error_of(raise_together, ValueError("field=1"), ValueError("field=2"))
found["other"] = error_of(raise_together, KeyError("weight"), None)
found["flags"] = on_any_rank([rank == 0, rank == 1, False, True])
found["no flags"] = on_any_rank([])
every_other = torch.arange(6.0)[::2] + rank  # not contiguous
found["sum"] = [sum_over_ranks(every_other).tolist(), every_other.tolist()]
found["max"] = max_over_ranks(torch.tensor([1.0 - rank, rank])).tolist()
found["of"] = [broadcast_from_rank_0(torch.tensor(rank)).item()]
found["of"].append(broadcast_from(torch.tensor(rank), 1).item())
"""


@needs_gloo
def test_two_ranks_agree(tmp_path):
    first, second = on_two_ranks(PROGRAM, tmp_path)
    assert first["none"] is None and second["none"] is None
    assert first["second"] == second["second"] == "ValueError: field=2: too large"
    assert (first["both"], second["both"]) == ("ValueError: field=1", "ValueError: field=2")
    assert first["other"] == "KeyError: 'weight'"
    assert second["other"] == "RuntimeError: rank 0 stopped with KeyError: 'weight'"
    for found in (first, second):
        assert found["flags"] == [True, True, False, True] and found["no flags"] == []
        assert found["sum"] == [[1.0, 5.0, 9.0]] * 2
        assert found["max"] == [1.0, 1.0]
        assert found["of"] == [0, 1]


def test_one_process_is_unchanged():
    tensor = torch.tensor([1.0, 2.0])
    for action in (sum_over_ranks, max_over_ranks, broadcast_from_rank_0):
        assert action(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]
    assert on_any_rank([True, False]) == [True, False]
    with pytest.raises(KeyError, match="weight"), raise_on_all_ranks():
        raise KeyError("weight")
