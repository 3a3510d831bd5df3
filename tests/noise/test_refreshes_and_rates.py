"""When training refreshes codebooks and scales, and with which rates."""

import pytest
from support.tiny import make_model
from support.trainers import make_trainer
from transformers import TrainerCallback

from hf_quantnoise import QuantNoiseConfig
from hf_quantnoise.noise import find_state

TWO_EPOCHS = {"num_train_epochs": 2}  # of 96 rows in batches of 16: 12 steps


@pytest.mark.parametrize(
    ("fields", "codebooks", "scales"),
    [({}, 1, 1), ({"codebook_update": 5}, 2, 1), ({"scale_update_steps": 3}, 1, 3)],
)
def test_codebooks_and_scales_are_refreshed_when_due(
    fields, codebooks, scales, tmp_path, parity_data, monkeypatch
):
    noise = QuantNoiseConfig(noise=["pq", "int8"], p=0.1, n_centroids=16, **fields)
    trainer = make_trainer(tmp_path, make_model("bert"), parity_data, noise, **TWO_EPOCHS)
    cls, counts = type(find_state(trainer.model)), {"refresh_codebooks": 0, "refresh_scales": 0}
    for name in counts:
        original = getattr(cls, name)

        def counted(self, name=name, original=original):
            counts[name] += 1
            return original(self)

        monkeypatch.setattr(cls, name, counted)
    trainer.train()
    # The first fit, by apply_quant_noise, is not counted.
    assert counts == {"refresh_codebooks": codebooks, "refresh_scales": scales}


def test_data_of_unknown_length_refreshes_codebooks_per_pass(tmp_path, parity_data, monkeypatch):
    """``Trainer`` counts all steps of such data as one epoch."""
    noise = QuantNoiseConfig(noise="pq", p=0.1, n_centroids=16)
    trainer = make_trainer(
        tmp_path, make_model("bert"), parity_data.to_iterable_dataset(), noise, max_steps=15
    )
    state, steps = find_state(trainer.model), []
    monkeypatch.setattr(state, "refresh_codebooks", lambda: steps.append(trainer.state.global_step))
    trainer.train()
    assert steps == [6, 12]


def test_the_rate_warms_up_also_in_a_resumed_run(tmp_path, parity_data):
    noise = QuantNoiseConfig(noise=["pq", "int8"], p=[0.4, 0.2], n_centroids=16, p_schedule=8)

    class Watch(TrainerCallback):
        def __init__(self):
            self.rates = []

        def on_step_end(self, args, state, control, **kwargs):
            self.rates.append(find_state(kwargs["model"]).p)

    def run(resume=None):
        watch = Watch()
        saves = {"save_strategy": "steps", "save_steps": 4}
        trainer = make_trainer(
            tmp_path, make_model("bert"), parity_data, noise, parts={"callbacks": [watch]},
            **TWO_EPOCHS, **saves,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return watch.rates

    rates = run()
    expected = [(0.4 * min(1, t / 8), 0.2 * min(1, t / 8)) for t in range(1, 13)]
    assert rates == [pytest.approx(pair) for pair in expected]
    assert run(str(tmp_path / "checkpoint-4")) == rates[4:]
