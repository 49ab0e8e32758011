"""The examples for published models, unchanged: their ids lead to tiny models and data sets on the local Hub.

What is served is in `published_models.py`. Most run in this process, which has imported everything; one runs as a user
starts it.
"""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from packaging.version import Version
from peft import PeftModel
from published_models import DATASETS, pictures, serve
from run_unchanged import allow_pictures_without_torchvision
from transformers import AutoModelForImageTextToText
from transformers.utils import is_torchvision_available

from space_peft import verify_erasure
from space_peft.cli import main
from space_peft.cli.pictures import load_pictures
from space_peft.data.loading import load_rows


EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = {"anchors": 4, "refine_steps": 3, "max_steps": 2}
# By script: the model, the data sets, and options that take a folder of pictures.
SCRIPTS = {
    "erase_person_llava": (
        "llava-hf/llava-1.5-7b-hf",
        ["HuggingFaceM4/FairFace", "lmms-lab/flickr30k", "Salesforce/wikitext"],
        {"test_images": "person"},
    ),
    "erase_landmark_qwen2_5_vl": (
        "Qwen/Qwen2.5-VL-7B-Instruct",
        ["lmms-lab/flickr30k", "HuggingFaceH4/llava-instruct-mix-vsft"],
        {"test_images": "tower", "other_images": "others"},
    ),
    "erase_brand_smolvlm2": (
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        ["lmms-lab/flickr30k", "HuggingFaceM4/the_cauldron"],
        {"test_images": "bottles"},
    ),
}
REPO = "user/erasure"


def needs(script: str) -> None:
    if "smolvlm" in script:
        pytest.importorskip("num2words", reason="its processor needs it")
        if Version(transformers.__version__) < Version("5.23") and not is_torchvision_available():
            pytest.skip("transformers 5.6 finds SmolVLM's image processor with torchvision alone; 5.23 without it, too")


def arguments(folder: Path, images: dict, **options) -> list[str]:
    """Options of a command; the folders of pictures are made, of the others' one for each name."""
    for number, (option, name) in enumerate(images.items()):
        for place, image in enumerate(pictures(3, seed=9 + number)):
            # One of them by a name that `datasets` takes for a picture of another split.
            path = (
                folder / name / ("bridge" if option == "other_images" else "") / f"{'test_' * (place == 0)}{place}.png"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    values = {**images, **QUICK, **options}
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def check(hub, output: Path, model: str) -> None:
    """What was left: a whole folder, and on the Hub what verifies and loads with stock PEFT."""
    names = {path.name for path in output.iterdir()}
    assert {"adapter_model.safetensors", "space_config.json", "space_certificate.json", "report.json"} <= names
    assert json.loads((output / "report.json").read_text())["after"]["forget"]["n"] == 3, "every picture is asked about"
    assert "README.md" in hub.files(REPO) and f"base_model: {model}".encode() in hub.files(REPO)["README.md"]
    result = verify_erasure(REPO)
    assert result.exit_code == 0, result.to_text()
    base = AutoModelForImageTextToText.from_pretrained(model)
    adapted = PeftModel.from_pretrained(base, REPO)
    changed = [key for key, weight in adapted.named_parameters() if "lora_B" in key and weight.abs().max() > 0]
    assert changed and all("language_model" in key or "text_model" in key for key in changed)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script(script, hub, tmp_path, monkeypatch, capsys):
    needs(script)
    allow_pictures_without_torchvision(monkeypatch.setattr)
    model, data, images = SCRIPTS[script]
    serve(hub, [model, *data], tmp_path)
    monkeypatch.chdir(tmp_path)
    options = arguments(tmp_path, images, output_dir="out", repo_id=REPO)
    if "brand" in script:
        options += ["--merged", "merged"]
    monkeypatch.setattr(sys, "argv", [script, *options])
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    assert "target still named" in capsys.readouterr().out
    check(hub, tmp_path / "out", model)
    if "person" in script:
        assert hub.repository(REPO).private
        assert not [name for name, content in hub.files(REPO).items() if b"einstein" in content.lower()]
    if "brand" in script:
        base, merged = (
            dict(AutoModelForImageTextToText.from_pretrained(place).named_parameters())
            for place in (model, tmp_path / "merged")
        )
        changed = {name for name, weight in base.items() if not torch.equal(weight, merged[name])}
        assert base.keys() == merged.keys() and changed and all("text_model" in name for name in changed)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_yaml_file(script, hub, tmp_path, monkeypatch, capsys):
    needs(script)
    allow_pictures_without_torchvision(monkeypatch.setattr)
    model, _, images = SCRIPTS[script]
    config = EXAMPLES / f"{script}.yaml"
    settings = yaml.safe_load(config.read_text())
    data = [settings[key].partition(":")[0] for key in ("pool", "retain")]
    serve(hub, [model, *("/".join(name.split("/")[:2]) for name in data)], tmp_path)
    monkeypatch.chdir(tmp_path)
    options = arguments(tmp_path, {"test_images": images["test_images"]})
    code, said = main(["erase", "--config", str(config), *options]), capsys.readouterr().out
    assert code == ("NOT ERASED" in said or "NOTHING SHOWN" in said)
    # A random model may go on to say the name; a failed erasure is not to be published.
    assert "target still named" in said and bool(code) != (f"space-peft push {settings['output_dir']}" in said)
    assert main(["push", settings["output_dir"], REPO, *(["--redact", "--private"] if "person" in script else [])]) == 0
    check(hub, tmp_path / settings["output_dir"], model)


@pytest.mark.slow
def test_a_script_in_a_process_of_its_own(hub, tmp_path):
    script = "erase_landmark_qwen2_5_vl"
    model, data, images = SCRIPTS[script]
    serve(hub, [model, *data], tmp_path)
    runner = Path(__file__).parents[1] / "run_unchanged.py"
    options = arguments(tmp_path, images, output_dir="out")
    command = [sys.executable, str(runner), str(EXAMPLES / f"{script}.py"), *options]
    done = subprocess.run(command, cwd=tmp_path, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "target still named" in done.stdout and (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_scripts_and_yaml_files_say_the_same():
    """Where both say something: model, names, layers, rank."""
    for script, (model, data, _) in SCRIPTS.items():
        settings = yaml.safe_load((EXAMPLES / f"{script}.yaml").read_text())
        text = (EXAMPLES / f"{script}.py").read_text()
        names = [settings["concept"], *settings["aliases"], *settings["lora_target_modules"], settings["output_dir"]]
        missing = [said for said in (model, *names, *data) if f'"{said}"' not in text]
        assert not missing and settings["model"] == model and f"r={settings['lora_r']}, " in text
        assert set(data) <= set(DATASETS)


def test_rows_of_one_configuration_of_a_data_set(hub, tmp_path):
    serve(hub, ["HuggingFaceM4/FairFace", "lmms-lab/flickr30k"], tmp_path)
    faces = load_pictures("HuggingFaceM4/FairFace/0.25:validation")
    assert len(faces) == 30 and "race" in faces.column_names
    assert len(load_rows("lmms-lab/flickr30k:test[:10%]")) == 20
    with pytest.raises(ValueError, match="(?s)Config name is missing.*0.25"):
        load_rows("HuggingFaceM4/FairFace:validation")
    with pytest.raises(ValueError, match="'0.5' not found.*0.25"):
        load_rows("HuggingFaceM4/FairFace/0.5:validation")
