"""Rows of ``ablations.py``, as flags of the examples."""

from __future__ import annotations

from dataclasses import dataclass

CLEAN = "no noise"


@dataclass(frozen=True)
class Row:
    """How a start is compressed. ``{clean}`` in the flags is the start without noise."""

    name: str
    flags: str
    start: str = CLEAN


# All rows of a table have the same size. Options that store more have centroids of lower precision,
# and two codebooks have blocks twice as long. (8 does not divide the 172 columns of the down
# projections of stories260K, so these have two small codebooks over blocks of 4.)
_STAGES = {
    "sentences": "--stage_epochs 0.5 --stage_learning_rate 2e-5 --codebook_learning_rate 5e-4",
    "text": "--stage_epochs 0.5 --codebook_learning_rate 5e-3",
}
_ONE = {
    "sentences": "--block_size ffn=8,embeddings=8,attention=4",
    "text": "--block_size 4 --n_centroids 64",
}
_TWO = {
    "sentences": "--block_size ffn=16,embeddings=16,attention=8 --n_codebooks 2 --codebook_bits 8",
    "text": "--block_size .*down_proj=4,ffn=8,embeddings=8,attention=8,head=8 --n_centroids "
    ".*down_proj=8,ffn=64,embeddings=64,attention=64,head=64 --n_codebooks 2 --codebook_bits 8",
}


def _plain(task: str) -> str:
    return f"{_STAGES[task]} {_ONE[task]}"


# Finetunings that rows start from, as changes to the settings of the task. Noise has the blocks of
# rows with one codebook.
def _pq(task: str, rate: float) -> str:
    return f"--noise pq --noise_rate {rate} {_ONE[task]}"


_THIRTY_BLOCKS = "--block_size ffn=8,embeddings=16,attention=8"
_LONGER = "--num_train_epochs 4"
_LONGER_STAGES = "--stage_epochs 2"
_WARM_UP = {"sentences": "--noise_schedule 626", "text": "--noise_schedule 126"}
STARTS = {
    task: {
        CLEAN: "--noise none",
        "pq": _pq(task, 0.1),
        "pq, p=0.3": _pq(task, 0.3),
        "pq, p=0.5": _pq(task, 0.5),
        "pq, p=1": _pq(task, 1),
        "no noise, longer": f"--noise none {_LONGER}",
        "pq, longer": f"{_pq(task, 0.3)} {_LONGER} {_WARM_UP[task]}",
    }
    for task in _ONE
}
STARTS["sentences"]["pq at 30 times"] = f"--noise pq --noise_rate 0.3 {_THIRTY_BLOCKS}"


def _codebooks(task: str) -> list[Row]:
    one, two = _plain(task), f"{_STAGES[task]} {_TWO[task]}"
    return [
        Row("plain", one),
        Row("importance", f"{one} --importance activations"),
        Row("row scale", f"{one} --row_scale True --codebook_bits 16"),
        Row("two codebooks", two),
        Row("two codebooks, importance", f"{two} --importance activations"),
    ]


def _noises(task: str) -> list[Row]:
    one, clean = _plain(task), "--teacher_name_or_path {clean}"

    def kept(rate: float) -> str:
        return f"{_STAGES[task]} {_pq(task, rate)} --keep_noise True"

    return [
        Row("plain", one),
        Row("noise in the stages", kept(0.1)),
        Row("noise before", one, "pq"),
        Row("noise before, clean teacher", f"{one} {clean}", "pq"),
        *(
            Row(f"noise before (p={rate}), clean teacher", f"{one} {clean}", f"pq, p={rate}")
            for rate in (0.3, 0.5, 1)
        ),
        Row("noise before and in the stages, clean teacher", f"{kept(0.1)} {clean}", "pq"),
        Row(
            "noise before and in the stages (p=0.3), clean teacher",
            f"{kept(0.3)} {clean}",
            "pq, p=0.3",
        ),
        Row("longer", one, "no noise, longer"),
        Row("longer, noise before (p=0.3), clean teacher", f"{one} {clean}", "pq, longer"),
        Row("longer stages", f"{one} {_LONGER_STAGES}"),
        Row("noise before, clean teacher, longer stages", f"{one} {clean} {_LONGER_STAGES}", "pq"),
        Row(
            "noise before (p=0.3), clean teacher, longer stages",
            f"{one} {clean} {_LONGER_STAGES}",
            "pq, p=0.3",
        ),
        Row("longer, longer stages", f"{one} {_LONGER_STAGES}", "no noise, longer"),
        Row(
            "longer, noise before (p=0.3), clean teacher, longer stages",
            f"{one} {clean} {_LONGER_STAGES}",
            "pq, longer",
        ),
    ]


