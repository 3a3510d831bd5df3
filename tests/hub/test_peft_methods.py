"""Every method of PEFT on a packed model, as docs/how_to/finetune_packed.md lists them."""

import copy
import re
from pathlib import Path

import pytest
import torch
from support.stacked import inputs_of, make_stacked
from support.stored import PQ, tensors_of
from support.tiny import make_model

from hf_quantnoise import FixedPointConfig, IPQConfig, quantize_model

peft = pytest.importorskip("peft", reason="peft is not installed (pip install hf-quantnoise[test])")

PAGE = Path(__file__).parents[2] / "docs" / "how_to" / "finetune_packed.md"
IDS = inputs_of("bert")["input_ids"]
TARGETS = {"SEQ_CLS": ["query", "value"], "CAUSAL_LM": ["q_proj", "v_proj"]}
NORMS = {"SEQ_CLS": ["LayerNorm"], "CAUSAL_LM": ["input_layernorm"]}
TABLES = {"SEQ_CLS": ["word_embeddings"], "CAUSAL_LM": ["embed_tokens"]}
PACKED = {
    "SEQ_CLS": ("bert", FixedPointConfig(bits=8, observer="channel")),
    "CAUSAL_LM": ("llama", IPQConfig(**PQ)),
}


def on(targets, name, **settings):
    return lambda task: getattr(peft, name)(
        task_type=task, target_modules=targets[task], **settings
    )


def prompt(name, **settings):
    return lambda task: getattr(peft, name)(task_type=task, num_virtual_tokens=4, **settings)


def layers(name, **settings):
    return on(TARGETS, f"{name}Config", **settings)


METHODS = {
    "PROMPT_TUNING": prompt("PromptTuningConfig"),
    "MULTITASK_PROMPT_TUNING": prompt("MultitaskPromptTuningConfig", num_tasks=2),
    "P_TUNING": prompt("PromptEncoderConfig", encoder_hidden_size=8),
    "PREFIX_TUNING": prompt("PrefixTuningConfig"),
    "CARTRIDGE": prompt("CartridgeConfig"),
    "CPT": lambda task: peft.CPTConfig(
        task_type=task, cpt_token_ids=[5, 6, 7, 8], cpt_mask=[1] * 4,
        cpt_tokens_type_mask=[1, 2, 3, 4],
    ),
    "ADAPTION_PROMPT": lambda task: peft.AdaptionPromptConfig(
        task_type=task, adapter_len=4, adapter_layers=1
    ),
    "SHADOW": lambda task: peft.ShadowConfig(task_type=task),
    "LN_TUNING": on(NORMS, "LNTuningConfig"),
    "TRAINABLE_TOKENS": on(TABLES, "TrainableTokensConfig", token_indices=IDS[0, :3].tolist()),
    "LORA": layers("Lora", r=4),
    "LORA (DoRA)": layers("Lora", r=4, use_dora=True),
    "ADALORA": layers("AdaLora", init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2),
    "IA3": layers("IA3", feedforward_modules=[]),
    "BOFT": layers("BOFT", boft_block_size=4),
    "OFT": layers("OFT", oft_block_size=4),
    "POLY": layers("Poly", r=4, n_tasks=2, n_skills=2, n_splits=1),
    "FOURIERFT": layers("FourierFT", n_frequency=16),
    "WAVEFT": layers("WaveFT", n_frequency=16),
    "VBLORA": layers("VBLoRA", r=4, num_vectors=8, vector_length=8, topk=2),
    "ROAD": layers("Road", group_size=8),
    "C3A": layers("C3A", block_size=8),
    "GRALORA": layers("Gralora", r=4, gralora_k=2),
    **{name.upper(): layers(name, r=4) for name in (
        "LoHa", "LoKr", "Vera", "Pvera", "HRA", "UniLora", "Miss", "RandLora", "Hira", "Shira",
        "Delora", "TinyLora", "Psoft", "Peanut", "Deft", "Lily", "Glora",
    )},
    **{name.upper(): layers(name) for name in ("Adamss", "Beft", "Frod", "OSF", "Supertuning")},
}  # fmt: skip
WITH_TASKS = ("POLY", "MULTITASK_PROMPT_TUNING")
# The errors of PEFT for what the table of the page calls "refused".
REFUSALS = {
    ("CPT", "SEQ_CLS"): "only supports task_type = CAUSAL_LM",
    ("ADAPTION_PROMPT", "SEQ_CLS"): "Unsupported model type",
    ("SHADOW", "SEQ_CLS"): "Unable to automatically find a `nn.ModuleList` of decoder layers",
    ("GLORA", "SEQ_CLS"): "not a plain torch.nn.Linear",
    ("GLORA", "CAUSAL_LM"): "not a plain torch.nn.Linear",
}
MERGES = {
    "refused": (ValueError, r"merge an adapter.*dequantize"),
    "not in PEFT": ((AttributeError, NotImplementedError, ValueError), None),
}


