"""Random tokens: which ones are replaced, that student and teacher see the same, and errors."""

from types import SimpleNamespace

import pytest
import torch
from support.tasks import TASKS
from support.tiny import make_model
from support.trainers import ONE_STAGE, make_task_trainer

from hf_quantnoise import CompressionArguments, QuantNoiseConfig
from hf_quantnoise.compression.distillation.random_tokens import with_random_tokens

PAD, CLS, SEP = 0, 1, 2
TOKENIZER = SimpleNamespace(all_special_ids=[PAD, CLS, SEP])


def examples(n_examples, length=60):
    """Return examples whose first half has words, between special tokens, and then padding."""
    ids = torch.full((n_examples, length), PAD)
    ids[:, 0], ids[:, length // 2] = CLS, SEP
    ids[:, 1 : length // 2] = (
        torch.arange(3, length // 2 + 2) + 100 * torch.arange(n_examples)[:, None]
    )
    return ids


def test_a_fifth_of_the_words_of_a_share_of_the_examples_are_replaced():
    ids = examples(4000)
    before = ids.clone()
    torch.manual_seed(0)
    changed = with_random_tokens({"input_ids": ids, "labels": None}, TOKENIZER, 0.5)
    new = changed["input_ids"]
    assert torch.equal(ids, before) and changed["labels"] is None
    special = torch.isin(ids, torch.tensor([PAD, CLS, SEP]))
    assert torch.equal(new[special], ids[special])
    assert torch.isin(new, ids).all()
    differs = (new != ids).float().sum(1) / (~special).float().sum(1)
    assert (differs > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert differs[differs > 0].mean().item() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("shape", [(4, 3, 8), (4, 8)])
def test_batches_of_choices_and_without_words(shape):
    words = torch.arange(3, 3 + torch.Size(shape).numel()).reshape(shape)
    torch.manual_seed(0)
    changed = with_random_tokens({"input_ids": words}, TOKENIZER, 0.5, tokens=1.0)["input_ids"]
    assert changed.shape == shape
    by_example = (changed != words).flatten(1)
    assert by_example.any(1).tolist() == (by_example.sum(1) > words[0].numel() / 2).tolist()
    assert by_example.any() and not by_example.all()
    padding = torch.zeros(shape, dtype=torch.int64)
    assert not with_random_tokens({"input_ids": padding}, TOKENIZER, 1.0)["input_ids"].any()


def test_student_and_teacher_see_the_same_tokens_in_training_only(tmp_path):
    model, teacher = make_model("bert"), make_model("bert", seed=5)
    batch = TASKS["classification"][1]()
    seen = {"student": [], "teacher": [], "evaluation": []}

    def note(module, args, inputs):
        name = "teacher" if module is teacher else "student" if module.training else "evaluation"
        seen[name].append(inputs["input_ids"].clone())

    for each in (model, teacher):
        each.register_forward_pre_hook(note, with_kwargs=True)
    args = CompressionArguments(random_tokens=1.0, stage_epochs=1)
    parts = {"teacher": teacher, "compression_args": args, "processing_class": TOKENIZER}
    trainer = make_task_trainer(
        tmp_path, model=model, noise=QuantNoiseConfig("int8", p=0.5), parts=parts
    )
    trainer.args.remove_unused_columns = False
    for train in (trainer.train, lambda: trainer.compress(ONE_STAGE)):
        for calls in seen.values():
            calls.clear()
        train()
        given = {tuple(row.tolist()) for row in batch["input_ids"]}
        assert seen["student"]
        pairs = zip(seen["student"], seen["teacher"][-len(seen["student"]) :], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        assert not all(tuple(row.tolist()) in given for ids in seen["student"] for row in ids)
    seen["evaluation"].clear()
    trainer.evaluate(trainer.train_dataset)
    assert seen["evaluation"]
    assert all(tuple(row.tolist()) in given for ids in seen["evaluation"] for row in ids)


def test_what_random_tokens_need_is_named(tmp_path):
    args = CompressionArguments(random_tokens=0.5)
    parts = {"teacher": make_model("bert", seed=5), "compression_args": args}
    trainer = make_task_trainer(tmp_path, model=make_model("bert"), parts=parts)
    with pytest.raises(ValueError, match=r"random_tokens=0.5: .*pass processing_class=tokenizer"):
        trainer.train()
    with pytest.raises(ValueError, match="the batch has pixel_values, expected input_ids"):
        with_random_tokens({"pixel_values": torch.zeros(1)}, TOKENIZER, 0.5)
    for fields in ({"distill": False}, {"distill_weight": 0.5}):
        with pytest.raises(ValueError, match=r"random_tokens=0.5: labels may be wrong"):
            CompressionArguments(random_tokens=0.5, **fields)
