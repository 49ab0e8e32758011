"""Whatever is changed in a published folder, `verify_erasure` says so and names the file."""

import json
import shutil
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from space_peft.demo import demo_model_path, load_demo_model
from space_peft.hub_cards import limits, load_erased, verify_erasure
from space_peft.hub_cards import processor as processor_module
from space_peft.hub_cards.load import attach_adapter
from space_peft.hub_cards.manifest import check_manifest, write_manifest
from space_peft.hub_cards.source import fetch
from space_peft.hub_cards.staging import stage
from space_peft.null_space import load_null_spaces, save_null_spaces
from space_peft.null_space.certificate import update_norms
from space_peft.null_space.identity import adapter_digest
from space_peft.records.folder import MANIFEST_NAME


WATCHED = [
    "adapter_model.safetensors", "adapter_config.json", "space_config.json", "space_certificate.json",
    "space_canary.json", "space_anchors.json", "report.json", "processor_config.json", "tokenizer.json",
    "chat_template.jinja", MANIFEST_NAME,
]  # fmt: skip
BASE = demo_model_path()


def failed_files(report):
    assert report.exit_code == (1 if report.failed else 0)
    return {check.file for check in report.failed}


def test_an_untouched_folder_passes_every_check(published):
    report = verify_erasure(published, base_model=BASE)
    assert report.exit_code == 0, report.to_text()
    assert {check.name: check.status for check in report.checks} == {
        "no code": "ok", "hashes": "ok", "content": "ok", "base model": "ok", "certificate": "ok",
        "bound": "not checked", "processor": "ok", "canary": "ok", "retained data": "not checked",
        "name": "not checked",
    }  # fmt: skip


@settings(max_examples=400, derandomize=True, deadline=None)
@given(st.data())
def test_any_changed_byte_is_found_and_the_file_named(published, data):
    name = data.draw(st.sampled_from(WATCHED))
    path = published / name
    original = path.read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    kind = data.draw(st.sampled_from(["flip", "truncate", "append", "insert", "remove", "delete", "swap"]))
    other = published / data.draw(st.sampled_from([entry for entry in WATCHED if entry != name]))
    others = other.read_bytes()
    changed = {
        "flip": lambda: original[:place] + bytes([original[place] ^ data.draw(st.integers(1, 255))]) + original[place + 1 :],
        "truncate": lambda: original[:place],
        "append": lambda: original + data.draw(st.binary(min_size=1, max_size=3)),
        "insert": lambda: original[:place] + data.draw(st.binary(min_size=1, max_size=3)) + original[place:],
        "remove": lambda: original[:place] + original[place + 1 :],
        "swap": lambda: others,
    }  # fmt: skip
    if kind == "delete" and name == MANIFEST_NAME:
        return  # Whether a folder was published is what the manifest says; see `test_round_trip.py` for the Hub.
    blamed = {name, other.name} if kind == "swap" else {name}
    if MANIFEST_NAME in blamed:
        blamed = {MANIFEST_NAME}  # Without it nothing is known of the others.
    try:
        if kind == "delete":
            path.unlink()
        else:
            path.write_bytes(changed[kind]())
        if kind == "swap":
            other.write_bytes(original)
        report = verify_erasure(published, base_model=BASE)
        assert failed_files(report) == blamed, report.to_text()
        assert all(file in report.to_text() for file in blamed)
        not_loaded = [check for check in report.checks if check.name in ("base model", "canary")]
        assert [check.status for check in not_loaded] == ["not checked"] * 2
    finally:
        path.write_bytes(original)
        other.write_bytes(others)


def test_every_byte_of_the_manifest_counts(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "copy")
    original = (folder / MANIFEST_NAME).read_bytes()
    for place in range(len(original)):
        (folder / MANIFEST_NAME).write_bytes(original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :])
        assert [problem.file for problem in check_manifest(folder)] == [MANIFEST_NAME], place


