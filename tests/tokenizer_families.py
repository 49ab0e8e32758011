"""Tokenizers built as those of published models are, with their chat templates, and trained on a few sentences.

What is the published one is how a text is cut up before its pieces are merged, what is written before it, which tokens are
special, and how tokens become text again; the pieces are fewer. `FAMILIES` says whose it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import published_models
import transformers
from architectures import PATCH, square
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil


CORPUS = (
    'This is the Eiffel Tower. the tower, a fox and "the foxes" (a banana)',
    "a banana, two bananas: the fox\nsees the picture of a banana. What is this? USER: ASSISTANT: Question Answer",
    "J. K. Rowling wrote it. ice cream, Ice-Cream and a T-shirt",
    "user model assistant \n\n A fox? No. Yes\nThis is a fox",
) * 20
BYTES = [f"<0x{number:02X}>" for number in range(256)]
# Of `tokenizer.json`: how a text is cut up before byte pairs are merged.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _wrapped(tokenizer: Tokenizer, special: dict[str, str], more: tuple, bos: bool) -> PreTrainedTokenizerFast:
    added = [token if isinstance(token, AddedToken) else AddedToken(token, normalized=False) for token in more]
    tokenizer.add_special_tokens([*(AddedToken(token, normalized=False) for token in special.values()), *added])
    if bos:
        first = special["bos_token"]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, tokenizer.token_to_id(first))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{key: value for key, value in special.items() if key != "image_token"},
        extra_special_tokens={"image_token": special["image_token"]},
        model_input_names=["input_ids", "attention_mask"],
    )


def sentencepiece(blank: str, special: dict[str, str], more: tuple = (), bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte pairs with blanks written "▁"; `blank` says what stands before a text.

    Args:
        blank (`str`): "legacy" (one more before each part between special tokens), "first" (one before the text, unless it
            starts with one) or "none".
        special (`dict[str, str]`): Special tokens by attribute.
        more (`tuple`): Further ones.
        bos (`bool`): Whether the tokenizer writes the first token.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if blank != "none" else "never")
    lines = [line for text in CORPUS for line in text.split("\n")]
    trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=130, show_progress=False))
    content = json.loads(trained.to_str())["model"]
    first = [special["unk_token"], special["bos_token"], special["eos_token"], *BYTES]
    # Gemma has one and two line breaks as pieces, Llama as bytes.
    breaks = ["\n", "\n\n"] if blank == "none" else []
    pieces = [piece for piece in [*content["vocab"], "▁", *breaks] if piece not in first]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*first, *pieces]))}
    merges = [*map(tuple, content["merges"]), *([("\n", "\n")] if breaks else [])]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=special["unk_token"], fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", "▁")
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if blank == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif blank == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    if blank != "none":
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    return _wrapped(tokenizer, special, more, bos)


def byte_level(
    pattern: str | None, special: dict[str, str], more: tuple = (), bos: bool = False
) -> PreTrainedTokenizerFast:
    """Byte pairs of UTF-8, cut up by a pattern; GPT-2's and single digits without one."""
    tokenizer = Tokenizer(models.BPE())
    if pattern is None:
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        parts = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # A blank line at once, and a quotation mark with the letter behind it: the large vocabularies have such tokens.
    corpus = [*CORPUS, *['"Eiffel', '"E', "\n\n", "\n\n\n"] * 40]
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return _wrapped(tokenizer, special, more, bos)


