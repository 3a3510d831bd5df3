"""Losses on hidden states and attention maps against float64 references."""

import pytest
import torch
import torch.nn.functional as F
from support.stacked import inputs_of, make_stacked, perturbed
from support.tasks import EXAMPLES, TASKS, WIDTH

from hf_quantnoise.compression.distillation.features import (
    attention_loss,
    hidden_state_loss,
    match_layers,
)
from hf_quantnoise.compression.distillation.losses import attention_divergence, hidden_state_error

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
