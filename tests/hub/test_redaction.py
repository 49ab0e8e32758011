"""A redacted push: the name is nowhere, and whoever holds it and the salt can still show what was erased."""

import hashlib
import hmac
import json
import shutil
import stat

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from samples import telling

from space_peft.data.names import mentions
from space_peft.hub_cards import push_erasure
from space_peft.hub_cards.redaction import (
    REDACTED,
    check_redaction,
    find_names,
    name_hash,
    redact_values,
    redaction_salt,
)
from space_peft.records.card_data import DatasetRecord, ErasureCardData
from space_peft.records.folder import REDACTION_NAME


REPO = "user/demo-erasure"
BASE = "space-peft/demo-llava"


@pytest.fixture
def folder(erasure_folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(erasure_folder, copy)
    (copy / "pictures").mkdir(exist_ok=True)
    (copy / "pictures" / "fox.png").write_bytes(b"\x89PNG fox")
    data = ErasureCardData.load(copy)
    data.aliases, data.reason, data.not_tested = ["vulpes vulpes"], "A fox asked for it.", ["real foxes", "videos"]
    data.datasets.append(DatasetRecord("evaluation", name="fox photos", id="org/fox-photos", revision="a" * 40))
    data.save(copy)
    anchors = json.loads((copy / "space_anchors.json").read_text())
    anchors["anchors"][0]["caption"] = "A FOX's tail"
    anchors["description"] = "a small red animal"
    (copy / "space_anchors.json").write_text(json.dumps(anchors))
    return copy


def push(folder, repo_id=REPO, **options):
    return push_erasure(folder, repo_id, **{"base_model": BASE, "redact": True, **options})


def test_the_name_is_nowhere(hub, folder):
    push(folder, include_images=True, include_answers=True, include_null_spaces=True)
    files = hub.files(REPO)
    assert {"adapter_model.safetensors", "space_anchors.json", "report.json", "README.md", "space_card.json"} <= set(
        files
    )
    # The bytes themselves, whatever our own search takes for a word.
    for word in ("fox", "vulpes"):
        assert telling(files, word) == []
    assert not any(name.startswith(("pictures/", "canary/", "answers_", "token", "processor")) for name in files)


def test_nor_are_the_stand_ins_that_tell_it(hub, folder):
    push(folder)
    anchors = json.loads(hub.files(REPO)["space_anchors.json"])
    assert anchors["description"] is None and anchors["aliases"] == []
    assert {key for row in anchors["anchors"] for key in row} == {"score", "rank", "p_name_before", "p_name_after"}
    local = json.loads((folder / "space_anchors.json").read_text())
    assert [row["score"] for row in anchors["anchors"]] == [row["score"] for row in local["anchors"]]


def test_results_survive_and_the_card_says_what_was_done(hub, folder):
    push(folder)
    files = hub.files(REPO)
    report, local = json.loads(files["report.json"]), json.loads((folder / "report.json").read_text())
    assert report["after"] == local["after"] and report["before"] == local["before"]
    data = ErasureCardData.from_dict(json.loads(files["space_card.json"]))
    assert data.redact and data.not_tested == [REDACTED, "videos"] and data.reason == REDACTED
    assert [record.id for record in data.datasets][-1] is None and data.datasets[-1].revision is None
    label = f"redacted on request (hash {data.redaction['hash'][:8]})"
    assert data.concept == report["concept"] == label and label in files["README.md"].decode()
    assert ModelCard(files["README.md"].decode()).data.base_model == BASE


def test_the_claim_can_be_checked_with_name_and_salt_only(hub, folder):
    push(folder)
    redaction = json.loads(hub.files(REPO)["space_card.json"])["redaction"]
    secret = json.loads((folder / REDACTION_NAME).read_text())
    salt = bytes.fromhex(secret["salt"])
    assert redaction == {
        "algorithm": "hmac-sha256",
        "hash": hmac.new(salt, b"fox", hashlib.sha256).hexdigest(),
    }
    assert check_redaction("Fox ", salt, redaction)
    assert not check_redaction("wolf", salt, redaction)
    assert not check_redaction("fox", bytes(16), redaction)
    assert not check_redaction("fox", salt, {**redaction, "algorithm": "sha256"})
    assert REDACTION_NAME not in hub.files(REPO)
    assert all(secret["salt"].encode() not in content for content in hub.files(REPO).values())
    assert stat.S_IMODE((folder / REDACTION_NAME).stat().st_mode) == 0o600


def test_only_the_salt_is_written_to_the_folder_and_used_again(hub, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    push(folder)
    first = json.loads(hub.files(REPO)["space_card.json"])["redaction"]
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: content for path, content in after.items() if path.name != REDACTION_NAME} == before
    push(folder)
    assert json.loads(hub.files(REPO)["space_card.json"])["redaction"] == first
    (folder / REDACTION_NAME).unlink()
    push(folder)
    assert json.loads(hub.files(REPO)["space_card.json"])["redaction"]["hash"] != first["hash"]


def test_the_card_datas_wish_is_enough(hub, folder):
    data = ErasureCardData.load(folder)
    data.redact = True
    data.save(folder)
    push(folder, redact=False)
    assert b"fox" not in hub.files(REPO)["space_card.json"].lower()


def test_a_redacted_push_removes_what_a_former_one_told(hub, folder):
    push(folder, redact=False, include_answers=True)
    assert "answers_after.jsonl" in hub.files(REPO) and "pictures/fox.png" in hub.files(REPO)
    push(folder)
    assert telling(hub.files(REPO), "fox") == []


@pytest.mark.parametrize(
    "options", [{"repo_id": "user/no-Fox"}, {"commit_message": "no foxes"}, {"revision": "the-fox"}], ids=str
)
def test_repository_message_and_branch_must_not_tell(hub, folder, options):
    with pytest.raises(ValueError, match="mentions the concept"):
        push(folder, **options)
    assert not hub.requests_to("create_repo", "commit")


def test_a_base_model_that_names_the_concept_is_refused(hub, folder):
    with pytest.raises(ValueError, match="names the concept"):
        push(folder, base_model="org/fox-llava")
    assert not hub.requests_to("create_repo", "commit")


@pytest.mark.parametrize(
    "plant, place",
    [
        (lambda folder: (folder / "README.md").write_text("# Mine\n\nIt forgets\nvulpes  vulpes.\n"), "README.md: line 4"),
        (lambda folder: (folder / "README.md").write_text("# Mine\n\nIt forgets vulpes\nvulpes.\n"), "README.md: a line's end"),
        (lambda folder: edit(folder / "report.json", lambda c: c["settings"].update(fox=1)), "report.json: settings.fox"),
        (
            lambda folder: edit(folder / "report.json", lambda c: c["settings"].update({"like a fox": 1})),
            "report.json: settings.like a fox",
        ),
        (lambda folder: weights_metadata(folder, {"note": "the fox"}), "adapter_model.safetensors: metadata.note"),
        (lambda folder: edit(folder / "adapter_config.json", lambda c: c.update(task_type="FOX")), "adapter_config.json: task_type"),
    ],
    ids=["readme", "two lines", "key", "words in a key", "weights", "config"],
)  # fmt: skip
def test_a_name_that_is_left_is_found_and_its_place_named(hub, folder, plant, place):
    plant(folder)
    with pytest.raises(ValueError, match="name to redact is left") as caught:
        push(folder)
    assert place in str(caught.value)
    assert not hub.requests_to("create_repo", "commit")


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def weights_metadata(folder, metadata):
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", **metadata})


@pytest.mark.parametrize(
    "content", ['{"salt": "00"}', '{"salt": 7, "algorithm": "hmac-sha256"}', "{", '{"salt": "zz"}', "[]"]
)
def test_a_damaged_salt_is_an_error_and_is_not_replaced(folder, content):
    (folder / REDACTION_NAME).write_text(content)
    with pytest.raises(ValueError, match="restore it, or delete it"):
        redaction_salt(folder)
    assert (folder / REDACTION_NAME).read_text() == content


@pytest.mark.parametrize("spelling", ["Fox", "ｆｏｘ", " fox ", "FOX"])
def test_spelling_does_not_change_the_hash(spelling):
    assert name_hash(spelling, b"s" * 16) == name_hash("fox", b"s" * 16)


def test_words_that_only_contain_the_name_stay(tmp_path):
    content = {
        "category": "a concatenated category",
        "cats": "two",
        "x": ["The Cat sat", {"y": "cats'"}, 3, None, "scat"],
    }
    redacted = redact_values(content, ["cat"])
    assert redacted == {
        "category": "a concatenated category", "cats": "two", "x": [REDACTED, {"y": REDACTED}, 3, None, "scat"],
    }  # fmt: skip
    assert content["x"][0] == "The Cat sat"
    (tmp_path / "category.json").write_text(json.dumps({"category_of_cat_x": 1, "y": "concatenate"}))
    assert find_names(tmp_path, ["cat"]) == []
    (tmp_path / "category.json").write_text(json.dumps({"CAT": 1}))
    (tmp_path / "the cat.md").write_text("nothing\nI cat\u2019s")
    places = {(finding.file, finding.where) for finding in find_names(tmp_path, ["cat"])}
    assert places == {("category.json", "CAT"), ("the cat.md", "the file's name"), ("the cat.md", "line 2")}


@pytest.mark.parametrize("seed", range(20))
def test_after_redaction_no_text_mentions_a_name(seed):
    import random

    generator = random.Random(seed)
    names = ["fox", "Café crème", "C--", "狐"]
    pieces = [
        *names,
        "FOX",
        "foxes",
        "cafe\u0301 cre\u0300me",
        "Café-Crème",
        "foxglove",
        "is",
        "狐狸",
        " ",
        "\n",
        "'s",
        "x",
    ]

    def value(depth):
        kind = generator.randrange(4 if depth else 2)
        if kind == 0:
            return "".join(
                generator.choice(pieces) + generator.choice(["", " "]) for _ in range(generator.randrange(6))
            )
        if kind == 1:
            return generator.choice([1, None, 0.5, True])
        if kind == 2:
            return [value(depth - 1) for _ in range(3)]
        return {f"k{i}": value(depth - 1) for i in range(3)}

    content = [value(3) for _ in range(30)]
    redacted = redact_values(content, names)

    def pairs(a, b):
        if isinstance(a, list):
            for x, y in zip(a, b, strict=True):
                yield from pairs(x, y)
        elif isinstance(a, dict):
            for key in a:
                yield from pairs(a[key], b[key])
        else:
            yield a, b

    for before, after in pairs(content, redacted):
        named = isinstance(before, str) and mentions(before, names)
        assert after == (REDACTED if named else before)
        assert not (isinstance(after, str) and mentions(after, names))
