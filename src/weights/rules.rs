//! What is known about model families, as data: one table for each question that the map of weights answers.
//!
//! To teach the map a new family, add lines here. Names are compared in their canonical form (see [`super::names`]): a rule is a
//! run of dotted words, `#` stands for a number.
//!
//! Sources: transformers 5.24 (`conversion_mapping.py`, `_tied_weights_keys`, `base_model_prefix`, `use_experts_implementation`,
//! the defaults of `tie_word_embeddings`) and PEFT 0.21 (`tuners/lora/layer.py`, `ParamWrapper`).

use super::Axes::{self, InOut, OutIn};

/// Words that wrap a model and say nothing about which part of it a weight belongs to: base models and text models inside
/// of larger ones. They are dropped from the front of names. Words that do tell parts apart (`encoder`, `visual`, `text_model`)
/// are not here.
pub(super) const WRAPPERS: &[&str] = &[
    "albert",
    "backbone",
    "base_model",
    "beit",
    "bert",
    "biogpt",
    "camembert",
    "data2vec_text",
    "deberta",
    "deit",
    "dinov2",
    "distilbert",
    "electra",
    "ernie",
    "esm",
    "gpt_neox",
    "gte",
    "hubert",
    "language_model",
    "led",
    "llm",
    "longformer",
    "model",
    "module",
    "mpnet",
    "nomic_bert",
    "roberta",
    "thinker",
    "transformer",
    "vit",
    "wav2vec2",
    "wavlm",
];

/// One of several names for the same thing, and the name that stands for all of them.
pub(super) struct NameRule {
    /// `model_type` of the families that the rule is for; empty for all of them.
    pub(super) model_types: &'static [&'static str],
    /// Mostly the name on disk.
    pub(super) from: &'static str,
    /// Mostly the name in memory, of transformers 5.
    pub(super) to: &'static str,
}

const fn all(from: &'static str, to: &'static str) -> NameRule {
    NameRule { model_types: &[], from, to }
}
const fn of(model_types: &'static [&'static str], from: &'static str, to: &'static str) -> NameRule {
    NameRule { model_types, from, to }
}

const DEEPSEEK_V4: &[&str] = &["deepseek_v4"];
const EXAONE: &[&str] = &["exaone"];
const KIMI_VL: &[&str] = &["kimi_k25"];
const NOMIC: &[&str] = &["nomic_bert"];
const STEP3: &[&str] = &["step3p5", "step3p7"];

