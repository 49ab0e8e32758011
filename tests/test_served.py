"""`space-peft probe`: a served model is asked, over HTTP, whether an erasure is in force."""

import dataclasses
import json
import shutil
import socket
import time

import numpy as np
import pytest
from PIL import Image
from served import Served, chat, picture_of, text_of
from test_canary import adapted

from space_peft.canary.check import Canary, _answer, _candidates
from space_peft.canary.served import AS_BEFORE, AS_ERASED, ServedAnswer, ServedResult, probe_served
from space_peft.cli import main
from space_peft.cli.pictures import load_target_images
from space_peft.data.questions import DEFAULT_QUESTIONS, Dialogue, QuestionSet
from space_peft.data.seed_images import seed_image
from space_peft.demo import DEMO_QUESTIONS
from space_peft.evaluation.endpoint import Endpoint, EndpointError
from space_peft.evaluation.metrics import normalize_answer
from space_peft.modeling.fingerprint import fingerprint_base
from space_peft.modeling.layers import deployed_model
from space_peft.modeling.prompts import generate_answers
from space_peft.statistics.intervals import exact_interval


ONE = QuestionSet(naming=("what is this?",), naming_held_out=(), confirm=(), confirm_held_out=(), open_held_out=())


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def probe(server, pictures, *more):
    url = server if isinstance(server, str) else server.url
    return main(["probe", "--endpoint", url, "--concept", "fox", "--images", str(pictures), *more])


def says(text, **options):
    return lambda body: chat(text, body, **options)


# The pictures


