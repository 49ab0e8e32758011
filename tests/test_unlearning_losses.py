"""The defining equations of the comparison methods, against float64 on random input."""

import pytest
import torch

from space_peft.losses import IGNORE_INDEX
from space_peft.trainers.saliency import saliency_mask, squared_gradients
from space_peft.trainers.unlearning_losses import contrastive_loss, nll_loss, npo_loss


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_nll_is_the_mean_over_the_tokens_of_all_rows():
    logits, targets = random(3, 5, 7), torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100], [0, -100, -100, -100]])
    picked = [
        -torch.log(torch.exp(logits[i, j, k]) / torch.exp(logits[i, j]).sum())
        for i, row in enumerate(targets.tolist())
        for j, k in enumerate(row)
        if k != IGNORE_INDEX
    ]
    assert len(picked) == 7
    assert nll_loss(logits.float(), targets).item() == pytest.approx(float(sum(picked) / 7), rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.4, 2.0])
def test_npo_loss(beta):
    log_prob, reference = -random(6).abs(), -random(6, seed=1).abs()
    ratio = torch.exp(log_prob) / torch.exp(reference)
    expected = -(2 / beta) * torch.log(1 / (1 + torch.exp(beta * torch.log(ratio)))).mean()
    assert npo_loss(log_prob.float(), reference.float(), beta).item() == pytest.approx(expected.item(), rel=1e-5)
    # p = p_ref: (2 / beta) log 2.
    assert npo_loss(reference, reference, beta).item() == pytest.approx(2 / beta * 0.6931471805599453)


def test_npo_pulls_as_gradient_ascent_for_small_beta_and_less_once_forgotten():
    log_prob, reference = -random(6).abs().requires_grad_(True), -random(6, seed=1).abs()
    (ascent,) = torch.autograd.grad(log_prob.mean(), log_prob)
    (small,) = torch.autograd.grad(npo_loss(log_prob, reference, 1e-6), log_prob)
    torch.testing.assert_close(small, ascent, rtol=1e-5, atol=0)
    beta = 0.4
    (gradient,) = torch.autograd.grad(npo_loss(log_prob, reference, beta), log_prob)
    weight = 2 * torch.sigmoid(beta * (log_prob - reference))  # W of the paper's eq. 5
    torch.testing.assert_close(gradient, weight.detach() / 6)
    forgotten = (reference - 30).requires_grad_(True)
    (gradient,) = torch.autograd.grad(npo_loss(forgotten, reference, beta), forgotten)
    assert gradient.max() < 1e-4 / 6


def test_contrastive_loss():
    z, positive, negatives, temperature = random(4, 6), random(4, 6, seed=1), random(3, 6, seed=2), 0.2

    def cosine(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    expected = 0.0
    for i in range(4):
        pull = torch.tensor(cosine(z[i], positive[i]) / temperature).exp()
        push = sum(torch.tensor(cosine(z[i], n) / temperature).exp() for n in negatives)
        expected -= float(torch.log(pull / (pull + push))) / 4
    value = contrastive_loss(z.float(), positive.float(), negatives.float(), temperature)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    shared = contrastive_loss(z, positive[0], negatives, temperature)
    assert shared.item() == pytest.approx(
        contrastive_loss(z, positive[:1].expand(4, -1), negatives, temperature).item(), rel=1e-6
    )


def test_contrastive_loss_moves_from_negatives_to_the_positive():
    negatives, positive = random(1, 6), random(6, seed=1)
    z = (negatives + 0.01 * random(1, 6, seed=2)).requires_grad_(True)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(contrastive_loss(z, positive, negatives, 0.2), z)
        z = (z - 0.1 * gradient).detach().requires_grad_(True)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(z, negatives) < 0.5 < 0.9 < cosine(z, positive[None])


def test_squared_gradients_are_those_of_batches():
    """The square of a batch's gradient, not of each row's, nor of all batches' mean; and zero without a gradient."""
    x, y = random(6, 4), random(6, seed=1)
    weight, unused = random(4, seed=2).requires_grad_(True), random(2).requires_grad_(True)
    batches = [{"x": x[:3], "y": y[:3]}, {"x": x[3:], "y": y[3:]}]
    seen, nothing = squared_gradients(
        [weight, unused], batches, lambda batch: (batch["x"] @ weight - batch["y"]).square().mean()
    )
    gradients = [2 / 3 * (b["x"] @ weight - b["y"]) @ b["x"] for b in batches]
    torch.testing.assert_close(seen.double(), (gradients[0] ** 2 + gradients[1] ** 2).detach() / 2, rtol=1e-5, atol=0)
    assert seen.dtype == torch.float32 and not nothing.any() and weight.grad is None
    with pytest.raises(ValueError, match="no batches"):
        squared_gradients([weight], [], lambda batch: weight.sum())


def test_saliency_mask():
    forget, preserve = random(50, 3).square(), random(50, 3, seed=1).square()
    for threshold in (0.5, 1.0, 3.0):
        mask = saliency_mask(forget, preserve, threshold)
        assert torch.equal(mask, forget / preserve >= threshold)
        assert 0 < mask.double().mean() < 1
    # Where neither says anything, the published ratio is 1: a weight without gradient passes. MMUnlearnerTrainer must
    # not ask about such weights.
    assert saliency_mask(torch.zeros(1), torch.zeros(1)).item()
