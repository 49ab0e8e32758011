"""Join EfficientNet-Lite0 and SmolLM2-135M-Instruct by training the projector between them; both halves are frozen.

    python examples/medium_model/join.py --work work/medium_model

1. The tower's features of all drawings, a dozen augmentations each, are computed once.
2. Warm start without the language model: the mean projected patch must retrieve the word embedding of its name.
3. The projector is trained through the frozen language model to answer what an image shows.

Steps are counted and seeded. Run again after an interruption, it continues from the last checkpoint in the work folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from parts import build_model
from PIL import Image
from tasks import QUESTIONS
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from space_peft._io import write_json
from space_peft.anchors.encoders import OwnSpaceEncoder
from space_peft.demo import UNSEEN_STYLE, load_demo_images
from space_peft.evaluation import Probe, evaluate_probes
from space_peft.losses import answer_labels
from space_peft.prompts import answer_columns, conversation, encode_conversations


sys.path.append(str(Path(__file__).resolve().parents[1] / "demo_model"))
from augment import augment  # noqa: E402


TEMPERATURE = 15.0
NORM_WEIGHT = 0.1
PARTS = ("vision_tower", "multi_modal_projector", "language_model")


@dataclass(frozen=True)
class JoinSettings:
    """Every choice of the joining; see the module's text for the stages."""

    seed: int = 0
    copies: int = 8
    amount: float = 0.4
    warm_steps: int = 300
    warm_batch_size: int = 128
    warm_lr: float = 2e-3
    steps: int = 220
    batch_size: int = 16
    lr: float = 1e-3
    clean_share: float = 0.2
    save_every: int = 20


@dataclass(frozen=True)
class FeatureBank:
    """Tower features of drawings.

    Args:
        features (`torch.Tensor`): `(n, 1 + copies, tokens, width)` half precision; first the drawing as it is.
        concept (`torch.Tensor`): `(n,)` index into `names`.
        names (`list[str]`): The concepts, in alphabetical order.
    """

    features: torch.Tensor
    concept: torch.Tensor
    names: list[str]


@torch.no_grad()
def build_bank(model, processor, rows, names: list[str], *, copies: int, amount: float, seed: int) -> FeatureBank:
    """Runs the frozen tower over drawings and over `copies` augmentations of each.

    Args:
        model (`LlavaForConditionalGeneration`): Its tower is used.
        processor (`LlavaProcessor`): Prepares the drawings.
        rows (`datasets.Dataset`): Columns `image` and `name`.
        names (`list[str]`): All concepts.
        copies (`int`): Augmentations of a drawing.
        amount (`float`): Their strength.
        seed (`int`): Of the augmentations.
    """
    generator = torch.Generator().manual_seed(seed)
    images = [image.convert("RGB") for image in rows["image"]]
    opaque = [torch.frombuffer(bytearray(image.convert("RGBA").tobytes()), dtype=torch.uint8) for image in images]
    rgba = torch.stack([pixels.view(*image.size[::-1], 4) for pixels, image in zip(opaque, images)]).permute(0, 3, 1, 2)
    side = model.config.vision_config.image_size
    mean, std = (
        torch.tensor(getattr(processor.image_processor, f"image_{key}")).view(3, 1, 1) for key in ("mean", "std")
    )
    views = []
    for copy in tqdm(range(1 + copies), desc="tower features"):
        tokens = []
        for start in range(0, len(images), 64):
            part = slice(start, start + 64)
            if copy == 0:
                pixels = processor.image_processor(images[part], return_tensors="pt")["pixel_values"]
            else:
                pixels = (augment(rgba[part], side, generator, amount=amount, white=1.0) - mean) / std
            tokens.append(model.model.vision_tower(pixels).last_hidden_state.half())
        views.append(torch.cat(tokens))
    position = {name: i for i, name in enumerate(names)}
    return FeatureBank(torch.stack(views, 1), torch.tensor([position[name] for name in rows["name"]]), names)


def schedule(step: int, steps: int) -> float:
    """Linear rise over 5 % of the steps, then half a cosine to zero."""
    progress = (step + 1) / steps
    return progress / 0.05 if progress < 0.05 else 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95))