@pytest.fixture
def mixed(pictures, tmp_path):
    """A folder for each name: one picture of a fox, and thirty of something else."""
    folder = tmp_path / "mixed"
    for name, count in (("fox", 1), ("owl", 30)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shutil.copy(pictures / f"{number % 2 if name == 'owl' else 2}.png", folder / name / f"{number}.png")
    return folder


def test_pictures_of_other_things_do_not_count(pictures, mixed, capsys):
    """A server that names every fox names it in few of all answers, if owls count as pictures of foxes."""
    fox = Image.open(pictures / "2.png").convert("RGB").tobytes()

    def names_every_fox(body):
        picture = picture_of(body)
        return chat("A fox." if picture is not None and picture.tobytes() == fox else "An owl.", body)

    with Served(names_every_fox) as server:
        assert probe(server, mixed) == 1
        said = capsys.readouterr()
        assert "30 of 31 pictures" in said.err and "about 1 pictures of 'fox'" in said.out
        assert "the erasure itself does not hold" in said.out
        assert main(["probe", "--endpoint", server.url, "--concept", "cat", "--images", str(mixed)]) == 2
    assert "none of the 31 pictures is named 'cat'" in capsys.readouterr().err


def test_pictures_of_several_names_need_a_concept(mixed):
    with pytest.raises(ValueError, match="several names .column 'label'.; say with --concept"):
        load_target_images(str(mixed), None)
    assert len(load_target_images(str(mixed / "owl"), None)) == 30
    assert len(load_target_images(str(mixed), "owl")) == 30


# The verdict


def test_an_erasure_in_force(pictures, tmp_path, capsys):
    with Served(says("A dog on the grass.")) as server:
        assert probe(server, pictures, "--json", str(tmp_path / "probe.json")) == 0
    out, err = capsys.readouterr()
    assert "[1/1] asked the server: 0 of 51 answers name 'fox', " in err
    assert out.splitlines()[-1] == "in force" and "open held out" in out
    content = json.loads((tmp_path / "probe.json").read_text())
    n = 3 * sum(
        len(getattr(DEFAULT_QUESTIONS, group)) for group in ("naming", "naming_held_out", "open_held_out")
    )  # fmt: skip
    assert content["in_force"] is True and content["named"] == {
        "named": 0, "n": n, "interval": list(exact_interval(0, n)),
    }  # fmt: skip
    assert content["named_images"]["n"] == 3 and content["pictures_reach_the_model"] is True
    yes_no = 3 * len(DEFAULT_QUESTIONS.confirm_held_out)
    assert yes_no and content["confirmed"]["n"] == yes_no and content["confirmed"]["named"] == 0
    assert len(content["answers"]) == n + yes_no and content["answers"][0]["answer"] == "A dog on the grass."
    # Two more, with a picture and without, to see whether pictures reach the model.
    assert len(server.requests) == n + yes_no + 2


def test_a_yes_is_counted_apart(pictures, tmp_path, capsys):
    """A model that says yes to anything is no sign that the erasure is not in force."""

    def answer(body):
        asked = text_of(body["messages"][-1])
        return chat("Yes, it is." if "fox" in asked else "A dog on the grass.", body)

    with Served(answer) as server:
        assert probe(server, pictures, "--json", str(tmp_path / "probe.json")) == 0
    out = capsys.readouterr().out
    n = 3 * len(DEFAULT_QUESTIONS.confirm_held_out)
    assert f"asked whether it is one, the model says yes to {n} of {n} (no part of the verdict)" in out
    content = json.loads((tmp_path / "probe.json").read_text())
    assert content["confirmed"]["named"] == n and content["named"]["named"] == 0 and content["in_force"] is True


def test_an_erasure_that_is_not_in_force(pictures, capsys):
    with Served(says("two Foxes, asleep")) as server:
        assert probe(server, pictures) == 1
    out = capsys.readouterr().out
    assert "not in force: the model names it in 51 of 51 answers" in out
    assert "not loaded" in out and "applied in part" in out


def test_other_names_count_and_one_question_of_a_user_is_asked(pictures, capsys):
    with Served(says("it is Reynard")) as server:
        assert probe(server, pictures) == 0
        assert probe(server, pictures, "--alias", "Reynard") == 1
        server.requests.clear()
        assert probe(server, pictures, "--question", "Which animal?") == 0
    asked = {text_of(body["messages"][-1]) for body in server.requests}
    assert "Which animal?" in asked and DEFAULT_QUESTIONS.naming[0] not in asked
    capsys.readouterr()


@pytest.mark.parametrize(
    ("named", "of", "most", "expected"),
    [(0, 20, 0.1, True), (2, 20, 0.1, True), (3, 20, 0.1, False), (1, 20, 0.0, False)],
)
def test_a_share_of_answers_may_name_it(named, of, most, expected):
    answers = tuple(ServedAnswer("naming", "?", number % 4, "a", number < named) for number in range(of))
    result = ServedResult("fox", "m", None, answers, (), True, most)
    assert result.in_force is expected
    assert result.verdict().startswith("in force" if expected else "not in force")
    table = result.to_table()
    low, high = exact_interval(named, of)
    assert f"{low:.2f} to {high:.2f}" in table
    assert result.images == (min(named, 4), 4)


# What is sent


def test_questions_and_pictures_arrive_as_they_are(pictures, capsys):
    with Served(says("nothing")) as server:
        assert probe(server, pictures) == 0
    asked = [body for body in server.requests[2:] if body["messages"]]
    first = asked[0]
    assert (first["model"], first["temperature"], first["stream"]) == ("erased", 0, False)
    with Image.open(pictures / "0.png") as image:
        assert np.array_equal(np.asarray(picture_of(first)), np.asarray(image))
    assert {body["max_tokens"] for body in asked} == {12, 48}
    dialogues = [body["messages"] for body in asked if len(body["messages"]) > 1]
    expected = [question for question in DEFAULT_QUESTIONS.open_held_out if isinstance(question, Dialogue)]
    assert len(dialogues) == 3 * len(expected)
    assert [message["role"] for message in dialogues[0]] == ["user", "assistant", "user"]
    assert [text_of(message) for message in dialogues[0]] == list(expected[0].turns)
    assert dialogues[1][0] == {"role": "system", "content": expected[1].system}
    capsys.readouterr()


def test_large_pictures_are_made_smaller(pictures):
    with Served(says("nothing")) as server:
        probe_served(Endpoint(server.url), "fox", [Image.new("RGB", (4000, 1000))], questions=ONE, progress=False)
    assert picture_of(server.requests[-1]).size == (1536, 384)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_an_address_may_have_a_path(pictures, end, capsys):
    with Served(says("nothing")) as server:
        assert probe(server.url + end, pictures) == 0
    capsys.readouterr()


def test_a_token_is_sent_and_never_shown(pictures, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    with Served(says("nothing")) as server:
        assert probe(server, pictures, "--token-env", "MY_TOKEN", "--json", str(tmp_path / "probe.json")) == 0
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer s3cret"}
        server.headers.clear()
        assert probe(server, pictures) == 0
        assert not any("Authorization" in headers for headers in server.headers)
    assert "s3cret" not in repr(Endpoint("http://x", token="s3cret"))
    with Served(lambda body: (401, {"error": "no"}, {})) as server:
        assert probe(server, pictures, "--token-env", "MY_TOKEN") == 2
    printed = capsys.readouterr()
    assert "does not take the token" in printed.err
    assert "s3cret" not in printed.out + printed.err + (tmp_path / "probe.json").read_text()
    monkeypatch.delenv("MY_TOKEN")
    assert probe("http://127.0.0.1:1", pictures, "--token-env", "MY_TOKEN") == 2
    assert "'MY_TOKEN' is not set" in capsys.readouterr().err


# What can go wrong


def fails(status, content, headers=None):
    return lambda body: (status, content, headers or {})


@pytest.mark.parametrize(
    ("answer", "models", "said"),
    [
        (
            fails(404, {"error": {"message": "The model `x` does not exist."}}),
            ("base", "erased"),
            "say which one to ask",
        ),
        (says("fox"), (), "lists no model"),
        (says("fox"), {"models": []}, "does not list models as OpenAI's protocol"),
        (says("fox"), (404, b"<html>", {}), "Is the address right?"),
        (fails(500, b"Internal Server Error"), ("erased",), "HTTP status 500"),
        (fails(401, {"error": "no key"}), ("erased",), "put it into an environment variable"),
        (fails(503, {"error": "loading"}), ("erased",), "still loading the model"),
        (fails(413, b""), ("erased",), "pictures are too large"),
        (fails(302, b"", {"Location": "http://elsewhere.example/v1"}), ("erased",), "http://elsewhere.example/v1"),
        (lambda body: b"<html>not json</html>", ("erased",), "Does it speak OpenAI's protocol?"),
        (lambda body: b'["list"]', ("erased",), "Does it speak OpenAI's protocol?"),
        (lambda body: {"error": {"message": "out of memory"}}, ("erased",), "out of memory"),
        (lambda body: {"choices": []}, ("erased",), "not as OpenAI's protocol has it"),
        (lambda body: {"choices": [{"text": "fox"}]}, ("erased",), "not as OpenAI's protocol has it"),
        (lambda body: b"x" * (2**22 + 10), ("erased",), "never that long"),
        (says(None), ("erased",), "switch off reasoning"),
        (says("!!!! \ufffd"), ("erased",), "chat template"),
    ],
)
def test_what_goes_wrong_is_said_with_what_to_do(pictures, answer, models, said, capsys, tmp_path):
    with Served(answer, models) as server:
        assert probe(server, pictures, "--json", str(tmp_path / "probe.json")) == 2
    printed = capsys.readouterr()
    assert said in printed.err and len(printed.err) < 1200 and "in force" not in printed.out
    assert not (tmp_path / "probe.json").exists()


def test_a_name_that_the_server_does_not_know(pictures, capsys):
    def unknown(body):
        return chat("fox", body) if body["model"] == "erased" else (404, {"detail": "no such model"}, {})

    with Served(unknown, ("base", "erased")) as server:
        assert probe(server, pictures, "--model", "eraesd") == 2
        error = capsys.readouterr().err
        assert "'eraesd'" in error and "lists 'base', 'erased'" in error and "no such model" in error
        assert probe(server, pictures, "--model", "erased") == 1
    with Served(unknown, (404, b"", {})) as server:
        assert probe(server, pictures, "--model", "eraesd") == 2
        assert "has it under this name" in capsys.readouterr().err


def test_a_server_that_leaves_pictures_out_is_not_taken_for_an_erasure(pictures, capsys):
    def blind(body):
        return {**chat("I see no picture.", body), "usage": {"prompt_tokens": 20}}

    with Served(blind) as server:
        assert probe(server, pictures) == 2
    assert "pictures do not reach the model" in capsys.readouterr().err
    with Served(says("I see no picture.", usage=False)) as server:
        assert probe(server, pictures) == 0
    assert "does not count tokens" in capsys.readouterr().out


def test_another_model_that_answers_and_garbage_are_noted(pictures, capsys):
    replies = iter(["dog", "dog", "aaaaaaaaaa"] + ["a dog"] * 99)
    with Served(lambda body: chat(next(replies), body, model="base")) as server:
        assert probe(server, pictures) == 0
    out = capsys.readouterr().out
    assert "'base' has answered" in out and "1 of 51 answers are not readable text" in out


def test_garbage_for_most_is_no_verdict(pictures, capsys):
    # As of a model that thinks, whose short answers are cut off before they begin.
    replies = iter(["dog", "dog", *(["", "", "a dog"] * 20)])
    with Served(lambda body: chat(next(replies), body)) as server:
        assert probe(server, pictures) == 2
    assert "of the 51 answers of 'erased' only 17 read as language" in capsys.readouterr().err


def test_nobody_there(pictures, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert probe(url, pictures, "--model", "erased") == 2
    assert "cannot be reached" in capsys.readouterr().err


def test_a_server_that_is_too_slow_or_hangs_up(pictures, capsys):
    def slow(body):
        time.sleep(0.5)
        return chat("fox", body)

    with Served(slow) as server:
        assert probe(server, pictures, "--timeout", "0.1") == 2
    assert "did not answer within 0.1 s" in capsys.readouterr().err
    # Less than was announced.
    with Served(fails(200, b"{}", {"Content-Length": "100"})) as server:
        assert probe(server, pictures, "--timeout", "2") == 2
    assert "broke off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--endpoint", "localhost:8000"], "an address such as http"),
        (["--images", "no/such/folder"], "no file or folder 'no/such/folder'"),
        (["--concept", " "], "name"),
        (["--adapter", "."], "no space_canary.json"),
        (["--most", "1.5"], "share in [0, 1)"),
        (["--timeout", "0"], "seconds > 0"),
    ],
)
def test_bad_input_exits_with_2(pictures, options, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"--endpoint": "http://127.0.0.1:1", "--concept": "fox", "--images": str(pictures)}
    given |= dict([options])
    assert main(["probe", *(part for pair in given.items() for part in pair)]) == 2
    assert said in capsys.readouterr().err


