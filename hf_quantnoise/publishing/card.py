"""The model card: how to load the model first, then what was done to it and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..configuration import QuantizedModelConfig, QuantNoiseConfig
from ..hub.card import TAGS, plain_metrics
from ..repository import TAG, is_repository_name
from ..size import SizeReport, size_report
from ..version import __version__
from .tables import (
    bullets,
    changed_fields,
    history_table,
    plan_table,
    reasons,
    results_table,
)
from .tasks import TASKS, auto_class_of

START, END = "<!-- hf_quantnoise -->", "<!-- end of hf_quantnoise -->"
_NOT_MODEL_INDEX = ("loss",)
_FILLED_IN = ("plan", "left_dense", "shared_layers", "pruned_layers", "layer_quantizers")
NOWHERE = "this/repository"


@dataclass
class QuantNoiseCard:
    """What a card says beyond what is read off the model (class, sizes, plan, versions) when it is
    rendered.

    ``QuantNoiseTrainer`` fills one in and leaves it on the model it compressed, as
    ``model.quantnoise_card``, for :func:`push_to_hub` and :func:`write_model_card`.

    Args:
        title: the headline; None takes the repository's name.
        repo_id: the repository, for the lines that load the model.
        base_model: what was compressed, as named on the Hub; None takes the name the model was
            loaded by, where that is no folder.
        task: the Hub's name of the task (``pipeline_tag``); None goes by the model's class.
        dataset: the data's name, and ``dataset_id`` its identifier on the Hub, of the metrics.
        dataset_id: see there.
        before: metrics of the uncompressed model, as ``Trainer.evaluate`` gives them. Timings are
            left out.
        after: those of this model. Both only as measured: what is not given is not on the card.
        noise: the noise it was trained with.
        training: settings of the training, name -> value.
        compression: settings of the pass, name -> value.
        history: records of the pass, ``trainer.compression_history``.

    Example:
        >>> card = QuantNoiseCard(base_model="roberta-base", after={"accuracy": 0.91})
        >>> push_to_hub(model, "me/roberta-ipq", card=card)
    """

    title: str | None = None
    repo_id: str | None = None
    base_model: str | None = None
    task: str | None = None
    dataset: str | None = None
    dataset_id: str | None = None
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    noise: QuantNoiseConfig | None = None
    training: dict[str, Any] = field(default_factory=dict)
    compression: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def render(self, model: PreTrainedModel) -> ModelCard:
        """The card of a model, compressed or only trained with noise.

        Returns:
            A ``huggingface_hub.ModelCard``: metadata and text.
        """
        config = getattr(model.config, "quantization_config", None)
        packed = isinstance(config, QuantizedModelConfig) and config.is_compressed
        parts = [START, f"# {self._title(model)}", self._lead(model, packed)]
        parts += [_loading(model, self.repo_id or NOWHERE, packed)]
        report = size_report(model)
        before, after = plain_metrics(self.before), plain_metrics(self.after)
        measured = f"Measured on {self.dataset}." if self.dataset and (before or after) else ""
        parts += ["## Results", measured, results_table(before, after, report, packed)]
        if packed:
            parts += _storage(config, report)
        if self.history:
            parts += ["## Stages", history_table(self.history)]
        parts += self._settings(config if packed else None)
        parts += ["## Versions", bullets(versions()), END]
        text = "\n\n".join(part for part in parts if part)
        return ModelCard(f"---\n{self._data(model, packed).to_yaml()}\n---\n\n{text}\n")

    def _title(self, model: PreTrainedModel) -> str:
        return self.title or (self.repo_id or type(model).__name__).split("/")[-1]

    def _base_model(self, model: PreTrainedModel) -> str | None:
        if self.base_model is not None:
            return self.base_model
        name = getattr(model, "name_or_path", None)
        return name if name != self.repo_id and is_repository_name(name) else None

    def _lead(self, model: PreTrainedModel, packed: bool) -> str:
        base = self._base_model(model)
        of = f"[{base}](https://huggingface.co/{base})" if base else f"a `{type(model).__name__}`"
        noisy = "finetuned with quantization noise" if self.noise is not None else "finetuned"
        how = "compressed" if packed else noisy
        return (
            f"This is {of}, {how} by `hf_quantnoise` (*Training with Quantization Noise for "
            "Extreme Model Compression*, Fan, Stock et al., 2020)."
        )

    def _settings(self, config: QuantizedModelConfig | None) -> list[str]:
        parts = []
        if self.noise is not None:
            rates = ", ".join(f"`{name}` at rate {rate:g}" for name, rate in self.noise.noises)
            others = changed_fields(self.noise, without=("noise", "p"))
            parts += ["## Quantization noise", f"Finetuned with {rates}.", bullets(others)]
        if self.training:
            parts += ["## Training", bullets(self.training)]
        if config is not None:
            asked = changed_fields(config, without=_FILLED_IN)
            if asked.get("share_layers") == 1:  # that is what the pass makes of None
                del asked["share_layers"]
            what = f"`{type(config).__name__}`" + (" with its defaults." if not asked else ":")
            parts += ["## Compression", what, bullets(asked)]
        if self.compression:
            parts += ["Finetuning between the stages:", bullets(self.compression)]
        return parts

    def _data(self, model: PreTrainedModel, packed: bool) -> ModelCardData:
        base = self._base_model(model)
        data = ModelCardData(
            base_model=base,
            datasets=[self.dataset_id] if self.dataset_id else None,
            library_name="transformers",
            pipeline_tag=self.task or TASKS.get(auto_class_of(model)),
            tags=list(TAGS) if packed else [TAG],
        )
        if base is not None and packed:
            data.base_model_relation = "quantized"
        if results := self._results(data.pipeline_tag):
            data.model_name, data.eval_results = self._title(model), results
            data.metrics = [result.metric_type for result in results]
        return data

    def _results(self, task: str | None) -> list[EvalResult]:
        """The model's metrics in the Hub's form, whose results belong to a task."""
        return [
            EvalResult(
                task_type=task or "other",
                dataset_type=self.dataset_id or self.dataset or "unknown",
                dataset_name=self.dataset or self.dataset_id or "unknown",
                metric_type=name,
                metric_name=name,
                metric_value=value,
            )
            for name, value in plain_metrics(self.after).items()
            if name not in _NOT_MODEL_INDEX
        ]


def versions() -> dict[str, str]:
    """Versions of what a card's figures depend on."""
    return {
        "hf_quantnoise": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def _loading(model: PreTrainedModel, where: str, packed: bool) -> str:
    auto = auto_class_of(model)
    library = "transformers" if auto or not packed else "hf_quantnoise"
    name = auto or ("AutoQuantizedModel" if packed else type(model).__name__)
    lines = [f"from {library} import {name}", "", f'model = {name}.from_pretrained("{where}")']
    if not packed:
        return "\n".join(["```python", *lines, "```"])
    first = "import hf_quantnoise  # pip install hf-quantnoise; teaches transformers the format"
    return "\n".join(
        [
            "It is stored as codes and codebooks. Load it with",
            "",
            "```python",
            first,
            *lines,
            "```",
            "",
            "Without that import transformers warns of an `Unknown quantization type, got "
            "hf_quantnoise` and stops at weights of another size. The files are whole: import the "
            "package. With `ignore_mismatched_sizes=True` the weights would be random.",
        ]
    )


def _storage(config: QuantizedModelConfig, report: SizeReport) -> list[str]:
    parts = ["## How it is stored", plan_table(config, report)]
    if config.left_dense:
        parts += ["In floating point stay", reasons(config.left_dense)]
    if config.pruned_layers:
        parts += [f"Taken out: {', '.join(f'`{name}`' for name in config.pruned_layers)}."]
    if config.shared_layers:
        pairs = [f"`{name}` those of `{source}`" for name, source in config.shared_layers.items()]
        parts += [f"Layers that have the weights of another: {', '.join(pairs)}."]
    return parts
