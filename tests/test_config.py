"""`SpaceLoraConfig`: to PEFT a LoRA, on disk a stock LoRA, and refused where the constraint would not hold."""

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny_models import text_batch, tiny_llama

from space_peft.config import SpaceLoraConfig
from space_peft.modeling.layers import adapter_config
from space_peft.null_space.identity import adapter_digest
from space_peft.records.folder import SPACE_CONFIG_NAME
from space_peft.records.measured import check_projected


OWN = {
    "constraint": "hard",
    "strength": 0.1,
    "energy": 0.9,
    "statistics": "pooled",
    "tokens_per_row": 16,
    "max_rank": 7,
}
STOCK = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}}


def saved(folder, how="get_peft_model", adapter_name="default", **own):
    """Saves an adapter that does something; returns the model's logits on one batch."""
    model = tiny_llama()
    config = SpaceLoraConfig(**STOCK, **{**OWN, **own})
    if how == "add_adapter":
        model.add_adapter(config, adapter_name)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.save_pretrained(folder)
    return logits(model)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=text_batch()["input_ids"]).logits


def test_defaults_are_the_documented_ones():
    config = SpaceLoraConfig()
    assert config.space_fields() == {
        "constraint": "soft",
        "strength": 0.003,
        "energy": 0.999,
        "statistics": "token",
        "tokens_per_row": 64,
        "max_rank": "auto",
    }
    assert config.peft_type == "LORA" and isinstance(config, LoraConfig)


def test_to_dict_has_exactly_the_stock_keys():
    assert SpaceLoraConfig(**OWN).to_dict().keys() == LoraConfig().to_dict().keys()


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_saved_adapter_is_a_stock_adapter_to_peft(tmp_path, how):
    expected = saved(tmp_path, how)
    stock_keys = LoraConfig().to_dict().keys()
    assert json.loads((tmp_path / "adapter_config.json").read_text()).keys() == stock_keys
    assert json.loads((tmp_path / SPACE_CONFIG_NAME).read_text()) == {**OWN, "projected": None}
    plain = tmp_path / "plain"
    get_peft_model(tiny_llama(), LoraConfig(**STOCK)).save_pretrained(plain)
    with warnings.catch_warnings(record=True) as of_plain:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(tiny_llama(), plain)
    with warnings.catch_warnings(record=True) as of_ours:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
        assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig
    assert {str(w.message) for w in of_ours} <= {str(w.message) for w in of_plain}
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert torch.equal(logits(loaded), expected)
    base = tiny_llama()
    base.load_adapter(tmp_path)
    assert torch.equal(logits(base), expected)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(logits(tiny_llama()), expected, atol=0.1), "the adapter does nothing"


@pytest.mark.slow  # hub/test_round_trip.py loads without it
def test_loading_needs_no_space_peft(tmp_path):
    """In a process where the package cannot be imported."""
    saved(tmp_path)
    script = f"""
import sys
sys.modules["space_peft"] = None
from peft import PeftConfig
print(type(PeftConfig.from_pretrained({str(tmp_path)!r})).__name__)
"""
    result = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "LoraConfig", result.stderr


@pytest.mark.parametrize("subfolder", [None, "french"])
def test_from_pretrained_reads_both_files(tmp_path, subfolder):
    saved(tmp_path, adapter_name=subfolder or "default")
    config = SpaceLoraConfig.from_pretrained(tmp_path, subfolder=subfolder)
    assert type(config) is SpaceLoraConfig and config.space_fields() == OWN
    assert (config.r, config.lora_alpha, config.rank_pattern) == (3, 6, {"q_proj": 2})
    assert set(config.target_modules) == {"q_proj", "down_proj"}
    # Training goes on from it with the constraint it was saved with.
    folder = tmp_path / subfolder if subfolder else tmp_path
    model = PeftModel.from_pretrained(tiny_llama(), folder, config=config, is_trainable=True)
    assert adapter_config(model).space_fields() == OWN


def test_bad_folders_are_refused(tmp_path):
    LoraConfig(**STOCK).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no adapter of space-peft; use peft.LoraConfig"):
        SpaceLoraConfig.from_pretrained(tmp_path)
    (tmp_path / SPACE_CONFIG_NAME).write_text('{"constraint": "ha')
    with pytest.raises(ValueError, match="is not valid JSON"):
        SpaceLoraConfig.from_pretrained(tmp_path)
    (tmp_path / SPACE_CONFIG_NAME).write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        SpaceLoraConfig.from_pretrained(tmp_path)
    (tmp_path / SPACE_CONFIG_NAME).write_text('{"strength": -1}')
    with pytest.raises(ValueError, match="`strength` is -1"):
        SpaceLoraConfig.from_pretrained(tmp_path)
    (tmp_path / SPACE_CONFIG_NAME).write_text('{"constraint": "hard", "temperature": 1}')
    with pytest.warns(UserWarning, match=r"unknown to this version of space-peft, ignored: \['temperature'\]"):
        assert SpaceLoraConfig.from_pretrained(tmp_path).constraint == "hard"
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        SpaceLoraConfig.from_pretrained(tmp_path)


