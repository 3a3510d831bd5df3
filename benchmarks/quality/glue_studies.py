"""Runs of the GLUE studies: for a task, a list of (size, method, setting)."""

from __future__ import annotations

# With 16-bit centroids and 8-bit leftovers: 15.3, 21.0 and 32.2 times smaller.
STORAGE = {
    "13x": {"block_size": {"ffn": 4, "embeddings": 4, "attention": 4}},
    "20x": {
        "block_size": {"ffn": 4, "embeddings": 4, "attention": 4},
        "frequent_rows": 8000, "rare_block_size": 16,
    },
    "30x": {
        "block_size": {"ffn": 8, "embeddings": 4, "attention": 8},
        "frequent_rows": 8000, "rare_block_size": 32,
    },
}  # fmt: skip
# Epochs of finetuning of glue_float32.py, and how many times that long a model is compressed.
FINETUNING_EPOCHS = {"sst2": 2, "cola": 6, "mrpc": 5, "rte": 6}
LENGTHS = {"13x": 1, "20x": 2, "30x": 3}
# Epochs of SST-2 have so many examples, which take as long as those of the other tasks.
EXAMPLES = {"sst2": 24_000}


def _setting(task: str, size: str, length: float, rate: float, centroids: float) -> dict:
    setting = {
        "learning_rate": rate, "noise_epochs": 0,
        "compression": {
            "codebook_learning_rate": centroids, "stage_learning_rate": rate,
            "stage_epochs": length * FINETUNING_EPOCHS[task],
        },
        "config": {**STORAGE[size], "stages": [".*"]},
    }  # fmt: skip
    return setting | ({"examples": EXAMPLES[task]} if task in EXAMPLES else {})


def no_noise(task, size, length, rate=5e-5, centroids=5e-4):
    """Return one stage of iPQ for all layers; codes stay as k-means found them."""
    return _setting(task, size, length, rate, centroids)


def noise(task, size, length, rate=5e-5, centroids=5e-4, **options):
    """Return noise on all layers at once; packing takes over its centroids and codes."""
    setting = _setting(task, size, length, rate, centroids)
    setting["noise_epochs"] = setting["compression"]["stage_epochs"]
    setting["compression"]["stage_epochs"] = 0
    noise = {"noise": "pq", "p": 1.0, "learn_codebooks": True, "codebook_update": 20}
    return setting | {"noise": noise | options}


def staged(task, size, length, rate=5e-5, centroids=5e-4):
    """Return the three default stages of iPQ (section 3.2), each with a third of the epochs."""
    setting = _setting(task, size, length / 3, rate, centroids)
    setting["config"] = dict(STORAGE[size])
    return setting


def settings(task: str) -> list[tuple[str, str, dict]]:
    """Choose settings: as many epochs as the finetuning had, at the smallest size."""
    runs = {
        "noise": noise(task, "30x", 1),
        "no noise": no_noise(task, "30x", 1),
        "noise, rate 1e-4": noise(task, "30x", 1, 1e-4),
        "no noise, rate 1e-4": no_noise(task, "30x", 1, 1e-4),
        "noise, centroids 2e-3": noise(task, "30x", 1, centroids=2e-3),
        "no noise, centroids 2e-3": no_noise(task, "30x", 1, centroids=2e-3),
        "noise, codes every 5 steps": noise(task, "30x", 1, codebook_update=5),
        "noise, rate 2e-4": noise(task, "30x", 1, 2e-4),
        "no noise, rate 2e-4": no_noise(task, "30x", 1, 2e-4),
        "noise, p = 0.5": noise(task, "30x", 1, p=0.5),
        "staged": staged(task, "30x", 1),
    }
    return [("30x", method, setting) for method, setting in runs.items()]


def glue(task: str) -> list[tuple[str, str, dict]]:
    """Compare noise with none at each size, with equal steps."""
    return [
        (size, method, make(task, size, LENGTHS[size]))
        for size in ("30x", "20x", "13x")
        for method, make in (("noise", noise), ("no noise", no_noise))
    ]


STUDIES = {"settings": settings, "glue": glue}