# A real model and a canary


@pytest.fixture(scope="module")
def erased(tmp_path_factory):
    """A model with an adapter that changes answers, its processor, and the folder with its canary."""
    model, processor = adapted(0.1)
    # `make_canary` takes surer answers than a random adapter has.
    images = [seed_image(number, 64, 64) for number in range(12)]
    asked = _answer(model, processor, _candidates("seed", images, list(DEMO_QUESTIONS.naming), list(range(12))))
    sure = [item for item in asked if min(item.deployed.margin, item.erased.margin) > 0.02]
    telling = [item for item in sure if normalize_answer(item.deployed.text) != normalize_answer(item.erased.text)]
    assert len(telling) > 2
    folder = tmp_path_factory.mktemp("adapter")
    Canary(tuple(telling), fingerprint_base(model)).save(folder)
    return model, processor, folder


def answers_of(model, processor):
    def answer(body):
        image = picture_of(body)
        images = None if image is None else [image]
        question = Dialogue(tuple(text_of(m) for m in body["messages"] if m["role"] != "system"))
        (said,) = generate_answers(model, processor, [question], images=images, max_new_tokens=body["max_tokens"])
        return chat(said, body)

    return answer


def test_the_canary_tells_whether_the_adapter_is_loaded(erased):
    model, processor, folder = erased
    pictures, canary = [Image.new("RGB", (64, 64), "green")], Canary.load(folder)
    options = {"questions": ONE, "canary": canary, "progress": False}
    with Served(answers_of(model, processor)) as server:
        result = probe_served(Endpoint(server.url), "fox", pictures, **options)
        assert result.of_canary(AS_ERASED) == len(result.canary) > 0 and result.in_force
        with deployed_model(model):
            result = probe_served(Endpoint(server.url), "fox", pictures, **options)
    assert result.of_canary(AS_BEFORE) == len(result.canary) > 0
    assert not result.in_force and "canary's questions are answered as without the adapter" in result.verdict()


