"""Tiny real models from config, and helpers to look into them; shared by the tests of the constraint."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from space_peft.modeling.layers import adapted_layers, lora_weights
from space_peft.null_space.observing import observe_inputs


VOCABULARY = 64
IMAGE_TOKEN = 63


def tiny_llama(seed=0, hidden=48):
    """A two-layer Llama; seeded, so that two calls give the same weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    # A fresh model's logits are next to zero; larger weights make it something worth keeping.
    config.initializer_range = 0.15
    return LlamaForCausalLM(config).eval()


def tiny_llava(seed=0):
    """A Llava of a one-layer CLIP tower (4 patches an image) and a two-layer Llama."""
    torch.manual_seed(seed)
    text = tiny_llama(seed, hidden=32).config
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # all zero in a fresh model, which would hide that they count
            parameter.data.normal_(std=0.5)
    return model


def text_batch(rows=4, length=10, seed=0, pad=0):
    """Random token ids with `pad` padding tokens on the left of every other row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY - 1, (rows, length), generator=generator)
    attention = torch.ones_like(ids)
    if pad:
        attention[::2, :pad] = 0
        ids[::2, :pad] = 0
    return {"input_ids": ids, "attention_mask": attention, "labels": ids.masked_fill(attention == 0, -100)}


def image_batch(rows=3, text=5, seed=0):
    """One image a row (4 image tokens), then text."""
    batch = text_batch(rows, text + 4, seed)
    batch["input_ids"][:, :4] = IMAGE_TOKEN
    batch["labels"][:, :4] = -100
    generator = torch.Generator().manual_seed(seed)
    batch["pixel_values"] = torch.rand(rows, 3, 8, 8, generator=generator)
    return batch


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model, optimizer, batch, steps):
    """Plain training; returns the losses."""
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def relative_changes(model, batches, adapter_name="default"):
    """`||dW h|| / ||W h||` of every adapted layer, largest over the tokens, computed in float64 from dense weights."""
    layers = adapted_layers(model, adapter_name)
    largest = dict.fromkeys(layers, 0.0)

    def visit(name, x, parts):
        a, b, scaling = lora_weights(layers[name], adapter_name)
        update = scaling * b.double() @ a.double()
        weight = layers[name].get_base_layer().weight.double()
        for _, mask in parts():
            h = (x if mask is None else x[mask]).reshape(-1, x.shape[-1]).double()
            if len(h):
                ratio = (h @ update.T).norm(dim=1) / (h @ weight.T).norm(dim=1)
                largest[name] = max(largest[name], float(ratio.max()))

    observe_inputs(model, batches, layers, visit, progress=False)
    return largest
