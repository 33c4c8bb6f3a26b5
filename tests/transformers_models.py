"""Small models of `transformers` by architecture: a config without weights, and a batch for it.

Widths are small, and different where they mean different things, so that a dim taken for another shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCABULARY, POSITIONS, WIDTH, HEADS = 96, 16, 32, 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "max_position_embeddings": 2 * POSITIONS, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
STILL = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
VISION: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 48,
    "image_size": 16, "patch_size": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
ENCODER = {
    **SIZES, "intermediate_size": 48, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "type_vocab_size": 2,
}  # fmt: skip


def tokens(rows: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (rows, POSITIONS))
    return {"input_ids": ids, "labels": ids.clone()}


def padded_tokens(rows: int) -> dict[str, torch.Tensor]:
    """Rows end sooner or later; what follows is neither attended to nor learnt."""
    batch = tokens(rows)
    mask = torch.arange(POSITIONS) < torch.randint(POSITIONS // 2, POSITIONS + 1, (rows, 1))
    labels = torch.where(mask, batch["labels"], -100)
    return {**batch, "attention_mask": mask.long(), "labels": labels}


def pairs_of_tokens(rows: int) -> dict[str, torch.Tensor]:
    return {**tokens(rows), "labels": torch.randint(3, VOCABULARY, (rows, POSITIONS // 2))}


def images(rows: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 16, 16), "labels": torch.randint(10, (rows,))}


def images_with_text(rows: int) -> dict[str, Any]:
    ids = torch.randint(3, VOCABULARY, (rows, POSITIONS))
    ids[:, -1] = 2
    return {"pixel_values": images(rows)["pixel_values"], "input_ids": ids}


def sound(rows: int) -> dict[str, torch.Tensor]:
    return {
        "input_features": torch.randn(rows, 8, 2 * POSITIONS),
        "labels": torch.randint(3, VOCABULARY, (rows, POSITIONS // 2)),
    }


@dataclass(frozen=True)
class Architecture:
    """A class of models, the sizes of its config, and what it is trained on."""

    model: str
    config: str
    sizes: dict[str, Any]
    batch: Callable[[int], Any] = tokens
    extra: dict[str, Any] = field(default_factory=dict)  # for a call of it

    def make(self) -> nn.Module:
        config = getattr(hf, self.config)(**self.sizes)
        return getattr(hf, self.model)(config).train()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return model(**batch, **self.extra).loss


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", {
        "vocab_size": VOCABULARY, "n_positions": 2 * POSITIONS, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS,
        "use_cache": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }),
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 8}),
    "mixtral": Architecture("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "qwen2-moe": Architecture("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {
        **GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    }),
    "qwen3-moe": Architecture("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {
        **GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    }),
    "gemma": Architecture("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 8}),
    "gemma2": Architecture("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 8}),
    "phi": Architecture("PhiForCausalLM", "PhiConfig", {
        **GROUPED, "num_key_value_heads": HEADS, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    }),
    "phi3": Architecture("Phi3ForCausalLM", "Phi3Config", {**GROUPED, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "olmo2": Architecture("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "gpt-neox": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SIZES, **STILL, "intermediate_size": 48}),
    "opt": Architecture("OPTForCausalLM", "OPTConfig", {
        **SIZES, "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "dropout": 0.0,
    }),
    "falcon": Architecture("FalconForCausalLM", "FalconConfig", {**SIZES, **STILL}),
    "gpt-oss": Architecture("GptOssForCausalLM", "GptOssConfig", {
        **GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
    }),
    "deepseek-v3": Architecture("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        **GROUPED, "num_key_value_heads": HEADS, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_group": 2,
        "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 12, "q_lora_rank": 20,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6, "n_shared_experts": 1,
    }),
    "bert": Architecture("BertForMaskedLM", "BertConfig", ENCODER, padded_tokens),
    "roberta": Architecture("RobertaForMaskedLM", "RobertaConfig", ENCODER, padded_tokens),
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": HEADS,
        "dropout_rate": 0.0, "use_cache": False, "decoder_start_token_id": 0,
    }, pairs_of_tokens),
    "vit": Architecture("ViTForImageClassification", "ViTConfig", {**VISION, "num_labels": 10}, images),
    "deit": Architecture("DeiTForImageClassification", "DeiTConfig", {**VISION, "num_labels": 10}, images),
    "clip": Architecture("CLIPModel", "CLIPConfig", {
        "projection_dim": 24,
        "text_config": {**SIZES, "intermediate_size": 48},
        "vision_config": {k: v for k, v in VISION.items() if "dropout" not in k},
    }, images_with_text, {"return_loss": True}),
    "whisper": Architecture("WhisperForConditionalGeneration", "WhisperConfig", {
        **SIZES, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
        "max_source_positions": POSITIONS, "max_target_positions": POSITIONS, "dropout": 0.0,
        "decoder_start_token_id": 1,
    }, sound),
}  # fmt: skip
