"""Which tokens count: no more than asked, of the right kind, the same for every layer, and an unbiased choice."""

import torch
from peft import get_peft_model
from tiny_models import image_batch, tiny_llava

from space_peft import SpaceLoraConfig
from space_peft.fitting import collect_moments, fit_null_space
from space_peft.token_sample import TokenSample


def batch_of(rows, length, seed=0):
    return {"input_ids": torch.randint(0, 1000, (rows, length), generator=torch.Generator().manual_seed(seed))}


def test_draws_that_many_of_each_row_and_kind():
    mask = torch.zeros(3, 20, dtype=torch.bool)
    mask[0, 5:], mask[1, :4], mask[2, 2:9] = True, True, True
    sample = TokenSample(6)
    sample.start_batch(batch_of(3, 20))
    drawn = sample.draw(mask.shape, mask, "image")
    assert drawn.sum(dim=1).tolist() == [6, 4, 6]
    assert not (drawn & ~mask).any()


def test_layers_of_a_pass_see_the_same_tokens_and_passes_different_ones():
    sample = TokenSample(4)
    shape, draws = torch.Size([2, 50]), []
    for seed in range(3):
        sample.start_batch(batch_of(2, 50, seed))
        draws.append(sample.draw(shape, None, "image"))
        assert torch.equal(draws[-1], sample.draw(shape, None, "image"))
        assert not torch.equal(draws[-1], sample.draw(shape, None, "text"))
    assert not torch.equal(draws[0], draws[1])
    sample.start_batch(batch_of(2, 50, 0))
    assert torch.equal(draws[0], sample.draw(shape, None, "image")), "the draw must depend on the batch alone"


def test_packed_tokens_are_drawn_over_all_rows():
    sample = TokenSample(5)
    sample.start_batch(batch_of(4, 30))
    assert sample.draw(torch.Size([100]), None, "image").sum() == 20


def test_nothing_is_drawn_where_all_fit():
    mask = torch.ones(2, 8, dtype=torch.bool)
    for sample in (TokenSample(None), TokenSample(8)):
        sample.start_batch(batch_of(2, 8))
        assert sample.draw(mask.shape, mask, "text") is mask
        assert sample.draw(mask.shape, None, "text") is None


def test_every_token_is_as_likely():
    sample, counts = TokenSample(3), torch.zeros(10)
    for seed in range(2000):
        sample.start_batch(batch_of(1, 10, seed))
        counts += sample.draw(torch.Size([1, 10]), None, "text")[0]
    # 2,000 draws of probability 0.3: a standard deviation of 0.010.
    assert (counts / 2000 - 0.3).abs().max() < 0.045


def test_fitting_counts_the_tokens_asked_for():
    model = get_peft_model(tiny_llava(), SpaceLoraConfig(r=2, target_modules="all-linear", tokens_per_row=2))
    batches = [image_batch(rows=3, text=6, seed=seed) for seed in range(4)]
    spaces = fit_null_space(model, batches, progress=False)
    counts = spaces["model.language_model.layers.0.self_attn.q_proj"].counts
    assert counts == {"image": 4 * 3 * 2, "text": 4 * 3 * 2}
    everything = collect_moments(model, batches, progress=False)
    assert everything["model.language_model.layers.0.self_attn.q_proj"].counts == {
        "image": 4 * 3 * 4,
        "text": 4 * 3 * 6,
    }


def test_a_sample_estimates_the_moment_of_all_tokens():
    model = get_peft_model(tiny_llava(), SpaceLoraConfig(r=2, target_modules=["down_proj"]))
    batches = [image_batch(rows=8, text=12, seed=seed) for seed in range(60)]
    name = "model.language_model.layers.1.mlp.down_proj"
    everything = collect_moments(model, batches, progress=False)[name].second_moment()
    errors = []
    for per_row in (1, 4):
        part = collect_moments(model, batches, tokens_per_row=per_row, progress=False)[name].second_moment()
        errors.append(float((part - everything).norm() / everything.norm()))
    assert errors[1] < errors[0] < 0.5 and errors[1] < 0.1
