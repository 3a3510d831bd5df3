"""Distillation in a compression run: all tasks, features, other teachers, devices, errors."""

import copy

import pytest
import torch
from support.stacked import make_stacked
from support.tasks import TASKS
from support.tiny import make_model, recompute
from support.trainers import ATTENTION, CONV, ONE_STAGE, Rows, StageLogs, make_task_trainer, sharp
from transformers import TrainingArguments

from hf_quantnoise import (
    CompressionArguments,
    IPQConfig,
    quantize_model,
)
from hf_quantnoise.compression.distillation.logits import logits_divergence
from hf_quantnoise.compression.distillation.teacher import Teacher
from hf_quantnoise.compression.training.stage_trainer import StageTrainer
from hf_quantnoise.modeling import packed_layers


@pytest.mark.parametrize("task", TASKS)
def test_finetuning_a_stage_lowers_the_divergence(task, tmp_path):
    rate = {"resnet": 5e-3, "t5": 5e-3}.get(task, 5e-4)
    model = sharp(TASKS[task][0]())
    trainer = make_task_trainer(tmp_path, task, model=model, learning_rate=rate)
    teacher, batch = copy.deepcopy(trainer.model).eval(), TASKS[task][1]()
    config = CONV if task == "resnet" else ONE_STAGE
    one_shot = quantize_model(copy.deepcopy(trainer.model), config, progress=False)
    small = trainer.compress(config, CompressionArguments(stage_epochs=12))

    def divergence(model):
        with torch.no_grad():
            return logits_divergence(model, model.eval()(**batch), teacher(**batch), batch)

    assert any(packed_layers(small))
    assert divergence(small) < 0.7 * divergence(one_shot)


@pytest.mark.parametrize("task", ["classification", "causal LM", "bart"])
@pytest.mark.parametrize("name", ["hidden", "attention"])
def test_feature_distillation_lowers_the_loss(task, name, tmp_path, monkeypatch):
    logs = StageLogs(monkeypatch)
    arguments = CompressionArguments(stage_epochs=12, **{f"distill_{name}": 1.0})
    model = sharp(TASKS[task][0]())
    trainer = make_task_trainer(tmp_path, task, model=model, learning_rate=5e-3)
    trainer.compress(ATTENTION, arguments)
    values = logs.of(f"teacher_{name}")
    assert len(values) == 24 and values[0] > 0
    assert sum(values[-2:]) < 0.8 * sum(values[:2])


def test_compute_loss_is_the_weighted_sum_of_its_terms(tmp_path):
    trainer = make_task_trainer(tmp_path)
    student, inputs = copy.deepcopy(make_stacked("bert")), TASKS["classification"][1]()
    teacher_model = make_stacked("bert", 6)
    losses = {}
    for weights in ((0, 0), (0.5, 0), (0, 0.25), (0.5, 0.25)):
        hidden, attention = weights
        args = CompressionArguments(
            distill_weight=0.7, distill_hidden=hidden, distill_attention=attention
        )
        stage = StageTrainer(
            student, trainer.args, compression_args=args,
            teacher=Teacher(student, teacher_model, args),
        )  # fmt: skip
        student.train()
        with stage.teacher.attention_maps(student):
            losses[weights] = stage.compute_loss(student, inputs).item()
            terms = {name: value.item() for name, value in stage._term_sums.items()}
    base = losses[0, 0]
    assert losses[0.5, 0] - base == pytest.approx(0.5 * terms["hidden"], rel=1e-3)
    assert losses[0, 0.25] - base == pytest.approx(0.25 * terms["attention"], rel=1e-3)
    assert losses[0.5, 0.25] == pytest.approx(
        base + 0.5 * terms["hidden"] + 0.25 * terms["attention"], rel=1e-5
    )
    with torch.no_grad():
        labels = student.eval()(**inputs).loss.item()
    assert base == pytest.approx(0.3 * labels + 0.7 * terms["logits"], rel=1e-4)


@pytest.mark.parametrize("task", ["classification", "masked LM"])
def test_gradient_accumulation_does_not_scale_the_loss(task, tmp_path):
    losses = {}
    batch = TASKS[task][1]()
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["input_ids"] = batch["input_ids"].clamp_min(5)
    if task == "masked LM":  # the same number of tokens in each micro-batch
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        batch["labels"][:, 2:4] = 7
    for steps in (1, 4):
        trainer = make_task_trainer(
            tmp_path, task, data=Rows(batch), learning_rate=1e-9,
            gradient_accumulation_steps=steps, per_device_train_batch_size=16 // steps,
        )  # fmt: skip
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        arguments = CompressionArguments(
            distill_weight=0.5, distill_hidden=0.3, distill_attention=0.2
        )
        trainer.compress(ONE_STAGE, arguments)
        losses[steps] = trainer.compression_history[-1]["finetuning"]["train_loss"]
    assert losses[4] == pytest.approx(losses[1], rel=1e-4)


