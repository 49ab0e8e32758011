"""Each loader on small files of the official schema: what is read, and what is refused, by file and row."""

import copy
import json
import zipfile

import pytest
from datasets import Dataset
from suite_files import (
    clear_row,
    clear_tables,
    fiubench_files,
    fiubench_row,
    mllmu_lesson,
    mllmu_row,
    mllmu_tables,
    picture,
    unbench_row,
    with_pictures,
    write_files,
    write_people,
    write_tables,
)

from space_peft.suites import load_clear, load_fiubench, load_mllmu, load_own, load_suite, load_vlm_unbench
from space_peft.suites.answers import Prompt
from space_peft.suites.sources import StoredPicture, ZippedPicture


def asked(subject, kind, modality):
    return [q for q in subject.questions if (q.kind, q.modality) == (kind, modality)]


@pytest.fixture(scope="module")
def mllmu(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("mllmu"), mllmu_tables())


def test_mllmu(mllmu):
    suite = load_suite("mllmu", mllmu, split="forget_5")
    assert {split: [s.id for s in subjects] for split, subjects in suite.subjects.items()} == {
        "forget": ["000", "001"],
        "test": ["000", "001"],  # of all five, those of the request
        "retain": ["002", "003", "004"],
        "real": ["009"],
    }
    second = suite.split("forget")[1]
    assert len(second.questions) == 6 and len(second.images) == 1
    [choice] = asked(second, "classification", "image+text")
    assert choice.answer == "Oslo" and choice.options == ("Lisbon", "Oslo", "Cairo", "Quito")
    assert suite.protocol.prompt(choice) == (
        "Where was the person born?\nA: Lisbon\nB: Oslo\nC: Cairo\nD: Quito\n"
        "Just give ONE letter representing the answer directly."
    )
    # However long, a blank is one.
    assert asked(second, "cloze", "image+text")[0].question == "The person was born in [Blank]."
    assert asked(second, "generation", "text")[0].answer == "Person 1 lives in Oslo."
    assert len(suite.split("test")[0].images) == 3
    assert Prompt("", suite.split("test")[0].images[2]).opened().size == (16, 16)


def test_mllmu_in_parts_and_from_single_files(mllmu, tmp_path):
    assert list(load_mllmu(mllmu, splits=("test",)).subjects) == ["test"]
    for config, table in mllmu_tables().items():
        table.to_parquet(tmp_path / f"{config}.parquet")
    assert load_mllmu(tmp_path).subjects == load_mllmu(mllmu).subjects
    with pytest.raises(ValueError, match=r"must be one of \['forget_5', 'forget_10', 'forget_15'\], got 'forget_7'"):
        load_mllmu(mllmu, "forget_7")
    with pytest.raises(
        FileNotFoundError, match="expected the folder 'forget_10' with Parquet files, or forget_10.parquet"
    ):
        load_mllmu(mllmu, "forget_10")


def test_training_pairs_of_mllmu(mllmu, tmp_path):
    suite = load_mllmu(mllmu, training=True)
    second = suite.split("forget")[1]
    assert [(q.question, q.answer) for q in second.training] == [("Who is it?", "It is Person 1."), ("Age?", "Forty.")]
    assert suite.split("retain")[0].training and not suite.split("test")[0].training and len(second.questions) == 6
    tables = {**mllmu_tables(), "ft_Data": with_pictures([mllmu_lesson(0)])}
    write_tables(tmp_path, tables)
    with pytest.raises(ValueError, match="forget_5.*row 1: '001' has no training pairs in 'ft_Data'"):
        load_mllmu(tmp_path, training=True)
    write_tables(tmp_path, {"ft_Data": with_pictures([{**mllmu_lesson(0), "metadata": "[{'Question': 1}]"}])})
    with pytest.raises(ValueError, match="ft_Data.*row 0, metadata is not valid JSON"):
        load_mllmu(tmp_path, training=True)


