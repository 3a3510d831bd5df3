"""The language-model study: its splits, its metrics, the budgets of its arms, and its page."""

import json
import math

import ablation_page
import language_model
import pytest
import torch
import wikitext
from language_model_rows import MEGABYTES
from rows import runs_of
from transformers import AutoModelForCausalLM

from hf_quantnoise.runs.clm import TokenizedText


@pytest.fixture
def articles(tmp_path):
    """Folder of 40 articles of 5 lines each in train.txt, and one more in valid.txt."""

    def article(number: int) -> str:
        start = 2 * number % 36
        words = [f"w{start + offset}" for offset in range(4)]
        return f" = w{start} = \n = = w1 = = \n" + 3 * f"{' '.join(3 * words)}\n"

    (tmp_path / "train.txt").write_text("".join(map(article, range(40))))
    (tmp_path / "valid.txt").write_text(article(7))
    return tmp_path


def test_held_out_articles_are_whole_and_not_trained_on(articles):
    lines = wikitext.read_lines(str(articles))
    assert lines["train"] + lines["held_out"] == (articles / "train.txt").open().readlines()
    assert lines["held_out"][0].startswith(" = ") and not lines["held_out"][0].startswith(" = = ")
    assert 0.03 < len(lines["held_out"]) / 200 <= wikitext.HELD_OUT_SHARE


@torch.no_grad()
def test_scores_match_float64(text_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(text_checkpoint).eval()
    teacher = AutoModelForCausalLM.from_pretrained(text_checkpoint).eval()
    teacher.lm_head.weight.mul_(5)
    ids = torch.randint(0, 43, (20, 9), generator=torch.Generator().manual_seed(0))
    text = TokenizedText({"input_ids": ids.tolist()}, tokens=20 * 8, words=40.0)
    scores = wikitext.evaluate(model, text, teacher)
    p, q = (m.double()(ids).logits[:, :-1].log_softmax(-1) for m in (teacher, model))
    nats = -q.gather(-1, ids[:, 1:, None])[..., 0]
    assert scores["loss"] == pytest.approx(nats.mean().item(), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(nats.mean().item()), rel=1e-5)
    assert scores["word_perplexity"] == pytest.approx(math.exp(nats.sum().item() / 40), rel=1e-4)
    assert scores["losses"] == pytest.approx(nats.mean(1).tolist(), abs=1e-4)
    divergence = (p.exp() * (p - q)).sum(-1).mean().item()
    assert divergence > 0.01 and scores["divergence"] == pytest.approx(divergence, rel=1e-4)
    assert scores["agreement"] == pytest.approx(
        (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    )


@torch.no_grad()
def test_smaller_model_keeps_the_first_layers_and_units(text_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(text_checkpoint).eval()
    small = wikitext.smaller_model(model, 1, 24).eval()
    ids = torch.arange(8)[None]
    model.model.layers = model.model.layers[:1]
    mlp = model.model.layers[0].mlp
    mlp.down_proj.weight[:, 24:] = 0
    assert small.config.num_hidden_layers == 1
    assert small.model.layers[0].mlp.up_proj.weight.shape == (24, 32)
    torch.testing.assert_close(small(ids).logits, model(ids).logits)


@pytest.mark.parametrize("model", MEGABYTES)
def test_arms_of_a_size_have_the_same_steps_and_bytes(model):
    rows = language_model.STUDIES["language_model"](model, None)
    trained = [row for row in rows if row.method != "one shot"]
    assert len({row.noise_steps + row.compression_steps for row in trained}) == 1
    for size in MEGABYTES[model]:
        arms = [row for row in trained if row.size == size]
        assert {row.method for row in arms} == {row.method for row in trained}
        assert {row.noise is None for row in arms} == {True, False}
        stored = [{**row.stored, "stages": None} for row in rows if row.size == size]
        assert all(fields == stored[0] for fields in stored)


@pytest.mark.parametrize("study", language_model.STUDIES)
def test_rows_of_a_study_have_different_keys_and_names(study):
    rows = language_model.STUDIES[study]("stories", None)
    assert len({json.dumps([row.method, row.size, row.setting()]) for row in rows}) == len(rows)
    if study != "language_model_settings":  # which is not on a page
        assert len({(row.method, row.size) for row in rows}) == len(rows)


def test_study_appends_rows_of_true_sizes_and_skips_them(
    articles, text_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setitem(wikitext.LENGTHS, "stories", 16)
    monkeypatch.setattr(wikitext, "BATCH_TOKENS", 64)
    rows = ["rate / exact PQ / 0.3", "order / staged / ffn, attention, embeddings"]
    command = [
        "language_model.py", "--study", "language_model_ablations", "--model", "stories",
        "--data_dir", str(articles), "--start_dir", str(text_checkpoint), "--steps", "4",
        "--results_dir", str(tmp_path / "results"), "--rows", *rows,
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", command)
    language_model.main()
    file = tmp_path / "results" / "quality_language_model_ablations.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["key"]["method"] for line in lines] == rows
    assert [line["steps"] for line in lines] == [8, 6]
    for line in lines:
        assert line["bytes"] < line["float32_bytes"]
        assert line["dev"]["loss"] != line["dev_float32"]["loss"] and line["dev"]["divergence"] > 0
    assert len(runs_of(lines)) == 2
    language_model.main()
    assert len(file.read_text().splitlines()) == 2


def _line(method: str, seed: int, loss: float) -> dict:
    scores = {"loss": loss, "perplexity": math.exp(loss), "divergence": 0.5}
    return {
        "key": {
            "study": ablation_page.STUDY, "task": "wikitext2", "model": "stories",
            "method": method, "size": "any", "seed": seed, "setting": {},
        },
        "seconds": 1.0, "steps": 200, "bytes": 70_000, "float32_bytes": 1_000_000,
        "dev": scores, "dev_float32": {"loss": 2.0, "perplexity": math.exp(2.0)},
        "command": f"python study.py --seeds {seed}", "machine": "a machine",
    }  # fmt: skip


def test_page_shows_each_setting_with_mean_and_spread():
    lines = [
        _line("rate / proxy / 0.1", 42, math.log(10)),
        _line("rate / proxy / 0.1", 43, math.log(14)),
    ]
    lines += [
        _line("rate / exact PQ / 0.5", 42, math.log(8)),
        _line("order / staged / ffn, head", 42, 3.0),
    ]
    runs = runs_of(lines)
    blocks, plots = ablation_page.sections(runs), ablation_page.plots(runs)
    assert "| proxy | 0.1 | 12.00 ± 2.83 | 7.39 |" in blocks["rate"]
    assert "| exact PQ | 0.5 | 8.00 | 7.39 |" in blocks["rate"]
    assert "| staged | ffn, head | 20.09 |" in blocks["order"]
    assert list(plots) == ["language_model_ablations-rate.svg"], "orders have no numeric axis"
    assert all(name in plots["language_model_ablations-rate.svg"] for name in ("proxy", "exact PQ"))
    assert "`python study.py --seeds 42 43`" in blocks["commands"]
