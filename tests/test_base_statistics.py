"""Statistics of a base model: what is kept of second moments, what is fitted from it, and an erasure without retained rows."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import image_batch, text_batch, tiny_llava

from space_peft import (
    NullSpaceCallback,
    NullSpaceFitter,
    SpaceConfig,
    SpaceLoraConfig,
    SpaceTrainer,
    Statistics,
    collect_statistics,
    fit_null_space,
    load_null_spaces,
    load_statistics,
)
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.modeling.checksum import base_checksum
from space_peft.null_space.base_statistics import SecondMoment
from space_peft.null_space.collecting import linear_layers
from space_peft.null_space.constraints import FITTED
from space_peft.null_space.fitting import collect_moments
from space_peft.null_space.identity import DataDigest
from space_peft.trainers import GradDiffConfig, GradDiffTrainer


LANGUAGE = r".*language_model.*(q|k|v|down)_proj"
ALL = r".*(language_model|vision_tower).*(q_proj|k_proj|v_proj|fc2|down_proj)"


def spectrum(dim, seed, decay=-2.5):
    """A second moment with a spectrum as layers have it, and samples of it."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q
    values = torch.logspace(1, decay, dim, dtype=torch.float64)
    h = torch.randn(4 * dim, dim, dtype=torch.float64, generator=generator) * values.sqrt() @ basis.T
    return h.T @ h / len(h), h


