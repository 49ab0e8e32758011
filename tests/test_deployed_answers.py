"""What is kept of the deployed model's answers is what a forward pass would say, and spares that pass."""

import functools

import pytest
import torch
from rounding import divergence_tolerance
from test_space_trainer import make_trainer
from transformers import TrainerCallback

from space_peft import collect_statistics
from space_peft.demo import load_demo_model
from space_peft.losses import IGNORE_INDEX, answer_labels
from space_peft.modeling.layers import adapted_layers, deployed_model, lora_weights
from space_peft.modeling.mention_rows import add_branches
from space_peft.modeling.prompts import answer_columns, answer_logits, encode_conversations, length_order
from space_peft.trainers.deployed_answers import DeployedAnswers
from space_peft.trainers.pairs import forget_loader


@pytest.fixture(scope="module")
def trained(demo_erasure_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(load_demo_model(), demo_erasure_data, folder, max_steps=3, own_answers=True)
    trainer.train()
    return trainer


def largest_difference(trainer, kind, batch, rows):
    """Between kept and computed logits, where a token is predicted; the adapter is trained, so it must be off."""
    kept = trainer.deployed_answers.logits(kind, rows, answer_columns(batch["labels"]))
    with deployed_model(trainer.model) as deployed:
        computed = answer_logits(deployed, batch)
    assert kept.shape == computed.shape and not kept.requires_grad
    predicted = answer_labels(batch["labels"]) != IGNORE_INDEX
    return float((kept - computed)[:, :-1][predicted].abs().max())


def test_kept_logits_are_those_of_the_deployed_model(trained):
    """Rows in batches other than those they were seen in: other neighbours, other padding."""
    assert any(lora_weights(layer)[1].abs().max() > 0 for layer in adapted_layers(trained.model).values())
    for items in ([0, 1], [5, 2, 9, 3], [11]):
        batch = trained.data_collator([trained.train_dataset[item] for item in items])
        for kind in ("forget", "retain"):
            assert largest_difference(trained, kind, batch[kind], batch[f"{kind}_rows"]) < 1e-4


def test_answers_of_several_lengths_in_one_batch(trained):
    data = trained.train_dataset
    loader = forget_loader(trained.processing_class, data.rows, len(data.rows))
    batch = next(iter(loader))
    lengths = (answer_labels(batch["labels"]) != IGNORE_INDEX).sum(dim=1)
    assert len(set(lengths.tolist())) > 1
    assert largest_difference(trained, "forget", batch, range(len(data.rows))) < 1e-4


def test_finding_rows_shows_the_answers_as_well(demo_model, demo_erasure_data, tmp_path):
    """No row is put through the model for its answer that has just been put through it for its branches."""
    trainer = make_trainer(demo_model, demo_erasure_data, tmp_path, fit_batch_size=8)
    passes = []
    trainer.model.register_forward_hook(lambda module, args, output: passes.append(len(output.logits)))
    trainer.forget.find_rows()  # Nobody keeps answers yet: the passes that branches take.
    assert trainer.deployed_answers is None and sum(passes) >= len(trainer.train_dataset.rows)
    alone, passes[:] = list(passes), []
    trainer._prepare_run(None)
    assert passes == alone
    # In the same batches, the answers that a pass of their own gives are the same, bit by bit.
    rows, shared, again = trainer.train_dataset.rows, trainer.deployed_answers, DeployedAnswers(trainer.model)
    order = length_order(trainer.processing_class, rows)
    again.observe(forget_loader(trainer.processing_class, rows, 8, order), again.of_forget(order))
    for number, row in enumerate(rows):
        kept, own = (answers.logits("forget", [number], len(row["answer_tokens"])) for answers in (shared, again))
        assert kept is not None and torch.equal(kept, own)


def test_nothing_is_left_on_the_model_by_a_pass_that_ends_early(trained, monkeypatch):
    """An error, a full memory: who looks on is told, and the hooks are gone."""

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    model, answers = trained.model, DeployedAnswers(trained.model)
    before = [len(module._forward_hooks) for module in model.modules()]
    loader = forget_loader(trained.processing_class, trained.train_dataset.rows, 8)
    observer = answers.of_forget(range(len(trained.train_dataset.rows)))
    monkeypatch.setattr("space_peft.trainers.deployed_answers.answer_logits", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        answers.observe(loader, observer)
    assert [len(module._forward_hooks) for module in model.modules()] == before
    assert answers.logits("forget", [0], 1) is None
    # Rows of another loader that come before its own are not taken for these.
    monkeypatch.undo()
    observer.skip(8)
    answers.observe(loader, observer)
    columns = len(trained.train_dataset.rows[8]["answer_tokens"])
    kept, own = answers.logits("forget", [0], columns), trained.deployed_answers.logits("forget", [8], columns)
    assert kept is not None and (kept - own).abs().max() < 1e-4


def test_rows_about_the_concept_are_not_taken_for_retained_ones(demo_model, demo_erasure_data, tmp_path):
    """With statistics they are read first, in the same pass."""
    statistics = collect_statistics(*load_demo_model(), demo_erasure_data[1][:40], progress=False)
    trainer = make_trainer(demo_model, demo_erasure_data, tmp_path, max_steps=1)
    trainer.statistics = trainer.null_space.statistics = statistics
    trainer.train()
    assert len(trainer.null_space.retain_dataloader) > len(trainer.fit_loader)
    batch = trainer.data_collator([trainer.train_dataset[item] for item in range(4)])
    assert largest_difference(trainer, "retain", batch["retain"], batch["retain_rows"]) < 1e-4


def test_rows_of_like_length_share_a_batch(trained, monkeypatch):
    """Fewer tokens are padding, and every row gets what it gets by itself."""
    monkeypatch.setattr(trained.args, "fit_batch_size", 8)
    rows, processor, trees, tokens = (
        trained.train_dataset.rows[::-1],
        trained.processing_class,
        trained.forget._trees,
        [],
    )
    with deployed_model(trained.model) as deployed:
        alone = add_branches(deployed, processor, rows, trees, 1)
        handle = deployed.register_forward_pre_hook(
            lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        add_branches(deployed, processor, rows, trees, 8)
        padded, tokens[:] = sum(tokens), []
        together = trained.forget._branched(deployed, rows, 1000)
        handle.remove()
    assert sum(tokens) < 0.9 * padded
    assert [row["answer_tokens"] for row in together] == [row["answer_tokens"] for row in rows]
    for row, own in zip(together, alone, strict=True):
        assert [[token for token, _ in place] for place in row["branches"]] == [
            [token for token, _ in place] for place in own["branches"]
        ]
        shares = [[share for place in one["branches"] for _, share in place] for one in (row, own)]
        assert shares[0] == pytest.approx(shares[1], abs=1e-5)
    for number in (0, len(rows) // 2, len(rows) - 1):  # Answers are kept under the numbers of their rows.
        batch = encode_conversations(processor, [rows[number]])
        assert largest_difference(trained, "forget", batch, [1000 + number]) < 1e-4


class Passes(TrainerCallback):
    """Forward passes of the vision tower within the steps, by whether they follow gradients."""

    def __init__(self, model):
        self.seen, self.stepping = [], False
        model.get_base_model().model.vision_tower.register_forward_hook(self.note)

    def note(self, *_):
        if self.stepping:
            self.seen.append(torch.is_grad_enabled())

    def on_step_begin(self, *args, **kwargs):
        self.stepping = True

    def on_step_end(self, *args, **kwargs):
        self.stepping = False


def test_a_step_runs_no_deployed_pass(demo_model, demo_erasure_data, tmp_path):
    trainer = make_trainer(demo_model, demo_erasure_data, tmp_path, max_steps=3, canary_items=0, keep_weight=1.0)
    passes = Passes(trainer.model)
    trainer.add_callback(passes)
    trainer.train()
    assert passes.seen.count(False) == 0 and 3 <= passes.seen.count(True) <= 2 * 3


def test_rows_never_seen_are_asked_for(trained):
    """E.g. retained rows under a stock LoraConfig, for which nothing is fitted."""
    assert trained.deployed_answers.logits("retain", [10**6], 3) is None
    assert trained.deployed_answers.logits("forget", [0, 10**6], 3) is None


@pytest.mark.slow
def test_a_model_that_rescales_its_logits_is_asked_every_time(demo_model, demo_erasure_data, tmp_path):
    """As Gemma's and Granite's final scaling do: what the output layer puts out is then not the model's logits."""
    model, _ = demo_model
    original = model.forward

    @functools.wraps(original)  # `generate` asks the signature of `forward`.
    def scaled(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = 0.5 * output.logits
        return output

    model.forward = scaled
    trainer = make_trainer(demo_model, demo_erasure_data, tmp_path, max_steps=2, canary_items=0)
    trainer.train()
    assert trainer.deployed_answers is None
    assert trainer.state.log_history[0]["loss_keep"] == pytest.approx(0, abs=rounding(trainer))


def rounding(trainer) -> float:
    """How far L_keep of a model with itself may be from 0."""
    batch = trainer.data_collator([trainer.train_dataset[item] for item in range(8)])["retain"]
    assert trainer.args.keep_weight > 0
    return trainer.args.keep_weight * divergence_tolerance(trainer.model, batch)


def test_keep_loss_begins_at_zero(trained):
    """The first step compares the model with itself: a misaligned answer would show."""
    assert trained.state.log_history[0]["loss_keep"] == pytest.approx(0, abs=rounding(trained))
