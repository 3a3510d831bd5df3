"""Noise on the layers whose stage is yet to come: on those alone, and gone with the pass."""

import pytest
import torch
from support.stacked import make_stacked
from support.stage_runs import Killed, compare, make_pass_trainer, spoilt
from transformers import TrainerCallback

from hf_quantnoise import CompressionArguments, IPQConfig, QuantNoiseConfig
from hf_quantnoise.compression.training.stage_trainer import StageTrainer
from hf_quantnoise.noise import find_state, is_noisy, noised_layers

TARGET = IPQConfig(block_size=4, n_centroids=16)
KEPT = CompressionArguments(keep_noise=True)
PQ_NOISE = QuantNoiseConfig("pq", p=0.3, block_size=4, n_centroids=8, codebook_update=2)


def make_trainer(folder, data, noise=PQ_NOISE, model=None, **changes):
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, **changes}
    model = model or make_stacked("bert", 4)
    return make_pass_trainer(folder, model, data, noise, **settings)


@pytest.fixture
def seen(monkeypatch):
    """The noised layers, and the rate, at each training step of the stages."""
    real, steps = StageTrainer.training_step, []

    def step(trainer, *args, **kwargs):
        state = find_state(trainer.model)
        steps.append((set(state.layers), state.p) if state else None)
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", step)
    return steps


def test_noise_stays_on_waiting_layers_until_their_stage(tmp_path, parity_data, seen):
    noise = QuantNoiseConfig("pq", p=0.3, block_size=4, n_centroids=8, p_schedule=50, layerdrop=0.1)
    trainer = make_trainer(tmp_path, parity_data, noise)
    noised = set(noised_layers(make_stacked("bert", 4), noise))
    small = trainer.compress(TARGET, KEPT)
    plan = small.config.quantization_config.plan
    stages = {
        group: {name for name in noised if (".intermediate" in name or ".output.dense" in name
                and "attention" not in name) == (group == "ffn")}
        for group in ("ffn", "rest")
    }  # fmt: skip
    each = len(seen) // 3
    # The first stage packs the feed-forward layers: the others wait with noise, at the full rate.
    waiting, rates = seen[0]
    assert waiting == {name for name in stages["rest"] if name in plan}
    assert rates == (0.3,)
    assert "bert.embeddings.position_embeddings" not in waiting
    # The second packs the tables: what is left is attention. In the third nothing waits.
    assert seen[each][0] == {name for name in waiting if ".attention." in name}
    assert seen[2 * each] is None
    assert find_state(small) is None and not any(map(is_noisy, small.modules()))


def test_without_it_the_stages_are_clean(tmp_path, parity_data, seen):
    make_trainer(tmp_path, parity_data).compress(TARGET)
    assert seen and not any(seen)


def test_the_noise_reaches_the_weights_and_the_logs(tmp_path, parity_data):
    results, logs = [], []

    class Keep(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            kept.append(dict(logs))

    for keep_noise in (True, False):
        kept = []
        trainer = make_trainer(tmp_path, parity_data, save_strategy="no")
        trainer.add_callback(Keep())
        small = trainer.compress(TARGET, CompressionArguments(keep_noise=keep_noise, plots=False))
        results.append(small.classifier.weight.detach().clone())
        logs.append([log for log in kept if "compression_loss" in log])
    assert not torch.equal(*results)
    rates = [log.get("compression_noise_p") for log in logs[0]]
    assert rates == [0.3] * (2 * len(rates) // 3) + [None] * (len(rates) // 3)
    assert not any("compression_noise_p" in log or "noised_share" in log for log in logs[1])


def test_killed_inside_a_stage_with_noise(tmp_path, parity_data, kill):
    straight = make_trainer(tmp_path / "a", parity_data)
    straight.compress(TARGET, KEPT)
    release = kill(StageTrainer, "training_step", 10)
    with pytest.raises(Killed):
        make_trainer(tmp_path / "b", parity_data).compress(TARGET, KEPT)
    release()
    other = QuantNoiseConfig("pq", p=0.4, block_size=4, n_centroids=8, codebook_update=2)
    with pytest.raises(ValueError, match=r"begun with p=0\.3, now it is 0\.4"):
        make_trainer(tmp_path / "b", parity_data, other).compress(
            TARGET, KEPT, resume_from_checkpoint=True
        )
    model = spoilt(make_stacked("bert", 4))
    again = make_trainer(tmp_path / "b", parity_data, model=model)
    again.compress(TARGET, KEPT, resume_from_checkpoint=True)
    compare(again, straight)


def test_layers_that_are_shared_or_gone(tmp_path, parity_data, seen):
    noise = QuantNoiseConfig("proxy", p=0.2, block_size=4, share_layers=2)
    target = IPQConfig(block_size=4, n_centroids=16, prune_layers="every_other")
    trainer = make_trainer(tmp_path, parity_data, noise)
    small = trainer.compress(target, KEPT)
    assert small.config.num_hidden_layers == 2
    assert seen[0] is not None and not any(".layer.2" in name for name in seen[0][0])


def test_a_run_without_noise_has_none_to_keep(tmp_path, parity_data):
    trainer = make_trainer(tmp_path, parity_data, None)
    with pytest.raises(ValueError, match="keep_noise=True needs the noise.*QuantNoiseConfig"):
        trainer.compress(TARGET, KEPT)