def random_weight(rows, dim, seed):
    return torch.randn(rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# What is kept of one second moment


@pytest.mark.parametrize("rank", [3, 12, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_approximation_has_the_trace_and_is_never_further_off_than_it_says(rank, seed):
    moment, _ = spectrum(40, seed)
    kept = SecondMoment.of(moment, {"text": 160}, rank)
    assert (kept.dim, kept.rank, kept.vectors.dtype) == (40, rank, torch.float16)
    difference = moment - kept.dense()
    # Rounding to float16 turns each vector by 2^-11 at most; a little is added for that.
    assert abs(float(difference.trace())) < 5e-3 * float(moment.trace())
    largest = float(torch.linalg.eigvalsh(difference)[-1])
    assert largest <= kept.uncertainty + 1e-6 * float(moment.trace())
    # And it does not say more than is needed.
    assert kept.uncertainty <= max(largest, 0.0) + 1e-3 * float(moment.trace())


def test_all_eigenvectors_are_the_whole():
    moment, _ = spectrum(24, 3)
    kept = SecondMoment.of(moment, {"text": 1}, 24)
    torch.testing.assert_close(kept.dense(), moment, rtol=0, atol=4e-3 * float(moment.diagonal().max()))
    assert kept.uncertainty < 5e-3 * float(moment.diagonal().max())


def test_nothing_is_kept_of_zeros():
    with pytest.raises(ValueError, match="all retained inputs are zero"):
        SecondMoment.of(torch.zeros(8, 8), {"text": 1}, 4)


@pytest.mark.parametrize("seed", range(4))
def test_bounds_hold_for_the_inputs_themselves_though_only_a_part_was_kept(seed):
    """In float64, for the moment that was approximated and for random, aligned and adversarial updates."""
    moment, _ = spectrum(48, seed)
    extra, _ = spectrum(48, seed + 100)
    kept = SecondMoment.of(moment, {"text": 1}, 8)
    fitter = NullSpaceFitter(48).add_moment(extra, "text")
    fitter.add_moment(kept.dense(), "statistics", uncertainty=kept.uncertainty)
    space = fitter.fit("soft", strength=0.05, max_rank=6)
    true = (moment + extra) / 2
    root = torch.linalg.cholesky(true + 1e-12 * torch.eye(48, dtype=torch.float64))
    worst = torch.linalg.eigh(true - fitter.second_moment())[1][:, -1:]  # where the approximation is too small
    leading = torch.linalg.eigh(true)[1][:, -3:]
    for weight in (random_weight(5, 48, seed), worst.T, leading.T, torch.eye(48, dtype=torch.float64)[:7]):
        folded = space.project(weight)
        change = float((folded @ root).norm())
        assert change <= space.bound(weight) * (1 + 1e-5)
        assert change <= space.change(folded) * (1 + 1e-5)
    assert space.uncertainty == pytest.approx(
        kept.uncertainty / 2 / float(fitter.second_moment().diagonal().mean()), rel=1e-6
    )


def test_without_the_uncertainty_a_bound_would_be_wrong():
    """The direction in which the approximation is too small is one that the bound is reached in."""
    moment = torch.diag(torch.tensor([9.0, 4.0, 3.9, 0.01, 0.01, 0.01], dtype=torch.float64))
    kept = SecondMoment.of(moment, {"text": 1}, 2)
    fitter = NullSpaceFitter(6).add_moment(kept.dense(), "statistics", uncertainty=kept.uncertainty)
    space = fitter.fit("soft", strength=0.1, max_rank=2)
    weight = torch.eye(6, dtype=torch.float64)[2:3]
    change = float((space.project(weight) @ moment.sqrt()).norm())
    assert change <= space.bound(weight) and change <= space.change(space.project(weight))
    certain = dataclasses.replace(space, uncertainty=0.0)
    assert change > certain.bound(weight)


# What a language model's layers see, in shape: outliers, and a bulk that falls slowly or quickly.
WIDTH = 192


def layer_spectrum(kind, dim=WIDTH):
    places = torch.arange(1, dim + 1, dtype=torch.float64)
    values = {
        "outliers, slow": torch.where(places <= 4, 100.0, 5 * places**-0.7),
        "outliers, bulk": torch.where(places <= 4, 200.0 / places, 0.02 + 1.5 * (1 - places / dim) ** 2),
        "one holds nearly all": torch.where(places == 1, 6.0 * dim, 10 ** (0.7 - 3.2 * places / dim)),
    }[kind]
    basis = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    return (basis * (values / values.mean())) @ basis.T


@pytest.mark.parametrize("beside", [0, 20, 200])
@pytest.mark.parametrize("kind", ["outliers, slow", "outliers, bulk", "one holds nearly all"])
def test_a_filter_from_statistics_is_that_from_the_rows(kind, beside):
    """With the default settings, alone and beside what the text about a concept shows: the mean of what was left out is not
    the largest of it, by which all of it must be let through."""
    dim, config = WIDTH, SpaceLoraConfig()
    moment, limit = layer_spectrum(kind), config.rank_limit(dim)
    kept = SecondMoment.of(moment.float(), {"text": 1}, limit)
    rows, statistics = NullSpaceFitter(dim), NullSpaceFitter(dim)
    if beside:
        text = random_weight(beside, dim, 1) @ torch.linalg.cholesky(moment).T
        for fitter in (rows, statistics):
            fitter.add_moment(text.T @ text / beside, "text")
    rows.add_moment(moment, "image")
    statistics.add_moment(kept.dense(), "image", uncertainty=kept.uncertainty)
    wanted, found = (f.fit("soft", strength=config.strength, max_rank=limit) for f in (rows, statistics))
    # Of text that is strong where the strongest of what was left out is, a little is missed.
    allowed = 0.5 if beside else 0.2
    assert found.outside == pytest.approx(wanted.outside, rel=allowed)
    one = torch.eye(dim, dtype=torch.float64)
    assert float((wanted.project(one) - found.project(one)).norm()) < allowed * float(wanted.project(one).norm())
    # What passes, of the moment itself and not of what was kept of it.
    values, vectors = torch.linalg.eigh(rows.second_moment())
    passed = float(torch.linalg.matrix_norm(found.project(one) @ (vectors * values.clamp(min=0).sqrt()), 2))
    assert passed <= found.bound() * (1 + 1e-5)
    assert passed <= FITTED["soft"].worst_case(found)


def test_a_rounded_outlier_is_not_a_reason_to_allow_for_everything():
    """Float16 turns a vector of a thousand times the mean by as much as all that was left out."""
    moment = layer_spectrum("one holds nearly all")
    kept = SecondMoment.of(moment.float(), {"text": 1}, 48)
    left_out = torch.linalg.eigvalsh(moment).flip(0)[48]
    assert left_out <= kept.rest + kept.uncertainty < 1.25 * left_out
    assert 1 <= float(kept.dense().trace() / moment.trace()) < 1.004


def test_uncertainty_is_merged_and_saved_with_the_sums():
    moment, _ = spectrum(8, 0)
    one = NullSpaceFitter(8).add_moment(moment, "statistics", uncertainty=0.5)
    merged = NullSpaceFitter(8).merge(one)
    loaded = NullSpaceFitter(8)
    loaded.load_state_dict(one.state_dict())
    wanted = one.fit("soft").uncertainty
    assert wanted > 0
    assert merged.fit("soft").uncertainty == loaded.fit("soft").uncertainty == wanted


# Of a model


@pytest.fixture(scope="module")
def demo_rows(demo_erasure_data):
    _, retain = demo_erasure_data
    return [row for row in retain if row["images"]][:24] + [row for row in retain if not row["images"]][:12]


@pytest.fixture(scope="module")
def statistics(demo_rows):
    return collect_statistics(*load_demo_model(), demo_rows, progress=False)


def tiny_statistics(model, batches, **options):
    """Of batches instead of rows: tiny models have no processor."""
    digest = DataDigest()
    settings = {"statistics": "token", "tokens_per_row": 64, **options}
    fitters = collect_moments(
        model, batches, layers=linear_layers(model, ALL), digest=digest, progress=False, dtype=torch.float32, **settings
    )
    kept = {id(f): SecondMoment.of(f.second_moment(), f.counts, f.dim) for f in fitters.values()}
    return Statistics(
        {name: kept[id(fitter)] for name, fitter in fitters.items()},
        base=base_checksum(model), data=digest.value(), rows=3, kind=settings["statistics"],
        tokens_per_row=settings["tokens_per_row"],
    )  # fmt: skip


def adapted(target=LANGUAGE, seed=0, **options):
    return get_peft_model(tiny_llava(seed), SpaceLoraConfig(r=2, target_modules=target, **options))


BATCHES = [image_batch(seed=1), text_batch(seed=2), image_batch(seed=3)]


def test_null_spaces_from_statistics_are_those_from_the_rows():
    made = tiny_statistics(tiny_llava(), BATCHES)
    from_rows = fit_null_space(adapted(ALL), BATCHES, progress=False)
    from_statistics = fit_null_space(adapted(ALL), None, statistics=made, progress=False)
    assert set(from_rows) == set(from_statistics)
    for name, space in from_rows.items():
        x = random_weight(6, space.dim, 0)
        wanted, found = space.project(x), from_statistics[name].project(x)
        assert float((wanted - found).norm()) < 0.02 * float(wanted.norm()), name
        assert from_statistics[name].identity.base_statistics == made.digest()


def test_layers_of_one_input_share_a_null_space_and_others_do_not():
    spaces = fit_null_space(adapted(ALL), None, statistics=tiny_statistics(tiny_llava(), BATCHES), progress=False)
    by_layer = {name.rpartition(".")[2]: space for name, space in spaces.items() if "language_model.layers.0" in name}
    assert by_layer["q_proj"] is by_layer["k_proj"] is by_layer["v_proj"]
    assert by_layer["down_proj"] is not by_layer["q_proj"]


def test_batches_beside_statistics_weigh_as_a_kind_of_token_and_may_leave_layers_out():
    made = tiny_statistics(tiny_llava(), BATCHES)
    texts = [text_batch(seed=7)]
    model = adapted(ALL)
    spaces = fit_null_space(model, texts, statistics=made, progress=False)
    name = next(name for name in spaces if "language_model" in name and name.endswith("down_proj"))
    alone = collect_moments(model, texts, tokens_per_row=64, unseen_allowed=True, progress=False)[name].second_moment()
    wanted = NullSpaceFitter(spaces[name].dim)
    wanted.add_moment(alone, "text").add_moment(made[name].dense(), "statistics")
    expected = wanted.fit("soft", strength=0.005, max_rank=16)
    torch.testing.assert_close(spaces[name].eigenvalues, expected.eigenvalues, rtol=1e-3, atol=1e-3)
    assert set(spaces[name].counts) == {"text", "statistics"}
    tower = next(name for name in spaces if "vision_tower" in name)
    assert set(spaces[tower].counts) == {"statistics"}


def test_a_file_that_was_changed_is_not_loaded(tmp_path):
    made = tiny_statistics(tiny_llava(), BATCHES)
    made.save(tmp_path / "stats", max_shard_size="2KB")
    shards = sorted((tmp_path / "stats").glob("*.safetensors"))
    assert len(shards) > 2
    again = load_statistics(tmp_path / "stats")
    assert again.digest() == made.digest() and set(again) == set(made)
    assert len(again.unique) == len(made.unique)
    tensors = load_file(shards[1])
    key = next(iter(tensors))
    tensors[key] = tensors[key] * 1.01
    save_file(tensors, shards[1])
    with pytest.raises(ValueError, match="a file was changed"):
        load_statistics(tmp_path / "stats")
    shards[1].unlink()
    with pytest.raises(ValueError, match="incomplete"):
        load_statistics(tmp_path / "stats")


def test_scalars_are_part_of_the_digest(tmp_path):
    made = tiny_statistics(tiny_llava(), BATCHES)
    made.save(tmp_path / "stats")
    path = tmp_path / "stats" / "space_statistics.json"
    content = json.loads(path.read_text())
    content["moments"][0]["uncertainty"] *= 0.5
    content["moments"][0]["uncertainty"] += 1e-3
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a file was changed"):
        load_statistics(tmp_path / "stats")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="files of something else"):
        tiny_statistics(tiny_llava(), BATCHES).save(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: adapted(seed=1), "another base model"),
        (lambda: adapted(tokens_per_row=8), "`tokens_per_row` is 64 in the statistics, but 8"),
        (lambda: adapted(statistics="pooled"), "`statistics` is 'token' in the statistics, but 'pooled'"),
        (lambda: adapted(constraint="hard"), "use constraint=\"soft\""),
        (lambda: adapted(r".*o_proj"), "nothing for 2 adapted layers"),
    ],
)  # fmt: skip
def test_statistics_of_something_else_are_refused(model, said):
    made = tiny_statistics(tiny_llava(), BATCHES)
    with pytest.raises(ValueError, match=said):
        fit_null_space(model(), None, statistics=made, progress=False)


