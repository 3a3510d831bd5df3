"""Two gloo processes: measurements on the batches of all ranks, and errors on all of them."""

import pytest
import torch
from support.processes import needs_gloo, on_two_ranks

PIECE = """
from torch import nn
import torch.nn.functional as F

from hf_quantnoise import FixedPointConfig, quantize_model
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.modeling.activations import calibrate, require_batches, require_runs
from hf_quantnoise.modeling.importance import measure_importance
from support.tiny import make_model

class Branching(nn.Module):
    \"\"\"One layer for positive inputs, another for negative ones, a third for none.\"\"\"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.idle = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.up(x) if x.sum() > 0 else self.down(x)

class Tied(nn.Module):
    \"\"\"Looks words up, or takes their vectors; either way the table is the head as well.\"\"\"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(x if x.is_floating_point() else self.table(x))

def inputs_of(sign):
    return sign * torch.rand(5, 4, generator=torch.Generator().manual_seed(2 + sign))

def importance(model, layers, *batches):
    return measure_importance(model, [list(own) for own in layers], list(batches), model)

both = [inputs_of(1), inputs_of(-1)]
words = [torch.tensor([[1, 1, 2]]), inputs_of(1)]
plain, tied = Branching(), Tied()
found["own"] = importance(plain, [[plain.up], [plain.down]], both[rank])
found["tied"] = importance(tied, [[tied.table, tied.head]], words[rank])
found["refused"] = error_of(importance, plain, [[plain.up], [plain.idle]], both[rank])
batch, runs = [{"x": both[rank]}], lambda batch: plain(**batch)
found["runs"] = error_of(require_runs, plain, [plain.up, plain.down], batch, runs)
found["runs not"] = error_of(require_runs, plain, [plain.up, plain.idle], batch, runs)
found["batches"] = error_of(require_batches, [1] * rank)
found["no batches"] = error_of(require_batches, [])

# Only the second rank's batches reach the layers; then no rank's do.
config = FixedPointConfig(bits=8, activation_bits=8)
generator = torch.Generator().manual_seed(rank)
batches = [{"input_ids": torch.randint(5, 320, (4, 9), generator=generator)}]
model = quantize_model(make_model("bert"), config, False, batches)
layers = [layer for _, layer in packed_layers(model)]
found["batch"] = batches
found["scales"] = {k: v.clone() for k, v in model.state_dict().items() if "input_" in k}
found["one runs"] = error_of(calibrate, model, layers, batches, lambda b: rank and model(**b))
found["its scales"] = {k: v.clone() for k, v in model.state_dict().items() if "input_" in k}
found["none runs"] = error_of(calibrate, model, layers, batches, lambda b: None)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(PIECE, tmp_path_factory.mktemp("ranks"))


def as_one(program: str) -> dict:
    """Return the results of one process with all batches."""
    scope = {"torch": torch, "rank": 0, "found": {}}
    head, _, _ = PIECE.partition("plain, tied =")
    exec(head + program, scope)
    return scope["found"]


@needs_gloo
def test_importance_uses_batches_of_all_ranks(ranks):
    single = as_one("""
plain, tied = Branching(), Tied()
found["own"] = importance(plain, [[plain.up], [plain.down]], *both)
found["tied"] = importance(tied, [[tied.table, tied.head]], *words)
""")
    for part in ("own", "tied"):
        for one, other, alone in zip(ranks[0][part], ranks[1][part], single[part], strict=True):
            assert torch.equal(one, other)
            torch.testing.assert_close(one, alone)
    assert single["tied"][0].shape == (10, 4)


@needs_gloo
def test_layer_that_no_rank_reaches_raises_on_all_ranks(ranks):
    for name, words in {
        "refused": "ValueError: importance: idle never ran",
        "runs not": "ValueError: activation_bits: idle never ran",
        "no batches": "ValueError: activation_bits needs calibration data",
        "none runs": "ValueError: activation_bits: ",
    }.items():
        assert ranks[0][name] == ranks[1][name] and ranks[0][name].startswith(words), name
    for name in ("runs", "batches", "one runs"):
        assert ranks[0][name] is None and ranks[1][name] is None, name


@needs_gloo
def test_input_scales_use_batches_of_all_ranks(ranks):
    from support.tiny import make_model

    from hf_quantnoise import FixedPointConfig, quantize_model

    config = FixedPointConfig(bits=8, activation_bits=8)
    for part, batches in {
        "scales": [ranks[0]["batch"][0], ranks[1]["batch"][0]],
        "its scales": ranks[1]["batch"],
    }.items():
        alone = quantize_model(make_model("bert"), config, False, batches).state_dict()
        assert len(ranks[0][part]) > 10
        for name, value in ranks[0][part].items():
            assert torch.equal(value, ranks[1][part][name]), name
            torch.testing.assert_close(value, alone[name])
