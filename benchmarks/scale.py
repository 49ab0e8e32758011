"""What an erasure takes, on paper: floating-point operations and bytes of every stage, from the shape of a model alone.

    python benchmarks/scale.py            # the tables of docs/scale.md, written into it
    python benchmarks/scale.py --print    # printed instead

`costs` is the model; tests compare it with what PyTorch counts on three small models (tests/test_scale.py). Products with
weights, second moments, decomposition and memory are the library's own plan (`space-peft plan`); added here are attention,
the output layer, refinement, asking, the pool, evaluation, and what a card and several cards make of it.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parent))

from gpu_parts.shapes import SHAPES, Setting, plan_of  # noqa: E402

from space_peft.null_space.planning import ErasurePlan  # noqa: E402


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- made by benchmarks/scale.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Model:
    """
    The lengths that a cost depends on.

    Args:
        tower, projector, language (`float`): Weights of these parts that every token is multiplied with.
        tower_attention, attention (`int`): Sum over the layers of the width of their attention, of tower and language model.
        head (`int`): Weights of the output layer.
        patch_weights (`int`): Weights of the convolution that makes a picture's patches.
        bytes (`float`): Of all weights.
    """

    tower: float
    projector: float
    language: float
    tower_attention: int
    attention: int
    head: int
    patch_weights: int
    bytes: float

    @classmethod
    def of(cls, model) -> Model:
        """Of a LLaVA, which may be on the meta device; adapters do not count."""
        from space_peft.modeling.layers import base_model
        from space_peft.null_space.planning import linear_by_part

        inner = base_model(model)
        weights = linear_by_part(inner, lambda module: module.weight.numel())
        vision, text = inner.config.vision_config, inner.config.text_config
        # Features are those of the last layer but one, and the others are computed all the same.
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        frozen = [p for name, p in inner.named_parameters() if "lora_" not in name]
        return cls(
            tower=weights["tower"],
            projector=weights["projector"],
            language=weights["language"],
            tower_attention=vision.num_hidden_layers * vision.hidden_size,
            attention=text.num_hidden_layers * text.num_attention_heads * width,
            head=inner.get_output_embeddings().weight.numel(),
            patch_weights=3 * vision.patch_size**2 * vision.hidden_size,
            bytes=float(sum(p.numel() * p.element_size() for p in frozen)),
        )


@dataclass(frozen=True)
class Job:
    """
    What is run.

    Args:
        anchors (`int`): K.
        refine_steps (`int`): Steps of Adam on their pixels.
        prompts (`int`): Naming and open questions that each anchor is asked, before training and each time again.
        asked_again (`int`): How often while training.
        answer (`int`): Tokens of such an answer.
        columns (`int`): Places of a row whose logits are made.
        probes (`int`): Questions of an evaluation, before and after.
        pool (`int`): Images that anchors are chosen from.
        embedding (`int`): Length of their embeddings.
    """

    anchors: int = 64
    refine_steps: int = 60
    prompts: int = 6
    asked_again: int = 2
    answer: int = 24
    columns: int = 8
    probes: int = 500
    pool: int = 1_000_000
    embedding: int = 512


@dataclass(frozen=True)
class Stage:
    """
    The cost of one stage.

    Args:
        flops (`float`): Floating-point operations; a product and a sum are two.
        bytes (`float`): What is read from and written to the device's memory at least.
        precision (`str`): "half" (the model's), "tf32" (float32 sums of the model's numbers), or "single".
        shared (`int`, *optional*): Over how many cards it can be divided; `None` for any number.
    """

    flops: float
    bytes: float
    precision: str = "half"
    shared: int | None = None


def forward(m: Model, patches: int, image_tokens: int, tokens: int, *, columns: int = 0) -> float:
    """A row through the whole model, logits of `columns` places."""
    return picture(m, patches, image_tokens) + 2 * m.language * tokens + attention(m, tokens) + 2 * m.head * columns


def picture(m: Model, patches: int, image_tokens: int) -> float:
    """A picture through tower and projector. The tower has one token more than patches."""
    seen = patches + 1
    linear = 2 * m.tower * seen + 2 * m.projector * image_tokens + 2 * m.patch_weights * patches
    return linear + 4 * m.tower_attention * seen**2


def attention(m: Model, tokens: int) -> float:
    """Scores and sums of one row in the language model; kernels that skip what lies ahead take half of it."""
    return 4 * m.attention * tokens**2


def generation(m: Model, patches: int, image_tokens: int, tokens: int, new: int) -> float:
    """An answer of `new` tokens to a row, keys and values kept."""
    later = sum(2 * m.language + 4 * m.attention * (tokens + i) + 2 * m.head for i in range(1, new))
    return forward(m, patches, image_tokens, tokens, columns=1) + later


def step_row(m: Model, plan: ErasurePlan, columns: int) -> float:
    """A row to forget in a training step: an adapter on the language side, the deployed answer kept from before."""
    work = plan.workload
    linear = plan.flops["step"] / work.batch_size  # Of the plan, whose tower has no class token.
    extra = picture(m, work.patches, work.image_tokens) - 2 * (m.tower * work.patches + m.projector * work.image_tokens)
    # Backward makes two products of each of attention's; the output layer: forward and back, and the deployed logits.
    return linear + extra + 3 * attention(m, work.row_tokens) + 3 * 2 * m.head * columns


def projection(plan: ErasurePlan) -> float:
    """A step's projections: the gradient and the update of every `A` `(r, d)`, each a product with `U` and one with `U^T`."""
    return sum(8.0 * layer.rank * layer.inputs * layer.columns for layer in plan.layers)


