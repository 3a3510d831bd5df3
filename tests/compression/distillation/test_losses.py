"""Divergences of the logits of every task against float64 references."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.stacked import inputs_of, make_stacked, perturbed
from support.tasks import TASKS, expected_divergence
from support.tiny import make_model
from torch import nn
from transformers import SiglipConfig, SiglipModel

from hf_quantnoise.compression.distillation.logits import HEADS, logits_divergence
from hf_quantnoise.compression.distillation.losses import (
    sigmoid_divergence,
    softmax_divergence,
    squared_error,
)

# ---- losses --------------------------------------------------------------------------------------


def test_softmax_divergence_matches_float64():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    s, t = student.double().numpy() / 2.0, teacher.double().numpy() / 2.0
    p = np.exp(t) / np.exp(t).sum(-1, keepdims=True)
    q = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    expected = 4.0 * (p * (np.log(p) - np.log(q))).sum(-1).mean()
    assert softmax_divergence(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert softmax_divergence(student, student).item() == pytest.approx(0, abs=1e-6)


def test_losses_ignore_masked_positions():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[True, False, False], [False, True, False]])
    for divergence in (softmax_divergence, sigmoid_divergence, squared_error):
        kept = divergence(student[mask], teacher[mask])
        torch.testing.assert_close(divergence(student, teacher, mask=mask), kept)


def test_fully_masked_batch_gives_zero_loss_and_gradient():
    student = torch.randn(2, 3, 5, requires_grad=True)
    none = torch.zeros(2, 3, dtype=torch.bool)
    loss = softmax_divergence(student, torch.randn(2, 3, 5), mask=none)
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()


def test_logits_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"logits.*\(2, 4\).*\(2, 3\)"):
        softmax_divergence(torch.randn(2, 3), torch.randn(2, 4))


def test_logits_divergence_is_that_of_the_first_release():
    torch.manual_seed(0)
    inputs = inputs_of("bert")
    model, teacher = make_stacked("bert"), perturbed(make_stacked("bert"))
    s, t = model(**inputs).logits, teacher(**inputs).logits
    divergence = F.kl_div(
        F.log_softmax(s / 2.0, dim=-1), F.log_softmax(t / 2.0, dim=-1), reduction="none",
        log_target=True,
    ).sum(-1)  # fmt: skip
    expected = torch.mean(divergence) * 2.0**2
    assert torch.equal(
        logits_divergence(model, {"logits": s}, {"logits": t}, inputs, 2.0), expected
    )
    single = torch.randn(4, 1), torch.randn(4, 1)
    outputs = [{"logits": one} for one in single]
    assert torch.equal(logits_divergence(model, *outputs, {}), F.mse_loss(*single))


# ---- every task ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logits_divergence_matches_float64(task, temperature):
    make, data = TASKS[task]
    model, batch = make(), data()
    with torch.no_grad():
        student, teacher = model(**batch), perturbed(model)(**batch)
    got = logits_divergence(model, student, teacher, batch, temperature)
    expected = expected_divergence(task, student, teacher, batch, temperature)
    assert expected > 1e-3
    assert got.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_logits_divergence_of_half_precision_is_in_float32(task):
    make, data = TASKS[task]
    model, batch = make(), data()
    with torch.no_grad():
        student, teacher = model(**batch), perturbed(model)(**batch)
    halves = [{k: v.bfloat16() for k, v in out.items() if k.endswith("logits")}
              for out in (student, teacher)]  # fmt: skip
    singles = [{k: v.float() for k, v in half.items()} for half in halves]
    with torch.autocast("cpu", torch.bfloat16):
        got = logits_divergence(model, *halves, batch)
    assert got.dtype == torch.float32
    assert torch.equal(got, logits_divergence(model, *singles, batch))


def test_causal_lm_label_counts_for_the_previous_position():
    """Token 3 is the only one with a label, and position 2 predicts it."""
    model = make_model("gpt2")
    labels = torch.full((1, 6), -100)
    labels[0, 3] = 9
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 6, 320), torch.randn(1, 6, 320)
    got = logits_divergence(model, {"logits": student}, {"logits": teacher}, {"labels": labels})
    torch.testing.assert_close(got, softmax_divergence(student[:, 2], teacher[:, 2]))


def test_padding_is_ignored_without_labels():
    model, batch = TASKS["tokens"][0](), TASKS["tokens"][1]()
    with torch.no_grad():
        student, teacher = model(**batch), perturbed(model)(**batch)
    del batch["labels"]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(
        logits_divergence(model, student, teacher, batch),
        softmax_divergence(student.logits[real], teacher.logits[real]),
    )


def test_segmentation_classes_are_in_the_second_dimension():
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    got = HEADS["semantic segmentation"](*({"logits": one} for one in maps), {}, 1.0)
    rows = [one.permute(0, 2, 3, 1).reshape(-1, 3) for one in maps]
    torch.testing.assert_close(got, softmax_divergence(*rows))


def test_unknown_head_is_refused_and_can_be_registered(monkeypatch):
    class NewHead(nn.Module):
        pass

    outputs = {"scores": torch.randn(3, 4)}
    with pytest.raises(ValueError, match=r"NewHead: its head.*scores.*'logits'.*HEADS"):
        logits_divergence(NewHead(), outputs, outputs, {})
    monkeypatch.setattr(HEADS, "_registered", dict(HEADS._registered))
    HEADS.register("NewHead")(lambda s, t, inputs, T: squared_error(s["scores"], t["scores"]))
    assert logits_divergence(NewHead(), outputs, outputs, {}).item() == 0


def test_error_for_image_text_models_names_no_classification_head():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 2
    texts, images = {**sizes, "vocab_size": 40}, {**sizes, "image_size": 16, "patch_size": 8}
    model = SiglipModel(SiglipConfig(text_config=texts, vision_config=images))
    ids = torch.ones(2, 4, dtype=torch.int64)
    outputs = model(input_ids=ids, pixel_values=torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError) as error:
        logits_divergence(model, outputs, outputs, {})
    message = str(error.value)
    assert "classification" not in message
    assert "cannot distill a SiglipModel: its head is unknown" in message
    assert "logits_per_image, logits_per_text" in message and "distill=False" in message