def test_fields_survive_copies_and_the_model():
    config = SpaceLoraConfig(**STOCK, **OWN)
    assert copy.deepcopy(config).space_fields() == OWN
    model = get_peft_model(tiny_llama(), config)
    assert adapter_config(model).space_fields() == OWN
    other = SpaceLoraConfig(**STOCK, constraint="soft")
    model.add_adapter("second", other)
    assert adapter_config(model, "second").constraint == "soft"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"constraint": "firm"}, "`constraint` is 'firm'; expected one of 'soft', 'hard', 'none'"),
        ({"statistics": "mean"}, "`statistics` is 'mean'"),
        ({"strength": 0}, r"`strength` is 0; expected a number > 0.*constraint=\"hard\""),
        ({"strength": -1.0}, "`strength` is -1.0"),
        ({"strength": float("nan")}, "`strength` is nan"),
        ({"strength": "0.3"}, "`strength` is '0.3'; expected a finite number"),
        ({"energy": 0.0}, "`energy` is 0.0"),
        ({"energy": 1.01}, r"share in \(0, 1\]"),
        ({"energy": float("nan")}, "`energy` is nan"),
        ({"max_rank": 0}, "`max_rank` is 0"),
        ({"max_rank": 2.5}, "`max_rank` is 2.5"),
        ({"max_rank": "all"}, "`max_rank` is 'all'; expected an integer of at least 1 or None or 'auto'"),
        ({"tokens_per_row": 0}, "`tokens_per_row` is 0"),
        ({"tokens_per_row": True}, "`tokens_per_row` is True"),
        ({"r": 0}, "holds the rank 0"),
        ({"rank_pattern": {"q_proj": 0}}, "`rank_pattern` holds the rank 0"),
        ({"use_dora": True}, "set use_dora=False"),
        ({"modules_to_save": ["lm_head"]}, "set modules_to_save=None"),
        ({"bias": "all"}, 'set bias="none"'),
        ({"bias": "lora_only"}, 'set bias="none"'),
        ({"lora_bias": True}, "set lora_bias=False"),
        ({"trainable_token_indices": [1]}, "set trainable_token_indices=None"),
        ({"target_parameters": ["w"]}, "set target_parameters=None"),
        ({"use_qalora": True}, "set use_qalora=False"),
        (
            {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
            "`alora_invocation_tokens`.*leave (it|alora_invocation_tokens) at its default",
        ),
        *(
            ({"init_lora_weights": name}, f"`init_lora_weights` is {name!r}")
            for name in ("pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "mica", "lora_ga", None, 1.5)
        ),
    ],
)
def test_refused_settings_say_what_to_change(settings, message):
    with pytest.raises(ValueError, match=message):
        SpaceLoraConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_replication": [(0, 2), (1, 2)]},
        {"ensure_weight_tying": True},
        {"megatron_config": {"a": 1}},
        {"loftq_config": {"loftq_bits": 4}},
        {"qalora_group_size": 4},
    ],
)
def test_options_that_are_not_on_the_list_are_refused_by_name(settings):
    """Whatever PEFT's own checks have to say to them comes after ours."""
    (name,) = settings
    with pytest.raises(ValueError, match=f"`{name}` is .*leave it at its default"):
        SpaceLoraConfig(**STOCK, **settings)


def test_options_of_versions_to_come_are_refused_unless_at_their_default():
    @dataclasses.dataclass
    class Later(SpaceLoraConfig):
        twist: float = 0.0
        knots: list = dataclasses.field(default_factory=list)

    Later(**STOCK)
    for settings in ({"twist": 0.5}, {"knots": [1]}):
        with pytest.raises(ValueError, match=f"`{next(iter(settings))}` is .*leave it at its default"):
            Later(**STOCK, **settings)


def test_custom_modules_are_refused():
    config = SpaceLoraConfig(**STOCK)
    config._register_custom_module({torch.nn.Linear: torch.nn.Linear})
    with pytest.raises(ValueError, match="custom modules are registered"):
        config.check()


@pytest.mark.parametrize("how", ["fresh", "weighted", "replaced"])
def test_saving_what_was_never_in_a_null_space_warns(tmp_path, how):
    model = get_peft_model(tiny_llama(), SpaceLoraConfig(**STOCK))
    if how == "weighted":
        model.add_adapter("other", SpaceLoraConfig(**STOCK))
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mix", combination_type="linear")
    elif how == "replaced":
        config = SpaceLoraConfig(**STOCK)
        config.projected = {"null_spaces": "a", "lora_A": "b"}
        model.peft_config["default"] = dataclasses.replace(config, strength=0.5)
    with pytest.warns(UserWarning, match="asks for the 'soft' constraint, but was never attached to null spaces"):
        model.save_pretrained(tmp_path, selected_adapters=["mix" if how == "weighted" else "default"])


