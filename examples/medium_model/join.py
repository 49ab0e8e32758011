"""Join EfficientNet-Lite0 and SmolLM2-135M-Instruct, and teach the whole to speak about pictures.

    python examples/medium_model/join.py

1. The language model says what it knows: sentences about every name, answers to general prompts and to the knowledge
   questions. The first become lessons, the second are distilled, the third only measured.
2. The tower's features of all drawings, some augmentations each, are computed once.
3. Warm start without the language model: the mean projected patch must retrieve the word embedding of its name.
4. The projector is trained through the frozen language model to answer with names alone.
5. A LoRA on the language model is trained with it, on names and sentences; general prompts without picture hold it to
   what the original language model answers. It is merged into the weights at the end.

The tower is frozen throughout. Steps are counted and seeded. Run again after an interruption, it continues from the
last checkpoint in the work folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from knowledge import KNOWLEDGE
from lessons import LESSONS, general_prompts, is_named, open_row, own_words, own_words_prompts, short_row
from parts import DEFAULT_WORK, build_model
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from tasks import PASSAGE, QUESTIONS
from text_knowledge import KNOWLEDGE_TOKENS, knowledge_right, perplexity
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from space_peft.anchors.encoders import OwnSpaceEncoder
from space_peft.data.questions import Question
from space_peft.demo import UNSEEN_STYLE, load_demo_images
from space_peft.evaluation import collect_versions
from space_peft.evaluation.metrics import normalize_answer
from space_peft.losses import answer_labels, keep_loss
from space_peft.modeling.prompts import (
    answer_columns,
    build_batch,
    conversation,
    encode_conversations,
    generate_answers,
)
from space_peft.modeling.prompts import answer_logits as text_logits
from space_peft.records.io import atomic_path, write_json


sys.path.append(str(Path(__file__).resolve().parents[1] / "demo_model"))
from augment import augment  # noqa: E402


TEMPERATURE = 15.0
NORM_WEIGHT = 0.1
CHECKPOINT = "join.pt"
# How much of the LoRA is merged. All of it names a little more in sentences and knows a little less (README).
MERGED_SHARE = 0.7
PARTS = ("vision_tower", "multi_modal_projector", "language_model")
LORA_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class JoinSettings:
    """Every choice of the joining; see the module's text for the stages.

    Args:
        seed (`int`): Of everything.
        copies (`int`): Augmentations of a drawing.
        amount (`float`): Their strength.
        warm_steps, warm_batch_size, warm_lr: Of the warm start.
        steps (`int`): Steps through the language model, with those of names alone.
        name_steps (`int`): How many of these, the first ones, ask for names alone and leave the language model as it is.
        batch_size (`int`): Pictures a step.
        lr (`float`): Of the projector.
        clean_share (`float`): Share of drawings shown as they are.
        short_share (`float`): Share of the later steps that still ask for names alone.
        lora_rank, lora_lr: Of the LoRA on the language model.
        text_rows (`int`): Distilled answers without picture a step.
        text_weight (`float`): Of their divergence, against the cross-entropy of the answers about pictures.
        save_every (`int`): Steps between checkpoints.
    """

    seed: int = 0
    copies: int = 8
    amount: float = 0.4
    warm_steps: int = 300
    warm_batch_size: int = 128
    warm_lr: float = 2e-3
    steps: int = 350
    name_steps: int = 110
    batch_size: int = 16
    lr: float = 1e-3
    clean_share: float = 0.2
    short_share: float = 0.35
    lora_rank: int = 16
    lora_lr: float = 3e-4
    text_rows: int = 6
    text_weight: float = 20.0
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
    questions: list[Question],
    answers: list[str],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of answers about images whose tower features are known.

    Args:
        model (`LlavaForConditionalGeneration`): The model; its projector and language model are run.
        processor (`LlavaProcessor`): Its processor.
        features (`torch.Tensor`): `(n, tokens, width)`.
        questions (`list[str or Dialogue]`): n questions.
        answers (`list[str]`): n answers.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `(n, t + 1, vocabulary)`, and `(n, t)` with -100 where an answer has ended.
    """
    blank = Image.new("RGB", (processor.patch_size,) * 2)  # the prompt needs a place for an image, not its pixels
    rows = [conversation(question, answer=answer, image=blank) for question, answer in zip(questions, answers)]
    batch = encode_conversations(processor, rows)
    labels = batch["labels"]
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    visual = (batch["input_ids"] == model.config.image_token_id)[..., None]
    projected = model.model.multi_modal_projector(features).to(embeddings.dtype)
    embeddings = embeddings.masked_scatter(visual, projected)
    logits = model(
        inputs_embeds=embeddings, attention_mask=batch["attention_mask"], logits_to_keep=answer_columns(labels)
    ).logits
    return logits.float(), answer_labels(labels)


