"""FSDP: sharding that is refused, sharded units, and tensors that rank 0 has read."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DynamoBackend
from support.stacked import make_stacked
from support.tiny import VOCABULARY

import hf_quantnoise  # noqa: F401  (its models load)
from hf_quantnoise.compression.training import fsdp
from hf_quantnoise.compression.training.fsdp import (
    replicated_parameters,
    require_fsdp2,
    units_to_shard,
)
from hf_quantnoise.modeling.model_copies import copy_on_meta


class _Trainer:
    """The attributes of a trainer that ``require_fsdp2`` reads."""

    def __init__(
        self, fsdp=True, sharded=True, version=2, recomputes=False, compiled=False, backend="NO",
        model_init=None,
    ):  # fmt: skip
        plugin = SimpleNamespace(activation_checkpointing=recomputes)
        dynamo = SimpleNamespace(backend=DynamoBackend(backend))
        self.model, self.model_init = torch.nn.Linear(2, 2), model_init
        self.args = SimpleNamespace(fsdp=fsdp, torch_compile=compiled, device="cpu")
        self.is_fsdp_enabled = sharded
        self.accelerator = SimpleNamespace(
            is_fsdp2=version == 2,
            state=SimpleNamespace(fsdp_plugin=plugin, dynamo_plugin=dynamo),
        )


def test_unsupported_sharding_is_refused(monkeypatch):
    require_fsdp2(_Trainer())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    require_fsdp2(_Trainer(fsdp=False))
    with pytest.raises(ValueError, match=r"accelerate launch.* cpu"):
        require_fsdp2(_Trainer(fsdp=False, sharded=False))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    require_fsdp2(_Trainer(fsdp=False, sharded=False, compiled=True))
    for match, fields in (
        ("fsdp=True.* cpu", {"sharded": False}),
        ("fsdp_config={'version': 1}", {"version": 1}),
        ("'activation_checkpointing': True", {"recomputes": True}),
        ("torch_compile=True", {"compiled": True}),
        ("torch_compile=True", {"backend": "AOT_EAGER"}),
        ("model_init", {"model_init": dict}),
    ):
        with pytest.raises(ValueError, match=match):
            require_fsdp2(_Trainer(**fields))


def test_replicated_parameters_and_sharded_units():
    bert = make_stacked("bert", 3)
    assert replicated_parameters(bert) == []
    assert units_to_shard(bert, None) == ["BertLayer"]  # not the embeddings, which have the table
    assert units_to_shard(bert, ["BertSelfAttention"]) == ["BertSelfAttention"]
    assert units_to_shard(bert, ["Absent"]) == ["Absent"]  # for accelerate to refuse
    gpt2 = make_stacked("gpt2", 3)
    assert replicated_parameters(gpt2) == []  # accelerate shards the head with the table
    roberta = make_stacked("roberta-mlm", 3)
    assert [p.shape for p in replicated_parameters(roberta)] == [(VOCABULARY,)]  # a tied bias
    bart = make_stacked("bart", 3)
    assert [p.shape for p in replicated_parameters(bart)] == [(VOCABULARY, 32)]  # of four modules
    bart.scale = torch.nn.Parameter(torch.ones(()))
    assert len(replicated_parameters(bart)) == 2


def test_take_from_rank_0_keeps_ties(monkeypatch):
    """The head, its bias and the table of a masked language model."""
    read = make_stacked("roberta-mlm", 2)
    tensors = iter(read.state_dict().values())
    monkeypatch.setattr(fsdp, "broadcast_from_rank_0", lambda tensor: next(tensors).clone())
    empty = copy_on_meta(read)
    fsdp.take_from_rank_0(empty)
    assert not any(tensor.is_meta for tensor in empty.state_dict().values())
    assert empty.lm_head.decoder.weight is empty.roberta.embeddings.word_embeddings.weight
    assert empty.lm_head.decoder.bias is empty.lm_head.bias
    for name, tensor in empty.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name