/// Applied in this order, each as often as it fits.
pub(super) const RENAMES: &[NameRule] = &[
    // ViT and its kin, BERT and its kin, Swin, SegFormer.
    all("encoder.layer", "layers"),
    all("attention.attention.query", "attention.q_proj"),
    all("attention.attention.key", "attention.k_proj"),
    all("attention.attention.value", "attention.v_proj"),
    all("attention.self.query", "attention.q_proj"),
    all("attention.self.key", "attention.k_proj"),
    all("attention.self.value", "attention.v_proj"),
    all("attention.output.dense", "attention.o_proj"),
    all("intermediate.dense", "mlp.fc1"),
    all("output.dense", "mlp.fc2"),
    // CLIP, BART, DETR.
    all("out_proj", "o_proj"),
    all("layers.#.fc1", "layers.#.mlp.fc1"),
    all("layers.#.fc2", "layers.#.mlp.fc2"),
    all("vision_tower.vision_model", "vision_tower"),
    all("mlp.dense_h_to_4h", "mlp.fc1"),
    all("mlp.dense_4h_to_h", "mlp.fc2"),
    // Mixtral, MiniMax, PhiMoE, Granite MoE, Aria.
    all("block_sparse_moe", "mlp"),
    all("experts.#.w1", "experts.#.gate_proj"),
    all("experts.#.w2", "experts.#.down_proj"),
    all("experts.#.w3", "experts.#.up_proj"),
    all("mlp.input_linear.weight", "mlp.experts.gate_up_proj"),
    all("mlp.output_linear.weight", "mlp.experts.down_proj"),
    all("mlp.router.layer", "mlp.router"),
    all("experts.fc1.weight", "experts.gate_up_proj"),
    all("experts.fc2.weight", "experts.down_proj"),
    of(&["phimoe"], "mlp.gate", "mlp.router"),
    // GPT-NeoX since transformers 5.
    all("embed_out", "lm_head"),
    // One bias under two names.
    all("predictions.decoder.bias", "predictions.bias"),
    all("lm_head.decoder.bias", "lm_head.bias"),
    // Names that vision towers and projectors have in one version or another.
    all("mlp_AR", "projector"),
    of(KIMI_VL, "vision_tower.encoder", "vision_tower"),
    of(KIMI_VL, "blocks.#.wo", "blocks.#.attn.proj"),
    of(KIMI_VL, "blocks", "layers"),
    of(KIMI_VL, "mm_projector.proj.0", "mm_projector.in_proj"),
    of(KIMI_VL, "mm_projector.proj.2", "mm_projector.out_proj"),
    of(EXAONE, "wte", "embed_tokens"),
    of(EXAONE, "h.#", "layers.#"),
    of(EXAONE, "attn.attention", "self_attn"),
    of(EXAONE, "mlp.c_fc_0", "mlp.gate_proj"),
    of(EXAONE, "mlp.c_fc_1", "mlp.up_proj"),
    of(EXAONE, "mlp.c_proj", "mlp.down_proj"),
    of(NOMIC, "encoder.layers", "layers"),
    of(NOMIC, "attn.o_proj", "self_attn.o_proj"),
    of(NOMIC, "mlp.fc11", "mlp.up_proj"),
    of(NOMIC, "mlp.fc12", "mlp.gate_proj"),
    of(NOMIC, "mlp.fc2", "mlp.down_proj"),
    of(STEP3, "moe.gate", "mlp.gate"),
    of(STEP3, "share_expert", "mlp.shared_experts"),
    of(STEP3, "moe.down_proj.weight", "mlp.experts.down_proj"),
    of(&["hy_v4", "hy_v4_vl"], "linear_gate", "gate_proj"),
    of(&["inkling_mm_model", "inkling2", "inkling2_loop"], "unembed", "lm_head"),
    of(DEEPSEEK_V4, "attn", "self_attn"),
    of(DEEPSEEK_V4, "ffn", "mlp"),
    of(DEEPSEEK_V4, "embed.weight", "embed_tokens.weight"),
    of(DEEPSEEK_V4, "head.weight", "lm_head.weight"),
    of(DEEPSEEK_V4, "self_attn.wq_a", "self_attn.q_a_proj"),
    of(DEEPSEEK_V4, "self_attn.wq_b", "self_attn.q_b_proj"),
    of(DEEPSEEK_V4, "self_attn.wkv", "self_attn.kv_proj"),
    of(DEEPSEEK_V4, "self_attn.wo_a", "self_attn.o_a_proj"),
    of(DEEPSEEK_V4, "self_attn.wo_b", "self_attn.o_b_proj"),
    of(DEEPSEEK_V4, "shared_experts.w1", "shared_experts.gate_proj"),
    of(DEEPSEEK_V4, "shared_experts.w2", "shared_experts.down_proj"),
    of(DEEPSEEK_V4, "shared_experts.w3", "shared_experts.up_proj"),
];

/// A matrix whose rows are those of several modules, one below the other in equal shares: fused in memory and apart on disk, or
/// the other way round. Both names are ends of canonical names.
pub(super) struct Fused {
    pub(super) whole: &'static str,
    pub(super) parts: &'static [&'static str],
}

pub(super) const FUSED: &[Fused] = &[
    Fused { whole: "mlp.gate_up_proj", parts: &["mlp.gate_proj", "mlp.up_proj"] },
    Fused { whole: "mlp.weights_in", parts: &["mlp.gate_proj", "mlp.up_proj"] },
    Fused { whole: "attn.qkv", parts: &["attention.q_proj", "attention.k_proj", "attention.v_proj"] },
    Fused { whole: "attn.Wqkv", parts: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] },
    Fused {
        whole: "attn.gqkv_proj",
        parts: &["self_attn.gate_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    },
];

/// The projections of one expert that a stack of experts holds side by side, under the stack's name.
pub(super) const GATE_UP: (&str, [&str; 2]) = ("gate_up_proj", ["gate_proj", "up_proj"]);

// --- which way round

/// Modules that transformers' `Conv1D` stores as `[d_in, d_out]`, in these families and in those built from them.
pub(super) const CONV1D_KINDS: &[&str] = &["c_attn", "c_fc", "c_proj", "q_attn"];
pub(super) const CONV1D_MODELS: &[&str] =
    &["clvp", "clvp_decoder", "decision_transformer", "gpt-sw3", "gpt2", "imagegpt", "openai-gpt"];
/// Modules that are `nn.Linear` in every family.
pub(super) const LINEAR_KINDS: &[&str] = &[
    "classifier",
    "dense",
    "down_proj",
    "embed_tokens",
    "fc1",
    "fc2",
    "gate",
    "gate_proj",
    "gate_up_proj",
    "in_proj",
    "key",
    "k_proj",
    "kv_b_proj",
    "lm_head",
    "o_proj",
    "out_proj",
    "proj",
    "q_proj",
    "qkv",
    "qkv_proj",
    "query",
    "query_key_value",
    "router",
    "score",
    "up_proj",
    "v_proj",
    "value",
    "w1",
    "w2",
    "w3",
    "wo",
];
/// Families that have modules called as `Conv1D`s are, and store them as `[d_out, d_in]`.
pub(super) const LINEAR_MODELS: &[&str] =
    &["exaone", "gpt_bigcode", "jais2", "mpt", "starcoder2", "step3p5", "step3p7"];

/// How a family's stacks of experts lie.
pub(super) struct Stacks {
    pub(super) model_types: &'static [&'static str],
    /// Each expert on disk.
    pub(super) stored: Axes,
    /// How factors that PEFT 0.19 and later makes for the whole stack meet what is stored: it takes a parameter for
    /// `[E, d_out, d_in]` unless the module says `is_transposed`, and transformers may transpose when it loads.
    pub(super) factors: Axes,
    /// The same for factors of PEFT 0.17 and 0.18, which takes every parameter for `[E, d_in, d_out]`.
    pub(super) old_factors: Axes,
    /// Whether rows of gate and up alternate, so that neither is a run.
    pub(super) is_interleaved: bool,
}

