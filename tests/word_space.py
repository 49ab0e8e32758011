"""A shared space of captions that is quick to make, and a pool for it: for tests in several processes."""

import time
import zlib

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature


class WordEncoder:
    """A text is the normalised sum of its words' pseudo-random directions."""

    name, reads, templates = "words", "caption", ("{}",)

    def __init__(self, dim=16, seconds=0.0, fingerprint="words-1"):
        self.dim, self.seconds, self.fingerprint, self.texts = dim, seconds, fingerprint, 0

    def embed_images(self, images):
        raise TypeError("reads captions")

    def embed_texts(self, texts):
        self.texts += len(texts)
        time.sleep(self.seconds)
        words = [
            [np.random.default_rng(zlib.crc32(w.encode())).normal(size=self.dim) for w in t.split()] for t in texts
        ]
        return torch.nn.functional.normalize(torch.tensor(np.stack([np.sum(w, axis=0) for w in words])).float(), dim=1)


def word_pool(n, seed=0):
    """Captions of three words of 40 each, so that some are the same; two of a hundred rows have none."""
    random = np.random.default_rng(seed)
    captions = [" ".join(f"word{i}" for i in random.integers(0, 40, size=3)) for _ in range(n)]
    captions = [None if random.random() < 0.02 else caption for caption in captions]
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    # The images are only looked at once they are selected.
    image = {"bytes": _white_pixel(), "path": None}
    return Dataset.from_dict({"image": [image] * n, "caption": captions}, features=features)


def _white_pixel():
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), "white").save(buffer, "PNG")
    return buffer.getvalue()
