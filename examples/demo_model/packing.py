"""Several questions about one image in one sequence, as if each had been asked alone.

An image takes 64 of the about 75 tokens of a question, so most of the language model's work on ten questions about one
image is the same work. Here the prefix (start token, image) is shared, every question-answer segment sees the prefix and
itself only (block mask), and its positions continue from the prefix. The logits are those of the separate sequences. A
system prompt stands before the image, so it belongs to the prefix: questions with different ones need different packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from build import IMAGE_TOKENS
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from space_peft.data.questions import Question
from space_peft.modeling.prompts import conversation


PLACEHOLDER = Image.new("RGB", (1, 1))  # says where in a conversation the image stands


@dataclass(frozen=True)
class Segment:
    """A question and its answer as token ids.

    Args:
        prompt (`tuple[int, ...]`): From behind the image to the last `answer:`.
        answer (`tuple[int, ...]`): Answer and end of turn.
        known_from (`int`, *optional*): Place in the prompt of the last word of the name asked about.
        before (`tuple[int, ...]`): What stands between the start token and the image.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    known_from: int | None = None
    before: tuple[int, ...] = ()


class SegmentMaker:
    """Turns texts into segments through the processor's own chat template, so that the two cannot drift apart.

    Args:
        processor (`LlavaProcessor`): The model's processor.
    """

    def __init__(self, processor: LlavaProcessor):
        self.processor = processor
        self.known: dict[tuple[Question, str, str | None], Segment] = {}

    def __call__(self, question: Question, answer: str, name: str | None = None) -> Segment:
        key = question, answer, name
        if key not in self.known:
            row = conversation(question, answer=answer, image=PLACEHOLDER)
            prompt = self._ids(self.processor.apply_chat_template(row["prompt"], add_generation_prompt=True))
            whole = self._ids(self.processor.apply_chat_template(row["prompt"] + row["completion"]))
            unknown = self.processor.tokenizer.unk_token_id
            if whole[: len(prompt)] != prompt or unknown in whole:
                raise ValueError(f"{question!r} with answer {answer!r} is outside the vocabulary or the template.")
            known_from, reply = None, whole[len(prompt) :]
            image = prompt.index(self.processor.image_token_id)
            before, prompt = prompt[1:image], prompt[image + 1 :]  # the prefix has the start token and the image
            if name is not None:
                words = self._ids(name)
                starts = [i for i in range(len(prompt)) if prompt[i : i + len(words)] == words]
                known_from = starts[-1] + len(words) - 1
            self.known[key] = Segment(prompt, reply, known_from, before)
        return self.known[key]

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class Pack:
    """A batch of packed sequences, `(n, length)` each.

    Args:
        ids (`torch.Tensor`): Token ids.
        positions (`torch.Tensor`): Position ids.
        mask (`torch.Tensor`): `(n, 1, length, length)`, 0 where attention is allowed, else a large negative number.
        target (`torch.Tensor`): The answer token each position must predict; -100 where there is none.
        segment (`torch.Tensor`): Number of the segment a position belongs to; -1 for prefix and padding.
        early (`torch.Tensor`): First answer token at the prompt positions from which it is known; -100 elsewhere.
        image_at (`int`): Where the image's tokens start.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    target: torch.Tensor
    segment: torch.Tensor
    early: torch.Tensor
    image_at: int


def pack(rows: Sequence[Sequence[Segment]], processor: LlavaProcessor, *, image: bool) -> Pack:
    """Pack one row of segments per image (or, without images, rows of text-only segments).

    Args:
        rows (`list[list[Segment]]`): Segments that agree in what stands before the image.
        processor (`LlavaProcessor`): The model's processor.
        image (`bool`): Whether there is an image.

    Returns:
        `Pack`: The batch.

    Raises:
        ValueError: If the segments differ in what stands before the image.
    """
    tokenizer = processor.tokenizer
    before = {segment.before for row in rows for segment in row}
    if len(before) != 1:
        raise ValueError(f"segments of one pack must share what stands before the image, got {len(before)} beginnings.")
    start_tokens = [tokenizer.bos_token_id, *before.pop()]
    prefix = start_tokens + [processor.image_token_id] * (IMAGE_TOKENS if image else 0)
    n, start = len(rows), len(prefix)
    length = start + max(sum(len(s.prompt) + len(s.answer) for s in row) for row in rows)
    ids = torch.full((n, length), tokenizer.pad_token_id)
    positions = torch.zeros(n, length, dtype=torch.long)
    target = torch.full((n, length), -100)
    segment = torch.full((n, length), -1)
    early = torch.full((n, length), -100)
    ids[:, :start] = torch.tensor(prefix)
    positions[:, :start] = torch.arange(start)
    for i, row in enumerate(rows):
        at = start
        for k, item in enumerate(row):
            tokens = item.prompt + item.answer
            end, first = at + len(tokens), at + len(item.prompt) - 1
            ids[i, at:end] = torch.tensor(tokens)
            positions[i, at:end] = torch.arange(start, start + len(tokens))
            target[i, first : end - 1] = torch.tensor(item.answer)
            segment[i, at:end] = k
            if item.known_from is not None:
                early[i, at + item.known_from : first] = item.answer[0]
            at = end
    index = torch.arange(length)
    causal = index[None, :] <= index[:, None]
    same = segment[:, :, None] == segment[:, None, :]
    allowed = causal & ((index < start)[None, None, :] | same)
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min / 2)[:, None]
    return Pack(ids, positions, mask, target, segment, early, len(start_tokens))


def hidden_states(
    model: LlavaForConditionalGeneration, packed: Pack, features: torch.Tensor | None = None
) -> torch.Tensor:
    """Last hidden states `(n, length, d)` of a batch.

    Args:
        model (`LlavaForConditionalGeneration`): The model.
        packed (`Pack`): The batch.
        features (`torch.Tensor`, *optional*): Projector input of each image, `(n, 64, vision hidden size)`.

    Returns:
        `torch.Tensor`: `(n, length, d)`.
    """
    embedded = model.get_input_embeddings()(packed.ids)
    if features is not None:
        projected = model.model.multi_modal_projector(features).to(embedded.dtype)
        at = packed.image_at
        embedded = torch.cat([embedded[:, :at], projected, embedded[:, at + IMAGE_TOKENS :]], 1)
    return model.model.language_model(
        inputs_embeds=embedded, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
    ).last_hidden_state


def answer_logits(
    model: LlavaForConditionalGeneration, packed: Pack, features: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the positions that predict an answer token, in reading order.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Logits `(m, vocabulary)` and targets `(m,)`.
    """
    hidden = hidden_states(model, packed, features)
    asked = packed.target != -100
    return model.lm_head(hidden[asked]), packed.target[asked]


@torch.no_grad()
def answered_exactly(
    model: LlavaForConditionalGeneration, packed: Pack, features: torch.Tensor | None = None
) -> list[list[bool]]:
    """Whether greedy generation would give exactly the answer of each segment.

    Greedy generation gives an answer exactly when every token of it, end of turn included, is the most likely one after
    those before it; so one pass over the right answers decides it.

    Returns:
        `list[list[bool]]`: Per row, per segment.
    """
    logits, target = answer_logits(model, packed, features)
    right = torch.ones(packed.target.shape, dtype=torch.bool)
    right[packed.target != -100] = logits.argmax(-1) == target
    result = []
    for row, segment in zip(right, packed.segment, strict=True):
        result.append([bool(row[segment == k].all()) for k in range(int(segment.max()) + 1)])
    return result
