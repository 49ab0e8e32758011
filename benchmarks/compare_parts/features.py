"""How evenly image features spread over directions, before and after an erasure that moves them."""

from __future__ import annotations

import torch

from space_peft.anchors.encoders import OwnSpaceEncoder
from space_peft.demo import load_demo_model
from space_peft.losses import spectral_entropy


OTHERS = 64


def feature_entropy(model, data, anchors) -> dict[str, list[float]]:
    """Spectral entropy of the same images' projected features (rows of length 1) in the deployed and the erased model.

    Args:
        model (`PreTrainedModel`): The erased one, merged.
        data ([`Data`](images.py)): Of the concept.
        anchors (`datasets.Dataset`): What was trained on.

    Returns:
        `dict[str, list[float]]`: `anchors`, `target` (all its images) and `others` (images of other concepts): entropy in
        nats before and after. The singular values of n rows have at most log n.
    """
    deployed, processor = load_demo_model()
    others = [image for image, _ in data.others]
    sets = {
        "anchors": list(anchors["image"]),
        "target": [*data.given, *data.unseen],
        "others": others[:: -(-len(others) // OTHERS)],
    }

    def entropy(asked, images) -> float:
        with torch.no_grad():
            return round(spectral_entropy(OwnSpaceEncoder(asked, processor).embed_images(images)).item(), 4)

    return {key: [entropy(deployed, images), entropy(model, images)] for key, images in sets.items()}
