"""Distillation losses of every task against float64 references."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.stacked import inputs_of, make_stacked
from support.tasks import EXAMPLES, TASKS, WIDTH, expected_divergence
from support.tiny import make_model
from torch import nn
from transformers import SiglipConfig, SiglipModel

from hf_quantnoise.compression.distillation.features import (
    attention_loss,
    hidden_state_loss,
    match_layers,
)
from hf_quantnoise.compression.distillation.logits import HEADS, logits_divergence
from hf_quantnoise.compression.distillation.losses import (
    attention_divergence,
    hidden_state_error,
    sigmoid_divergence,
    softmax_divergence,
    squared_error,
)


def perturbed(model, seed=7):
    """Return a copy of a model with other weights."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return changed


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


# ---- hidden states -------------------------------------------------------------------------------


def test_hidden_state_error_matches_float64_at_any_scale_and_width():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    errors = [
        float((student[i, j].double() - teacher[i, j].double()).square().sum())
        / float(teacher[i, j].double().square().sum())
        for i in range(2) for j in range(4) if mask[i, j]
    ]  # fmt: skip
    expected = pytest.approx(sum(errors) / 5, rel=1e-5)
    assert hidden_state_error(student, teacher, mask).item() == expected
    assert hidden_state_error(1e3 * student, 1e3 * teacher, mask).item() == expected
    wide = [torch.cat([one] * 3, dim=-1) for one in (student, teacher)]
    assert hidden_state_error(*wide, mask).item() == expected


def test_hidden_state_error_treats_an_image_as_one_position():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    teacher[:, :, 0, 0] = 0.0  # single pixels of a feature map are often all zero
    expected = hidden_state_error(student.view(2, 1, 48), teacher.view(2, 1, 48))
    torch.testing.assert_close(hidden_state_error(student, teacher), expected)
    assert expected < 10


# ---- attention maps ------------------------------------------------------------------------------


def test_attention_divergence_matches_float64_without_padding():
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 3, 5, 5).softmax(-1) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    values = []
    for b in range(2):
        real = mask[b].nonzero().flatten().tolist()
        for head in range(3):
            for query in real:
                s, t = (
                    student[b, head, query].double()[real],
                    teacher[b, head, query].double()[real],
                )
                s, t = s / s.sum(), t / t.sum()
                values.append(float((t * (t / s).log()).sum()))
    got = attention_divergence(student, teacher, mask, mask).item()
    assert got == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert attention_divergence(teacher, teacher, mask, mask).item() == pytest.approx(0, abs=1e-6)


def test_attention_divergence_of_causal_maps_is_finite():
    """Their upper triangle is zero."""
    causal = torch.full((4, 4), -torch.inf).triu(1)
    student, teacher = ((torch.randn(1, 2, 4, 4) + causal).softmax(-1) for _ in range(2))
    student.requires_grad_()
    loss = attention_divergence(student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


# ---- layers --------------------------------------------------------------------------------------


def test_match_layers_is_even_and_ends_with_the_last():
    assert match_layers(4, 4, "all") == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert match_layers(3, 6, "all") == [(0, 1), (1, 3), (2, 5)]
    assert match_layers(4, 6, "all") == [(0, 0), (1, 2), (2, 3), (3, 5)]
    assert match_layers(4, 2, "all") == [(0, 0), (1, 0), (2, 0), (3, 1)]
    assert match_layers(3, 6, "last") == match_layers(3, 6, [-1]) == [(2, 5)]
    assert match_layers(3, 6, "0,2") == match_layers(3, 6, [0, 2]) == [(0, 1), (2, 5)]
    with pytest.raises(ValueError, match="distill_layers='3'"):
        match_layers(3, 6, "3")


def student_and_teacher_outputs(name, **flags):
    inputs = inputs_of(name)
    models = make_stacked(name, 2), perturbed(make_stacked(name, 4))
    with torch.no_grad():
        for model in models:
            model.set_attn_implementation("eager")
        return (*(model(**inputs, **flags) for model in models), inputs)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_feature_losses_are_means_over_matched_layers(name):
    student, teacher, inputs = student_and_teacher_outputs(
        name, output_hidden_states=True, output_attentions=True
    )
    pairs = [(0, 1), (1, 3)]
    hidden = [
        hidden_state_error(student.hidden_states[s + 1], teacher.hidden_states[t + 1])
        for s, t in pairs
    ]
    torch.testing.assert_close(hidden_state_loss(student, teacher, inputs, "all"), sum(hidden) / 2)
    maps = [attention_divergence(student.attentions[s], teacher.attentions[t]) for s, t in pairs]
    with torch.no_grad():
        got = attention_loss(student, teacher, inputs, "all")
        last = attention_loss(student, teacher, inputs, "last")
    torch.testing.assert_close(got, sum(maps) / 2)
    torch.testing.assert_close(last, maps[1])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_feature_losses_average_encoder_and_decoder(name):
    student, teacher, inputs = student_and_teacher_outputs(
        name, output_hidden_states=True, output_attentions=True
    )
    pairs = [(0, 1), (1, 3)]
    parts = []
    for key in ("encoder_hidden_states", "decoder_hidden_states"):
        errors = [hidden_state_error(student[key][s + 1], teacher[key][t + 1]) for s, t in pairs]
        parts.append(sum(errors) / 2)
    torch.testing.assert_close(hidden_state_loss(student, teacher, inputs, "all"), sum(parts) / 2)
    parts = []
    for key in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        errors = [attention_divergence(student[key][s], teacher[key][t]) for s, t in pairs]
        parts.append(sum(errors) / 2)
    with torch.no_grad():
        got = attention_loss(student, teacher, inputs, "all")
    torch.testing.assert_close(got, sum(parts) / 3)


def test_feature_losses_ignore_padding():
    batch = TASKS["tokens"][1]()
    model = make_stacked("bert")
    teacher = perturbed(model)
    flags = {"output_hidden_states": True, "output_attentions": True}
    more = {"input_ids": F.pad(batch["input_ids"], (0, 3), value=17),
            "attention_mask": F.pad(batch["attention_mask"], (0, 3))}  # fmt: skip
    results = []
    with torch.no_grad():
        for each in (model, teacher):
            each.set_attn_implementation("eager")
        for inputs in ({k: batch[k] for k in more}, more):
            outputs = [each(**inputs, **flags) for each in (model, teacher)]
            results.append([loss(*outputs, inputs, "all")
                            for loss in (hidden_state_loss, attention_loss)])  # fmt: skip
    assert batch["attention_mask"].sum() < EXAMPLES * WIDTH
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-7)


def test_feature_losses_refuse_incompatible_shapes():
    one, two = torch.rand(2, 4, 6), torch.rand(2, 4, 8)
    with pytest.raises(ValueError, match=r"distill_hidden.*\(2, 4, 8\)"):
        hidden_state_error(one, two)
    with pytest.raises(ValueError, match="distill_attention"):
        attention_divergence(torch.rand(2, 2, 4, 4), torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"distill_hidden: .*hidden_states"):
        hidden_state_loss({"logits": one}, {"logits": one}, {}, "all")
    mask = torch.ones(2, 9)
    with pytest.raises(ValueError, match=r"mask of shape \(2, 9\)"):
        hidden_state_loss({"hidden_states": (one, one)}, {"hidden_states": (one, one)},
                          {"attention_mask": mask}, "all")  # fmt: skip
