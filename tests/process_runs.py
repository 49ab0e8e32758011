"""What the tests of several processes run in each of them: `accelerate launch ... process_runs.py FOLDER RUNS`.

RUNS is JSON: `[[folder of the run, function of this module, its options], ...]`. Each process saves what the function
returned, or the exception it raised, as `FOLDER/folder of the run/result-RANK.pt`.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader


def erase(folder, peft=None, retain=48, resume=None, **arguments):
    """`SpaceTrainer` on the embedded model, for a few steps."""
    from space_peft import SpaceConfig, SpaceLoraConfig, SpaceTrainer
    from space_peft.anchors import set_anchor_info
    from space_peft.demo import DEMO_QUESTIONS, load_demo_images, load_demo_model
    from space_peft.demo.probes import demo_retain_rows, demo_split

    images = load_demo_images()
    # The concept's own images: the model names them, which anchors reach only by refinement.
    anchors = images.select([row for row, name in enumerate(images["name"]) if name == "fox"])
    anchors = set_anchor_info(anchors.add_column("score", [1.0] * len(anchors)), {"concept": "fox"})
    rows = demo_retain_rows("fox", demo_split(images, "fox")[0], seed=0)[:retain]
    for row in rows[::3]:  # answers of different lengths, so that shares are of different weight in L_keep
        row["completion"][0]["content"][0]["text"] += " no" * 6
    defaults = {
        "max_steps": 3, "stop_threshold": None, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "canary_items": 0, "fit_batch_size": 7, "keep_weight": 60.0, "learning_rate": 2e-3,
        # An update is g / (|g| + eps): where g is nothing but rounding, a small eps makes it a whole step.
        "adam_epsilon": 1e-3,
    }  # fmt: skip
    args = SpaceConfig(str(folder), **{**defaults, **arguments})
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        pretend_accelerator()
    model, processor = load_demo_model()
    trainer = SpaceTrainer(
        model,
        args,
        anchors=anchors,
        retain_dataset=rows,
        processing_class=processor,
        questions=DEMO_QUESTIONS,
        peft_config=SpaceLoraConfig(**{"r": 4, "lora_alpha": 8, "strength": 1.0, **(peft or {})}),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return {
        "steps": trainer.state.global_step,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "certificate": None if trainer.certificate is None else trainer.certificate.to_dict(),
        "distributed": trainer.accelerator.distributed_type.value,
        "fsdp2": trainer.accelerator.is_fsdp2,
        "local_rows": sorted(_local_rows(trainer)),
        "cut_rows": _cut_rows(trainer),
    }


def pretend_accelerator():
    """Lets accelerate shard on CPUs: it reads its FSDP settings on machines with an accelerator only."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def _adapter(trainer):
    return [weight for name, weight in trainer.model.named_parameters() if "lora_A" in name]


def _local_rows(trainer):
    return {len(a.to_local() if hasattr(a, "to_local") else a) for a in _adapter(trainer)}


def _cut_rows(trainer):
    parts = [(getattr(a, "_hp_mapping", None), a.shape[1]) for a in _adapter(trainer)]
    return sum(part.lp_fragment_address.start % dim > 0 for part, dim in parts if part is not None)


def fit(folder, batches, shuffle=False, loader=False, **settings):
    """Null spaces of a tiny Llava, from a list of batches or from a dataloader of rows."""
    from peft import get_peft_model
    from tiny_models import image_batch, text_batch, tiny_llava

    from space_peft.config import SpaceLoraConfig
    from space_peft.null_space.fitting import fit_null_space

    targets = ["q_proj", "k_proj", "down_proj", "fc1", "linear_2"]
    model = get_peft_model(
        tiny_llava(), SpaceLoraConfig(**{"r": 4, "target_modules": targets, "strength": 1.0, **settings})
    )
    if loader:
        rows = [{key: value[0] for key, value in image_batch(rows=1, seed=seed).items()} for seed in range(batches)]
        data = DataLoader(rows, batch_size=2, shuffle=shuffle)
        torch.manual_seed(int(os.environ.get("RANK", 0)))  # processes that shuffle by themselves do so differently
    else:
        makers = {"image": image_batch, "text": text_batch}
        data = [makers[kind](seed=seed) for seed, kind in enumerate(batches)]
    spaces = fit_null_space(model, data, progress=False)
    return {
        name: {"P": space.project(torch.eye(space.dim, dtype=torch.float64)), "counts": space.counts,
               "shares": [other for other in spaces if spaces[other] is space]}
        for name, space in spaces.items()
    }  # fmt: skip


def fsdp1(folder):
    """Fits a model that FSDP 1 wraps."""
    from peft import get_peft_model
    from tiny_models import text_batch, tiny_llama
    from torch.distributed.fsdp import FullyShardedDataParallel

    from space_peft.config import SpaceLoraConfig
    from space_peft.null_space.fitting import fit_null_space

    model = get_peft_model(tiny_llama(), SpaceLoraConfig(r=4, target_modules=["q_proj"]))
    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    return fit_null_space(model, [text_batch()], progress=False)


def loss_terms(folder, sizes, counts):
    """Gradients, averaged over processes, of a mean over unequal shares and of a loss over all pairs of rows."""
    import torch.distributed as dist

    from space_peft.distributed.processes import gather_rows, mean_weight, rank_and_size
    from space_peft.losses import isotropy_loss

    rank, size = rank_and_size()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=generator)
    features = torch.randn(8, 5, dtype=torch.float64, generator=generator)
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    v = torch.ones(5, dtype=torch.float64, requires_grad=True)
    bounds = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    own = slice(bounds[rank], bounds[rank + 1]) if size > 1 else slice(None)
    mean = (x[own] @ w).tanh().mean()
    pairs = isotropy_loss(gather_rows(features.view(size, -1, 5)[rank] * v))
    (mean_weight(torch.tensor(len(x[own]))) * mean + pairs).backward()
    for gradient in (w.grad, v.grad):
        if size > 1:
            dist.all_reduce(gradient)
            gradient /= size
    return {"w": w.grad, "v": v.grad, "pairs": pairs.detach()}


def main():
    torch.set_num_threads(1)
    root, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank = int(os.environ.get("RANK", 0))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group("gloo")
    for name, function, options in runs:
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            result = globals()[function](folder, **options)
        except (ValueError, RuntimeError) as error:
            result = f"{type(error).__name__}: {error}"
        torch.save(result, folder / f"result-{rank}.pt")
    if torch.distributed.is_initialized():
        # A process that ends with gloo's threads running is now and then aborted (pytorch/pytorch#190489).
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
