"""The losses against direct float64 computations on random inputs."""

import itertools
import math

import pytest
import torch

from space_peft import losses
from space_peft.modeling.prompts import IGNORE_INDEX


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_answer_labels_align_with_trailing_logits():
    labels = torch.tensor([[-100, -100, 5, 6], [-100, -100, 7, -100]])
    assert losses.answer_labels(labels).tolist() == [[5, 6], [7, -100]]


def test_name_log_prob_is_the_product_of_its_tokens(generator):
    logits = torch.randn(2, 4, 7, generator=generator)
    name = torch.tensor([[1, 2, 3], [4, IGNORE_INDEX, IGNORE_INDEX]])
    p = logits.double().softmax(-1)
    expected = [p[0, 0, 1] * p[0, 1, 2] * p[0, 2, 3], p[1, 0, 4]]
    got = losses.name_log_prob(logits, name).double().exp()
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=0)


def _tree_model(generator, vocabulary=4, depth=3):
    """A random language model over answers of `depth` tokens: prefix -> logits."""
    prefixes = itertools.chain(*(itertools.product(range(vocabulary), repeat=j) for j in range(depth)))
    return {prefix: torch.randn(vocabulary, generator=generator, dtype=torch.float64) * 2 for prefix in prefixes}


# Answers of three tokens out of four; each set of forms of a name, and the paths through it that a row may follow.
FORMS = [
    ([(2,)], [(2,)]),
    ([(2, 0)], [(2, 0)]),
    ([(2, 0, 3)], [(2, 0, 3)]),
    ([(2,), (3,)], [(2,), (3,)]),
    ([(2, 0), (3,), (1, 2, 2)], [(2, 0), (3,), (1, 2, 2)]),
    ([(2, 0, 1), (2, 0, 3), (2, 1), (0, 3)], [(2, 0, 1), (2, 0, 3), (2, 1), (0, 3)]),
]
PATHS = [(forms, path) for forms, paths in FORMS for path in paths]


def _probability(model, answer):
    return math.prod(model[answer[:j]].softmax(-1)[token].item() for j, token in enumerate(answer))


def _said(model, forms, prefix, depth=3):
    """The chance that an answer that begins with `prefix` begins with one of the forms; brute force."""
    answers = [a for a in itertools.product(range(4), repeat=depth) if a[: len(prefix)] == prefix]
    total = sum(_probability(model, a) for a in answers)
    return sum(_probability(model, a) for a in answers if any(a[: len(f)] == f for f in forms)) / total


def _row(model, forms, path, columns=3):
    """Logits along a path, with branches and their exact shares, as `space_peft.modeling.mention_rows` makes them."""
    logits = [model[path[:j]] if j < len(path) else torch.zeros(4, dtype=torch.float64) for j in range(columns + 1)]
    branches, shares = torch.full((1, columns, 4), IGNORE_INDEX), torch.zeros(1, columns, 4)
    for j, token in enumerate(path):
        others = sorted({f[j] for f in forms if f[:j] == path[:j] and len(f) > j} - {token})
        for c, other in enumerate(others):
            branches[0, j, c] = other
            shares[0, j, c] = _said(model, forms, (*path[:j], other))
    name = torch.tensor([[*path, *[IGNORE_INDEX] * (columns - len(path))]])
    return torch.stack(logits).unsqueeze(0).float(), {"name": name, "branches": branches, "shares": shares}


