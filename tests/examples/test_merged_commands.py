"""The commands below a table are merged, and still make the same runs."""

import itertools
import shlex

from merged_commands import SELECTIONS, merged


def runs_of(command):
    """Return every run that a command makes: one value of each selection, and all else."""
    options, name = {"": []}, ""
    for word in shlex.split(command):
        if word.startswith("--"):
            name = word
            options[name] = []
        else:
            options[name].append(word)
    selected = {k: v for k, v in options.items() if k in SELECTIONS}
    rest = tuple(sorted((k, tuple(v)) for k, v in options.items() if k not in SELECTIONS))
    for values in itertools.product(*selected.values()):
        yield rest, tuple(sorted(zip(selected, values, strict=True)))


def test_a_whole_study_is_one_command():
    commands = [
        f"python study.py --study glue --tasks {task} --seeds {seed} --methods {method}"
        for task in ("cola", "rte")
        for seed in (42, 43)
        for method in ("noise", "'no noise'")
    ]
    options = "--methods noise 'no noise' --seeds 42 43 --tasks cola rte"
    assert merged(commands) == [f"python study.py --study glue {options}"]


def test_the_order_of_selected_values_does_not_matter():
    commands = [
        "python study.py --sizes 13x 20x --seeds 1",
        "python study.py --seeds 2 --sizes 20x 13x",
    ]
    assert merged(commands) == ["python study.py --seeds 1 2 --sizes 13x 20x"]


def test_an_incomplete_study_keeps_what_it_lacks_apart():
    commands = [
        "python study.py --tasks cola --seeds 42",
        "python study.py --tasks rte --seeds 42",
        "python study.py --seeds 43 --tasks cola",
        "python study.py --tasks cola",
        "python study.py --tasks cola --rate 1",
        "python study.py --tasks rte --rate 2",
    ]
    found = merged(commands)
    made = [run for command in found for run in runs_of(command)]
    assert set(made) == {run for command in commands for run in runs_of(command)}
    assert len(found) == 5 and len(made) == len(set(made))


def test_a_command_that_is_alone_stays_as_it_was_typed():
    command = 'python study.py --methods "no noise" --data_dir data'
    assert merged([command, command]) == [command]