def rows_of_page():
    """Return method -> cells of the table of the page."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(next(line for line in lines if line.startswith("| PEFT method |")))
    table = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        names, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`([^`]+)`", names):
            table[name] = cells
    return table


ROWS = rows_of_page()


@pytest.fixture(scope="module")
def bases():
    makers = {"bert": make_model, "llama": lambda name: make_stacked(name, 2)}
    return {
        task: quantize_model(makers[name](name), config, progress=False)
        for task, (name, config) in PACKED.items()
    }


def batch_of(task):
    labels = torch.tensor([0, 1]) if task == "SEQ_CLS" else IDS
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels}


def codes_of(model):
    """Return the bytes of all codes, under whatever names PEFT gives them."""
    tensors = tensors_of(model).items()
    return {t.numpy().tobytes() for name, t in tensors if name.endswith("weight_indices")}


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits


def train(model, batch):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def test_page_lists_every_method():
    assert {name.partition(" ")[0] for name in ROWS} == {kind.value for kind in peft.PeftType}
    assert ROWS.keys() - {"XLORA"} == METHODS.keys()


@pytest.mark.parametrize("task", TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_method_trains_reloads_and_merges_as_listed(method, task, bases, tmp_path):
    column = {"SEQ_CLS": 0, "CAUSAL_LM": 1}[task]
    works, merges = ROWS[method][column], ROWS[method][2]
    base, batch = copy.deepcopy(bases[task]), batch_of(task)
    plain = logits(base, batch)
    inputs = {**batch, "task_ids": torch.tensor([0, 1])} if method in WITH_TASKS else batch
    if works == "refused":
        with pytest.raises((ValueError, AttributeError), match=REFUSALS[method, task]):
            peft.get_peft_model(base, METHODS[method](task))
        return
    assert works == "works"
    if merges == "biases":
        merges = "works" if task == "SEQ_CLS" else "not in PEFT"
    torch.manual_seed(0)
    model = peft.get_peft_model(base, METHODS[method](task))
    train(model, inputs)
    expected = logits(model, inputs)
    assert expected.shape != plain.shape or not torch.equal(expected, plain)
    assert codes_of(model) == codes_of(bases[task])

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(bases[task]), tmp_path)
    torch.testing.assert_close(logits(again, inputs), expected, rtol=0, atol=1e-5)
    if column == 1 or not peft.PeftType(method.partition(" ")[0]).name.endswith(
        ("_TUNING", "CARTRIDGE")
    ):  # PEFT 0.21 fails to disable prompts of a classifier, dense or packed
        with again.disable_adapter():
            assert torch.equal(logits(again, batch), plain)
    if merges == "works":
        merged = logits(again.merge_and_unload(), batch)
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
        return
    error, message = MERGES[merges]
    with pytest.raises(error, match=message):
        again.merge_and_unload()
    if merges == "refused":
        torch.testing.assert_close(logits(again, inputs), expected, rtol=0, atol=1e-5)


def test_xlora_mixes_adapters_of_a_packed_model(bases, tmp_path):
    base, batch = copy.deepcopy(bases["CAUSAL_LM"]), batch_of("CAUSAL_LM")
    base.config.use_cache = False
    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    peft.get_peft_model(copy.deepcopy(base), lora).save_pretrained(tmp_path / "lora")
    plain = logits(base, batch)
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, xlora_depth=2, use_trainable_adapters=True,
        adapters={"0": str(tmp_path / "lora"), "1": str(tmp_path / "lora")},
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    train(model, batch)
    expected = logits(model, batch)
    assert not torch.equal(expected, plain)
    assert ROWS["XLORA"] == ["not tried", "works", "not tried"]


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_prompt_tuning_finds_the_table(name):
    """PEFT searches for a parameter of as many rows as the vocabulary; each scheme has others."""
    task = {"gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}[name]
    for config in (IPQConfig(**PQ, row_scale=True), FixedPointConfig(bits=8)):
        base = quantize_model(make_stacked(name, 1), config, progress=False)
        table = base.get_input_embeddings()
        model = peft.get_peft_model(base, prompt("PromptTuningConfig")(task))
        assert model.word_embeddings is table and "get_submodule" not in vars(base)
        loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
        loss.backward()


def test_prompts_of_a_dense_model_use_the_code_of_peft():
    model = peft.get_peft_model(make_stacked("gpt2", 1), prompt("PromptTuningConfig")("CAUSAL_LM"))
    assert model.word_embeddings is model.get_input_embeddings()
