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
# Bit allocation: the same size in megabytes.
ALLOCATED = {
    size: {"target_size_mb": megabytes, "frequent_rows": 8000}
    for size, megabytes in (("13x", 5.944), ("20x", 4.334), ("30x", 2.819))
}
# Tables with one block size and in row groups, at the same size: 36.8 and 37.6 times smaller.
EVEN = {"block_size": {"ffn": 8, "embeddings": 16, "attention": 8}}
GROUPS = {
    "block_size": {"ffn": 8, "embeddings": 8, "attention": 8},
    "frequent_rows": 8000, "rare_block_size": 32,
}  # fmt: skip
# For every other layer, in smaller blocks than "30x": 34.0 times smaller than all six in float32.
HALF = {
    "block_size": {"ffn": 4, "embeddings": 4, "attention": 4},
    "frequent_rows": 8000, "rare_block_size": 32,
}  # fmt: skip
# Epochs of the finetuning by glue_float32.py; a model is compressed for as many.
FINETUNING_EPOCHS = {"sst2": 2, "cola": 6, "mrpc": 5, "rte": 6}
# Tasks with fewer than 10,000 training examples, in which tokens are replaced at random.
SMALL = ("cola", "mrpc", "rte")
# Epochs of SST-2 have so many examples, which take as long as those of the other tasks.
EXAMPLES = {"sst2": 24_000}

# Dropout of the student; the teacher has none.
LESS_DROPOUT = {
    "no attention dropout": {"attention_dropout": False},
    "no dropout": {"dropout": False},
}


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


def stored(setting: dict, storage: dict) -> dict:
    """Return the setting with other blocks."""
    return setting | {"config": {**storage, "stages": setting["config"]["stages"]}}


def distilled(setting: dict, **options: float) -> dict:
    """Return the setting with other options of distillation."""
    return setting | {"compression": setting["compression"] | options}


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
        "noise, rate 2e-4, codes every 2 steps": noise(task, "30x", 1, 2e-4, codebook_update=2),
        "noise, rate 1e-4, codes every 2 steps": noise(task, "30x", 1, 1e-4, codebook_update=2),
        "no noise, rate 2e-4": no_noise(task, "30x", 1, 2e-4),
        "noise, no dropout": noise(task, "30x", 1) | {"dropout": False},
        "no noise, no dropout": no_noise(task, "30x", 1) | {"dropout": False},
        "noise, random tokens": noise(task, "30x", 1) | {"random_tokens": True},
        "no noise, random tokens": no_noise(task, "30x", 1) | {"random_tokens": True},
        "noise, random tokens, other text": noise(task, "30x", 1)
        | {"random_tokens": True, "other_text": True},
        "noise, batches of 8": noise(task, "30x", 1) | {"batch_size": 8},
        "noise, rate 1e-4, batches of 8": noise(task, "30x", 1, 1e-4) | {"batch_size": 8},
        "noise, rate 1e-4, batches of 8, random tokens": noise(task, "30x", 1, 1e-4)
        | {"batch_size": 8, "random_tokens": True},
        "no noise, rate 1e-4, batches of 8, random tokens": no_noise(task, "30x", 1, 1e-4)
        | {"batch_size": 8, "random_tokens": True},
        **{
            f"noise, random tokens, {name}": distilled(noise(task, "30x", 1), **options)
            | {"random_tokens": True}
            for name, options in (
                ("hidden states", {"distill_hidden": 1.0}),
                ("attention maps", {"distill_attention": 1.0}),
                ("temperature 4", {"temperature": 4.0}),
            )
        },
        **{
            f"{name}, random tokens, bits allocated, centroids 0.002": stored(
                arm(task, "30x", 1, centroids=2e-3), ALLOCATED["30x"]
            )
            | {"random_tokens": True}
            for name, arm in (("noise", noise), ("no noise", no_noise))
        },
        **{
            f"{name}, random tokens, bits allocated, attention maps": distilled(
                stored(arm(task, "30x", 1), ALLOCATED["30x"]), distill_attention=1.0
            )
            | {"random_tokens": True}
            for name, arm in (("noise", noise), ("no noise", no_noise))
        },
        **{
            f"{name}, random tokens, bits allocated, {less}": stored(
                arm(task, "30x", 1), ALLOCATED["30x"]
            )
            | {"random_tokens": True, **without}
            for name, arm in (("noise", noise), ("no noise", no_noise))
            for less, without in LESS_DROPOUT.items()
        },
        "noise, even blocks": stored(noise(task, "30x", 1), EVEN),
        "noise, row groups": stored(noise(task, "30x", 1), GROUPS),
        "noise, p = 0.5": noise(task, "30x", 1, p=0.5),
        "staged": staged(task, "30x", 1),
    }
    return [("30x", method, setting) for method, setting in runs.items()]


def glue(task: str) -> list[tuple[str, str, dict]]:
    """Compare noise with none at each size, with equal steps, as many as the finetuning had.

    Both with one block size per group of layers, and with allocated bits, also with the teacher's
    attention maps as targets.
    At 20x, also as long as a recipe; at 30x, also with every other layer, but more bits per weight.
    """
    runs = []
    for size in STORAGE:
        arms = {"noise": noise(task, size, 1), "no noise": no_noise(task, size, 1)}
        for name in ("noise", "no noise"):
            allocated = stored(arms[name], ALLOCATED[size])
            arms[f"{name}, bits allocated"] = allocated
            with_maps = distilled(allocated, distill_attention=1.0)
            arms[f"{name}, bits allocated, attention maps"] = with_maps
            for less, without in LESS_DROPOUT.items():
                arms[f"{name}, bits allocated, {less}"] = allocated | without
        if size == "20x":
            for name, arm in (("noise", noise), ("no noise", no_noise)):
                longer = stored(arm(task, size, 2), ALLOCATED[size])
                arms[f"{name}, bits allocated, twice as long"] = longer
        if size == "30x":
            arms["noise, 3 of 6 layers"] = stored(arms["noise"], HALF) | {"half_of_layers": True}
        if task in SMALL:
            runs += [(size, name, arm | {"random_tokens": True}) for name, arm in arms.items()]
            arms = {f"{name}, unchanged tokens": arm for name, arm in arms.items()}
        runs += [(size, name, arm) for name, arm in arms.items()]
    return runs


STUDIES = {"settings": settings, "glue": glue}
