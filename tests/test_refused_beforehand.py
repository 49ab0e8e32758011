"""What cannot be done is refused before a model is loaded, or at least before anchors are made for it."""

import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from tiny_models import tiny_llava

from space_peft import SpaceConfig, SpaceLoraConfig, erase
from space_peft.cli import erase as command
from space_peft.cli import main
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.demo.probes import demo_probes
from space_peft.evaluation.before_after import warn_if_not_named
from space_peft.modeling.layers import adapted_layers
from space_peft.null_space.base_statistics import SecondMoment, Statistics
from space_peft.null_space.planning import plan_erasure
from space_peft.null_space.workload import Workload
from space_peft.retained.reading import RetainedRows
from space_peft.trainers import given_adapter
from space_peft.trainers.given_adapter import add_adapter
from space_peft.trainers.refusals import check_model, layers_to_adapt


WORDS = [{"prompt": "what is it?", "completion": "a thing"}]
PICTURES = [{"prompt": "what is it?", "completion": "a thing", "image": Image.new("RGB", (4, 4))}]
POOL = Dataset.from_dict({"image": [Image.new("RGB", (4, 4))]})


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


@pytest.fixture
def nothing_is_made(monkeypatch):
    """The first thing that takes long."""
    monkeypatch.setattr("space_peft.erasing.select_anchors", lambda *a, **k: pytest.fail("anchors were selected"))


def job(demo, tmp_path, **options):
    args = {"use_cpu": True, "report_to": "none", **options.pop("args", {})}
    given = {"pool": POOL, "retain_dataset": PICTURES, "processor": demo[1], "progress": False}
    return erase(demo[0], "fox", args=SpaceConfig(str(tmp_path / "out"), **args), **{**given, **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"peft_config": SpaceLoraConfig(target_modules=["nosuch"])}, r"meant by the target modules \['nosuch'\]; .* q_proj"),
        ({"peft_config": SpaceLoraConfig(target_modules=r"nosuch\d")}, "meant by the target modules 'nosuch"),
        ({"peft_config": SpaceLoraConfig(target_modules=["embed_tokens"])}, "'model.language_model.embed_tokens' is a Embedding"),
        ({"peft_config": SpaceLoraConfig(target_modules=["self_attn"])}, "only linear layers can be constrained"),
        ({"peft_config": SpaceLoraConfig(layers_to_transform=[0])}, "`layers_to_transform` is .* but `target_modules` is not"),
        ({"aliases": ["zyzzyva"]}, "the answer 'zyzzyva' is written '<unk>.*, in which no token says it"),
        ({"args": {"target": "vision"}, "retain_dataset": WORDS}, "adapted layers would see no retained data"),
        ({"nosuch": 1}, "SpaceTrainer takes no argument `nosuch`"),
        ({"train_dataset": 1}, "SpaceTrainer takes no argument `train_dataset`: rows to forget and retained rows are given"),
        ({"retain_dataset": [{"question": "what?"}]}, "retained row 0: .*no 'prompt'; .*rename 'question' to 'prompt'"),
        ({"retain_dataset": []}, "the retained dataset is empty"),
    ],
)  # fmt: skip
def test_nothing_is_made_for_what_is_refused(demo, nothing_is_made, tmp_path, options, said):
    names = [name for name, _ in demo[0].named_modules()]
    with pytest.raises((TypeError, ValueError), match=said):
        job(demo, tmp_path, **options)
    assert not (tmp_path / "out").exists() and [name for name, _ in demo[0].named_modules()] == names


def test_a_model_that_crawls_on_a_cpu_is_said_before_anything_is_made(nothing_is_made, tmp_path, monkeypatch):
    model, processor = load_demo_model()
    said = []
    monkeypatch.setattr("space_peft.modeling.loading.logger.warning_once", said.append, raising=False)
    with pytest.raises(ValueError, match="zyzzyva"):
        job((model.half(), processor), tmp_path, aliases=["zyzzyva"])
    assert any("in float16" in text for text in said)


