"""Encoders, and encoders with decoders."""

from __future__ import annotations

import torch
import transformers as tf
from torch.nn import Module

from family import *  # noqa: F403: the words that all descriptions share

# Encoders -----------------------------------------------------------------------------------------------------------

BERT = dict(
    vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, type_vocab_size=2, pad_token_id=0,
)
BERT_ATTENTION = ("query", "key", "value", "attention.output.dense")

FAMILIES["bert-mlm"] = Family(
    build=make(tf.BertForMaskedLM, tf.BertConfig, **BERT),
    inputs=text_inputs,
    task=None,
    attention=BERT_ATTENTION,
    regex=r".*encoder\.layer\.0\.(intermediate|output)\.dense",
    embedding="word_embeddings",
    head="cls.predictions.decoder",
    plain="intermediate.dense.weight",
)
FAMILIES["bert-bare"] = Family(
    build=make(tf.BertModel, tf.BertConfig, **BERT),
    inputs=text_inputs,
    outputs=("last_hidden_state",),
    task="FEATURE_EXTRACTION",
    attention=BERT_ATTENTION,
    regex=r".*encoder\.layer\.0\.(intermediate|output)\.dense",
    embedding="word_embeddings",
    head=None,
    plain="intermediate.dense.weight",
)
FAMILIES["bert-classifier"] = Family(
    build=lambda: tf.BertForSequenceClassification(tf.BertConfig(**BERT, num_labels=5)),
    inputs=text_inputs,
    task="SEQ_CLS",
    attention=BERT_ATTENTION,
    regex=r".*encoder\.layer\.0\.(intermediate|output)\.dense",
    embedding="word_embeddings",
    head="classifier",
    plain="intermediate.dense.weight",
)
FAMILIES["roberta-mlm"] = Family(
    build=make(
        tf.RobertaForMaskedLM, tf.RobertaConfig,
        **{**BERT, "pad_token_id": 1, "type_vocab_size": 1, "bos_token_id": 0, "eos_token_id": 2},
    ),
    inputs=text_inputs,
    task=None,
    attention=BERT_ATTENTION,
    regex=r".*encoder\.layer\.0\.(intermediate|output)\.dense",
    embedding="word_embeddings",
    head="lm_head.decoder",
    plain="intermediate.dense.weight",
)
FAMILIES["vit"] = Family(
    build=lambda: tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, image_size=16,
            patch_size=8, num_labels=7,
        )
    ),
    inputs=lambda: {"pixel_values": pixels(16)},
    task=None,
    regex=r".*layers\.0\.mlp\.fc[12]",
    embedding=None,
    head="classifier",
    plain="mlp.fc1.weight",
)

# Encoders with decoders ---------------------------------------------------------------------------------------------


def seq2seq_inputs() -> dict:
    return {"input_ids": causal_ids(), "decoder_input_ids": causal_ids(length=6, low=10)}


FAMILIES["t5"] = Family(
    build=make(
        tf.T5ForConditionalGeneration, tf.T5Config, vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=INNER, num_layers=2,
        num_heads=4, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    ),
    inputs=seq2seq_inputs,
    task="SEQ_2_SEQ_LM",
    attention=("q", "k", "v", "o"),
    regex=r".*decoder.*EncDecAttention\.(q|v)",
    plain="SelfAttention.q.weight",
    towers={"text": encoder_of_t5()},
)


def untied_t5() -> Module:
    """As Flan-T5: the head has weights of its own."""
    config = tf.T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=INNER, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )
    model = tf.T5ForConditionalGeneration(config)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN))
    return model


FAMILIES["t5-untied"] = Family(
    build=untied_t5,
    inputs=seq2seq_inputs,
    task="SEQ_2_SEQ_LM",
    attention=("q", "k", "v", "o"),
    regex=r".*encoder.*DenseReluDense\.wi_[01]",
    plain="SelfAttention.q.weight",
)
FAMILIES["bart"] = Family(
    build=make(
        tf.BartForConditionalGeneration, tf.BartConfig, vocab_size=VOCAB, d_model=HIDDEN, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=2,
    ),
    inputs=seq2seq_inputs,
    task="SEQ_2_SEQ_LM",
    attention=("q_proj", "k_proj", "v_proj", "out_proj"),
    regex=r".*decoder.*encoder_attn\.(q|v)_proj",
    plain="fc1.weight",
)
FAMILIES["whisper"] = Family(
    build=make(
        tf.WhisperForConditionalGeneration, tf.WhisperConfig, vocab_size=VOCAB, d_model=HIDDEN, num_mel_bins=8,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, max_source_positions=12, max_target_positions=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, begin_suppress_tokens=None, suppress_tokens=None,
    ),
    inputs=lambda: {
        "input_features": torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(13)),
        "decoder_input_ids": causal_ids(length=6, low=10),
    },
    task=None,
    attention=("q_proj", "k_proj", "v_proj", "out_proj"),
    regex=r".*decoder.*encoder_attn\.(q|v)_proj",
    head="proj_out",
    plain="fc1.weight",
)


def captioner() -> Module:
    eye = tf.ViTConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4, image_size=16,
        patch_size=8,
    )
    mouth = tf.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
        is_decoder=True, add_cross_attention=True,
    )
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(eye, mouth)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return tf.VisionEncoderDecoderModel(config)


FAMILIES["captioner"] = Family(
    build=captioner,
    inputs=lambda: {"pixel_values": pixels(16), "decoder_input_ids": causal_ids(length=6)},
    task=None,
    attention=("c_attn", "q_attn", "crossattention.c_proj"),
    regex=r"decoder.*crossattention\.(c|q)_attn",
    embedding="wte",
    plain="mlp.c_fc.weight",
    towers={
        "text": child("decoder", "CAUSAL_LM"),
        "vision": child("encoder", "FEATURE_EXTRACTION", ("q_proj", "v_proj")),
    },
)