def test_head_of_a_wrapped_model_is_found(tmp_path):
    """DDP and torch.compile wrap the model in another class."""

    class Wrapped(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    model, args = sharp(make_model("gpt2")), CompressionArguments()
    stage = StageTrainer(
        model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
        compression_args=args, teacher=Teacher(model, make_model("gpt2", seed=5), args),
    )  # fmt: skip
    model.train()
    inputs = TASKS["causal LM"][1]()
    losses = [stage.compute_loss(one, inputs) for one in (model, Wrapped(model))]
    assert torch.equal(*losses)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_gradients_or_is_refused(reentrant, tmp_path):
    args = CompressionArguments(distill_weight=0.0, distill_attention=1.0, distill_hidden=1.0)
    gradients = []
    for checkpointing in (False, True):
        model = make_stacked("bert")
        teacher = Teacher(model, make_model("bert", seed=5), args)
        stage = StageTrainer(
            model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
            compression_args=args, teacher=teacher,
        )  # fmt: skip
        if checkpointing:
            recompute(model, reentrant)
        model.train()
        with teacher.attention_maps(model):
            if checkpointing and reentrant:
                with pytest.raises(ValueError, match="use_reentrant': False"):
                    stage.compute_loss(model, TASKS["classification"][1]())
                return
            stage.compute_loss(model, TASKS["classification"][1]()).backward()
        gradients.append(model.bert.encoder.layer[0].attention.self.query.weight.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


# ---- another teacher -----------------------------------------------------------------------------


def test_pruned_student_is_distilled_from_the_full_model(tmp_path, monkeypatch):
    logs = StageLogs(monkeypatch)
    trainer = make_task_trainer(tmp_path, model=make_stacked("bert", 4))
    config = IPQConfig(block_size=4, n_centroids=8, stages=["ffn"], prune_layers="every_other")
    arguments = CompressionArguments(stage_epochs=8, distill_hidden=1.0, distill_attention=1.0)
    small = trainer.compress(config, arguments)
    assert small.config.num_hidden_layers == 2
    for name in ("teacher_hidden", "teacher_attention"):
        values = logs.of(name)
        assert sum(values[-2:]) < sum(values[:2])


def wider(heads):
    torch.manual_seed(0)
    config = copy.deepcopy(make_model("bert").config)
    config.hidden_size, config.num_attention_heads = 48, heads
    return type(make_model("bert"))(config)


@pytest.mark.parametrize(
    ("teacher", "fields", "message"),
    [
        (lambda: wider(2), {"distill_hidden": 1.0}, r"distill_hidden.*48.*32"),
        (lambda: wider(3), {"distill_attention": 1.0}, r"distill_attention.*3.*2"),
        (
            lambda: make_stacked("bert"),
            {"distill_hidden": 1.0, "distill_layers": "2"},
            "distill_layers='2'",
        ),
        (lambda: make_model("bert-mlm"), {}, r"logits .*320"),
    ],
)
def test_incompatible_teacher_is_refused_without_changing_the_model(
    teacher, fields, message, tmp_path
):
    trainer = make_task_trainer(tmp_path)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match=message):
        trainer.compress(ONE_STAGE, CompressionArguments(**fields), teacher())
    assert not any(packed_layers(trainer.model))
    assert all(torch.equal(value, before[n]) for n, value in trainer.model.state_dict().items())


def test_wider_teacher_with_the_same_heads_is_accepted(tmp_path):
    small = make_task_trainer(tmp_path).compress(
        ONE_STAGE, CompressionArguments(distill_attention=1.0), wider(2)
    )
    assert any(packed_layers(small))


def test_missing_attention_maps_and_student_as_teacher_are_refused(tmp_path):
    trainer = make_task_trainer(tmp_path, "resnet")
    with pytest.raises(ValueError, match=r"distill_attention.*attentions"):
        trainer.compress(CONV, CompressionArguments(distill_attention=1.0))
    with pytest.raises(ValueError, match="invalid teacher"):
        trainer.compress(CONV, teacher=trainer.model)


def test_hidden_states_of_a_convolutional_model_are_distilled(tmp_path, monkeypatch):
    logs = StageLogs(monkeypatch)
    arguments = CompressionArguments(stage_epochs=16, distill_hidden=1.0)
    make_task_trainer(tmp_path, "resnet").compress(CONV, arguments)
    values = logs.of("teacher_hidden")
    assert sum(values[-2:]) < 0.8 * sum(values[:2])


# ---- device --------------------------------------------------------------------------------------


def test_outputs_moves_the_batch_to_the_teacher_and_back(monkeypatch):
    """With a mocked transfer, since there may be one device only."""
    model, inputs = make_model("bert"), TASKS["classification"][1]()
    teacher = Teacher(model, None, CompressionArguments(teacher_device="cpu", distill_hidden=1.0))
    moves = []

    def move(value, device):
        moves.append((sorted(value), torch.device(device)))
        return value

    monkeypatch.setattr("hf_quantnoise.compression.distillation.teacher.send_to_device", move)
    teacher.device = torch.device("cuda", 1)
    teacher.outputs(inputs, ["labels"])
    assert moves == [
        (["attention_mask", "input_ids"], torch.device("cuda", 1)),
        (["hidden_states", "logits"], torch.device("cpu")),
    ]


def test_teacher_device_does_not_move_the_student():
    model = make_model("bert")
    teacher = Teacher(model, None, CompressionArguments(teacher_device="meta"))
    assert {p.device.type for p in teacher.model.parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_teacher_on_cpu_with_student_on_gpu():
    model = make_model("bert").cuda()
    inputs = {name: value.cuda() for name, value in TASKS["classification"][1]().items()}
    teacher = Teacher(model, None, CompressionArguments(teacher_device="cpu"))
    outputs = teacher.outputs(inputs, ["labels"])
    assert outputs["logits"].is_cuda and next(teacher.model.parameters()).device.type == "cpu"
    expected = model(**inputs).logits
    torch.testing.assert_close(outputs["logits"], expected, rtol=1e-3, atol=1e-3)


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distill_hidden": -1.0}, "distill_hidden="),
        ({"distill_attention": float("nan")}, "distill_attention="),
        ({"distill_layers": "first"}, "distill_layers='first'"),
        ({"distill_layers": [0.5]}, "distill_layers="),
        ({"distill_layers": []}, "distill_layers="),
        ({"teacher_device": "gpu7"}, "teacher_device='gpu7'"),
        ({"distill": False, "distill_attention": 1.0}, "distill_attention=1.0"),
    ],
)
def test_invalid_arguments_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CompressionArguments(**fields)


