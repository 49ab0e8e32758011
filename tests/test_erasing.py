"""One call from a name to an adapter: what it makes, what it takes up again, and how the command line reads its options."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, Image, load_from_disk
from peft import PeftModel
from safetensors.torch import load_file

from space_peft import AdapterArguments, ErasureLedger, SpaceConfig, SpaceLoraConfig, erase, get_space_config
from space_peft.anchors import anchor_info
from space_peft.cli import main
from space_peft.cli.erase import parse_run
from space_peft.cli.pictures import load_pictures
from space_peft.cli.places import ConfigFile, take_config
from space_peft.demo import DEMO_QUESTIONS, demo_model_path, load_demo_model
from space_peft.demo.probes import demo_probes, demo_retain_rows, demo_split
from space_peft.erasing import Erasure, load_model
from space_peft.evaluation import ErasureReport
from space_peft.evaluation.keys import KEYS
from space_peft.hub_cards.merge import merge_adapter
from space_peft.hub_cards.source import unsafe_files
from space_peft.hub_cards.staging import stage
from space_peft.modeling.checksum import base_checksum
from space_peft.modeling.layers import adapted_layers, lora_weights
from space_peft.several import erase_several
from space_peft.trainers.checkpoints import settings_of


@pytest.fixture(scope="module")
def data(demo_images):
    public, _ = demo_split(demo_images, "fox")
    return public, demo_retain_rows("fox", public)[:80]


def quick(folder, **options):
    settings = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "own_answers": False, "canary_items": 0,
    }  # fmt: skip
    return SpaceConfig(**{**settings, **options})


def job(folder, data, **options):
    model, processor = load_demo_model()
    given = {
        "pool": data[0], "retain_dataset": data[1], "processor": processor, "questions": DEMO_QUESTIONS, "k": 2,
        "refine_steps": 1, "args": quick(folder), "progress": False, "peft_config": SpaceLoraConfig(r=4),
    }  # fmt: skip
    return erase(model, options.pop("concept", "fox"), **{**given, **options})


def stage_lines(text):
    """The numbers of the stages that are over, each with what was said of it."""
    return [line.partition("] ")[::2] for line in text.splitlines() if line.startswith("[")]


def test_a_name_in_and_everything_a_reviewer_asks_for_out(data, demo_images, tmp_path, capsys):
    probes = demo_probes("fox", demo_images)
    probes = [type(probe)(**{**probe.__dict__, "rows": probe.rows[:4]}) for probe in probes]
    args = quick(tmp_path / "out", canary_items=1)
    erasure = job(tmp_path / "out", data, probes=probes, args=args, progress=True)
    numbers, said = zip(*stage_lines(capsys.readouterr().err))
    # Every stage that was announced came, in this order.
    assert list(numbers) == [f"[{number}/9" for number in range(1, 10)]
    for text, begins in zip(
        said,
        (
            "asked about",
            "chose 2",
            "refined 2",
            "collected",
            "fitted",
            "trained 2",
            "measured",
            "noted",
            "evaluated: named on",
        ),
    ):
        assert text.startswith(begins) and text.endswith(" s")
    assert erasure.report.after["forget"]["n"] == 4 and erasure.certificate is not None
    assert anchor_info(erasure.anchors)["stage"] == "refined" and len(erasure.anchors) == 2
    folder, adapter = erasure.save(), erasure.adapter
    saved = load_file(folder / "adapter_model.safetensors")
    assert adapter.keys() == saved.keys() and all(torch.equal(adapter[key], saved[key]) for key in saved)
    assert "a local model" in (folder / "README.md").read_text()
    names = {path.name for path in folder.iterdir()}
    assert {
        "adapter_model.safetensors", "space_config.json", "space_certificate.json", "report.json", "README.md", "anchors",
        "space_anchors.json",
    } <= names  # fmt: skip
    text = erasure.summary()
    assert "forget" in text and "held-out images and texts" in text and f"space-peft audit --adapter {folder}" in text
    assert re.search("adapter_model.safetensors +the adapter's weights", text) and "anchors/ " in text
    merged = erasure.merge(tmp_path / "merged")
    again, base = dict(load_model(str(merged)).named_parameters()), load_demo_model()[0]
    name, layer = next(iter(adapted_layers(erasure.model).items()))
    a, b, scale = lora_weights(layer)
    wanted = base.get_submodule(name).weight + scale * b @ a
    # The embedded model is stored in half precision, and the merged one as well.
    assert torch.allclose(again[f"{name}.weight"], wanted, rtol=2**-10, atol=1e-6)
    assert (scale * b @ a).abs().max() > 0


def test_an_interrupted_call_goes_on_from_its_anchors_and_checkpoints(data, tmp_path, monkeypatch):
    import space_peft.erasing as erasing

    first = job(tmp_path, data, args=quick(tmp_path, max_steps=4, save_strategy="steps", save_steps=2))
    calls = []
    monkeypatch.setattr(erasing, "select_anchors", lambda *a, **k: calls.append(a))
    torch.manual_seed(5)
    (tmp_path / "checkpoint-4").rename(tmp_path / "lost")  # as if killed before the end
    again = job(tmp_path, data, args=quick(tmp_path, max_steps=4, save_strategy="steps", save_steps=2))
    assert not calls
    resumed_at = [entry["step"] for entry in again.trainer.state.log_history if "loss" in entry]
    assert resumed_at[-2:] == [3, 4] and again.trainer.state.global_step == 4
    for (name, one), (_, other) in zip(first.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_saved_result_leaves_the_checkpoints_alone_that_were_asked_for(data, tmp_path):
    # Trainer writes one at the last step in any case: a call that is killed before it has saved goes on from it.
    erasure = job(tmp_path, data, args=quick(tmp_path, save_strategy="steps"))
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").is_file()
    seconds = erasure.trainer.card_data.seconds
    assert seconds.keys() == {"prepare", "anchors", "erase", "certificate"} and seconds["certificate"] > 0
    erasure.save()
    assert (tmp_path / "adapter_model.safetensors").is_file() and not list(tmp_path.glob("checkpoint-*"))
    job(tmp_path, data, args=quick(tmp_path, save_strategy="steps", save_steps=1)).save()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def test_checkpoints_of_another_job_are_not_gone_on_from(data, tmp_path):
    saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    fox = job(tmp_path / "fox", data, args=quick(tmp_path / "fox", **saving))
    left = tmp_path / "lemon" / "checkpoint-1"
    shutil.copytree(tmp_path / "fox" / "checkpoint-1", left)
    (left / "space_rows.json").write_text('{"added": []}')
    with pytest.warns(
        UserWarning, match="1 checkpoint in .* of another run is skipped .*'fox', now 'lemon'.* from the beginning"
    ):
        lemon = job(tmp_path / "lemon", data, concept="lemon", args=quick(tmp_path / "lemon", **saving))
    assert len([entry for entry in lemon.trainer.state.log_history if "loss" in entry]) == 1
    assert not torch.equal(*(next(p for n, p in e.model.named_parameters() if "lora_B" in n) for e in (fox, lemon)))
    assert not (left / "space_rows.json").exists()
    # Asked for by its path it is refused.
    with pytest.raises(ValueError, match="is of another erasure: concept 'fox', now 'lemon'; other rows to forget"):
        lemon.trainer.train(resume_from_checkpoint=str(tmp_path / "fox" / "checkpoint-1"))
    # So is the same concept with other settings, of which the card would say that they made these weights.
    with pytest.warns(UserWarning, match="skipped \\(learning_rate the default, now 0.1; lora_alpha"):
        again = job(
            tmp_path / "fox",
            data,
            args=quick(tmp_path / "fox", learning_rate=0.1, **saving),
            peft_config=SpaceLoraConfig(r=4, lora_alpha=64),
        )
    assert len([entry for entry in again.trainer.state.log_history if "loss" in entry]) == 1


CHANGES = ({"refine_steps": 2}, {"aliases": ["owl"]}, {"selection": {"threshold": 0.1}})
MORE = [pytest.param(change, marks=pytest.mark.slow) for change in CHANGES]


@pytest.mark.parametrize("change", [{"k": 3}, *MORE])
def test_anchors_of_another_job_are_made_anew(data, tmp_path, change):
    job(tmp_path, data, args=quick(tmp_path, max_steps=1))
    before = load_from_disk(tmp_path / "anchors")
    job(tmp_path, data, args=quick(tmp_path, max_steps=1), **change)
    after = anchor_info(load_from_disk(tmp_path / "anchors"))["job"]
    assert anchor_info(before)["job"] != after
    assert {key: after[key] for key in change} == change


def test_the_selection_can_be_told_more(data, tmp_path, monkeypatch):
    import space_peft.erasing as erasing

    given, select = [], erasing.select_anchors
    monkeypatch.setattr(erasing, "select_anchors", lambda *a, **k: given.append(k) or select(*a, **k))
    model, processor = load_demo_model()
    options = {"resume": True, "progress": False}
    places = [{"cache_dir": False}, {"cache_dir": str(tmp_path / "cache")}, {"cache_dir": False, "templates": ("{}",)}]
    for selection in places:
        anchors = erasing.make_anchors(
            "fox", data[0], model, processor, [], DEMO_QUESTIONS, 2, 0, quick(tmp_path), selection=selection, **options
        )
    # Where embeddings are kept changes nothing, so that the second call had nothing to do.
    assert [call["cache_dir"] for call in given] == [False, False] and given[1]["templates"] == ("{}",)
    assert anchor_info(anchors)["job"]["selection"] == {"templates": ["{}"]} and anchor_info(anchors)["templates"] == [
        "{}"
    ]


def test_anchors_of_other_questions_pictures_or_weights_are_not_taken(data, tmp_path, monkeypatch):
    import space_peft.erasing as erasing

    made, select = [], erasing.select_anchors
    monkeypatch.setattr(erasing, "select_anchors", lambda *a, **k: made.append(k) or select(*a, **k))
    (tmp_path / "pool").mkdir()
    paths = [str(tmp_path / "pool" / f"{number}.png") for number in range(4)]
    for path, row in zip(paths, data[0]):
        row["image"].save(path)
    pool = Dataset.from_dict({"image": paths}).cast_column("image", Image())
    model, processor = load_demo_model()

    def again(questions=DEMO_QUESTIONS):
        erasing.make_anchors(
            "fox", pool, model, processor, [], questions, 2, 0, quick(tmp_path), selection={"cache_dir": False},
            resume=True, progress=False,
        )  # fmt: skip
        return len(made)

    assert [again(), again()] == [1, 1]
    assert again(dataclasses.replace(DEMO_QUESTIONS, open=DEMO_QUESTIONS.open[:1])) == 2
    assert [again(), again()] == [3, 3]
    data[0][9]["image"].save(paths[0])  # The pool's fingerprint is the same.
    assert [again(), again()] == [4, 4]
    model.get_submodule("model.language_model.layers.1.self_attn.q_proj").weight.data[-1, -1] += 1
    assert [again(), again()] == [5, 5]
    processor.image_processor.image_mean = [0.4, 0.4, 0.4]
    assert again() == 6


def test_what_is_missing_is_said_before_anything_is_done(data, tmp_path):
    with pytest.raises(ValueError, match="either `pool`.*or `anchors`"):
        job(tmp_path, data, pool=None)
    with pytest.raises(ValueError, match="nothing says what must not change"):
        job(tmp_path, data, retain_dataset=None)
    with pytest.raises(ValueError):
        job(tmp_path, data, concept=" ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("p", "said"), [([0.01, 0.03], "p = 0.020 on average. It may not know"), ([0.9, 0.2], "p = 0.550")]
)
def test_the_summary_says_how_well_the_name_is_known(p, said, tmp_path):
    anchors = Dataset.from_dict({"p_name_after": p})
    card_data = SimpleNamespace(seconds={"anchors": 61.7, "erase": 239.0, "load": 8})
    trainer = SimpleNamespace(
        args=quick(tmp_path), report=None, certificate=None, concept="quasar", card_data=card_data
    )
    text = Erasure(trainer, anchors).summary()
    assert "It took 5 min: loading 8 s, anchors 62 s, erasing 4 min." in text
    assert f"2 anchors 'quasar' with {said}" in text and ("may not know" in text) == (p[0] < 0.1)
    assert "anchors 'quasar'" not in Erasure(trainer, Dataset.from_dict({"score": [1.0]})).summary()


@pytest.mark.parametrize("after, failed", [(1.0, True), (0.5, True), (0.0, False)])
def test_the_summary_says_first_that_an_erasure_failed(after, failed, tmp_path):
    def scores(value):
        return {key: {"value": None, "n": 0} for key in KEYS} | {"forget": {"value": value, "n": 4}}

    report = ErasureReport("fox", scores(1.0), scores(after))
    assert report.verdict == ("erased" if not failed else "failed" if after == 1.0 else "partly")
    assert ErasureReport("fox", scores(1.0), scores(None) | {"forget": {"value": None, "n": 0}}).verdict == "unknown"
    # Nothing was erased where nothing was known.
    idle = ErasureReport("fox", scores(0.0), scores(0.0))
    trainer = SimpleNamespace(args=quick(tmp_path), report=idle, certificate=None, concept="fox")
    text = Erasure(trainer, Dataset.from_dict({"p_name_after": [0.2, 0.3]})).summary()
    assert idle.verdict == "not known before" and text.startswith(
        "NOTHING SHOWN: 'fox' was named on 0% of 4 test pictures"
    )
    assert "space-peft push" not in text
    trainer = SimpleNamespace(args=quick(tmp_path), report=report, certificate=None, concept="fox")
    text = Erasure(trainer, Dataset.from_dict({"p_name_after": [0.2, 0.3]})).summary()
    assert (
        text.startswith(f"NOT ERASED: 'fox' is still named on {after:.0%} of 4 test pictures (100% before)") == failed
    )
    assert (
        ("space-peft push" in text) != failed and ("space-peft merge" in text) != failed and report.to_table() in text
    )


def test_a_model_is_loaded_in_float32_on_a_cpu_unless_asked_otherwise():
    if torch.cuda.is_available():
        pytest.skip("on a GPU it is loaded as saved")
    assert load_model(demo_model_path()).dtype == torch.float32
    assert load_model(demo_model_path(), dtype=torch.bfloat16).dtype == torch.bfloat16


# Several names


def several(folder, data, concepts, **options):
    given = {
        "pool": data[0], "retain_dataset": data[1][:40], "questions": DEMO_QUESTIONS, "k": 2, "refine_steps": 1,
        "args": quick(folder, max_steps=1, save_strategy="steps"), "progress": False, "peft_config": SpaceLoraConfig(r=2),
    }  # fmt: skip
    model, processor = load_demo_model()
    return erase_several(model, concepts, processor=processor, **{**given, **options})


@pytest.mark.slow
def test_several_names_are_erased_one_after_another_into_one_adapter(data, tmp_path, capsys):
    first = several(tmp_path, data, ["fox"])
    capsys.readouterr()
    both = several(tmp_path, data, ["fox", "lemon"], progress=True)  # goes on after the first
    shown = capsys.readouterr().err
    assert "space-peft: erasing 'lemon', 2 of 2\n" in shown and "'fox'" not in shown
    assert [number for number, _ in stage_lines(shown)] == [f"[{number}/6" for number in range(1, 7)]
    assert [own["concept"] for own in both.ledger.requests] == ["fox", "lemon"]
    assert both.reports() == {} and "2. 'lemon': 1 steps" in both.summary() and both.to_dict()["requests"]
    again = PeftModel.from_pretrained(load_demo_model()[0], tmp_path)
    folded = ErasureLedger(tmp_path / "requests").fold(load_demo_model()[0])
    merged, wanted = again.merge_and_unload().state_dict(), folded.state_dict()
    changed = [
        name for name, weight in load_demo_model()[0].state_dict().items() if not torch.equal(weight, wanted[name])
    ]
    assert changed and changed == [
        n for n, w in load_demo_model()[0].state_dict().items() if not torch.equal(w, merged[n])
    ]
    for name in changed:
        torch.testing.assert_close(merged[name], wanted[name], rtol=1e-4, atol=1e-6)
    assert len(first.ledger) == 1 and (tmp_path / "space_ledger.json").is_file()
    # What the summary says to do next can be done: the folders of the requests are no reason to refuse the adapter.
    for said in (
        "evaluate --adapter",
        "attack --adapter",
        f"merge {tmp_path} ",
        f"push {tmp_path} ",
        "verify",
        "undo ",
    ):
        assert said in both.summary()
    assert (tmp_path / "requests" / "001" / "training_args.bin").is_file() and not list(tmp_path.rglob("optimizer.pt"))
    assert merge_adapter(tmp_path, tmp_path / "merged", base_model=demo_model_path()).is_dir()
    (tmp_path / "staged").mkdir()
    stage(tmp_path, tmp_path / "staged", base_model="org/demo")
    assert (tmp_path / "staged" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("concepts", "options", "said"),
    [
        (["lemon"], {}, "holds the requests \\['fox'\\].*not the first of \\['lemon'\\]"),
        (["fox"], {"aliases": {"fox": ["vixen"]}}, "holds the requests"),
        (["fox", "lemon"], {}, "served by another model"),
        (["fox", "fox"], {}, "one or more different names"),
        ([], {}, "one or more different names"),
    ],
)
def test_requests_of_something_else_are_not_gone_on_with(data, tmp_path, concepts, options, said):
    (tmp_path / "requests").mkdir()
    request = {"concept": "fox", "aliases": [], "method": "SPACE", "steps": 1, "date": "2026-01-01"}
    ledger = {"format": "space_peft.ledger.v1", "requests": [request]}
    (tmp_path / "requests" / "space_ledger.json").write_text(json.dumps(ledger))
    (tmp_path / "requests" / "space_base.json").write_text(json.dumps({"dtype": "float32", "exact": {}, "rounded": {}}))
    with pytest.raises(ValueError, match=said):
        several(tmp_path, data, concepts, **options)


def test_of_requests_the_trainers_own_files_alone_are_harmless():
    harmless = ["training_args.bin", "requests/001/training_args.bin", "002/checkpoint-4/optimizer.pt"]
    unsafe = ["requests/001/model.bin", "mine/training_args.bin", "001/002/training_args.bin", "requests/x.py"]
    assert unsafe_files([*harmless, *unsafe]) == unsafe


def test_nothing_given_for_a_name_is_passed_over(data, tmp_path):
    with pytest.raises(ValueError, match="`aliases` holds 'Fox', which is none of the names to erase: \\['fox'\\]"):
        several(tmp_path, data, ["fox"], aliases={"Fox": ["vixen"]})
    with pytest.raises(ValueError, match="`probes` holds 'owl'"):
        several(tmp_path, data, ["fox"], probes={"owl": []})
    with pytest.raises(TypeError, match="the string 'fox'"):
        several(tmp_path, data, "fox")
    assert not list(tmp_path.iterdir())


def test_other_settings_for_names_that_were_erased_are_said(data, tmp_path):
    (tmp_path / "requests").mkdir()
    request = {"concept": "fox", "aliases": [], "method": "SPACE", "steps": 1, "date": "2026-01-01"}
    ledger = {"format": "space_peft.ledger.v1", "requests": [request]}
    (tmp_path / "requests" / "space_ledger.json").write_text(json.dumps(ledger))
    settings = settings_of(quick(tmp_path, max_steps=1), SpaceLoraConfig(r=2)) | {"k": 2, "refine_steps": 60}
    base = {"weights": base_checksum(load_demo_model()[0]), "settings": {"fox": settings}}
    (tmp_path / "requests" / "space_base.json").write_text(json.dumps(base))
    # There is no adapter to go on from.
    with (
        pytest.warns(UserWarning, match="'fox' was erased with other settings \\(refine_steps\\)"),
        pytest.raises(ValueError),
    ):
        several(tmp_path, data, ["fox", "lemon"])


def test_an_adapter_of_another_run_is_not_written_over(data, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="an adapter of another run"):
        several(tmp_path, data, ["fox"])


# The command


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: org/model\nconcept: Eiffel Tower\naliases: [Tour Eiffel]\npool: org/pool\nlearning_rate: 1e-3\n"
        f"output_dir: {tmp_path}\nlora_r: 4\nmax_steps: 7\ntarget: all\nuse_cpu: true\n"
    )
    config, flags = take_config(["--config", str(path), "--max_steps", "9", "--strength", "0.1"])
    (arguments, adapter, _, _), args = parse_run(flags, config)
    assert (arguments.model, arguments.concept, arguments.aliases) == ("org/model", "Eiffel Tower", ["Tour Eiffel"])
    assert (args.max_steps, args.target, args.learning_rate) == (9, "all", 1e-3)
    config = get_space_config(adapter)
    assert (config.r, config.lora_alpha, config.strength, config.max_rank) == (4, 8, 0.1, "auto")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("concpet: fox\n", "'concpet' is not an option; did you mean --concept?"),
        ("[1, 2]\n", "holds a list"),
        ("a: [\n", "not YAML"),
        ("model: /\nconcept: fox\n", "missing: --pool, --retain or --statistics"),
        ("model: /\nconcept: fox\npool: nowhere.parquet\nretain: r\n", "nowhere.parquet"),
    ],
)
def test_a_bad_file_exits_with_2_and_says_why(text, said, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["erase", "--config", str(path), "--output_dir", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["auto", "all", "12"])
def test_ranks_as_words_and_numbers(given):
    assert get_space_config(AdapterArguments(max_rank=given)).max_rank == {"all": None, "12": 12}.get(given, given)


def test_ranks_that_are_none_of_these_are_refused():
    with pytest.raises(ValueError, match="`max_rank` is 'some'"):
        get_space_config(AdapterArguments(max_rank="some"))


def test_one_name_in_a_file_is_a_list_of_one():
    values = {
        "model": "m",
        "concept": "fox",
        "more_concepts": "owl",
        "aliases": None,
        "lora_target_modules": ".*q_proj",
    }
    (arguments, adapter, _, _), _ = parse_run([], ConfigFile("run.yaml", {**values, "output_dir": "out"}))
    assert (arguments.more_concepts, arguments.aliases) == (["owl"], []), "not each letter"
    assert get_space_config(adapter).target_modules == ".*q_proj"


def test_modules_are_endings_or_one_pattern():
    assert get_space_config(AdapterArguments(lora_target_modules=[".*q_proj"])).target_modules == ".*q_proj"
    assert get_space_config(AdapterArguments(lora_target_modules=["q", "v"])).target_modules == {"q", "v"}


def test_pictures_from_a_folder_of_files(demo_images, tmp_path):
    for i in range(3):
        demo_images[i]["image"].save(tmp_path / f"{i}.png")
    images = load_pictures(str(tmp_path))
    assert len(images) == 3 and images[0]["image"].size == demo_images[0]["image"].size
    for name in ("test_1.png", "train.png"):  # Not of another split.
        demo_images[0]["image"].save(tmp_path / name)
    assert len(load_pictures(str(tmp_path))) == 5
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "texts.parquet")
    with pytest.raises(ValueError, match="expected a column `image`"):
        load_pictures(str(tmp_path / "texts.parquet"))


@pytest.mark.slow
def test_the_command_from_a_yaml_file(data, demo_images, tmp_path, capsys):
    public, retained = data
    public.save_to_disk(tmp_path / "pool")
    Dataset.from_list(retained[:40]).save_to_disk(tmp_path / "retain")
    (tmp_path / "foxes").mkdir()
    for i, row in enumerate(row for row in demo_images if row["name"] == "fox"):
        row["image"].save(tmp_path / "foxes" / f"{i}.png")
    options = {
        "model": str(demo_model_path()), "concept": "fox", "pool": str(tmp_path / "pool"), "retain": str(tmp_path / "retain"),
        "test_images": str(tmp_path / "foxes"), "output_dir": str(tmp_path / "out"), "anchors": 2, "refine_steps": 1,
        "max_steps": 1, "use_cpu": True, "report_to": "none", "canary_items": 1,
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(options))  # JSON is YAML
    capsys.readouterr()
    code, (out, err) = main(["erase", "--config", str(path)]), capsys.readouterr()
    assert [number for number, _ in stage_lines(err)] == [f"[{number}/12" for number in range(1, 13)]
    # Nothing but stages and notes, none of them with a path or a line of source; bars are not drawn in a file.
    assert [line for line in err.splitlines() if not line.startswith(("[", "note: "))] == [] and ".py" not in err
    assert max(map(len, ErasureReport.load(tmp_path / "out").to_table().splitlines())) <= 100
    # Of one step nobody can expect much; whoever goes on by the exit code must not publish it.
    assert "target still named" in out and code == ("NOT ERASED" in out)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "report.json", "space_certificate.json", "anchors", "anchors.png"} <= names
