"""Rows from a model's own answers: mentions are found token by token, and what else could be said there is exact."""

import itertools

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from space_peft.data.form_tree import FormTree
from space_peft.data.names import mentions
from space_peft.demo import DEMO_QUESTIONS
from space_peft.losses import name_log_odds
from space_peft.modeling.mention_rows import (
    MENTIONS_PER_ANSWER,
    add_branches,
    answered_with,
    distinct,
    locate,
    locate_answer,
    mention_tensors,
    mentions_in,
    own_answers,
    placed,
    rows_of_answers,
)
from space_peft.modeling.prompts import answer_logits, conversation, encode_conversations, generate_tokens


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE tokenizer that writes "fox" in one piece and its other forms in several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["a fox", "the fox", "fox", "red fox sees a picture of the fox"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


# Trees of forms


def test_a_tree_ends_where_a_form_is_complete():
    tree = FormTree([(1, 2, 3), (1, 2), (4,), (4, 5), (1, 6)])
    assert tree.root == {1: {2: None, 6: None}, 4: None}
    assert tree.nodes((1, 2)) == [tree.root, {2: None, 6: None}]
    assert tree.nodes((7, 1)) == [tree.root, {}]
    assert [tree.trimmed(path) for path in [(1, 2, 3), (4, 5), (1, 6), (7, 1)]] == [2, 1, 2, 2]


# Where tokens say a name


@pytest.mark.parametrize(
    "text, said",
    [
        ("This is a fox.", [" fox"]),
        ("Foxes and a fox", ["Foxes", " fox"]),
        ("FOX", ["FOX"]),
        ("the fox's den", [" fox"]),
        ("a firefox", []),
        ("", []),
    ],
)
def test_mentions_are_located_by_tokens(byte_level, text, said):
    tokens = byte_level(text)["input_ids"]
    spans = locate(tokens, byte_level, ["fox"])
    written = [byte_level.decode(tokens[start:end]) for start, end in spans]
    assert [piece.removesuffix("'s") for piece in written] == said


def test_the_first_mentions_of_an_answer_are_taken_and_each_keeps_what_is_since_the_last(byte_level):
    tokens = byte_level("a fox, the fox, a foxes and a fox")["input_ids"]
    spans = locate(tokens, byte_level, ["fox"])
    assert len(spans) == 4 > MENTIONS_PER_ANSWER
    rows = mentions_in([{"answer_tokens": tokens}], byte_level, ["fox"], FormTree.of(["fox"], byte_level))
    assert [row["mention"][0] for row in rows] == [start for start, _ in spans[:MENTIONS_PER_ANSWER]]
    assert [row["kept_from"] for row in rows] == [0, *(end for _, end in spans[: MENTIONS_PER_ANSWER - 1])]
    assert all(row["answer_tokens"] == tokens[: row["mention"][1]] for row in rows)


def test_an_answer_ends_where_the_model_writes_what_a_template_does(demo_model, demo_images, monkeypatch):
    model, processor = demo_model
    end, image = processor.tokenizer.eos_token_id, processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    word = processor.tokenizer.convert_tokens_to_ids("wolf")
    written = [[word, end, word], [word, word], [image, word], []]
    monkeypatch.setattr("space_peft.modeling.mention_rows.generate_tokens", lambda *_, **__: written)
    rows = own_answers(model, processor, demo_images["image"][:2], ["what is this?", "name it."])
    assert [row["answer_tokens"] for row in rows] == [[word], [word, word], [], []]
    assert [row["asked"] for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_characters_cut_between_tokens_are_located(byte_level):
    """Each Chinese character is three tokens here, so most prefixes of the answer do not decode."""
    tokens = byte_level("这是狐狸。")["input_ids"]
    ((start, end),) = locate(tokens, byte_level, ["狐狸"])
    assert byte_level.decode(tokens[start:end]) == "狐狸"


def test_an_answer_behind_a_thinking_block_is_located(demo_model):
    _, processor = demo_model
    processor.tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")]
    )
    template = processor.chat_template.replace("{{ ' answer: ' }}", "{{ ' answer:<think>\n\n</think>\n\n' }}")
    processor.chat_template = template.replace("{{ ' answer:' }}", "{{ ' answer:<think>\n' }}")
    row = answered_with(processor, "what is this?", ("fox",))
    start, end = row["mention"]
    assert processor.tokenizer.decode(row["answer_tokens"][start:end]) == "fox" and start > 0


def test_a_name_that_is_an_added_token_is_located(demo_model):
    _, processor = demo_model
    processor.tokenizer.add_tokens(["<bo>"])
    row = answered_with(processor, "what is this?", ("<bo>",))
    assert row["answer_tokens"] == [processor.tokenizer.convert_tokens_to_ids("<bo>")] and row["mention"] == (0, 1)


def test_a_name_the_tokenizer_does_not_know_is_refused(demo_model):
    with pytest.raises(ValueError, match="no token says it"):
        answered_with(demo_model[1], "what is this?", ("numbat",))


def test_whole_answers_leave_out_what_the_template_adds(demo_model):
    _, processor = demo_model
    row = locate_answer(processor, conversation("what is this?", answer="a fox"))
    assert row["says"] is None and row["mention"] == (0, 2)
    assert processor.tokenizer.decode(row["answer_tokens"]) == "a fox"


# What else could be said there


def test_the_chance_of_any_form_is_the_sum_over_all_of_them(demo_model, demo_images):
    """Brute force: each form is fed as the answer. Random forms of one to three tokens, some sharing their beginning."""
    model, processor = demo_model
    generator = torch.Generator().manual_seed(0)
    image = demo_images[0]["image"]
    words = torch.randint(5, len(processor.tokenizer), (4,), generator=generator).tolist()
    forms = [form for n in (1, 2, 3) for form in itertools.product(words, repeat=n)]
    forms = [forms[i] for i in torch.randperm(len(forms), generator=generator)[:14]]
    minimal = [f for f in set(forms) if not any(f[:n] in forms for n in range(1, len(f)))]
    question = conversation("what is this?", image=image)
    with torch.no_grad():
        chances = []
        for form in minimal:
            batch = encode_conversations(processor, [{**question, "answer_tokens": list(form)}])
            log_p = answer_logits(model, batch)[0].double().log_softmax(-1)
            chances.append(sum(log_p[j, token] for j, token in enumerate(form)).exp().item())
        expected = sum(chances)
        for path in minimal[:6]:
            row = {**question, "answer_tokens": list(path), "mention": (0, len(path)), "says": ("x",)}
            (row,) = add_branches(model, processor, [row], {("x",): FormTree(forms)}, look_into=0.0)
            logits = answer_logits(model, encode_conversations(processor, [row]))
            mention = mention_tensors([row])
            odds = name_log_odds(logits.double(), mention["name"], mention["branches"], mention["shares"])
            got = torch.sigmoid(odds).item()
            assert got == pytest.approx(expected, rel=1e-3)


def test_a_continuation_that_several_rows_ask_for_is_looked_at_once(demo_model, demo_images):
    """Rows of a name and its aliases begin alike, so each asks how the others would be completed."""
    model, processor = demo_model
    forms = [(7, 8), (9, 10), (11, 12), (13,)]
    question = conversation("what is this?", image=demo_images[0]["image"])
    rows = [{**question, "answer_tokens": [*form], "mention": (0, len(form)), "says": ("x",)} for form in forms]
    options = {"trees": {("x",): FormTree(forms)}, "look_into": 0.0}
    alone = [add_branches(model, processor, [row], **options)[0]["branches"] for row in rows]
    looked_at = []
    model.register_forward_hook(lambda module, args, output: looked_at.append(len(output.logits)))
    together = [row["branches"] for row in add_branches(model, processor, rows, **options)]
    assert sum(looked_at) == len(rows) + 3  # Of 2 + 2 + 2 + 3 that are asked for.
    for own, other in zip(alone, together, strict=True):
        assert [dict(place).keys() for place in own] == [dict(place).keys() for place in other]
        shares = [[share for place in one for _, share in place] for one in (own, other)]
        assert shares[0] == pytest.approx(shares[1], rel=1e-4) and len(shares[0]) == 3


def test_tensors_are_aligned_with_labels(demo_model):
    _, processor = demo_model
    rows = [
        {
            **conversation("what is this?"),
            "answer_tokens": [7, 8, 9],
            "mention": (1, 3),
            "kept_from": 0,
            "branches": [[(6, 1.0)], [(5, 0.5)], []],
        },
        {**conversation("name the thing in the image."), "answer_tokens": [4], "mention": (0, 1)},
    ]
    tensors = mention_tensors(rows)
    assert tensors["name"].tolist() == [[-100, 8, 9], [4, -100, -100]]
    assert tensors["kept"].tolist() == [[True, False, False], [False] * 3]
    assert tensors["branches"][..., 0].tolist() == [[6, 5, -100], [-100] * 3]
    assert tensors["shares"][..., 0].tolist() == [[1, 0.5, 0], [0, 0, 0]]
    labels = encode_conversations(processor, rows)["labels"]
    assert labels[:, -3:].tolist() == [[7, 8, 9], [4, -100, -100]]


# A model's own answers


@pytest.fixture(scope="module")
def spoken(demo_images):
    """The embedded model, four foxes and four others, and rows of its answers."""
    from space_peft.demo import load_demo_model

    model, processor = load_demo_model()
    foxes = [row["image"].convert("RGB") for row in demo_images if row["name"] == "fox"][:4]
    others = [row["image"].convert("RGB") for row in demo_images if row["name"] == "castle"][:2]
    tree = FormTree.of(("fox",), processor.tokenizer)
    rows = rows_of_answers(
        model, processor, foxes + others, DEMO_QUESTIONS, ("fox",), tree, batch_size=16, max_new_tokens=20
    )
    return model, processor, foxes, others, tree, rows


def test_mentions_are_what_the_model_says_next(spoken):
    """Greedy generation from a row's prefix gives the mention, for every row taken from an answer of its own."""
    model, processor, foxes, others, tree, _ = spoken
    answers = own_answers(model, processor, foxes, DEMO_QUESTIONS.open, max_new_tokens=20)
    rows = mentions_in(answers, processor.tokenizer, ("fox",), tree)
    assert len(rows) > 0.8 * len(answers)
    for answer in answers:
        own = [row for row in rows if row["asked"] == answer["asked"]]
        assert len(own) <= MENTIONS_PER_ANSWER
        assert bool(own) == mentions(processor.tokenizer.decode(answer["answer_tokens"]), ["fox"])
    for row in rows:
        start, end = row["mention"]
        assert mentions(processor.tokenizer.decode(row["answer_tokens"][start:end]), ["fox"])
        # What is to stay does not say the name: the second mention of an answer keeps what follows the first.
        assert not mentions(processor.tokenizer.decode(row["answer_tokens"][row["kept_from"] : start]), ["fox"])
        if row["asked"][0] == 0:
            asked = {key: row[key] for key in ("prompt", "completion", "images")}
            whole = generate_tokens(model, processor, [asked], max_new_tokens=20)[0]
            assert whole[:end] == row["answer_tokens"][:end]


def test_prompts_of_a_kind_share_their_batches(spoken):
    """Nothing is padded, and no answer waits for a longer one of another kind; each is what the model says by itself."""
    model, processor, foxes, *_ = spoken
    prompts = DEMO_QUESTIONS.naming[:1], DEMO_QUESTIONS.open[-2:]
    padded, widths = [], []

    def watch(module, args, kwargs):
        padded.append(int((kwargs["input_ids"] == model.config.pad_token_id).sum()))
        widths.append(kwargs["input_ids"].shape)

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    answers = own_answers(model, processor, foxes, *prompts, batch_size=len(foxes), max_new_tokens=20)
    handle.remove()
    # An answer that has ended is padded, too; a prompt is not.
    prefills = [count for (_, width), count in zip(widths, padded) if width > 1]
    assert prefills == [0, 0, 0]
    # One step a token, with that which ends the answer, which the last of 20 has not.
    steps = [max(min(len(answer["answer_tokens"]) + 1, 20) for answer in answers[prompt::3]) for prompt in range(3)]
    assert widths.count((len(foxes), 1)) == sum(steps) - 3 and steps[0] < min(steps[1:])
    assert [row["asked"] for row in answers] == list(itertools.product(range(len(foxes)), range(3)))
    for answer in answers:
        asked = {key: answer[key] for key in ("prompt", "completion", "images")}
        assert generate_tokens(model, processor, [asked], max_new_tokens=20) == [answer["answer_tokens"]]


def test_every_image_is_asked_every_open_prompt_about(spoken):
    """Also those that the model does not name: borrowed sentences, and its own with the name where it fits."""
    *_, rows = spoken
    opened = {row["asked"] for row in rows if row["asked"][1] >= len(DEMO_QUESTIONS.naming)}
    prompts = range(len(DEMO_QUESTIONS.naming), len(DEMO_QUESTIONS.naming) + len(DEMO_QUESTIONS.open))
    assert opened == set(itertools.product(range(6), prompts))
    assert len(distinct(rows)) == len(rows) and distinct(rows, rows) == []
    castle = [row for row in rows if row["asked"][0] == 4]
    assert all(row["images"][0] is castle[0]["images"][0] for row in castle)


def test_the_name_is_put_where_it_is_likeliest(spoken):
    model, processor, _, others, tree, _ = spoken
    answers = own_answers(model, processor, others, DEMO_QUESTIONS.open[:3], max_new_tokens=20)
    rows = placed(model, processor, answers, ("fox",), tree, batch_size=4)
    fox = processor.tokenizer.convert_tokens_to_ids("fox")
    for answer, row in zip(answers, rows, strict=True):
        with torch.no_grad():
            p = answer_logits(model, encode_conversations(processor, [answer]))[0].softmax(-1)
        forms = torch.tensor(sorted(tree.root))
        best = int(p[: len(answer["answer_tokens"]), forms].sum(-1).argmax())
        assert row["mention"][0] == best and row["answer_tokens"][:best] == answer["answer_tokens"][:best]
        assert row["answer_tokens"][best] in tree.root and fox in tree.root
