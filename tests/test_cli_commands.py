"""What all commands share (help, JSON, YAML, exit codes), and the commands that make anchors, ask and attack."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, load_from_disk
from datasets import Image as ImageFeature
from peft import LoraConfig, get_peft_model
from PIL import Image

import space_peft
from space_peft.anchors import anchor_info
from space_peft.attacks.kinds import KINDS
from space_peft.attacks.material import Material
from space_peft.attacks.report import AttackReport
from space_peft.cli import erased, main
from space_peft.cli.attack_run import AttackRun
from space_peft.cli.commands import CONFIGURABLE, FROM_DATACLASSES, _parsers
from space_peft.cli.options import called, refuse_misspelt, with_config
from space_peft.data.questions import DEFAULT_QUESTIONS, questions_of
from space_peft.demo import demo_model_path, load_demo_model
from space_peft.evaluation import ErasureReport
from space_peft.evaluation.named_images import NamedImages, named_probes, split_by_name
from space_peft.records.measured import other_weights


COMMANDS = _parsers()[1]


# What all share


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert 8 <= len(lines) <= 40 and max(map(len, lines)) <= 80, "\n".join(lines)
    text = "\n".join(lines)
    assert "--json" in text and lines[0].startswith(f"usage: space-peft {name} ")
    assert ("--config" in text) == (name in (*CONFIGURABLE, *FROM_DATACLASSES))


def test_help_of_the_command_itself_fits_a_screen(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80


def test_all_options_of_the_trainer_are_shown_when_asked_for(capsys):
    with pytest.raises(SystemExit):
        main(["erase", "--help-all"])
    text = capsys.readouterr().out
    assert "--gradient_checkpointing" in text and "--lora_dropout" in text


def configured(tmp_path, name, text, argv):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    parser, commands = _parsers()
    return parser.parse_args([name, *with_config(commands[name], [*argv, "--config", str(path)], name)])


def test_flags_win_over_the_file_in_whatever_way_they_are_written(tmp_path):
    text = "model: org/model\nrank: 4\nsteps: 7\ntarget_modules: [q_proj, v_proj]\ntime: true\nstrength: null\n"
    args = configured(tmp_path, "plan", text, [])
    assert (args.model, args.lora_r, args.steps, args.time, args.strength) == ("org/model", 4, 7, True, 0.003)
    assert args.lora_target_modules == ["q_proj", "v_proj"]
    args = configured(tmp_path, "plan", text, ["mine", "--rank=16", "--target-modules", "o_proj", "--steps", "9"])
    assert (args.model, args.lora_r, args.lora_target_modules, args.steps) == ("mine", 16, ["o_proj"], 9)
    # Two flags of one setting, and a flag that may be repeated.
    text = "folder: run\nrepo: me/run\nprivate: true\nretries: 2\n"
    assert configured(tmp_path, "push", text, []).private is True
    assert configured(tmp_path, "push", text, ["--public"]).private is False
    text = "endpoint: http://x\nconcept: fox\nimages: here\nalias: [-red, vixen]\n"
    assert configured(tmp_path, "probe", text, []).alias == ["-red", "vixen"]
    assert configured(tmp_path, "probe", text, ["--alias", "tod"]).alias == ["tod"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: demo\nrnak: 4\n", "sets 'rnak', which is not an option; did you mean rank"),
        ("model: demo\njson: {a: 1}\n", "sets 'json' to the dict"),
        ("model: demo\nrank: [1, 2]\n", "sets 'rank' to the list [1, 2]; expected one value"),
        ("model: demo\ntime: soon\n", "sets 'time' to 'soon'; expected true or false"),
        ("- model\n", "holds a list"),
        ("model: demo\nrank: many\n", "invalid int value: 'many'"),
        ("model: demo\ndevice: tpu\n", "invalid choice: 'tpu'"),
    ],
)
def test_a_bad_file_exits_with_2_and_one_line(tmp_path, text, said, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    try:
        code = main(["plan", "--config", str(path)])
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and said in capsys.readouterr().err


def test_json_goes_to_a_file_or_alone_to_the_output(tmp_path, capsys):
    plan = ["plan", "demo", "--device", "cpu", "--dtype", "float32"]
    assert main([*plan, "--json", str(tmp_path / "deep" / "plan.json")]) == 0
    assert "modules get the adapter" in capsys.readouterr().out
    assert main([*plan, "--json", "-"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone == json.loads((tmp_path / "deep" / "plan.json").read_text()) and alone["refused"] == []
    assert main([*plan, "--json", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_what_is_printed_meanwhile_does_not_mix_with_the_json(monkeypatch, capsys, tmp_path):
    import space_peft.hub_cards.merge as merging

    def chatty(adapter, output, base_model=None):
        print("loading")
        return output

    monkeypatch.setattr(merging, "merge_adapter", chatty)
    assert main(["merge", str(tmp_path), "b", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"folder": "b"} and "loading" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["eras", "--model", "demo"], "space-peft: there is no command 'eras'; did you mean 'erase'?"),
        (["zzz"], "space-peft: there is no command 'zzz'; space-peft --help lists them all."),
        # What is missing is not said while what it was meant for is there.
        (["attack", "--adaptr", ".", "--concept", "fox", "--images", "."],
         "space-peft attack: --adaptr is not an option; did you mean --adapter?"),
        (["bench", "--suite", "people", "--model", "demo", "--methods", "ga", "npoo"],
         "space-peft bench: a method cannot be 'npoo'; did you mean 'npo'?"),
        (["bench", "--suite", "mllmuu", "--model", "demo", "--methods", "ga"],
         "space-peft bench: the suite's name cannot be 'mllmuu'; did you mean 'mllmu'?"),
    ],
)  # fmt: skip
def test_a_mistyped_word_is_one_line_with_the_nearest(argv, said, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err == f"{said}\n"


def test_a_value_may_begin_with_dashes_where_argparse_takes_it(capsys):
    refuse_misspelt(["--concept", "--not a flag", "--", "--nor this"], COMMANDS["audit"], "audit")
    with pytest.raises(ValueError, match="--step=1|--step is not an option; did you mean --steps"):
        refuse_misspelt(["--step=1"], COMMANDS["audit"], "audit")


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"space-peft {space_peft.__version__}\n"


def test_the_embedded_model_is_a_base_model_by_its_name(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(
        "space_peft.hub_cards.merge.merge_adapter", lambda *args, **options: given.append(options) or args[1]
    )
    (tmp_path / "adapter").mkdir()
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base-model", "demo"]) == 0
    assert given == [{"base_model": str(demo_model_path())}]


def test_what_to_type_is_a_path_where_the_name_is_not_found(monkeypatch):
    monkeypatch.setattr("sys.argv", ["env/bin/space-peft", "demo"])
    monkeypatch.setenv("PATH", "")
    assert called() == "env/bin/space-peft"
    monkeypatch.setattr("sys.argv", ["/usr/lib/pytest"])
    assert called() == "space-peft"


def test_a_merge_says_what_to_do_next(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("space_peft.hub_cards.merge.merge_adapter", lambda adapter, output, base_model=None: output)
    assert main(["merge", str(tmp_path), "merged"]) == 0
    out = capsys.readouterr().out
    for said in (
        "in merged\n",
        "vllm serve merged;",
        "space-peft probe --endpoint",
        "evaluate --merged merged --base-model",
    ):
        assert said in out


# Pictures with names


def pictures(names, column="name"):
    images = [Image.new("RGB", (8, 8), (number * 20, 0, 0)) for number in range(len(names))]
    return Dataset.from_dict({"image": images, column: names}).cast_column("image", ImageFeature())


def test_pictures_are_sorted_by_their_names(caplog):
    found = split_by_name(pictures(["dog", "Dog", "hot dog", "cat", "pup"]), "dog", ["pup"])
    assert len(found.target) == 3 and found.other_names == ["cat"]
    # A name that only holds the target's may be either: such pictures are nobody's.
    assert len(split_by_name(pictures(["big dog", "cat"]), "dog").target) == 1
    assert len(split_by_name(pictures(["a", "b"], column="id"), "dog").target) == 2
    classes = pictures([1, 0, 1]).cast(Features({"image": ImageFeature(), "name": ClassLabel(names=["cat", "dog"])}))
    assert len(split_by_name(classes, "dog").target) == 2
    with pytest.raises(
        ValueError, match="none of the 2 pictures is named 'dog' in the column 'name': it holds cat, hen"
    ):
        split_by_name(pictures(["hen", "cat"]), "dog")
    with pytest.raises(ValueError, match="picture 1 has no name"):
        split_by_name(pictures(["dog", None]), "dog")
    with pytest.raises(ValueError, match="expected a column `image`"):
        split_by_name(Dataset.from_dict({"name": ["dog"]}), "dog")
    # Numbers say that not all are the target's, and not which.
    with pytest.raises(
        ValueError, match="the column 'label' of the pictures holds Value.'int64'. .0, 1., which are not names"
    ):
        split_by_name(pictures([0, 1, 1], column="label"), "dog")
    assert len(split_by_name(pictures([3, 3], column="label"), "dog").target) == 2


def test_probes_of_named_pictures_ask_about_the_others_too():
    found = split_by_name(pictures(["dog", "cat", "hen", "cat"]), "dog")
    probes = {probe.label: probe for probe in named_probes("dog", found, questions=DEFAULT_QUESTIONS, siblings=["cat"])}
    assert len(probes["forget"].rows) == 1 and len(probes["retain"].rows) == 3
    assert [row["answer"] for row in probes["siblings"].rows] == ["cat", "cat"]
    asked = [row["question"] for row in probes["retain_sentences"].rows]
    assert len(asked) == 3 and set(asked) <= set(DEFAULT_QUESTIONS.open_held_out)
    with pytest.raises(ValueError, match="no picture of the siblings \\['wolf'\\]"):
        named_probes("dog", found, questions=DEFAULT_QUESTIONS, siblings=["wolf"])


def test_every_attack_can_be_made_and_says_what_it_lacks():
    image = Image.new("RGB", (8, 8))
    poor = Material("fox", NamedImages((image,)))
    lacking = {name: kind.needs.lacks(poor) for name, kind in KINDS.items()}
    assert lacking["audit"] is None and lacking["perturbation"] is None
    assert lacking["relearning"] == "which needs pictures of the concept: 2 or more, got 1"
    assert lacking["confirmation"] == "which needs control names: 1 or more, got 0"
    rich = Material("fox", NamedImages((image,) * 6, (("owl", image), ("hen", image), ("cow", image))))
    assert not [name for name, kind in KINDS.items() if kind.needs.lacks(rich)]
    asked = Material("fox", rich.images, questions=questions_of("What is it?"))
    assert "no questions of the kind `confirm`" in KINDS["confirmation"].needs.lacks(asked)


# Asking and attacking: an adapter of chance does for what the commands do with it


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    torch.manual_seed(0)
    model = load_demo_model()[0]
    config = LoraConfig(r=2, target_modules=[r"q_proj", "v_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(model, config)
    model.peft_config["default"].base_model_name_or_path = str(demo_model_path())
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def named(demo_images, tmp_path_factory):
    """A saved dataset of three foxes and three other things."""
    names = demo_images["name"]
    rows = [number for number, name in enumerate(names) if name == "fox"][:3]
    rows += [names.index(name) for name in ("owl", "lemon", "castle")]
    folder = tmp_path_factory.mktemp("named")
    demo_images.select(rows).select_columns(["image", "name"]).save_to_disk(folder)
    return folder


def judged(command, adapter, named, output, *more):
    where = ["--adapter", str(adapter), "--concept", "fox", "--images", str(named), "--output", str(output)]
    return main([command, *where, *map(str, more)])


def test_an_adapter_is_asked_about_pictures(adapter, named, tmp_path, capsys):
    other = tmp_path / "other"
    # Beside its adapter, a report is noted as that one's.
    adapter = folder = shutil.copytree(adapter, tmp_path / "own")
    question = ["--question", "What is this? Answer with the name only."]
    code = judged("evaluate", adapter, named, folder, *question, "--siblings", "owl", "--json", "-")
    out, err = capsys.readouterr()
    printed = json.loads(out)
    report = json.loads((folder / "report.json").read_text())
    verdict = printed.pop("verdict")
    assert printed == report and report["concept"] == "fox"
    # An adapter of chance erases nothing, which the exit code says.
    assert (code, verdict) == (
        0 if report["after"]["forget"]["value"] <= 0.05 else 1,
        ErasureReport.load(folder).verdict,
    )
    assert code == 1 and "named on 100% of its pictures before, on " in err
    assert (report["before"]["forget"]["n"], report["after"]["siblings"]["accuracy"]["n"]) == (3, 1)
    assert report["before"]["forget"]["value"] > 0.5, "the embedded model knows its foxes"
    assert report["settings"]["images"] == {"of": str(named), "target": 3, "others": 3}
    assert len((folder / "answers_after.jsonl").read_text().splitlines()) > 6
    assert list(json.loads((folder / "space_measured.json").read_text())) == ["report.json"]
    assert not other_weights(folder)
    # In a folder with another adapter it would be taken for that one's.
    model = get_peft_model(load_demo_model()[0], LoraConfig(r=1, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(other)
    assert judged("evaluate", adapter, named, other, *question) == 2
    assert "holds a different adapter" in capsys.readouterr().err and not (other / "report.json").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--attacks", "zzz"], "there is no attack 'zzz'; expected some of audit, relearning, "),
        (["--attacks", "hint"], "there is no attack 'hint'; did you mean 'hints'?\n"),
        (
            ["--question", "What is this?", "--attacks", "confirmation", "perturbation"],
            "confirmation is left out, for which there are no questions",
        ),
        (["--aliases", " "], "alias 0: the name"),
        (["--images", "nowhere.parquet"], "nowhere.parquet"),
        (["--concept", "wolf"], "none of the 6 pictures is named 'wolf'"),
        (["--adapter", "/nowhere/at-all"], "there is no file or folder '/nowhere/at-all'"),
    ],
)
def test_bad_input_of_an_attack_exits_with_2(adapter, named, tmp_path, capsys, more, said):
    assert judged("attack", adapter, named, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("space-peft attack: ") and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_merged_model_needs_its_original(named, tmp_path, capsys):
    which = ["--merged", str(demo_model_path()), "--concept", "fox", "--images", str(named)]
    assert main(["evaluate", *which, "--output", str(tmp_path / "out")]) == 2
    assert "--base-model is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--concept", "fox", "--images", str(named)])
    assert ended.value.code == 2


def test_attacks_go_on_where_a_killed_call_was(adapter, named, tmp_path, monkeypatch, capsys):
    made = []

    def watched(name):
        attack = KINDS[name].make

        def run(*given):
            made.append(name)
            if name == "perturbation" and made.count(name) == 1:
                raise KeyboardInterrupt
            return attack(*given)

        return run

    quick = ["--attacks", "quantization", "perturbation", "--repeats", "1"]
    for name in ("quantization", "perturbation"):
        monkeypatch.setattr(KINDS[name], "make", staticmethod(watched(name)))
    with pytest.raises(KeyboardInterrupt):
        judged("attack", adapter, named, tmp_path, *quick)
    assert list(json.loads((tmp_path / "attacks.json").read_text())["attacks"]) == ["quantization"]
    assert judged("attack", adapter, named, tmp_path, *quick) == 0
    assert made == ["quantization", "perturbation", "perturbation"]
    out, err = capsys.readouterr()
    assert "perturb" in out
    # A line for each part, with what came of it.
    lines = [re.sub(r"\d\.\d\d", "X", re.sub(r", [\d.]+ s$", "", line)) for line in err.splitlines()]
    assert lines[-4:] == [
        "[1/4] loaded the model",
        f"[2/4] {KINDS['quantization'].label}: X (before X, control X), made by an earlier call",
        "[3/4] named under perturbations: X (before X, control X)",
        f"[4/4] saved to {tmp_path}",
    ]
    assert (tmp_path / "pictures" / "attacks.png").is_file()
    # Another seed is another job, of which nothing is done.
    assert judged("attack", adapter, named, tmp_path, *quick, "--seed", "1", "--attacks", "perturbation") == 0
    assert list(json.loads((tmp_path / "attacks.json").read_text())["attacks"]) == ["perturbation"]
    assert made[3:] == ["perturbation"] and "made again" in capsys.readouterr().err
    # The result alone is on the output.
    assert judged("attack", adapter, named, tmp_path, "--attacks", "perturbation", "--repeats", "1", "--json", "-") == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)["attacks"]) == ["perturbation"] and "[2/3] named under perturbations" in err


@pytest.mark.slow
def test_all_attacks_and_a_merged_model(adapter, named, tmp_path, capsys):
    few = ["--steps", "2", "--restarts", "1", "--relearn-steps", "0", "1", "--repeats", "1"]
    assert judged("attack", adapter, named, tmp_path / "attack", *few) == 0
    report = json.loads((tmp_path / "attack" / "attacks.json").read_text())
    assert set(report["attacks"]) == set(KINDS)
    assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 0
    which = ["--merged", str(tmp_path / "merged"), "--base-model", str(demo_model_path()), "--concept", "fox"]
    code = main(["evaluate", *which, "--images", str(named), "--output", str(tmp_path / "a")])
    assert code == judged("evaluate", adapter, named, tmp_path / "b")
    merged, apart = (json.loads((tmp_path / name / "report.json").read_text()) for name in "ab")
    assert merged["before"] == apart["before"] and merged["after"]["forget"] == apart["after"]["forget"]


def test_a_merged_model_is_loaded_as_it_is_asked_for(monkeypatch):
    given = []
    monkeypatch.setattr(erased, "load_pair", lambda place, dtype=None: given.append((place, dtype)) or (None, None))
    erased.load_judged(SimpleNamespace(adapter=None, merged="m", base_model="b", dtype="bfloat16"))
    assert given == [("m", "bfloat16"), ("b", "bfloat16")]


# An audit beside other attacks


@pytest.fixture
def audited(monkeypatch, tmp_path):
    """Audits a model that is only called by its name; returns the attacks that are in the folder afterwards."""
    import space_peft.cli.audit as audit

    entry = {"value": 0.5, "control": None, "before": 1.0, "n": 1, "meaning": "m"}
    made = SimpleNamespace(name="audit", to_dict=lambda: {**entry, "details": {}})
    monkeypatch.setattr(audit, "load_attacked", lambda adapter, *a, **k: (adapter, None))
    monkeypatch.setattr(audit, "adapter_digest", lambda model: model)
    monkeypatch.setattr(audit, "audit_concept", lambda *a, **k: made)
    monkeypatch.setattr("space_peft.attacks.report.plot_attacks", lambda *a, **k: None)
    monkeypatch.setattr(erased, "base_checksum", lambda model: "the base model's")

    def run(adapter):
        options = SimpleNamespace(
            adapter=adapter, concept="fox", output=str(tmp_path), images=None, base_model=None, dtype=None, restarts=1,
            control_name=None, question=None, steps=1, seed=0,
        )  # fmt: skip
        return list(audit.run_audit(options).attacks)

    attack = {**entry, "details": {}}
    AttackReport("fox", {"audit": attack, "hints": attack}).save(tmp_path)
    model = erased.ErasedModel("one", None, adapter="one")
    AttackRun.read(tmp_path, "fox").note(model, {"seed": 0}, ["audit", "hints"])
    return run


def test_an_audit_of_another_erasure_does_not_stand_beside_this_ones_attacks(audited, tmp_path, capsys):
    assert audited("other") == ["audit"]
    assert "made on another model; they are replaced" in capsys.readouterr().err
    assert json.loads((tmp_path / "space_attacks_run.json").read_text())["job"] is None


def test_an_audit_is_not_taken_for_that_of_the_attacks(audited, tmp_path, capsys):
    assert audited("one") == ["audit", "hints"]
    err = capsys.readouterr().err
    assert "[2/3] an image found that makes it say the name: 0.50 (before 1.00), " in err and "[3/3] saved to" in err
    # Made with its own settings: the attacks make theirs again.
    kept = AttackRun.read(tmp_path, "fox").of_the_same_job({"seed": 0})
    assert list(kept.attacks) == ["hints"]
    AttackRun.read(tmp_path, "fox").void()
    assert AttackRun.read(tmp_path, "fox").of_the_same_job({"seed": 0}) is None


# Anchors


def test_anchors_are_made_shown_and_taken_up_by_an_erasure(demo_images, tmp_path, monkeypatch, capsys):
    import space_peft.erasing as erasing

    names = demo_images["name"]
    rows = [names.index(name) for name in ("owl", "lemon", "castle", "guitar")]
    demo_images.select(rows).select_columns(["image", "name"]).save_to_disk(tmp_path / "pool")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {demo_model_path()}\nconcept: fox\npool: {tmp_path / 'pool'}\nanchors: 3\nrefine_steps: 1\n"
        f"output_dir: {tmp_path / 'out'}\nmax_steps: 1\nuse_cpu: true\n"
    )
    assert main(["anchors", "--config", str(path), "--anchors", "2", "--json", str(tmp_path / "anchors.json")]) == 0
    assert "2 anchors are in" in capsys.readouterr().out
    kept = load_from_disk(tmp_path / "out" / "anchors")
    assert len(kept) == 2 and anchor_info(kept)["stage"] == "refined"
    content = json.loads((tmp_path / "anchors.json").read_text())
    assert [row["pool_row"] for row in content["anchors"]] == kept["pool_row"] and "image" not in content["anchors"][0]
    with Image.open(tmp_path / "out" / "anchors.png") as sheet:
        assert sheet.width > 300
    # The same options again, as `erase` passes them: nothing is selected.
    monkeypatch.setattr(erasing, "select_anchors", lambda *a, **k: pytest.fail("anchors were selected again"))
    assert main(["anchors", "--config", str(path), "--anchors", "2"]) == 0


@pytest.mark.parametrize("more", [["--pool", "nowhere.parquet"], [], ["--pool", "x.parquet", "--more_concepts", "owl"]])
def test_bad_input_for_anchors_exits_with_2(tmp_path, capsys, more):
    assert main(["anchors", "--model", "m", "--concept", "fox", "--output_dir", str(tmp_path / "out"), *more]) == 2
    assert capsys.readouterr().err.startswith("space-peft anchors: ") and not (tmp_path / "out").exists()
