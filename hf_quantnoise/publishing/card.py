"""The model card: how to load the model, its metrics and size, and how it was made."""

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
from ..text import markdown, markdown_code
from ..version import __version__
from .tables import (
    bullets,
    changed_fields,
    history_table,
    plan_table,
    results_table,
    skipped_layers,
)
from .tasks import TASKS, auto_class_of

# Markers of the text that this package writes, and rewrites when a card is updated.
START, END = "<!-- hf_quantnoise -->", "<!-- end of hf_quantnoise -->"
# Replaces the repository's name on cards that are written before it is known.
REPO_PLACEHOLDER = "this/repository"
_VERSIONS = {
    "hf_quantnoise": __version__,
    "transformers": transformers.__version__,
    "torch": torch.__version__,
}
# Config fields that are not settings of the user: they are set during compression, or too long.
_NOT_SETTINGS = (
    "plan", "left_dense", "shared_layers", "pruned_layers", "layer_quantizers", "weights_id",
    "format_version",
)  # fmt: skip
_PAPER = (
    "[*Training with Quantization Noise for Extreme Model Compression*]"
    "(https://arxiv.org/abs/2004.07320), Fan, Stock et al., 2020"
)
_USAGE = """\
The weights are stored as codes and codebooks. To load them, install the `hf-quantnoise` package:

```bash
pip install hf-quantnoise
```

```python
import hf_quantnoise  # registers the format with transformers
{load}
```

If the import is missing, transformers warns `Unknown quantization type, got hf_quantnoise` and \
raises an error about weights with mismatched sizes. The files are not damaged: add the import. Do \
not pass `ignore_mismatched_sizes=True`, which loads random weights."""


@dataclass
class QuantNoiseCard:
    """Facts for a model card that cannot be read from the model itself.

    The card's class, sizes, storage and versions come from the model when the card is rendered.
    Everything else is optional, and is not mentioned on the card if it is not set.

    ``QuantNoiseTrainer.compress`` stores a filled-in card as ``model.quantnoise_card``, which
    :func:`push_to_hub` and :func:`write_model_card` use by default.

    Args:
        title: headline. Default: the repository's name.
        repo_id: repository id for the code that loads the model.
        base_model: Hub id of the uncompressed model. Default: the id the model was loaded from,
            unless that was a local folder.
        task: the Hub's ``pipeline_tag``. Default: derived from the model's class.
        dataset: name of the evaluation dataset.
        dataset_id: Hub id of the evaluation dataset.
        before: metrics of the uncompressed model, as returned by ``Trainer.evaluate``. Timings are
            ignored.
        after: metrics of this model, in the same form.
        noise: quantization noise used in training.
        training: training hyperparameters, name -> value.
        compression: settings of the finetuning between the stages, name -> value.
        history: one record per compression stage, as in ``trainer.compression_history``.

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
        """Return the card (metadata and text) of a model, compressed or only trained with noise."""
        config: Any = getattr(model.config, "quantization_config", None)
        packed = isinstance(config, QuantizedModelConfig) and bool(config.plan)
        parts = [START, f"# {markdown(self._title(model))}", self._introduction(model, packed)]
        parts += ["## How to use", _usage(model, self.repo_id or REPO_PLACEHOLDER, packed)]
        report = size_report(model)
        before, after = plain_metrics(self.before), plain_metrics(self.after)
        measured = (
            f"Measured on {markdown(self.dataset)}." if self.dataset and (before or after) else ""
        )
        parts += ["## Results", measured, results_table(before, after, report, packed)]
        if packed:
            parts += _storage(config, report)
        if self.history:
            parts += ["## Compression stages", history_table(self.history)]
        parts += self._settings(config if packed else None)
        parts += ["## Versions", bullets(_VERSIONS), END]
        text = "\n\n".join(part for part in parts if part)
        return ModelCard(f"---\n{self._data(model, packed).to_yaml()}\n---\n\n{text}\n")

    def _title(self, model: PreTrainedModel) -> str:
        return self.title or (self.repo_id or type(model).__name__).split("/")[-1]

    def _base_model(self, model: PreTrainedModel) -> str | None:
        if self.base_model is not None:
            return self.base_model
        name = getattr(model, "name_or_path", None)
        return name if name != self.repo_id and is_repository_name(name) else None

    def _introduction(self, model: PreTrainedModel, packed: bool) -> str:
        base = self._base_model(model)
        name = f"[{base}](https://huggingface.co/{base})" if base else type(model).__name__
        how = "finetuned" if self.noise is None else "finetuned with quantization noise"
        how = "compressed" if packed else how
        return f"This model is {name}, {how} using `hf_quantnoise` ({_PAPER})."

    def _settings(self, config: QuantizedModelConfig | None) -> list[str]:
        parts = []
        if self.noise is not None:
            rates = ", ".join(f"`{name}` at rate {rate:g}" for name, rate in self.noise.noises)
            others = changed_fields(self.noise, without=("noise", "p"))
            parts += ["## Quantization noise", f"Finetuned with {rates}.", bullets(others)]
        if self.training:
            parts += ["## Training", bullets(self.training)]
        if config is not None:
            settings = changed_fields(config, without=_NOT_SETTINGS)
            if settings.get("share_layers") == 1:  # compression sets None to 1
                del settings["share_layers"]
            name = type(config).__name__
            intro = f"`{name}` with:" if settings else f"`{name}` with default settings."
            parts += ["## Compression", intro, bullets(settings)]
        if self.compression:
            parts += ["Finetuning after each stage:", bullets(self.compression)]
        return parts

    def _data(self, model: PreTrainedModel, packed: bool) -> ModelCardData:
        base = self._base_model(model)
        data: Any = ModelCardData(
            base_model=base,
            datasets=[self.dataset_id] if self.dataset_id else None,
            library_name="transformers",
            pipeline_tag=self.task or TASKS.get(auto_class_of(model) or ""),
            tags=list(TAGS) if packed else [TAG],
        )
        if base is not None and packed:
            data.base_model_relation = "quantized"
        if results := self._results(data.pipeline_tag):
            data.model_name, data.eval_results = self._title(model), results
            data.metrics = [result.metric_type for result in results]
        return data

    def _results(self, task: str | None) -> list[EvalResult]:
        """Return the model's metrics as the Hub's ``model-index`` results."""
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
            if name != "loss"
        ]


def _usage(model: PreTrainedModel, repo_id: str, packed: bool) -> str:
    auto = auto_class_of(model)
    library = "transformers" if auto or not packed else "hf_quantnoise"
    name = auto or ("AutoQuantizedModel" if packed else type(model).__name__)
    load = f'from {library} import {name}\n\nmodel = {name}.from_pretrained("{repo_id}")'
    return _USAGE.format(load=load) if packed else f"```python\n{load}\n```"


def _storage(config: QuantizedModelConfig, report: SizeReport) -> list[str]:
    parts = ["## Storage", plan_table(config, report)]
    if config.left_dense:
        parts += ["Not quantized:", skipped_layers(config.left_dense)]
    if config.pruned_layers:
        parts += [f"Removed layers: {', '.join(map(markdown_code, config.pruned_layers))}."]
    if config.shared_layers:
        shared = config.shared_layers.items()
        pairs = (f"{markdown_code(a)} uses those of {markdown_code(b)}" for a, b in shared)
        parts += [f"Layers with shared weights: {', '.join(pairs)}."]
    return parts
