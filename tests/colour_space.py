"""A shared space that can be computed by hand, and small pools for it."""

import numpy as np
import torch
from datasets import (
    Dataset,
    Features,
    Value,
)
from datasets import Image as ImageFeature
from PIL import Image

from space_peft.anchors import (
    select_anchors,
)


COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "pinkish": (1, 0.4, 0.4), "grey": (1, 1, 1)}


class ColourEncoder:
    """A complete shared space in three dimensions: an image is its mean colour, a text the colours it names."""

    name = "mean colour"
    templates = ("{}",)

    def __init__(self, reads="image", fingerprint="colour-1"):
        self.reads, self.fingerprint, self.images, self.texts = reads, fingerprint, 0, 0

    def embed_images(self, images):
        assert all(image.mode == "RGB" for image in images)
        self.images += len(images)
        means = torch.tensor(np.stack([np.asarray(image).reshape(-1, 3).mean(axis=0) for image in images]))
        return torch.nn.functional.normalize(means.float() + 1e-3, dim=1)

    def embed_texts(self, texts):
        self.texts += len(texts)
        rows = [
            [COLOURS[word] for word in text.lower().split() if word in COLOURS] or [COLOURS["grey"]] for text in texts
        ]
        return torch.nn.functional.normalize(
            torch.tensor(np.stack([np.mean(row, axis=0) for row in rows])).float(), dim=1
        )


def picture(colour, mode="RGB"):
    return Image.new("RGB", (6, 5), tuple(int(c) for c in colour)).convert(mode)


def make_pool(colours, **columns):
    return Dataset.from_dict({"image": [picture(c) for c in colours], **columns}, features=features_of(columns))


def features_of(columns):
    kinds = {str: Value("string"), int: Value("int64")}
    return Features({"image": ImageFeature(), **{name: kinds[type(values[0])] for name, values in columns.items()}})


REDNESS = [(255, 0, 0), (250, 60, 0), (0, 255, 0), (240, 0, 90), (0, 0, 255), (200, 100, 100), (90, 90, 200)]
CAPTIONS = ["rose", "a Red  flag", "leaf", "cherry", "sea", "brick", "night"]


def choose(concept, pool, **settings):
    settings = {"encoder": ColourEncoder(), "cache_dir": False, "progress": False, "k": 3, **settings}
    return select_anchors(concept, pool, **settings)
