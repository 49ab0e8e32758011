"""Where a model's answers say a name, and what else could be said there: the rows an erasure is trained on.

A deployed model names a concept in sentences, in word pieces and in several forms. A *mention* is one place where it
does: a conversation, the answer up to the name, and the tokens of the name in the form it took. Rows are dicts as made
by `space_peft.modeling.prompts.conversation`, with

- `answer_tokens`: the answer up to the end of the mention, as token ids;
- `mention`: `(start, end)`, which of them say the name;
- `says`: the names of which one is said there;
- `kept_from`: from which token on the answer is the model's own and says no name up to the mention: that part stays;
- `branches`: for each token of the answer from there on, the tokens that begin another form, each with the share of the
  deployed model's continuations that complete it (`add_branches`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import torch
from PIL import Image

from ..data.form_tree import FormTree, endings
from ..data.name_forms import written_forms
from ..data.names import find_mentions
from ..data.questions import Question, QuestionSet
from ..data.written_tokens import Writing
from .batch_observer import BatchObserver
from .layers import evaluating
from .processors import image_token
from .prompts import (
    IGNORE_INDEX,
    answer_logits,
    answer_text,
    answer_token_ids,
    conversation,
    cut_before,
    encode_conversations,
    generate_tokens,
    length_order,
    to_device,
)


# Mentions taken of one answer: later ones lean on the earlier ones in front of them, which an erasure removes.
MENTIONS_PER_ANSWER = 2
# See `add_branches`.
LOOK_INTO = 0.01


def locate(tokens: Sequence[int], tokenizer, names: Sequence[str]) -> list[tuple[int, int]]:
    """Which tokens of an answer say one of the names.

    Args:
        tokens (`list[int]`): The answer.
        tokenizer (`PreTrainedTokenizerBase`): Decodes it.
        names (`list[str]`): The concept's name and aliases.

    Returns:
        `list[tuple[int, int]]`: Spans `(start, end)` of tokens, in order.
    """
    text = _decode(tokenizer, tokens)
    return [_token_span(tokens, tokenizer, start, end) for start, end in find_mentions(text, names)]


def _decode(tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _token_span(tokens: Sequence[int], tokenizer, start: int, end: int) -> tuple[int, int]:
    """The tokens that write the characters `[start, end)` of the decoded text."""
    text = _decode(tokenizer, tokens)
    # A character of several bytes that is cut between tokens shows as U+FFFD, which is no beginning of the text.
    begun = [_decode(tokenizer, tokens[:i]) for i in range(len(tokens) + 1)]
    first = max(i for i, part in enumerate(begun) if text[:start].startswith(part))
    last = next(i for i, part in enumerate(begun) if part[:end] == text[:end])
    return first, max(last, first + 1)


def locate_answer(processor, row: dict) -> dict:
    """The row whose mention is the answer of a conversation, wherever the chat template puts it.

    Args:
        processor (`ProcessorMixin`): With a chat template.
        row (`dict`): A conversation with a completion. With `says`, the completion is a name (or a "yes") alone, and is
            looked for as such; without, all of the completion is what is said.

    Returns:
        `dict`: The row with `answer_tokens` and `mention`.

    Raises:
        ValueError: If no token of the rendered answer says it, e.g. because the tokenizer does not know it.
    """
    tokenizer = processor.tokenizer
    answer, tokens = answer_text(row), answer_token_ids(processor, row)
    if "says" in row:
        spans = locate(tokens, tokenizer, [answer])
    else:
        row = {**row, "says": None}
        start = _decode(tokenizer, tokens).casefold().find(answer.strip().casefold()) if answer.strip() else -1
        spans = [] if start < 0 else [_token_span(tokens, tokenizer, start, start + len(answer.strip()))]
    if not spans:
        raise ValueError(
            f"the answer {answer!r} is written {tokenizer.decode(tokens)!r}, in which no token says it. Pass the name "
            "as the model answers it; a name that is not in the tokenizer's vocabulary cannot be erased."
        )
    start, end = spans[-1]
    return {**row, "answer_tokens": tokens[:end], "mention": (start, end)}


def answered_with(processor, question: Question, names: Sequence[str], image: Image.Image | None = None) -> dict:
    """The row in which a question is answered with the first of some names, of which any is said; see `locate_answer`."""
    return locate_answer(processor, {**conversation(question, answer=names[0], image=image), "says": tuple(names)})


def own_answers(model, processor, images: Sequence[Image.Image], *prompts: Sequence[Question], **options) -> list[dict]:
    """What a model answers to every prompt about every image, as rows with `answer_tokens`.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        processor (`ProcessorMixin`): Its processor.
        images (`list[PIL.Image.Image]`): n images.
        prompts (`list[str or Dialogue]`): m prompts, in one list or in several. Each list is asked in batches of its own:
            beside a sentence, a name takes as long as the sentence.
        options: See `space_peft.modeling.prompts.generate_tokens`.

    Returns:
        `list[dict]`: n m rows, those of one image after another; `asked` holds the numbers of image and prompt.
    """
    # A model may write what a template does, a place for an image among them; an answer ends there.
    special = {*processor.tokenizer.all_special_ids, processor.tokenizer.convert_tokens_to_ids(image_token(processor))}
    rows: list[dict] = []
    first = 0
    for own in prompts:
        asked = [
            {**conversation(prompt, image=image), "asked": (i, j)}
            for i, image in enumerate(images)
            for j, prompt in enumerate(own, first)
        ]
        for row, answer in zip(asked, generate_tokens(model, processor, asked, **options), strict=True):
            rows.append({**row, "answer_tokens": cut_before(answer, special)})
        first += len(own)
    return sorted(rows, key=lambda row: row["asked"])


def mentions_in(answers: Sequence[dict], tokenizer, names: Sequence[str], tree: FormTree) -> list[dict]:
    """The mentions in a model's own answers, at most `MENTIONS_PER_ANSWER` of each.

    Args:
        answers (`list[dict]`): As `own_answers` returns them.
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        names (`list[str]`): The concept's name and aliases.
        tree ([`FormTree`]): Of the names.

    Returns:
        `list[dict]`: Rows.
    """
    rows = []
    for answer in answers:
        tokens = answer["answer_tokens"]
        kept_from = 0
        for start, end in locate(tokens, tokenizer, names)[:MENTIONS_PER_ANSWER]:
            said = {"mention": (start, start + tree.trimmed(tokens[start:end])), "says": tuple(names)}
            rows.append({**answer, **said, "answer_tokens": tokens[: said["mention"][1]], "kept_from": kept_from})
            kept_from = end
    return rows


@torch.no_grad()
def placed(model, processor, answers: Sequence[dict], names: Sequence[str], tree: FormTree, batch_size: int) -> list:
    """Where in an answer the name fits best: the row in which the model says it there, in its likeliest form.

    An image that the model does not name gives the sentences in which it would be named all the same: the place is
    where the name is likeliest, by the first tokens of its forms.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        processor (`ProcessorMixin`): Its processor.
        answers (`list[dict]`): As `own_answers` returns them.
        names (`list[str]`): The concept's name and aliases.
        tree ([`FormTree`]): Of the names.
        batch_size (`int`): Rows a forward pass.

    Returns:
        `list[dict or None]`: One row an answer, `None` for an empty one.
    """
    first = torch.tensor(sorted(tree.root))
    usual = {path[0]: path for path in reversed(endings(tree.root))}
    rows: list[dict | None] = [None] * len(answers)
    spoken = [i for i in length_order(processor, answers) if answers[i]["answer_tokens"]]
    with evaluating(model):
        for start in range(0, len(spoken), batch_size):
            part = spoken[start : start + batch_size]
            batch = to_device(encode_conversations(processor, [answers[i] for i in part]), model)
            log_p = answer_logits(model, batch).float().log_softmax(-1)[..., first.to(batch["labels"].device)]
            for i, likely in zip(part, log_p.cpu(), strict=True):  # (t + 1, forms)
                tokens = answers[i]["answer_tokens"]
                likely = likely[: len(tokens)]
                place = int(likely.logsumexp(-1).argmax())
                path = usual[int(first[likely[place].argmax()])]
                rows[i] = {
                    **answers[i],
                    "answer_tokens": [*tokens[:place], *path],
                    "mention": (place, place + len(path)),
                    "says": tuple(names),
                    "kept_from": 0,
                }
    return rows


def rows_of_answers(
    model,
    processor,
    images: Sequence[Image.Image],
    questions: QuestionSet,
    names: Sequence[str],
    tree: FormTree,
    *,
    batch_size: int,
    **options,
) -> list[dict]:
    """Every place at which a model's own answers to the naming and open questions name the concept, and would name it.

    Beside the mentions in its answers, each image is given for each open prompt one sentence that another image brought
    forth, and where its own answer does not say the name, that answer with the name where it fits best.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The deployed model.
        processor (`ProcessorMixin`): Its processor.
        images (`list[PIL.Image.Image]`): Anchors, or images of the concept.
        questions (`QuestionSet`): Only `naming` and `open` are asked.
        names (`list[str]`): The concept's name and aliases.
        tree ([`FormTree`]): Of the names.
        batch_size (`int`): Rows a forward pass.
        options: `max_new_tokens`, `desc`: see `space_peft.modeling.prompts.generate_tokens`.

    Returns:
        `list[dict]`: Rows, none twice.
    """
    prompts = (*questions.naming, *questions.open)
    answers = own_answers(model, processor, images, questions.naming, questions.open, batch_size=batch_size, **options)
    found = mentions_in(answers, processor.tokenizer, names, tree)
    named = {row["asked"] for row in found}
    silent = [row for row in answers if row["asked"] not in named and row["asked"][1] >= len(questions.naming)]
    rows = found + [row for row in placed(model, processor, silent, names, tree, batch_size) if row is not None]
    for prompt in range(len(questions.naming), len(prompts)):
        # From the next image in turn that has one: the sentences of some images serve all of them.
        spoken = [row for row in found if row["asked"][1] == prompt]
        for image in range(len(images) if spoken else 0):
            other = next((row for row in spoken if row["asked"][0] > image), spoken[0])
            own = answers[image * len(prompts) + prompt]
            rows.append({**other, "prompt": own["prompt"], "images": own["images"], "asked": own["asked"]})
    return distinct(rows)


def row_key(row: dict) -> tuple:
    """What makes a row another one: image, conversation, answer and mention."""
    return tuple(map(id, row["images"])), repr(row["prompt"]), tuple(row["answer_tokens"]), tuple(row["mention"])


def distinct(rows: Iterable[dict], known: Iterable[dict] = ()) -> list[dict]:
    """The rows that are neither among `known` nor earlier in the list."""
    seen, kept = {row_key(row) for row in known}, []
    for row in rows:
        if (key := row_key(row)) not in seen:
            seen.add(key)
            kept.append(row)
    return kept


def answered_instead(processor, row: dict, text: str, *, whole: bool) -> dict:
    """The row in which something else is said: another word in the place of the mention, or another answer altogether.

    Args:
        processor (`ProcessorMixin`): With a chat template.
        row (`dict`): A row with a mention.
        text (`str`): What is said instead.
        whole (`bool`): Whether it is the whole answer, end of turn included, or a word in the mention's place.

    Returns:
        `dict`: A row whose `mention` is what is said instead.

    Raises:
        ValueError: If no token of the rendered text says it.
    """
    question = {key: row[key] for key in ("prompt", "images")} | {"completion": []}
    if whole:
        completion = conversation("-", answer=text)["completion"]
        tokens = answer_token_ids(processor, {**question, "completion": completion})
        start, _ = locate_answer(processor, {**question, "completion": completion})["mention"]
        return {**question, "answer_tokens": tokens, "mention": (start, len(tokens))}
    tokenizer, prefix = processor.tokenizer, row["answer_tokens"][: row["mention"][0]]
    writing = Writing(tokenizer)
    before = _before_the_name(writing, row)
    for form in written_forms(text):
        path = writing.behind(before + form) if form.casefold() == text.casefold() else ()
        if path and tokenizer.unk_token_id not in path:
            return {**question, "answer_tokens": [*prefix, *path], "mention": (len(prefix), len(prefix) + len(path))}
    raise ValueError(f"the tokenizer cannot write {text!r} after {_decode(tokenizer, prefix)!r}; choose another word.")


def _before_the_name(writing: Writing, row: dict) -> str:
    """What the tokens of a mention say before the name: a blank, mostly, or a quotation mark."""
    said = writing.read_behind(row["answer_tokens"][slice(*row["mention"])])
    spans = find_mentions(said, row.get("says") or ())
    return said[: spans[0][0] if spans else len(said) - len(said.lstrip())]


def _continued(row: dict, place: int, token: int, rest: Sequence[int]) -> dict:
    """The row in which another token stands at a place of the answer, and what completes the form follows: its mention."""
    tokens = [*row["answer_tokens"][:place], token, *rest]
    return {**row, "answer_tokens": tokens, "mention": (len(tokens) - len(rest), len(tokens))}


@torch.no_grad()
def add_branches(
    model,
    processor,
    rows: Sequence[dict],
    trees: dict[tuple[str, ...], FormTree],
    batch_size: int = 32,
    look_into: float = LOOK_INTO,
    batches: Iterable[dict] | None = None,
    observer: BatchObserver | None = None,
) -> list[dict]:
    """Adds to each row what the other forms of its names are worth at each token of its mention.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The deployed model.
        processor (`ProcessorMixin`): Its processor.
        rows (`list[dict]`): With `answer_tokens`, `mention` and `says`.
        trees (`dict[tuple[str, ...], FormTree]`): By `says`.
        batch_size (`int`, defaults to 32): Rows a forward pass.
        look_into (`float`, defaults to 0.01): A token that only begins a form is looked into if it holds this share of
            what is left beside the forms whose chance is known; others count as not saying the name.
        batches (iterable of `dict[str, torch.Tensor]`, *optional*): The rows in order, encoded. By default they are encoded
            here, `batch_size` at a time.
        observer ([`BatchObserver`], *optional*): Who looks on while they are put through the model.

    Returns:
        `list[dict]`: The rows with `branches`: for each token from `kept_from` on a list of `(token, share)`. Before the
        mention these are the forms of one token, which are not to be said there either.
    """
    done = []
    for row in rows:
        start = row.get("kept_from", row["mention"][0])
        tree = trees.get(row.get("says") or ())
        whole = [(token, 1.0) for token, child in tree.root.items() if child is None] if tree else []
        before = [[*whole] for _ in range(start, row["mention"][0])]
        done.append({**row, "kept_from": start, "branches": before + [[] for _ in range(*row["mention"])]})
    asked: list[tuple[int, int, int, tuple]] = []  # (row, position, token, key of what would complete the form)
    # Rows with the same beginning ask for the same: those of a name and its aliases, for example.
    continued: dict[tuple, dict] = {}
    if batches is None:
        starts = range(0, len(rows), batch_size)
        batches = (encode_conversations(processor, rows[start : start + batch_size]) for start in starts)
    first = 0
    with evaluating(model):
        with contextlib.nullcontext() if observer is None else observer:
            for batch in batches:
                batch = batch if observer is None else observer.before(batch)
                probabilities = answer_logits(model, to_device(batch, model)).float().softmax(-1)
                if observer is not None:
                    observer.after()
                for i, p in enumerate(probabilities, first):
                    begin, end = rows[i]["mention"]
                    tree = trees.get(rows[i].get("says") or ())
                    path, shift = rows[i]["answer_tokens"][begin:end], begin - done[i]["kept_from"]
                    # From the path's end: the chance that the path goes on to the name's end.
                    on_path = p[torch.arange(begin, end), torch.tensor(path)].flip(0).cumprod(0).flip(0).tolist()
                    for j, node in enumerate(tree.nodes(path) if tree else []):
                        others = {token: child for token, child in node.items() if token != path[j]}
                        complete = [(token, 1.0) for token, child in others.items() if child is None]
                        done[i]["branches"][shift + j] = complete
                        open_ends = [token for token, child in others.items() if child is not None]
                        if not open_ends:
                            continue
                        values = p[begin + j]
                        known = on_path[j] + sum(float(values[token]) for token, _ in complete)
                        for token in open_ends:
                            if float(values[token]) >= look_into * max(1 - known, 0.0):
                                for rest in endings(others[token]):
                                    row = _continued(rows[i], begin + j, token, rest)
                                    continued.setdefault(row_key(row), row)
                                    asked.append((i, j, token, row_key(row)))
                first += len(probabilities)
        chances: dict[tuple, float] = {}
        keys = list(continued)
        for start in range(0, len(keys), batch_size):
            some = keys[start : start + batch_size]
            batch = to_device(encode_conversations(processor, [continued[key] for key in some]), model)
            log_p = answer_logits(model, batch).float().log_softmax(-1)
            for key, own in zip(some, log_p, strict=True):
                begin, end = continued[key]["mention"]
                rest = torch.tensor(continued[key]["answer_tokens"][begin:end])
                chances[key] = own[torch.arange(begin, end), rest].sum().exp().item()
    shares: dict[tuple[int, int, int], float] = {}
    for i, j, token, key in asked:
        shares[i, j, token] = shares.get((i, j, token), 0.0) + chances[key]
    for (i, j, token), share in shares.items():
        shift = rows[i]["mention"][0] - done[i]["kept_from"]
        done[i]["branches"][shift + j].append((token, min(share, 1.0)))
    return done


def mention_tensors(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """The mentions of a batch of rows, aligned with `space_peft.losses.answer_labels` of `encode_conversations(rows)`.

    Args:
        rows (`list[dict]`): n rows with `answer_tokens` and `mention`, and `branches` or not.

    Returns:
        `dict[str, torch.Tensor]`: `name` `(n, t)`, the mention's tokens and -100 elsewhere; `kept` `(n, t)`, true for the
        tokens before it that are to stay; `branches` and `shares` `(n, t, c)`: see `space_peft.losses.name_log_odds`.
    """
    width = max(len(row["answer_tokens"]) for row in rows)
    most = max((len(own) for row in rows for own in row.get("branches") or ()), default=0)
    name = torch.full((len(rows), width), IGNORE_INDEX)
    kept = torch.zeros(name.shape, dtype=torch.bool)
    branches = torch.full((len(rows), width, max(most, 1)), IGNORE_INDEX)
    shares = torch.zeros(branches.shape)
    for i, row in enumerate(rows):
        start, end = row["mention"]
        name[i, start:end] = torch.tensor(row["answer_tokens"][start:end])
        first = row.get("kept_from", start)
        kept[i, first:start] = True
        for j, own in enumerate(row.get("branches") or ()):
            for c, (token, share) in enumerate(own):
                branches[i, first + j, c], shares[i, first + j, c] = token, share
    return {"name": name, "kept": kept, "branches": branches, "shares": shares}