def test_a_set_in_the_schema_of_mllmu_may_have_more(tmp_path):
    rows = [{**mllmu_row(0), "name": "Mira Solen"}]
    for entry in (*rows[0]["Mask_Task"], *rows[0]["Generation_Task"]):
        entry |= {"Perturbed_Answers": ["Bergen", "Turin"], "Paraphrased_Answers": ["Lisboa"]}
    write_tables(tmp_path, {"forget_5": with_pictures(rows), "Holdout_Set": with_pictures([mllmu_row(7)])})
    suite = load_mllmu(tmp_path, splits=("forget", "holdout"))
    [mira], [other] = suite.split("forget"), suite.split("holdout")
    assert (mira.name, mira.id, other.name) == ("Mira Solen", "000", "007")
    [blank] = asked(mira, "cloze", "text")
    assert blank.perturbed_answers == ("Bergen", "Turin") and blank.paraphrased_answers == ("Lisboa",)


def spoil_options(row):
    row["Classification_Task"]["Pure_Text_Questions"][0]["Options"]["B"] = None


def spoil_letter(row):
    row["Classification_Task"]["Image_Textual_Questions"][0]["Correct_Answer"] = "E"


def spoil_type(row):
    row["Generation_Task"][1]["Type"] = "Audio"


def spoil_truth(row):
    row["Mask_Task"][0]["Ground_Truth"] = " "


def spoil_image(row):
    row["image"] = None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            spoil_options,
            r"row 1, Classification_Task, Pure_Text_Questions\[0\], Options has the letters \['A', 'C', 'D'\]",
        ),
        (spoil_letter, r"row 1, .*Image_Textual_Questions\[0\] has the right answer 'E'; expected one of the letters"),
        (
            spoil_type,
            r"row 1, Generation_Task\[1\] is of type 'Audio'; expected one of \['Image_Textual', 'Pure_Text'\]",
        ),
        (spoil_truth, r"row 1, Mask_Task\[0\] has the str ' ' as 'Ground_Truth'; expected a text that is not blank"),
        (spoil_image, r"row 1, .*a question of modality 'image\+text' about '001', who has no picture"),
    ],
)
def test_a_bad_row_of_mllmu_is_named(tmp_path, spoil, message):
    rows = [mllmu_row(0), mllmu_row(1)]
    spoil(rows[1])
    with_pictures(rows).to_parquet(tmp_path / "forget_5.parquet")
    with pytest.raises(ValueError, match=f"forget_5.parquet, {message}"):
        load_mllmu(tmp_path, splits=("forget",))


@pytest.mark.parametrize("column", ["ID", "image", "Classification_Task", "Generation_Task", "Mask_Task"])
def test_a_missing_column_of_mllmu_is_named(tmp_path, column):
    with_pictures([mllmu_row(0)]).remove_columns(column).to_parquet(tmp_path / "forget_5.parquet")
    with pytest.raises(
        ValueError, match=f"forget_5.parquet has no column '{column}'; it has .*MLLMU-Bench.* has the columns"
    ):
        load_mllmu(tmp_path, splits=("forget",))


def test_nobody_is_forgotten_and_kept(tmp_path):
    tables = {"forget_5": with_pictures([mllmu_row(0)]), "retain_95": with_pictures([mllmu_row(1), mllmu_row(0)])}
    write_tables(tmp_path, tables)
    with pytest.raises(ValueError, match="retain_95.*row 1: '000' is in the splits 'forget' and 'retain'"):
        load_mllmu(tmp_path, splits=("forget", "retain"))


@pytest.fixture(scope="module")
def clear(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("clear"), clear_tables())


