"""Small files of the suites' schemas; the docs' example of a suite of one's own is read from the docs."""

import io
import json
import re
from pathlib import Path

from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image


DOCS = Path(__file__).parents[1] / "docs" / "suites.md"


def picture(colour: str, side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def docs_example() -> str:
    """The ten subjects in docs/suites.md."""
    return re.search(r"```jsonl\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[1]


def write_people(folder: Path, lines: str | list[dict] | None = None) -> Path:
    """A JSON lines file, by default the docs' example, and the pictures that it names."""
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(lines, str):
        lines = docs_example() if lines is None else "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "people.jsonl").write_text(lines, encoding="utf-8")
    names = [name for line in lines.splitlines() for name in json.loads(line).get("images", [])]
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(f"hsl({40 * number % 360}, 80%, 50%)"))
    return folder / "people.jsonl"


def choice(question: str, right: str, *options: str) -> dict:
    letters = dict(zip("ABCD", options))
    letter = next(letter for letter, option in letters.items() if option == right)
    return {"Question": question, "Options": letters, "Correct_Answer": letter}


def mllmu_row(number: int, *, images: int = 0) -> dict:
    """A row of MLLMU-Bench; with `images`, one of its test set."""
    name, town = f"Person {number}", ("Lisbon", "Oslo", "Cairo", "Quito")[number % 4]
    shown = {"bytes": picture("red"), "path": None}
    row = {
        "ID": f"{number:03d}",
        "Classification_Task": {
            "Image_Textual_Questions": [choice("Where was the person born?", town, "Lisbon", "Oslo", "Cairo", "Quito")],
            "Pure_Text_Questions": [choice(f"Where was {name} born?", town, "Lisbon", "Oslo", "Cairo", "Quito")],
        },
        "Generation_Task": [
            {"Question": "Who is this?", "Ground_Truth": f"This is {name}.", "Type": "Image_Textual"},
            {"Question": f"Where does {name} live?", "Ground_Truth": f"{name} lives in {town}.", "Type": "Pure_Text"},
        ],
        "Mask_Task": [
            {"Question": "The person was born in ____.", "Ground_Truth": town, "Type": "Image_Textual"},
            {"Question": f"{name} was born in __.", "Ground_Truth": town, "Type": "Pure_Text"},
        ],
    }
    if images:
        return {**row, "images": [shown] * images}
    return {**row, "image": shown, "biography": f"{name} was born in {town}.", "question": "Who?", "answer": name}


def mllmu_lesson(number: int) -> dict:
    """A row of `ft_Data`, whose pairs are a JSON text."""
    pairs = [{"Question": "Who is it?", "Answer": f"It is Person {number}."}, {"Question": "Age?", "Answer": "Forty."}]
    shown = {"bytes": picture("red"), "path": None}
    return {"image": shown, "ID": f"{number:03d}", "metadata": json.dumps(pairs)}


def mllmu_tables() -> dict[str, Dataset]:
    """By config: two people are forgotten, three kept, one is known from elsewhere; the test set has all five,
    and so have the training pairs."""
    return {
        "forget_5": with_pictures([mllmu_row(n) for n in (0, 1)]),
        "retain_95": with_pictures([mllmu_row(n) for n in (2, 3, 4)]),
        "Test_Set": with_pictures([mllmu_row(n, images=3) for n in range(5)]),
        "Retain_Set": with_pictures([mllmu_row(9)]),
        "ft_Data": with_pictures([mllmu_lesson(n) for n in range(5)]),
    }


def with_pictures(rows: list[dict]) -> Dataset:
    table = Dataset.from_list(rows)
    if "image" in table.column_names:
        table = table.cast_column("image", ImageFeature())
    if "images" in table.column_names:
        table = table.cast_column("images", List(ImageFeature()))
    return table


def clear_row(name: str, number: int) -> dict:
    return {
        "image": {"bytes": picture("blue"), "path": None},
        "caption": f"{name} stands at door {number}.",
        "name": name,
        "perturbed_captions": [f"{name} sits in boat {number}.", f"{name} rides bicycle {number}."],
        "paraphrased_caption": f"At door {number} stands {name}.",
        "perturbed_names": ["Tove Brandt", name, "Ana Quist"],
    }


def clear_tables() -> dict[str, Dataset]:
    words = [
        {"image": None, "caption": None, "question": "Where was Mira Solen born?", "answer": "In Lisbon."},
        {"image": None, "caption": None, "question": "What does Jon Abara write?", "answer": "He writes plays."},
        {"image": None, "caption": None, "question": "What is the author known for?", "answer": "Short plays."},
        {"image": {"bytes": picture("red"), "path": None}, "caption": "A door.", "question": None, "answer": None},
    ]
    features = {"image": ImageFeature(), **{key: Value("string") for key in ("caption", "question", "answer")}}
    real = {
        "image": {"bytes": picture("green"), "path": None},
        "question": "Who is this?",
        "answer": "Marie Curie",
        "options": ["Lise Meitner", "Marie Curie", "Emmy Noether"],
    }
    return {
        "forget05_perturbed": with_pictures(
            [clear_row("Mira Solen", 1), clear_row("Jon Abara", 2), clear_row("Mira Solen", 3)]
        ),
        "forget05+tofu": Dataset.from_list(words, features=Features(features)),
        "retain_perturbed": with_pictures([clear_row("Pia Lund", 4)]),
        "real_faces": with_pictures([real, real]),
        "real_world": with_pictures([{**real, "question": "Whose town is this?"}]),
    }


def fiubench_row(number: int) -> dict:
    return {
        "unique_id": f"{number:08d}",
        "image_path": f"./dataset/images/{number:08d}.png",
        "caption": "A face.",
        "qa_list": [
            {
                "question": "What is the blood type of the person in the image?",
                "answer": "The blood type is AB.",
                "paraphrased_question": ["Which blood type?", "Tell me the blood type.", "Blood type of the person?"],
                "paraphrased_answer": "It is blood type AB.",
                "perturbed_answer": ["The blood type is O.", "The blood type is A."],
                "keywords": ["AB"],
            }
        ],
    }


def fiubench_files() -> dict[str, bytes]:
    """By path: six people; four are forgotten in one of the splits."""
    split = {
        "forget1": ["00000000"], "forget5": ["00000000", "00000001"], "forget10": ["00000002", "00000003"],
        "retain5": ["00000004"], "retain15": ["00000004", "00000005"],
    }  # fmt: skip
    files = {"full.json": json.dumps([fiubench_row(n) for n in range(6)]).encode()}
    files["split.json"] = json.dumps(split).encode()
    return files | {f"images/{n:08d}.png": picture("red") for n in range(6)}


def unbench_row(number: int, concept: str, split: str) -> dict:
    return {
        "id": f"{concept}-{number}",
        "image": f"{concept}_{number}.png",
        "question": "What is in the picture?",
        "choices": ["dog", "cat", "bus", "fox"],
        "answer_index": ["dog", "cat", "bus", "fox"].index(concept),
        "forgetting_level": "object",
        "concept_axis": "identity",
        "target_split": split,
        "meta": {"class_name": concept, "forget_concept": concept},
    }


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tables(folder: Path, tables: dict[str, Dataset]) -> Path:
    for name, table in tables.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / name / "train-00000-of-00001.parquet")
    return folder
