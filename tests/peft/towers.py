"""Families of more than one tower."""

from __future__ import annotations

from typing import Callable

import torch
import transformers as tf

from family import *  # noqa: F403: the words that all descriptions share

# More than one tower ------------------------------------------------------------------------------------------------

CLIP_VISION = dict(
    hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=3, num_attention_heads=4, image_size=16,
    patch_size=8, projection_dim=24,
)

FAMILIES["clip"] = Family(
    build=lambda: tf.CLIPModel(
        tf.CLIPConfig(
            text_config=dict(
                vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=64, projection_dim=24, pad_token_id=0, bos_token_id=1,
                eos_token_id=2,
            ),
            vision_config=CLIP_VISION,
            projection_dim=24,
        )
    ),
    inputs=lambda: {
        "input_ids": torch.cat([causal_ids(), torch.full((2, 1), 2)], 1),
        "pixel_values": pixels(16),
        "attention_mask": torch.ones(2, 10, dtype=torch.long),
    },
    outputs=("logits_per_image", "logits_per_text"),
    task=None,
    attention=("q_proj", "k_proj", "v_proj", "out_proj"),
    regex=r"vision_model.*layers\.0\.mlp\.fc[12]",
    embedding="token_embedding",
    head="visual_projection",
    plain="mlp.fc1.weight",
    towers={"text": child("text_model", None), "vision": child("vision_model", None)},
)


def vlm_ids(images: int, rows: int = 1) -> torch.Tensor:
    ids = causal_ids(rows=rows, length=8)
    holes = torch.full((rows, images), IMAGE_TOKEN)
    return torch.cat([ids[:, :3], holes, ids[:, 3:]], 1)


FAMILIES["llava"] = Family(
    build=lambda: tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**CLIP_VISION),
            text_config=tf.LlamaConfig(**llama_like()),
            image_token_index=IMAGE_TOKEN,
            image_seq_length=4,
            tie_word_embeddings=False,
        )
    ),
    inputs=lambda: {"input_ids": vlm_ids(4), "pixel_values": pixels(16, 1)},
    task=None,
    regex=r".*language_model\..*\.(q|v)_proj",
    plain="mlp.down_proj.weight",
    towers={
        "text": causal_text(tf.LlamaForCausalLM),
        "vision": child("model.vision_tower", None, ("q_proj", "v_proj")),
    },
)

QWEN_VISION = dict(
    depth=2, hidden_size=HIDDEN, intermediate_size=INNER, num_heads=4, in_channels=3, patch_size=8,
    spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=HIDDEN,
)


def qwen_image() -> dict:
    """One image of four by four patches, which become four tokens."""
    patches = torch.randn(16, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(14))
    ids = vlm_ids(4)
    ids[0, 2] = 91
    return {
        "input_ids": ids,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
    }


QWEN_TOKENS = dict(
    image_token_id=IMAGE_TOKEN, video_token_id=93, vision_start_token_id=91, vision_end_token_id=92,
    tie_word_embeddings=False,
)
def qwen_vl(build: Callable[[], Module]) -> Family:
    """Both generations have the same modules."""
    return Family(
        build=build,
        inputs=qwen_image,
        task=None,
        attention=("q_proj", "k_proj", "v_proj", "o_proj", "qkv"),
        regex=r".*visual\.blocks\.0\.attn\.(qkv|proj)",
        plain="self_attn.q_proj.weight",
        towers={
            "text": child("model.language_model", "FEATURE_EXTRACTION", ("q_proj", "k_proj", "v_proj", "o_proj")),
            "vision": child("model.visual", None, ("qkv",)),
        },
    )


FAMILIES["qwen2.5-vl"] = qwen_vl(
    lambda: tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(
            text_config=llama_like(
                rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
            ),
            vision_config={**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
            **QWEN_TOKENS,
        )
    ),
)
FAMILIES["qwen3-vl"] = qwen_vl(
    lambda: tf.Qwen3VLForConditionalGeneration(
        tf.Qwen3VLConfig(
            text_config=llama_like(
                head_dim=8,
                rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
            ),
            vision_config={**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            **QWEN_TOKENS,
        )
    ),
)
FAMILIES["gemma3-vlm"] = Family(
    build=lambda: tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            text_config=llama_like(
                head_dim=8, tie_word_embeddings=True, query_pre_attn_scalar=8, sliding_window=32
            ),
            vision_config=dict(
                hidden_size=24, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4, image_size=32,
                patch_size=8, model_type="siglip_vision_model", vision_use_head=False,
            ),
            mm_tokens_per_image=4,
            image_token_index=IMAGE_TOKEN,
            image_token_id=IMAGE_TOKEN,
            boi_token_index=91,
            eoi_token_index=92,
            pad_token_id=0,
        )
    ),
    inputs=lambda: {
        "input_ids": vlm_ids(4),
        "pixel_values": pixels(32, 1),
        "token_type_ids": (vlm_ids(4) == IMAGE_TOKEN).long(),
    },
    task=None,
    attention=("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"),
    regex=r".*vision.*layers\.0\.self_attn\.(q|v)_proj",
    plain="mlp.down_proj.weight",
    towers={
        "text": causal_text(tf.Gemma3ForCausalLM),
        "vision": child("model.vision_tower", None, ("q_proj", "v_proj")),
    },
)
