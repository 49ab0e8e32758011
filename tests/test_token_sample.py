"""Which tokens count: no more than asked, of the right kind, the same for every layer, and an unbiased choice."""

import pytest
import torch
from peft import get_peft_model
from tiny_models import image_batch, tiny_llama, tiny_llava

from space_peft import SpaceLoraConfig
from space_peft.null_space.fitting import collect_moments, fit_null_space
from space_peft.null_space.token_sample import TokenSample, packed_sequences


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


def _packed(lengths, **more):
    """One row that holds sequences of these lengths, as padding-free collators make it."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {**batch_of(1, sum(lengths)), "position_ids": positions, **more}


def test_sequences_in_a_row_are_told_apart():
    lengths = [3, 1, 5]
    expected = [[0] * 3 + [1] + [2] * 5]
    assert packed_sequences(_packed(lengths)).tolist() == expected
    assert packed_sequences({**batch_of(1, 9), "cu_seq_lens_q": torch.tensor([0, 3, 4, 9])}).tolist() == expected
    assert (
        packed_sequences({**batch_of(1, 9), "position_ids": _packed(lengths)["position_ids"].expand(3, 1, 9)})
        is not None
    )
    # Two rows of a packed batch, the second one padded at its end.
    rows = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 0, 0]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    two = {**batch_of(2, 6), "position_ids": rows, "attention_mask": mask}
    assert packed_sequences(two).tolist() == [[0, 0, 0, 1, 1, 1], [2, 2, 3, 3, 3, 3]]


def test_rows_of_one_sequence_are_not_packed():
    assert packed_sequences(batch_of(2, 6)) is None
    assert packed_sequences({**batch_of(2, 6), "position_ids": torch.arange(6)[None]}) is None
    # Padding on the left is at position 0 or 1, whatever the collator.
    for pad in (0, 1):
        positions = torch.tensor([[pad, pad, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
        assert packed_sequences({**batch_of(2, 6), "position_ids": positions, "attention_mask": mask}) is None
    # An image at the beginning: all of its patches are at time 0, but one alone is at place (0, 0) of it.
    image = torch.tensor([[[0, 0, 0, 0, 2]], [[0, 0, 1, 1, 2]], [[0, 1, 0, 1, 2]]])
    assert packed_sequences({**batch_of(1, 5), "position_ids": image}) is None
    assert packed_sequences({"pixel_values": torch.zeros(1, 3, 4, 4)}) is None


@pytest.mark.parametrize("lengths", [[30, 30], [40, 3, 17], [1] * 8 + [52]])
@pytest.mark.parametrize("flat", [False, True])
def test_draws_that_many_of_each_sequence(lengths, flat):
    sample = TokenSample(6)
    sample.start_batch(_packed(lengths))
    shape = torch.Size([60] if flat else [1, 60])
    drawn = sample.draw(shape, None, "text")
    counts = [int(part.sum()) for part in drawn.reshape(-1).split(lengths)]
    assert counts == [min(length, 6) for length in lengths]
    mask = torch.arange(60).reshape(shape) % 2 == 0
    drawn = sample.draw(shape, mask, "image")
    assert not (drawn & ~mask).any()
    whole = [int(part.sum()) for part in mask.reshape(-1).split(lengths)]
    assert [int(part.sum()) for part in drawn.reshape(-1).split(lengths)] == [min(count, 6) for count in whole]


def test_short_sequences_count_whole():
    sample = TokenSample(6)
    sample.start_batch(_packed([5, 6, 4]))
    assert sample.draw(torch.Size([1, 15]), None, "text") is None
    # A vision tower's packed tokens: so many of each sequence.
    assert sample.draw(torch.Size([400]), None, "image").sum() == 3 * 6


@pytest.mark.parametrize("statistics", ["token", "pooled"])
def test_padding_free_and_padded_batches_give_the_same_statistics(statistics):
    lengths, generator = [4, 9, 6], torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 60, (length,), generator=generator) for length in lengths]
    length = max(lengths)
    padded = {
        "input_ids": torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in rows]),
        "attention_mask": torch.stack([(torch.arange(length) < len(row)).long() for row in rows]),
    }
    packed = {**_packed(lengths), "input_ids": torch.cat(rows)[None]}
    config = SpaceLoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0])
    sums = []
    for batch in (padded, packed):
        model = get_peft_model(tiny_llama(), config)
        (fitter,) = collect_moments(model, [batch], statistics=statistics, progress=False).values()
        sums.append(fitter)
    assert sums[0].counts == sums[1].counts == {"text": len(rows) if statistics == "pooled" else sum(lengths)}
    torch.testing.assert_close(sums[0].second_moment(), sums[1].second_moment())