pub(super) const STACKS: &[Stacks] = &[
    Stacks {
        model_types: &["gpt_oss", "openai_privacy_filter"],
        stored: InOut,
        factors: InOut,
        old_factors: InOut,
        is_interleaved: true,
    },
    Stacks {
        model_types: &["aria", "aria_text"],
        stored: InOut,
        factors: InOut,
        old_factors: InOut,
        is_interleaved: false,
    },
    Stacks {
        model_types: &["llama4", "llama4_text"],
        stored: InOut,
        factors: OutIn,
        old_factors: InOut,
        is_interleaved: false,
    },
    Stacks {
        model_types: &["qwen3_vl_moe", "qwen3_vl_moe_text"],
        stored: InOut,
        factors: InOut,
        old_factors: OutIn,
        is_interleaved: false,
    },
    // Everything else that transformers 5 holds as stacks.
    Stacks {
        model_types: &[
            "afmoe",
            "axk2",
            "beam",
            "cohere2_moe",
            "deepseek_ocr2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "deepseek_v4",
            "dots1",
            "ernie4_5_moe",
            "exaone_moe",
            "flex_olmo",
            "glm4_moe",
            "glm4_moe_lite",
            "glm4v_moe",
            "glm5_next",
            "glm_moe_dsa",
            "granitemoe",
            "granitemoehybrid",
            "granitemoeshared",
            "hunyuan_v1_moe",
            "jamba",
            "kimi_k25",
            "lfm2_moe",
            "longcat_flash",
            "mellum",
            "minimax",
            "minimax_m2",
            "minimax_m3_vl",
            "mixtral",
            "nemotron_h",
            "olmoe",
            "phimoe",
            "qwen2_moe",
            "qwen3_5_moe",
            "qwen3_5_moe_text",
            "qwen3_moe",
            "qwen3_next",
            "qwen3_omni_moe",
            "sarvam_mla",
            "solar_open",
        ],
        stored: OutIn,
        factors: OutIn,
        old_factors: InOut,
        is_interleaved: false,
    },
];

// --- ties

/// A table of token vectors and what is tied to it: ends of canonical names, without `.weight`. Heads lie beside the embedding or
/// further up in the model.
pub(super) struct Tie {
    pub(super) embedding: &'static str,
    /// Places where the same table is read as an embedding.
    pub(super) also: &'static [&'static str],
    /// Heads, which belong to the model only where its architecture has one.
    pub(super) heads: &'static [&'static str],
}

const HEAD: &[&str] = &["lm_head"];

/// The first that fits a stored tensor.
pub(super) const TIES: &[Tie] = &[
    // T5, BART and their kin: one table for encoder, decoder and head.
    Tie { embedding: "shared", also: &["encoder.embed_tokens", "decoder.embed_tokens"], heads: HEAD },
    // Whisper, OPT, Speech2Text.
    Tie {
        embedding: "decoder.embed_tokens",
        also: &[],
        heads: &["lm_head", "proj_out", "output_projection", "decoder.output_projection", "lm_head.o_proj"],
    },
    // BERT and its kin.
    Tie {
        embedding: "embeddings.word_embeddings",
        also: &[],
        heads: &[
            "cls.predictions.decoder",
            "lm_head.decoder",
            "predictions.decoder",
            "mlm_score.decoder",
            "generator_lm_head",
            "vocab_projector",
            "lm_head",
        ],
    },
    Tie { embedding: "embeddings.tok_embeddings", also: &[], heads: &["decoder", "lm_head"] },
    // Llama and most others; GPT-2; Bloom and Falcon; GPT-NeoX; Mamba and RWKV; GPT; XLNet.
    Tie { embedding: "embed_tokens", also: &[], heads: &["lm_head", "head.decoder", "output_projection"] },
    Tie { embedding: "wte", also: &[], heads: HEAD },
    Tie { embedding: "word_embeddings", also: &[], heads: HEAD },
    Tie { embedding: "embed_in", also: &[], heads: HEAD },
    Tie { embedding: "tok_embeddings", also: &[], heads: &["output", "lm_head"] },
    Tie { embedding: "tokens_embed", also: &[], heads: HEAD },
    Tie { embedding: "word_embedding", also: &[], heads: &["lm_loss"] },
    Tie { embedding: "embeddings", also: &[], heads: &["lm_head", "head", "pred_layer.proj"] },
    Tie { embedding: "w", also: &[], heads: HEAD },
];

