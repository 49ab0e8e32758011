"""Tiny random models under the Hub ids that PEFT's tests name, laid out as a Hub cache.

With `HF_HUB_OFFLINE=1` every `from_pretrained` finds them there by itself, so that nothing of it has to be patched.
Sizes follow the originals only where a test depends on them (names of the layers, their number).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


REVISION = "0" * 40
# Token ids up to 1000 occur in the tests.
TOKENS = {"vocab_size": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {**HEADS, "hidden_size": 32, "intermediate_size": 37, "vocab_size": 1124, "pad_token_id": 0}
LLAMA = {**TOKENS, **HEADS, "hidden_size": 16, "intermediate_size": 64, "num_key_value_heads": 4}


def opt(**more):
    shape = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "max_position_embeddings": 512}
    config = {**TOKENS, "num_hidden_layers": 5, "num_attention_heads": 4, **shape, **more}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**config))


def opt_125m():
    return opt(num_hidden_layers=12, hidden_size=48, word_embed_proj_dim=48, ffn_dim=96)


def gpt2():
    config = transformers.GPT2Config(**TOKENS, n_embd=32, n_layer=5, n_head=4, n_positions=512)
    return transformers.GPT2LMHeadModel(config)


def gptj():
    config = transformers.GPTJConfig(**TOKENS, n_embd=32, n_layer=3, n_head=4, n_positions=512, rotary_dim=4)
    return transformers.GPTJForCausalLM(config)


def gpt_neox():
    config = transformers.GPTNeoXConfig(**TOKENS, **HEADS, hidden_size=32, intermediate_size=37)
    return transformers.GPTNeoXForCausalLM(config)


def bloom():
    return transformers.BloomForCausalLM(transformers.BloomConfig(**TOKENS, hidden_size=32, n_layer=5, n_head=4))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**{**LLAMA, "num_key_value_heads": 2}))


def qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**LLAMA, "num_key_value_heads": 2}))


def gemma3():
    config = {**LLAMA, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**config))


def bart():
    shape = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in
             (("layers", 2), ("attention_heads", 4), ("ffn_dim", 32))}  # fmt: skip
    config = transformers.BartConfig(**TOKENS, **shape, d_model=16, decoder_start_token_id=2)
    return transformers.BartForConditionalGeneration(config)


def t5():
    config = transformers.T5Config(
        vocab_size=1024, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def bert():
    return transformers.BertModel(transformers.BertConfig(**BERT))


def bert_classifier():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))


def roberta():
    return transformers.RobertaModel(transformers.RobertaConfig(**BERT))


def roberta_classifier():
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**BERT))


def deberta():
    return transformers.DebertaModel(
        transformers.DebertaConfig(**BERT, relative_attention=True, pos_att_type=["p2c", "c2p"])
    )


def deberta_v2():
    return transformers.DebertaV2Model(
        transformers.DebertaV2Config(**BERT, relative_attention=True, pos_att_type=["p2c", "c2p"])
    )


def llama_classifier():
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**LLAMA))


def clip_text():
    config = {**TOKENS, **HEADS, "hidden_size": 32, "intermediate_size": 37, "projection_dim": 32}
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=10, hidden_sizes=[10, 20, 30, 40], depths=[1, 1, 2, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def llama4():
    config = {**LLAMA, "intermediate_size_mlp": 64, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**config, interleave_moe_layer_step=1))


def gpt_oss():
    config = {**LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**config))


def qwen3_moe():
    config = {**LLAMA, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**config))


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**LLAMA, num_local_experts=4))


BUILT: dict[str, Callable] = {
    "peft-internal-testing/opt-125m": opt_125m,
    "peft-internal-testing/tiny-random-OPTForCausalLM": opt,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": gpt2,
    "peft-internal-testing/tiny-random-gpt2": gpt2,
    "hf-internal-testing/tiny-random-gpt2": gpt2,
    "gpt2": gpt2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": gptj,
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": gpt_neox,
    "peft-internal-testing/tiny-random-BloomForCausalLM": bloom,
    "peft-internal-testing/tiny-random-LlamaForCausalLM": llama,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": llama,
    "hf-internal-testing/tiny-random-LlamaForCausalLM": llama,
    "hf-internal-testing/tiny-random-MistralForCausalLM": mistral,
    "hf-internal-testing/Mixtral-tiny": mixtral,
    "peft-internal-testing/tiny-dummy-qwen2": qwen2,
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": gemma3,
    "trl-internal-testing/tiny-Llama4ForCausalLM": llama4,
    "trl-internal-testing/tiny-GptOssForCausalLM": gpt_oss,
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": qwen3_moe,
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": llama_classifier,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": bart,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": t5,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": t5,
    "peft-internal-testing/tiny-random-t5": t5,
    "google/flan-t5-small": t5,
    "peft-internal-testing/tiny-random-BertModel": bert,
    "bert-base-uncased": bert,
    "peft-internal-testing/tiny-random-BertForSequenceClassification": bert_classifier,
    "peft-internal-testing/tiny-random-RobertaModel": roberta,
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": roberta_classifier,
    "peft-internal-testing/tiny-random-DebertaModel": deberta,
    "peft-internal-testing/tiny-random-DebertaV2Model": deberta_v2,
    "peft-internal-testing/tiny-clip-text-2": clip_text,
    "peft-internal-testing/tiny-random-ResNetForImageClassification": resnet,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so that any text has ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    bytes_only = Tokenizer(models.BPE(vocabulary, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>",
        model_max_length=512,
    )  # fmt: skip


def build(home: Path) -> None:
    """Fills `hub` in a folder for `HF_HOME`: a model and a tokenizer for every id of `BUILT`; what is there stays."""
    for name, make in BUILT.items():
        folder = home / "hub" / f"models--{name.replace('/', '--')}"
        if (folder / "refs" / "main").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        snapshot = folder / "snapshots" / REVISION
        torch.manual_seed(0)
        model = make()
        model.save_pretrained(snapshot)
        if make is resnet:
            transformers.ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(snapshot)
        else:
            tokenizer().save_pretrained(snapshot)
        # Last: without it the id is not there.
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(REVISION, encoding="utf-8")
