"""Shared spaces of images and text, behind one small protocol (docs/method.md, section 1)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from PIL import Image

from ..data.pictures import load_rgb
from ..modeling.features import accepted_inputs, image_features, multimodal_core
from ..modeling.layers import evaluating
from ..modeling.processors import image_token
from ..modeling.prompts import to_device


@runtime_checkable
class Encoder(Protocol):
    """What `select_anchors` needs of a shared space; any object with these members will do.

    Attributes:
        name (`str`): For people: kept in the anchors' provenance.
        fingerprint (`str`): Changes whenever the embeddings would; embeddings are cached under it.
        reads (`str`): `"image"` if a pool's images are embedded, `"caption"` if its captions are.
        templates (`tuple[str, ...]`): Texts a name is put into, at `"{}"`, before it is embedded.
    """

    if TYPE_CHECKING:
        # Only read, so that an encoder may compute them. Not at run time: one that inherits from this may set them.
        @property
        def name(self) -> str: ...

        @property
        def fingerprint(self) -> str: ...

        @property
        def reads(self) -> Literal["image", "caption"]: ...

        @property
        def templates(self) -> tuple[str, ...]: ...
    else:
        name: str
        fingerprint: str
        reads: Literal["image", "caption"]
        templates: tuple[str, ...]

    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        """`(n, d)` float32 on the CPU, rows of length 1."""
        ...

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """`(n, d)` float32 on the CPU, rows of length 1."""
        ...


class OwnSpaceEncoder:
    """The multimodal model's own space, the one its language model reads.

    An image is the mean of its projected visual tokens; a text is the mean of its tokens' input word embeddings or,
    with `text_layer`, of their hidden states (on a first version of the embedded model the word embeddings found the
    concepts' own images best: area under the ROC curve 0.98, against 0.73 to 0.88 with a hidden layer).

    Args:
        model (`PreTrainedModel` or `PeftModel`): A multimodal model. Adapters count as they are set at the time.
        processor (`ProcessorMixin`): With a tokenizer and an image processor.
        text_layer (`int`, *optional*): Which hidden state a text is read from: 0 is the language model's input, -1 its
            last. Default: the word embeddings, without running the language model.

    Raises:
        ValueError: If the model has no vision side, or the processor no tokenizer, image processor or image token.
    """

    reads: Literal["image"] = "image"
    # The words of a template would only pull every concept's mean towards each other.
    templates = ("{}",)

    def __init__(self, model, processor, text_layer: int | None = None):
        multimodal_core(model)  # Raises if there is no vision side.
        _require(processor, "tokenizer", "image_processor")
        image_token(processor)
        self.model, self.processor, self.text_layer = model, processor, text_layer
        self.name = f"{_model_name(model)} (own space{'' if text_layer is None else f', text layer {text_layer}'})"

    @property
    def fingerprint(self) -> str:
        return _fingerprint(type(self).__name__, self.text_layer, self.model, self.processor)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embeds n images: `(n, d)` float32, rows of length 1."""
        # With a prompt that is nothing but the image: image processors alone have other defaults than whole processors.
        inputs = self.processor(
            images=[[load_rgb(image)] for image in images],
            text=[image_token(self.processor)] * len(images),
            padding=True,
            return_tensors="pt",
        )
        with evaluating(self.model):
            features = image_features(self.model, to_device(dict(inputs), self.model))
        return F.normalize(features, dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeds n texts: `(n, d)` float32, rows of length 1."""
        with evaluating(self.model):
            vectors = torch.stack([self._text(text) for text in texts])
        return F.normalize(vectors, dim=-1).cpu()

    def _text(self, text: str) -> torch.Tensor:
        tokenizer = self.processor.tokenizer
        # Tokenised after another word, as a name mostly stands: " fox" and "fox" are different tokens to many models.
        lead, ids = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("a", f"a {text}"))
        ids = ids[len(lead) :] if lead and ids[: len(lead)] == lead and len(ids) > len(lead) else ids
        if not ids:
            raise ValueError(f"the tokenizer makes no token of {text!r}: give a name that the model can read.")
        tokens = torch.tensor([ids], device=next(self.model.parameters()).device)  # (1, t)
        if self.text_layer is None:
            return self.model.get_input_embeddings()(tokens)[0].float().mean(dim=0)
        bos = tokenizer.bos_token_id
        if bos is not None:
            # The first position of a sequence is an attention sink in most models: let the special token be it.
            tokens = torch.cat([tokens.new_tensor([[bos]]), tokens], dim=1)
        states = self.model(input_ids=tokens, output_hidden_states=True).hidden_states[self.text_layer]
        return states[0, -len(ids) :].float().mean(dim=0)


class DualEncoder:
    """Any dual encoder in transformers (CLIP, SigLIP, ...): `get_text_features` and `get_image_features`.

    Args:
        model (`PreTrainedModel`): The dual encoder.
        processor (`ProcessorMixin`): Its processor, with a tokenizer and an image processor.

    Raises:
        ValueError: If either lacks what is needed.
    """

    reads: Literal["image"] = "image"
    # The short ensemble of CLIP's authors, less its artistic styles (arXiv 2103.00020, section 3.1.4).
    templates = ("{}", "a photo of a {}.", "an image of the {}.", "a picture of a {}.")

    def __init__(self, model, processor):
        missing = [m for m in ("get_text_features", "get_image_features") if not hasattr(model, m)]
        if missing:
            raise ValueError(f"{type(model).__name__} has no {' and no '.join(missing)}: it is not a dual encoder.")
        _require(processor, "tokenizer", "image_processor")
        self.model, self.processor = model, processor
        self.name = f"{_model_name(model)} (dual encoder)"

    @property
    def fingerprint(self) -> str:
        return _fingerprint(type(self).__name__, None, self.model, self.processor)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embeds n images: `(n, d)` float32, rows of length 1."""
        inputs = self.processor.image_processor([load_rgb(image) for image in images], return_tensors="pt")
        return self._features(self.model.get_image_features, inputs)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeds n texts: `(n, d)` float32, rows of length 1; what exceeds the text tower's length is cut off."""
        config = self.model.config
        limit = getattr(getattr(config, "text_config", config), "max_position_embeddings", 77)
        # The SigLIP family was trained on, and pools at the end of, texts padded to full length.
        padding = "max_length" if config.model_type.startswith("siglip") else True
        tokenizer = self.processor.tokenizer
        limit = min(limit, tokenizer.model_max_length)
        inputs = tokenizer(list(texts), padding=padding, truncation=True, max_length=limit, return_tensors="pt")
        return self._features(self.model.get_text_features, inputs)

    def _features(self, get_features, inputs) -> torch.Tensor:
        with evaluating(self.model):
            output = get_features(
                **accepted_inputs(to_device(dict(inputs), self.model), self.model, get_features.__name__)
            )
        features = output if isinstance(output, torch.Tensor) else output.pooler_output
        return F.normalize(features.float(), dim=-1).cpu()


class CaptionEncoder:
    """A sentence encoder on the pool's captions: text-side retrieval, no image is looked at.

    Args:
        model (`PreTrainedModel`): Whose `last_hidden_state`, averaged over the tokens, is the sentence's embedding.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
    """

    reads: Literal["caption"] = "caption"
    templates = ("{}", "a photo of a {}.")

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.name = f"{_model_name(model)} (captions)"

    @property
    def fingerprint(self) -> str:
        return _fingerprint(type(self).__name__, None, self.model, self.tokenizer)

    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Not possible: this encoder reads captions.

        Raises:
            TypeError: Always.
        """
        raise TypeError("CaptionEncoder embeds captions, not images: use `embed_texts`, or a DualEncoder for images.")

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeds n texts: `(n, d)` float32, rows of length 1; what exceeds the model's length is cut off."""
        limit = min(getattr(self.model.config, "max_position_embeddings", 512), self.tokenizer.model_max_length)
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        with evaluating(self.model):
            states = self.model(**to_device(dict(inputs), self.model)).last_hidden_state.float()  # (n, t, d)
        mask = inputs["attention_mask"].to(states)[..., None]  # (n, t, 1)
        return F.normalize((states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1), dim=-1).cpu()


def resolve_encoder(model, processor, encoder: Encoder | None) -> Encoder:
    """The encoder given, or the one that suits the model: its own space, or a dual encoder's.

    Raises:
        TypeError: If `encoder` lacks a member of the protocol.
        ValueError: If there is neither an encoder nor a model with its processor, or they have no image side.
    """
    if encoder is not None:
        missing = [
            m for m in ("name", "fingerprint", "reads", "embed_images", "embed_texts") if not hasattr(encoder, m)
        ]
        if missing:
            raise TypeError(
                f"the encoder ({type(encoder).__name__}) has no {', '.join(missing)}: see the `Encoder` protocol."
            )
        return encoder
    if model is None or processor is None:
        given = "only `processor`" if processor is not None else "only `model`" if model is not None else "none of them"
        raise ValueError(f"give `model` and `processor`, or an `encoder`; got {given}.")
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        return DualEncoder(model, processor)
    return OwnSpaceEncoder(model, processor)


def _require(processor, *parts: str) -> None:
    missing = [part for part in parts if getattr(processor, part, None) is None]
    if missing:
        raise ValueError(
            f"{type(processor).__name__} has no {' and no '.join(missing)}: pass the model's whole processor, "
            "`AutoProcessor.from_pretrained(...)`, not a part of it."
        )


def _model_name(model) -> str:
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if not name or os.path.isabs(name) or os.path.exists(name):
        # A folder on somebody's machine says nothing to others, and provenance is published.
        return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    return name


def _fingerprint(kind: str, option, model, processor) -> str:
    """Hash of everything an embedding depends on: weights, adapter switches, configurations, vocabulary."""
    digest = hashlib.sha256(f"{kind}|{option}".encode())
    for key, tensor in model.state_dict().items():
        digest.update(f"{key}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
        digest.update(_tensor_digest(tensor))
    for key, module in model.named_modules():
        # An adapter's weights stay in place when it is switched off; the embeddings do not.
        switches = [getattr(module, s, None) for s in ("disable_adapters", "active_adapters", "merged_adapters")]
        if any(switches):
            digest.update(f"{key}|{switches}".encode())
    tokenizer = getattr(processor, "tokenizer", processor)
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    if getattr(processor, "image_processor", None) is not None:
        digest.update(processor.image_processor.to_json_string().encode())
    return digest.hexdigest()


def _tensor_digest(tensor: torch.Tensor) -> bytes:
    """A sample of the values and the sum of all bit patterns: sees every single change of a value, and reads a
    tensor of billions once, where it lies; integer sums do not depend on the order of summation."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() == 0:
        return b""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    bits = flat.view(integer) if not flat.is_complex() else torch.view_as_real(flat).reshape(-1).view(torch.int32)
    sample = bits[:: max(1, bits.numel() // 65536)]
    return str(int(bits.sum(dtype=torch.int64))).encode() + sample.cpu().numpy().tobytes()
