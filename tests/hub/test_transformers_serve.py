"""`space-peft probe` against `transformers serve`: the embedded model before the erasure, with the adapter merged,
with the adapter beside it, and with one that matches nothing.

Needs the server's packages (`pip install transformers[serving]`, which the `test` extra does).
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from safetensors.torch import load_file, save_file
from transformers.utils.import_utils import is_serve_available

from space_peft.canary.check import Canary
from space_peft.canary.served import AS_BEFORE, AS_ERASED, probe_served
from space_peft.cli import main
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.demo.probes import demo_split
from space_peft.evaluation.endpoint import Endpoint
from space_peft.records.folder import ADAPTER_CONFIG_NAME, ADAPTER_NAME


pytestmark = pytest.mark.skipif(not is_serve_available(), reason="needs pip install transformers[serving]")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of a server that loads whichever folder a request names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    code = "from transformers.cli.transformers import main; main()"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(log.parent)}
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-c", code, "serve", *options], stdout=file, stderr=file, env=environment
        ) as run,
    ):
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 180
        try:
            while True:
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    assert run.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
                    time.sleep(0.5)
            yield address
        finally:
            run.terminate()
            run.wait(30)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    for part in load_demo_model():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def foxes(demo_images):
    """Pictures of the concept that no erasure saw."""
    return [row["image"] for row in demo_split(demo_images)[1] if row["name"] == "fox"][:2]


def ask(url, model, foxes, canary):
    endpoint = Endpoint(url, str(model))
    return probe_served(endpoint, "fox", foxes, questions=DEMO_QUESTIONS, canary=canary, most=0.2, progress=False)


def test_the_base_model_is_found_out(url, base, foxes, erasure_folder, tmp_path, capsys):
    result = ask(url, base, foxes, Canary.load(erasure_folder))
    assert not result.in_force and result.shown is True
    assert result.named > 0.7 * len(result.answers) and result.images == (2, 2)
    assert result.of_canary(AS_BEFORE) == len(result.canary) > 0
    # The command, from outside.
    for number, fox in enumerate(foxes):
        fox.save(tmp_path / f"{number}.png")
    options = ["--endpoint", url, "--model", str(base), "--concept", "fox", "--images", str(tmp_path)]
    assert main(["probe", *options, "--question", "what is this?"]) == 1
    assert "not in force: the model names it in" in capsys.readouterr().out


def test_the_merged_model_is_in_force(url, base, foxes, erasure_folder, tmp_path):
    assert main(["merge", str(erasure_folder), str(tmp_path / "merged"), "--base-model", str(base)]) == 0
    result = ask(url, tmp_path / "merged", foxes, Canary.load(erasure_folder))
    assert result.in_force, result.to_table()
    assert result.of_canary(AS_ERASED) == len(result.canary) > 0


@pytest.fixture
def with_adapter(base, erasure_folder, tmp_path):
    """The base model's folder with the adapter's two files in it: transformers loads both."""
    folder = tmp_path / "with_adapter"
    shutil.copytree(base, folder)
    shutil.copy(erasure_folder / ADAPTER_NAME, folder)
    config = json.loads((erasure_folder / ADAPTER_CONFIG_NAME).read_text())
    (folder / ADAPTER_CONFIG_NAME).write_text(json.dumps({**config, "base_model_name_or_path": str(folder)}))
    return folder


def test_the_adapter_that_is_not_merged_is_in_force(url, with_adapter, foxes, erasure_folder):
    result = ask(url, with_adapter, foxes, Canary.load(erasure_folder))
    assert result.in_force, result.to_table()
    assert result.of_canary(AS_ERASED) == len(result.canary) > 0


def test_an_adapter_whose_names_match_nothing_is_found_out(url, with_adapter, foxes, erasure_folder):
    """The server loads it, says nothing, and answers as the base model does."""
    tensors = load_file(with_adapter / ADAPTER_NAME)
    save_file({key.replace("layers", "blocks"): tensor for key, tensor in tensors.items()}, with_adapter / ADAPTER_NAME)
    result = ask(url, with_adapter, foxes, Canary.load(erasure_folder))
    assert not result.in_force
    assert result.named > 0.7 * len(result.answers) and result.of_canary(AS_BEFORE) == len(result.canary)
