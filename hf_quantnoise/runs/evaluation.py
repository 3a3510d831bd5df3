"""Evaluation of models on the same data: metrics, agreement with the first one, latency."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from ..argument_parsing import usage_errors
from ..compat import prepare_inputs
from ..configuration.options import option
from ..hub.card import is_metric
from ..hub.model_classes import load_complete
from ..modeling import packed_layers
from ..modeling.inference import optimize_for_inference
from .arguments import ModelArguments
from .example import Example
from .example_data import check_minimum
from .job import Job
from .latency import latencies, main_input_shape
from .loading import errors_name_model
from .script import ScriptParser

_UNUSED = re.compile("--(max_)?(train|test|predict|shuffle)_")  # flags of other data


@dataclass
class EvaluationFlags:
    """How to evaluate."""

    batch_size: int = option(8, "Examples per batch.")
    optimize: Literal["float32", "bf16", "int8"] | None = option(
        None, "Decode packed weights first, for speed, into this form (optimize_for_inference)."
    )
    use_cpu: bool = option(False, "Use the CPU even if there is a GPU.")
    cache_dir: str | None = option(None, "Folder for downloads and prepared data.")
    json: bool = option(False, "Print the results as JSON.")

    def __post_init__(self) -> None:
        check_minimum(self, 1, "batch_size")


class StoredModel(ModelArguments):
    """A model with all of its weights, including the head."""

    def _load(self, auto_class: Any, **kwargs: Any) -> PreTrainedModel:
        return load_complete(auto_class, self.model_name_or_path, **kwargs)


@dataclass
class EvaluationArguments:
    """Arguments of a run that the preparation of a job reads."""

    model: ModelArguments
    data: Any
    training: TrainingArguments
    splits: ClassVar[list[str]] = ["validation"]


class _Parser(ScriptParser):
    """Parser without the flags of training and test data, which an evaluation does not read."""

    def add_argument(self, *names: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if not _UNUSED.match(names[0]):
            return super().add_argument(*names, **kwargs)
        self.set_defaults(**{names[0].removeprefix("--"): kwargs["default"]})


def evaluation_parser(example: Example, prog: str | None = None, **kwargs: Any) -> ScriptParser:
    """Return the parser of the data of an example, ``EvaluationFlags`` and the models."""
    parser = _Parser([example.data_class, EvaluationFlags], prog=prog, **kwargs)
    parser.add_argument("dense", metavar="DENSE", help="Dense model: folder or Hub repository.")
    parser.add_argument("models", metavar="COMPRESSED", nargs="+", help="Models to compare.")
    return parser


def parse(parser: ScriptParser, words: list[str]) -> tuple[Any, ...]:
    """Return the arguments of the data, the flags, and the models.

    Raises:
        UsageError: if a flag is invalid.
    """
    with usage_errors():
        return parser.parse_args_into_dataclasses(words)


@contextmanager
def prepared_evaluation(
    example: Example, data: Any, flags: EvaluationFlags, dense: str, progress: bool
) -> Iterator[Evaluation]:
    """Load the data and the dense model of an evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder,
            do_eval=True,
            per_device_eval_batch_size=flags.batch_size,
            report_to="none",
            use_cpu=flags.use_cpu,
            disable_tqdm=not progress,
        )
        model = StoredModel(dense, cache_dir=flags.cache_dir)
        with errors_name_model("cannot load", dense):
            stored = AutoConfig.from_pretrained(dense, cache_dir=flags.cache_dir)
        job = example.prepare(EvaluationArguments(model, data, training))  # type: ignore[arg-type]
        require_same_labels("validation data", job.model.config, dense, stored)
        yield Evaluation(job, training, model, data.auto_class, flags.optimize)


def require_same_labels(source: str, config: Any, dense: str, stored: Any) -> None:
    """Raise a ``ValueError`` if the labels of a config are not those of the dense model."""
    labels, known = ([*each.id2label.values()] for each in (config, stored))
    unnamed = [f"LABEL_{i}" for i in range(len(known))]
    if len(labels) != len(known) or (labels != known and unnamed not in (labels, known)):
        raise ValueError(
            f"{source}: the labels are {labels}, those of {dense!r} are {known}; pass data and "
            "models with the same labels"
        )