def test_more_eigenvectors_than_were_kept_are_refused(statistics):
    model = get_peft_model(load_demo_model()[0], SpaceLoraConfig(target_modules=r".*down_proj", max_rank=200))
    with pytest.raises(ValueError, match="200 eigenvectors for layer .* the statistics keep 144"):
        fit_null_space(model, None, statistics=statistics, progress=False)


def test_statistics_of_the_version_before_say_what_can_be_asked_of_them():
    """They hold less than the default asks for, of some layers less than of others."""
    made = tiny_statistics(tiny_llava(), BATCHES)
    ranks = {name: 9 if name.endswith("down_proj") else 12 for name in made}
    few = {
        name: dataclasses.replace(moment, vectors=moment.vectors[:, : ranks[name]], values=moment.values[: ranks[name]])
        for name, moment in made.items()
    }
    less = Statistics(
        few, base=made.base, data=made.data, rows=made.rows, kind=made.kind, tokens_per_row=made.tokens_per_row
    )
    with pytest.raises(ValueError, match=r"16 eigenvectors for layer .*, SpaceLoraConfig\(max_rank=9\)"):
        fit_null_space(adapted(), None, statistics=less, progress=False)
    spaces = fit_null_space(adapted(max_rank=9), None, statistics=less, progress=False)
    assert {space.rank for space in spaces.values()} == {9}


