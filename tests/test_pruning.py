"""Which layers are pruned (section 7.9), if only some of them share their weights."""

from support.stacked import make_stacked
from support.stored import PQ

from hf_quantnoise import IPQConfig, quantize_model
from hf_quantnoise.noise.layerdrop import droppable_chunks
from hf_quantnoise.pruning import layers_to_prune
from hf_quantnoise.sharing import chunks_of

STACK = [f"transformer.h.{number}" for number in range(6)]


def test_every_other_counts_layers_outside_of_named_chunks():
    model, pair = make_stacked("gpt2", 6), STACK[3:5]
    chunks = chunks_of(model, [pair])
    # 0 | 1 | 2 | 3 4 | 5, as LayerDrop skips them
    assert layers_to_prune(model, "every_other", chunks) == [STACK[1], *pair]
    others = {(STACK[number],) for number in (0, 1, 2, 5)}
    assert set(droppable_chunks(model, chunks, 0.1)) == {tuple(pair), *others}

    config = IPQConfig(**PQ, share_layers=[pair], prune_layers="every_other")
    small = quantize_model(model, config, progress=False)
    assert len(small.transformer.h) == 3
