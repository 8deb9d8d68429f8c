"""Families that are one decoder."""

from __future__ import annotations

import transformers as tf

from family import *  # noqa: F403: the words that all descriptions share

# Decoders ---------------------------------------------------------------------------------------------------------

FAMILIES["llama"] = Family(
    build=make(tf.LlamaForCausalLM, tf.LlamaConfig, **llama_like()),
    inputs=text_inputs,
    regex=r".*layers\.1\.self_attn\.(q|v)_proj",
    plain="mlp.down_proj.weight",
)
FAMILIES["llama-tied"] = Family(
    build=make(tf.LlamaForCausalLM, tf.LlamaConfig, **llama_like(tie_word_embeddings=True)),
    inputs=text_inputs,
    regex=r".*layers\.1\.self_attn\.(q|v)_proj",
    plain="mlp.down_proj.weight",
)
FAMILIES["llama-classifier"] = Family(
    build=lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**llama_like(), num_labels=5)),
    inputs=text_inputs,
    task="SEQ_CLS",
    regex=r".*layers\.1\.self_attn\.(q|v)_proj",
    head="score",
    plain="mlp.down_proj.weight",
)
FAMILIES["mistral"] = Family(
    build=make(tf.MistralForCausalLM, tf.MistralConfig, **llama_like(sliding_window=None)),
    inputs=text_inputs,
    regex=r".*layers\.0\.mlp\.(gate|down)_proj",
    plain="self_attn.q_proj.weight",
)
FAMILIES["qwen2-tied"] = Family(
    build=make(tf.Qwen2ForCausalLM, tf.Qwen2Config, **llama_like(tie_word_embeddings=True)),
    inputs=text_inputs,
    regex=r".*layers\.0\.mlp\.(gate|down)_proj",
    plain="self_attn.q_proj.weight",
)
FAMILIES["qwen3"] = Family(
    build=make(tf.Qwen3ForCausalLM, tf.Qwen3Config, **llama_like(head_dim=16)),
    inputs=text_inputs,
    regex=r".*layers\.0\.mlp\.(gate|down)_proj",
    plain="self_attn.q_proj.weight",
)
FAMILIES["gemma2"] = Family(
    build=make(
        tf.Gemma2ForCausalLM,
        tf.Gemma2Config,
        **llama_like(head_dim=8, tie_word_embeddings=True, query_pre_attn_scalar=8, sliding_window=32),
    ),
    inputs=text_inputs,
    regex=r".*layers\.0\.mlp\.(gate|down)_proj",
    plain="mlp.down_proj.weight",
)
FAMILIES["gemma3-text"] = Family(
    build=make(
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig,
        **llama_like(head_dim=8, tie_word_embeddings=True, query_pre_attn_scalar=8, sliding_window=32),
    ),
    inputs=text_inputs,
    regex=r".*layers\.0\.mlp\.(gate|down)_proj",
    plain="mlp.down_proj.weight",
)
FAMILIES["phi3"] = Family(
    build=make(tf.Phi3ForCausalLM, tf.Phi3Config, **llama_like()),
    inputs=text_inputs,
    attention=("qkv_proj", "o_proj"),
    regex=r".*layers\.0\.mlp\.(gate_up|down)_proj",
    plain="mlp.gate_up_proj.weight",
)
FAMILIES["olmo2"] = Family(
    build=make(tf.Olmo2ForCausalLM, tf.Olmo2Config, **llama_like()),
    inputs=text_inputs,
    regex=r".*layers\.0\.mlp\.(gate|down)_proj",
    plain="mlp.down_proj.weight",
)
FAMILIES["glm4"] = Family(
    build=make(tf.Glm4ForCausalLM, tf.Glm4Config, **llama_like(head_dim=8, attention_bias=True)),
    inputs=text_inputs,
    regex=r".*layers\.0\.mlp\.(gate_up|down)_proj",
    plain="mlp.gate_up_proj.weight",
)

# Mixtures of experts ------------------------------------------------------------------------------------------------

STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

