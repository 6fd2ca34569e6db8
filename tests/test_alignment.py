"""Who has read one script knows the other: they have the same outline and, but for their flags, the same lines."""

import ast
import difflib
from pathlib import Path

import train_lpl_dit
import train_lpl_sd


# Where they may differ: what they are for, and which flags they have.
MAY_DIFFER = ("parse_args",)


def parts(script):
    """Name of a top-level function, or of a section between two, -> its lines."""
    text = Path(script.__file__).read_text()
    lines = text.splitlines()
    functions = {n.name: n for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    found, end = {}, ast.parse(text).body[0].end_lineno  # after the docstring
    for name, node in functions.items():
        found[f"before {name}"] = lines[end : node.lineno - 1]
        found[name] = lines[node.lineno - 1 : node.end_lineno]
        end = node.end_lineno
    return {**found, "the end": lines[end:]}


def test_both_scripts_have_the_same_outline():
    assert list(parts(train_lpl_sd)) == list(parts(train_lpl_dit))


def test_the_scripts_differ_in_their_flags_only():
    first, second = parts(train_lpl_sd), parts(train_lpl_dit)
    for name in first.keys() - set(MAY_DIFFER):
        assert not list(difflib.unified_diff(first[name], second[name], lineterm="")), name
    # The comparison sees the loop: both have it.
    assert any("while global_step < args.max_train_steps:" in line for line in first["main"])
    assert any("model_pred = family.predict(" in line for line in first["training_step"])


def test_the_flags_come_in_the_same_groups():
    calls = [
        [line.split("(")[0].strip() for line in parts(script)["parse_args"] if line.strip().startswith("add_")]
        for script in (train_lpl_sd, train_lpl_dit)
    ]
    assert calls[0] == calls[1] and len(calls[0]) == 8
