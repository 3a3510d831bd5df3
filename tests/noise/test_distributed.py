"""Two gloo processes: the state of the noise is the same on every rank."""

import torch
from support.processes import needs_gloo, on_two_ranks, torchrun

FITTED = """
from torch import nn

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise
from hf_quantnoise.noise import find_state

torch.manual_seed(rank)  # the harder case: different weights on each rank
model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
config = QuantNoiseConfig(
    noise=["pq", "mean", "int4"], p=0.2, block_size=4, n_centroids=16,
    activation_bits=8, activation_calibration=1,
)
apply_quant_noise(model, config).train()
state = find_state(model)
found["fitted"] = {name: tensor.clone() for name, tensor in state.state_dict().items()}
found["inputs"] = torch.randn(5, 32)
model(found["inputs"])
state.refresh_codebooks()
state.refresh_scales()
found["refreshed"] = state.state_dict()
found["weights"] = model.state_dict()
"""


@needs_gloo
def test_state_is_the_same_on_all_ranks(tmp_path):
    first, second = on_two_ranks(FITTED, tmp_path)
    assert not torch.equal(first["weights"]["0.weight"], second["weights"]["0.weight"])
    for moment in ("fitted", "refreshed"):
        one, other = first[moment], second[moment]
        assert one.keys() == other.keys() and len(one) > 10
        for name in one:
            assert torch.equal(one[name], other[name]), (moment, name)
    # The range of activations covers the batches of both ranks.
    inputs = torch.cat([first["inputs"], second["inputs"]])
    assert float(one["0.input.seen"]) == 1
    assert (one["0.input.low"], one["0.input.high"]) == (inputs.min(), inputs.max())


TRAINED = """
from torch import nn

from hf_quantnoise import QuantNoiseCallback, QuantNoiseConfig
from hf_quantnoise.noise import find_state

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)).train()
callback = QuantNoiseCallback(QuantNoiseConfig(
    "pq", p=1.0, block_size=4, n_centroids=16, learn_codebooks=True, target_modules=".*"
))
callback.prepare(model)
centroids = find_state(model).parameters()
torch.manual_seed(rank)
model(torch.randn(5, 32)).square().mean().backward()
found["own"] = [each.grad.clone() for each in centroids]
callback.on_pre_optimizer_step(None, None, None, model=model)
found["averaged"] = [each.grad for each in centroids]
"""


@needs_gloo
def test_callback_averages_gradients_of_centroids(tmp_path):
    """In any trainer, and DDP does not know them."""
    first, second = on_two_ranks(TRAINED, tmp_path)
    assert len(first["own"]) == 2
    for name in ("own", "averaged"):
        same = [torch.equal(*pair) for pair in zip(first[name], second[name], strict=True)]
        assert same == [name == "averaged"] * 2
    for one, other, mean in zip(first["own"], second["own"], first["averaged"], strict=True):
        torch.testing.assert_close(mean, (one + other) / 2)


UNEVEN = """
import os, sys
import torch
from support.stacked import make_stacked
from support.tiny import VOCABULARY, with_dropout
from transformers import Trainer, TrainingArguments

from hf_quantnoise import QuantNoiseCallback, QuantNoiseConfig
from hf_quantnoise.noise import find_state
from hf_quantnoise.noise.layerdrop import DroppableLayer

folder, rank = sys.argv[1], int(os.environ["RANK"])
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(1)
rows = []
for number in range(64):
    length = int(torch.randint(4, 30, (), generator=generator))
    ids = torch.randint(5, VOCABULARY, (length,), generator=generator)
    rows.append({"input_ids": ids, "labels": number % 2})

def collate(batch):
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in batch], batch_first=True)
    return {"input_ids": ids, "labels": torch.tensor([row["labels"] for row in batch])}

class Skips(QuantNoiseCallback):
    forwards = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        for number, layer in enumerate(model.bert.encoder.layer):
            layer.attention.self.query.register_forward_pre_hook(
                lambda *_, number=number: self.forwards.append(number)
            )

model = with_dropout(make_stacked("bert", 3), 0.1)
args = TrainingArguments(
    folder, per_device_train_batch_size=4, gradient_accumulation_steps=2, report_to="none",
    num_train_epochs=1, gradient_checkpointing=True, save_strategy="no", use_cpu=True,
    ddp_backend="gloo", ddp_timeout=120, disable_tqdm=True, remove_unused_columns=False,
)
noise = Skips(QuantNoiseConfig(
    noise="proxy", p=0.1, block_size=4, layerdrop=0.4, activation_bits=8, activation_calibration=3
))
Trainer(model, args, data_collator=collate, train_dataset=rows, callbacks=[noise]).train()
torch.save(noise.forwards, f"{folder}/forwards-{rank}")
torch.save(find_state(model).state_dict(), f"{folder}/noise-{rank}")
torch.save(model.state_dict(), f"{folder}/model-{rank}")
"""


@needs_gloo
def test_ranks_may_skip_different_layers(tmp_path):
    """Batches of different lengths use different amounts of random values, so LayerDrop skips
    different layers on each rank; with the plain ``Trainer`` and the callback."""
    program = tmp_path / "uneven.py"
    program.write_text(UNEVEN)
    torchrun(program, str(tmp_path), seconds=400)
    ran = [torch.load(tmp_path / f"forwards-{rank}") for rank in (0, 1)]
    assert ran[0] != ran[1]
    for part in ("noise", "model"):
        one, other = (torch.load(tmp_path / f"{part}-{rank}") for rank in (0, 1))
        for name in one:
            assert torch.equal(one[name], other[name]), name
    noise = torch.load(tmp_path / "noise-0")
    assert {int(value) for name, value in noise.items() if name.endswith("input.seen")} == {3}
