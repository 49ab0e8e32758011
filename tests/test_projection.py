"""The projected update: with any optimiser, in plain loops, in transformers' Trainer and in TRL's."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from peft import get_peft_model
from tiny_models import image_batch, relative_changes, text_batch, tiny_llama, tiny_llava, train, trainable
from transformers import Trainer, TrainingArguments
from transformers.optimization import Adafactor

from space_peft.config import SpaceLoraConfig
from space_peft.modeling.layers import adapted_layers, lora_weights
from space_peft.null_space import NullSpaceFitter, load_null_spaces
from space_peft.null_space.callback import NullSpaceCallback
from space_peft.null_space.fitting import fit_null_space
from space_peft.null_space.projection import attach_null_space, offload_null_spaces
from space_peft.records.folder import NULL_SPACES_NAME


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
    "torch_adafactor": lambda p: torch.optim.Adafactor(p, lr=3e-2, weight_decay=0.1),
}
RETAINED = text_batch(rows=1, length=12, seed=5)  # at most 12 of the 48 input directions
FORGET = text_batch(rows=4, length=12, seed=6)


def hard_llama(**settings):
    settings = {"r": 4, "target_modules": "all-linear", "constraint": "hard", "energy": 1.0, **settings}
    model = get_peft_model(tiny_llama(), SpaceLoraConfig(**settings))
    return model, fit_null_space(model, [RETAINED], progress=False)


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hard_constraint_leaves_retained_outputs_unchanged(name):
    model, spaces = hard_llama()
    before, forget_before = logits(tiny_llama(), RETAINED), logits(tiny_llama(), FORGET)
    optimizer = OPTIMIZERS[name](trainable(model))
    attach_null_space(model, optimizer, spaces)
    losses = train(model, optimizer, FORGET, steps=50)
    changes = relative_changes(model, [RETAINED])
    assert max(changes.values()) <= 1e-6, changes
    assert (logits(model, RETAINED) - before).norm() <= 1e-5 * before.norm()
    # It did learn: elsewhere the outputs moved, by more than any rounding.
    assert losses[-1] < losses[0] - 0.05
    assert (logits(model, FORGET) - forget_before).norm() > 0.05 * forget_before.norm()
    # Plain LoRA with the same budget does not leave them alone.
    plain = get_peft_model(tiny_llama(), SpaceLoraConfig(r=4, target_modules="all-linear", constraint="none"))
    train(plain, OPTIMIZERS[name](trainable(plain)), FORGET, steps=50)
    assert max(relative_changes(plain, [RETAINED]).values()) > 1e-2


def leak_of_one_layer(project, steps=50):
    """Trains `dW = B A` of one layer with Adam and returns `||dW h|| / ||dW||` on the retained span."""
    torch.manual_seed(0)
    retained = torch.randn(8, 32)
    space = NullSpaceFitter(32).update(retained).fit("hard", energy=1.0)
    inputs, targets = torch.randn(64, 32), torch.randn(64, 16)
    a = torch.nn.Parameter(space.project(torch.randn(4, 32) / 32**0.5))
    b = torch.nn.Parameter(torch.zeros(16, 4))
    optimizer = torch.optim.Adam([a, b], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (inputs @ a.T @ b.T - targets).square().mean().backward()
        previous = a.detach().clone()
        if project == "gradient":
            a.grad.copy_(space.project(a.grad))
        optimizer.step()
        if project == "update":
            a.data.copy_(previous + space.project(a.detach() - previous))
    update = (b @ a).detach()
    return float((retained @ update.T).norm() / update.norm() / retained.norm())


def test_projecting_only_gradients_leaks_under_adam():
    """The measurement that justifies the design: Adam's scaling per element leads out of the subspace."""
    update, gradient, nothing = (leak_of_one_layer(project) for project in ("update", "gradient", "nothing"))
    assert update < 1e-6
    assert gradient > 1e-3 and gradient > 1e3 * update
    assert nothing > gradient


def soft_llama(strength=0.3, **settings):
    model = get_peft_model(
        tiny_llama(), SpaceLoraConfig(r=4, target_modules="all-linear", strength=strength, **settings)
    )
    return model, fit_null_space(model, [text_batch(rows=8, seed=5)], progress=False)


def initial_weights(model):
    return {name: lora_weights(layer)[0].detach().clone() for name, layer in adapted_layers(model).items()}


