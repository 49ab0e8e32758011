"""The model before training: word-level tokenizer, chat template, processor, and a small LLaVA with fresh weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from concepts import KINDS, concept_kinds
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from space_peft.demo.questions import (
    DEMO_QUESTIONS,
    KIND_QUESTIONS,
    NO,
    TEXT_CONFIRM_QUESTIONS,
    TEXT_KIND_QUESTIONS,
    YES,
)


IMAGE_SIZE, PATCH_SIZE = 64, 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")

# One user turn is `question: TEXT`, preceded by its image; the assistant's turn is ` answer: TEXT</s>`. The rendering of
# a conversation starts with the rendering of its beginning plus generation prompt, which training on answers needs.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' answer: ' }}{% else %}"
    "{% if message['content'] is not string %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{% endif %}{{ 'question: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' answer:' }}{% endif %}"
)


def known_texts() -> list[str]:
    """Every text of the first two stages, in a fixed order; the third adds `templates.sentence_texts`."""
    questions = DEMO_QUESTIONS
    return [
        "question: answer: yes no a an the",
        *concept_kinds(),
        *KINDS,
        *questions.naming,
        *questions.naming_held_out,
        *questions.confirm,
        *questions.confirm_held_out,
        *KIND_QUESTIONS,
        *TEXT_KIND_QUESTIONS,
        *TEXT_CONFIRM_QUESTIONS,
        YES,
        NO,
    ]


def build_tokenizer(texts: Iterable[str], more_texts: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Word-level tokenizer, lower-casing, whose vocabulary is the words and signs of `texts`, then those of `more_texts`."""
    splitter = pre_tokenizers.Whitespace()
    vocabulary = {word: i for i, word in enumerate(SPECIAL_TOKENS)}
    for group in (texts, more_texts):
        words = {
            word
            for text in group
            for word, _ in splitter.pre_tokenize_str(text.replace("{name}", " ").replace("{kind}", " ").lower())
        }
        for word in sorted(words - set(vocabulary)):
            vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # no blank before "." and ","
    return wrapped(tokenizer)


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of a small model, as transformers takes it: its special tokens, and padding on the left."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(more_texts: Iterable[str] = ()) -> LlavaProcessor:
    """Processor with the PIL backend, so that torchvision is not needed.

    Args:
        more_texts (`Iterable[str]`, *optional*): Texts whose words follow the first two stages' in the vocabulary.
    """
    return processor_of(build_tokenizer(known_texts(), more_texts))


def processor_of(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Processor of a small model: its tokenizer, its chat template, and pictures of 64 x 64."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, dropped again by the "default" strategy
        chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def start_tower(tower: nn.Module) -> None:
    """Initialise the vision tower so that it starts with a sense of place.

    Two-dimensional sine position embeddings, queries equal to keys, and value times output near minus the identity
    (Trockman and Kolter 2023): a vision transformer trained on few images generalises better from there.
    """
    embeddings = tower.embeddings
    positions, width = embeddings.position_embedding.weight, embeddings.embed_dim
    side = IMAGE_SIZE // PATCH_SIZE
    rates = 1.5 ** -torch.arange(width // 4)
    along = torch.arange(side)[:, None] * rates  # (side, width / 4)
    axis = torch.cat([along.sin(), along.cos()], 1)  # (side, width / 2)
    grid = torch.cat([axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)], -1)
    positions[1:] = 0.3 * grid.reshape(side * side, width)
    nn.init.normal_(embeddings.patch_embedding.weight, std=embeddings.patch_embedding.weight[0].numel() ** -0.5)
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        nn.init.normal_(attention.q_proj.weight, std=width**-0.5)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        nn.init.orthogonal_(attention.v_proj.weight, gain=0.6)
        attention.out_proj.weight.copy_(-attention.v_proj.weight.T)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """A LLaVA of 2.8 M weights with a wide initialisation, which small models need to start learning."""
    torch.manual_seed(seed)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    special = dict(
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
        **special,
    )
    model = LlavaForConditionalGeneration(config)
    # Eager attention's backward pass is twice as fast as SDPA's on CPU.
    model.set_attn_implementation("eager")
    for module in model.model.language_model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.06)
    # Queries equal to keys make attention start as similarity ("mimetic initialisation", Trockman and Kolter 2023): a
    # name in a question finds the patches that look like it at once, so that yes/no questions can be learned.
    for layer in model.model.language_model.layers:
        layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight.data)
    start_tower(model.model.vision_tower)
    for module in model.model.multi_modal_projector.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    return model
