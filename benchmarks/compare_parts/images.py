"""Which images a method is given, and which its erasure is measured on."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

from datasets import Dataset
from PIL import Image


# None of them was used to choose a default of the library, or a setting here.
TEST = (
    "owl", "shark", "spider", "cactus", "banana", "carrot", "pizza", "rocket", "castle", "guitar", "hammer",
    "alarm clock", "dolphin", "violin", "bicycle", "crocodile",
)  # fmt: skip
VALIDATION = ("fox", "trumpet", "lemon", "tractor")


@dataclass(frozen=True)
class Data:
    """What one concept and seed are erased and measured with.

    Args:
        concept (`str`): The target.
        given (`list[Image.Image]`): The target's images that methods may be given: every design but one.
        unseen (`list[Image.Image]`): The rest: a design that changes with the seed, and the style the model was never
            trained on.
        probe_images (`datasets.Dataset`): All demo images but those given.
        others (`list[tuple[Image.Image, str]]`): Images of other concepts in no pool and no retained set, with names.
        is_unseen_style, is_sibling (`list[bool]`): For each of `others`.
        absent (`list[str]`): Names of another kind, for questions about what is not in an image and for controls.
    """

    concept: str
    given: list[Image.Image]
    unseen: list[Image.Image]
    probe_images: Dataset
    others: list[tuple[Image.Image, str]]
    is_unseen_style: list[bool]
    is_sibling: list[bool]
    absent: list[str]


@functools.lru_cache(maxsize=1)
def demo_images():
    from space_peft.demo import load_demo_images

    return load_demo_images()


@functools.lru_cache(maxsize=4)
def concept_data(concept: str, seed: int) -> Data:
    """Splits the demo images for a concept; see [`Data`]."""
    from space_peft.demo.data import UNSEEN_STYLE
    from space_peft.demo.probes import demo_split

    images = demo_images()
    kinds = dict(zip(images["name"], images["kind"]))
    _, reserved = demo_split(images, concept)
    target = [row for row in reserved if row["name"] == concept]
    # The two fluent styles draw the same shapes, so they are kept or held out together.
    designs = sorted({row["style"].removesuffix("-flat") for row in target if row["style"] != UNSEEN_STYLE})
    held_out = {UNSEEN_STYLE, designs[seed % len(designs)]}
    unseen = [row["image"] for row in target if row["style"].removesuffix("-flat") in held_out]
    given = [row["image"] for row in target if row["style"].removesuffix("-flat") not in held_out]
    styles = [style.removesuffix("-flat") for style in images["style"]]
    kept = [i for i, name in enumerate(images["name"]) if name != concept or styles[i] in held_out]
    others = [row for row in reserved if row["name"] != concept]
    far = sorted(name for name, kind in kinds.items() if kind != kinds[concept])
    return Data(
        concept=concept,
        given=given,
        unseen=unseen,
        probe_images=images.select(kept),
        others=[(row["image"], row["name"]) for row in others],
        is_unseen_style=[row["style"] == UNSEEN_STYLE for row in others],
        is_sibling=[row["kind"] == kinds[concept] for row in others],
        absent=random.Random(f"{concept} {seed}").sample(far, 6),
    )


@functools.lru_cache(maxsize=1)
def nearest_siblings() -> dict[str, float]:
    """For every concept, the cosine of its mean projected feature with the nearest other concept's of its kind.

    It tells concepts with a close sibling from those without one; all have four to six siblings by name.
    """
    import torch.nn.functional as F

    from space_peft.anchors.encoders import OwnSpaceEncoder
    from space_peft.demo import load_demo_model

    images = demo_images()
    features = OwnSpaceEncoder(*load_demo_model()).embed_images(list(images["image"]))
    names, kinds = images["name"], dict(zip(images["name"], images["kind"]))
    centred = features - features.mean(dim=0)
    means = {
        name: F.normalize(centred[[i for i, other in enumerate(names) if other == name]].mean(dim=0), dim=0)
        for name in kinds
    }
    return {
        name: max(float(means[name] @ means[other]) for other in kinds if other != name and kinds[other] == kinds[name])
        for name in kinds
    }