@pytest.mark.parametrize("forms, path", PATHS)
def test_log_odds_are_those_of_saying_any_form(generator, forms, path):
    model = _tree_model(generator)
    logits, mention = _row(model, forms, path)
    p = _said(model, forms, ())
    assert losses.name_log_odds(logits, **mention).item() == pytest.approx(math.log(p / (1 - p)), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("forms, path", PATHS)
def test_overwriting_is_the_exact_conditional_distribution(generator, forms, path):
    """Brute force: enumerate all answers, drop those that begin with a form, renormalise, read off the conditionals."""
    model = _tree_model(generator)
    logits, mention = _row(model, forms, path)
    q = losses.overwriting_log_probs(logits, **mention, floor=0.0).exp()[0]
    answers = itertools.product(range(4), repeat=3)
    allowed = {a: _probability(model, a) for a in answers if not any(a[: len(f)] == f for f in forms)}
    for j in range(len(path)):
        reached = {a: p for a, p in allowed.items() if a[:j] == path[:j]}
        total = sum(reached.values())
        expected = [sum(p for a, p in reached.items() if a[j] == v) / total for v in range(4)]
        torch.testing.assert_close(q[j].double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lead", [1.0, 17.0, 60.0, 200.0])
def test_a_name_that_leads_by_far_has_a_gradient(lead):
    """A clamped probability has none: 17 nats are 1 - 4e-8, which float32 rounds to 1."""
    logits = torch.tensor([[[lead, 0.0, -1.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    odds = losses.name_log_odds(logits, torch.tensor([[0]]))
    assert odds.item() == pytest.approx(lead - math.log(1 + math.exp(-1)), rel=1e-5)
    losses.suppression_loss(odds).backward()
    assert logits.grad[0, 0, 0].item() > 0.6


def test_what_stands_before_the_mention_counts_for_nothing(generator):
    logits = torch.randn(1, 5, 9, generator=generator, requires_grad=True)
    name = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 4, 7]])
    alone = losses.name_log_odds(logits[:, 2:], torch.tensor([[4, 7]]))
    odds = losses.name_log_odds(logits, name)
    torch.testing.assert_close(odds, alone)
    odds.sum().backward()
    assert logits.grad[0, :2].abs().max() == 0 and logits.grad[0, 2:4].abs().min() > 0


def test_other_forms_fall_with_the_one_that_is_said(generator):
    """The gradient of L_out pushes every form down, each as far as it says the name."""
    logits = torch.zeros(1, 2, 6, requires_grad=True)
    mention = {
        "name": torch.tensor([[0]]),
        "branches": torch.tensor([[[1, 2, IGNORE_INDEX]]]),
        "shares": torch.tensor([[[1.0, 0.5, 0.9]]]),
    }
    losses.suppression_loss(losses.name_log_odds(logits, **mention)).backward()
    slope = logits.grad[0, 0]
    assert slope[0] == pytest.approx(slope[1].item()) and slope[0] > slope[2] > slope[3]
    assert slope[3:].max() < 0 and slope[3] == pytest.approx(slope[5].item())


def test_unlikely_continuations_are_not_an_answer():
    """Another word after the first token counts only as far as it exceeds the floor."""
    name = torch.tensor([[1, 2]])
    for other, expected in [(0.05, 0.0), (0.1, 0.0), (0.55, 0.5), (1.0, 1.0)]:
        logits = torch.full((1, 2, 9), -1e9)
        logits[0, 0, 1], logits[0, 0, 5] = math.log(0.9), math.log(0.1)
        logits[0, 1, 2], logits[0, 1, 7] = math.log(max(1 - other, 1e-12)), math.log(other)
        q = losses.overwriting_log_probs(logits, name, floor=0.1)[0, 0].exp()
        assert q[1].item() == pytest.approx(0.9 * expected / (0.9 * expected + 0.1), abs=1e-5)


def test_task_loss_is_zero_at_the_target_and_positive_elsewhere(generator):
    logits = torch.randn(3, 3, 9, generator=generator)
    name = torch.tensor([[1, 2], [3, IGNORE_INDEX], [4, 4]])
    q = losses.overwriting_log_probs(logits, name)
    weights = losses.path_weights(q, name)
    assert losses.task_loss(torch.cat([q, q[:, :1]], 1), q, weights).item() == pytest.approx(0, abs=1e-6)
    assert losses.task_loss(logits, q, weights).item() > 0.01


def test_a_name_is_unlearned_where_answers_branch_off(generator):
    """Where the continuation is certain, the gradient falls on the first token; where it is not, on both."""
    name = torch.tensor([[1, 2], [1, 2], [3, IGNORE_INDEX]])
    base = torch.zeros(3, 3, 9)
    base[0, 1, 2] = 20.0  # after token 1 the base model always says token 2
    q = losses.overwriting_log_probs(base, name, floor=0.0)
    reached = losses.path_weights(q, name)
    assert reached[:, 0].tolist() == [1, 1, 1] and reached[2, 1] == 0
    assert reached[0, 1] < 1e-6 and reached[1, 1] == pytest.approx(q[1, 0, 1].exp().item(), rel=1e-5)
    logits = torch.randn(3, 3, 9, generator=generator, requires_grad=True)
    weighted = losses.name_log_odds(logits, name, reached=reached)
    torch.testing.assert_close(weighted, losses.name_log_odds(logits, name))
    weighted.sum().backward()
    norms = logits.grad.norm(dim=-1)
    assert norms[0, 0] > 1e-2 and norms[0, 1] < 1e-6 and norms[1, 1] > 1e-3


def test_task_loss_ignores_what_follows_the_name(generator):
    logits = torch.randn(1, 3, 9, generator=generator)
    name = torch.tensor([[1, IGNORE_INDEX]])
    q = losses.overwriting_log_probs(logits, name)
    changed = logits.clone()
    changed[:, 1:] += torch.randn(1, 2, 9, generator=generator)
    weights = losses.path_weights(q, name)
    assert losses.task_loss(changed, q, weights).item() == pytest.approx(losses.task_loss(logits, q, weights).item())


def test_the_sentence_up_to_the_name_stays(generator):
    """Before the name q is the model's own, less the name; it counts where it is kept, and only there."""
    logits = torch.randn(1, 5, 9, generator=generator)
    name = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 4, IGNORE_INDEX]])
    kept = torch.tensor([[False, True, False, False]])
    forms = {"branches": torch.full((1, 4, 1), IGNORE_INDEX), "shares": torch.zeros(1, 4, 1)}
    forms["branches"][0, 1, 0], forms["shares"][0, 1, 0] = 4, 1.0
    q = losses.overwriting_log_probs(logits, name, **forms)
    own = logits.softmax(-1)
    torch.testing.assert_close(q[0, 0].exp(), own[0, 0])
    assert q[0, 1, 4] < -1e3 and q[0, 2, 4] < -1e3
    others = [v for v in range(9) if v != 4]
    torch.testing.assert_close(q[0, 1, others].exp(), own[0, 1, others] / (1 - own[0, 1, 4]))
    weights = losses.path_weights(q, name, kept)
    assert weights.tolist() == [[0, 1, 1, 0]]
    before = losses.task_loss(logits, q, weights)
    for place, changes in enumerate([False, True, True, False]):
        moved = logits.clone()
        moved[0, place] += torch.randn(9, generator=generator)
        assert (losses.task_loss(moved, q, weights) != before).item() == changes


