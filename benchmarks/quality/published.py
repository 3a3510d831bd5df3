"""Studies on the results page: text, goals, and the methods that others are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rows import Run


@dataclass(frozen=True)
class Goal:
    """Limit of the mean over tasks (and seeds) of ``value``, a function of a run."""

    text: str
    value: Callable[[Run], float]
    limit: float
    at_least: bool = True

    def verdict(self, value: float) -> str:
        """Return "reached", or by how much the goal is missed, in points."""
        missed = self.limit - value if self.at_least else value - self.limit
        return "reached" if missed <= 0 else f"missed by {100 * missed:.1f} points"


def _keeps(share: float) -> Goal:
    return Goal(f"keeps {100 * share:g}% of float32", lambda run: run.kept, share)


@dataclass(frozen=True)
class Study:
    """How a study is shown. It is on the page as soon as it has rows.

    Attributes:
        title: heading of its section.
        text: Markdown below the heading.
        split: the examples that scores are shown of: ``"dev"``, or ``"held_out"`` if the study
            chooses settings.
        main: methods of the README's table, if the first has rows.
        goals: size -> goal of each method of that size.
        references: methods that all others of the same size are compared with; each is also
            compared with the references before it. None: those with "no noise" in their name.
        n_tasks: number of tasks that a method needs for a goal.
        majority: whether the score of always predicting the most frequent class is shown.
        beside: study whose runs are in the plots as well, and to which those of other libraries
            are compared.
    """

    title: str
    text: str
    split: str = "dev"
    main: tuple[str, ...] = ()
    goals: dict[str, Goal] = field(default_factory=dict)
    references: tuple[str, ...] | None = None
    n_tasks: int = 1
    majority: bool = False
    beside: str | None = None

    def is_reference(self, method: str) -> bool:
        """Whether other methods are compared with this one."""
        return "no noise" in method if self.references is None else method in self.references


_GLUE = """\
SST-2, CoLA, MRPC and RTE with MiniLM (22.7 M parameters). Every method begins with the float32
model of its seed, which is also the teacher, and has the same number of optimizer steps."""
_GLUE_METHODS = """

- *noise*: exact PQ noise on all layers with trained centroids, whose codes follow the weights; the
  packed model takes over both.
- *no noise*: all layers are product-quantized at once, codes stay as k-means found them, centroids
  and leftovers are trained.
- *bits allocated*: bit allocation chooses how each weight is stored, on 256 training examples; the
  other methods have one block size for each group of layers. Weights stored in integers, the most
  sensitive ones, have no noise.
- *no attention dropout*, *no dropout*: the student is trained without attention dropout, or without
  any dropout; all other methods but *attention maps* keep the dropout of the finetuning.
- *attention maps*: those of the teacher are targets, too, which also means no attention dropout.
- *noise, 3 of 6 layers*: every other layer of the float32 model in smaller blocks, trained with
  noise; the teacher has all layers.
- Length: as many epochs as the finetuning had; for SST-2, epochs of 24,000 examples. A
  [recipe](../how_to/recipes.md) trains twice as long for 20x and three times for 30x.
- Learning rate: 5e-5. A recipe has that of the finetuning, here 1e-4 except on CoLA.
- Input: on CoLA, MRPC and RTE, which have fewer than 10,000 training examples, half of the examples
  of a batch have 20% of their tokens replaced by other tokens of the batch. The targets are the
  teacher's probabilities for the changed text. Recipes do not do this, nor do the methods with
  *unchanged tokens*.

The majority class is that of the training data. If float32 is close to it, as on RTE and in the F1
of MRPC, the share of float32 is weak evidence."""

_GLUE_SETTINGS = """ The settings of the study
above were chosen from these runs. *random tokens*: tokens are replaced as in the study above.
*other text*: half of the examples are sentences of other data sets, in as many steps.
*temperature 4* is that of the distillation. With *hidden states* and *attention maps*, these are
targets, too; attention maps also mean no attention dropout. The runs with *bits allocated* and
centroids at 5e-4 are in the study above."""

_LANGUAGE_MODEL = """\
Perplexity on the validation text of WikiText-2. It is per token of the model's own vocabulary, so
models with different vocabularies cannot be compared. *stories* is stories260K, a Llama of 0.26 M
parameters, finetuned; *llama* has 5.1 M and was trained from scratch."""

_LANGUAGE_MODEL_SETTINGS = """\
Perplexity on held-out articles after 150 steps, from which the settings of the study above were
chosen. *noise, codes every N*: trained centroids; blocks are assigned to them again every N steps.
*no noise*: one stage of iPQ for all layers. The rates are those of weights and of centroids.
*bits allocated*: block sizes and codebook sizes by bit allocation, otherwise the same for all
layers. For stories, rates of 1e-3 and 5e-4 for centroids were tried after the study above."""

_PEERS = """\
The same float32 models, quantized by other libraries and by this package, without training.

