"""The methods compared, and the settings that the search may choose from: two values each of three knobs, for all."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field


MAX_STEPS = 60
BATCH_SIZE = 16
RANK = 8


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Args:
        name (`str`): What tables call it.
        trainer (`str`, *optional*): Name of its trainer in `space_peft.trainers`; None for the closed form.
        sees_images (`bool`): Whether it is given images of the target.
        constrained (`bool`): Whether its adapter is a `SpaceLoraConfig`.
        fixed (`dict`): Fields of its configuration that make it this method.
        knobs (`dict[str, tuple]`): Field of its configuration -> values the search may choose from.
        adapter (`dict`): Fields of its adapter's configuration beside the rank.
    """

    name: str
    trainer: str | None
    sees_images: bool
    constrained: bool
    fixed: dict
    knobs: dict
    adapter: dict = field(default_factory=dict)

    def settings(self) -> list[dict]:
        """Every combination of the knobs' values."""
        return [dict(zip(self.knobs, values)) for values in itertools.product(*self.knobs.values())]


# A null space and a mask shorten every update; without them the larger rate breaks the model within a few steps.
CONFINED_RATES, FREE_RATES, STOPS = (1e-3, 5e-3), (2e-4, 1e-3), (None, 0.02)
# Found by hand on fox and trumpet, two of the validation concepts (docs/decisions.md, "Less damage for the same erasure").
SPACE_FIXED, NULL_SPACE = {"suppression_margin": 6.0}, {"strength": 1.0}
# The default when the stored runs were made; of another one they would all have to be made again.
THEN = {"strength": 0.005}

METHODS = {
    method.name: method
    for method in (
        Method("SPACE", "SpaceTrainer", False, True, SPACE_FIXED,
               {"learning_rate": (4e-3, 8e-3), "stop_threshold": STOPS, "keep_weight": (0.0, 60.0)}, THEN),
        Method("closed form", None, False, False, {}, {"amount": (0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0, 4.0)}),
        Method("GA", "GradDiffTrainer", True, False, {"retain_loss": "none"},
               {"learning_rate": FREE_RATES, "stop_threshold": STOPS, "per_device_train_batch_size": (4, BATCH_SIZE)}),
        Method("GradDiff", "GradDiffTrainer", True, False, {"retain_loss": "nll"},
               {"learning_rate": FREE_RATES, "stop_threshold": STOPS, "retain_weight": (1.0, 20.0)}),
        Method("KL", "GradDiffTrainer", True, False, {"retain_loss": "kl"},
               {"learning_rate": FREE_RATES, "stop_threshold": STOPS, "retain_weight": (1.0, 20.0)}),
        Method("NPO", "NPOTrainer", True, False, {"retain_loss": "kl"},
               {"learning_rate": FREE_RATES, "stop_threshold": STOPS, "retain_weight": (1.0, 20.0)}),
        Method("MMUnlearner", "MMUnlearnerTrainer", True, False, {"forget_every": 1},
               {"learning_rate": CONFINED_RATES, "stop_threshold": STOPS, "retain_weight": (1.0, 20.0)}),
        Method("NS-CVF", "CVFTrainer", True, True, {},
               {"learning_rate": CONFINED_RATES, "stop_threshold": STOPS, "feature_weight": (1.0, 20.0)}, NULL_SPACE),
    )
}  # fmt: skip

SPACE_ALL = {**SPACE_FIXED, "target": "all"}
TWICE = {"max_steps": 2 * MAX_STEPS}
NO_MASK = {"forget_every": 1, "saliency_threshold": 1e-12}
VARIANTS = {
    variant.name: variant
    for variant in (
        Method("SPACE, real images for anchors", "SpaceTrainer", True, True, SPACE_FIXED, {}, THEN),
        Method("SPACE, no constraint", "SpaceTrainer", False, False, SPACE_FIXED, {}),
        Method("SPACE, all layers", "SpaceTrainer", False, True, SPACE_ALL, {}, THEN),
        Method("SPACE, all layers, no repulsion", "SpaceTrainer", False, True, {**SPACE_ALL, "repulsion_weight": 0.0}, {}, THEN),
        Method("SPACE, all layers, no isotropy", "SpaceTrainer", False, True, {**SPACE_ALL, "isotropy_weight": 0.0}, {}, THEN),
        Method("SPACE, twice the steps", "SpaceTrainer", False, True, {**SPACE_FIXED, **TWICE}, {}, THEN),
        Method("NPO, twice the steps", "NPOTrainer", True, False, {"retain_loss": "kl", **TWICE}, {}),
        Method("MMUnlearner, no mask", "MMUnlearnerTrainer", True, False, NO_MASK, {}),
        Method("NS-CVF, no null space", "CVFTrainer", True, False, {}, {}),
        Method("NS-CVF, projector alone", "CVFTrainer", True, True, {}, {},
               {**NULL_SPACE, "target_modules": r".*multi_modal_projector\.linear_[12]"}),
    )
}  # fmt: skip
"""Methods with one part changed, mostly without one that the papers say matters; with the settings chosen for the whole."""
LONGER = tuple(name for name in VARIANTS if name.endswith("twice the steps"))
"""Those with a larger budget: NPO's takes the time that SPACE takes, anchors included. They are run on all concepts."""
PARTS = tuple(name for name in VARIANTS if name not in LONGER)
MOVES_FEATURES = tuple(name for name in VARIANTS if name.startswith("SPACE, all layers"))
"""Those whose representation losses are said to keep image features spread out: their entropy is measured."""
ATTACKED = ("SPACE, all layers",)
"""Variants that are said to erase deeper than the whole: they are attacked as it is."""


def whole_of(variant: str) -> str:
    """The method that a variant leaves a part out of: its name is what stands before the comma."""
    return variant.split(",")[0]


def method_of(name: str) -> Method:
    return METHODS[name] if name in METHODS else VARIANTS[name]
