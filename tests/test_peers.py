"""The lists of `tests/peers`: a refusal is known by its option and value, whatever is not listed counts as a failure."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
from packaging.version import Version


if Version(importlib.metadata.version("peft")) < Version("0.20"):
    pytest.skip("the lists are of what PEFT has from 0.20 on", allow_module_level=True)

from peft import LoraConfig
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)

from space_peft import SpaceLoraConfig


_spec = importlib.util.spec_from_file_location("peers_refusals", Path(__file__).parent / "peers" / "refusals.py")
refusals = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refusals)

REFUSED = [
    ("use_dora", True),
    ("lora_bias", True),
    ("bias", "all"),
    ("bias", "lora_only"),
    ("bias", "invalid"),
    *(("init_lora_weights", name) for name in ("corda", "eva", "lora_ga", "mica", "OLoRA", "pissa")),
    ("init_lora_weights", "pissa_niter_4"),
    ("modules_to_save", ["head"]),
    ("trainable_token_indices", {"embed": [1]}),
    ("target_parameters", ["experts.weight"]),
    ("layer_replication", [(0, 2), (1, 2)]),
    ("ensure_weight_tying", True),
    ("corda_config", CordaConfig()),
    ("eva_config", EvaConfig()),
    ("lora_ga_config", LoraGAConfig()),
    ("alora_invocation_tokens", [1]),
    ("arrow_config", ArrowConfig()),
    ("kasa_config", KasaConfig()),
    ("monteclora_config", MontecloraConfig()),
    ("use_bdlora", BdLoraConfig()),
    ("velora_config", VeloraConfig()),
]


def refused(option, value):
    with pytest.raises(ValueError) as raised:
        SpaceLoraConfig(**{option: value})
    return refusals.refusal(str(raised.value))


@pytest.mark.parametrize(("option", "value"), REFUSED, ids=str)
def test_a_listed_refusal_is_known_by_its_option(option, value):
    assert refused(option, value).startswith(f"{option} ")


def test_every_listed_refusal_is_one_and_of_an_option_of_peft():
    """So that none stays on the list that no longer fails; the whole run checks it against PEFT's tests."""
    met = [{"outcome": "refused", "detail": refused(option, value)} for option, value in REFUSED]
    left = refusals.not_met(met)
    assert not [line for line in left if line.split(" ")[0] in {option for option, _ in refusals.REFUSALS}]
    assert {option for option, _ in refusals.REFUSALS} <= set(LoraConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "new"},
        {"bias": "some"},
        {"r": 0},
        {"strength": 0.0},
        {"energy": 2.0},
        {"use_qalora": True},
    ],
)
def test_any_other_refusal_is_not_listed(settings):
    with pytest.raises(ValueError) as raised:
        SpaceLoraConfig(**settings)
    assert refusals.refusal(str(raised.value)) is None


def test_an_entry_that_no_test_has_met_is_named():
    results = [{"outcome": "skipped", "detail": f"{name}: {why}"} for name, why in refusals.NOT_BUILT.items()]
    results += [{"outcome": "differs", "detail": f"{name}: {why}"} for name, (_, why) in refusals.DIFFERS.items()]
    results += [{"outcome": "refused", "detail": refused(option, value)} for option, value in REFUSED]
    assert refusals.not_met(results) == []
    for i, gone in enumerate(results[: len(refusals.NOT_BUILT) + len(refusals.DIFFERS)]):
        assert refusals.not_met(results[:i] + results[i + 1 :]) == [gone["detail"]]
    passed = [{"outcome": "passed", "detail": results[0]["detail"]}, *results[1:]]
    assert refusals.not_met(passed) == [results[0]["detail"]]
