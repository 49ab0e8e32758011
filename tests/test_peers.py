"""The lists of `tests/peers`: a refusal is known by its option and value, whatever is not listed counts as a failure."""

import importlib.util
from pathlib import Path

import pytest
from peft import LoraConfig
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from space_peft import SpaceLoraConfig


_spec = importlib.util.spec_from_file_location("peers_refusals", Path(__file__).parent / "peers" / "refusals.py")
refusals = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refusals)

REFUSED = {
    "use_dora": True,
    "use_qalora": True,
    "lora_bias": True,
    "bias": "lora_only",
    "init_lora_weights": "pissa_niter_4",
    "modules_to_save": ["head"],
    "trainable_token_indices": {"embed": [1]},
    "target_parameters": ["experts.weight"],
    "alora_invocation_tokens": [1],
    "arrow_config": ArrowConfig(),
    "kasa_config": KasaConfig(),
    "monteclora_config": MontecloraConfig(),
    "use_bdlora": BdLoraConfig(),
    "velora_config": VeloraConfig(),
}


@pytest.mark.parametrize("option", REFUSED)
def test_a_listed_refusal_is_known_by_its_option(option):
    with pytest.raises(ValueError) as refusal:
        SpaceLoraConfig(**{option: REFUSED[option]})
    assert refusals.refused_option(str(refusal.value)) == option


@pytest.mark.parametrize(
    "settings", [{"init_lora_weights": "new"}, {"bias": "some"}, {"r": 0}, {"strength": 0.0}, {"energy": 2.0}]
)
def test_any_other_refusal_is_not_listed(settings):
    with pytest.raises(ValueError) as refusal:
        SpaceLoraConfig(**settings)
    assert refusals.refused_option(str(refusal.value)) is None


def test_every_listed_refusal_is_of_an_option_of_peft():
    assert set(refusals.REFUSALS) <= set(LoraConfig.__dataclass_fields__)