def test_clear(clear):
    suite = load_suite("clear", clear, split="forget05")
    mira, jon, rest = suite.split("forget")
    assert (mira.name, jon.name, len(mira.images), len(jon.images)) == ("Mira Solen", "Jon Abara", 2, 1)
    captions, [name, _] = asked(mira, "caption", "image+text"), asked(mira, "cloze", "image+text")
    assert [q.image for q in captions] == [0, 1] and captions[1].answer == "Mira Solen stands at door 3."
    assert (
        captions[0].paraphrased_answers == ("At door 1 stands Mira Solen.",) and len(captions[0].perturbed_answers) == 2
    )
    # The right name among the wrong ones is not counted as wrong.
    assert name.answer == "Mira Solen" and name.perturbed_answers == ("Tove Brandt", "Ana Quist")
    # Questions in words go to whom they name; the row with a picture is not asked again.
    assert [q.question for q in asked(mira, "generation", "text")] == ["Where was Mira Solen born?"]
    assert [q.question for q in rest.questions] == ["What is the author known for?"]
    assert suite.notes == (
        "1 questions in words name nobody, or several people; they are kept together under one subject.",
    )
    real = suite.split("real")
    assert [s.questions[0].task for s in real] == ["real faces", "real faces", "real world"]
    # Ids do not say where the files lie: reports of two machines can be compared.
    assert [s.id for s in real] == ["real_faces 0", "real_faces 1", "real_world 0"]
    assert real[0].questions[0].perturbed_answers == ("Lise Meitner", "Emmy Noether")


def test_prompts_of_captions_are_drawn_by_the_seed(clear):
    def prompts(**options):
        suite = load_clear(clear, splits=("forget",), text=False, **options)
        return [q.question for s in suite.split("forget") for q in s.questions if q.kind == "caption"]

    assert prompts() == prompts(seed=0)
    assert any(prompts(seed=seed) != prompts() for seed in (1, 2, 3))


def test_bad_rows_of_clear_are_named(tmp_path):
    rows = [clear_row("Mira Solen", 1), {**clear_row("Jon Abara", 2), "perturbed_names": ["Jon Abara"]}]
    with_pictures(rows).to_parquet(tmp_path / "forget05_perturbed.parquet")
    with pytest.raises(ValueError, match="forget05_perturbed.parquet, row 1 has no wrong answer in 'perturbed_names'"):
        load_clear(tmp_path, splits=("forget",), text=False)
    with_pictures(rows).remove_columns("paraphrased_caption").to_parquet(tmp_path / "retain_perturbed.parquet")
    with pytest.raises(ValueError, match="retain_perturbed.parquet has no column 'paraphrased_caption'"):
        load_clear(tmp_path, splits=("retain",))
    with pytest.raises(ValueError, match="must be one of .*got 'forget5'"):
        load_clear(tmp_path, "forget5")


@pytest.fixture(scope="module")
def fiubench(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("fiubench"), fiubench_files())


def test_fiubench(fiubench):
    suite = load_suite("fiubench", fiubench, split="forget5")
    assert [s.id for s in suite.split("forget")] == ["00000000", "00000001"]
    assert [s.id for s in suite.split("retain")] == ["00000004"]
    question = suite.split("forget")[1].questions[0]
    assert question.keywords == ("AB",) and len(question.paraphrases) == 3
    assert question.paraphrased_answers == ("It is blood type AB.",) and len(question.perturbed_answers) == 2
    # All that no forget split has, whichever is asked for.
    everyone = load_fiubench(fiubench, retain="retain").split("retain")
    assert [s.id for s in everyone] == ["00000004", "00000005"]
    assert Prompt("", everyone[0].images[0]).opened().size == (16, 16)


def test_pictures_of_fiubench_may_be_zipped_or_elsewhere(tmp_path, fiubench):
    files = fiubench_files()
    folder = write_files(tmp_path / "zipped", {name: files[name] for name in ("full.json", "split.json")})
    with pytest.raises(FileNotFoundError, match="full.json, row 0 names the picture 'dataset/images/00000000.png'"):
        load_fiubench(folder)
    assert load_fiubench(folder, images=fiubench / "images").subjects == load_fiubench(fiubench).subjects
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name, content in files.items():
            if name.endswith(".png"):
                archive.writestr(f"sfhq/{name}", content)
    image = load_fiubench(folder).split("forget")[0].images[0]
    assert isinstance(image, ZippedPicture) and Prompt("", image).opened().size == (16, 16)


