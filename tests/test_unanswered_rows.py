"""Retained pictures without labels: the deployed model answers, in one line, resumable, from Python and the command line."""

import logging

import pytest
from datasets import Dataset
from PIL import Image

from space_peft import SpaceConfig, SpaceLoraConfig, erase
from space_peft.cli import main
from space_peft.data.loading import load_rows
from space_peft.data.questions import DEFAULT_QUESTIONS
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.demo.probes import demo_split
from space_peft.modeling.prompts import answer_text, conversation, generate_answers
from space_peft.retained import self_distillation
from space_peft.retained.reading import RetainedRows
from space_peft.retained.self_distillation import answer_missing


ASKED = (*DEMO_QUESTIONS.naming[:1], *DEMO_QUESTIONS.open[:2])
WORDS = {"prompt": "what kind of thing is a fox?"}
QUICK = {"questions": ASKED, "progress": False}


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


@pytest.fixture(scope="module")
def pictures(demo_images, tmp_path_factory):
    """A folder of pictures: two foxes, two owls, two lemons."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("fox", "lemon", "owl"):
        own = [row["image"] for row in demo_images if row["name"] == name][:2]
        for i, image in enumerate(own):
            image.save(folder / f"{name}_{i}.png")
    return folder


def read(rows):
    return RetainedRows(rows, unanswered=True)


def test_a_folder_of_pictures_is_answered_by_the_model(demo, pictures, caplog):
    given = load_rows(str(pictures))
    with caplog.at_level(logging.WARNING, "space_peft"):
        rows = answer_missing(*demo, read(given), **QUICK)
    assert [record.getMessage() for record in caplog.records] == [
        "6 of 6 retained rows have no answer: the model itself is asked, and its answers are what must not change."
    ]
    assert len(rows) == 12 and rows.has_image() == [True] * 12 and rows.unanswered == {}
    images = [image for image in given["image"] for _ in range(2)]
    asked = [ASKED[number % 3] for number in range(12)]
    said = generate_answers(*demo, asked, images=images, max_new_tokens=32)
    assert [answer_text(row) for row in rows] == said and len(set(said)) > 4
    assert [row["images"][0].tobytes() for row in rows] == [image.tobytes() for image in images]
    assert rows.count_target(["fox"]) == sum("fox" in text for text in said) > 0
    # They are rows like any others, and those that have answers are not asked for more.
    assert [answer_text(row) for row in RetainedRows([rows[i] for i in range(12)])] == said
    assert answer_missing(None, None, rows) is rows and RetainedRows.of(rows) is rows


def test_a_row_is_asked_its_own_question_and_an_answer_is_kept(demo, pictures):
    picture = Image.open(pictures / "owl_0.png")
    question = DEMO_QUESTIONS.naming[1]
    rows = [
        {"prompt": "what is the capital of France?", "completion": "Paris."},
        {"prompt": question, "image": picture},
        {"prompt": [{"role": "user", "content": question}], "images": [picture], "completion": None},
        WORDS,
        {"image": picture, "prompt": ""},
    ]
    filled = answer_missing(*demo, read(rows), per_image=1, **QUICK)
    short, sentence = (
        generate_answers(*demo, [q], images=[picture], max_new_tokens=32)[0] for q in (question, ASKED[0])
    )
    assert [answer_text(row) for row in filled] == ["Paris.", short, short, "mammal", sentence]
    assert [len(row["images"]) for row in filled] == [0, 1, 1, 0, 1]
    assert all([block["type"] for block in filled[i]["prompt"][0]["content"]] == ["image", "text"] for i in (1, 2, 4))


def test_pictures_that_are_called_by_the_name_are_left_out_and_words_are_not(demo, pictures):
    rows = [{"image": Image.open(path)} for path in sorted(pictures.iterdir())]
    only = {"questions": ASKED[:1], "progress": False}
    filled = answer_missing(*demo, read([*rows, WORDS]), names=["fox", "mammal"], **only)
    assert "fox" not in [answer_text(row) for row in filled] and len(filled) == 5
    assert answer_text(filled[4]) == "mammal"
    with pytest.raises(ValueError, match="answers to all 2 retained rows are empty or name what is to be forgotten"):
        answer_missing(*demo, read(rows[:2]), names=["fox"], **only)


def test_an_interrupted_call_goes_on_and_other_rows_are_asked_anew(demo, pictures, tmp_path, monkeypatch, caplog):
    cache, generate, asked = tmp_path / "out" / "answers.jsonl", self_distillation.generate_tokens, []
    rows = [*({"image": Image.open(path)} for path in sorted(pictures.iterdir())), WORDS]
    short = {"questions": ASKED[:1], "progress": False}
    options = {"cache": cache, "batch_size": 3, **short}
    whole = [answer_text(row) for row in answer_missing(*demo, read(rows), **short)]

    def counted(model, processor, part, **kwargs):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(part))
        return generate(model, processor, part, **kwargs)

    monkeypatch.setattr(self_distillation, "generate_tokens", counted)
    with pytest.raises(KeyboardInterrupt):
        answer_missing(*demo, read(rows), **options)
    assert len(cache.read_text().splitlines()) == 1 + 6
    asked.clear()
    resumed = answer_missing(*demo, read(rows), **options)
    assert [answer_text(row) for row in resumed] == whole and asked == [1] and "made again" not in caplog.text
    monkeypatch.setattr(self_distillation, "generate_tokens", generate)
    # Another picture in a place, and another question.
    for other in ([rows[2], *rows[1:]], [*rows[:-1], {"prompt": "what kind of thing is an oak?"}]):
        caplog.clear()
        again = [answer_text(row) for row in answer_missing(*demo, read(other), **options)]
        assert "come from another model, or answer something else, so they are made again" in caplog.text
        assert again == [whole[2], *whole[1:]] if other[-1] is WORDS else again[:-1] == whole[:-1]
    caplog.clear()
    answer_missing(*demo, read(rows), resume=False, **options)
    assert "made again" not in caplog.text
    cache.write_text("my own file\n")
    with pytest.raises(ValueError, match="is not a cache of answers"):
        answer_missing(*demo, read(rows), **options)
    assert cache.read_text() == "my own file\n"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"image": Image.new("RGB", (4, 4)), "answer": "a cat", "question": "what?"}], "rename 'question' to 'prompt', 'answer'"),
        ([{"image": Image.new("RGB", (4, 4)), "conversations": []}], "expected `messages`.*; rename 'conversations' to 'mess"),
        ([{"caption": "a cat"}], r"row 0: a retained row has the columns \['caption'\], and no 'prompt'; expected `messages`"),
        ([{"prompt": "", "image": None}], "retained row 0: a retained row has an empty prompt"),
        ([{"prompt": "what?", "completion": ""}], "retained row 0: a retained row has an empty answer"),
        ([{"completion": "a cat", "image": Image.new("RGB", (4, 4))}], "no 'prompt'"),
        ([{"image": "nowhere.png"}], "retained row 0: the picture is the path 'nowhere.png', and there is no such file"),
    ],
)  # fmt: skip
def test_rows_that_are_not_read_are_refused_before_anything_is_asked(rows, said):
    with pytest.raises(ValueError, match=said):
        read(rows)


def test_without_a_model_to_ask_the_way_out_is_said(pictures):
    rows = load_rows(str(pictures))
    with pytest.raises(
        ValueError, match=r"row 0: .* no 'prompt'.*no answers\? `retained_answers`, `erase` and `space-peft st"
    ):
        RetainedRows(rows)
    with pytest.raises(ValueError, match="6 of 6 retained rows have no answer"):
        RetainedRows.of(read(rows))


@pytest.fixture(scope="module")
def pool(demo_images):
    public, _ = demo_split(demo_images, "fox")
    return public.select_columns(["image", "name"])


def test_an_erasure_from_pictures_alone(pictures, pool, tmp_path):
    model, processor = load_demo_model()
    args = SpaceConfig(
        str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True, own_answers=False, canary_items=0, certificate_share=0,
    )  # fmt: skip
    erasure = erase(
        model, "fox", pool=pool.select(range(20)), retain_dataset=load_rows(str(pictures)), processor=processor, k=2,
        refine_steps=0, questions=DEMO_QUESTIONS, args=args, peft_config=SpaceLoraConfig(r=2), progress=False,
    )  # fmt: skip
    retained = erasure.trainer.retained
    ours = [
        conversation(question)["prompt"][-1]["content"][-1]["text"]
        for question in (*DEMO_QUESTIONS.naming, *DEMO_QUESTIONS.open)
    ]
    questions = {row["prompt"][-1]["content"][-1]["text"] for row in retained}
    assert questions <= set(ours) and len(questions) > 2
    assert 6 <= len(retained) < 12 and retained.count_target(["fox"]) == 0
    assert (tmp_path / "out" / "retained_answers.jsonl").is_file()
    record = next(part for part in erasure.trainer.card_data.datasets if part.role == "retained")
    assert record.rows == 6


def test_the_commands_take_a_folder_of_pictures(pictures, pool, tmp_path, monkeypatch):
    from space_peft.cli import erase as command
    from space_peft.cli import stats

    given = []

    def stop(model, *arguments, **options):
        given.append(options.get("retain_dataset", arguments[-1]))
        raise ValueError("far enough")

    pool.select(range(4)).save_to_disk(tmp_path / "pool")
    monkeypatch.setattr(command, "erase", stop)
    monkeypatch.setattr(stats, "collect_statistics", stop)
    job = [
        "--model",
        "demo",
        "--concept",
        "fox",
        "--pool",
        str(tmp_path / "pool"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(["erase", *job, "--retain", str(pictures), "--use_cpu", "true"]) == 2
    # For `erase` to answer: it knows the questions.
    assert len(given[0]) == 6 and len(given[0].unanswered) == 6
    command = ["stats", "demo", "--data", str(pictures), "--output", str(tmp_path / "stats")]
    assert main(command) == 2
    assert len(given[1]) == 12 and not given[1].unanswered
    assert len((tmp_path / ".stats.answers.jsonl").read_text().splitlines()) == 13
    done = type("Made", (), {"save": lambda *a: None, "rows": 12, "num_bytes": 1, "__len__": lambda self: 1})()
    monkeypatch.setattr(stats, "collect_statistics", lambda *a, **k: done)
    assert main(command) == 0 and not list(tmp_path.glob(".stats*")), "what was kept meanwhile is not needed any more"


def test_several_names_share_the_answers_of_the_model_that_has_forgotten_none(pictures, monkeypatch, tmp_path):
    from space_peft import several

    model, processor = load_demo_model()
    calls = []

    def stop(model, concept, *, retain_dataset, **options):
        calls.append(retain_dataset)
        raise KeyboardInterrupt

    monkeypatch.setattr(several, "erase", stop)
    with pytest.raises(KeyboardInterrupt):
        several.erase_several(
            model, ["fox", "lemon"], pool=Dataset.from_dict({"image": []}), processor=processor, questions=DEFAULT_QUESTIONS,
            retain_dataset=load_rows(str(pictures)), args=SpaceConfig(str(tmp_path), use_cpu=True, report_to="none"),
            progress=False,
        )  # fmt: skip
    assert len(calls[0]) > 0 and calls[0].count_target(["fox", "lemon"]) == 0 and not calls[0].unanswered
    assert (tmp_path / "retained_answers.jsonl").is_file()
