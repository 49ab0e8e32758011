"""Answers and names in tokens, with the tokenizers and templates of published models: as a model itself writes them."""

import pytest
import torch
from PIL import Image
from tokenizer_families import FAMILIES

from space_peft.data.form_tree import FormTree
from space_peft.data.name_forms import surface_forms
from space_peft.data.names import find_mentions
from space_peft.data.written_tokens import Writing
from space_peft.modeling.mention_rows import answered_instead, answered_with, locate, locate_answer, mentions_in
from space_peft.modeling.processors import read_prompt
from space_peft.modeling.prompts import (
    answer_message,
    answer_token_ids,
    conversation,
    encode_conversations,
    length_order,
)


NAMES = ("Eiffel Tower", "banana", "J. K. Rowling", "ice cream", "fox")
ANSWERS = (
    "Eiffel Tower",
    "bananas",
    '"Eiffel Tower" is a name.',
    "This is the Eiffel Tower\nof J. K. Rowling.",
    "No",
    "ice cream (a banana).",
)
QUESTION = "What is this?"
IMAGE = Image.new("RGB", (20, 20), "red")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param], FAMILIES[request.param].build()


def whole_conversation(processor, answer=None) -> list[int]:
    """The tokens that `apply_chat_template` itself makes of a question, or of a question and its answer."""
    shown = [{"type": "image", "image": IMAGE}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": shown}, *([] if answer is None else [answer_message(answer)])]
    tokens = processor.apply_chat_template(
        messages, add_generation_prompt=answer is None, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return tokens["input_ids"][0].tolist()


def written(tokenizer, tokens) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def prompt_text(processor) -> str:
    prompt = processor.apply_chat_template(conversation(QUESTION, image=IMAGE)["prompt"], add_generation_prompt=True)
    return read_prompt(processor, prompt)


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_goes_on_from_its_prompt(family, answer):
    own, processor = family
    tokenizer = processor.tokenizer
    row = conversation(QUESTION, answer=answer, image=IMAGE)
    batch = encode_conversations(processor, [row])
    tokens, asked = batch["input_ids"][0].tolist(), whole_conversation(processor)
    assert tokens[: len(asked)] == asked
    said = tokens[len(asked) :]
    assert said == answer_token_ids(processor, row) == batch["labels"][0][len(asked) :].tolist()
    if own.whole == "same":
        assert tokens == whole_conversation(processor, answer)
    elif own.whole == "no end":
        # The template ends with a blank, the model with the end of its turn.
        blank = tokenizer.convert_tokens_to_ids("▁")
        assert [*said[:-1], blank] == whole_conversation(processor, answer)[len(asked) :]
        assert said[-1] == tokenizer.eos_token_id
    # One text, whose line breaks and blanks are those of the prompt and then those of the answer.
    prompt = tokenizer(prompt_text(processor), add_special_tokens=False)["input_ids"]
    before, text = written(tokenizer, prompt), written(tokenizer, [*prompt, *said])
    assert text.startswith(before)
    assert text[len(before) :].startswith(own.lead + answer)


def test_an_answer_of_the_models_own_comes_back_as_its_tokens(family):
    """What `retained_answers` does: an answer is read, stripped, and trained on."""
    _, processor = family
    for answer in ANSWERS:
        said = answer_token_ids(processor, conversation(QUESTION, answer=answer))
        read = processor.batch_decode([said], skip_special_tokens=True)[0].strip().removeprefix("</think>").strip()
        assert read == answer
        assert answer_token_ids(processor, conversation(QUESTION, answer=read)) == said


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stands_in_an_answer_as_one_of_its_forms(family, name):
    _, processor = family
    tokenizer = processor.tokenizer
    forms = set(surface_forms(name, tokenizer))
    for said in (name, name.lower(), name.upper(), name[0].upper() + name[1:].lower()):
        for before in ("", "This is the ", 'It says "', '"', "This (", "(", "'", "A name.\n", "Two:\n\n", "“", "*"):
            answer = f"{before}{said}, yes"
            tokens = answer_token_ids(processor, conversation(QUESTION, answer=answer))
            if tokenizer.unk_token_id in tokens:
                continue
            windows = {tuple(tokens[i:j]) for i in range(len(tokens)) for j in range(i + 1, len(tokens) + 1)}
            assert windows & forms, (answer, tokenizer.convert_ids_to_tokens(tokens))


@pytest.mark.parametrize("name", NAMES)
def test_a_located_name_is_the_name(family, name):
    _, processor = family
    tokenizer = processor.tokenizer
    tree = FormTree.of((name,), tokenizer)
    row = answered_with(processor, QUESTION, (name,), IMAGE)
    start, end = row["mention"]
    first = answer_token_ids(processor, conversation(QUESTION, answer=name))
    assert row["answer_tokens"] == first[:end] and "mention" in row
    assert written(tokenizer, row["answer_tokens"][start:end]).strip() == name
    assert tuple(row["answer_tokens"][start:end]) in surface_forms(name, tokenizer)
    # With the model's own answers, which hold no end of turn.
    answer = f'This is the {name}, two {name}\nand "{name}".'
    own = Writing(tokenizer).after(prompt_text(processor), answer) or Writing(tokenizer).alone(answer)
    rows = mentions_in([{"answer_tokens": list(own)}], tokenizer, (name,), tree)
    assert len(rows) == 2 and len(locate(own, tokenizer, (name,))) == 3
    for row in rows:
        start, end = row["mention"]
        text = written(tokenizer, row["answer_tokens"])
        assert text == written(tokenizer, own)[: len(text)] and text.endswith(name)
        assert find_mentions(Writing(tokenizer).read_behind(row["answer_tokens"][start:end]), (name,))


def test_another_word_stands_where_the_name_stood(family):
    """With the blank, quotation mark or line break that was before the name: "Assistant:fox" is no answer."""
    _, processor = family
    tokenizer = processor.tokenizer
    row = answered_with(processor, QUESTION, ("banana",), IMAGE)
    alone = answered_instead(processor, row, "fox", whole=False)
    assert alone["answer_tokens"] == answered_with(processor, QUESTION, ("fox",), IMAGE)["answer_tokens"]
    assert alone["mention"][1] == len(alone["answer_tokens"]) and alone["completion"] == []
    tree = FormTree.of(("banana",), tokenizer)
    for before in ("This is a ", "This is\n", 'This is "', '"', "This ("):
        wanted = [answer_token_ids(processor, conversation(QUESTION, answer=f"{before}{x}")) for x in ("banana", "fox")]
        (row,) = mentions_in([{**conversation(QUESTION), "answer_tokens": wanted[0]}], tokenizer, ("banana",), tree)
        other = answered_instead(processor, row, "fox", whole=False)
        start, end = other["mention"]
        assert other["answer_tokens"] == wanted[1][:end] and start == row["mention"][0], before
    whole = answered_instead(processor, row, "No", whole=True)
    assert whole["answer_tokens"] == answer_token_ids(processor, conversation(QUESTION, answer="No"))
    assert whole["mention"][1] == len(whole["answer_tokens"])


def test_rows_are_ordered_by_the_tokens_they_have(family):
    _, processor = family
    rows = [conversation(QUESTION, answer=answer) for answer in ANSWERS]
    lengths = [len(answer_token_ids(processor, rows[place])) for place in length_order(processor, rows)]
    assert lengths == sorted(lengths)


def test_an_answer_may_begin_with_what_its_prompt_ends_with():
    """One token holds two line breaks; asked with one of them, a model cannot write it."""
    processor = FAMILIES["Qwen2.5-VL"].build()
    plain, broken = (answer_token_ids(processor, conversation(QUESTION, answer=text)) for text in ("fox", "\n\nfox"))
    assert broken == plain


def test_a_prompt_ends_with_what_its_processor_writes_there():
    """PaliGemma's writes a line break, which another one would merge with."""
    processor = FAMILIES["PaliGemma"].build()
    assert len(processor.tokenizer.tokenize("\n\n")) == 1
    plain, broken = (answer_token_ids(processor, conversation(QUESTION, answer=text)) for text in ("fox", "\nfox"))
    assert broken == plain and processor.tokenizer.convert_ids_to_tokens(plain)[-1] == "<eos>"


def test_a_template_may_end_an_answer_in_any_words():
    processor = FAMILIES["LLaVA-1.5"].build()
    tokenizer = processor.tokenizer
    processor.chat_template = processor.chat_template.replace("{{ content['text'] + ' '}}{% endgeneration %}",
        "{{ content['text'] + '###'}}{% endgeneration %}")  # fmt: skip
    tokens = answer_token_ids(processor, conversation(QUESTION, answer="fox"))
    assert tokenizer.eos_token_id not in tokens and written(tokenizer, tokens).endswith("###")
    assert answer_token_ids(processor, conversation(QUESTION, answer="")) == list(
        Writing(tokenizer).after("ASSISTANT:", " ###")
    )


def test_a_template_that_writes_another_role_is_refused():
    """Blanks may be others; words may not."""
    processor = FAMILIES["LLaVA-OneVision"].build()
    processor.chat_template = processor.chat_template.replace("<|im_start|>assistant\\n", "<|im_start|>bot\\n").replace(
        "<|im_start|>assistant\n", "<|im_start|>bot\n"
    )
    with pytest.raises(ValueError, match="does not extend the prompt"):
        encode_conversations(processor, [conversation(QUESTION, answer="fox")])


def test_a_whole_answer_is_located_as_it_is_written():
    """A tokenizer that takes blanks before signs away when it decodes: the answer is looked for in what its tokens say."""
    processor = FAMILIES["T5"].build()
    processor.tokenizer.clean_up_tokenization_spaces = True
    row = locate_answer(processor, conversation(QUESTION, answer="the fox , a banana"))
    start, end = row["mention"]
    assert written(processor.tokenizer, row["answer_tokens"][start:end]).strip() == "the fox , a banana"


def test_labels_of_a_batch_are_each_rows_own():
    processor = FAMILIES["LLaVA-1.5, legacy"].build()
    rows = [conversation(QUESTION, answer=answer, image=IMAGE) for answer in ANSWERS]
    labels = encode_conversations(processor, rows)["labels"]
    for row, own in zip(rows, labels, strict=True):
        assert torch.equal(own[own != -100], torch.tensor(answer_token_ids(processor, row)))
