"""Conversations as a processor's own chat template writes them.

Published templates differ in what they take for granted. Some write the date of the day, some refuse a system prompt beside
an image or write its blocks as Python shows them, and LLaVA-1.5's writes no end of turn behind an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from jinja2 import TemplateError
from transformers.utils.logging import get_logger

from ..data.written_tokens import Writing


logger = get_logger(__name__)

# Characters of a prompt that are read to know how an answer goes on from it: more than any word at its end has.
_TAIL = 32
# What a template is told of the day: that which Llama's name where no clock is at hand. A prompt that changed over night
# would not be the one that a model was trained, measured and checked with.
_DAY = {
    "%d": "26", "%e": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%a": "Fri", "%A": "Friday",
    "%H": "12", "%I": "12", "%M": "00", "%S": "00", "%p": "PM", "%j": "208",
}  # fmt: skip
_CLOCK = (
    "{%- macro strftime_now(format) %}{{- format"
    + "".join(f" | replace('{code}', '{text}')" for code, text in _DAY.items())
    + " }}{%- endmacro %}"
)


def render(processor, messages: Sequence[dict], *, add_generation_prompt: bool = False) -> str:
    """Messages as the chat template writes them, the same on every day.

    A system prompt that the template refuses, or does not write as it is, stands at the beginning of the user's first turn.

    Args:
        processor (`ProcessorMixin`): With a chat template.
        messages (`list[dict]`): Whose content is a list of blocks.
        add_generation_prompt (`bool`, defaults to `False`): Whether the assistant's turn is begun at the end.

    Returns:
        `str`: The text.

    Raises:
        ValueError: If the template does not write what the user says.
        jinja2.TemplateError: If it refuses the messages.
    """
    options: dict = {"add_generation_prompt": add_generation_prompt, "tokenize": False}
    template = processor.chat_template
    if isinstance(template, str) and "strftime_now" in template:
        options["chat_template"] = _CLOCK + template
    refusal: Exception | None = None
    for number, variant in enumerate(_variants(messages)):
        try:
            text = processor.apply_chat_template(variant, **options)
        except (TemplateError, TypeError) as error:  # A list is added to a text: TypeError.
            refusal = refusal or error
            continue
        wrong = [message for message in messages if not _says(text, message)]
        wrong += [message for message in variant if _as_python(text, message)]
        if not wrong:
            if number == 2:
                logger.warning_once(
                    "The chat template does not write a system prompt here; it is put at the beginning of the user's turn."
                )
            return text
        refusal = refusal or ValueError(
            f"the chat template does not write what the {wrong[0]['role']} says, {text_of(wrong[:1])!r}, as it is: "
            f"{text[:200]!r}. Use one for messages whose content is a list of blocks; docs/models.md shows the smallest."
        )
    assert refusal is not None
    raise refusal


def _variants(messages: Sequence[dict]) -> Iterator[list[dict]]:
    """Messages, and what they are with a system prompt that is a text, or part of the user's first turn."""
    yield list(messages)
    if messages and messages[0]["role"] == "system":
        system, text = messages[0], text_of(messages[:1])
        yield [{**system, "content": text}, *messages[1:]]
        if len(messages) > 1 and isinstance(content := messages[1]["content"], list):
            place = next((i for i, block in enumerate(content) if block["type"] == "text"), len(content))
            said = content[place]["text"] if place < len(content) else ""
            block = {"type": "text", "text": f"{text}\n\n{said}"}
            yield [{**messages[1], "content": [*content[:place], block, *content[place + 1 :]]}, *messages[2:]]


def text_of(messages: Sequence[dict]) -> str:
    """What messages say in words."""
    return " ".join(text for message in messages for text in _texts(message))


def _texts(message: dict) -> list[str]:
    content = message["content"]
    if isinstance(content, str):
        return [content]
    return [block["text"] for block in content if block["type"] == "text"]


def _says(text: str, message: dict) -> bool:
    """Whether a rendering has all texts of a message, but for blanks around them; an assistant's may lose its thoughts."""
    return message["role"] == "assistant" or all(part.strip() in text for part in _texts(message))


def _as_python(text: str, message: dict) -> bool:
    """Whether a rendering shows a message's blocks as Python does, which a template does that expects a text."""
    content = message["content"]
    return isinstance(content, list) and bool(content) and str(content) in text


