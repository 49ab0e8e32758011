"""What is scored of an answer: all of its tokens, and nothing that the chat template puts behind it."""

import pytest
import torch
from architectures import build
from PIL import Image

from space_peft.modeling.prompts import build_batch, to_device
from space_peft.suites.answers import Prompt, ask, score


PICTURE = Image.new("RGB", (16, 16), "red")
OPTIONS = {"batch_size": 4, "progress": False}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "paligemma", "gemma3", "mllama"])
def test_the_end_of_the_turn_is_not_scored(name):
    model, processor = build(name)
    prompts = [Prompt("What is a fox?", PICTURE), Prompt("What is a leaf?"), Prompt("What colour is a leaf?", PICTURE)]
    scores = score(model, processor, prompts, ["red fox", "green", "nosuchword"], **OPTIONS)
    # Words are tokens here; one that the tokenizer does not know is one, too.
    assert [len(tokens.log_probs) for tokens in scores] == [2, 1, 1]
    assert all(len(tokens.hits) == len(tokens.log_probs) and tokens.loss > 0 for tokens in scores)


def test_a_score_is_what_the_model_gives_the_tokens():
    model, processor = build("llava")
    [tokens] = score(model, processor, [Prompt("What is a fox?", PICTURE)], ["red fox"], **OPTIONS)
    batch = to_device(build_batch(processor, ["What is a fox?"], images=[PICTURE], answers=["red fox"]), model)
    labels = batch.pop("labels")
    with torch.no_grad():
        log_probs = model(**batch).logits.log_softmax(dim=-1)[0]
    places = (labels[0] != -100).nonzero().flatten().tolist()[:2]
    # The logits of one place are of the next token.
    wanted = [float(log_probs[place - 1, labels[0, place]]) for place in places]
    assert tokens.log_probs == pytest.approx(wanted, abs=1e-5)
    assert tokens.hits == tuple(int(log_probs[place - 1].argmax()) == int(labels[0, place]) for place in places)
    assert tokens.loss == pytest.approx(-sum(wanted) / 2, abs=1e-5)


def test_prompts_come_back_in_their_order():
    model, processor = build("llava")
    prompts = [Prompt("What is a leaf? " * n, PICTURE if n % 2 else None) for n in (3, 1, 2, 4)]
    together = ask(model, processor, prompts, max_new_tokens=3, **OPTIONS)
    assert together == [ask(model, processor, [one], max_new_tokens=3, **OPTIONS)[0] for one in prompts]


def test_what_cannot_be_scored_is_named():
    model, processor = build("llava")
    with pytest.raises(ValueError, match="row 3: the answer '</s>' has no token to be scored"):
        score(model, processor, [Prompt("What?", where="row 3")], ["</s>"], **OPTIONS)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(
        ValueError, match="a prompt: the model gives the answer 'fox' log probabilities that are no numbers"
    ):
        score(model, processor, [Prompt("What?")], ["fox"], **OPTIONS)


def test_modes_are_restored_part_by_part():
    model, processor = build("llava")
    model.train()
    model.get_input_embeddings().eval()  # A frozen part, say.
    modes = {name: module.training for name, module in model.named_modules()}
    score(model, processor, [Prompt("What?")], ["fox"], **OPTIONS)
    assert {name: module.training for name, module in model.named_modules()} == modes and not all(modes.values())