def test_rows_and_arguments_are_looked_at_before_the_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr("space_peft.erasing.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    demo = (str(tmp_path), None)  # A folder without a model, in the place of one.
    statistics = Statistics({}, base="a:b:c", data="", rows=1, kind="token", tokens_per_row=64)
    for options, said in (
        ({"retain_dataset": [{"text": "a"}]}, "retained row 0"),
        (
            {"retain_dataset": None, "statistics": statistics, "args": {"keep_weight": 1.0}},
            "ask for a loss on retained rows",
        ),
        ({"statistics": str(tmp_path / "nowhere")}, "nowhere"),
        ({"nosuch": 1}, "takes no argument `nosuch`"),
    ):
        with pytest.raises((TypeError, ValueError, OSError), match=said):
            job(demo, tmp_path, **options)


def test_statistics_of_something_else_are_refused(demo, nothing_is_made, tmp_path):
    moment = SecondMoment(torch.eye(4)[:, :2].half(), torch.ones(2), 0.1, 0.0, {"text": 1})
    other = Statistics({"layer": moment}, base="a:b:c", data="", rows=1, kind="token", tokens_per_row=64)
    with pytest.raises(ValueError, match="the statistics are of another base model"):
        job(demo, tmp_path, statistics=other)
    with pytest.raises(ValueError, match="`statistics` is kept by the null space"):
        job(demo, tmp_path, statistics=other, peft_config=LoraConfig(target_modules=["q_proj"]))


def test_a_tied_output_layer_is_refused():
    config = tiny_llava().config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = type(tiny_llava())(config)
    _, processor = load_demo_model()
    with pytest.raises(ValueError, match="'lm_head' shares its weight with"):
        check_model(
            model, processor, SpaceConfig(use_cpu=True), SpaceLoraConfig(target_modules=["lm_head", "q_proj"]), ["fox"],
            DEMO_QUESTIONS,
        )  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        *({"target": target} for target in ("language", "vision", "all")),
        {"target_modules": ["q_proj", "fc1"]},
        {"target_modules": r".*language_model.*\.v_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": r".*vision_tower.*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear"},
    ],
)
def test_the_layers_are_those_that_peft_gives_an_adapter(config):
    model, target = tiny_llava(), config.pop("target", "language")
    peft_config = SpaceLoraConfig(**config)
    found = layers_to_adapt(model, given_adapter.with_target_modules(model, peft_config, target))
    adapted = add_adapter(tiny_llava(), peft_config, target, "")
    assert list(found) == list(adapted_layers(adapted)) and len(found) > 0
    # What a plan says is refused.
    plan = plan_erasure(adapted, Workload(1, 4, 8, 4))
    assert plan.refused == ()
    _, processor = load_demo_model()
    args = SpaceConfig(use_cpu=True, target=target)
    check_model(model, processor, args, peft_config, ["fox"], DEMO_QUESTIONS, RetainedRows(PICTURES))


def test_the_command_looks_before_it_loads_and_names_its_options(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "rows.parquet")
    POOL.save_to_disk(tmp_path / "pool")
    given = ["erase", "--model", "demo", "--concept", "fox", "--pool", str(tmp_path / "pool"), "--use_cpu", "true"]
    given += ["--output_dir", str(tmp_path / "out")]
    for more, said in (
        ([], "nothing says what must not change: give --retain (rows, or pictures alone"),
        (
            ["--retain", str(tmp_path / "rows.parquet")],
            "rows.parquet: retained row 0: a retained row has the columns ['text']",
        ),
        (["--statistics", str(tmp_path / "pool")], "pool"),
    ):
        assert main([*given, *more]) == 2
        told = capsys.readouterr().err.rpartition("\r")[2].splitlines()[-1]  # Behind the bars of reading.
        assert told.startswith("space-peft erase: ") and said in told and "retain_dataset" not in told
    assert not (tmp_path / "out").exists()


def test_a_name_that_the_model_does_not_know_is_said_first(demo, demo_images):
    probes = demo_probes("fox", demo_images)
    forget = next(probe for probe in probes if probe.name == "forget")
    few = [type(probe)(**{**vars(probe), "rows": probe.rows[:4]}) for probe in probes]
    unknown = type(forget)(
        "forget", [{**row, "answer": "quasar"} for row in forget.rows[:4]], "contains_name", names=("quasar",)
    )
    with pytest.warns(
        UserWarning, match="'quasar' was named on 0 of 4 of your test pictures. The model may not know it by"
    ):
        warn_if_not_named(*demo, "quasar", [unknown], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_not_named(*demo, "fox", few, progress=False)
        warn_if_not_named(None, None, "fox", [], progress=False)


def test_an_erasure_asks_before_anything_is_made(demo, demo_images, tmp_path, monkeypatch):
    forget = next(probe for probe in demo_probes("fox", demo_images) if probe.name == "forget")
    unknown = type(forget)("forget", forget.rows[:2], "contains_name", names=("quasar",))

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("space_peft.erasing.select_anchors", stop)
    with pytest.warns(UserWarning, match="named on 0 of 2") as told, pytest.raises(KeyboardInterrupt):
        job(demo, tmp_path, probes=[unknown], questions=DEMO_QUESTIONS)
    assert {warning.filename for warning in told if "named on 0 of 2" in str(warning.message)} == {__file__}
