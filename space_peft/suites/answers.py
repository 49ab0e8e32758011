"""A model asked in batches: what it says, and how likely it finds what it should say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..data.pictures import open_picture
from ..losses import answer_labels, token_log_probs
from ..modeling.layers import evaluating
from ..modeling.prompts import (
    IGNORE_INDEX,
    answer_logits,
    conversation,
    encode_conversations,
    generate_tokens,
    to_device,
)
from ..records.stages import bar
from .sources import StoredPicture, ZippedPicture


@dataclass(frozen=True)
class Prompt:
    """A text to be answered, about a picture or none.

    Args:
        text (`str`): As the model is asked it.
        image (*optional*): A picture as a suite's subject has it; opened when it is shown.
        where (`str`, *optional*): File and row, for errors.
        shots (`tuple[tuple[Prompt, str], ...]`, *optional*): Prompts and their answers that stand before it.
    """

    text: str
    image: Any = None
    where: str = "a prompt"
    shots: tuple[tuple[Prompt, str], ...] = ()

    def opened(self) -> Image.Image | None:
        """The picture, if there is one.

        Raises:
            ValueError: If it does not open.
        """
        if self.image is None:
            return None
        try:
            stored = isinstance(self.image, (StoredPicture, ZippedPicture))
            return self.image.open() if stored else open_picture(self.image)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error

    def row(self, answer: str | None = None) -> dict:
        """The conversation, as `space_peft.modeling.prompts.conversation` makes one of a single turn."""
        row = conversation(self.text, answer=answer, image=self.opened())
        for prompt, said in reversed(self.shots):
            before = conversation(prompt.text, answer=said, image=prompt.opened())
            row["prompt"] = before["prompt"] + before["completion"] + row["prompt"]
            row["images"] = before["images"] + row["images"]
        return row


@dataclass(frozen=True)
class TokenScores:
    """How a model, given a prompt, finds each token of an answer.

    Args:
        log_probs (`tuple[float, ...]`): Log probability of each token after those before it.
        hits (`tuple[bool, ...]`): Whether it is the likeliest there.
    """

    log_probs: tuple[float, ...]
    hits: tuple[bool, ...]

    @property
    def loss(self) -> float:
        """Mean over tokens, in nats."""
        return -sum(self.log_probs) / len(self.log_probs)


def _in_batches(prompts: Sequence[Prompt], size: int, length: Callable[[int], int]) -> list[list[int]]:
    """Numbers of prompts, those with pictures apart and long ones together, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda i: (length(i), i))
    parts = [[i for i in order if (prompts[i].image is not None) == shown] for shown in (True, False)]
    return [part[start : start + size] for part in parts for start in range(0, len(part), size)]


def ask(
    model, processor, prompts: Sequence[Prompt], *, batch_size: int, max_new_tokens: int, progress: bool
) -> list[str]:
    """Greedy answers.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        processor (`ProcessorMixin`): Its processor.
        prompts (`list[Prompt]`): What is asked.
        batch_size (`int`): Prompts a forward pass.
        max_new_tokens (`int`): Longest answer.
        progress (`bool`): Show a bar.

    Returns:
        `list[str]`: One a prompt.
    """
    answers: dict[int, str] = {}
    with bar("Asking", len(prompts), unit="answer", show=progress) as shown:
        for batch in _in_batches(prompts, batch_size, lambda i: len(prompts[i].text)):
            rows = [prompts[i].row() for i in batch]
            tokens = generate_tokens(model, processor, rows, batch_size=batch_size, max_new_tokens=max_new_tokens)
            said = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
            answers.update(zip(batch, said, strict=True))
            shown.update(len(batch))
    return [answers[i] for i in range(len(prompts))]


@torch.no_grad()
def score(
    model, processor, prompts: Sequence[Prompt], answers: Sequence[str], *, batch_size: int, progress: bool
) -> list[TokenScores]:
    """How likely the model finds given answers, token by token, without the end of the turn.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model; its training mode is restored afterwards.
        processor (`ProcessorMixin`): Its processor.
        prompts (`list[Prompt]`): What is asked.
        answers (`list[str]`): One a prompt.
        batch_size (`int`): Prompts a forward pass.
        progress (`bool`): Show a bar.

    Returns:
        `list[TokenScores]`: One a prompt.

    Raises:
        ValueError: If an answer has no token, or the model finds one impossible or not a number.
    """
    scores: dict[int, TokenScores] = {}
    with evaluating(model), bar("Scoring", len(prompts), unit="answer", show=progress) as shown:
        for batch in _in_batches(prompts, batch_size, lambda i: len(prompts[i].text) + len(answers[i])):
            rows = [prompts[i].row(answers[i]) for i in batch]
            encoded = to_device(encode_conversations(processor, rows), model)
            labels = answer_labels(encoded["labels"])  # (n, t)
            logits = answer_logits(model, encoded)[:, : labels.shape[1]]  # (n, t, vocabulary)
            log_probs, likeliest = token_log_probs(logits, labels).tolist(), logits.argmax(dim=-1).tolist()
            for place, i in enumerate(batch):
                tokens = [token for token in labels[place].tolist() if token != IGNORE_INDEX]
                # Answers start in one column: the first tokens of a row are the answer's.
                count = _length(processor.tokenizer, tokens)
                if count == 0:
                    raise ValueError(f"{prompts[i].where}: the answer {answers[i]!r} has no token to be scored.")
                found = tuple(log_probs[place][:count])
                if not all(value > float("-inf") for value in found):
                    raise ValueError(
                        f"{prompts[i].where}: the model gives the answer {answers[i]!r} log probabilities that are no "
                        f"numbers: {found[:4]}. Run it in float32, or look at its weights."
                    )
                hits = tuple(token == best for token, best in zip(tokens, likeliest[place][:count]))
                scores[i] = TokenScores(found, hits)
            shown.update(len(batch))
    return [scores[i] for i in range(len(prompts))]


def _length(tokenizer, tokens: list[int]) -> int:
    """How many tokens an answer has before what the chat template puts behind it: its end of turn, line feeds."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    # A word that the tokenizer does not know is one of the answer.
    special = (special | {*tokenizer.all_special_ids}) - {tokenizer.unk_token_id}
    count = len(tokens)
    while count and (tokens[count - 1] in special or not tokenizer.decode([tokens[count - 1]]).strip()):
        count -= 1
    return count
