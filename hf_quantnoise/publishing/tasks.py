"""The Auto class that loads a model, and the Hub task of each Auto class."""

from __future__ import annotations

import transformers
from transformers import PreTrainedModel

from ..compat import models_of

# Auto class -> the Hub's task. The first match is used. Encoder-decoders have no task, since they
# may translate or summarize.
TASKS = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForSeq2SeqLM": None,  # before the masked ones, which BART belongs to as well
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForMultipleChoice": None,
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForImageSegmentation": "image-segmentation",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForDepthEstimation": "depth-estimation",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModel": "feature-extraction",
}


def auto_class_of(model: PreTrainedModel) -> str | None:
    """Return the name of the Auto class that maps the model's config to its class, or None."""
    for name in TASKS:
        classes = models_of(getattr(transformers, name)).get(type(model.config), ())
        if type(model) in (classes if isinstance(classes, tuple) else (classes,)):
            return name
    return auto_class_of_code(model)


def auto_class_of_code(model: PreTrainedModel) -> str | None:
    """Return the Auto class of a model whose code is stored with it, or None."""
    for name, reference in (getattr(model.config, "auto_map", None) or {}).items():
        is_own = isinstance(reference, str) and reference.endswith(f".{type(model).__name__}")
        if is_own and name.startswith("AutoModel") and hasattr(transformers, name):
            return str(name)
    return None