@dataclass(frozen=True)
class Lessons:
    """What there is to say.

    Args:
        kinds (`dict[str, str]`): Kind of every concept.
        said (`dict[str, dict[str, str]]`): The language model's own words, see `lessons.open_row`.
        general (`list[tuple[str, str]]`): Prompts without picture and the language model's answers.
    """

    kinds: dict[str, str]
    said: dict[str, dict[str, str]]
    general: list[tuple[str, str]]


def ask_language_model(model, processor, names: list[str], path: Path) -> dict[str, list]:
    """The unjoined language model's answers, or those of an earlier run; also its perplexity of the passage.

    Args:
        model (`LlavaForConditionalGeneration`): Its language model is still the published one.
        processor (`LlavaProcessor`): Its processor.
        names (`list[str]`): The concepts.
        path (`Path`): JSON file to read or write.

    Returns:
        `dict[str, list]`: `prompts`, `answers` (own words, then general), `knowledge` (answers), `perplexity`.
    """
    prompts = [*own_words_prompts(names).values(), *general_prompts(names)]
    asked = {"prompts": prompts, "questions": [question for question, _ in KNOWLEDGE]}
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if all(stored[key] == value for key, value in asked.items()):
            return stored
    options = {"batch_size": 128, "desc": "language model"}
    answers = generate_answers(model, processor, prompts, max_new_tokens=28, **options)
    knowledge = generate_answers(model, processor, asked["questions"], max_new_tokens=KNOWLEDGE_TOKENS, **options)
    content = {"answers": answers, "knowledge": knowledge, "perplexity": perplexity(model, processor, PASSAGE)}
    write_json(path, {**asked, **content})
    return {**asked, **content}


def make_lessons(kinds: dict[str, str], prompts: list[str], answers: list[str]) -> Lessons:
    """Sorts the language model's answers: own words about a name, and general ones.

    Args:
        kinds (`dict[str, str]`): Kind of every concept.
        prompts (`list[str]`): As asked by `ask_language_model`.
        answers (`list[str]`): Their answers.
    """
    places = own_words_prompts(sorted(kinds))
    said: dict[str, dict[str, str]] = {}
    for (key, name), answer in zip(places, answers):
        words = own_words(key, name, answer)
        said.setdefault(key, {}).update({} if words is None else {name: words})
    general = [row for row in zip(prompts[len(places) :], answers[len(places) :], strict=True) if row[1]]
    return Lessons(kinds, said, general)


def faster_precision() -> torch.dtype:
    """bfloat16 where this CPU multiplies matrices faster in it than in float32, else float32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(1024, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        times = []
        for _ in range(6):
            started = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
    return min(seconds, key=seconds.get)


def mixed_precision(dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast to bfloat16, or nothing for float32."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def draw_pictures(
    bank: FeatureBank, lessons: Lessons, settings: JoinSettings, step: int
) -> tuple[torch.Tensor, list[Question], list[str]]:
    """The rows of a step, names or one lesson: features of drawings, prompts, and what is to be answered."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    rng = random.Random(f"{settings.seed}, {step}")
    rows = torch.randint(len(bank.concept), (settings.batch_size,), generator=generator)
    views = torch.randint(1, bank.features.shape[1], rows.shape, generator=generator)
    views[torch.rand(rows.shape, generator=generator) < settings.clean_share] = 0
    short = step < settings.name_steps or rng.random() < settings.short_share
    names = [bank.names[i] for i in bank.concept[rows].tolist()]
    if short:
        pairs = [short_row(rng, name) for name in names]
    else:
        lesson = rng.choice(LESSONS)
        pairs = [open_row(rng, lesson, name, lessons.kinds[name], lessons.said) for name in names]
    return bank.features[rows, views].float(), [prompt for prompt, _ in pairs], [answer for _, answer in pairs]


