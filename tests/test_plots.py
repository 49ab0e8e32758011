"""Pictures: they are written whole, leave no global state, and hold for no image, one, and more than fit."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from space_peft.data.questions import Dialogue
from space_peft.evaluation import (
    REPORT_KEYS,
    ErasureReport,
    Probe,
    ProbeResults,
    answer_page_rows,
    plot_anchor_grid,
    plot_answer_page,
    plot_probe_bars,
    plot_sentence_page,
    plot_spectrum,
    sentence_page_rows,
)


def _image(i=0, mode="RGB"):
    return Image.new("RGB", (24, 24), (i * 37 % 256, i * 91 % 256, 128)).convert(mode)


def _size(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def _no_leftovers(folder):
    return not any(path.name.startswith(".") for path in folder.iterdir())


@pytest.mark.parametrize("n", [0, 1, 7, 64, 70])
def test_anchor_grid(tmp_path, n):
    raw = [{"image": _image(i, "L" if i % 2 else "RGBA")} for i in range(n)]
    refined = [{"image": _image(i), "p_name_before": 1e-7, "p_name_after": 0.93} for i in range(n)]
    path = tmp_path / "new folder" / "anchors.png"
    plot_anchor_grid(raw, refined, path, concept="a very long name " * 9, dpi=40)
    width, height = _size(path)
    assert 100 < width < 1200 and height < 1200 and _no_leftovers(path.parent)


def test_anchor_grid_without_probabilities_and_of_other_length(tmp_path):
    plot_anchor_grid([{"image": _image()}], [{"image": _image()}], tmp_path / "a.png", dpi=40)
    with pytest.raises(ValueError, match="1 anchors before and 0 after"):
        plot_anchor_grid([{"image": _image()}], [], tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(("forget", "keep"), [(0, 0), (1, 0), (0, 3), (5, 12), (20, 64)])
def test_answer_page(tmp_path, forget, keep):
    rows = [
        {"image": _image(i), "before": "x" * 60 if i else "", "after": "wolf", "ok": i % 2 == 0, "forget": i < forget}
        for i in range(forget + keep)
    ]
    plot_answer_page(rows, tmp_path / "answers.png", concept="fox", dpi=40)
    assert min(_size(tmp_path / "answers.png")) > 40 and _no_leftovers(tmp_path)


@pytest.mark.parametrize(("forget", "keep"), [(0, 0), (1, 0), (3, 5), (70, 1)])
def test_sentence_page(tmp_path, forget, keep):
    rows = [
        {"image": _image(i), "question": "tell me. " * i, "before": "a fox $x$ " * 60 if i else "", "after": "a wolf.",
         "ok": i % 2 == 0, "forget": i < forget}
        for i in range(forget + keep)
    ]  # fmt: skip
    plot_sentence_page(rows, tmp_path / "sentences.png", concept="fox", dpi=40)
    assert min(_size(tmp_path / "sentences.png")) > 40 and _no_leftovers(tmp_path)


def test_sentence_page_rows_take_prompts_and_images_in_turn():
    prompts = ("describe it.", Dialogue(("look.", "yes.", "what is it?")))
    target = [{"question": q, "answer": "fox", "image": _image(i)} for i in range(3) for q in prompts]
    others = [{"question": prompts[i % 2], "answer": "wolf", "image": _image(9 + i)} for i in range(4)]
    probes = [
        Probe("free_form", target, "contains_name", names=("fox",)),
        Probe("retain_sentences", others, "says", known_only=True),
    ]

    def results(said, hits):
        records = []
        for probe in probes:
            for row in range(len(probe.rows)):
                known = None if probe.name == "free_form" else row != 2
                record = {"probe": probe.name, "part": None, "row": row, "question": str(probe.rows[row]["question"])}
                hit = hits[probe.name](row)
                records.append(
                    {**record, "image": id(probe.rows[row]["image"]), "answer": said, "hit": hit, "known": known}
                )
        return ProbeResults({}, records)

    before = results("a fox", {"free_form": lambda row: row != 0, "retain_sentences": lambda row: True})
    after = results("a wolf", {"free_form": lambda row: row == 1, "retain_sentences": lambda row: row != 1})
    page = sentence_page_rows(probes, before, after, forget=4, keep=3)
    told = [row for row in page if row["forget"]]
    assert [row["question"] for row in told] == [str(prompts[1]), str(prompts[0])] * 2  # Row 0 named nothing before.
    assert len({id(row["image"]) for row in told[:3]}) == 3
    assert sorted(row["ok"] for row in told) == [False, True, True, True]
    kept = [row for row in page if not row["forget"]]
    assert len(kept) == 3 and sorted(row["ok"] for row in kept) == [False, True, True]


def test_answer_page_rows_show_known_rows_of_the_naming_question():
    rows = [{"question": q, "answer": "wolf", "image": _image(i)} for i in range(9) for q in ("what?", "kind?")]
    target = [{"question": "what?", "answer": "fox", "image": _image(20)}]
    probes = [Probe("forget", target, "contains_name", names=("fox",)), Probe("siblings", rows[:6], "equals")]
    probes.append(Probe("retain", rows, "equals"))

    def results(said):
        records = []
        for probe in probes:
            for i, row in enumerate(probe.rows):
                hit = said == row["answer"]
                known = None if probe.name == "forget" else i != 0
                records.append(
                    {"probe": probe.name, "part": None, "row": i, "question": row["question"], "answer": said,
                     "expected": row["answer"], "hit": hit, "known": known, "image": str(row["image"].getpixel((0, 0)))}
                )  # fmt: skip
        return ProbeResults({}, records)

    page = answer_page_rows(probes, results("fox"), results("wolf"), keep=6)
    assert [row["forget"] for row in page] == [True] + [False] * 6
    assert page[0]["ok"] and (page[0]["before"], page[0]["after"]) == ("fox", "wolf")
    assert all(row["ok"] for row in page[1:])
    assert len({row["image"].getpixel((0, 0)) for row in page}) == 7


def test_probe_bars(tmp_path):
    before = {key: {"value": 1.0, "n": 12345} for key in REPORT_KEYS}
    after = {**before, "forget": {"value": 0.0, "n": 5}, "siblings": {"value": None, "n": 0}}
    plot_probe_bars(ErasureReport("a very long name " * 9, before, after), tmp_path / "bars.png", dpi=40)
    assert _size(tmp_path / "bars.png") == (320, 296)


@pytest.mark.parametrize("d", [1, 2, 192])
def test_spectrum(tmp_path, d):
    eigenvalues = np.r_[np.logspace(1, -8, d - 1), 0.0] if d > 1 else np.ones(1)
    plot_spectrum((eigenvalues, 0.3 / (eigenvalues + 0.3)), tmp_path / "s.png", layer="model." * 40 + "q_proj", dpi=40)
    assert _size(tmp_path / "s.png") == (280, 164)


def test_spectrum_refuses_what_cannot_be_drawn(tmp_path):
    for bad, message in (
        (([1.0, 2.0], [1.0]), "expected equally many"),
        (([], []), "at least 1"),
        (([1.0, np.nan], [1.0, 1.0]), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_spectrum(bad, tmp_path / "s.png")
    assert not (tmp_path / "s.png").exists()


def test_spectrum_of_a_fitted_null_space(tmp_path):
    import torch

    from space_peft.null_space import NullSpaceFitter

    fitter = NullSpaceFitter(16)
    fitter.update(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 16))
    for constraint in ("soft", "hard"):
        plot_spectrum(fitter.fit(constraint, strength=0.3, energy=0.99), tmp_path / f"{constraint}.png", dpi=40)
        _size(tmp_path / f"{constraint}.png")


def test_the_legend_says_where_the_filter_is_flat_and_why():
    import torch

    from space_peft.evaluation.plots import _filter_label
    from space_peft.null_space import NullSpaceFitter

    fitter = NullSpaceFitter(16)
    fitter.update(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))
    cut = fitter.fit("soft", strength=0.03, max_rank=3)
    assert _filter_label(cut) == f"filter t / (λ + t), t = 0.03 (right); {cut.outside:.2g} in all beyond the 3 kept"
    assert 0.01 < cut.outside < 0.05
    assert _filter_label(fitter.fit("hard", energy=0.9)) == _filter_label(([1.0], [0.5])) == "filter (right)"


def test_plots_leave_pyplot_and_defaults_alone(tmp_path):
    import matplotlib

    defaults = dict(matplotlib.rcParams)
    plot_spectrum(([1.0], [0.5]), tmp_path / "s.png", dpi=40)
    assert dict(matplotlib.rcParams) == defaults
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


def test_importing_the_package_is_light():
    code = "import sys, space_peft.evaluation as e; dir(e); print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_answer_page_of_the_embedded_model(tmp_path):
    from space_peft.demo import load_demo_images, load_demo_model
    from space_peft.demo.probes import demo_probes
    from space_peft.evaluation import evaluate_probes

    full = {probe.label: probe for probe in demo_probes("fox", load_demo_images())}
    probes = [full[label] for label in ("forget", "siblings", "retain")]
    results = evaluate_probes(*load_demo_model(), probes, progress=False)
    page = answer_page_rows(probes, results, results)
    assert [row["forget"] for row in page].count(False) == 12
    # Nothing was erased: what is to be kept is, and the target is still named.
    assert all(row["ok"] for row in page if not row["forget"])
    assert not all(row["ok"] for row in page if row["forget"])
    plot_answer_page(page, tmp_path / "answers.png", concept="fox", dpi=40)
    _size(tmp_path / "answers.png")


def test_pictures_look_the_same_whatever_the_users_style_and_stand_on_white(tmp_path):
    import matplotlib

    report = ErasureReport("fox", *({key: {"value": 0.5, "n": 4} for key in REPORT_KEYS} for _ in range(2)))
    spectrum = (np.geomspace(100, 0.01, 32), np.linspace(0, 1, 32))
    dark = {
        "figure.facecolor": "black", "savefig.facecolor": "black", "savefig.transparent": True, "axes.facecolor": "black",
        "text.color": "white", "axes.labelcolor": "white", "xtick.color": "white", "ytick.color": "white",
    }  # fmt: skip
    for name, settings in (("plain", {}), ("dark", dark)):
        with matplotlib.rc_context(settings):
            plot_probe_bars(report, tmp_path / f"{name}_bars.png")
            plot_spectrum(spectrum, tmp_path / f"{name}_spectrum.png")
    for kind in ("bars", "spectrum"):
        plain, other = (np.asarray(Image.open(tmp_path / f"{name}_{kind}.png")) for name in ("plain", "dark"))
        assert (plain == other).all() and (plain[..., 3] == 255).all()
        edges = (plain[:10], plain[-10:], plain[:, :10], plain[:, -10:])
        assert all((edge[..., :3] == 255).all() for edge in edges), "no margin, or not on white"