def test_fiubench_in_parquet(tmp_path):
    rows = [{**fiubench_row(n), "image": {"bytes": picture("red"), "path": None}} for n in range(6)]
    with_pictures(rows).to_parquet(tmp_path / "full.parquet")
    (tmp_path / "split.json").write_bytes(fiubench_files()["split.json"])
    suite = load_fiubench(tmp_path)
    assert [s.id for s in suite.split("forget")] == ["00000000", "00000001"]
    assert isinstance(suite.split("forget")[0].images[0], StoredPicture)


def test_bad_files_of_fiubench_are_named(tmp_path):
    def load(change):
        rows = [fiubench_row(n) for n in range(6)]
        split = json.loads(fiubench_files()["split.json"])
        change(rows, split)
        files = {**fiubench_files(), "full.json": json.dumps(rows).encode(), "split.json": json.dumps(split).encode()}
        return load_fiubench(write_files(tmp_path, files))

    with pytest.raises(ValueError, match=r"full.json, row 1, qa_list\[0\] has no 'answer'; it has"):
        load(lambda rows, split: rows[1]["qa_list"][0].pop("answer"))
    with pytest.raises(ValueError, match=r"qa_list\[0\]: the perturbed answer 'The blood type is ab' is the right one"):
        load(lambda rows, split: rows[0]["qa_list"][0]["perturbed_answer"].append("The blood type is ab"))
    with pytest.raises(ValueError, match="split.json has '99' in 'forget', which is not among the first 400 rows"):
        load(lambda rows, split: split["forget5"].append("99"))
    with pytest.raises(ValueError, match="split.json has no 'retain5'; it has"):
        load(lambda rows, split: split.pop("retain5"))


def write_unbench(folder, **files):
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            (folder / row["image"]).write_bytes(picture("red"))
    return folder


def test_vlm_unbench(tmp_path):
    folder = write_unbench(
        tmp_path,
        test_forget=[unbench_row(n, "fox", "test_forget") for n in range(2)],
        test_retain=[unbench_row(0, "dog", "test_retain"), unbench_row(0, "cat", "all")],
    )
    suite = load_suite("vlm_unbench", folder)
    assert {split: [s.name for s in subjects] for split, subjects in suite.subjects.items()} == {
        "test": ["fox"],
        "retain": ["dog", "cat"],
    }
    fox = suite.split("test")[0]
    assert [q.image for q in fox.questions] == [0, 1] and fox.questions[0].answer == "fox"
    assert "\n3: fox\n\nReply with a single digit" in suite.protocol.prompt(fox.questions[0])
    assert suite.protocol.choose == "probability"


def test_bad_rows_of_vlm_unbench_are_named(tmp_path):
    def load(**change):
        return load_vlm_unbench(write_unbench(tmp_path, test_forget=[unbench_row(0, "fox", "all") | change]))

    with pytest.raises(ValueError, match="test_forget.jsonl, line 1 has 4 choices and the answer 4"):
        load(answer_index=4)
    with pytest.raises(ValueError, match="line 1 is of the split 'test_retain'; expected 'test_forget' or 'all'"):
        load(target_split="test_retain")
    with pytest.raises(ValueError, match="line 1, meta names no concept"):
        load(meta={"x": 1})
    with pytest.raises(FileNotFoundError, match="line 1 names the picture 'fox_0.png'.*pass its folder as `images`"):
        load_vlm_unbench(write_unbench(tmp_path, test_forget=[unbench_row(0, "fox", "all")]), images=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="expected .*test_forget.jsonl"):
        load_vlm_unbench(tmp_path / "..")
    with pytest.raises(ValueError, match="'vlm_unbench' is not on the Hub; pass"):
        load_suite("vlm_unbench")


def test_ten_people_as_in_the_docs(tmp_path):
    suite = load_suite("own", write_people(tmp_path))
    assert sum(len(subjects) for subjects in suite.subjects.values()) == 10
    assert set(suite.subjects) == {"forget", "retain", "real", "holdout"}
    tove = suite.split("forget")[1]
    assert tove.aliases == ("T. Brandt",) and len(tove.images) == 2 and tove.questions[0].answer == "baker"