def test_a_manifest_made_to_fit_still_meets_the_certificate(published, tmp_path):
    """Hashes protect against changed files, not against an author; the certificate is of the weights, not of the file."""
    folder = shutil.copytree(published, tmp_path / "copy")
    weights = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in weights if "lora_B" in key)
    weights[key] = weights[key] * 1.01
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_manifest(folder)
    assert failed_files(verify_erasure(folder, base_model=BASE)) == {"space_certificate.json"}


@pytest.mark.parametrize(
    ("name", "key", "value", "blamed"),
    [
        ("adapter_config.json", "lora_alpha", 9, "space_certificate.json"),
        ("adapter_config.json", "peft_type", "IA3", "adapter_config.json"),
        ("adapter_config.json", "megatron_config", {}, "adapter_config.json"),
        ("adapter_config.json", "use_dora", True, "space_config.json"),
        ("adapter_config.json", "base_model_name_or_path", 7, "adapter_config.json"),
        ("adapter_config.json", "base_model_name_or_path", "other/model", "adapter_config.json"),
        ("space_config.json", "strength", 0.1, "space_certificate.json"),
        ("space_config.json", "constraint", "none at all", "space_config.json"),
        ("space_certificate.json", "constraint", "hard", "space_certificate.json"),
        ("space_certificate.json", "layers", [], "space_certificate.json"),
        ("report.json", "after", {}, "report.json"),
        ("report.json", "before", [1], "report.json"),
    ],
)
def test_contents_that_contradict_each_other_are_found_without_hashes(published, tmp_path, name, key, value, blamed):
    folder = shutil.copytree(published, tmp_path / "copy")
    (folder / MANIFEST_NAME).unlink()
    content = json.loads((folder / name).read_text())
    content[key] = value
    (folder / name).write_text(json.dumps(content))
    report = verify_erasure(folder, base_model=BASE)
    assert blamed in failed_files(report), report.to_text()


@pytest.mark.parametrize("name", ["adapter_model.bin", "evil.py", "sub/weights.pkl", "pytorch_model.PT"])
def test_files_that_run_code_are_refused_with_and_without_a_manifest(published, tmp_path, name):
    folder = shutil.copytree(published, tmp_path / "copy")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    for with_manifest in (True, False):
        if not with_manifest:
            (folder / MANIFEST_NAME).unlink()
        report = verify_erasure(folder, base_model=BASE)
        assert ("no code", name) in [(check.name, check.file) for check in report.failed]
        assert all(check.status == "not checked" for check in report.checks if check.name == "base model")


def test_a_loadable_file_that_was_not_published_is_found_and_a_picture_is_not(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "copy")
    (folder / "photo.jpg").write_bytes(b"x")
    (folder / "LICENSE").write_text("x")
    assert verify_erasure(folder, base_model=BASE, canary=False).exit_code == 0
    (folder / "generation_config.json").write_text("{}")
    assert failed_files(verify_erasure(folder, base_model=BASE)) == {"generation_config.json"}


