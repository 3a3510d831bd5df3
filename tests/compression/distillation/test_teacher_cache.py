"""The teacher's logits are kept: found again for the same inputs, and for no others."""

import copy

import pytest
import torch
from support.stage_runs import (
    ONE_STAGE,
    Killed,
    Watch,
    compare,
    make_pass_trainer,
    make_trainer,
    sharp,
)
from support.tasks import EXAMPLES, TASKS
from support.tiny import make_model
from torch.nn.utils.rnn import pad_sequence

from hf_quantnoise import CompressionArguments, IPQConfig
from hf_quantnoise.compression.distillation.logits import logits_divergence
from hf_quantnoise.compression.distillation.teacher import Teacher
from hf_quantnoise.compression.distillation.teacher_cache import TeacherCache
from hf_quantnoise.compression.training.stage_trainer import StageTrainer
from hf_quantnoise.modeling import packed_layers


def count_forwards(teacher):
    rows = []
    teacher.register_forward_hook(
        lambda m, args, kwargs, out: rows.append(len(kwargs["attention_mask"])), with_kwargs=True
    )
    return rows


def test_with_a_cache_each_example_is_computed_once_and_the_result_is_the_same(
    tmp_path, monkeypatch
):
    results, rows = {}, {}
    watch = Watch(monkeypatch)
    for cache in (False, True):
        teacher = make_model("bert", seed=5)
        rows[cache] = count_forwards(teacher)
        arguments = CompressionArguments(stage_epochs=3, distill_cache=cache)
        config = IPQConfig(block_size=4, n_centroids=8, stages=["ffn", "attention"])
        results[cache] = make_trainer(tmp_path).compress(config, arguments, teacher)
    assert sum(rows[True]) == EXAMPLES  # the batch of the check among them
    assert sum(rows[False]) == 8 + 2 * 3 * EXAMPLES
    for name, parameter in results[True].named_parameters():
        expected = results[False].get_parameter(name)
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-5)
    assert watch.of("teacher_cache_mb")[-1] == pytest.approx(EXAMPLES * 2 * 4 / 1e6)
    assert watch.of("teacher_cache_hits")[-1] > 0.8


@pytest.mark.parametrize("task", ["tokens", "questions", "masked LM", "t5", "vit"])
def test_what_is_found_is_what_was_computed(task):
    make, data = TASKS[task]
    model, batch = make(), data()
    teacher = Teacher(model, None, CompressionArguments(distill_cache=True))
    plain = Teacher(model, None, CompressionArguments())
    labels = ["labels", "start_positions", "end_positions"]
    for order in (slice(0, 8), slice(4, 12), slice(0, 16), [15, 3, 7]):
        part = {name: value[order] for name, value in batch.items()}
        found, expected = teacher.outputs(part, labels), plain.outputs(part, labels)
        with torch.no_grad():
            outputs = other_outputs(model, part)
            pair = [logits_divergence(model, outputs, out, part) for out in (found, expected)]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)
    assert len(teacher.cache) == EXAMPLES
    assert (teacher.cache.asked, teacher.cache.found) == (8 + 8 + 16 + 3, 4 + 12 + 3)


def other_outputs(model, part):
    changed = copy.deepcopy(model)
    torch.manual_seed(0)
    for parameter in changed.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return changed(**part)


def test_padding_at_the_end_is_no_part_of_the_key_and_at_the_start_it_is():
    calls = []

    def compute(inputs):
        calls.append(len(inputs["input_ids"]))
        return {"logits": inputs["input_ids"].float().unsqueeze(-1)}

    def batch(ids, mask):
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}

    cache = TeacherCache(limit_mb=1.0)
    cache.outputs(batch([5, 6, 0], [1, 1, 0]), compute)
    assert len(calls) == 1
    found = cache.outputs(batch([5, 6, 9, 9], [1, 1, 0, 0]), compute)["logits"]
    assert len(calls) == 1
    assert found.flatten().tolist() == [5.0, 6.0, 0.0, 0.0]
    cache.outputs(batch([0, 5, 6], [0, 1, 1]), compute)  # positions are others
    cache.outputs(batch([5, 7, 0], [1, 1, 0]), compute)
    assert len(calls) == 3