def refinement_row(m: Model, work, columns: int) -> float:
    """A step of refinement on one anchor: forward, and back to its pixels through frozen weights."""
    linear = 2 * m.tower * (work.patches + 1) + 2 * m.projector * work.image_tokens + 2 * m.language * work.row_tokens
    attend = 4 * m.tower_attention * (work.patches + 1) ** 2 + attention(m, work.row_tokens)
    return 2 * linear + 3 * attend + 2 * 2 * m.patch_weights * work.patches + 2 * 2 * m.head * columns


def costs(m: Model, plan: ErasurePlan, job: Job = Job()) -> dict[str, Stage]:
    """Every stage of an erasure.

    Args:
        m ([`Model`]): The lengths of the model.
        plan ([`ErasurePlan`]): The library's plan for it.
        job ([`Job`]): Anchors, questions, pool.
    """
    work = plan.workload
    sizes = work.patches, work.image_tokens, work.row_tokens
    answers = job.anchors * job.prompts * (1 + job.asked_again)
    batches = math.ceil(answers / 64)
    fit_batches = math.ceil(work.rows / 32)
    evaluated = 2 * job.probes
    return {
        "pool: embedding": Stage(job.pool * picture(m, *sizes[:2]), job.pool * 4.0 * job.embedding + m.bytes),
        "pool: best scores": Stage(2.0 * job.pool * job.embedding, 4.0 * job.pool * job.embedding, "single"),
        "refinement": Stage(
            job.anchors * job.refine_steps * refinement_row(m, work, job.columns),
            2.0 * m.bytes * job.refine_steps * math.ceil(job.anchors / 32),
            shared=1,
        ),
        # Every token of an answer reads all weights, once for a batch of 64.
        "asking": Stage(answers * generation(m, *sizes, job.answer), batches * job.answer * m.bytes, shared=1),
        "statistics: passes": Stage(work.rows * forward(m, *sizes, columns=1), fit_batches * m.bytes),
        "statistics: second moments": Stage(plan.flops["sums"], 2.0 * fit_batches * plan.sums, "tf32"),
        "decomposition": Stage(plan.flops["decomposition"], 12.0 * plan.sums, "single", shared=len(plan.unique)),
        "steps": Stage(
            work.steps * work.batch_size * step_row(m, plan, job.columns),
            2.0 * work.steps * m.bytes,
            shared=work.batch_size,
        ),
        "projections": Stage(work.steps * projection(plan), 4.0 * work.steps * plan.null_spaces, "single", shared=1),
        "evaluation": Stage(evaluated * generation(m, *sizes, 12), math.ceil(evaluated / 64) * 12 * m.bytes),
    }