def _teachers(task: str) -> list[Row]:
    one = _plain(task)
    return [
        Row("plain", one),
        Row("labels only", f"{one} --distill False"),
        Row("temperature 4", f"{one} --temperature 4"),
        Row("hidden states", f"{one} --distill_hidden 1"),
        Row("hidden states and attention", f"{one} --distill_hidden 1 --distill_attention 1"),
    ]


_CENTROIDS = {"sentences": (2e-4, 2e-3), "text": (1e-3, 1e-2)}


def _rates(task: str) -> list[Row]:
    one = _plain(task)
    return [
        Row("plain", one),
        *(
            Row(f"centroids at {rate}", f"{one} --codebook_learning_rate {rate}")
            for rate in _CENTROIDS[task]
        ),
    ]


# The size of the row "plain", with bits allocated to each weight.
_BYTES = {"sentences": "--target_size_mb 4.209154", "text": "--target_size_mb 0.097354"}


def _budgets(task: str) -> list[Row]:
    allocated = f"{_STAGES[task]} {_BYTES[task]}"
    return [
        Row("plain", _plain(task)),
        Row("allocated by errors alone", f"{allocated} --budget_batches 0"),
        Row("allocated by sensitivity", f"{allocated} --budget_batches 4"),
        Row(
            "allocated by sensitivity, importance",
            f"{allocated} --budget_batches 4 --importance activations",
        ),
    ]


# 30 times smaller, for the sentences only: the codebooks of the language model would be too large.
_THIRTY = f"{_STAGES['sentences']} {_THIRTY_BLOCKS}"
_THIRTY_TWO = (
    f"{_STAGES['sentences']} --block_size ffn=16,embeddings=32,attention=16 --n_codebooks 2 "
    "--codebook_bits 8"
)
_SMALLER = [
    Row("30 times, plain", _THIRTY),
    Row("30 times, importance", f"{_THIRTY} --importance activations"),
    Row("30 times, row scale", f"{_THIRTY} --row_scale True --codebook_bits 16"),
    Row("30 times, two codebooks", _THIRTY_TWO),
    Row("30 times, two codebooks, importance", f"{_THIRTY_TWO} --importance activations"),
    Row(
        "30 times, noise before (p=0.3), clean teacher",
        f"{_THIRTY} --teacher_name_or_path {{clean}}",
        "pq at 30 times",
    ),
    Row(
        "30 times, allocated by sensitivity",
        f"{_STAGES['sentences']} --target_size_mb 3.13669 --budget_batches 4",
    ),
]

TABLES = {
    "codebooks": {task: _codebooks(task) for task in _ONE},
    "noise": {task: _noises(task) for task in _ONE},
    "teacher": {task: _teachers(task) for task in _ONE},
    "rates": {task: _rates(task) for task in _ONE},
    "budget": {task: _budgets(task) for task in _ONE},
    "schedule": {task: [Row("plain", _plain(task))] for task in _ONE},
    "smaller": {"sentences": _SMALLER},
}
# Rows of options that have been removed. They are printed if the results have them.
REMOVED_ROWS = {
    "codebooks": [Row("reassignment", "")],
    "schedule": [Row("one schedule over all stages", "")],
}
