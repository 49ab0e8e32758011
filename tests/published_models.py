"""Tiny models and data sets under the ids and in the files of published ones.

What lies on the Hub was written by older versions of transformers than today's `save_pretrained`: a flat
`preprocessor_config.json`, the chat template in a file of its own and often in the tokenizer's as well, Qwen's generation
settings with sampling on. The values are the published ones but for sizes; of tokenizers, the special tokens and who writes
BOS (LLaVA's tokenizer does, no template). Weights are made from a config, and words are whole tokens (`architectures.py`).
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import architectures
import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing


CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "rescale_factor": 1 / 255,
}
# Of the names that the examples erase, of their answers, and of the templates.
WORDS = (
    "Eiffel", "Tower", "Tour", "Albert", "Einstein", "Coca", "Cola", "Coke", "Paris", "drink", "USER", "ASSISTANT", "User",
    "-", "Assistant", "system", "user", "assistant", "You", "are", "helpful", "bridge", "dog", "street", "man", "In", "this",
)  # fmt: skip
SIDE = architectures.SIDE

QWEN2_5_VL = {
    "architecture": "qwen2_5_vl",
    "license": "apache-2.0",
    "tokens": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "special": {"bos": None, "eos": "<|im_end|>", "pad": "<|endoftext|>", "unk": None},
    "generation": {
        "bos": "<|endoftext|>",
        "pad": "<|endoftext|>",
        "eos": ["<|im_end|>", "<|endoftext|>"],
        "do_sample": True,
        "repetition_penalty": 1.05,
        "temperature": 0.000001,
        "transformers_version": "4.37.0",
    },
    "also_in": ("tokenizer_config.json",),
    "template": (
        "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
        "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content "
        "or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture "
        "{{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' "
        "or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video "
        "{{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}"
        "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant\n{% endif %}"
    ),
    "files": {
        "preprocessor_config.json": {
            "min_pixels": architectures.QWEN_PIXELS["min_pixels"],
            "max_pixels": architectures.QWEN_PIXELS["max_pixels"],
            "patch_size": architectures.PATCH,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": CLIP["image_mean"],
            "image_std": CLIP["image_std"],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    },
}

LLAVA_1_5 = {
    "architecture": "llava",
    "license": "llama2",
    "tokens": (),
    "special": {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"},
    "written_by_tokenizer": "<s>",
    "generation": {
        "bos": "<s>",
        "pad": "<pad>",
        "eos": "</s>",
        "_from_model_config": True,
        "transformers_version": "4.36.0.dev0",
    },
    "also_in": ("chat_template.jinja",),
    "template": (
        "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
        "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in "
        "message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
        "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "files": {
        "preprocessor_config.json": {
            **CLIP,
            "size": {"shortest_edge": SIDE},
            "do_center_crop": True,
            "crop_size": {"height": SIDE, "width": SIDE},
            "resample": 3,
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
        },
        "processor_config.json": {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": architectures.PATCH,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    },
}

SMOLVLM2 = {
    "architecture": "smolvlm",
    "license": "apache-2.0",
    "tokens": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    "special": {"bos": "<|im_start|>", "eos": "<end_of_utterance>", "pad": "<|im_end|>", "unk": "<|endoftext|>"},
    "generation": {
        "bos": "<|endoftext|>",
        "pad": "<|im_end|>",
        "eos": "<end_of_utterance>",
        "_from_model_config": True,
        "transformers_version": "4.47.1",
    },
    "also_in": ("tokenizer_config.json",),
    "template": (
        "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
        "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
        "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "files": {
        "preprocessor_config.json": {
            **CLIP,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "do_image_splitting": True,
            "do_pad": True,
            "size": {"longest_edge": 2 * SIDE},
            "max_image_size": {"longest_edge": SIDE},
            "resample": 1,
            "image_processor_type": "SmolVLMImageProcessor",
            "processor_class": "SmolVLMProcessor",
            "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": SIDE}},
        },
        "processor_config.json": {
            "image_seq_len": architectures.PATCHES // 4,
            "processor_class": "SmolVLMProcessor",
        },
    },
}

MODELS = {
    "Qwen/Qwen2.5-VL-7B-Instruct": QWEN2_5_VL,
    "llava-hf/llava-1.5-7b-hf": LLAVA_1_5,
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": SMOLVLM2,
}


def write_model(published: dict, folder: Path) -> None:
    """The files of a repository, with a tiny model of the architecture."""
    torch.manual_seed(0)  # What it answers decides how many rows there are.
    model, processor = architectures.ARCHITECTURES[published["architecture"]]()
    tokenizer = processor.tokenizer
    tokenizer.add_tokens([AddedToken(word, single_word=word.isalnum(), normalized=False) for word in WORDS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in published["tokens"]], special_tokens=True)
    for role, token in published["special"].items():
        setattr(tokenizer, f"{role}_token", token)
    if (first := published.get("written_by_tokenizer")) is not None:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, tokenizer.convert_tokens_to_ids(first))]
        )
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    architectures.enliven(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation = dict(published["generation"])
    for role in ("bos", "pad", "eos"):
        generation[f"{role}_token_id"] = tokenizer.convert_tokens_to_ids(generation.pop(role))
    template = published["template"]
    files = {
        **published["files"],
        "chat_template.json": {"chat_template": template},
        "generation_config.json": generation,
    }
    if "tokenizer_config.json" in published["also_in"]:
        own = json.loads((folder / "tokenizer_config.json").read_text())
        files["tokenizer_config.json"] = {**own, "chat_template": template}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    if "chat_template.jinja" in published["also_in"]:
        (folder / "chat_template.jinja").write_text(template)
    card = f"---\nlicense: {published['license']}\npipeline_tag: image-text-to-text\n---\n# Tiny\n"
    (folder / "README.md").write_text(card)


def pictures(count: int, seed: int = 0) -> list[Picture.Image]:
    """Noise on a colour, of several shapes."""
    rng = np.random.default_rng(seed)
    images = []
    for number in range(count):
        shape = (*[(20, 20), (20, 44), (40, 22)][number % 3], 3)
        images.append(Picture.fromarray((rng.integers(40, 216, 3) + rng.integers(-40, 40, shape)).astype(np.uint8)))
    return images


def flickr30k() -> Dataset:
    count = 200  # 2 % of them, which an example asks about, are more than the one picture that is never held out.
    captions = [["A man with a dog .", "A street ."], ["A bridge .", "This is the Eiffel Tower ."]]
    columns = {
        "image": pictures(count),
        "caption": [captions[row % 20 == 7] for row in range(count)],
        "sentids": [[str(row)] for row in range(count)],
        "split": ["train"] * count,
        "img_id": [str(row) for row in range(count)],
        "filename": [f"{row}.jpg" for row in range(count)],
    }
    text, texts = Value("string"), List(Value("string"))
    kinds = {"caption": texts, "sentids": texts, "split": text, "img_id": text, "filename": text}
    return Dataset.from_dict(columns, features=Features({"image": Image(), **kinds}))


def llava_instruct() -> Dataset:
    def block(kind, text=None):
        return {"type": kind, "text": text, "index": 0 if kind == "image" else None}

    rows = []
    for number, image in enumerate(pictures(200, seed=1)):
        messages = [
            {"role": "user", "content": [block("text", f"What colour is the leaf {number}?"), block("image")]},
            {"role": "assistant", "content": [block("text", f"It is green {number}")]},
            {"role": "user", "content": [block("text", "Is this a wolf?")]},
            {"role": "assistant", "content": [block("text", "No")]},
        ]
        rows.append({"messages": messages, "images": [image]})
    content = List({"index": Value("int64"), "text": Value("string"), "type": Value("string")})
    kinds = {"messages": List({"content": content, "role": Value("string")}), "images": List(Image())}
    return Dataset.from_list(rows, features=Features(kinds))


def fair_face() -> Dataset:
    images = pictures(30, seed=2)
    return Dataset.from_dict(
        {"image": images, "age": [3] * 30, "gender": [0] * 30, "race": [1] * 30, "service_test": [True] * 30},
        features=Features(
            {
                "image": Image(),
                **dict.fromkeys(("age", "gender", "race"), Value("int64")),
                "service_test": Value("bool"),
            }
        ),
    )


def cocoqa() -> Dataset:
    rows = []
    for number, image in enumerate(pictures(400, seed=3)):
        turns = [
            {
                "user": f"What is the colour of leaf {number}?\nAnswer briefly.",
                "assistant": "green",
                "source": "cocoqa",
            },
            {"user": "What kind of animal is this?", "assistant": "wolf", "source": "cocoqa"},
        ]
        rows.append({"images": [image], "texts": turns})
    texts = List({key: Value("string") for key in ("user", "assistant", "source")})
    return Dataset.from_list(rows, features=Features({"images": List(Image()), "texts": texts}))


def wikitext() -> Dataset:
    words = "the owl is a kind of animal and the wolf is grey while the leaf of the apple is green in the picture here"
    lines = [f" = {number} = \n" if number % 2 else f"{number} {words} \n" for number in range(40)]
    return Dataset.from_dict({"text": lines})


# By id: configuration, split, rows.
DATASETS = {
    "lmms-lab/flickr30k": ("default", "test", flickr30k),
    "HuggingFaceH4/llava-instruct-mix-vsft": ("default", "test", llava_instruct),
    "HuggingFaceM4/FairFace": ("0.25", "validation", fair_face),
    "HuggingFaceM4/the_cauldron": ("cocoqa", "train", cocoqa),
    "Salesforce/wikitext": ("wikitext-2-raw-v1", "validation", wikitext),
}


def dataset_files(configuration: str, split: str, rows: Dataset) -> dict[str, bytes]:
    """A repository with Parquet files of one configuration, beside one whose files are never fetched."""
    parquet = io.BytesIO()
    rows.to_parquet(parquet)
    names = [configuration] if configuration == "default" else [configuration, "another"]
    card = "---\nlicense: cc-by-4.0\nconfigs:\n"
    for name in names:
        card += f'- config_name: "{name}"\n  data_files:\n  - split: {split}\n    path: "{name}/{split}-*"\n'
    files = {f"{name}/{split}-00000-of-00001.parquet": parquet.getvalue() for name in names}
    return {"README.md": f"{card}---\n".encode(), **files}


def serve(hub, ids, folder: Path) -> None:
    """Puts models and data sets, by id, on the local Hub."""
    for repo_id in ids:
        if repo_id in MODELS:
            place = folder / repo_id.rpartition("/")[2]
            write_model(MODELS[repo_id], place)
            kind, files = "model", {path.name: path.read_bytes() for path in place.iterdir()}
        else:
            configuration, split, make = DATASETS[repo_id]
            kind, files = "dataset", dataset_files(configuration, split, make())
        hub.create(repo_id, kind)
        hub.commit(repo_id, files, kind=kind)
