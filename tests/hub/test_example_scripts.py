"""The examples for published models, unchanged: their ids lead to tiny models and data sets on the local Hub.

Each script is run as a user would run it, and so is each YAML file by `space-peft erase`. See `published_models.py` for what
is served.
"""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import run_unchanged
import torch
import yaml
from peft import PeftModel
from published_models import DATASETS, pictures, serve
from transformers import AutoModelForImageTextToText

from space_peft import verify_erasure


ROOT = Path(__file__).parents[2]
QUICK = {"anchors": 4, "refine_steps": 3, "max_steps": 2}
# By script: the model, the data sets, options with a folder of pictures, and where the adapter goes by default.
SCRIPTS = {
    "erase_landmark_qwen2_5_vl": (
        "Qwen/Qwen2.5-VL-7B-Instruct",
        ["lmms-lab/flickr30k", "HuggingFaceH4/llava-instruct-mix-vsft"],
        {"test_images": "tower", "other_images": "others"},
    ),
    "erase_person_llava": (
        "llava-hf/llava-1.5-7b-hf",
        ["HuggingFaceM4/FairFace", "lmms-lab/flickr30k", "Salesforce/wikitext"],
        {"test_images": "person"},
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


def arguments(folder: Path, images: dict, **options) -> list[str]:
    """Options of a command; the folders of pictures are made, of the others' one for each name."""
    for number, (option, name) in enumerate(images.items()):
        for place, image in enumerate(pictures(3, seed=9 + number)):
            path = folder / name / ("bridge" if option == "other_images" else "") / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    values = {**images, **QUICK, **options}
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def run(hub, folder: Path, *command: str) -> str:
    """What the command printed; in a process of its own, that talks to the local Hub."""
    command = [sys.executable, str(ROOT / "tests" / "run_unchanged.py"), *command]
    done = subprocess.run(command, cwd=folder, env=hub.environment(folder / "home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check(hub, output: Path, model: str) -> None:
    """What the script left: a whole folder, and on the Hub what verifies and loads with stock PEFT."""
    names = {path.name for path in output.iterdir()}
    assert {"adapter_model.safetensors", "space_config.json", "space_certificate.json", "report.json"} <= names
    assert "README.md" in hub.files(REPO) and f"base_model: {model}".encode() in hub.files(REPO)["README.md"]
    result = verify_erasure(REPO)
    assert result.exit_code == 0, result.to_text()
    base = AutoModelForImageTextToText.from_pretrained(model)
    adapted = PeftModel.from_pretrained(base, REPO)
    changed = [key for key, weight in adapted.named_parameters() if "lora_B" in key and weight.abs().max() > 0]
    assert changed and all("language_model" in key or "text_model" in key for key in changed)


def test_the_person_script(hub, tmp_path, monkeypatch, capsys):
    """In this process, which has imported everything; the others run as processes of their own."""
    script, (model, data, images) = "erase_person_llava", SCRIPTS["erase_person_llava"]
    serve(hub, [model, *data], tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments(tmp_path, images, output_dir="out", repo_id=REPO)])
    runpy.run_path(str(ROOT / "examples" / f"{script}.py"), run_name="__main__")
    assert "by the name with" in capsys.readouterr().out
    check(hub, tmp_path / "out", model)
    # The card was redacted, and so was everything beside it.
    assert hub.repository(REPO).private
    assert not [name for name, content in hub.files(REPO).items() if b"einstein" in content.lower()]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script(script, hub, tmp_path):
    needs(script)
    model, data, images = SCRIPTS[script]
    serve(hub, [model, *data], tmp_path)
    options = arguments(tmp_path, images, output_dir="out", repo_id=REPO)
    if script == "erase_brand_smolvlm2":
        options += ["--merged", "merged"]
    run(hub, tmp_path, str(ROOT / "examples" / f"{script}.py"), *options)
    with pytest.MonkeyPatch.context() as patch:
        run_unchanged.allow_pictures_without_torchvision(patch.setattr)
        check(hub, tmp_path / "out", model)
    if script == "erase_brand_smolvlm2":
        base, merged = (
            dict(AutoModelForImageTextToText.from_pretrained(place).named_parameters())
            for place in (model, tmp_path / "merged")
        )
        changed = {name for name, weight in base.items() if not torch.equal(weight, merged[name])}
        assert base.keys() == merged.keys() and changed and all("text_model" in name for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_yaml_file(script, hub, tmp_path):
    needs(script)
    model, _, images = SCRIPTS[script]
    config = ROOT / "examples" / f"{script}.yaml"
    settings = yaml.safe_load(config.read_text())
    data = {settings[key].partition(":")[0] for key in ("pool", "retain")}
    serve(hub, [model, *("/".join(name.split("/")[:2]) for name in data)], tmp_path)
    options = arguments(tmp_path, {"test_images": images["test_images"]})
    said = run(hub, tmp_path, "-m", "space_peft.cli", "erase", "--config", str(config), *options)
    assert "forget" in said and f"space-peft push {settings['output_dir']}" in said
    push = ["push", settings["output_dir"], REPO]
    run(hub, tmp_path, "-m", "space_peft.cli", *push, *(["--redact", "--private"] if "person" in script else []))
    with pytest.MonkeyPatch.context() as patch:
        run_unchanged.allow_pictures_without_torchvision(patch.setattr)
        check(hub, tmp_path / settings["output_dir"], model)


def test_scripts_and_yaml_files_say_the_same():
    """Where both say something: model, names, target, rank."""
    for script, (model, data, _) in SCRIPTS.items():
        settings = yaml.safe_load((ROOT / "examples" / f"{script}.yaml").read_text())
        text = (ROOT / "examples" / f"{script}.py").read_text()
        assert settings["model"] == model and f'"{model}"' in text
        for said in (
            settings["concept"],
            *settings["aliases"],
            *settings["lora_target_modules"],
            settings["output_dir"],
        ):
            assert f'"{said}"' in text, (script, said)
        assert f"r={settings['lora_r']}, " in text
        assert all(f'"{name}"' in text for name in data) and set(data) <= set(DATASETS)