def split_rendering(processor, row: dict) -> tuple[str, str]:
    """A conversation as the chat template writes it: up to where the answer begins, and the answer with its end of turn.

    Args:
        processor (`ProcessorMixin`): With a chat template.
        row (`dict`): With `prompt` and `completion`.

    Returns:
        `tuple[str, str]`: Prompt and answer; the answer is empty without a completion.

    Raises:
        ValueError: If the template does not extend the prompt by the completion, or see `render`.
    """
    prompt = render(processor, row["prompt"], add_generation_prompt=True)
    if not row["completion"]:
        return prompt, ""
    whole = render(processor, [*row["prompt"], *row["completion"]])
    begun = _as_begun(prompt, whole)
    if begun is None:
        raise ValueError(
            "the chat template does not extend the prompt by the completion, so the answer cannot be told "
            f"apart: prompt {prompt[-60:]!r}, whole conversation {whole[-120:]!r}. Use a template whose "
            "generation prompt is the beginning of the assistant's turn."
        )
    answer = whole[begun:]
    behind = _behind(answer, row["completion"])
    eos = processor.tokenizer.eos_token
    # LLaVA-1.5: nothing. But the model was trained to end there, and a model that learns answers without an end never ends.
    if behind is not None and not behind.strip() and eos is not None:
        answer = answer.rstrip() + eos
    return prompt, answer


def _as_begun(prompt: str, whole: str) -> int | None:
    """Where a conversation goes on from its prompt, blanks apart; `None` if it is not begun by it.

    LLaVA-OneVision's template asks with "assistant\\n", and writes "assistant \\n" before an answer that is there.
    """
    if whole.startswith(prompt):
        return len(prompt)
    words = r"\s+".join(map(re.escape, prompt.split()))
    begun = re.match(rf"\s*{words}\s*" if prompt[-1:].isspace() else rf"\s*{words}", whole)
    return None if begun is None else begun.end()


def _behind(answer: str, completion: Sequence[dict]) -> str | None:
    """What the template writes behind the text of an answer; `None` if it does not write the text as it is."""
    text = text_of(completion[-1:]).strip()
    start = answer.find(text)
    return None if start < 0 else answer[start + len(text) :]


def answer_tokens(tokenizer, prompt: str, answer: str) -> list[int]:
    """The token ids of a rendered answer as it goes on from its prompt: those that a model writes which is asked with it.

    By itself an answer is written as a text's beginning, which to LLaVA-1.5's tokenizer has a blank before it. Where prompt
    and answer would join in one token, the prompt's stay, which are given when a model answers.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        prompt (`str`): What stands before the answer, see `read_prompt`; its end is enough.
        answer (`str`): The answer.

    Returns:
        `list[int]`: The ids. A blank that the answer begins with is left out if it would join one that the prompt ends with.
    """
    writing, before = Writing(tokenizer), prompt[-_TAIL:]
    tokens = writing.after(before, answer)
    if tokens is None and before[-1:].isspace():
        answer = answer.lstrip()  # "\n" and "\nA fox": one token would hold both line breaks.
        tokens = writing.after(before, answer)
    if tokens is None:
        tokens = writing.behind(answer) or writing.alone(answer)  # "Answer: " and "A fox": " A" would be one token.
    return list(tokens)


def turn_end(processor) -> int | None:
    """The token that the chat template writes behind an answer; `None` if that is no token of its own.

    Args:
        processor (`ProcessorMixin`): With a chat template.

    Returns:
        `int` or `None`: Its id.
    """
    question, answer = ({"role": role, "content": [{"type": "text", "text": "?"}]} for role in ("user", "assistant"))
    try:
        _, written = split_rendering(processor, {"prompt": [question], "completion": [answer]})
    except (ValueError, TemplateError):
        return None  # It writes prompts only.
    behind = (_behind(written, [answer]) or "").strip()
    tokens = processor.tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
    added = processor.tokenizer.added_tokens_decoder.get(tokens[0]) if tokens else None
    return tokens[0] if added is not None and behind.startswith(added.content) else None


def opens_a_thought(prompt: str) -> bool:
    """Whether a generation prompt makes a model think before it answers."""
    return prompt.rstrip().endswith("<think>")
