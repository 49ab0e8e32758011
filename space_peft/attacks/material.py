"""What all attacks on one erasure are made with: the same pictures and names."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from ..data.questions import DEFAULT_QUESTIONS, QuestionSet
from ..evaluation.named_images import NamedImages


MOST_CONTROLS = 3
"""Controls that are each taught or asked for."""


@dataclass(frozen=True)
class Material:
    """
    What attacks are made with.

    Args:
        concept (`str`): The erased name.
        images ([`NamedImages`]): Pictures of it, and of other things.
        aliases (`list[str]`, *optional*): Other names of it.
        control_names (`list[str]`, *optional*): Known names of other things; by default those of the pictures.
        questions (`QuestionSet`): What is asked.
        steps (`int`, defaults to 100): Of searches, from each start.
        restarts (`int`, defaults to 4): Starts of the audit from noise.
        relearn_steps (`list[int]`): After how many steps of fine-tuning the model is asked.
        repeats (`int`, defaults to 3): Runs of what has chance in it.
        seed (`int`, defaults to 0): Of all that has chance in it.
        progress (`bool`, defaults to `True`): Show progress bars.
    """

    concept: str
    images: NamedImages
    aliases: tuple[str, ...] = ()
    control_names: tuple[str, ...] = ()
    questions: QuestionSet = DEFAULT_QUESTIONS
    steps: int = 100
    restarts: int = 4
    relearn_steps: tuple[int, ...] = (0, 2, 5, 10, 20)
    repeats: int = 3
    seed: int = 0
    progress: bool = True

    @property
    def target(self) -> list[Image.Image]:
        """Pictures of the concept."""
        return list(self.images.target)

    @property
    def others(self) -> list[Image.Image]:
        """Pictures of other things."""
        return [image for _, image in self.images.others]

    @property
    def controls(self) -> list[str]:
        """Names of other things."""
        return list(self.control_names or self.images.other_names[:MOST_CONTROLS])


@dataclass(frozen=True)
class Needs:
    """
    What an attack cannot do without.

    Args:
        target (`int`, defaults to 1): Pictures of the concept.
        others (`int`, defaults to 0): Pictures of other things.
        things (`int`, defaults to 0): Different other things on pictures.
        controls (`int`, defaults to 0): Names of other things.
        asks (`str`, *optional*): Group of questions that must not be empty.
    """

    target: int = 1
    others: int = 0
    things: int = 0
    controls: int = 0
    asks: str | None = None

    def lacks(self, material: Material) -> str | None:
        """What is missing, in words; `None` if nothing is."""
        counts = {
            "pictures of the concept": (len(material.target), self.target),
            "pictures of other things": (len(material.others), self.others),
            "different things on other pictures": (len(material.images.other_names), self.things),
            "control names": (len(material.controls), self.controls),
        }
        for what, (given, needed) in counts.items():
            if given < needed:
                return f"which needs {what}: {needed} or more, got {given}"
        if self.asks is not None and not getattr(material.questions, self.asks):
            return f"for which there are no questions of the kind `{self.asks}`"
        return None
