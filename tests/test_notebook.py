"""The notebook: its cells run in order, and what it shows was made by running it."""

import base64
import importlib.util
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image


EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "erase_a_concept.ipynb"
QUICK = {"ANCHORS": 3, "REFINE_STEPS": 1, "MAX_STEPS": 2, "ONE_IN": 40}


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("run_notebook", EXAMPLES / "run_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def shown(notebook) -> list[str]:
    """What each code cell shows as text, one entry a cell."""
    texts = []
    for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        parts = [output.get("text") or output["data"]["text/plain"] for output in cell["outputs"]]
        texts.append("".join(line for part in parts for line in part))
    return texts


def the_one(texts: list[str], word: str) -> str:
    (found,) = [text for text in texts if word in text]
    return found


def test_every_cell_runs(runner, notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = runner.run_notebook(notebook, QUICK)
    assert [cell["source"] for cell in done["cells"]] == [cell["source"] for cell in notebook["cells"]]
    texts = shown(done)
    assert "fox" in the_one(texts, "without the adapter:").splitlines()[1]
    assert "0 FAILED" in the_one(texts, "not checked")
    assert {"adapter_model.safetensors", "README.md", "report.json", "answers.png"} <= {
        path.name for path in (tmp_path / "without-fox").iterdir()
    }
    # Cell by cell the same kinds of things are shown as in the stored one.
    kinds = [[sorted(output.get("data", ["text"])) for output in cell.get("outputs", [])] for cell in done["cells"]]
    assert kinds == [[sorted(o.get("data", ["text"])) for o in cell.get("outputs", [])] for cell in notebook["cells"]]


def test_what_it_shows_was_made_by_running_it_as_it_is(notebook):
    assert (notebook["nbformat"], NOTEBOOK.stat().st_size < 2**20) == (4, True)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    texts = shown(notebook)
    erased, deployed = the_one(texts, "without the adapter:").splitlines()
    assert "fox" not in erased and "fox" in deployed
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
        for cell in code
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 4 and all(picture.width > 300 for picture in pictures)
    for output in (output for cell in code for output in cell["outputs"] if "image/png" in output.get("data", {})):
        (said,) = output["data"]["text/plain"]
        assert len(said.split()) >= 6 and output["metadata"]["image/png"]["alt"] == said


def test_links_lead_somewhere(notebook):
    text = "".join(line for cell in notebook["cells"] if cell["cell_type"] == "markdown" for line in cell["source"])
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all((NOTEBOOK.parent / link).exists() for link in links)


def test_what_a_cell_shows(runner):
    assert runner.run_cell("a = 2\nprint('x')\na + 1", "cell", {}) == [
        {"output_type": "stream", "name": "stdout", "text": ["x\n"]},
        {"output_type": "execute_result", "data": {"text/plain": ["3"]}, "metadata": {}, "execution_count": None},
    ]
    for text, said in (("", "A picture."), ("p.info['Description'] = 'Black.'\n", "Black.")):
        (picture,) = runner.run_cell(f"from PIL import Image\np = Image.new('L', (1, 1))\n{text}p", "cell", {})
        assert picture["data"]["text/plain"] == [said] and picture["metadata"] == {"image/png": {"alt": said}}
    assert runner.run_cell("b = 1", "cell", {}) == runner.run_cell("None", "cell", {}) == []
    with pytest.raises(ZeroDivisionError):
        runner.run_cell("1 / 0", "cell", {})
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["a = 1"]}
    after = {"cell_type": "code", "metadata": {}, "source": ["a"]}
    done = runner.run_notebook({"cells": [cell, after]}, {"a": 5})
    assert done["cells"][1]["outputs"][0]["data"] == {"text/plain": ["5"]}
    with pytest.raises(KeyError, match="'b' is no parameter"):
        runner.run_notebook({"cells": [cell]}, {"b": 5})