def general_divergence(
    model, adapter: PeftModel, processor, lessons: Lessons, settings: JoinSettings, step: int
) -> torch.Tensor:
    """KL divergence of the taught from the original language model, on its answers to general prompts."""
    rows = random.Random(f"general, {settings.seed}, {step}").sample(lessons.general, settings.text_rows)
    batch = build_batch(processor, [prompt for prompt, _ in rows], answers=[answer for _, answer in rows])
    with torch.no_grad(), adapter.disable_adapter():
        original = text_logits(model, batch)
    return keep_loss(text_logits(model, batch), original, answer_labels(batch["labels"]))


def add_lora(model: LlavaForConditionalGeneration, settings: JoinSettings) -> PeftModel:
    """A LoRA on every linear layer of the language model, which changes nothing yet; the projector stays trainable."""
    torch.manual_seed(settings.seed)
    config = LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules=LORA_LAYERS)
    adapter = get_peft_model(model, config)
    model.model.multi_modal_projector.requires_grad_(True)
    return adapter


def load_checkpoint(path: Path, settings: JoinSettings) -> dict:
    """Reads a checkpoint of `teach`.

    Raises:
        `ValueError`: If it was made with other settings.
    """
    stored = torch.load(path, weights_only=True)
    if stored["settings"] != asdict(settings):
        raise ValueError(
            f"{path} was made with {stored['settings']}, expected {asdict(settings)}: remove it, and the model."
        )
    return stored


