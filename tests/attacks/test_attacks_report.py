"""One report of all attacks: strict, the same after saving, drawn whole or not at all."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from space_peft.attacks import AttackReport, RelearningPoint, RelearningResult, plot_attacks
from space_peft.attacks.audit import AuditResult, Search
from space_peft.attacks.confirmation import ConfirmationResult
from space_peft.attacks.hints import HintResult
from space_peft.attacks.kinds import KINDS
from space_peft.attacks.linear_probe import LayerProbe, LinearProbeResult, ProbeScore
from space_peft.attacks.perturbation import PerturbationResult
from space_peft.attacks.quantization import QuantizationResult
from space_peft.attacks.soft_prompt import SoftPromptResult, SoftSearch
from space_peft.cli import main
from space_peft.cli.pictures import load_images
from space_peft.demo import demo_model_path


def results(concept="fox", before=True):
    """One of each kind, as its attack would return it."""
    search = Search("fox", (0.25, 0.5), (None, 3), (0.1, 0.2, 0.3, 0.5), (False, True))
    points = tuple(
        RelearningPoint(images, steps, 0.1 * steps, 0.05 * steps, 0.1, 0.1, 4, 0.01)
        for images in (1, 3) for steps in (0, 10)
    )  # fmt: skip
    score = ProbeScore(0.9, 0.8)
    layers = tuple(
        LayerProbe(layer, tokens, score, score if before else None, 0.5, 0.6)
        for layer, tokens in (("vision.0", "image"), ("projector", "image"), ("language.0", "last"))
    )
    scores = {"full": {"forget": {"value": 0.0, "n": 4}}, "int4": {"forget": {"value": 0.25, "n": 4}}}
    shares = {"none": 0.0, "noise": 0.5}
    soft = SoftSearch("fox", 0.0, 0.25, (0.0, 0.1, 0.3))
    return [
        AuditResult(concept, search, search if before else None, None, ("image", "noise"), {"steps": 4}),
        RelearningResult(concept, ("wolf",), points, 1.0 if before else None, "all", 1e-4, "what is this?", 0),
        LinearProbeResult(concept, layers, 4, 20, {}),
        QuantizationResult(concept, scores, scores if before else None, 64),
        ConfirmationResult(concept, ("wolf",), 0.1, 0.2, 0.0, 0.0, 0.9 if before else None, 0.1, 8, ("is it {name}?",)),
        PerturbationResult(concept, shares, shares if before else None, 12, 0),
        HintResult(
            concept, shares, {"none": 0.0, "noise": 0.25}, shares if before else None, {}, 4, ("wolf", "owl", "cat")
        ),
        SoftPromptResult(concept, soft, soft, soft if before else None, 2, {"vectors": 4, "steps": 3}),
    ]


def test_every_attack_has_a_label_a_title_and_what_is_unknown_without_it():
    assert [type(result) for result in results()] == list(KINDS.values())
    for name, kind in KINDS.items():
        assert name == kind.name and kind.label and kind.title and isinstance(kind.is_share, bool)
        # Whether it is confirmed, the evaluation asks as well.
        assert name == "confirmation" if kind.untested is None else all(kind.untested)


@pytest.mark.slow
def test_the_attacks_do_not_load_matplotlib():
    code = "import sys, space_peft.attacks.report; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("before", [True, False])
def test_round_trip_and_picture(tmp_path, before):
    report = AttackReport.from_results("fox", results(before=before))
    path = report.save(tmp_path / "out")
    assert AttackReport.load(path) == AttackReport.load(tmp_path / "out") == report
    content = json.loads(path.read_text())
    assert set(content) == {"concept", "attacks", "versions"}
    for entry in content["attacks"].values():
        assert set(entry) == {"value", "control", "before", "n", "meaning", "details"}
        assert (entry["before"] is not None) == before
    with Image.open(tmp_path / "out" / "pictures" / "attacks.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > 600 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert not [file for file in (tmp_path / "out").rglob("*") if ".tmp" in file.name]


def test_headlines():
    attacks = AttackReport.from_results("fox", results()).attacks
    headline = {name: (entry["value"], entry["control"], entry["before"]) for name, entry in attacks.items()}
    assert headline == {
        "audit": (0.5, None, 0.5),
        "relearning": (1.0, 0.5, 1.0),
        "linear_probe": (0.9, 0.5, 0.9),
        "quantization": (0.25, 0.0, 0.25),
        "confirmation": (0.1, 0.2, 0.9),
        "perturbation": (0.5, 0.0, 0.5),
        "hints": (0.5, 0.25, 0.5),
        "soft_prompt": (0.25, 0.25, 0.25),
    }


def test_tables():
    report = AttackReport.from_results("fox", results()[:2])
    plain, markdown = report.to_table(), report.to_table(markdown=True)
    assert plain.splitlines()[1].split()[-4:] == ["0.500", "0.500", "-", "2"]
    assert (
        markdown.splitlines()[3] == "| relearned from a few images | 1.000 | 1.000 (95 %: 0.39 to 1.00) | 0.500 | 4 |"
    )
    assert len(plain.splitlines()) == 3 and len(markdown.splitlines()) == 4


@pytest.mark.parametrize(
    ("before", "after", "named", "weak"),
    [
        (0.002, 0.002, (False, False), True),
        (0.4, 0.002, (False, False), True),  # High, and yet no image that it names.
        (0.9, 0.002, (True, False), False),
        (0.05, 0.9, (False, True), False),  # Weak on the deployed model, and a find on this one.
    ],
)
def test_an_audit_that_fails_before_as_well_is_no_success(before, after, named, weak):
    searches = [Search("fox", (p,), (None,), (p,), (found,)) for p, found in zip((before, after), named)]
    result = AuditResult("fox", searches[1], searches[0], None, ("noise",), {"steps": 4})
    report = AttackReport.from_results("fox", [result, *results()[1:]])
    assert report.too_weak() == (["audit"] if weak else [])
    for table in (report.to_table(), report.to_table(markdown=True)):
        assert ("(says nothing)" in table) == weak
        assert ("does not find 'fox' in the deployed model either" in table and "--restarts" in table) == weak
    # Without the adapter's before there is nothing to compare with.
    alone = AuditResult("fox", searches[1], None, None, ("noise",), {"steps": 4})
    assert not AttackReport.from_results("fox", [alone]).too_weak()


def test_attacks_on_what_was_never_named_say_nothing():
    relearned = results()[1].to_dict()
    assert AttackReport("fox", {"relearning": {**relearned, "before": 0.0, "value": 0.0}}).too_weak() == ["relearning"]
    assert not AttackReport("fox", {"relearning": {**relearned, "before": 0.0, "value": 0.5}}).too_weak()
    # A file of anybody's: what it says of the searches may be anything.
    audit = {**results()[0].to_dict(), "before": 0.0, "value": 0.0}
    assert AttackReport("fox", {"audit": {**audit, "details": {"before": 3, "after": {"named": 1}}}}).too_weak() == [
        "audit"
    ]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_pictures_of_some_attacks(tmp_path, count):
    plot_attacks(AttackReport.from_results("fox", results()[:count]), tmp_path / "some.png")
    assert Image.open(tmp_path / "some.png").size[0] == 630 * min(count, 3)


@pytest.mark.parametrize("concept", ["a $\\frac$ b$", "_under", "x" * 300, "狐 🦊", "100% {name} \\"])
def test_pictures_of_any_name(tmp_path, concept):
    found = results(concept)
    audit = found[0]
    control = Search(concept, (0.5,), (1,), (0.5,), (True,))
    found[0] = AuditResult(concept, audit.after, audit.before, control, audit.starts, audit.settings)
    AttackReport.from_results(concept, found).save(tmp_path)
    assert AttackReport.load(tmp_path).concept == concept


def broken(change):
    content = copy.deepcopy(AttackReport.from_results("fox", results()).to_dict())
    change(content)
    return content


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("versions"), "expected the keys"),
        (lambda c: c.update(extra=1), "expected the keys"),
        (lambda c: c.update(concept=""), "`concept`"),
        (lambda c: c.update(attacks={}), "at least one"),
        (lambda c: c["attacks"].update(tickling=c["attacks"]["audit"]), "unknown 'tickling'"),
        (lambda c: c["attacks"]["audit"].pop("n"), "`attacks.audit` must have the keys"),
        (lambda c: c["attacks"]["audit"].update(value=None), "`attacks.audit.value`"),
        (lambda c: c["attacks"]["audit"].update(value=1.2), r"in \[0, 1\], got 1.2"),
        (lambda c: c["attacks"]["audit"].update(control=True), "`attacks.audit.control`"),
        (lambda c: c["attacks"]["audit"].update(n=0), "`attacks.audit.n`"),
        (lambda c: c["attacks"]["audit"].update(meaning=""), "`attacks.audit.meaning`"),
        (lambda c: c["attacks"]["audit"].update(details=[]), "`attacks.audit.details`"),
        (lambda c: c["attacks"].update(audit=3), "`attacks.audit` must have the keys"),
    ],
)
def test_loading_is_strict(tmp_path, change, message):
    (tmp_path / "attacks.json").write_text(json.dumps(broken(change)))
    with pytest.raises(ValueError, match=message):
        AttackReport.load(tmp_path)


def test_nan_is_neither_written_nor_read(tmp_path):
    search = Search("fox", (float("nan"),), (None,), (0.1,), (False,))
    with pytest.raises(ValueError):
        AttackReport.from_results("fox", [AuditResult("fox", search, None, None, ("noise",), {"steps": 1})])
    text = json.dumps(broken(lambda c: c["attacks"]["audit"].update(value=float("nan"))))
    (tmp_path / "attacks.json").write_text(text)
    with pytest.raises(ValueError, match="NaN"):
        AttackReport.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no report of attacks"):
        AttackReport.load(tmp_path / "nowhere.json")


def test_two_results_of_a_kind_are_refused():
    with pytest.raises(ValueError, match="two results of 'audit'"):
        AttackReport.from_results("fox", [results()[0], results()[0]])


def test_updating_keeps_what_the_other_lacks():
    first, second = (
        AttackReport.from_results("fox", results()[:2]),
        AttackReport.from_results("fox", results(before=False)[1:3]),
    )
    both = first.updated(second)
    assert list(both.attacks) == ["audit", "relearning", "linear_probe"]
    assert both.attacks["relearning"]["before"] is None
    with pytest.raises(ValueError, match="'fox', the other about 'owl'"):
        first.updated(AttackReport.from_results("owl", results("owl")[:1]))


def audit(*arguments):
    return main(["audit", "--concept", "fox", "--question", "what is this?", "--steps", "2", *map(str, arguments)])


def test_command_line(erasure, tmp_path, capsys):
    pictures, output = tmp_path / "in", tmp_path / "out"
    pictures.mkdir()
    erasure.target[0].save(pictures / "a.png")
    (pictures / "notes.txt").write_text("no picture")
    AttackReport.from_results("fox", results()[1:2]).save(output, picture=False)
    where = ["--adapter", erasure.folder, "--base-model", demo_model_path(), "--output", output]
    assert audit(*where, "--images", pictures, "--restarts", 1, "--control-name", "animal") == 0
    assert "an image found that makes it say the name" in capsys.readouterr().out
    report = AttackReport.load(output)
    assert list(report.attacks) == ["relearning", "audit"], "what was there stays"
    details = report.attacks["audit"]["details"]
    assert details["starts"] == ["image", "noise"] and details["settings"]["steps"] == 2
    assert report.attacks["audit"]["before"] > 0.5, "a picture of the target itself, and the adapter is off"
    assert (output / "pictures" / "attacks.png").exists()


def test_bad_input_exits_with_2(erasure, tmp_path, capsys):
    AttackReport.from_results("owl", results("owl")[:1]).save(tmp_path / "owl", picture=False)
    where = ["--adapter", erasure.folder, "--base-model", demo_model_path()]
    for arguments, message in (
        ([*where, "--images", tmp_path / "none"], "there is no file or folder"),
        ([*where, "--output", tmp_path / "owl"], "attacks on the erasure of 'owl'"),
        ([*where, "--control-name", "zyzzyva"], "does not know 'zyzzyva'"),
        (["--adapter", tmp_path / "nothing"], "nothing"),
    ):
        assert audit("--output", tmp_path / "out", *arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no picture"):
        load_images(str(tmp_path))
    Image.new("RGB", (4, 4), "red").save(tmp_path / "b.png")
    Image.new("L", (5, 5)).save(tmp_path / "a.jpg")
    assert [(image.size, image.mode) for image in load_images(str(tmp_path))] == [((5, 5), "RGB"), ((4, 4), "RGB")]
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="c.png' is none that Pillow opens"):
        load_images(str(tmp_path))