@pytest.mark.parametrize("kind", ["cat", "linear", "svd", "ties", "dare_linear", "magnitude_prune"])
def test_a_mix_of_constrained_adapters_is_not_one(tmp_path, kind):
    """Its note is gone: the file says that the constraint was asked for, and no card or push takes the folder."""
    model = get_peft_model(tiny_llama(), SpaceLoraConfig(**STOCK))
    model.add_adapter("other", SpaceLoraConfig(**STOCK))
    for name in ("default", "other"):
        model.peft_config[name].projected = {"null_spaces": "a", "lora_A": adapter_digest(model, name, ("lora_A",))}
    options = {"density": 0.5} if kind in ("ties", "dare_linear", "magnitude_prune") else {}
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mix", combination_type=kind, **options)
    model.save_pretrained(tmp_path / "own", selected_adapters=["default"])
    check_projected(tmp_path / "own")
    with pytest.warns(UserWarning, match="never attached"):
        model.save_pretrained(tmp_path, selected_adapters=["mix"])
    assert json.loads((tmp_path / "mix" / SPACE_CONFIG_NAME).read_text())["projected"] is None
    with pytest.raises(ValueError, match="never in the null space.*mix of others"):
        check_projected(tmp_path / "mix")
    assert SpaceLoraConfig.from_pretrained(str(tmp_path / "mix")).projected is None


def test_folders_of_version_0_1_0_say_nothing_of_it(tmp_path):
    with pytest.warns(UserWarning, match="never attached"):
        get_peft_model(tiny_llama(), SpaceLoraConfig(**STOCK)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="never in the null space"):
        check_projected(tmp_path)
    path = tmp_path / SPACE_CONFIG_NAME
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "projected"})
    )
    check_projected(tmp_path)


def test_saving_without_a_constraint_does_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        SpaceLoraConfig(**STOCK, constraint="none").save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [0], "target_modules": ["q_proj"]},
        {"use_rslora": True, "alpha_pattern": {"q_proj": 4}, "rank_pattern": {"q_proj": 2}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"lora_dropout": 0.1, "energy": 1.0, "strength": 1, "max_rank": 1},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    ],
)
def test_harmless_settings_are_accepted(settings):
    SpaceLoraConfig(**settings)


def test_settings_are_checked_again_before_fitting():
    """PEFT fills in `modules_to_save` for some task types after the config was made."""
    config = SpaceLoraConfig(**STOCK)
    model = get_peft_model(tiny_llama(), config)
    config.modules_to_save = ["score"]
    with pytest.raises(ValueError, match="leave task_type unset"):
        adapter_config(model)


def test_auto_rank_is_a_share_of_the_inputs_and_only_for_the_soft_constraint():
    soft, hard = SpaceLoraConfig(constraint="soft"), SpaceLoraConfig(constraint="hard")
    assert [soft.rank_limit(d) for d in (32, 96, 512, 4096, 11008)] == [16, 24, 128, 1024, 1024]
    assert hard.rank_limit(4096) is None
    assert SpaceLoraConfig(max_rank=7).rank_limit(4096) == 7
    assert SpaceLoraConfig(max_rank=None).rank_limit(4096) is None


def without_auto_rank(folder):
    """As version 0.2.0 wrote it."""
    path = folder / SPACE_CONFIG_NAME
    content = json.loads(path.read_text())
    assert content.pop("auto_rank") == "d / 4"
    path.write_text(json.dumps(content))


def test_what_auto_meant_when_an_adapter_was_saved_is_what_it_means_when_it_is_loaded(tmp_path):
    for folder in ("now", "before"):
        LoraConfig().save_pretrained(tmp_path / folder)
        SpaceLoraConfig(strength=0.03).save_space_fields(tmp_path / folder)
    without_auto_rank(tmp_path / "before")
    limits = {}
    for folder in ("now", "before"):
        config = SpaceLoraConfig.from_pretrained(str(tmp_path / folder))
        config.save_space_fields(tmp_path / folder)  # Saved again, it still says so.
        again = SpaceLoraConfig.from_pretrained(str(tmp_path / folder))
        for own in (config, again, copy.copy(again), copy.deepcopy(again)):
            assert own.max_rank == "auto"
            limits.setdefault(folder, []).append([own.rank_limit(d) for d in (96, 512, 4096, 65536)])
    assert limits["now"] == [[24, 128, 1024, 1024]] * 4
    assert limits["before"] == [[16, 16, 128, 2048]] * 4


def test_a_number_of_eigenvectors_means_the_same_always(tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    SpaceLoraConfig(max_rank=7).save_space_fields(tmp_path)
    assert "auto_rank" not in json.loads((tmp_path / SPACE_CONFIG_NAME).read_text())
    config = SpaceLoraConfig.from_pretrained(str(tmp_path))
    config.max_rank = "auto"
    assert config.rank_limit(512) == 128


@pytest.mark.parametrize("rule", ["d / 5", None, 4, ["d / 4"], {}])
def test_an_auto_of_a_later_version_is_refused(rule, tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    SpaceLoraConfig().save_space_fields(tmp_path)
    path = tmp_path / SPACE_CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_rank": rule}))
    with pytest.raises(ValueError, match="what `max_rank` 'auto' means there.*expected one of 'd / 4', 'd / 32'"):
        SpaceLoraConfig.from_pretrained(str(tmp_path))
