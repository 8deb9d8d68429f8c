"""The tiny models of the matrix: one entry for each family, all weights random and seeded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
import transformers as tf
from torch.nn import Module

if not torch.cuda.is_available():
    # Some builds of PyTorch crash where they are asked this on a machine without a GPU.
    torch.cuda.is_current_stream_capturing = lambda: False

VOCAB = 96
HIDDEN = 32
INNER = 48
IMAGE_TOKEN = 90


@dataclass
class Family:
    """How to build a tiny model, what to feed it, and which of its modules the forms of the matrix train."""

    build: Callable[[], Module]
    inputs: Callable[[], dict]
    # The fields of the model's answer that are compared.
    outputs: tuple[str, ...] = ("logits",)
    task: str | None = "CAUSAL_LM"
    # Names as PEFT takes them: the ends of module names.
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    regex: str | None = None
    embedding: str | None = "embed_tokens"
    head: str | None = "lm_head"
    # Parameters that hold all experts of a layer, the router, and a plain weight, as `target_parameters` names them.
    experts: tuple[str, ...] = ()
    router: str | None = None
    plain: str | None = None
    # Parts that have a model class of their own, which people train alone.
    towers: dict[str, Tower] = field(default_factory=dict)


@dataclass
class Tower:
    """A part of a model: the model class that holds it alone, and how it goes back where it was taken from."""

    # Takes the whole model and the folder it was loaded from, and gives the part as a model of its own.
    take: Callable[[Module, Path], Module]
    # Puts the part, which was trained, into the whole model.
    graft: Callable[[Module, Module], None]
    task: str | None = "CAUSAL_LM"
    attention: tuple[str, ...] | None = None


def causal_ids(rows: int = 2, length: int = 9, low: int = 4, high: int = 80) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(low, high, (rows, length), generator=generator)


def text_inputs() -> dict:
    return {"input_ids": causal_ids()}


def pixels(size: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(12))


def llama_like(**more) -> dict:
    """The settings that all models of the Llama kind share."""
    base = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    base.update(more)
    return base


def make(model_class, config_class, **settings) -> Callable[[], Module]:
    return lambda: model_class(config_class(**settings))


def copied(part: Module, *sources: tuple[str, Module]) -> Module:
    """`part` with the weights of the modules that are named beside the places where it has them."""
    for place, source in sources:
        part.get_submodule(place).load_state_dict(source.state_dict())
    return part.eval()


def causal_text(model_class) -> Tower:
    """The text tower of a model with images, with its head: a causal language model."""

    def take(model: Module, folder: Path) -> Module:
        config = model.config.text_config
        config.tie_word_embeddings = model.config.tie_word_embeddings
        inner = ("model", model.model.language_model)
        return copied(model_class(config), inner, ("lm_head", model.lm_head))

    def graft(model: Module, part: Module) -> None:
        model.model.language_model = part.model
        model.lm_head = part.lm_head

    return Tower(take, graft)


def child(path: str, task: str | None, attention: tuple[str, ...] | None = None) -> Tower:
    """A module of the whole model that is a model itself."""

    def take(model: Module, folder: Path) -> Module:
        source = model.get_submodule(path)
        return copied(type(source)(source.config), ("", source))

    def graft(model: Module, part: Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, part)

    return Tower(take, graft, task, attention)


def encoder_of_t5() -> Tower:
    def graft(model: Module, part: Module) -> None:
        model.encoder = part.encoder

    return Tower(lambda model, folder: tf.T5EncoderModel.from_pretrained(folder), graft, "FEATURE_EXTRACTION")


FAMILIES: dict[str, Family] = {}

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
FAMILIES["qwen2.5-vl"] = Family(
    build=lambda: tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(
            text_config=llama_like(
                rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
            ),
            vision_config={**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
            **QWEN_TOKENS,
        )
    ),
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
FAMILIES["qwen3-vl"] = Family(
    build=lambda: tf.Qwen3VLForConditionalGeneration(
        tf.Qwen3VLConfig(
            text_config=llama_like(
                head_dim=8,
                rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
            ),
            vision_config={**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            **QWEN_TOKENS,
        )
    ),
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


def build(name: str) -> Module:
    """The family's model. Every weight is shaken, so that no bias is zero and no norm is one."""
    torch.manual_seed(1000 + sum(map(ord, name)))
    model = FAMILIES[name].build().float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if parameter.dim() > 1 else 0.05))
    return model