def warm_start(model, processor, bank: FeatureBank, settings: JoinSettings) -> float:
    """Trains the projector so that a drawing's mean projected patch points where its name's word embedding does.

    Returns:
        `float`: The last loss.
    """
    projector = model.model.multi_modal_projector
    clean = bank.features[:, 0].float().flatten(0, 1)
    mean, std = clean.mean(0), clean.std(0) + 0.05
    with torch.no_grad():
        # The tower's channels differ a hundredfold in scale: start from whitened ones.
        nn.init.normal_(projector.linear_1.weight, std=projector.linear_1.in_features**-0.5)
        projector.linear_1.weight.div_(std)
        projector.linear_1.bias.copy_(-projector.linear_1.weight @ mean)
    names = OwnSpaceEncoder(model, processor).embed_texts(bank.names)  # (concepts, d)
    length = model.get_input_embeddings().weight.norm(dim=1).mean()
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=settings.warm_lr, weight_decay=0.02)
    n, views, tokens = bank.features.shape[:3]
    for step in tqdm(range(settings.warm_steps), desc="warm start", mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = settings.warm_lr * schedule(step, settings.warm_steps)
        rows = torch.randint(n, (settings.warm_batch_size,), generator=generator)
        features = bank.features[rows, torch.randint(views, rows.shape, generator=generator)].float()
        # Half of the patches: what a name needs must not hang on a few of them, and it costs half as much.
        kept = torch.rand(len(rows), tokens, generator=generator).argsort(1)[:, : tokens // 2, None]
        patches = projector(features.gather(1, kept.expand(-1, -1, features.shape[-1])))
        scores = TEMPERATURE * F.normalize(patches.mean(1), dim=-1) @ names.T
        # The language model reads vectors about as long as its word embeddings.
        off = (patches.norm(dim=-1) / length - 1).square().mean()
        loss = F.cross_entropy(scores, bank.concept[rows]) + NORM_WEIGHT * off
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def answer_logits(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    features: torch.Tensor,
    questions: list[str],
    answers: list[str],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of answers about images whose tower features are known.

    Args:
        model (`LlavaForConditionalGeneration`): The model; its projector and language model are run.
        processor (`LlavaProcessor`): Its processor.
        features (`torch.Tensor`): `(n, tokens, width)`.
        questions (`list[str]`): n questions.
        answers (`list[str]`): n answers.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `(n, t + 1, vocabulary)`, and `(n, t)` with -100 where an answer has ended.
    """
    blank = Image.new("RGB", (processor.patch_size,) * 2)  # the prompt needs a place for an image, not its pixels
    rows = [conversation(question, answer=answer, image=blank) for question, answer in zip(questions, answers)]
    batch = encode_conversations(processor, rows)
    labels = batch["labels"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        visual = (batch["input_ids"] == model.config.image_token_id)[..., None]
        projected = model.model.multi_modal_projector(features).to(embeddings.dtype)
        embeddings = embeddings.masked_scatter(visual, projected)
        logits = model(
            inputs_embeds=embeddings,
            attention_mask=batch["attention_mask"],
            logits_to_keep=answer_columns(labels),
        ).logits
    return logits.float(), answer_labels(labels)


def draw_batch(
    bank: FeatureBank, settings: JoinSettings, generator: torch.Generator
) -> tuple[torch.Tensor, list[str], list[str]]:
    """Draws the rows of a step: features of drawings, one question to all of them, and their names."""
    rows = torch.randint(len(bank.concept), (settings.batch_size,), generator=generator)
    views = torch.randint(1, bank.features.shape[1], rows.shape, generator=generator)
    views[torch.rand(rows.shape, generator=generator) < settings.clean_share] = 0
    question = QUESTIONS.naming[int(torch.randint(len(QUESTIONS.naming), (), generator=generator))]
    names = [bank.names[i] for i in bank.concept[rows].tolist()]
    return bank.features[rows, views].float(), [question] * len(names), names


@torch.no_grad()
def naming_accuracy(model, processor, bank: FeatureBank, rows: torch.Tensor, batch_size: int = 32) -> float:
    """Share of drawings, as they are, whose name is the greedy answer to the first naming question."""
    hits = 0
    for part in rows.split(batch_size):
        names = [bank.names[i] for i in bank.concept[part].tolist()]
        questions = [QUESTIONS.naming[0]] * len(names)
        logits, labels = answer_logits(model, processor, bank.features[part, 0].float(), questions, names)
        hits += ((logits[:, :-1].argmax(-1) == labels) | (labels == -100)).all(1).sum().item()
    return hits / len(rows)


def measure(model, processor, images) -> dict[str, dict]:
    """Share of greedy answers that are exactly right, by question and style.

    Args:
        model (`LlavaForConditionalGeneration`): The joined model.
        processor (`LlavaProcessor`): Its processor.
        images (`datasets.Dataset`): As returned by `load_demo_images`.
    """
    groups: dict[str, list[dict]] = {}
    for i, row in enumerate(images):
        style = "unseen_style" if row["style"] == UNSEEN_STYLE else "trained_styles"
        asks = {"naming": (QUESTIONS.naming[0], row["name"])}
        if i % 4 == 0:  # on a part: a generated answer takes its time
            asks["naming_held_out"] = (QUESTIONS.naming_held_out[i % len(QUESTIONS.naming_held_out)], row["name"])
        for kind, (question, answer) in asks.items():
            rows = groups.setdefault(f"{kind}, {style}", [])
            rows.append({"question": question, "answer": answer, "image": row["image"]})
    probes = [Probe(name, rows, mode="equals") for name, rows in groups.items()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = evaluate_probes(model, processor, probes, max_new_tokens=8).scores
    return {name: {"value": scores[name]["accuracy"]["value"], "n": scores[name]["accuracy"]["n"]} for name in groups}


def join(model, processor, bank: FeatureBank, settings: JoinSettings, checkpoint: Path, *, probe=None) -> list[dict]:
    """Trains the projector through the frozen language model, from the checkpoint if there is one.

    Args:
        model (`LlavaForConditionalGeneration`): With a warm-started projector.
        processor (`LlavaProcessor`): Its processor.
        bank ([`FeatureBank`]): What to train on.
        settings ([`JoinSettings`]): Steps, sizes, rates.
        checkpoint (`Path`): File to continue from and to write.
        probe (callable, *optional*): Called at every fourth checkpoint; the dict it returns is kept in the log.

    Returns:
        `list[dict]`: The log: step, loss, seconds since (re)start, and what the probe returned.

    Raises:
        `ValueError`: If the checkpoint was made with other settings.
    """
    projector = model.model.multi_modal_projector
    parameters = list(projector.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    first, log, started = 0, [], time.perf_counter()
    if checkpoint.exists():
        stored = torch.load(checkpoint, weights_only=True)
        if stored["settings"] != asdict(settings):
            raise ValueError(
                f"{checkpoint} was made with {stored['settings']}, expected {asdict(settings)}: remove it."
            )
        projector.load_state_dict(stored["projector"])
        optimizer.load_state_dict(stored["optimizer"])
        generator.set_state(stored["generator"])
        first, log = stored["step"], stored["log"]
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * schedule(step, settings.steps)
        logits, labels = answer_logits(model, processor, *draw_batch(bank, settings, generator))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            entry = {"step": step + 1, "loss": loss.item(), "seconds": round(time.perf_counter() - started)}
            if probe is not None and (step + 1) % (4 * settings.save_every) == 0:
                entry |= probe()
            print(json.dumps(entry), flush=True)
            log.append(entry)
            state = {"projector": projector.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            state |= {"generator": generator.get_state(), "settings": asdict(settings), "log": log}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("work/medium_model"), help="work folder")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    settings = JoinSettings()

    model, processor = build_model(args.work, settings.seed)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.set_attn_implementation("eager")  # faster than SDPA's backward pass on CPU
    images = load_demo_images()
    names = sorted(set(images["name"]))
    unseen = [style == UNSEEN_STYLE for style in images["style"]]
    options = {"amount": settings.amount, "seed": settings.seed}
    trained_rows = images.select([i for i, held in enumerate(unseen) if not held])
    unseen_rows = images.select([i for i, held in enumerate(unseen) if held])
    bank = build_bank(model, processor, trained_rows, names, copies=settings.copies, **options)
    unseen_bank = build_bank(model, processor, unseen_rows, names, copies=0, **options)
    checkpoint = args.work / "join.pt"
    if not checkpoint.exists():
        print(f"warm start: loss {warm_start(model, processor, bank, settings):.3f}")

    sample = torch.randperm(len(bank.concept), generator=torch.Generator().manual_seed(settings.seed))[:96]
    everything = torch.arange(len(unseen_bank.concept))

    def probe() -> dict[str, float]:
        return {
            "trained_styles": naming_accuracy(model, processor, bank, sample),
            "unseen_style": naming_accuracy(model, processor, unseen_bank, everything[:96]),
        }

    log = join(model, processor, bank, settings, checkpoint, probe=probe)
    folder = args.work / "model"
    model.set_attn_implementation("sdpa")
    model.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
    # What is reported is measured on what was written, after rounding, by generating answers.
    saved = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    figures = {
        "settings": asdict(settings),
        "log": log,
        "parameters": {part: sum(p.numel() for p in getattr(saved.model, part).parameters()) for part in PARTS},
        "accuracy": measure(saved, AutoProcessor.from_pretrained(folder), images),
    }
    write_json(folder / "figures.json", figures)
    print(json.dumps(figures["accuracy"], indent=2))


if __name__ == "__main__":
    main()
