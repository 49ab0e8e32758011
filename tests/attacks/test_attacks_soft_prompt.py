"""Soft prompts: the vectors stand where they should, the search raises the name, and its control is the same search."""

import pytest
import torch

from space_peft.attacks import soft_prompt_attack
from space_peft.attacks.soft_prompt import _begun_with, _in_place_of, _unused_token
from space_peft.data.form_tree import FormTree, endings
from space_peft.demo import DEMO_QUESTIONS
from space_peft.modeling.mention_rows import answered_with
from space_peft.modeling.prompts import answer_logits, encode_conversations


def attack(erasure, **options):
    images = options.pop("images", erasure.target[:4])
    return soft_prompt_attack(
        erasure.model,
        erasure.processor,
        images,
        "fox",
        **{"control_name": "guitar", "questions": DEMO_QUESTIONS, "steps": 4, "progress": False, **options},
    )


@torch.no_grad()
def test_vectors_of_a_token_are_that_token(erasure, unchanged):
    model, processor = erasure.model, erasure.processor
    rows = [answered_with(processor, "what is this?", ("fox",), image) for image in erasure.target[:2]]
    tree = FormTree.of(("fox",), processor.tokenizer)
    token = _unused_token(processor, rows, tree)
    assert token not in encode_conversations(processor, rows)["input_ids"]
    assert token not in {own for path in endings(tree.root) for own in path}
    word = processor.tokenizer("wolf", add_special_tokens=False)["input_ids"][0]
    plain = answer_logits(model, encode_conversations(processor, [_begun_with(row, [word] * 3) for row in rows]))
    batch = encode_conversations(processor, [_begun_with(row, [token] * 3) for row in rows])
    vectors = model.get_input_embeddings().weight[word].expand(3, -1)
    with _in_place_of(model, token, vectors):
        found = answer_logits(model, batch)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    assert not torch.allclose(answer_logits(model, batch), plain, atol=1e-3), "without the vectors it is another prompt"


def test_each_vector_has_its_place(erasure):
    """Rows of a batch get the same vectors in the same order."""
    embed = erasure.model.get_input_embeddings()
    ids = torch.tensor([[5, 9, 9, 6], [9, 9, 7, 8]])
    vectors = torch.arange(2.0 * embed.weight.shape[1]).view(2, -1)
    with _in_place_of(erasure.model, 9, vectors):
        out = embed(ids)
        assert embed(ids[:, :2]).equal(embed.weight[ids[:, :2]]), "rows without all of them are left alone"
    assert out[0, 1:3].equal(vectors) and out[1, :2].equal(vectors)
    assert out[0, 0].equal(embed.weight[5]) and out[1, 3].equal(embed.weight[8])


def test_the_search_raises_the_name_and_leaves_the_model(erasure, unchanged):
    result = attack(erasure, steps=12)
    assert result.n == 2 and len(result.after.curve) == 12
    assert result.after.curve[-1] > result.after.curve[0] and result.control.curve[-1] > result.control.curve[0]
    assert result.after.p > result.after.p_plain
    assert result.before.p_plain > 0.9 > 0.1 > result.after.p_plain
    content = result.to_dict()
    assert (content["value"], content["control"], content["before"]) == (
        result.after.p,
        result.control.p,
        result.before.p,
    )


def test_the_seed_decides(erasure):
    first, again, other = (attack(erasure, steps=2, seed=seed, images=erasure.target[:2]) for seed in (0, 0, 1))
    assert first == again and first.after != other.after


@pytest.mark.parametrize("options", [{"vectors": 0}, {"steps": 0}, {"one": True}])
def test_bad_input(erasure, options):
    if options.pop("one", False):
        options = {"images": erasure.target[:1]}
    with pytest.raises(ValueError, match="two images or more"):
        attack(erasure, **options)
    with pytest.raises(ValueError, match="must not name the target"):
        attack(erasure, control_name="red fox")
