"""Start the language model's first attention layer as a comparison of words with image patches.

After the warm start, patches and names share a space: a patch of a fox points where the word "fox" points. "Is this a fox?"
asks exactly whether they do. A first layer whose queries and keys are the same projection on the space of the names makes
the name in the question look at the patches when they match, and at itself when they do not. Training starts from there;
without it a model of this size needs far longer to discover the comparison.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration


SELF_SCORE = 4.0  # attention logit of a name with itself; 64 patches that match half as well outweigh it


@torch.no_grad()
def start_matching(model: LlavaForConditionalGeneration, name_bag: torch.Tensor) -> None:
    """Initialise queries and keys of the first layer from the warm-started word embeddings, in place.

    Only the slowly turning half of each head's rotary pairs is used, so that the distance between question and patch does
    not matter.

    Args:
        model (`LlavaForConditionalGeneration`): Warm-started model.
        name_bag (`torch.Tensor`): `(names, vocabulary)`, averages the word embeddings of each name.
    """
    config = model.config.text_config
    attention = model.model.language_model.layers[0].self_attn
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    names = name_bag @ model.get_input_embeddings().weight  # (names, d)
    names = F.normalize(names, dim=-1) * config.hidden_size**0.5  # as the layer's norm will scale them
    _, _, axes = torch.linalg.svd(names - names.mean(0), full_matrices=False)  # rows: principal directions
    # The two halves of a rotary pair are `width / 2` apart; later pairs turn more slowly.
    slow = torch.cat([torch.arange(width // 4, width // 2), torch.arange(3 * width // 4, width)])
    weight = torch.randn_like(attention.q_proj.weight) * 0.02
    for head in range(heads):
        directions = axes[head::heads][: len(slow)]  # every head gets strong and weak directions
        energy = (names @ directions.T).square().sum(-1).mean()
        weight[head * width + slow] = directions * (SELF_SCORE * width**0.5 / energy) ** 0.5
    attention.q_proj.weight.copy_(weight)
    attention.k_proj.weight.copy_(weight)
