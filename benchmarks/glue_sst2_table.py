"""Table of the rows of ``glue_sst2.py``."""

from __future__ import annotations

import json
import statistics

from results_file import provenance


def _row(lines: list[dict], seeds: list[int]) -> str:
    key = lines[0]["key"]
    by_seed = {line["key"]["seed"]: 100 * line["accuracy"] for line in lines}
    values = list(by_seed.values())
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    each = " / ".join(f"{by_seed[seed]:.1f}" if seed in by_seed else "-" for seed in seeds)
    size = statistics.mean(line["bytes"] for line in lines)
    times = statistics.mean(line["dense_bytes"] / line["bytes"] for line in lines)
    noise = key["noise"] if key["noise"] == "none" else f"{key['noise']} p={key['noise_rate']:g}"
    cells = (
        noise,
        key["method"],
        key.get("block_size", ""),
        str(key.get("n_centroids", "")),
        f"{key['stage_epochs']:g}" if "stage_epochs" in key else "",
        f"{statistics.mean(values):.1f}{spread}",
        each,
        f"{size / 1e6:.2f}",
        f"{times:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def table(lines: list[dict]) -> str:
    """Return a Markdown table: mean and sample standard deviation over seeds.

    Raises:
        ValueError: if ``lines`` is empty.
    """
    if not lines:
        raise ValueError("--results has no finished run; run the benchmark without --table first")
    seeds = sorted({line["key"]["seed"] for line in lines})
    groups: dict[str, list[dict]] = {}
    for line in lines:
        settings = {k: v for k, v in line["key"].items() if k != "seed"}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(line)
    names = " / ".join(map(str, seeds))
    text = [
        "| noise | compression | block size | centroids | epochs per stage | accuracy | "
        f"seeds {names} | MB | times smaller |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(group, seeds) for group in groups.values()),
        "",
        f"{lines[-1]['examples']['train']:,} training and {lines[-1]['examples']['validation']:,} "
        f"dev sentences; seeds {', '.join(map(str, seeds))}; mean and sample standard deviation.",
        *provenance(lines),
    ]
    return "\n".join(text)