def test_a_weight_that_changed_makes_it_another_model():
    made = tiny_statistics(tiny_llava(), BATCHES)
    model = adapted()
    with torch.no_grad():
        model.get_base_model().get_input_embeddings().weight[5, 3] += 1
    with pytest.raises(ValueError, match="another base model"):
        fit_null_space(model, None, statistics=made, progress=False)


def test_a_callback_fits_again_for_other_statistics():
    model, made = adapted(), tiny_statistics(tiny_llava(), BATCHES)
    callback = NullSpaceCallback(statistics=made)
    callback.null_spaces = fit_null_space(model, None, statistics=made, progress=False)
    kept = callback.null_spaces
    callback._check_or_forget(model, resumed=False)
    assert callback.null_spaces is kept
    callback.statistics = tiny_statistics(tiny_llava(), BATCHES[:1])
    callback._check_or_forget(model, resumed=False)
    assert callback.null_spaces is None
    with pytest.raises(ValueError, match="give either"):
        NullSpaceCallback()


# The trainer


def trainer(folder, data, statistics, **options):
    model, processor = load_demo_model()
    settings = {
        "max_steps": 3, "per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "own_answers": False, "canary_items": 0,
    }  # fmt: skip
    config = options.pop("peft_config", SpaceLoraConfig(r=4, lora_alpha=8))
    given = {name: options.pop(name) for name in ("questions", "retain_dataset", "aliases") if name in options}
    return SpaceTrainer(
        model, SpaceConfig(output_dir=str(folder), **{**settings, **options}), anchors=data[0].select(range(4)),
        processing_class=processor, peft_config=config, statistics=statistics, **{"questions": DEMO_QUESTIONS, **given},
    )  # fmt: skip