@pytest.mark.parametrize("project_gradient", [False, True])
def test_soft_update_is_the_projected_update_of_the_optimiser(project_gradient):
    """Two SGD steps against dense float64 matrices: A_0 P, then each update times P once (twice with the gradient)."""
    model, spaces = soft_llama()
    start = initial_weights(model)
    optimizer = torch.optim.SGD(trainable(model), lr=0.5)
    attach_null_space(model, optimizer, spaces, project_gradient=project_gradient)
    expected = {}
    for name, a in start.items():
        p = spaces[name].project(torch.eye(a.shape[1], dtype=torch.float64))
        expected[name] = a.double() @ p
        torch.testing.assert_close(lora_weights(adapted_layers(model)[name])[0].double(), expected[name])
    for _ in range(2):
        optimizer.zero_grad()
        model(**FORGET).loss.backward()
        for name, layer in adapted_layers(model).items():
            p = spaces[name].project(torch.eye(layer.in_features, dtype=torch.float64))
            gradient = lora_weights(layer)[0].grad.double()
            expected[name] -= 0.5 * gradient @ (p @ p if project_gradient else p)
        optimizer.step()
    for name, layer in adapted_layers(model).items():
        torch.testing.assert_close(lora_weights(layer)[0].double(), expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("constraint", ["soft", "hard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_that_share_a_null_space(dtype, constraint):
    """q/k/v and gate/up share one, their ranks differ, and one of them gets no gradient; against dense float64."""
    model, spaces = soft_llama(constraint=constraint, energy=0.9, rank_pattern={"k_proj": 3, "v_proj": 6, "up_proj": 1})
    model.to(dtype)
    layers = adapted_layers(model)
    assert len(layers) == 2 * 7 and len({id(space) for space in spaces.values()}) == 2 * 4
    optimizer = torch.optim.SGD(trainable(model), lr=0.5)
    start = {name: a.double() for name, a in initial_weights(model).items()}
    attach_null_space(model, optimizer, spaces)
    expected = {}
    for name, layer in layers.items():
        p = dense_projection(spaces[name])
        expected[name] = start[name] @ p
        a = lora_weights(layer)[0]
        if "k_proj" not in name:
            a.grad = torch.randn_like(a)
            expected[name] -= 0.5 * a.grad.double() @ p @ p
    optimizer.step()
    for name, layer in layers.items():
        error = lora_weights(layer)[0].double() - expected[name]
        assert error.norm() <= 1e-6 * expected[name].norm(), name


def dense_projection(space):
    """`P` `(d, d)` in float64 from its definition."""
    basis = space.eigenvectors.double()
    return space.outside * torch.eye(space.dim).double() + (basis * (space.filters.double() - space.outside)) @ basis.T


def test_projection_is_exact_under_autocast_and_tf32():
    model, spaces = hard_llama()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    precisions = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.addmm_.default:
                precisions.append(torch.backends.cuda.matmul.fp32_precision)
            return function(*args, **(kwargs or {}))

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", torch.bfloat16), Watched():
            attach_null_space(model, optimizer, spaces)
            train(model, optimizer, FORGET, steps=3)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert precisions == ["ieee"] * (1 + 2 * 3) * 14
    for name, layer in adapted_layers(model).items():
        a = lora_weights(layer)[0].detach().double()
        assert (a - a @ dense_projection(spaces[name])).norm() <= 1e-6 * a.norm(), name


@pytest.mark.parametrize("constraint", ["soft", "hard"])
def test_next_to_nothing_is_kept_between_steps(constraint):
    """No second copy of eigenvectors, none of the weights, only filter values; a step frees all that it allocates."""

    def live_bytes():
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some objects are deprecated names that complain about being looked at
            tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    model, spaces = soft_llama(constraint=constraint, energy=0.9)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    model(**FORGET).loss.backward()
    gradients = [weight.grad for weight in trainable(model)]  # Python sees them from here on
    before = live_bytes()
    attached = attach_null_space(model, optimizer, spaces)
    optimizer.step()
    filters = {id(space): space.filters.nbytes for space in spaces.values()}
    assert live_bytes() == before + sum(filters.values())
    assert before > sum(gradient.nbytes for gradient in gradients) > 0
    attached.remove()


@pytest.mark.parametrize("constraint", ["soft", "hard"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_offloaded_eigenvectors_give_the_same_result(device, constraint):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    weights, used = [], []
    for offload in (False, True):
        model, spaces = soft_llama(constraint=constraint, energy=0.9)
        model.to(device)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        free = torch.cuda.memory_allocated() if device == "cuda" else 0
        attach_null_space(model, optimizer, spaces, offload=offload)
        used.append(torch.cuda.memory_allocated() - free if device == "cuda" else 0)
        train(model, optimizer, {key: value.to(device) for key, value in FORGET.items()}, steps=5)
        weights.append(initial_weights(model))
    assert all(torch.equal(a, weights[1][name]) for name, a in weights[0].items())
    if device == "cuda":
        assert used[1] == 0 < used[0]


def test_offloading_keeps_what_layers_share():
    _, spaces = soft_llama()
    moved = offload_null_spaces(spaces)
    assert moved.keys() == spaces.keys()
    assert len({id(space) for space in moved.values()}) == len({id(space) for space in spaces.values()}) == 8
    for name, space in moved.items():
        assert space.eigenvectors.device.type == "cpu" and torch.equal(space.eigenvectors, spaces[name].eigenvectors)


def test_gradient_projection_with_adam_is_the_reparametrisation():
    """Training A' in A = A' P with Adam takes the same path."""
    model, spaces = soft_llama()
    reference = copy.deepcopy(model)
    layers, free = adapted_layers(reference), {}
    for name, layer in layers.items():
        a, _, _ = lora_weights(layer)
        a.requires_grad_(False)
        free[name] = torch.nn.Parameter(a.detach().clone())
    optimizer = torch.optim.Adam([*free.values(), *trainable(reference)], lr=1e-2)

    def fold():
        for name, layer in layers.items():
            lora_weights(layer)[0].data.copy_(spaces[name].project(free[name].detach()))

    fold()
    for _ in range(5):
        optimizer.zero_grad()
        for layer in layers.values():
            lora_weights(layer)[0].requires_grad_(True).grad = None
        reference(**FORGET).loss.backward()
        for name, layer in layers.items():
            free[name].grad = spaces[name].project(lora_weights(layer)[0].grad)
        optimizer.step()
        fold()

    optimizer = torch.optim.Adam(trainable(model), lr=1e-2)
    attach_null_space(model, optimizer, spaces, project_gradient=True)
    train(model.eval(), optimizer, FORGET, steps=5)
    for name, layer in adapted_layers(model).items():
        torch.testing.assert_close(lora_weights(layer)[0], lora_weights(layers[name])[0], rtol=1e-3, atol=1e-5)


def test_stricter_soft_constraint_changes_retained_outputs_less():
    leaks = []
    for strength in (1e-3, 0.3, 1e3):
        model, spaces = soft_llama(strength=strength)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        attach_null_space(model, optimizer, spaces)
        train(model, optimizer, FORGET, steps=20)
        leaks.append(sum(relative_changes(model, [text_batch(rows=8, seed=5)]).values()))
    assert leaks[0] < 0.3 * leaks[1] and leaks[1] < 0.8 * leaks[2]


def test_vision_tower_and_projector_can_be_constrained():
    model = get_peft_model(
        tiny_llava(), SpaceLoraConfig(r=2, target_modules="all-linear", constraint="hard", energy=1.0, max_rank=20)
    )
    retained = image_batch(rows=1, text=3, seed=1)
    spaces = fit_null_space(model, [retained], progress=False)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    attach_null_space(model, optimizer, spaces)
    losses = train(model, optimizer, image_batch(rows=3, seed=2), steps=20)
    assert losses[-1] < losses[0]
    assert max(relative_changes(model, [retained]).values()) < 1e-6


def test_remove_lets_the_optimiser_go():
    model, spaces = hard_llama()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with attach_null_space(model, optimizer, spaces):
        train(model, optimizer, FORGET, steps=2)
    assert max(relative_changes(model, [RETAINED]).values()) < 1e-6
    train(model, optimizer, FORGET, steps=2)
    assert max(relative_changes(model, [RETAINED]).values()) > 1e-4
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_weights_loaded_between_steps_are_taken_as_they_are():
    model, spaces = soft_llama()
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    attach_null_space(model, optimizer, spaces)
    train(model, optimizer, FORGET, steps=1)
    layer = next(iter(adapted_layers(model).values()))
    loaded = torch.randn_like(lora_weights(layer)[0])
    lora_weights(layer)[0].data.copy_(loaded)
    train(model, optimizer, FORGET, steps=1)
    assert torch.equal(lora_weights(layer)[0].detach(), loaded)


def test_resumed_weights_are_not_projected_again():
    model, spaces = soft_llama()
    before = initial_weights(model)
    attach_null_space(model, torch.optim.SGD(trainable(model), lr=0.1), spaces, project_initial=False)
    assert all(torch.equal(a, before[name]) for name, a in initial_weights(model).items())


def test_works_through_accelerate_schedulers_and_skipped_steps():
    from accelerate import Accelerator

    model, spaces = hard_llama()
    inner = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(inner)
    attach_null_space(model, optimizer, spaces)
    scheduler = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 0.9**step)
    for _ in range(5):
        optimizer.zero_grad()
        accelerator.backward(model(**FORGET).loss)
        optimizer.step()
        scheduler.step()
    assert max(relative_changes(model, [RETAINED]).values()) < 1e-6
    assert relative_changes(model, [FORGET])["model.layers.0.mlp.down_proj"] > 1e-3

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = initial_weights(model)
    optimizer.zero_grad()
    scaler.scale(model(**FORGET).loss).backward()
    trainable(model)[0].grad.fill_(float("inf"))
    scaler.step(inner)
    scaler.update()
    assert all(torch.equal(a, before[name]) for name, a in initial_weights(model).items()), "a skipped step moved A"


def test_optimiser_state_is_untouched_and_pickles():
    model, spaces = hard_llama()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    plain = pickle.dumps(torch.optim.AdamW(trainable(model), lr=1e-2).state_dict())
    attach_null_space(model, optimizer, spaces)
    assert pickle.dumps(optimizer.state_dict()) == plain
    train(model, optimizer, FORGET, steps=1)
    pickle.loads(pickle.dumps(optimizer)).load_state_dict(optimizer.state_dict())
    copy.deepcopy(optimizer)


def test_bad_attachments_are_refused():
    model, spaces = soft_llama()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    before = initial_weights(model)
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.0\.self_attn\.q_proj' has no null space"):
        attach_null_space(model, optimizer, {})
    wrong = {**spaces, "model.layers.1.mlp.down_proj": spaces["model.layers.1.mlp.up_proj"]}
    with pytest.raises(ValueError, match=r"down_proj' has d = 48, but its lora_A takes d = 96"):
        attach_null_space(model, optimizer, wrong)
    with pytest.raises(ValueError, match="does not hold lora_A"):
        attach_null_space(model, torch.optim.SGD(trainable(model)[1:], lr=0.1), spaces)
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer"):
        attach_null_space(model, object(), spaces)
    norm = model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 weights of the model that no null space constrains.*norm\.weight"):
        attach_null_space(model, torch.optim.SGD(trainable(model), lr=0.1), spaces)
    norm.requires_grad_(False)
    assert all(torch.equal(a, before[name]) for name, a in initial_weights(model).items()), "refused, yet changed"
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(ValueError, match="and not both"):
        NullSpaceCallback()


# In trainers


def rows_of(batch):
    return [{key: value[i] for key, value in batch.items()} for i in range(len(batch["input_ids"]))]


def trainer_for(model, folder, callback, **arguments):
    settings = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **arguments,
    }
    arguments = TrainingArguments(**settings)
    return Trainer(model=model, args=arguments, train_dataset=rows_of(FORGET), callbacks=[callback])


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_callback_in_a_plain_trainer(tmp_path, how, offload):
    config = SpaceLoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], constraint="hard", energy=1.0)
    model = tiny_llama()
    if how == "add_adapter":
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config)
    callback = NullSpaceCallback([RETAINED], offload=offload)
    trainer = trainer_for(model, tmp_path, callback, gradient_accumulation_steps=2, weight_decay=0.1)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    changes = relative_changes(model, [RETAINED])
    assert len(changes) == 6 and max(changes.values()) < 1e-6
    assert max(relative_changes(model, [FORGET]).values()) > 1e-3
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks, "still attached after training"