class Evaluation:
    """Data and a dense model, which other models are compared with.

    Args:
        job: the dense model, and the data.
        training: batch size and device.
        source: how the dense model was loaded.
        auto_class: loads models with the head of the task.
        form: form that packed weights are decoded into, or None.
    """

    def __init__(
        self,
        job: Job,
        training: TrainingArguments,
        source: ModelArguments,
        auto_class: Any,
        form: str | None,
    ) -> None:
        self.job, self.training, self.source = job, training, source
        self.auto_class, self.form = auto_class, form
        self.trainer = self._trainer(job.model)

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.job.parts["eval_dataset"])

    def load(self, name: str) -> PreTrainedModel:
        """Load a model with the labels of the dense one; raise a ``ValueError`` for others."""
        cache_dir = self.source.cache_dir
        with errors_name_model("cannot load", name):
            model = load_complete(self.auto_class, name, cache_dir=cache_dir)
        dense = self.source.model_name_or_path
        require_same_labels(repr(name), model.config, dense, self.job.model.config)
        if self.form is not None and any(packed_layers(model)):
            optimize_for_inference(model, self.form)
        return model

    def results(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return metrics of a model, and how near its outputs are to the dense ones.

        Of the dense model itself only the metrics.
        """
        is_dense = model is self.job.model
        trainer = self.trainer if is_dense else self._trainer(model)
        scores = self.job.scores(trainer)
        results = {"metrics": {name: v for name, v in scores.items() if is_metric(name, v)}}
        if not is_dense:
            results |= compare_outputs(self.job.model, model, self._batches())
        return results

    def timings(
        self, models: Sequence[PreTrainedModel]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return what is timed, and the latencies of models with results, the dense one first.

        They are timed in turns, for one example and for a batch.
        """
        rows = self.job.parts["eval_dataset"]
        counts = dict.fromkeys((1, min(self.training.per_device_eval_batch_size, len(rows))))
        found: list[dict[str, Any]] = [{"milliseconds": {}, "speed": {}} for _ in models]
        shapes, name = {}, ""
        for count in counts:
            batch = next(self._batches(rows.select(range(count))))
            name, shapes[str(count)] = main_input_shape(self.job.model, batch)
            for row, (time, speed) in zip(found, latencies(models, batch), strict=True):
                row["milliseconds"][str(count)], row["speed"][str(count)] = time, speed
        return {"timed_input": name, "timed_shapes": shapes}, found

    def _trainer(self, model: PreTrainedModel) -> Trainer:
        parts = {**self.job.parts, "train_dataset": None}
        trainer = Trainer(model, self.training, **parts)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _batches(self, rows: Any = None) -> Iterator[Mapping[str, Any]]:
        for batch in self.trainer.get_eval_dataloader(rows):
            yield prepare_inputs(self.trainer, batch)


@torch.no_grad()
def compare_outputs(
    dense: PreTrainedModel, other: PreTrainedModel, batches: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """Return how near the outputs of a model are to those of the dense one.

    Args:
        dense: the dense model.
        other: the other model, on the same device.
        batches: keyword arguments of both.

    Returns:
        ``agreement``: fraction of equal predictions (of classes, or of next tokens).
        ``divergence``: mean of KL(dense || other), in nats. For regression only ``difference``,
        the mean absolute difference of the outputs.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    is_regression = False
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        first, second = (model.eval()(**inputs).logits for model in (dense, other))
        is_regression = first.shape[-1] == 1
        for number in range(len(first)):  # the logits of all tokens in float32 may be large
            one, two = first[number].float(), second[number].float()
            if one.dim() == 2:  # tokens: those that are predicted
                kept = batch["labels"][number][1:] != -100
                one, two = one[:-1][kept], two[:-1][kept]
            one, two = one.reshape(-1, one.shape[-1]), two.reshape(-1, two.shape[-1])
            sums += _sums_of(one, two, is_regression).cpu()
    near, far, _ = (sums / sums[2]).tolist()
    return {"difference": far} if is_regression else {"agreement": near, "divergence": far}


def _sums_of(one: Tensor, two: Tensor, is_regression: bool) -> Tensor:
    """Return the sums over rows of agreement and divergence (or difference), and their number."""
    if is_regression:
        far = (one - two).abs().sum()
    else:
        logs = one.log_softmax(-1), two.log_softmax(-1)
        far = (logs[0].exp() * (logs[0] - logs[1])).sum()
    near = (one.argmax(-1) == two.argmax(-1)).sum()
    return torch.stack([near.double(), far.double(), near.new_tensor(len(one)).double()])


def provenance(training: TrainingArguments) -> dict[str, Any]:
    """Return what latencies depend on besides the models."""
    device = training.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