@dataclass(frozen=True)
class Card:
    """
    A card, and what of its peak rates is reached.

    Args:
        name (`str`): What it is called.
        half, tf32, single (`float`): FLOP/s of its peak, dense, in bfloat16, in TF32 and in float32.
        bandwidth (`float`): Bytes/s of its memory.
        memory (`float`): Bytes.
        reached (`float`): Share of the peak FLOP/s.
        read (`float`): Share of the bandwidth.
    """

    name: str
    half: float
    tf32: float
    single: float
    bandwidth: float
    memory: float
    reached: float = 0.4
    read: float = 0.6


H100 = Card("H100 SXM", 989e12, 494e12, 67e12, 3.35e12, 80e9)


def seconds(stage: Stage, card: Card, cards: int = 1) -> float:
    """The longer of computing and reading; several cards divide it as far as it can be divided."""
    rate = card.reached * getattr(card, stage.precision)
    alone = max(stage.flops / rate, stage.bytes / (card.read * card.bandwidth))
    return alone / min(cards, stage.shared or cards)


def planned(name: str, modules: tuple[str, ...] = ALL) -> tuple[Model, ErasurePlan]:
    """The lengths and the library's plan of one of the shapes of `benchmarks/gpu.py`, in bfloat16, for 1,000 rows."""
    from space_peft.cli.plan import empty_model

    shape = SHAPES[name]
    model = Model.of(empty_model(shape.config(shape.processor()), torch.bfloat16))
    return model, plan_of(Setting(name, 16, modules, 16, name), rows=1000)


def stage_table(shapes: dict[str, dict[str, Stage]], card: Card) -> list[str]:
    names = list(shapes)
    lines = ["| | " + " | ".join(f"{name}: PFLOP, TB, time" for name in names) + " |", "|---|" + "---|" * len(names)]
    for stage in next(iter(shapes.values())):
        cells = []
        for name in names:
            one = shapes[name][stage]
            cells.append(f"{one.flops / 1e15:.3g}, {one.bytes / 1e12:.3g}, {_time(seconds(one, card))}")
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return lines


def cards_table(
    shapes: dict[str, dict[str, Stage]], memory: dict[str, tuple[float, float, float]], card: Card
) -> list[str]:
    """Time of an erasure (without the pool's embedding) on several cards, and what each of them must hold."""
    lines = [
        "| | one card | 8 cards | 64 cards | weights | second moments of the language side | without down_proj |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, stages in shapes.items():
        own = [stage for key, stage in stages.items() if not key.startswith("pool")]
        times = [_time(sum(seconds(stage, card, cards) for stage in own)) for cards in (1, 8, 64)]
        sizes = [f"{value / 1e9:,.0f} GB" for value in memory[name]]
        lines.append(f"| {name} | " + " | ".join([*times, *sizes]) + " |")
    return lines


def pool_table(m: Model, card: Card, work, sizes=(10**6, 10**7, 10**8)) -> list[str]:
    lines = [
        "| images | embedding, one card | 64 cards | files, length 512 | length 3584 | one scan, 3 GB/s |",
        "|---|---|---|---|---|---|",
    ]
    for images in sizes:
        stage = Stage(images * picture(m, work.patches, work.image_tokens), 0.0)
        files = 4.0 * images * 512
        cells = [_time(seconds(stage, card)), _time(seconds(stage, card, 64)), f"{files / 1e9:,.0f} GB",
                 f"{files / 1e9 * 7:,.0f} GB", _time(files / 3e9)]  # fmt: skip
        lines.append(f"| {images:,} | " + " | ".join(cells) + " |")
    return lines


def _time(value: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if value >= (1 if unit == "s" else 2) * size:
            return f"{value / size:.3g} {unit}"
    return f"{1000 * value:.3g} ms"


def tables() -> str:
    shapes, memory = {}, {}
    for name in ("7B", "32B", "72B"):
        model, plan = planned(name)
        narrow = sum(4 * layer.inputs**2 * len(layer.kinds) for layer in plan.unique if "down_proj" not in layer.name)
        shapes[name] = costs(model, plan)
        memory[name] = model.bytes, plan.sums, narrow
        if name == "7B":
            pool = pool_table(model, H100, plan.workload)
    return "\n".join([
        *stage_table(shapes, H100), "", *cards_table(shapes, memory, H100), "", *pool,
    ])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the tables, and leave docs/scale.md alone")
    args = parser.parse_args()
    made = tables()
    print(made)
    if not args.print:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
