"""Datasets in folders that are named like repositories of the Hub, so that no run needs one."""

from pathlib import Path

from datasets import ClassLabel, Dataset, Features


def write_dataset(
    root: Path, name: str, config: str, splits: dict[str, dict], labels: list[str] | None = None
) -> None:
    """Write a dataset with one configuration; a folder of this name is preferred to the Hub.

    Args:
        splits: split -> column -> values.
        labels: names of the classes in the column ``label``.
    """
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    card = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, columns in splits.items():
        rows = Dataset.from_dict(columns)
        if labels is not None:
            features = {**rows.features, "label": ClassLabel(names=labels)}
            rows = rows.cast(Features(features))
        file = f"{config}-{split}.parquet"
        rows.to_parquet(folder / file)
        card += [f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
