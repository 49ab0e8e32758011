"""The mode of a model: what is asked of it in evaluation mode leaves it as it was."""

import pytest
import torch
from torch import nn

from space_peft.modeling.layers import evaluating


def model_with_a_part_that_evaluates():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model[1][0].eval()  # as one freezes a part's statistics
    return model


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("training", [True, False])
def test_every_module_is_in_its_own_mode_again(training):
    model = model_with_a_part_that_evaluates()
    if not training:
        model.eval()
        model[1][1].train()  # Monte Carlo dropout: one part alone is random
    before = modes(model)
    assert len(set(before.values())) == 2
    with evaluating(model) as evaluated:
        assert evaluated is model and not any(modes(model).values())
    assert modes(model) == before


def test_also_after_an_error():
    model = model_with_a_part_that_evaluates()
    before = modes(model)
    with pytest.raises(RuntimeError, match="no memory"), evaluating(model):
        raise RuntimeError("no memory")
    assert modes(model) == before
    with evaluating(model), torch.no_grad(), evaluating(model[1]):
        assert not model[1].training
    assert modes(model) == before
