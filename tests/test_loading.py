"""Loading models: architectures that a module of the user's registers, precision on a CPU, and what is no multimodal model."""

import json
import sys

import pytest
import torch
from architectures import build, build_text_only
from peft import LoraConfig, PeftModel
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel  # noqa: F401
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from space_peft import SpaceLoraConfig
from space_peft.cli import main
from space_peft.hub_cards import verify_erasure
from space_peft.hub_cards.load import check_options, load_base
from space_peft.hub_cards.source import RecordedBase
from space_peft.modeling.loading import UnknownArchitectureError, load_config, load_model, model_class


MODULE = """
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration
from transformers import LlavaProcessor

class MineConfig(LlavaConfig):
    model_type = "mine"

class MineModel(LlavaForConditionalGeneration):
    config_class = MineConfig

AutoConfig.register("mine", MineConfig)
AutoModelForImageTextToText.register(MineConfig, MineModel)
AutoProcessor.register(MineConfig, LlavaProcessor)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny LLaVA on disk, and one that calls itself something else."""
    folder = tmp_path_factory.mktemp("models")
    model, processor = build("llava")
    for name in ("llava", "mine"):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    path = folder / "mine" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "mine"}))
    return folder


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's that registers the other architecture; forgotten again afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_model.py").write_text(MODULE)
    yield "my_model"
    if (made := sys.modules.pop("my_model", None)) is not None:
        CONFIG_MAPPING._extra_content.pop("mine")
        for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PROCESSOR_MAPPING):
            mapping._extra_content.pop(made.MineConfig)


@pytest.fixture
def adapter(saved, tmp_path):
    torch.manual_seed(0)
    model = build("llava")[0]
    model.__class__ = type("MineModel", (type(model),), {"__module__": "my_model"})
    config = SpaceLoraConfig(r=2, constraint="none", target_modules=["q_proj"], init_lora_weights=False)
    model = PeftModel(model, config)
    model.peft_config["default"].base_model_name_or_path = str(saved / "mine")
    model.save_pretrained(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["auto_mapping"] is None
    return tmp_path / "adapter"


def test_an_architecture_that_nobody_registered_is_not_checked_and_not_called_broken(adapter, module, capsys):
    assert main(["verify", str(adapter)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "base model" in line)
    assert line.startswith("not checked") and "of the architecture 'mine'" in line and "--import MODULE" in line
    assert main(["merge", str(adapter), "merged"]) == 2
    error = capsys.readouterr().err
    assert "--import MODULE" in error and len(error) < 600, "not hundreds of names"
    assert main(["merge", str(adapter), "merged", "--import", module]) == 0
    assert json.loads(open("merged/config.json").read())["model_type"] == "mine"
    assert next(check for check in verify_erasure(adapter).checks if check.name == "base model").status == "ok"


def test_a_class_that_others_would_import_is_refused_unless_it_is_there(tmp_path):
    model = PeftModel(build("llava")[0], LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    for library, name, fine in (
        ("transformers", "LlavaForConditionalGeneration", True),
        (__name__, "PreTrainedModel", True),
        (__name__, "PeftModel", False),
        ("os", "system", False),
        ("my_model", "MineModel", False),
    ):
        mapping = {"base_model_class": name, "parent_library": library}
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": mapping}))
        if fine:
            check_options(tmp_path)
        else:
            with pytest.raises(ValueError, match="auto_mapping.*that is imported .`--import MODULE`"):
                check_options(tmp_path)


def test_configs_without_a_model_and_models_without_pictures(saved, module, tmp_path):
    with pytest.raises(UnknownArchitectureError, match="'mine', which transformers does not know"):
        load_model(str(saved / "mine"))
    path = tmp_path / "remote"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "x-vl", "auto_map": {"AutoConfig": "evil.Config"}}))
    with pytest.raises(UnknownArchitectureError, match="'x-vl'.*Code that comes with it is not run"):
        load_base(RecordedBase(str(path), None))
    exec(MODULE.replace("AutoModelForImageTextToText.register", "print"), made := {"__name__": "elsewhere"})
    CONFIG_MAPPING._extra_content.pop("mine")
    PROCESSOR_MAPPING._extra_content.pop(made["MineConfig"])
    with pytest.raises(UnknownArchitectureError, match="no model is registered for a MineConfig"):
        model_class(made["MineConfig"]())
    text = build_text_only("llama")[0].config
    with pytest.raises(ValueError, match="LlamaConfig is not the config of a model that takes pictures") as found:
        model_class(text)
    assert not isinstance(found.value, UnknownArchitectureError) and len(str(found.value)) < 300
    assert model_class(text, text=True).__name__ == "AutoModelForCausalLM"
    (path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model_type"):
        load_config(path)


@pytest.mark.parametrize(("stored", "told"), [("float16", True), ("float32", False)])
def test_half_precision_is_loaded_in_float32_on_a_cpu_and_that_is_said(tmp_path, monkeypatch, stored, told):
    said = []
    monkeypatch.setattr("space_peft.modeling.loading.logger.warning_once", said.append, raising=False)
    build("llava")[0].to(getattr(torch, stored)).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), "cpu").dtype == torch.float32
    assert bool(said) == told and (not told or f"saved in {stored} and is loaded in float32" in said[0])
    assert load_model(str(tmp_path), "cpu", dtype=stored).dtype == getattr(torch, stored)
    assert load_model(str(tmp_path), "cpu", torch_dtype=stored).dtype == getattr(torch, stored)
    assert load_base(RecordedBase(str(tmp_path), None), dtype=None).dtype == torch.float32
    assert load_base(RecordedBase(str(tmp_path), None)).dtype == getattr(torch, stored)