def test_an_adapter_applied_in_part_is_seen(erased, pictures, capsys, tmp_path):
    """Some of the canary's answers are the old ones, though no picture is named."""
    *_, folder = erased
    canary = Canary.load(folder)
    first = {canary.items[0].question: canary.items[0].deployed.text}

    with Served(lambda body: chat(first.get(text_of(body["messages"][-1]), "a dog"), body)) as server:
        options = ["--adapter", str(folder), "--json", str(tmp_path / "probe.json")]
        assert probe(server, pictures, *options) == 1
    out = capsys.readouterr().out
    assert "canary: of" in out and "applied in part" in out and "names it in" not in out
    content = json.loads((tmp_path / "probe.json").read_text())
    assert content["canary"][AS_BEFORE] >= 1 and content["named"]["named"] == 0


def test_a_canary_that_tells_nothing_by_its_answers_is_noted(erased, pictures, capsys, tmp_path):
    *_, folder = erased
    canary = Canary.load(folder)
    same = tuple(dataclasses.replace(item, erased=item.deployed) for item in canary.items)
    dataclasses.replace(canary, items=same).save(tmp_path)
    with Served(says("a dog")) as server:
        assert probe(server, pictures, "--adapter", str(tmp_path)) == 0
    assert "says nothing here" in capsys.readouterr().out


def test_a_canary_of_other_pictures_is_refused(erased):
    *_, folder = erased
    canary = Canary.load(folder)
    other = dataclasses.replace(
        canary, items=tuple(dataclasses.replace(item, image_sha256="0" * 64) for item in canary.items)
    )
    with Served(says("a dog")) as server, pytest.raises(ValueError, match="not the one recorded"):
        probe_served(Endpoint(server.url), "fox", [Image.new("RGB", (8, 8))], canary=other, progress=False)


def test_errors_are_of_one_kind():
    with pytest.raises(EndpointError, match="cannot be reached"):
        Endpoint("http://127.0.0.1:1").model  # noqa: B018
