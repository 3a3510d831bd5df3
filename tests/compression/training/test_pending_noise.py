"""Noise on the layers of later stages: only on those, and removed at the end."""

import pytest
import torch
from support.stacked import make_stacked
from support.trainers import Killed, assert_same_result, make_trainer, with_other_weights
from transformers import TrainerCallback

from hf_quantnoise import CompressionArguments, IPQConfig, QuantNoiseConfig
from hf_quantnoise.compression.training.stage_trainer import StageTrainer
from hf_quantnoise.noise import find_state, is_noisy, noised_layers

TARGET = IPQConfig(block_size=4, n_centroids=16, leftover_bits=32)
KEEP_NOISE = CompressionArguments(keep_noise=True)
PQ_NOISE = QuantNoiseConfig("pq", p=0.3, block_size=4, n_centroids=8, codebook_update=2)


def make_bert_trainer(folder, data, noise=PQ_NOISE, model=None, **changes):
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, **changes}
    model = model or make_stacked("bert", 4)
    parts = {"eval_dataset": data}
    return make_trainer(folder, model, data, noise, parts=parts, **settings)


@pytest.fixture
def noise_per_step(monkeypatch):
    """A list with (noised layers, rates) of each training step of the stages, or None."""
    real, steps = StageTrainer.training_step, []

    def step(trainer, *args, **kwargs):
        state = find_state(trainer.model)
        steps.append((set(state.layers), state.p) if state else None)
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", step)
    return steps


def test_noise_stays_on_pending_layers_until_their_stage(tmp_path, parity_data, noise_per_step):
    noise = QuantNoiseConfig("pq", p=0.3, block_size=4, n_centroids=8, p_schedule=50, layerdrop=0.1)
    trainer = make_bert_trainer(tmp_path, parity_data, noise)
    noised = set(noised_layers(make_stacked("bert", 4), noise))
    small = trainer.compress(TARGET, CompressionArguments(keep_noise=True, stage_steps=2))
    plan = small.config.quantization_config.plan
    ffn = {
        name
        for name in noised
        if ".intermediate" in name or (".output.dense" in name and "attention" not in name)
    }
    first, second, third = noise_per_step[0], noise_per_step[2], noise_per_step[4]
    # The first stage packs the feed-forward layers. The others have noise at the full rate.
    pending, rates = first
    assert pending == {name for name in noised - ffn if name in plan}
    assert rates == (0.3,)
    assert "bert.embeddings.position_embeddings" in pending
    # The second stage packs the embeddings; only attention is left. Then nothing.
    assert second[0] == {name for name in pending if ".attention." in name}
    assert third is None
    assert find_state(small) is None
    assert not any(map(is_noisy, small.modules()))


def test_noise_is_trained_with_and_logged_if_it_is_kept(tmp_path, parity_data):
    weights = []
    for keep_noise in (True, False):
        logs = []

        class Keep(TrainerCallback):
            def on_log(self, args, state, control, logs=None, _kept=logs, **kwargs):
                _kept.append(dict(logs))

        trainer = make_bert_trainer(tmp_path, parity_data, save_strategy="no")
        trainer.add_callback(Keep())
        small = trainer.compress(
            TARGET, CompressionArguments(keep_noise=keep_noise, stage_steps=3, plots=False)
        )
        weights.append(small.classifier.weight.detach().clone())
        rates = [log.get("compression/noise_p") for log in logs if "compression/loss" in log]
        assert rates == ([0.3] * 6 if keep_noise else [None] * 6) + [None] * 3
        assert keep_noise or not any("noised_share" in log for log in logs)
    assert not torch.equal(*weights)


def test_a_stage_with_noise_resumes_exactly(tmp_path, parity_data, kill):
    straight = make_bert_trainer(tmp_path / "a", parity_data)
    straight.compress(TARGET, KEEP_NOISE)
    release = kill(StageTrainer, "training_step", 10)
    with pytest.raises(Killed):
        make_bert_trainer(tmp_path / "b", parity_data).compress(TARGET, KEEP_NOISE)
    release()
    other = QuantNoiseConfig("pq", p=0.4, block_size=4, n_centroids=8, codebook_update=2)
    with pytest.raises(ValueError, match=r"p=0\.3 \(now 0\.4\)"):
        make_bert_trainer(tmp_path / "b", parity_data, other).compress(
            TARGET, KEEP_NOISE, resume_from_checkpoint=True
        )
    model = with_other_weights(make_stacked("bert", 4))
    resumed = make_bert_trainer(tmp_path / "b", parity_data, model=model)
    resumed.compress(TARGET, KEEP_NOISE, resume_from_checkpoint=True)
    assert_same_result(resumed, straight)


def test_removed_layers_have_no_noise(tmp_path, parity_data, noise_per_step):
    noise = QuantNoiseConfig("proxy", p=0.2, block_size=4, share_layers=2)
    target = IPQConfig(block_size=4, n_centroids=16, prune_layers="every_other")
    trainer = make_bert_trainer(tmp_path, parity_data, noise)
    small = trainer.compress(target, CompressionArguments(keep_noise=True, stage_steps=1))
    assert small.config.num_hidden_layers == 2
    assert noise_per_step[0] is not None
    assert not any(".layer.2" in name for name in noise_per_step[0][0])


def test_keep_noise_requires_noise(tmp_path, parity_data):
    trainer = make_bert_trainer(tmp_path, parity_data, None)
    with pytest.raises(ValueError, match=r"keep_noise=True.*QuantNoiseConfig"):
        trainer.compress(TARGET, KEEP_NOISE)


def test_noise_with_trained_centroids_is_kept_with_fitted_ones(
    tmp_path, parity_data, noise_per_step
):
    noise = QuantNoiseConfig("pq", p=0.3, block_size=4, n_centroids=8, learn_codebooks=True)
    trainer = make_bert_trainer(tmp_path, parity_data, noise)
    small = trainer.compress(TARGET, CompressionArguments(keep_noise=True, stage_steps=1))
    assert [each is not None for each in noise_per_step] == [True, True, False]
    assert not any(map(is_noisy, small.modules()))
