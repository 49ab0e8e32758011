"""Contrastive visual forgetting: the concept's images are moved in feature space, the language model stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from space_peft.modeling.features import image_features, tap_image_features
from space_peft.modeling.layers import adapted_layers, deployed_model
from space_peft.modeling.prompts import answer_logits, to_device
from space_peft.modeling.targets import Target, side_of
from space_peft.retained.reading import retained_loader

from .forget_config import ForgetConfig, RetainLoss
from .forget_trainer import ForgetTrainer
from .pairs import forget_loader
from .unlearning_losses import contrastive_loss


@dataclass
class CVFConfig(ForgetConfig):
    r"""
    Configuration of [`CVFTrainer`]: the fields below, and every field of [`ForgetConfig`]. `target` is "vision" and
    `retain_loss` is "none" by default: retained images are held by their features.

    Args:
        temperature (`float`, defaults to 0.1):
            T of the contrastive loss.
        feature_weight (`float`, defaults to 1.0):
            Weight of the squared distance between retained images' features and those of the deployed model (or of the
            `keep_model`), relative to the mean square of those.
    """

    target: Target = field(default="vision", metadata={"help": "Default adapter placement: the vision side."})
    retain_loss: RetainLoss = field(default="none", metadata={"help": "Further loss on retained rows."})
    temperature: float = field(default=0.1, metadata={"help": "Temperature of the contrastive loss, > 0."})
    feature_weight: float = field(default=1.0, metadata={"help": "Weight of the retained images' feature distance."})

    def __post_init__(self):
        super().__post_init__()
        self.check_not_negative("feature_weight")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}.")
        if self.target != "vision":
            raise ValueError(f"`target` must be 'vision': the language model stays frozen; got {self.target!r}.")


class CVFTrainer(ForgetTrainer):
    """
    Contrastive visual forgetting, with a [`SpaceLoraConfig`] in the null space of retained images (NS-CVF, arXiv
    2605.05909). The method is the abstract's; its formulas are ours.

    The features z of the concept's images are pulled to where a reference model puts them, or to the mean of retained
    images' features, and pushed from where the deployed model puts them (InfoNCE); features of retained images stay,
    or, with a `keep_model`, go back to where that one puts them.

    Args:
        args ([`CVFConfig`], *optional*):
            Configuration.
        reference_model ([`~transformers.PreTrainedModel`], *optional*):
            One that does not know the concept, with features of the same length, e.g. the model before it was
            fine-tuned. By default the retained images' mean feature takes its place.
        kwargs:
            See [`ForgetTrainer`].

    Raises:
        ValueError: If a layer of the language model is adapted, or no retained row has an image; see also
            [`ForgetTrainer`].
    """

    _tag_names = ["space-peft", "unlearning", "machine-unlearning", "null-space", "lora"]
    _name = "CVF"
    _paper = {"title": "Null Space Constrained Contrastive Visual Forgetting for MLLM Unlearning", "id": "2605.05909"}
    _config_class = CVFConfig
    # Image features are all that its loss reads, and these are an image's whatever is asked about it.
    _asks_open = False

    @staticmethod
    def _steps_on_retained(args) -> bool:
        return True

    def __init__(self, *args, reference_model=None, **kwargs):
        super().__init__(*args, **kwargs)
        adapted = [name for name in adapted_layers(self.model) if side_of(name) == "language"]
        if adapted:
            raise ValueError(
                f"{len(adapted)} layers of the language model are adapted, the first is {adapted[0]!r}, but it stays "
                "frozen in this method; name layers of the vision tower and the projector in `target_modules`."
            )
        shown = self.retained.has_image()
        # As `retained_loader` gives them.
        self._shown = self.retained.length_order(row for row in self.train_dataset.indices if shown[row])
        if not self._shown:
            raise ValueError("no retained row has an image, so no feature would be held; add rows with images.")
        self._place = {row: index for index, row in enumerate(self._shown)}
        self.reference_model = reference_model
        self._features: dict[str, torch.Tensor] = {}  # of the deployed model, by kind of row: (rows, d)

    def _prepare_run(self, resume_from_checkpoint: str | None) -> None:
        super()._prepare_run(resume_from_checkpoint)
        self._look()  # Where the deployed model puts all images.

    def _look(self) -> None:
        forget = forget_loader(self.processing_class, self.train_dataset.rows, self.args.fit_batch_size)
        retained = retained_loader(self.processing_class, self.retained, self._shown, self.args.fit_batch_size)
        with deployed_model(self.accelerator.unwrap_model(self.model)) as deployed:
            self._features = {"forget": _all_features(deployed, forget)}
            held = deployed if self.keep_model is None else self.accelerator.unwrap_model(self.keep_model)
            self._features["retain"] = _all_features(held, retained)
        if self.reference_model is None:
            self._features["reference"] = self._features["retain"].mean(dim=0)
        else:
            with torch.no_grad():
                self._features["reference"] = _all_features(self.reference_model.eval(), forget)
            if self._features["reference"].shape != self._features["forget"].shape:
                raise ValueError(
                    f"`reference_model` makes features of length {self._features['reference'].shape[1]}; expected "
                    f"{self._features['forget'].shape[1]}, as the model's own."
                )
        self._scale = self._features["retain"].square().mean()

    def _reference(self, rows: Sequence[int]) -> torch.Tensor:
        reference = self._features["reference"]
        return reference if reference.ndim == 1 else reference[list(rows)]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, forget, rows = self.args, inputs["forget"], inputs["forget_rows"]
        unwrapped = self.accelerator.unwrap_model(model)
        # By the whole model's forward pass, also where the features alone count: DDP and FSDP hang on it.
        with tap_image_features(unwrapped) as features:
            logits = answer_logits(model, forget)
        moved = features[0]  # (n, d)
        origin = self._features["forget"][rows].to(moved)
        reference = self._reference(rows).to(moved)
        terms = {"forget": args.forget_weight * contrastive_loss(moved, reference, origin, args.temperature)}
        shown = [self._place[row] for row in inputs["retain_rows"] if row in self._place]
        if args.feature_weight and shown:
            with tap_image_features(unwrapped) as features:
                answer_logits(model, inputs["retain"])
            held = self._features["retain"][shown].to(moved)
            distance = F.mse_loss(features[0][: len(shown)], held) / self._scale.to(moved)
            terms["features"] = args.feature_weight * distance
        if args.retain_loss != "none":
            terms["retain"] = args.retain_weight * self._retain_loss(model, inputs)
        self._record(terms, self._said(logits.detach(), inputs))
        return sum(terms.values())


def _all_features(model, loader: DataLoader) -> torch.Tensor:
    """Features `(rows, d)` of all rows of a loader, in its order, on the CPU."""
    return torch.cat([image_features(model, to_device(batch, model)).cpu() for batch in loader])