def teach(
    model: LlavaForConditionalGeneration,
    adapter: PeftModel,
    processor: LlavaProcessor,
    bank: FeatureBank,
    lessons: Lessons,
    settings: JoinSettings,
    checkpoint: Path,
    *,
    precision: torch.dtype = torch.float32,
    probe=None,
) -> list[dict]:
    """Trains the projector, and the LoRA after the steps of names alone, from the checkpoint if there is one.

    Args:
        model (`LlavaForConditionalGeneration`): With a warm-started projector.
        adapter (`PeftModel`): The same model's LoRA, see `add_lora`.
        processor (`LlavaProcessor`): Its processor.
        bank ([`FeatureBank`]): The pictures.
        lessons ([`Lessons`]): What to say about them.
        settings ([`JoinSettings`]): Steps, sizes, rates.
        checkpoint (`Path`): File to continue from and to write.
        precision (`torch.dtype`, defaults to float32): Of the matrix products.
        probe (callable, *optional*): Called at every fourth checkpoint; the dict it returns is kept in the log.

    Returns:
        `list[dict]`: The log: step, losses, seconds since (re)start, and what the probe returned.

    Raises:
        `ValueError`: If the checkpoint was made with other settings.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    projector = [parameter for name, parameter in trained.items() if "lora_" not in name]
    lora = [parameter for name, parameter in trained.items() if "lora_" in name]
    optimizer = torch.optim.AdamW([{"params": projector}, {"params": lora}], betas=(0.9, 0.98), weight_decay=0.01)
    first, log, started = 0, [], time.perf_counter()
    if checkpoint.exists():
        stored = load_checkpoint(checkpoint, settings)
        for name, parameter in trained.items():
            parameter.data.copy_(stored["trained"][name])
        optimizer.load_state_dict(stored["optimizer"])
        first, log = stored["step"], stored["log"]
    for step in range(first, settings.steps):
        names_only = step < settings.name_steps
        spoken = step - settings.name_steps
        optimizer.param_groups[0]["lr"] = settings.lr * schedule(step, settings.steps)
        optimizer.param_groups[1]["lr"] = (
            0.0 if names_only else settings.lora_lr * schedule(spoken, settings.steps - settings.name_steps)
        )
        optimizer.zero_grad()
        # Without the adapter there is no gradient for it, so that the optimiser leaves it out.
        with adapter.disable_adapter() if names_only else contextlib.nullcontext(), mixed_precision(precision):
            logits, labels = answer_logits(model, processor, *draw_pictures(bank, lessons, settings, step))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
        loss.backward()
        losses = {"answers": loss.item()}
        if not names_only:
            with mixed_precision(precision):
                divergence = general_divergence(model, adapter, processor, lessons, settings, step)
            (settings.text_weight * divergence).backward()
            losses["general"] = divergence.item()
        nn.utils.clip_grad_norm_(projector, 1.0)
        nn.utils.clip_grad_norm_(lora, 1.0)
        optimizer.step()
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            entry = {"step": step + 1, **losses, "seconds": round(time.perf_counter() - started)}
            if probe is not None and (step + 1) % (4 * settings.save_every) == 0:
                entry |= probe()
            print(json.dumps(entry), flush=True)
            log.append(entry)
            state = {"trained": {name: parameter.detach() for name, parameter in trained.items()}, "step": step + 1}
            state |= {"optimizer": optimizer.state_dict(), "settings": asdict(settings), "log": log}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    return log


def measure(
    model, processor, images, *, seed: int, groups=("naming", "naming_held_out", "open", "open_held_out")
) -> tuple[dict[str, dict], list[dict]]:
    """Share of greedy answers that name what is shown, by group of questions and style.

    Args:
        model (`LlavaForConditionalGeneration`): The model.
        processor (`LlavaProcessor`): Its processor.
        images (`datasets.Dataset`): As returned by `load_demo_images`; each is asked one question of every group.
        seed (`int`): Of which question it is.
        groups (`tuple[str, ...]`): Of `QUESTIONS`.

    Returns:
        `tuple[dict[str, dict], list[dict]]`: `named` (name or plural in the answer), `exact` (nothing but the name) and
        `n` by group and style; and all answers.
    """
    rng, answers = random.Random(seed), []
    for group in groups:
        questions = [rng.choice(getattr(QUESTIONS, group)) for _ in range(len(images))]
        tokens = 32 if group.startswith("open") else 10
        said = generate_answers(model, processor, questions, images=images["image"], max_new_tokens=tokens, desc=group)
        for row, question, answer in zip(images.remove_columns("image"), questions, said, strict=True):
            style = "unseen style" if row["style"] == UNSEEN_STYLE else "trained styles"
            hits = {
                "named": is_named(answer, row["name"]),
                "exact": normalize_answer(answer) == normalize_answer(row["name"]),
            }
            record = {"group": f"{group}, {style}", "name": row["name"], "style": row["style"]}
            answers.append({**record, "question": str(question), "answer": answer, **hits})
    scores = {}
    for label in dict.fromkeys(record["group"] for record in answers):
        part = [record for record in answers if record["group"] == label]
        shares = {key: sum(record[key] for record in part) / len(part) for key in ("named", "exact")}
        scores[label] = {**shares, "n": len(part)}
    return scores, answers


def knowledge_kept(before: list[str], after: list[str]) -> tuple[dict[str, float], list[dict]]:
    """What the language model answered right before it was joined, and how much of that it still does.

    Args:
        before (`list[str]`): Answers to `KNOWLEDGE` before.
        after (`list[str]`): Answers after.

    Returns:
        `tuple[dict[str, float], list[dict]]`: Counts and the kept share; and the questions answered right before.
    """
    known = [
        {"question": question, "expected": expected, "before": old, "after": new, "right": right}
        for (question, expected), old, new, was_right, right in zip(
            KNOWLEDGE, before, after, knowledge_right(before), knowledge_right(after), strict=True
        )
        if was_right
    ]
    kept = sum(row["right"] for row in known)
    counts = {"asked": len(KNOWLEDGE), "right_before": len(known), "still_right": kept}
    counts |= {"right_after": sum(knowledge_right(after)), "same_words": sum(r["before"] == r["after"] for r in known)}
    return {**counts, "kept": kept / len(known) if known else None}, known


def build(work: Path, settings: JoinSettings, precision: torch.dtype) -> None:
    """Joins, teaches and writes `work / "model"`."""
    model, processor = build_model(work, settings.seed)
    model.requires_grad_(False)
    images = load_demo_images()
    names = sorted(set(images["name"]))
    said = ask_language_model(model, processor, names, work / "language_model.json")
    lessons = make_lessons(dict(zip(images["name"], images["kind"])), said["prompts"], said["answers"])

    model.set_attn_implementation("eager")  # faster than SDPA's backward pass on CPU
    trained = images.select([i for i, style in enumerate(images["style"]) if style != UNSEEN_STYLE])
    bank = build_bank(
        model, processor, trained, names, copies=settings.copies, amount=settings.amount, seed=settings.seed
    )
    model.model.multi_modal_projector.requires_grad_(True)
    checkpoint = work / CHECKPOINT
    if not checkpoint.exists():
        print(f"warm start: loss {warm_start(model, processor, bank, settings):.3f}")
    adapter = add_lora(model, settings)
    sample = images.shuffle(seed=settings.seed).select(range(min(64, len(images))))

    def probe() -> dict:
        with mixed_precision(precision):
            return measure(model, processor, sample, seed=settings.seed, groups=("naming", "open"))[0]

    teach(model, adapter, processor, bank, lessons, settings, checkpoint, precision=precision, probe=probe)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(MERGED_SHARE)
    model = adapter.merge_and_unload()
    model.set_attn_implementation("sdpa")
    with atomic_path(work / "model") as folder:
        model.bfloat16().save_pretrained(folder)
        processor.save_pretrained(folder)


def report(work: Path, settings: JoinSettings, precision: torch.dtype) -> dict:
    """Measures what was written, after rounding, by generating answers; writes `figures.json` and all answers.

    Answers without a picture are generated in float32, as those of the original language model were.
    """
    folder = work / "model"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    before = json.loads((work / "language_model.json").read_text(encoding="utf-8"))
    asked = {"max_new_tokens": KNOWLEDGE_TOKENS, "batch_size": 128, "desc": "knowledge"}
    after = generate_answers(model, processor, [question for question, _ in KNOWLEDGE], **asked)
    kept, known = knowledge_kept(before["knowledge"], after)
    with mixed_precision(precision):
        accuracy, answers = measure(model, processor, load_demo_images(), seed=settings.seed)
    figures = {
        "settings": asdict(settings),
        "merged_share": MERGED_SHARE,
        "precision": str(precision),
        "threads": torch.get_num_threads(),
        "versions": collect_versions(),
        "parameters": {part: sum(p.numel() for p in getattr(model.model, part).parameters()) for part in PARTS},
        "accuracy": accuracy,
        "knowledge": kept,
        "perplexity": {"before": before["perplexity"], "after": perplexity(model, processor, PASSAGE)},
        "log": load_checkpoint(work / CHECKPOINT, settings)["log"],
    }
    write_json(work / "knowledge.json", known)
    write_json(work / "answers.json", answers)
    write_json(folder / "figures.json", figures)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="work folder")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    settings, precision = JoinSettings(), faster_precision()
    print(f"matrix products in {precision}, {torch.get_num_threads()} threads")
    if not (args.work / "model").is_dir():
        build(args.work, settings, precision)
    figures = report(args.work, settings, precision)
    print(json.dumps({key: figures[key] for key in ("accuracy", "knowledge", "perplexity")}, indent=2))


if __name__ == "__main__":
    main()