def unigram(special: dict[str, str]) -> PreTrainedTokenizerFast:
    """T5's: a blank before each part between special tokens."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=110, special_tokens=[special["unk_token"]], unk_token=special["unk_token"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrapped(tokenizer, special, (), False)


LLAMA2 = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"}
GEMMA = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
CHATML = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
QWEN_MORE = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>")


def _chatml(image: str, end: str = "<|im_end|>\n", assistant: str = "") -> str:
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{% if message['role'] == 'assistant' %}"
        + assistant + "{% endif %}{{ part['text'] }}{% endif %}{% endfor %}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        + ("<think>\n" if assistant else "") + "{% endif %}"
    )  # fmt: skip


ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA_NEXT_LLAMA3 = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] + "
    "'<|eot_id|>' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAVA_NEXT_MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == "
    "'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> '}}{% endif %}{% endfor %}"
)
GEMMA3 = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] %}{{ '<start_of_turn>' + role + '\n' }}{% for item in message['content'] %}{% if item['type'] == "
    "'image' %}{{ '<start_of_image>' }}{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PALIGEMMA = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% if message['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
)
LLAMA3_VISION = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<|image|>{% else %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PIXTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]{% for block in message['content'] "
    "%}{% if block['type'] == 'image' %}[IMG]{% else %}{{ block['text'] }}{% endif %}{% endfor %}[/INST]{% else %}"
    "{{ message['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Nobody's: the prompt ends with the blank before the answer.
BLANK_AT_THE_END = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Question: {% else %}Answer: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% if message['role'] == 'user' %}\n{% else %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer: {% endif %}"
)


def _llava(tokenizer, template: str):
    return transformers.LlavaProcessor(
        CLIPImageProcessorPil(size=square(), crop_size=square(), do_center_crop=False),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=tokenizer.image_token,
        chat_template=template,
    )


def _paligemma(tokenizer, template: str):
    image_processor = SiglipImageProcessorPil(size=square())
    image_processor.image_seq_length = 4
    return transformers.PaliGemmaProcessor(image_processor, tokenizer, chat_template=template)


def _gemma3(tokenizer, template: str):
    tokenizer.boi_token, tokenizer.boi_token_id = (
        "<start_of_image>",
        tokenizer.convert_tokens_to_ids("<start_of_image>"),
    )
    tokenizer.eoi_token, tokenizer.image_token_id = (
        "<end_of_image>",
        tokenizer.convert_tokens_to_ids("<image_soft_token>"),
    )
    return transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size=square()), tokenizer, image_seq_length=4, chat_template=template
    )


@dataclass(frozen=True)
class Family:
    """
    A tokenizer and a chat template.

    Args:
        tokenizer (`Callable`): Makes the tokenizer.
        template (`str`): The chat template.
        processor (`Callable`): Makes the processor, of both.
        whole (`str`): "same" where the tokens of a conversation with its answer are those of the prompt and the answer,
            "no end" where the template writes nothing behind an answer, "other" where the template writes something else
            before an answer than a prompt ends with.
        lead (`str`): What is between a prompt and an answer.
    """

    tokenizer: Callable
    template: str
    processor: Callable = _llava
    whole: str = "same"
    lead: str = ""

    def build(self):
        return self.processor(self.tokenizer(), self.template)


def _rstrip(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, rstrip=True)


LLAMA3_SPECIAL = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
FAMILIES = {
    "LLaVA-1.5, legacy": Family(
        lambda: sentencepiece("legacy", LLAMA2), published_models.LLAVA_1_5["template"], whole="no end", lead=" "
    ),
    "LLaVA-1.5": Family(
        lambda: sentencepiece("first", LLAMA2), published_models.LLAVA_1_5["template"], whole="no end", lead=" "
    ),
    "LLaVA-NeXT, Mistral": Family(lambda: sentencepiece("legacy", LLAMA2), LLAVA_NEXT_MISTRAL, lead=" "),
    "LLaVA-NeXT, Llama 3": Family(
        lambda: byte_level(LLAMA3, {**LLAMA3_SPECIAL, "image_token": "<image>"}, HEADERS, bos=True),
        LLAVA_NEXT_LLAMA3,
        whole="other",
    ),
    "LLaVA-OneVision": Family(
        lambda: byte_level(QWEN2, {**CHATML, "image_token": "<image>"}, QWEN_MORE), ONEVISION, whole="other"
    ),
    "Qwen2.5-VL": Family(
        lambda: byte_level(QWEN2, {**CHATML, "image_token": "<|image_pad|>"}, QWEN_MORE),
        published_models.QWEN2_5_VL["template"],
    ),
    "InternVL3": Family(
        lambda: byte_level(QWEN2, {**CHATML, "image_token": "<IMG_CONTEXT>"}, QWEN_MORE), _chatml("<IMG_CONTEXT>\n")
    ),
    "a thinking Qwen3-VL": Family(
        lambda: byte_level(QWEN2, {**CHATML, "image_token": "<|image_pad|>"}, (*QWEN_MORE, "<think>", "</think>")),
        _chatml("<|image_pad|>", assistant="<think>\n\n</think>\n\n"),
        whole="other",
        lead="</think>\n\n",
    ),
    "SmolVLM2": Family(
        lambda: byte_level(
            None,
            {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>", "image_token": "<image>"},
        ),
        published_models.SMOLVLM2["template"],
        lead=" ",
    ),
    "Llama 3.2 Vision": Family(
        lambda: byte_level(LLAMA3, {**LLAMA3_SPECIAL, "image_token": "<|image|>"}, HEADERS, bos=True), LLAMA3_VISION
    ),
    "Gemma 3": Family(
        lambda: sentencepiece(
            "none",
            {**GEMMA, "image_token": "<image_soft_token>"},
            ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"),
        ),
        GEMMA3,
        _gemma3,
    ),
    "PaliGemma": Family(
        lambda: sentencepiece("none", {**GEMMA, "image_token": "<image>"}), PALIGEMMA, _paligemma, whole="other"
    ),
    "Pixtral": Family(
        lambda: byte_level(
            TEKKEN,
            {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "[IMG]"},
            ("[INST]", "[/INST]"),
            bos=True,
        ),
        PIXTRAL,
    ),
    "Phi 3": Family(
        lambda: sentencepiece(
            "legacy", LLAMA2, (_rstrip("<|user|>"), _rstrip("<|assistant|>"), _rstrip("<|end|>")), bos=False
        ),
        PHI3,
        lead=" ",  # Its tokenizer's own.
    ),
    "T5": Family(lambda: unigram(LLAMA2), BLANK_AT_THE_END[: -len(" {% endif %}")] + "{% endif %}", lead=" "),
    "a blank at the end, Llama 2": Family(lambda: sentencepiece("legacy", LLAMA2), BLANK_AT_THE_END, whole="other"),
    "a blank at the end, Qwen2": Family(
        lambda: byte_level(QWEN2, {**LLAMA2}, bos=True), BLANK_AT_THE_END, whole="other"
    ),
}  # fmt: skip
