"""How far rounding may take a result, so that a tolerance holds on every processor."""

import copy

import torch

from space_peft.prompts import answer_logits, to_device


@torch.no_grad()
def logit_tolerance(model, batch) -> float:
    """Largest difference that the order of sums may make between two float32 passes of one model over one batch.

    Each of them is about as far from the exact logits as this processor's own pass is from one in float64. How kernels
    sum differs by processor, alignment and threads; four times that distance is for both passes and for luck.
    """
    exact = copy.deepcopy(model).double()
    difference = answer_logits(model, to_device(batch, model)) - answer_logits(exact, to_device(batch, exact))
    return 4 * difference.abs().max().item()