def test_padding_that_has_labels_is_kept():
    def compute(inputs):
        return {"logits": inputs["input_ids"].float().unsqueeze(-1)}

    cache = TeacherCache(limit_mb=1.0)
    inputs = {"input_ids": torch.tensor([[5, 6, 3]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    labelled = {**inputs, "labels": torch.tensor([[5, 6, 3]])}
    cache.outputs(inputs, compute)
    for _ in range(2):
        assert cache.outputs(labelled, compute)["logits"].flatten().tolist() == [5.0, 6.0, 3.0]


def test_classes_are_not_taken_for_positions():
    """As many classes as positions: none of them is padding."""
    cache = TeacherCache(limit_mb=1.0)
    inputs = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    for _ in range(2):
        out = cache.outputs(inputs, lambda part: {"logits": torch.tensor([[1.0, 2.0, 3.0]])})
        assert out["logits"].tolist() == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize("task", ["classification", "tokens", "questions"])
def test_what_is_written_is_found_again(task):
    make, data = TASKS[task]
    model, batch = make(), data()
    labels = ["labels", "start_positions", "end_positions"]
    arguments = CompressionArguments(distill_cache=True)
    first, again = (Teacher(model, None, arguments) for _ in range(2))
    again.cache.take(first.cache.tensors())
    assert len(again.cache) == again.cache.bytes == 0
    first.outputs({name: value[:12] for name, value in batch.items()}, labels)
    expected = first.outputs(batch, labels)
    again.cache.take(first.cache.tensors())
    assert len(again.cache) == EXAMPLES and again.cache.bytes == first.cache.bytes
    assert (again.cache.asked, again.cache.found) == (12 + 16, 12)
    again.model.forward = None  # all is found
    found = again.outputs(batch, labels)
    assert found.keys() == expected.keys()
    for name, value in first.outputs(batch, labels).items():
        assert torch.equal(found[name], value)


def test_of_what_is_written_as_much_is_taken_as_fits():
    model, batch = make_model("bert"), TASKS["classification"][1]()
    roomy, small = (
        Teacher(model, None, CompressionArguments(distill_cache=True, distill_cache_mb=mb))
        for mb in (1.0, 5 * 8 / 1e6)
    )
    expected = roomy.outputs(batch, ["labels"])["logits"]
    small.cache.take(roomy.cache.tensors())
    assert len(small.cache) == 5 and small.cache.bytes == 5 * 8
    found = small.outputs({name: value[:5] for name, value in batch.items()}, ["labels"])["logits"]
    assert torch.equal(found, expected[:5])


def of_many_lengths():
    """Examples of 4 to 29 tokens; what rounding gives depends on what they are padded with."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(64):
        length = int(torch.randint(4, 30, (), generator=generator))
        rows.append(
            {"input_ids": torch.randint(5, 320, (length,), generator=generator),
             "attention_mask": torch.ones(length, dtype=torch.long), "labels": number % 2}
        )  # fmt: skip
    return rows


def padded(rows):
    batch = {"labels": torch.tensor([row["labels"] for row in rows])}
    for name in ("input_ids", "attention_mask"):
        batch[name] = pad_sequence([row[name] for row in rows], batch_first=True)
    return batch


# 16 steps in a stage, a checkpoint after every other one.
@pytest.mark.parametrize("step", [5, 13, 17], ids=["first epoch", "second epoch", "next stage"])
def test_a_killed_pass_goes_on_with_the_cache_it_had(step, tmp_path, kill):
    config = IPQConfig(block_size=4, n_centroids=16, stages=["ffn", "attention"])
    arguments = CompressionArguments(stage_epochs=2, distill_cache=True)

    def trainer(folder):
        model, parts = sharp(make_model("bert")), {"eval_dataset": None, "data_collator": padded}
        return make_pass_trainer(
            folder, model, of_many_lengths(), None, parts, per_device_train_batch_size=8,
            save_strategy="steps", save_steps=2,
        )  # fmt: skip

    straight = trainer(tmp_path / "a")
    straight.compress(config, arguments)
    release = kill(StageTrainer, "training_step", step)
    with pytest.raises(Killed):
        trainer(tmp_path / "b").compress(config, arguments)
    release()
    again = trainer(tmp_path / "b")
    again.compress(config, arguments, resume_from_checkpoint=True)
    compare(again, straight)
    hits = [
        [log["compression_teacher_cache_hits"] for log in one.state.log_history if
         "compression_train_runtime" in log]
        for one in (straight, again)
    ]  # fmt: skip
    assert hits[0][-1] == hits[1][-1] > 0.7
    kept = tmp_path / "b" / "compression"
    assert not list(kept.glob("**/teacher_cache*"))  # nothing comes that would need it


def test_the_cache_is_bounded_and_what_cannot_fit_is_refused_at_once(tmp_path):
    batch = TASKS["classification"][1]()
    model = make_model("bert")
    arguments = CompressionArguments(distill_cache=True, distill_cache_mb=5 * 8 / 1e6)
    teacher = Teacher(model, None, arguments)
    for _ in range(2):
        teacher.outputs(batch, ["labels"])
    assert len(teacher.cache) == 5 and teacher.cache.bytes == 5 * 8
    trainer = make_trainer(tmp_path, "causal LM")
    arguments = CompressionArguments(distill_cache=True, distill_cache_mb=0.05)
    with pytest.raises(ValueError, match=r"distill_cache: .*16 examples.*distill_cache_mb=0.05"):
        trainer.compress(ONE_STAGE, arguments)
    assert not any(packed_layers(trainer.model))