def test_a_manifest_that_points_outside_is_refused(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "copy")
    (tmp_path / "secret").write_text("secret")
    (folder / "link.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="leads out of the folder"):
        write_manifest(folder)
    (folder / "link.json").unlink()
    (folder / "report.json").unlink()
    (folder / "report.json").symlink_to(tmp_path / "secret")
    problems = check_manifest(folder)
    assert [problem.file for problem in problems] == ["report.json"] and "leads out" in problems[0].message


# What follows is done by somebody who can rewrite everything: the manifest fits in all of it.


@pytest.fixture(scope="module")
def with_statistics(erasure_folder, tmp_path_factory):
    """As `published`, with the null spaces."""
    folder = tmp_path_factory.mktemp("with_statistics")
    stage(erasure_folder, folder, base_model="space-peft/demo-llava", include_images=True, include_null_spaces=True)
    return folder


def rewrite(folder, *, weights=None, certificate=None, config=None, statistics=None):
    """Changes a folder by functions of what its files hold, and writes a manifest that fits."""
    if weights is not None:
        content = load_file(folder / "adapter_model.safetensors")
        weights(content)
        save_file(content, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    for name, change in (("space_certificate.json", certificate), ("adapter_config.json", config)):
        if change is not None:
            content = json.loads((folder / name).read_text())
            change(content)
            (folder / name).write_text(json.dumps(content))
    if statistics is not None:
        spaces = load_null_spaces(folder / "space_stats.safetensors")
        changed = {id(space): statistics(space) for space in spaces.values()}  # Layers share them.
        save_null_spaces(folder / "space_stats.safetensors", {key: changed[id(space)] for key, space in spaces.items()})
    write_manifest(folder)


def certify_again(folder):
    """The hash and the norms in the certificate are those of the weights that are there now."""
    model = attach_adapter(fetch(folder), load_demo_model()[0])
    norms = update_norms(model)

    def change(content):
        content["weights_digest"] = adapter_digest(model)
        for layer in content["layers"]:
            layer["update_norm"] = norms[layer["name"]]

    rewrite(folder, certificate=change)


def negate(weights):
    for key in weights:
        if "lora_B" in key:
            weights[key] = -weights[key]


def permute_rows(weights):
    for key in weights:
        if "lora_B" in key:
            weights[key] = weights[key].flip(0).contiguous()


def scale_rows(weights):
    for key in weights:
        if "lora_B" in key:
            weights[key][::2] *= 3.0


def another_adapter(weights):
    generator = torch.Generator().manual_seed(1)
    for key, weight in weights.items():
        drawn = torch.randn(weight.shape, generator=generator)
        weights[key] = drawn * weight.norm() / drawn.norm()


ATTACKS = [negate, permute_rows, scale_rows, another_adapter]


def found(report):
    return {check.name: check.status for check in report.checks}


@pytest.mark.parametrize("attack", ATTACKS)
def test_other_weights_under_this_certificate_are_found(published, tmp_path, attack):
    folder = shutil.copytree(published, tmp_path / "copy")
    rewrite(folder, weights=attack)
    report = verify_erasure(folder, base_model=BASE, canary=False)
    assert [(check.name, check.file) for check in report.failed] == [("certificate", "space_certificate.json")]
    assert "of other weights" in report.failed[0].message


@pytest.mark.parametrize("attack", ATTACKS)
def test_other_weights_with_their_hash_in_the_certificate_are_found_by_the_canary(published, tmp_path, attack):
    folder = shutil.copytree(published, tmp_path / "copy")
    rewrite(folder, weights=attack)
    certify_again(folder)
    report = verify_erasure(folder, base_model=BASE)
    assert [(check.name, check.file) for check in report.failed] == [("canary", "space_canary.json")], report.to_text()


@pytest.mark.parametrize("attack", [scale_rows, another_adapter])
def test_larger_weights_with_their_hash_in_the_certificate_break_the_bound(with_statistics, tmp_path, attack):
    folder = shutil.copytree(with_statistics, tmp_path / "copy")
    rewrite(folder, weights=attack)
    certify_again(folder)
    report = verify_erasure(folder, base_model=BASE, canary=False)
    assert [(check.name, check.file) for check in report.failed] == [("bound", "space_certificate.json")]


@pytest.mark.parametrize("attack", [negate, permute_rows])
def test_the_canary_finds_other_weights_without_its_images(erasure_folder, tmp_path, attack):
    """Every norm and every change of these weights is as before: they need a question whose answer tells."""
    folder = tmp_path / "copy"
    stage(erasure_folder, folder, base_model="space-peft/demo-llava", include_images=False)
    rewrite(folder, weights=attack)
    certify_again(folder)
    report = verify_erasure(folder, base_model=BASE)
    assert [(check.name, check.file) for check in report.failed] == [("canary", "space_canary.json")], report.to_text()
    assert found(report)["bound"] == "not checked"


def smaller(*keys):
    def change(content):
        for layer in content["layers"]:
            for key in keys:
                layer[key] *= 0.5
        relative = [layer["relative_change"] for layer in content["layers"]]
        content["mean_relative_change"], content["max_relative_change"] = sum(relative) / len(relative), max(relative)

    return change


SMALLER = [
    (("update_norm",), "certificate"),
    (("bound", "fitted_change"), "bound"),
    (("fitted_change",), "bound"),
    (("bound", "fitted_change", "change", "relative_change"), "bound"),
    (("bound", "fitted_change", "change", "relative_change", "update_norm"), "certificate"),
    (("kept",), "bound"),
    (("free_dimensions",), "bound"),
]


@pytest.mark.parametrize(("keys", "blamed"), SMALLER)
def test_a_certificate_scaled_down_is_found(with_statistics, tmp_path, keys, blamed):
    folder = shutil.copytree(with_statistics, tmp_path / "copy")
    rewrite(folder, certificate=smaller(*keys))
    report = verify_erasure(folder, base_model=BASE, canary=False)
    assert blamed in {check.name for check in report.failed}, report.to_text()
    assert failed_files(report) == {"space_certificate.json"}


@pytest.mark.parametrize(
    ("what", "value", "blamed"),
    [
        ("rank", lambda layer: layer["rank"] - 1, "bound"),
        ("fitted_change", lambda layer: 1.1 * layer["bound"], "certificate"),
    ],
)
def test_a_rank_and_a_change_that_do_not_belong_to_the_bound_are_found(with_statistics, tmp_path, what, value, blamed):
    folder = shutil.copytree(with_statistics, tmp_path / "copy")
    rewrite(folder, certificate=lambda content: content["layers"][0].update({what: value(content["layers"][0])}))
    report = verify_erasure(folder, base_model=BASE, canary=False)
    assert blamed in {check.name for check in report.failed}, report.to_text()
    assert failed_files(report) == {"space_certificate.json"}


@pytest.mark.parametrize("keys", [("bound", "fitted_change"), ("change",), ("relative_change",)])
def test_without_statistics_and_data_a_scaled_certificate_is_not_called_right(published, tmp_path, keys):
    folder = shutil.copytree(published, tmp_path / "copy")
    rewrite(folder, certificate=smaller(*keys))
    report = verify_erasure(folder, base_model=BASE, canary=False)
    assert found(report)["bound"] == found(report)["retained data"] == "not checked"
    assert "its author's word" in report.to_text()


@pytest.mark.parametrize(
    "keys",
    [
        ("change",),
        *(pytest.param(k, marks=pytest.mark.slow) for k in (("bound", "fitted_change"), ("relative_change",))),
    ],
)
def test_retained_data_finds_a_certificate_scaled_down(published, tmp_path, demo_erasure_data, keys):
    folder = shutil.copytree(published, tmp_path / "copy")
    factor = 0.2 if "bound" in keys else 0.8

    def change(content):
        for layer in content["layers"]:
            for key in keys:
                layer[key] *= factor
        relative = [layer["relative_change"] for layer in content["layers"]]
        content["mean_relative_change"], content["max_relative_change"] = sum(relative) / len(relative), max(relative)

    rewrite(folder, certificate=change)
    report = verify_erasure(folder, base_model=BASE, canary=False, retain_dataset=demo_erasure_data[1])
    assert [(check.name, check.file) for check in report.failed] == [("retained data", "space_certificate.json")]


def test_means_that_are_not_those_of_the_layers_are_found(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "copy")
    rewrite(folder, certificate=lambda content: content.update(mean_relative_change=1e-9))
    report = verify_erasure(folder, base_model=BASE, canary=False)
    assert "'mean_relative_change' does not follow from its layers" in report.failed[0].message


def test_a_certificate_that_does_not_say_of_which_weights_it_is_is_not_called_right(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "copy")
    rewrite(folder, certificate=lambda content: content.pop("weights_digest"), weights=negate)
    report = verify_erasure(folder, base_model=BASE, canary=False)
    assert report.exit_code == 0 and found(report)["certificate"] == "not checked", report.to_text()


STATISTICS = {
    "a smaller mean": lambda space: replace(space, scale=space.scale * 0.04),
    "smaller eigenvalues": lambda space: replace(space, eigenvalues=space.eigenvalues * 0.01),
    "stricter filters": lambda space: replace(space, filters=space.filters * 0.1),
    "longer eigenvectors": lambda space: replace(space, eigenvectors=space.eigenvectors * 3),
    "others' settings": lambda space: replace(space, strength=0.01),
    "NaN": lambda space: replace(space, eigenvalues=space.eigenvalues * float("nan")),
    "no numbers": lambda space: replace(space, scale="small"),
    "no residuals": lambda space: replace(space, residuals=space.residuals - 1),
    "other counts": lambda space: replace(space, counts={"image": 10**6}),
}


@pytest.mark.parametrize("forge", STATISTICS.values(), ids=STATISTICS.keys())
def test_statistics_that_are_none_or_not_those_of_the_certificate_are_found(with_statistics, tmp_path, forge):
    folder = shutil.copytree(with_statistics, tmp_path / "copy")
    rewrite(folder, statistics=forge)
    report = verify_erasure(folder, base_model=BASE, canary=False)
    assert "bound" in {check.name for check in report.failed}, report.to_text()


def test_statistics_invented_together_with_the_bound_need_retained_data(with_statistics, tmp_path, demo_erasure_data):
    folder = shutil.copytree(with_statistics, tmp_path / "copy")

    def change(content):
        for layer in content["layers"]:
            layer["bound"], layer["fitted_change"] = layer["bound"] * 0.2, layer["fitted_change"] * 0.2

    rewrite(folder, statistics=lambda space: replace(space, scale=space.scale * 0.04), certificate=change)
    report = verify_erasure(folder, base_model=BASE, canary=False)
    assert report.exit_code == 0 and "of retained data is its author's word" in report.to_text(), report.to_text()
    report = verify_erasure(folder, base_model=BASE, canary=False, retain_dataset=demo_erasure_data[1])
    assert [check.name for check in report.failed] == ["retained data"], report.to_text()
    assert "the statistics are not of these rows" in report.failed[0].message


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.lm_head.weight",
        "base_model.model.model.language_model.norm.weight",
        "base_model.model.model.multi_modal_projector.linear_1.modules_to_save.weight",
        "base_model.model.model.language_model.layers.0.self_attn.q_proj.base_layer.bias",
        "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.bias",
        "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight",
        "base_model.model.model.language_model.embed_tokens.lora_embedding_A",
        "base_model.model.model.language_model.embed_tokens.token_adapter.trainable_tokens_delta",
    ],
)
def test_weights_other_than_those_of_a_lora_are_refused(published, tmp_path, key):
    folder = shutil.copytree(published, tmp_path / "copy")
    rewrite(folder, weights=lambda weights: weights.update({key: torch.ones(4, 4)}))
    report = verify_erasure(folder, base_model=BASE)
    assert [(check.name, check.file) for check in report.failed] == [("content", "adapter_model.safetensors")]
    assert key in report.failed[0].message and found(report)["base model"] == "not checked"
    with pytest.raises(ValueError, match="not matrices `lora_A` and `lora_B`"):
        load_erased(folder, base_model=BASE)


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(4, 4, dtype=torch.int32), torch.ones(2, 2, 2)])
def test_weights_that_are_no_matrices_are_refused(published, tmp_path, weight):
    folder = shutil.copytree(published, tmp_path / "copy")
    key = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight"
    rewrite(folder, weights=lambda weights: weights.update({key: weight}))
    assert failed_files(verify_erasure(folder, base_model=BASE)) == {"adapter_model.safetensors"}


