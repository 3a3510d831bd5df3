"""Quantization configs that several tests use, by name."""

from torch import Tensor, nn

from hf_quantnoise import FixedPointConfig, IPQConfig
from hf_quantnoise.modeling import packed_layers

PQ = {"block_size": 4, "n_centroids": 16}
STORED = {
    "ipq": IPQConfig(**PQ, codebook_bits=32),
    "16 bits": IPQConfig(**PQ, codebook_bits=16),
    "8 bits": IPQConfig(**PQ, codebook_bits=8),
    "rows": IPQConfig(**PQ, row_scale=True),
    "int8": FixedPointConfig(bits=8),
}


def stored(*names: str) -> dict:
    """Return some of them."""
    return {name: STORED[name] for name in names}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and codes (which are buffers) by name, tied ones under each name."""
    return dict(model.state_dict(keep_vars=True))


def layers_of_stages(model: nn.Module) -> list[nn.Module]:
    """Return the layers that the stages packed: packed layers without leftovers."""
    leftovers = model.config.quantization_config.left_dense
    return [layer for name, layer in packed_layers(model) if name not in leftovers]


def matrices(model: nn.Module) -> dict[str, str]:
    """Return name -> owner of each parameter of two or more dimensions; ties count twice."""
    return {
        name: name.rpartition(".")[0]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.dim() >= 2
    }


def assert_listed(model, names):
    """Assert that each matrix of the dense model is packed by a stage, or listed with a reason.

    The reason of those that are packed as leftovers ends with how.
    """
    config = model.config.quantization_config
    assert {name for name, _ in packed_layers(model)} == config.plan.keys() != set()
    for name, owner in names.items():
        reasons = [config.left_dense[key] for key in (name, owner) if key in config.left_dense]
        if owner in config.plan and not reasons:
            continue
        assert len(reasons) == 1 and reasons[0], name
        assert reasons[0].endswith("; stored as int8 channel") == (owner in config.plan), name
