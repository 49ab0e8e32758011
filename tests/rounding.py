"""How far rounding may take a result, so that a tolerance holds on every processor."""

import copy

import torch

from space_peft.modeling.layers import deployed_model
from space_peft.modeling.prompts import answer_logits, to_device


EPS = torch.finfo(torch.float32).eps
# A probability moves by a quarter of what its log-odds do. Two passes of the embedded model know a logit, of up to 32,
# to 64 units in the last place each: a few layers of sums over up to 576 terms, whose errors add up as their root.
PROBABILITY = 0.25 * 2 * 64 * EPS * 32


@torch.no_grad()
def logit_tolerance(model, batch) -> float:
    """Largest difference that the order of sums may make between two float32 passes of one model over one batch.

    Each of them is about as far from the exact logits as this processor's own pass is from one in float64. How kernels
    sum differs by processor, alignment and threads; four times that distance is for both passes and for luck.
    """
    exact = copy.deepcopy(model).double()
    difference = answer_logits(model, to_device(batch, model)) - answer_logits(exact, to_device(batch, exact))
    return 4 * difference.abs().max().item()


def divergence_tolerance(model, batch) -> float:
    """How far the KL divergence of a model's answers from themselves may be from 0.

    Each logit, and each log-softmax, is known to a few units in the last place of the largest logit. The KL divergence
    of a token sums p times these errors, so it is no larger. How large they are differs between processors.
    """
    with deployed_model(model) as deployed:
        return 8 * EPS * answer_logits(deployed, to_device(batch, model)).abs().max().item()