@pytest.fixture
def person():
    question = {"kind": "cloze", "modality": "text", "question": "The name is __", "answer": "Mira"}
    return {"name": "Mira", "split": "forget", "questions": [question]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "forgotten"}, "line 2: `split` cannot be 'forgotten'; did you mean 'forget'"),
        ({"name": ""}, "line 2 has the str '' as 'name'"),
        ({"questions": []}, "line 2: 'Mira' has no questions"),
        ({"nickname": "M."}, "line 2 has 'nickname', which would not be read"),
        ({"images": ["none.png"]}, "line 2 names the picture .*none.png', and there is no such file"),
        ({"questions.0.kind": "essay"}, r"line 2, questions\[0\]: `kind` must be one of"),
        ({"questions.0.modality": "image"}, r"questions\[0\]: `modality` cannot be 'image'; did you mean"),
        ({"questions.0.modality": "image+text"}, r"questions\[0\]: .*'Mira', who has no picture"),
        ({"questions.0.answer": 7}, r"questions\[0\] has the int 7 as 'answer'"),
        ({"questions.0.perturbed_answer": ["x"]}, r"questions\[0\] has 'perturbed_answer', which would not be read"),
        (
            {"questions.0.perturbed_answers": ["MIRA."]},
            r"questions\[0\]: the perturbed answer 'MIRA.' is the right one",
        ),
        ({"questions.0.options": ["Mira", "Ana"]}, "only a classification has `options`"),
        ({"questions.0.kind": "classification"}, "needs 2 to 10 different options"),
        ({"questions.0.image": 0}, "`image` must be the number of a picture, for a question of modality"),
    ],
)
def test_a_bad_person_is_named(tmp_path, person, change, message):
    bad = copy.deepcopy(person) | {"name": "Mira"}
    for key, value in change.items():
        place = bad["questions"][0] if key.startswith("questions.") else bad
        place[key.rpartition(".")[2]] = value
    path = tmp_path / "people.jsonl"
    path.write_text("\n".join(map(json.dumps, [person | {"name": "Ana"}, bad])))
    with pytest.raises(ValueError, match=f"people.jsonl, {message}" if message.startswith("line") else message):
        load_own(path)


def test_a_line_that_is_no_json_and_a_person_twice(tmp_path, person):
    path = tmp_path / "people.jsonl"
    path.write_text(json.dumps(person) + "\n\n{'name': 1}\n")
    with pytest.raises(ValueError, match="people.jsonl, line 3 is not valid JSON.*Expected one subject a line"):
        load_own(path)
    path.write_text(json.dumps(person) + "\n" + json.dumps(person) + "\n")
    with pytest.raises(
        ValueError, match="line 2: the id 'Mira' appears twice in the split 'forget', first at .*line 1"
    ):
        load_own(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no subject"):
        load_own(path)
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        load_own(tmp_path / "none.jsonl")


def test_people_in_parquet(tmp_path):
    lines = [json.loads(line) for line in write_people(tmp_path).read_text().splitlines()]
    for line in lines:
        line["images"] = [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in line.get("images", [])]
        line.setdefault("aliases", None)  # `from_list` takes the columns of the first row
    with_pictures(lines).to_parquet(tmp_path / "people.parquet")
    suite = load_own(tmp_path / "people.parquet")
    assert suite.subjects == load_own(tmp_path / "people.jsonl").subjects
    Dataset.from_list([{"name": "Mira"}]).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="bad.parquet has no column 'split'.*A suite of one's own has the columns"):
        load_own(tmp_path / "bad.parquet")


def test_a_revision_of_fiubench_is_that_of_its_rows_too(tmp_path, monkeypatch):
    from space_peft.suites import fiubench as module

    (tmp_path / "split.json").write_text('{"forget5": ["1"], "retain5": ["2"]}')
    asked = []

    def read(source, revision=None):
        asked.append(revision)
        raise FileNotFoundError

    monkeypatch.setattr(module, "_on_hub", lambda repo, revision: {"split.json": tmp_path / "split.json"})
    monkeypatch.setattr(module, "read_table", read)
    with pytest.raises(FileNotFoundError):
        load_fiubench("org/rows-in-parquet", revision="abc")
    assert asked == ["abc"]