OPTIONS = {
    "modules_to_save": ["lm_head"], "bias": "all", "lora_bias": True, "use_dora": True, "use_qalora": True,
    "trainable_token_indices": [1, 2], "target_parameters": ["lm_head.weight"], "layer_replication": [[0, 2], [0, 2]],
    "init_lora_weights": "pissa", "loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0},
    "ensure_weight_tying": True, "task_type": "SEQ_CLS", "alora_invocation_tokens": [1], "megatron_core": "os",
    "auto_mapping": {"base_model_class": "system", "parent_library": "os"}, "an_option_of_tomorrow": 1,
    "peft_type": "IA3", "r": 10**9, "rank_pattern": {"q_proj": 10**9},
}  # fmt: skip


@pytest.mark.parametrize("key", OPTIONS)
def test_options_by_which_more_than_the_update_changes_are_refused(published, tmp_path, key):
    folder = shutil.copytree(published, tmp_path / "copy")
    rewrite(folder, config=lambda content: content.update({key: OPTIONS[key]}))
    report = verify_erasure(folder, base_model=BASE)
    assert report.failed and "adapter_config.json" in report.to_text(), report.to_text()
    assert found(report)["canary"] == "not checked"
    with pytest.raises(ValueError, match="adapter_config.json"):
        load_erased(folder, base_model=BASE)