def test_an_erasure_without_a_retained_row(demo_erasure_data, statistics, tmp_path):
    statistics.save(tmp_path / "stats")
    run = trainer(tmp_path / "run", demo_erasure_data, str(tmp_path / "stats"), aliases=["owl"])
    assert len(run.retained) == 0
    run.train()
    assert run.certificate is None
    spaces = run.null_spaces
    assert {space.identity.base_statistics for space in spaces.values()} == {statistics.digest()}
    # Beside the statistics: what the model says of both names in words.
    rows = run._about().dataset
    asked = {rows[i]["prompt"][0]["content"][0]["text"] for i in range(len(rows))}
    assert asked <= {q.format(name=name) for q in DEMO_QUESTIONS.about for name in ("fox", "owl")}
    assert any("fox" in text for text in asked) and not any(row["images"] for row in rows)
    assert all(set(space.counts) == {"text", "statistics"} for space in spaces.values())
    # The update is in the null space: the constraint was attached.
    for name, layer in run.model.get_base_model().named_modules():
        if name in spaces:
            a = layer.lora_A["default"].weight.detach().double()
            inverse = spaces[name].unproject(a)
            torch.testing.assert_close(spaces[name].project(inverse.double()), a, rtol=1e-4, atol=1e-6)
    run.save_model()
    assert load_null_spaces(tmp_path / "run" / "space_stats.safetensors").keys() == spaces.keys()
    used = json.loads((tmp_path / "run" / "space_anchors.json").read_text())["statistics"]
    assert (used["digest"], used["rows"]) == (statistics.digest(), 36)


def test_trained_twice_it_is_fitted_once(demo_erasure_data, statistics, tmp_path):
    run = trainer(tmp_path, demo_erasure_data, statistics, max_steps=1)
    run.train()
    first, batches = run.null_spaces, len(run.null_space.retain_dataloader)
    run.train()
    assert run.null_spaces is first and len(run.null_space.retain_dataloader) == batches


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_by_bit(demo_erasure_data, statistics, tmp_path):
    whole = trainer(tmp_path / "whole", demo_erasure_data, statistics, max_steps=4)
    whole.train()
    part = trainer(tmp_path / "part", demo_erasure_data, statistics, max_steps=4, save_strategy="steps", save_steps=2)
    part.train()
    resumed = trainer(tmp_path / "part", demo_erasure_data, statistics, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_retained_rows_beside_statistics_are_fitted_and_certified(demo_erasure_data, statistics, tmp_path):
    run = trainer(tmp_path, demo_erasure_data, statistics, retain_dataset=demo_erasure_data[1], max_steps=1)
    run.train()
    assert run.certificate is not None and len(run.held_out.dataset) > 0
    assert all(set(space.counts) == {"image", "text", "statistics"} for space in run.null_spaces.values())


def test_without_questions_about_the_name_statistics_stand_alone(demo_erasure_data, statistics, tmp_path):
    silent = dataclasses.replace(DEMO_QUESTIONS, about=())
    run = trainer(tmp_path, demo_erasure_data, statistics, questions=silent, max_steps=1)
    run.train()
    assert all(set(space.counts) == {"statistics"} for space in run.null_spaces.values())


def test_settings_that_need_retained_rows_are_refused(demo_erasure_data, statistics, tmp_path):
    with pytest.raises(ValueError, match="ask for a loss on retained rows, and there are none"):
        trainer(tmp_path, demo_erasure_data, statistics, keep_weight=60.0)
    with pytest.raises(ValueError, match="`statistics` is kept by the null space; pass a SpaceLoraConfig"):
        trainer(tmp_path, demo_erasure_data, statistics, peft_config=LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="the retained dataset is empty"):
        trainer(tmp_path, demo_erasure_data, None)


def test_gradient_ascent_in_the_null_space_needs_no_retained_row_either(demo_erasure_data, statistics, tmp_path):
    model, processor = load_demo_model()
    images = [{"image": image, "name": "fox"} for image in demo_erasure_data[0]["image"][:2]]
    options = {
        "output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "own_answers": False, "canary_items": 0, "per_device_train_batch_size": 2,
    }  # fmt: skip

    def make(**settings):
        return GradDiffTrainer(
            model, GradDiffConfig(**options, **settings), forget_dataset=images, processing_class=processor, questions=DEMO_QUESTIONS,
            statistics=statistics, peft_config=SpaceLoraConfig(r=4),
        )  # fmt: skip

    with pytest.raises(ValueError, match="ask for a loss on retained rows"):
        make()
    run = make(retain_loss="none")
    run.train()
    assert run.null_spaces and run.certificate is None
