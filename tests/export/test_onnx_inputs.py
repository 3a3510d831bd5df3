"""ONNX export of models whose inputs are not a batch of texts: they work or are refused early."""

import pytest
import torch
from support.tiny import SIZES
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GitConfig,
    GitForCausalLM,
    LayoutLMConfig,
    LayoutLMForSequenceClassification,
    SegformerConfig,
    SegformerForImageClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    ViltConfig,
    ViltForQuestionAnswering,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForAudioClassification,
)

from hf_quantnoise import FixedPointConfig, export_onnx, quantize_model
from hf_quantnoise.export.onnx_inputs import dynamic_axes, without_ones

SMALL = {**SIZES, "num_hidden_layers": 1}
PIXELS = {"image_size": 32, "patch_size": 16}
WAVES = {
    **SMALL, "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
ENCODER = {
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "vocab_size": 320,
    "num_mel_bins": 16, "max_source_positions": 16, "classifier_proj_size": 16,
}  # fmt: skip
REFUSED = {
    "images of any size": (
        SegformerForImageClassification,
        lambda: SegformerConfig(num_encoder_blocks=1, depths=[1], hidden_sizes=[32],
                                num_attention_heads=[2], sr_ratios=[2], patch_sizes=[7],
                                strides=[4], mlp_ratios=[2]),
        r"shape of pixel_values is not in the config.*inputs="),
    "text and images": (
        CLIPModel,
        lambda: CLIPConfig(text_config=SMALL, vision_config={**SMALL, **PIXELS},
                           projection_dim=16),
        r"also takes pixel_values.*inputs="),
    "text in an image": (ViltForQuestionAnswering, lambda: ViltConfig(**SMALL, **PIXELS),
                         r"also takes image_embeds, pixel_values.*inputs="),
    "decoders of text and images": (
        GitForCausalLM,
        lambda: GitConfig(vision_config={**SMALL, **PIXELS}, **SMALL),
        r"also takes pixel_values, which the graph of a decoder cannot; generate"),
    "text with boxes": (LayoutLMForSequenceClassification, lambda: LayoutLMConfig(**SMALL),
                        r"also takes bbox.*inputs="),
    "videos": (
        VideoMAEForVideoClassification,
        lambda: VideoMAEConfig(**SMALL, **PIXELS, num_frames=4),
        r"cannot run a batch of pixel_values \(2, 3, 32, 32\).*inputs="),
}  # fmt: skip


def packed(cls, config):
    torch.manual_seed(0)
    return quantize_model(cls(config).eval(), FixedPointConfig(bits=8), progress=False)


def session_of(result):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    return onnxruntime.InferenceSession(str(result.file))


@pytest.fixture(autouse=True)
def _extra():
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="needs the extra 'onnx'")


@pytest.mark.parametrize("kind", REFUSED)
def test_model_that_needs_inputs_is_refused_early(kind, tmp_path):
    cls, config, message = REFUSED[kind]
    model = packed(cls, config())
    with pytest.raises(ValueError, match=message):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_that_model_does_not_take_are_refused(tmp_path):
    model = packed(Wav2Vec2ForCTC, Wav2Vec2Config(**WAVES))
    with pytest.raises(ValueError, match=r"cannot run a batch of wave \(2, 400\)"):
        export_onnx(model, tmp_path / "out", {"wave": torch.zeros(2, 400)})


def assert_same(model, session, inputs):
    with torch.no_grad():
        expected = model(**inputs).logits
    (found,) = session.run(["logits"], {name: each.numpy() for name, each in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)


def test_multiple_choice_exports_with_any_number_of_choices(tmp_path):
    model = packed(BertForMultipleChoice, BertConfig(**SMALL))
    session = session_of(export_onnx(model, tmp_path / "out"))
    for shape in ((2, 2, 4), (1, 5, 9), (3, 4, 1)):
        ids = torch.randint(5, 320, shape, generator=torch.Generator().manual_seed(0))
        inputs = {name: torch.ones_like(ids) for name in ("attention_mask", "token_type_ids")}
        assert_same(model, session, {"input_ids": ids, **inputs})


@pytest.mark.slow
def test_spectrograms_export(tmp_path):
    model = packed(WhisperForAudioClassification, WhisperConfig(**ENCODER))
    session = session_of(export_onnx(model, tmp_path / "out"))
    for rows in (1, 3):
        assert_same(model, session, {"input_features": torch.randn(rows, 16, 32)})


@pytest.mark.slow
def test_waveforms_export_with_any_length(tmp_path):
    model = packed(Wav2Vec2ForCTC, Wav2Vec2Config(**WAVES))
    result = export_onnx(model, tmp_path / "out")
    session = session_of(result)
    for shape in ((2, 400), (1, 731), (3, 1600)):
        assert_same(model, session, {"input_values": torch.randn(shape)})


@pytest.mark.parametrize("shape", [(1, 8), (2, 1)])
def test_example_of_one_text_or_one_token_exports_with_any_size(shape, tmp_path):
    """torch.export takes sizes of 1 as fixed."""
    model = packed(BertForSequenceClassification, BertConfig(**SMALL))
    inputs = {"input_ids": torch.full(shape, 5), "attention_mask": torch.ones(shape).long()}
    session = session_of(export_onnx(model, tmp_path / "out", inputs))
    for sizes in ((1, 1), (3, 8)):
        ids = torch.randint(5, 320, sizes, generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[1:, 5:] = 0
        assert_same(model, session, {"input_ids": ids, "attention_mask": mask})


def test_axes_of_one_are_repeated_in_example_inputs():
    inputs = {
        "input_ids": torch.zeros(3, 7).long(),
        "pixel_values": torch.zeros(1, 3, 8, 8),
        "labels": torch.zeros(3, 1).long(),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in without_ones(inputs).items()}
    assert shapes == {"input_ids": (3, 7), "pixel_values": (2, 3, 8, 8), "labels": (3, 1)}
    choices = without_ones({"input_ids": torch.zeros(1, 1, 1).long()})
    assert choices["input_ids"].shape == (2, 2, 2)


@pytest.mark.slow
def test_texts_and_images_of_other_numbers_than_exported(tmp_path):
    """onnxruntime reuses buffers of axes that have one name."""
    parts = {"text_config": SMALL, "vision_config": {**SMALL, **PIXELS}}
    model = packed(CLIPModel, CLIPConfig(**parts, projection_dim=16))

    def batch(texts, images):
        ids = torch.randint(5, 320, (texts, 7), generator=torch.Generator().manual_seed(0))
        pixels = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    session = session_of(export_onnx(model, tmp_path / "out", batch(2, 2)))
    for texts, images in ((2, 4), (3, 1)):
        inputs = batch(texts, images)
        with torch.no_grad():
            expected = model(**inputs).logits_per_image
        given = {name: tensor.numpy() for name, tensor in inputs.items()}
        (found,) = session.run(["logits_per_image"], given)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)


def test_axes_that_may_differ_have_other_names():
    ids, pixels = torch.zeros(2, 3).long(), torch.zeros(2, 3, 8, 8)
    axes = dynamic_axes({"input_ids": ids, "decoder_input_ids": ids, "pixel_values": pixels})
    assert axes["input_ids"] == {0: "batch_size", 1: "sequence_length"}
    assert axes["decoder_input_ids"] == {0: "batch_size", 1: "decoder_sequence_length"}
    assert axes["pixel_values"] == {0: "pixel_values_batch_size"}
    assert dynamic_axes({"pixel_values": pixels}) == {"pixel_values": {0: "batch_size"}}