- *torchao* (0.18.0): Linear layers and embeddings, the rest in float32. On a CPU other than ARM its
  file has one byte per weight, so MB is what packed weights would take: bits times weights, scales
  in 16 bits, zero points.
- *quanto* (optimum-quanto 0.2.7): Linear layers, without pooler and classifier, which its int4
  kernel does not take. It has no quantized embeddings; they are in bfloat16, like the rest. MB is
  that of its file.
- *one shot* and *intN after training*: `quantize_model` of this package with the storage of the
  sizes above, with blocks of 2 weights (8x, 4 bits per weight), or with int8 and int4.
- *one shot, two codebooks*: a block is the sum of two centroids, as in AQLM, in blocks of twice the
  length, so that a weight takes as many bits.

The other libraries (`pip install torchao==0.18.0 optimum-quanto==0.2.7`) can be combined with
training too, which was not done here; compare them with one shot first. The first table has the
best model of this package that is not larger, and how many points its average is above that of the
library, with the same tasks and seeds. The plots have all rows."""

_IMAGES = """\
CIFAR-10 with MobileNetV1 0.75 (pretrained on ImageNet), accuracy on the test images. Compressed
models are trained on 8,000 images, those of one group in the same number of optimizer steps.

- 1,000 steps, the float32 model is the teacher. *trained noise*: exact PQ noise of rate 1 with
  trained centroids, whose codes follow the weights. *exact noise* (p = 0.3), *proxy noise*
  (p = 0.1): half of the steps before packing. *no noise*: all steps after packing.
- *joint* and *staged*, 250 steps of an earlier version of the script: noise is trained on the
  labels for half of them, then all layers are compressed at once, or in two parts.
- *int4* and *int8*: 250 steps on the labels; QAT is noise of rate 1."""

# Study -> how it is shown, in the order of the page. The rows of a study are in the file of any
# study, benchmarks/results/quality_<study>.jsonl.
STUDIES = {
    "glue": Study(
        "GLUE",
        _GLUE + _GLUE_METHODS,
        main=("noise, bits allocated", "no noise, bits allocated"),
        goals={"13x": _keeps(0.995), "20x": _keeps(0.98), "30x": _keeps(0.96)},
        references=(
            "no noise",
            "no noise, unchanged tokens",
            "no noise, bits allocated",
            "noise, bits allocated",
            "no noise, bits allocated, no attention dropout",
            "no noise, bits allocated, attention maps",
        ),
        n_tasks=4,
        majority=True,
    ),
    "glue_peers": Study("Other libraries on GLUE", _PEERS, references=(), beside="glue"),
    "settings": Study(
        "Settings of GLUE",
        _GLUE + _GLUE_SETTINGS,
        split="held_out",
        references=("no noise",),
    ),
    "language_model": Study(
        "Language modeling",
        _LANGUAGE_MODEL,
        goals={"15x": Goal("perplexity within 10% of float32", lambda run: run.kept, 1.1, False)},
    ),
    "language_model_settings": Study(
        "Settings of language modeling",
        _LANGUAGE_MODEL_SETTINGS,
        split="held_out",
        references=(),
    ),
    "images": Study(
        "Images",
        _IMAGES,
        references=("no noise", "joint, no noise", "staged, no noise", "int4 QAT", "int8 QAT"),
        goals={
            "10x": Goal(
                "within 2 points of float32", lambda run: run.start - run.value, 0.02, False
            )
        },
    ),
    "ablations": Study(
        "Ablations",
        "One setting changed at a time.",
        split="held_out",
        references=("no noise", "noise"),
    ),
}
