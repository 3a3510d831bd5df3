"""The model card: how to load the model, its metrics and size, and how it was made."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..argument_checks import require_instance
from ..configuration import QuantizedModelConfig, QuantNoiseConfig
from ..hub.card import TAGS, plain_metrics
from ..hub.processing import has_processing
from ..repository import LIBRARY, TAG, is_repository_name
from ..size import SizeReport, size_report
from ..text import markdown, markdown_code
from ..version import __version__
from .metadata import evaluation_results, facts_of_base
from .snippets import usage_snippet
from .tables import (
    bullets,
    changed_fields,
    history_table,
    plan_table,
    results_table,
    sizes_table,
    skipped_layers,
)
from .tasks import TASKS, auto_class_of
from .template import read_template

# Markers of the text that this package writes, and rewrites when a card is updated.
START, END = "<!-- hf_quantnoise -->", "<!-- end of hf_quantnoise -->"
# Replaces the repository's name on cards that are written before it is known.
REPO_PLACEHOLDER = "this/repository"
PLOTS = "plots"  # folder of a model's repository
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
# Fields of a card that are strings.
_TEXTS = (
    "title", "repo_id", "base_model", "task", "dataset", "dataset_id", "dataset_config",
    "dataset_split",
)  # fmt: skip
_PAPER = (
    "[*Training with Quantization Noise for Extreme Model Compression*]"
    "(https://arxiv.org/abs/2004.07320), Fan, Stock et al., 2020"
)


@dataclass
class QuantNoiseCard:
    """Facts for a model card that cannot be read from the model itself.

    Class, sizes, storage and versions are read from the model when the card is rendered, languages
    and license from the card of the base model. Everything else is optional, and omitted from the
    card if it is not set.

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
        dataset_config: its configuration, as in ``load_dataset(dataset_id, dataset_config)``.
        dataset_split: its split that was evaluated.
        before: metrics of the uncompressed model, as returned by ``Trainer.evaluate``. Timings are
            ignored.
        after: metrics of this model, in the same form.
        noise: quantization noise used in training.
        training: training hyperparameters, name -> value.
        compression: settings of the finetuning between the stages, name -> value.
        history: one record per compression stage, as in ``trainer.compression_history``.
        plot: path of a plot of the compression run, which is copied to the model's folder.
        template: path of a Jinja template to use instead of the package's.

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
    dataset_config: str | None = None
    dataset_split: str | None = None
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    noise: QuantNoiseConfig | None = None
    training: dict[str, Any] = field(default_factory=dict)
    compression: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    plot: str | None = None
    template: str | os.PathLike | None = None

    def __post_init__(self) -> None:
        for name in _TEXTS:
            if (value := getattr(self, name)) is not None:
                require_instance(name, value, str, "a string", "pass one name, or None")
        for name in ("before", "after", "training", "compression"):
            require_instance(name, getattr(self, name), dict, "a dict", "pass {} if it is unknown")

    def render(self, model: PreTrainedModel, folder: str | None = None) -> ModelCard:
        """Return the card (metadata and text) of a model, compressed or only trained with noise.

        Args:
            model: the model.
            folder: its folder, if it has been saved.

        Raises:
            ValueError: if the template is invalid.
        """
        config: Any = getattr(model.config, "quantization_config", None)
        if not (isinstance(config, QuantizedModelConfig) and config.plan):
            config = None
        template = read_template(self.template)
        card = ModelCard.from_template(
            self._data(model, config is not None),
            template_str=template,
            **self._variables(model, config, folder),
        )
        card.text = f"\n{START}\n\n{card.text.strip()}\n\n{END}\n"
        return card

    def copy_plot(self, folder: str | os.PathLike) -> None:
        """Copy the plot to the folder of a model, where the rendered card expects it."""
        if (name := self._plot_name) is not None:
            target = os.path.join(folder, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if not (os.path.exists(target) and os.path.samefile(target, str(self.plot))):
                shutil.copyfile(str(self.plot), target)

    @property
    def _plot_name(self) -> str | None:
        """Path of the plot in the model's folder, or None if there is none."""
        if self.plot is None or not os.path.isfile(self.plot):
            return None
        return f"{PLOTS}/{os.path.basename(self.plot)}"

    def _variables(
        self, model: PreTrainedModel, config: QuantizedModelConfig | None, folder: str | None
    ) -> dict[str, Any]:
        """Return the values of the template's variables (``template.VARIABLES``)."""
        packed, report = config is not None, size_report(model)
        before, after = plain_metrics(self.before), plain_metrics(self.after)
        repo = self.repo_id or REPO_PLACEHOLDER
        processing = repo if has_processing(model, folder) else self._base_model(model)
        return {
            "title": markdown(self._title(model)),
            "introduction": self._introduction(model, packed),
            "packed": packed,
            "snippet": usage_snippet(model, repo, processing, packed),
            "dataset": markdown(self._dataset_name or ""),
            "results": results_table(before, after, packed) if before or after else "",
            "sizes": sizes_table(report, packed),
            "plot": self._plot_name,
            "storage": "" if config is None else _storage(config, report),
            "stages": history_table(self.history) if self.history else "",
            "noise": self._noise(),
            "training": bullets(self.training),
            "compression": "" if config is None else self._compression(config),
            "versions": bullets(_VERSIONS),
        }

    @property
    def _dataset_name(self) -> str | None:
        """Name of the dataset with its split: ``"GLUE SST-2 (validation)"``."""
        name = self.dataset or self.dataset_id
        return f"{name} ({self.dataset_split})" if name and self.dataset_split else name

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

    def _noise(self) -> str:
        if self.noise is None:
            return ""
        rates = ", ".join(f"`{name}` at rate {rate:g}" for name, rate in self.noise.noises)
        others = changed_fields(self.noise, without=("noise", "p"))
        return _paragraphs(f"Finetuned with {rates}.", bullets(others))

    def _compression(self, config: QuantizedModelConfig) -> str:
        settings = changed_fields(config, without=_NOT_SETTINGS)
        if settings.get("share_layers") == 1:  # compression sets None to 1
            del settings["share_layers"]
        name = type(config).__name__
        intro = f"`{name}` with:" if settings else f"`{name}` with default settings."
        after = "Finetuning after each stage:" if self.compression else ""
        return _paragraphs(intro, bullets(settings), after, bullets(self.compression))

    def _data(self, model: PreTrainedModel, packed: bool) -> ModelCardData:
        base = self._base_model(model)
        data: Any = ModelCardData(
            base_model=base,
            datasets=[self.dataset_id] if self.dataset_id else None,
            # The Hub shows the code of this library; transformers' lacks the import.
            library_name=LIBRARY if packed else "transformers",
            pipeline_tag=self.task or TASKS.get(auto_class_of(model) or ""),
            tags=list(TAGS) if packed else [TAG],
            **facts_of_base(base or getattr(model, "name_or_path", None)),
        )
        if base is not None and packed:
            data.base_model_relation = "quantized"
        if results := evaluation_results(
            self.after,
            data.pipeline_tag,
            self.dataset,
            self.dataset_id,
            self.dataset_config,
            self.dataset_split,
        ):
            data.model_name, data.eval_results = self._title(model), results
            data.metrics = [result.metric_type for result in results]
        return data


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def _storage(config: QuantizedModelConfig, report: SizeReport) -> str:
    parts = [plan_table(config, report)]
    if config.left_dense:
        parts += ["Not quantized:", skipped_layers(config.left_dense)]
    if config.pruned_layers:
        parts += [f"Removed layers: {', '.join(map(markdown_code, config.pruned_layers))}."]
    if config.shared_layers:
        shared = config.shared_layers.items()
        pairs = (f"{markdown_code(a)} uses those of {markdown_code(b)}" for a, b in shared)
        parts += [f"Layers with shared weights: {', '.join(pairs)}."]
    return _paragraphs(*parts)
