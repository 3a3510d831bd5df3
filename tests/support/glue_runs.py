"""Short runs of the GLUE example on a tiny model."""


def run_glue(folder, model: str, *flags: str, out: str = "out"):
    """Run the example; return its results and its output folder."""
    from hf_quantnoise.runs.glue import main  # needs datasets

    shared = {
        "model_name_or_path": model,
        "output_dir": folder / out,
        "cache_dir": folder / "cache",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "plots": False,
        "metrics": "sklearn",
    }
    words = [word for name, v in shared.items() for word in (f"--{name}", str(v))]
    return main([*words, *flags]), folder / out


def as_flags(words: list[str]) -> dict[str, str]:
    """Return words of a command line as the keyword arguments of their flags."""
    return {k.removeprefix("--"): v for k, v in zip(words[::2], words[1::2], strict=True)}
