"""From questions, images and answers to model inputs, through the processor's own chat template.

Every part of the library that talks to a model (refinement, fitting, training, evaluation) goes through
`encode_conversations`, so that all of them show the model the same tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PaliGemmaProcessor
from transformers.utils.logging import get_logger

from ..data.pictures import load_rgb
from ..data.questions import Dialogue, Question
from ..records.stages import track
from .layers import evaluating
from .processors import encode_prompts, placeholder, read_prompt
from .rendering import answer_tokens, opens_a_thought, render, split_rendering, turn_end
from .rendering import text_of as text_of


logger = get_logger(__name__)

IGNORE_INDEX = -100
# Prompts whose lengths differ by fewer tokens count as equally long where rows are ordered: their answers differ by more.
ALIKE = 8


def answer_message(text: str) -> dict:
    """The assistant's turn, of a text."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def conversation(question: Question, *, answer: str | None = None, image: Image.Image | None = None) -> dict:
    """One question about at most one image, in TRL's prompt-completion format.

    Args:
        question (`str` or `Dialogue`): The user's turn, or several turns.
        answer (`str`, *optional*): The assistant's turn; without it the conversation is a prompt to be answered.
        image (`PIL.Image.Image`, *optional*): The image, put before the question.

    Returns:
        `dict`: `prompt` and `completion` (lists of messages) and `images` (list of PIL images).
    """
    dialogue = question if isinstance(question, Dialogue) else Dialogue((question,))
    return {
        "prompt": dialogue.messages(image),
        "completion": [] if answer is None else [answer_message(answer)],
        "images": [] if image is None else [image],
    }


def answer_text(row: dict) -> str:
    """The assistant's text of a conversation."""
    return text_of(row["completion"])


