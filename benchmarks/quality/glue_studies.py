"""Runs of the GLUE studies: for a task, a list of (size, method, setting)."""

from __future__ import annotations

BLOCKS = {
    "30x": {"ffn": 8, "embeddings": 16, "attention": 8},
    "20x": {"ffn": 8, "embeddings": 8, "attention": 4},
}
# Epochs of finetuning of glue_float32.py; compression takes a multiple of it.
FINETUNING_EPOCHS = {"sst2": 2, "cola": 6, "mrpc": 5, "rte": 6}


def noise(size, epochs, rate=5e-5, centroids=5e-4, schedule="constant", **options):
    """Return noise on all layers at once; packing takes over its centroids and codes."""
    return {
        "noise": {
            "noise": "pq", "p": 1.0, "p_schedule": schedule, "block_size": BLOCKS[size],
            "learn_codebooks": True, "codebook_update": 20, "target_modules": ".*", **options,
        },
        "learning_rate": rate, "noise_epochs": epochs,
        "compression": {"codebook_learning_rate": centroids, "stage_epochs": 0},
        "config": {"block_size": BLOCKS[size], "stages": [".*"]},
    }  # fmt: skip


def no_noise(size, epochs, rate=5e-5, centroids=5e-4, **compression):
    """Return one stage of iPQ for all layers; codes stay as k-means found them."""
    return {
        "learning_rate": rate, "noise_epochs": 0,
        "compression": {
            "codebook_learning_rate": centroids, "stage_epochs": epochs,
            "stage_learning_rate": rate, **compression,
        },
        "config": {"block_size": BLOCKS[size], "stages": [".*"]},
    }  # fmt: skip


def staged(size, epochs, rate=5e-5, centroids=5e-4):
    """Return the three default stages of iPQ (section 3.2), each with a third of the epochs."""
    setting = no_noise(size, epochs / 3, rate, centroids)
    setting["config"] = {"block_size": BLOCKS[size]}
    return setting


def settings(task: str) -> list[tuple[str, str, dict]]:
    """Choose settings: as many epochs as the finetuning had, at the smallest size."""
    epochs = FINETUNING_EPOCHS[task]
    runs = {
        "no noise": no_noise("30x", epochs),
        "noise": noise("30x", epochs),
        "staged": staged("30x", epochs),
        "no noise, rate 1e-4": no_noise("30x", epochs, 1e-4),
        "noise, rate 1e-4": noise("30x", epochs, 1e-4),
        "noise, centroids 2e-3": noise("30x", epochs, centroids=2e-3),
        "no noise, centroids 2e-3": no_noise("30x", epochs, centroids=2e-3),
    }
    return [("30x", method, setting) for method, setting in runs.items()]


STUDIES = {"settings": settings}