FAMILIES["mixtral"] = Family(
    build=make(
        tf.MixtralForCausalLM,
        tf.MixtralConfig,
        **llama_like(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    ),
    inputs=text_inputs,
    regex=r".*layers\.0\.self_attn\.(q|v)_proj",
    experts=STACKS,
    router="mlp.gate.weight",
    plain="self_attn.q_proj.weight",
)
FAMILIES["qwen3-moe"] = Family(
    build=make(
        tf.Qwen3MoeForCausalLM,
        tf.Qwen3MoeConfig,
        **llama_like(
            head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1,
            mlp_only_layers=[0],
        ),
    ),
    inputs=text_inputs,
    regex=r".*layers\.0\.mlp\.(gate|up|down)_proj",
    experts=STACKS,
    router="mlp.gate.weight",
    plain="self_attn.q_proj.weight",
)
FAMILIES["olmoe"] = Family(
    build=make(tf.OlmoeForCausalLM, tf.OlmoeConfig, **llama_like(num_experts=4, num_experts_per_tok=2)),
    inputs=text_inputs,
    regex=r".*layers\.0\.self_attn\.(q|v)_proj",
    experts=STACKS,
    router="mlp.gate.weight",
    plain="self_attn.q_proj.weight",
)
FAMILIES["deepseek-v3"] = Family(
    build=make(
        tf.DeepseekV3ForCausalLM,
        tf.DeepseekV3Config,
        **llama_like(
            num_key_value_heads=4, moe_intermediate_size=24, n_shared_experts=1, n_routed_experts=4, n_group=2,
            topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=24,
            qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8,
        ),
    ),
    inputs=text_inputs,
    attention=("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    regex=r".*layers\.1\.mlp\.shared_experts\.(gate|up|down)_proj",
    experts=STACKS,
    router="mlp.gate.weight",
    plain="self_attn.kv_b_proj.weight",
)


def gpt_oss(inner: int) -> Family:
    return Family(
        build=make(
            tf.GptOssForCausalLM,
            tf.GptOssConfig,
            **llama_like(
                intermediate_size=inner, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=32,
            ),
        ),
        inputs=text_inputs,
        regex=r".*layers\.0\.self_attn\.(q|v)_proj",
        experts=STACKS,
        router="mlp.router.weight",
        plain="self_attn.q_proj.weight",
    )


FAMILIES["gpt-oss"] = gpt_oss(INNER)
FAMILIES["gpt-oss-square"] = gpt_oss(HIDDEN)

# Decoders with names of their own -----------------------------------------------------------------------------------


def gpt2(tied: bool) -> Family:
    return Family(
        build=make(
            tf.GPT2LMHeadModel, tf.GPT2Config, vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64,
            bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
        ),
        inputs=text_inputs,
        attention=("c_attn", "attn.c_proj"),
        regex=r".*h\.0\.mlp\.c_(fc|proj)",
        embedding="wte",
        plain="mlp.c_fc.weight",
    )


FAMILIES["gpt2"] = gpt2(tied=True)
# Adapters of its head mix weights that are stored the other way round with one that is not.
FAMILIES["gpt2-untied"] = gpt2(tied=False)
FAMILIES["gpt-neox"] = Family(
    build=make(
        tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
    ),
    inputs=text_inputs,
    attention=("query_key_value", "attention.dense"),
    regex=r".*layers\.0\.mlp\.dense_.*",
    embedding="embed_in",
    head="embed_out",
    plain="mlp.dense_h_to_4h.weight",
)
FAMILIES["opt"] = Family(
    build=make(
        tf.OPTForCausalLM, tf.OPTConfig, vocab_size=VOCAB, hidden_size=HIDDEN, ffn_dim=INNER, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=HIDDEN, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    ),
    inputs=text_inputs,
    attention=("q_proj", "k_proj", "v_proj", "out_proj"),
    regex=r".*layers\.0\.fc[12]",
    plain="fc1.weight",
)
FAMILIES["bloom"] = Family(
    build=make(
        tf.BloomForCausalLM, tf.BloomConfig, vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=2, n_head=4,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    inputs=text_inputs,
    attention=("query_key_value", "self_attention.dense"),
    regex=r".*h\.0\.mlp\.dense_.*",
    embedding="word_embeddings",
    plain="mlp.dense_h_to_4h.weight",
)
FAMILIES["falcon"] = Family(
    build=make(
        tf.FalconForCausalLM, tf.FalconConfig, vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    inputs=text_inputs,
    attention=("query_key_value", "self_attention.dense"),
    regex=r".*h\.0\.mlp\.dense_.*",
    embedding="word_embeddings",
    plain="mlp.dense_h_to_4h.weight",
)
FAMILIES["mamba"] = Family(
    build=make(
        tf.MambaForCausalLM, tf.MambaConfig, vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, state_size=4,
        time_step_rank=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    inputs=text_inputs,
    attention=("in_proj", "x_proj"),
    regex=r".*layers\.0\.mixer\.(in|x)_proj",
    embedding="embeddings",
    plain="mixer.x_proj.weight",
)
