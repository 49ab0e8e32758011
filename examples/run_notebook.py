"""Runs a notebook's cells in order in this process and stores what they show, without Jupyter.

    python examples/run_notebook.py examples/erase_a_concept.ipynb

The last expression of a cell is shown as Jupyter shows it: pictures as pictures, everything else as text. What a picture says
of itself (`picture.info["Description"]`) is for readers who do not see it. Values may be set anew behind the cell with the tag `parameters`, as papermill does: `--set MAX_STEPS=2`. With `--output` the notebook itself
stays as it is.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
from pathlib import Path

from PIL import Image


def run_cell(source: str, name: str, namespace: dict) -> list[dict]:
    """Runs one cell; what it printed and showed, as a notebook stores it.

    Args:
        source (`str`): Its code.
        name (`str`): What a traceback calls it.
        namespace (`dict`): Of the notebook's names.
    """
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        value = None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    outputs = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    if value is not None:
        metadata = {}
        if isinstance(value, Image.Image):
            png = io.BytesIO()
            value.save(png, format="PNG", optimize=True)
            seen = value.info.get("Description", "A picture.")
            data = {"image/png": base64.b64encode(png.getvalue()).decode() + "\n", "text/plain": [seen]}
            metadata = {"image/png": {"alt": seen}}
        else:
            data = {"text/plain": _lines(repr(value))}
        outputs.append({"output_type": "execute_result", "data": data, "metadata": metadata, "execution_count": None})
    return outputs


def run_notebook(notebook: dict, parameters: dict | None = None) -> dict:
    """Runs all code cells in one namespace.

    Args:
        notebook (`dict`): In nbformat 4, as JSON has it.
        parameters (`dict`, *optional*): Values set behind the cell that is tagged `parameters`.

    Returns:
        `dict`: The same with new outputs.

    Raises:
        KeyError: If a parameter is none that the tagged cell sets.
    """
    namespace: dict = {"__name__": "__main__"}
    cells, count = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            outputs = run_cell("".join(cell["source"]), f"cell {count}", namespace)
            if "parameters" in cell["metadata"].get("tags", ()):
                if unknown := [key for key in parameters or {} if key not in namespace]:
                    raise KeyError(f"{unknown[0]!r} is no parameter of the notebook.")
                namespace.update(parameters or {})
            for output in outputs:
                if "execution_count" in output:
                    output["execution_count"] = count
            cell = {**cell, "execution_count": count, "outputs": outputs}
        cells.append(cell)
    return {**notebook, "cells": cells}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--output", type=Path, help="another file to write; by default the notebook itself")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="parameters, as Python writes them")
    args = parser.parse_args()
    parameters = {key: ast.literal_eval(value) for key, _, value in (part.partition("=") for part in args.set)}
    notebook = run_notebook(json.loads(args.notebook.read_text(encoding="utf-8")), parameters)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    (args.output or args.notebook).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