def test_callback_in_the_sft_trainer(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": row["input_ids"].tolist()} for row in rows_of(FORGET)]
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=tiny_llama(),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=SpaceLoraConfig(r=4, target_modules="all-linear", constraint="hard", energy=1.0),
        callbacks=[NullSpaceCallback([RETAINED])],
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert max(relative_changes(trainer.model, [RETAINED]).values()) < 1e-6
    assert max(relative_changes(trainer.model, [FORGET]).values()) > 1e-3


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2", unk_token="w1")


@pytest.mark.parametrize("saved", [True, False])
def test_resumed_run_gives_bit_identical_weights(tmp_path, saved):
    """Soft constraint, dropout in the adapter: 8 steps at once, against 4, a checkpoint, and 4 more."""

    def fresh():
        torch.manual_seed(1)
        config = SpaceLoraConfig(r=4, target_modules="all-linear", strength=0.3, lora_dropout=0.2)
        return get_peft_model(tiny_llama(), config)

    def weights(model):
        return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}

    loader = torch.utils.data.DataLoader(rows_of(text_batch(rows=8, seed=5)), batch_size=4)
    whole = fresh()
    callback = NullSpaceCallback(loader)
    trainer_for(whole, tmp_path, callback, save_strategy="steps", save_steps=4).train()
    checkpoint = tmp_path / "checkpoint-4"
    assert load_null_spaces(checkpoint / NULL_SPACES_NAME).keys() == callback.null_spaces.keys()
    if not saved:
        (checkpoint / NULL_SPACES_NAME).unlink()
    resumed = fresh()
    # With the file in the checkpoint nothing is fitted again: an empty loader would be an error.
    callback = NullSpaceCallback([] if saved else loader)
    trainer_for(resumed, tmp_path, callback).train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    assert not all(torch.equal(value, weights(fresh())[name]) for name, value in weights(whole).items())