def test_feature_losses_in_bfloat16_match_float32(tmp_path, monkeypatch):
    first = {}
    for bf16 in (False, True):
        logs = StageLogs(monkeypatch)
        model = sharp(make_model("bert"))
        trainer = make_task_trainer(tmp_path, model=model, bf16=bf16, learning_rate=1e-9)
        arguments = CompressionArguments(distill_hidden=1.0, distill_attention=1.0)
        trainer.compress(ATTENTION, arguments)
        first[bf16] = {n: logs.of(f"teacher_{n}")[0] for n in ("hidden", "attention")}
        monkeypatch.undo()
    for name, value in first[False].items():
        assert first[True][name] == pytest.approx(value, rel=0.1)


def test_model_without_head_is_refused_before_packing(tmp_path):
    trainer = make_task_trainer(tmp_path, model=make_stacked("bert").bert)
    trainer.compute_loss_func = lambda outputs, labels, **kwargs: outputs.pooler_output.sum()
    with pytest.raises(ValueError, match=r"logits.*distill=False"):
        trainer.compress(ONE_STAGE)
    assert not any(packed_layers(trainer.model))


def test_a_teacher_of_images_may_have_another_dtype():
    student, batch = TASKS["vit"][0](), TASKS["vit"][1]()
    teacher = Teacher(student, copy.deepcopy(student).bfloat16(), CompressionArguments())
    expected = copy.deepcopy(student).bfloat16()(batch["pixel_values"].bfloat16()).logits
    assert torch.equal(teacher.outputs(batch, ["labels"])["logits"], expected)
    assert batch["pixel_values"].dtype == torch.float32


def test_a_student_in_16_bits_is_checked_with_the_autocast_of_its_training(tmp_path):
    """Its inputs are float32, as the collator makes them."""
    model = TASKS["vit"][0]().bfloat16()
    trainer = make_task_trainer(tmp_path, "vit", model=model, bf16=True)
    Teacher(trainer.model, None, CompressionArguments()).check(trainer)