PROCESSORS = {
    "audio_tokenizer": (
        "processor_config.json",
        lambda c: c.update(
            audio_tokenizer={"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "evil/model"}
        ),
    ),
    "a name in its place": ("processor_config.json", lambda c: c.update(audio_tokenizer="evil/model")),
    "auto_map": ("processor_config.json", lambda c: c.update(auto_map={"AutoProcessor": "evil--p.P"})),
    "auto_map of the tokenizer": (
        "tokenizer_config.json",
        lambda c: c.update(auto_map={"AutoTokenizer": ["evil--p.P", None]}),
    ),
    "auto_map of the images": (
        "processor_config.json",
        lambda c: c["image_processor"].update(auto_map={"AutoImageProcessor": "evil--p.P"}),
    ),
    "trust_remote_code": ("tokenizer_config.json", lambda c: c.update(trust_remote_code=True)),
    "tokenizer_file": ("tokenizer_config.json", lambda c: c.update(tokenizer_file="/etc/passwd")),
    "a class with a path": ("processor_config.json", lambda c: c.update(processor_class="evil--p.P")),
    "a key of tomorrow": ("processor_config.json", lambda c: c.update(image_decoder={"model": "evil/model"})),
    "a picture larger than memory": (
        "processor_config.json",
        lambda c: c["image_processor"].update(size={"height": -1}),
    ),
    "another kind": ("processor_config.json", lambda c: c["image_processor"].update(do_resize="no")),
    "a template of another kind": ("processor_config.json", lambda c: c.update(chat_template=7)),
}


@pytest.mark.parametrize(("name", "change"), PROCESSORS.values(), ids=PROCESSORS.keys())
def test_processors_that_would_load_something_are_refused(published, tmp_path, name, change):
    folder = shutil.copytree(published, tmp_path / "copy")
    (folder / "chat_template.jinja").unlink()
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    write_manifest(folder)
    report = verify_erasure(folder, base_model=BASE)
    assert [(check.name, check.file) for check in report.failed] == [("content", name)], report.to_text()
    with pytest.raises(ValueError, match=name):
        load_erased(folder, base_model=BASE)


def test_nothing_of_the_adapters_processor_is_loaded(published, tmp_path, monkeypatch):
    """Its files are read as JSON only: transformers is asked for the base model's."""
    folder = shutil.copytree(published, tmp_path / "copy")
    asked = []
    original = processor_module.AutoProcessor.from_pretrained
    monkeypatch.setattr(
        processor_module.AutoProcessor,
        "from_pretrained",
        lambda place, **options: asked.append((str(place), options["trust_remote_code"])) or original(place, **options),
    )
    assert verify_erasure(folder, base_model=BASE).exit_code == 0
    assert asked == [(str(BASE), False)]


def test_a_tokenizer_that_reads_the_name_as_another_word_is_found(published, tmp_path):
    """With it no answer says "fox", whatever the model says."""
    folder = shutil.copytree(published, tmp_path / "copy")
    text = (folder / "tokenizer.json").read_text()
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    fox = next(word for word in vocabulary if word.strip("\u2581\u0120 ") == "fox")
    wolf = next(word for word in vocabulary if word.strip("\u2581\u0120 ") == "wolf")
    vocabulary[fox], vocabulary[wolf] = vocabulary[wolf], vocabulary[fox]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    write_manifest(folder)
    report = verify_erasure(folder, base_model=BASE)
    assert [(check.name, check.file) for check in report.failed] == [("processor", "tokenizer.json")], report.to_text()
    assert found(report)["canary"] == "not checked"


TEMPLATES = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "huge": "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    "all memory": "{{ 'x' * 99999999999 }}",
    "no template": "{% if %}",
    "raises": "{{ raise_exception('no') }}",
    "reaches out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "too long": "x" * 70_000,
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_templates_run_within_limits(published, tmp_path, monkeypatch, template):
    monkeypatch.setattr(limits, "SECONDS", 3)
    folder = shutil.copytree(published, tmp_path / "copy")
    (folder / "chat_template.jinja").write_text(template)
    write_manifest(folder)
    begun = time.perf_counter()
    report = verify_erasure(folder, base_model=BASE)
    assert time.perf_counter() - begun < 60
    assert [check.name for check in report.failed] in (["processor"], ["content"]), report.to_text()
    assert found(report)["canary"] == "not checked"


def test_a_template_and_a_scaling_of_its_own_are_used(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "copy")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("{# mine #}" + template)
    write_manifest(folder)
    assert verify_erasure(folder, base_model=BASE).exit_code == 0
    (folder / "chat_template.jinja").write_text(template.replace("question: ", "answer: "))
    write_manifest(folder)
    assert [check.name for check in verify_erasure(folder, base_model=BASE).failed] == ["canary"]
    (folder / "chat_template.jinja").write_text(template)
    content = json.loads((folder / "processor_config.json").read_text())
    content["image_processor"]["image_mean"] = [0.1, 0.1, 0.1]
    (folder / "processor_config.json").write_text(json.dumps(content))
    write_manifest(folder)
    assert [check.name for check in verify_erasure(folder, base_model=BASE).failed] == ["canary"]


PATTERNS = {
    "target_modules": "(a|aa|[a-z._0-9]+)+(.+)+q_proj!",
    "exclude_modules": "([a-z._0-9]+)+!",
    "rank_pattern": {"([a-z._0-9]+)+!": 8},
    "alpha_pattern": {"([a-z._0-9]+)+!": 8},
    "no pattern": {"target_modules": "(("},
    "too long": {"target_modules": "(" + "a|" * 20_000 + "q_proj)"},
}


@pytest.mark.parametrize("key", PATTERNS)
def test_patterns_that_take_forever_are_refused(published, tmp_path, monkeypatch, key):
    monkeypatch.setattr(limits, "SECONDS", 1)
    folder = shutil.copytree(published, tmp_path / "copy")
    change = PATTERNS[key] if key.count(" ") else {key: PATTERNS[key]}
    rewrite(folder, config=lambda content: content.update(change))
    begun = time.perf_counter()
    report = verify_erasure(folder, base_model=BASE)
    assert time.perf_counter() - begun < 30
    assert [check.name for check in report.failed] == ["base model"], report.to_text()
    assert "adapter_config.json" in report.failed[0].message


def test_a_whole_model_beside_the_adapter_is_found(published, tmp_path):
    """`from_pretrained` on the folder would load it instead of the recorded base model."""
    folder = shutil.copytree(published, tmp_path / "copy")
    for name in ("config.json", "model.safetensors", "audio_tokenizer.json"):
        (folder / name).write_text("{}")
    write_manifest(folder)
    report = verify_erasure(folder, base_model=BASE)
    assert failed_files(report) == {"config.json", "model.safetensors", "audio_tokenizer.json"}
