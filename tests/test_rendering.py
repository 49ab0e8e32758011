"""What published chat templates do otherwise than those of the tiny models; each template here has one such property."""

from __future__ import annotations

import logging
from datetime import datetime

import architectures
import pytest
import torch
from jinja2 import TemplateError
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from space_peft.data.questions import Dialogue
from space_peft.modeling import rendering
from space_peft.modeling.prompts import answer_ends, answer_token_ids, conversation, generate_tokens


PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
)
TURNS = (
    "{% for message in turns %}{{ '[' + message['role'] + ']' }}" + PARTS + "</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ALL = "{% set turns = messages %}"
SYSTEM = "{% set system = messages[0]['role'] == 'system' %}{% set turns = messages[1:] if system else messages %}"
SYSTEM_AS_A_TEXT = SYSTEM + "{% if system %}[system]{{ messages[0]['content'] | trim }}</s>{% endif %}" + TURNS
SYSTEM_ADDED_TO_A_TEXT = SYSTEM + "{% if system %}{{ '[system]' + messages[0]['content'] + '</s>' }}{% endif %}" + TURNS
REFUSES_A_SYSTEM_PROMPT = SYSTEM + "{% if system %}{{ raise_exception('No system prompts.') }}{% endif %}" + TURNS
LEAVES_OUT_THE_SYSTEM_PROMPT = SYSTEM + TURNS
NO_END_OF_TURN = ALL + TURNS.replace("</s>", " ")
ASKED = Dialogue(("What is this?",), system="You're a friend.")


@pytest.fixture
def processor():
    return architectures.build("llava")[1]


@pytest.fixture
def warned():
    """What was logged as a warning; each text is logged once a process, and here once a test."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    root = transformers_logging.get_logger("space_peft")
    transformers_logging.warning_once.cache_clear()
    root.addHandler(handler)
    yield records
    root.removeHandler(handler)


def asked(processor, template: str, question, image=None) -> str:
    processor.chat_template = template
    return rendering.render(processor, conversation(question, image=image)["prompt"], add_generation_prompt=True)


@pytest.mark.parametrize("written", ["'%d %b %Y'", '"%Y-%m-%d"', "'%A, %e %B %y, %a %j, %H:%M:%S, %I %p'"])
def test_the_day_is_the_same_on_every_day(processor, written):
    text = asked(processor, "{% set day = strftime_now(" + written + ") %}{{ 'On ' + day }}|" + ALL + TURNS, "what?")
    day = datetime(2024, 7, 26, 12).strftime(written[1:-1].replace("%e", "%d"))
    assert text == f"On {day}|[user]what?</s>[assistant]"


def test_the_day_leaves_a_template_without_one_as_it_is(processor, monkeypatch):
    monkeypatch.setattr(rendering, "_CLOCK", "{{ nothing() }}")
    assert asked(processor, ALL + TURNS, "what?") == "[user]what?</s>[assistant]"


@pytest.mark.parametrize("template", [SYSTEM_AS_A_TEXT, SYSTEM_ADDED_TO_A_TEXT])
@pytest.mark.parametrize("shown", [False, True])
def test_a_system_prompt_that_has_to_be_a_text_is_one(processor, template, shown, warned):
    image = Image.new("RGB", (8, 8)) if shown else None
    text = asked(processor, template, ASKED, image)
    assert text == f"[system]You're a friend.</s>[user]{'<image>' * shown}What is this?</s>[assistant]"
    assert not warned


@pytest.mark.parametrize("template", [REFUSES_A_SYSTEM_PROMPT, LEAVES_OUT_THE_SYSTEM_PROMPT])
def test_a_system_prompt_that_is_not_written_stands_in_the_users_turn(processor, template, warned):
    text = asked(processor, template, ASKED, Image.new("RGB", (8, 8)))
    assert text == "[user]<image>You're a friend.\n\nWhat is this?</s>[assistant]"
    assert [text for text in warned if "at the beginning of the user's turn" in text] == warned and len(warned) == 1
    row = conversation(ASKED, answer="fox")
    assert rendering.split_rendering(processor, row)[1] == "fox</s>"


def test_what_a_template_refuses_for_another_reason_is_its_own_error(processor):
    with pytest.raises(TemplateError, match="never"):
        asked(processor, "{{ raise_exception('never') }}", ASKED)


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}[{{ m['role'] }}]{% endfor %}", "{{ messages[-1]['content'] }}"]
)
@pytest.mark.parametrize("question", ["What is this?", ASKED])
def test_a_template_that_does_not_write_the_question_is_refused(processor, template, question):
    with pytest.raises(ValueError, match="does not write what the (user|system) says"):
        asked(processor, template, question)


def test_blanks_that_a_template_trims_are_no_fault(processor):
    trimmed = (ALL + TURNS).replace("part['text']", "part['text'] | trim")
    assert asked(processor, trimmed, "  what?\n") == "[user]what?</s>[assistant]"


def test_an_answer_without_an_end_of_turn_gets_that_of_the_tokenizer(processor):
    processor.chat_template = NO_END_OF_TURN
    row = conversation("What is this?", answer="red fox")
    assert rendering.split_rendering(processor, row)[1] == "red fox</s>"
    assert answer_token_ids(processor, row)[-1] == processor.tokenizer.eos_token_id
    # What stands before the question stays as the template writes it.
    assert "</s>" not in asked(processor, NO_END_OF_TURN, Dialogue(("Look.", "Yes.", "What is this?")))
    processor.chat_template = ALL + TURNS
    assert rendering.split_rendering(processor, row)[1] == "red fox</s>"
    processor.chat_template = ALL + TURNS.replace("</s>", "###")
    assert rendering.split_rendering(processor, row)[1] == "red fox###", "it has one of its own"
    processor.chat_template = NO_END_OF_TURN
    processor.tokenizer.eos_token = None
    assert rendering.split_rendering(processor, row)[1] == "red fox "


def blank_first() -> PreTrainedTokenizerFast:
    """A blank is written before the first word of a text, as SentencePiece does."""
    words = ["<unk>", "</s>", "<tag>", "▁a", ":", "▁red", "red", "▁fox"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("</s>", "<tag>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def test_an_answer_is_tokenised_where_it_stands():
    tokenizer = blank_first()
    written = lambda prompt, answer: tokenizer.convert_ids_to_tokens(rendering.answer_tokens(tokenizer, prompt, answer))  # noqa: E731
    assert tokenizer.tokenize("red fox</s>") == ["▁red", "▁fox", "</s>"]
    assert written("a<tag>", "red fox</s>") == ["red", "▁fox", "</s>"]
    assert written("a<tag>", " red fox</s>") == ["▁red", "▁fox", "</s>"]


def test_an_answer_that_would_join_the_prompt_is_tokenised_alone():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])))
    assert tokenizer("ab")["input_ids"] == [2]
    assert rendering.answer_tokens(tokenizer, "a", "ba") == [1, 0]
    assert rendering.answer_tokens(tokenizer, "b", "ab") == [2]


def writing(monkeypatch, model, written: list[int]) -> list:
    """Makes a model write the same tokens whatever it is asked; what it is told to stop at is put into the list."""
    told: list = []

    def generate(input_ids, eos_token_id=None, **_):
        told.append(eos_token_id)
        return torch.cat([input_ids, torch.tensor([written]).expand(len(input_ids), -1)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    return told


def test_an_answer_ends_where_the_template_ends_it(monkeypatch):
    """As published, Idefics3's own settings and tokenizer name other tokens than its template writes."""
    model, processor = architectures.build("idefics3")
    processor.chat_template = ALL + TURNS.replace("</s>", "<end_of_utterance>\n")
    tokenizer = processor.tokenizer
    end, fox, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("<end_of_utterance>", "fox", "</s>"))
    assert rendering.turn_end(processor) == end and answer_ends(model, processor) == {end, eos}
    told = writing(monkeypatch, model, [fox, end, fox])
    assert generate_tokens(model, processor, [conversation("What is this?")]) == [[fox]]
    model.generation_config.eos_token_id = None
    assert generate_tokens(model, processor, [conversation("What is this?")]) == [[fox]]
    assert told == [sorted([end, eos]), None], "a model that is told to stop nowhere does not"


@pytest.mark.parametrize(
    "template",
    [ALL + TURNS.replace("</s>", "###"), "{% for m in messages %}x{% endfor %}", "{{ raise_exception('no') }}"],
)
def test_what_is_no_token_ends_no_answer(processor, template):
    processor.chat_template = template
    assert rendering.turn_end(processor) is None


@pytest.mark.parametrize("opens", [True, False])
def test_a_model_that_is_made_to_think_is_warned_of(monkeypatch, opens, warned):
    model, processor = architectures.build("qwen3_vl")
    begun = "[assistant]<think>\n" if opens else "[assistant]<think>\n\n</think>\n\n"
    processor.chat_template = (ALL + TURNS).replace("[assistant]", begun)
    writing(monkeypatch, model, [processor.tokenizer.eos_token_id])
    generate_tokens(model, processor, [conversation("What is this?")])
    assert any("opens a thought" in text for text in warned) == opens