def encode_conversations(processor, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Tokenises prompt-completion conversations into one batch whose answers start in the same column.

    Prompts are padded on the left and completions on the right: a row is `[pad] prompt completion [pad]`, so the
    logits that predict the answers are one slice of columns for the whole batch (see `answer_columns`).

    Args:
        processor (`ProcessorMixin`): With a chat template; `tokenizer` and `image_processor` are its own.
        rows (`list[dict]`): As made by `conversation`; rows with and without images may be mixed. A row may hold
            `answer_tokens`, the token ids of its answer as a model writes them; they go before its completion.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` `(n, length)`, `labels` `(n, length)` with -100
        outside the completions, and what the processor adds (`pixel_values`, ...).

    Raises:
        ValueError: If there is no chat template, it does not extend the prompt by the completion, there are no rows, or a
            row says the image token as text or has other pictures than its prompt shows.
    """
    if len(rows) == 0:
        raise ValueError("got no rows to encode; expected at least one conversation.")
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"{type(processor).__name__} has no chat template, so it is not known how a question is put to the model. Set "
            "`processor.chat_template`; docs/models.md has one for PaliGemma, whose checkpoints come without."
        )
    tokenizer = processor.tokenizer
    prompts, completions = [], []
    for number, row in enumerate(rows):
        _check_no_image_token(processor, row, number)
        prompt, tokens = _prompt_and_answer(processor, row)
        prompts.append(prompt)
        completions.append(tokens)
    # By row: processors that allow several images a row take a flat list for one row's.
    images = [[load_rgb(image) for image in row["images"]] for row in rows]
    try:
        batch = encode_prompts(processor, prompts, images)
    except StopIteration as error:
        # Some processors run out of images so. Within a dataloader it would end the epoch, and nobody would know.
        raise ValueError(
            f"{type(processor).__name__} found more image tokens than images: the rows have {list(map(len, images))}."
        ) from error
    width = max(len(ids) for ids in completions)
    shape = batch["input_ids"].shape  # (n, length of the prompts)
    tail = torch.full((shape[0], width), tokenizer.pad_token_id)
    tail_mask = torch.zeros(shape[0], width, dtype=batch["attention_mask"].dtype)
    for i, ids in enumerate(completions):
        tail[i, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        tail_mask[i, : len(ids)] = 1
    labels = torch.full(shape, IGNORE_INDEX)
    for key, value in batch.items():
        if key == "input_ids":
            batch[key] = torch.cat([value, tail], dim=1)
        elif key == "attention_mask":
            batch[key] = torch.cat([value, tail_mask], dim=1)
        elif key == "cross_attention_mask":
            # (n, length, images, tiles): an answer sees what the end of its prompt sees (Mllama).
            batch[key] = torch.cat([value, value[:, -1:].expand(-1, width, -1, -1)], dim=1)
        elif isinstance(value, torch.Tensor) and value.shape == shape:
            # token_type_ids and the like mark images; an answer is text, which they mark with 0. PaliGemma's mark what
            # must not be seen ahead, and that is the answer.
            kind = int(key == "token_type_ids" and isinstance(processor, PaliGemmaProcessor))
            batch[key] = torch.cat([value, value.new_full((shape[0], width), kind)], dim=1)
    batch["labels"] = torch.cat([labels, tail.masked_fill(tail_mask == 0, IGNORE_INDEX)], dim=1)
    return batch


def _check_no_image_token(processor, row: dict, number: int) -> None:
    """Refuses the image token as text: the model would be given a place for a picture that is not there."""
    token = placeholder(processor)
    if token is None:
        return
    for message in (*row["prompt"], *row["completion"]):
        if any(token in (block.get("text") or "") for block in message["content"] if isinstance(block, dict)):
            raise ValueError(
                f"row {number} of a batch says the image token {token!r} as text; take it out, and show pictures with a "
                "block of type 'image'."
            )


def _prompt_and_answer(processor, row: dict) -> tuple[str, list[int]]:
    """A conversation's prompt as the chat template writes it, and the token ids of its answer."""
    if (tokens := row.get("answer_tokens")) is not None:
        return split_rendering(processor, {**row, "completion": []})[0], list(tokens)
    prompt, answer = split_rendering(processor, row)
    before = read_prompt(processor, prompt)
    return prompt, answer_tokens(processor.tokenizer, before, answer) if answer else []


def length_order(processor, rows: Sequence[dict]) -> list[int]:
    """An order in which rows of like length are neighbours: of a batch, padding is computed as everything else is.

    By prompts first, then by answers: both are padded by themselves (see `encode_conversations`). Without answers, rows with
    the same prompt follow each other: what is answered is then often about as long. Image tokens are not counted.

    Args:
        processor (`ProcessorMixin`): See `encode_conversations`.
        rows (`list[dict]`): Conversations, with answers or without.

    Returns:
        `list[int]`: Numbers of rows, each once.
    """

    def lengths(row: dict) -> tuple:
        prompt, answer = _prompt_and_answer(processor, row)
        written = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return len(row["images"]), len(written) // ALIKE, len(answer), len(written), prompt

    keys = [lengths(row) for row in rows]
    return sorted(range(len(rows)), key=keys.__getitem__)


def answer_token_ids(processor, row: dict) -> list[int]:
    """The token ids of a row's answer with what the chat template puts around it, as `encode_conversations` has them."""
    return _prompt_and_answer(processor, row)[1]


def build_batch(
    processor,
    questions: Sequence[Question],
    *,
    images: Sequence[Image.Image] | None = None,
    answers: Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:
    """`encode_conversations` for single questions: row i is `questions[i]` about `images[i]`, answered `answers[i]`.

    Args:
        processor (`ProcessorMixin`): See `encode_conversations`.
        questions (`list[str or Dialogue]`): One question a row.
        images (`list[PIL.Image.Image]`, *optional*): One image a row; `None` for text-only questions.
        answers (`list[str]`, *optional*): One answer a row; `None` for prompts to be answered.

    Returns:
        `dict[str, torch.Tensor]`: The batch.
    """
    n = len(questions)
    for name, column in (("images", images), ("answers", answers)):
        if column is not None and len(column) != n:
            raise ValueError(f"got {n} questions but {len(column)} {name}; expected one a question.")
    rows = [
        conversation(
            questions[i],
            answer=None if answers is None else answers[i],
            image=None if images is None else images[i],
        )
        for i in range(n)
    ]
    return encode_conversations(processor, rows)


def answer_columns(labels: torch.Tensor) -> int:
    """How many trailing logits predict the answers: pass it as `logits_to_keep`; the last logit predicts nothing.

    Args:
        labels (`torch.Tensor`): `(n, length)` as `encode_conversations` makes them.

    Returns:
        `int`: Number of trailing columns, from the one that predicts the first answer token to the end.
    """
    has_label = (labels != IGNORE_INDEX).any(dim=0)
    if not has_label.any():
        raise ValueError("no row of the batch has an answer: `labels` is -100 everywhere.")
    return labels.shape[1] - int(has_label.int().argmax()) + 1


def answer_logits(model, batch: dict, columns: int | None = None) -> torch.Tensor:
    """The logits that predict a batch's answers, from one forward pass.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model, also as `DistributedDataParallel` or another wrapper with a
            `module` holds it.
        batch (`dict[str, torch.Tensor]`): As `encode_conversations` makes it, with `labels`, on the model's device.
        columns (`int`, *optional*): `answer_columns` of the labels, where it is known: finding it waits for the device.

    Returns:
        `torch.Tensor`: `(n, answer_columns(labels), vocabulary)`; column j predicts column j of
        `losses.answer_labels(labels)`, and the last one nothing.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    columns = answer_columns(batch["labels"]) if columns is None else columns
    if takes_logits_to_keep(model):
        inputs["logits_to_keep"] = columns
    return model(**inputs).logits[:, -columns:]


def takes_logits_to_keep(model) -> bool:
    """Whether the model's forward can be told to compute its last logits only; those of all positions are large."""
    while hasattr(model, "module"):
        model = model.module
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Of the class: mixed precision wraps the forward of the instance, which hides the parameters.
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters


def to_device(batch: dict, model) -> dict:
    """Moves a batch to the model's device, floating-point inputs to its dtype."""
    # Quantised weights have an integer dtype, and offloaded ones the meta device (accelerate then moves the inputs).
    parameters = [weight for weight in model.parameters() if weight.is_floating_point()]
    dtype = parameters[0].dtype
    device = next((weight.device for weight in parameters if weight.device.type != "meta"), torch.device("cpu"))
    moved = {}
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            value = value.to(device)
            value = value.to(dtype) if value.is_floating_point() else value
        moved[key] = value
    return moved


@torch.no_grad()
def generate_tokens(
    model,
    processor,
    rows: Sequence[dict],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 12,
    desc: str | None = None,
) -> list[list[int]]:
    """Greedy answers to conversations, as token ids, the same for any `batch_size` up to rounding.

    A batch runs until the longest of its answers has ended; rows of like prompts are put into one.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model; its training mode is restored afterwards.
        processor (`ProcessorMixin`): Its processor.
        rows (`list[dict]`): As made by `conversation`, without an answer.
        batch_size (`int`, defaults to 64): Rows a forward pass.
        max_new_tokens (`int`, defaults to 12): Longest answer, in tokens.
        desc (`str`, *optional*): Label of the progress bar; no bar without it.

    Returns:
        `list[list[int]]`: Each answer up to its end of turn, which is left out.
    """
    if rows and opens_a_thought(render(processor, rows[0]["prompt"], add_generation_prompt=True)):
        logger.warning_once(
            f"The chat template opens a thought, so the {max_new_tokens} tokens of an answer hold the beginning of that. "
            "Take the Instruct model, or a template that closes the thought; see docs/models.md."
        )
    ends = answer_ends(model, processor)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    if model.generation_config.eos_token_id is not None:
        options["eos_token_id"] = sorted(ends)  # Idefics3's own settings lack what its template ends an answer with.
    order = length_order(processor, rows)
    answers: list[list[int]] = [[] for _ in rows]
    with evaluating(model):
        for start in track(range(0, len(rows), batch_size), desc or "", show=desc is not None):
            places = order[start : start + batch_size]
            batch = encode_conversations(processor, [rows[place] for place in places])
            batch.pop("labels")
            width = batch["input_ids"].shape[1]
            tokens = model.generate(**to_device(batch, model), **options)
            for place, answer in zip(places, tokens[:, width:].tolist(), strict=True):
                answers[place] = cut_before(answer, ends)
    return answers


def answer_ends(model, processor) -> set[int]:
    """The tokens that end an answer: those at which the model stops, and what its chat template writes there.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model, of which the generation settings count.
        processor (`ProcessorMixin`): Its processor.

    Returns:
        `set[int]`: Token ids.
    """
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), processor.tokenizer.eos_token_id, turn_end(processor)}
    return ends - {None}


def cut_before(tokens: list[int], ends: Collection[int]) -> list[int]:
    """The tokens up to the first that is among `ends`; all, if none is."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def generate_answers(
    model,
    processor,
    questions: Sequence[Question],
    *,
    images: Sequence[Image.Image] | None = None,
    **options,
) -> list[str]:
    """`generate_tokens` for single questions, as text.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        processor (`ProcessorMixin`): Its processor.
        questions (`list[str or Dialogue]`): One question a row.
        images (`list[PIL.Image.Image]`, *optional*): One image a row; `None` for text-only questions.
        options (*optional*): `batch_size`, `max_new_tokens`, `desc`: see `generate_tokens`.

    Returns:
        `list[str]`: The answers, special tokens and surrounding blanks removed.
    """
    shown = [None] * len(questions) if images is None else images
    rows = [conversation(question, image=image) for question, image in zip(questions, shown, strict=True)]
    answers = generate_tokens(model, processor, rows, **options)
    return [answer.strip() for answer in processor.batch_decode(answers, skip_special_tokens=True)]
