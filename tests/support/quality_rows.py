"""Rows of the quality studies whose scores are known, and cells of the tables made from them."""

DENSE = 90_000_000


def row(method, task, seed, correct, metric="accuracy", size="20x", steps=100, **more):
    value = correct.count("1") / len(correct) if metric == "accuracy" else 0.5
    return {
        "key": {
            "study": "glue",
            "model": "minilm",
            "task": task,
            "method": method,
            "size": size,
            "seed": seed,
            "setting": {"epochs": 1},
        },
        "seconds": 120.0,
        "steps": steps,
        "bytes": DENSE // int(size[:-1]),
        "float32_bytes": DENSE,
        "dev": {metric: value, "loss": 0.5, "divergence": 0.1, "agreement": 0.9},
        "dev_float32": {metric: 0.8, "loss": 0.4},
        "dev_correct": correct,
        "command": "python benchmarks/quality/study.py",
        "machine": "some processor",
        **more,
    }


def digits(n, right, shift=0):
    """Return n digits with the given number of ones, rotated."""
    text = "1" * right + "0" * (n - right)
    return text[shift:] + text[:shift]


def cells(table, *words):
    """Return the cells of the only line of a table that has all words as cells."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    (found,) = [line for line in lines if set(words) <= set(line)]
    return found