/// Families whose configs tie head and embedding unless they say otherwise.
pub(super) const TIED_BY_DEFAULT: &[&str] = &[
    "albert",
    "aya_vision",
    "bart",
    "bert",
    "bert-generation",
    "big_bird",
    "bigbird_pegasus",
    "biogpt",
    "blenderbot",
    "blenderbot-small",
    "blip",
    "blip_text_model",
    "bloom",
    "camembert",
    "cohere",
    "cohere2",
    "cohere2_vision",
    "convbert",
    "ctrl",
    "data2vec-text",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "ernie",
    "esm",
    "falcon",
    "falcon_mamba",
    "flaubert",
    "florence2",
    "fnet",
    "funnel",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma3n",
    "gemma3n_text",
    "gpt-sw3",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox_japanese",
    "gte",
    "ibert",
    "jetmoe",
    "kosmos-2",
    "layoutlm",
    "led",
    "lfm2",
    "lfm2_moe",
    "longformer",
    "longt5",
    "luke",
    "lxmert",
    "m2m_100",
    "mamba",
    "marian",
    "mbart",
    "megatron-bert",
    "mobilebert",
    "modernbert",
    "modernbert-decoder",
    "moonshine",
    "mpnet",
    "mpt",
    "mra",
    "mt5",
    "mvp",
    "nllb-moe",
    "nomic_bert",
    "nystromformer",
    "openai-gpt",
    "opt",
    "paligemma",
    "pegasus",
    "pegasus_x",
    "plbart",
    "pop2piano",
    "prophetnet",
    "recurrent_gemma",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "seamless_m4t",
    "seamless_m4t_v2",
    "shieldgemma2",
    "smollm3",
    "speech_to_text",
    "speecht5",
    "squeezebert",
    "starcoder2",
    "switch_transformers",
    "t5",
    "t5gemma",
    "tapas",
    "trocr",
    "udop",
    "umt5",
    "vaultgemma",
    "vilt",
    "visual_bert",
    "whisper",
    "xglm",
    "xlm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xlnet",
    "xmod",
    "yoso",
    "zamba",
    "zamba2",
];

/// What names of architectures have in them where the model has no head over its vocabulary.
pub(super) const HEADLESS_ARCHITECTURES: &[&str] = &[
    "Classification",
    "QuestionAnswering",
    "MultipleChoice",
    "NextSentence",
    "EncoderModel",
    "Detection",
    "Segmentation",
    "Retrieval",
    "RewardModel",
];
/// Ends of names that bare models do not have, though they end with `Model`.
pub(super) const HEADED_MODELS: &[&str] =
    &["LMHeadModel", "DoubleHeadsModel", "EncoderDecoderModel", "ChatModel", "ChatGLMModel"];

/// Words in names of classes, and what the part of a model that such a class is may be called in a model of several parts.
pub(super) const PARTS: &[(&str, &[&str])] = &[
    ("Text", &["text_model", "text_encoder"]),
    ("Vision", &["vision_model", "vision_tower", "visual"]),
    ("Audio", &["audio_model", "audio_tower"]),
];

/// Kinds of modules that are embeddings.
pub(super) const EMBEDDINGS: &[&str] = &[
    "embed_in",
    "embed_positions",
    "embed_tokens",
    "position_embeddings",
    "shared",
    "tok_embeddings",
    "token_type_embeddings",
    "word_embeddings",
    "wpe",
    "wte",
];

/// Words in modules' names that are embeddings, heads over a vocabulary or over classes, or norms: `all-linear` leaves them out.
pub(super) const NOT_LINEAR: &[&str] = &[
    "embed_tokens",
    "tok_embeddings",
    "wte",
    "wpe",
    "embeddings",
    "embed_in",
    "lm_head",
    "embed_out",
    "output_layer",
    "score",
    "classifier",
    "norm",
];