def test_task_loss_is_the_weighted_sum_of_divergences(generator):
    """In float64, from the definition: weights between 0 and 1 count as they are, and are those of `path_weights`."""
    logits, base = torch.randn(2, 3, 5, 9, generator=generator)
    name = torch.tensor(
        [[IGNORE_INDEX, 4, 7, IGNORE_INDEX], [2, 5, 1, 8], [IGNORE_INDEX, IGNORE_INDEX, 6, IGNORE_INDEX]]
    )
    kept = torch.tensor([[True, True, True, False], [True] * 4, [False, True, False, False]])
    log_q = losses.overwriting_log_probs(base, name)
    weights = losses.path_weights(log_q, name, kept)
    q, p = log_q.double().exp(), logits[:, :4].double().softmax(-1)
    expected = torch.tensor(
        [
            [1, 1, q[0, 1, 4], 0],
            [1, q[1, 0, 2], q[1, 0, 2] * q[1, 1, 5], q[1, 0, 2] * q[1, 1, 5] * q[1, 2, 1]],
            [0, 1, 1, 0],
        ]
    ).double()
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-7)
    kl = (q * (log_q.double() - p.log())).sum(-1)
    loss = losses.task_loss(logits, log_q, weights).item()
    assert loss == pytest.approx((kl * expected).sum(1).mean().item(), rel=1e-5)
    assert loss != pytest.approx((kl * (expected > 0)).sum(1).mean().item(), rel=1e-2), "else the weights do not matter"


def test_suppression_pushes_the_name_down(generator):
    logits = torch.randn(4, 2, 6, generator=generator, requires_grad=True)
    name = torch.tensor([[0], [1], [2], [3]])
    losses.suppression_loss(losses.name_log_odds(logits, name)).backward()
    for i in range(4):
        assert logits.grad[i, 0, i] > 0 and (logits.grad[i, 0].sum() - logits.grad[i, 0, i]) < 0


@pytest.mark.parametrize("p", [1e-4, 0.02, 0.5, 0.98])
def test_suppression_margin_adds_to_the_log_odds(p):
    odds = torch.tensor([math.log(p / (1 - p))], dtype=torch.float64)
    assert losses.suppression_loss(odds).item() == pytest.approx(-math.log(1 - p), rel=1e-6)
    raised = p / (1 - p) * math.exp(2)
    assert losses.suppression_loss(odds, 2.0).item() == pytest.approx(-math.log(1 - raised / (1 + raised)), rel=1e-6)


def test_repulsion_is_zero_for_orthogonal_and_opposite_features_and_one_for_equal():
    e = torch.tensor([1.0, 0.0, 0.0])
    assert losses.repulsion_loss(torch.tensor([[0.0, 2.0, 0.0], [-3.0, 0.0, 0.0]]), e).item() == 0
    assert losses.repulsion_loss(5 * e.unsqueeze(0), e).item() == pytest.approx(1)


def test_isotropy_and_entropy_order_spread_and_collapsed_features(generator):
    spread = torch.linalg.qr(torch.randn(16, 8, generator=generator))[0].T * 3
    collapsed = torch.ones(8, 16) + 1e-3 * torch.randn(8, 16, generator=generator)
    assert losses.isotropy_loss(spread).item() == pytest.approx(0, abs=1e-6)
    assert losses.isotropy_loss(collapsed).item() == pytest.approx(56 / 64, rel=1e-2)
    assert losses.spectral_entropy(spread).item() == pytest.approx(math.log(8), rel=1e-4)
    assert losses.spectral_entropy(collapsed).item() < 0.2


def test_keep_loss_equals_kl_divergence_and_ignores_padding(generator):
    base, adapted = torch.randn(2, 2, 4, 6, generator=generator)
    targets = torch.tensor([[1, 2, 3], [4, IGNORE_INDEX, IGNORE_INDEX]])
    p, q = base.double().softmax(-1), adapted.double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)[:, :3]
    expected = kl[targets != IGNORE_INDEX].mean().item()
    assert losses.keep_loss(adapted, base, targets).item() == pytest.approx(expected, rel=1e-5)
    adapted[1, 1:] += 5  # under -100
    assert losses.keep_loss(adapted, base, targets).item() == pytest.approx(expected, rel=1e-5)
