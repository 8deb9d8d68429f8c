//! What the config of a LoRA adapter says about how its factors are applied.

use super::{Patterns, PeftConfig, PeftError, PeftType, config::short, token_rows::TokenIndices};

/// Keys that change nothing about a finished adapter, and those that are read below.
const KNOWN: &[&str] = &[
    "alpha_pattern",
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
];
/// The same for an adapter of trainable tokens alone.
const KNOWN_OF_TOKENS: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_weights",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
    "token_indices",
];
/// Keys that name another method where they say anything, and the method.
const VARIANTS: &[(&str, &str)] = &[
    ("alora_invocation_tokens", "activated LoRA (aLoRA)"),
    ("arrow_config", "Arrow routing"),
    ("enable_lora", "LoRA on parts of a fused layer (`enable_lora`)"),
    ("kasa_config", "KaSA"),
    ("layer_replication", "layer replication"),
    ("megatron_config", "Megatron's parallel layers"),
    ("monteclora_config", "MonteCLoRA"),
    ("use_bdlora", "block-diagonal LoRA (BD-LoRA)"),
    ("use_qalora", "QALoRA"),
    ("velora_config", "VeLoRA"),
];
/// Ways to start an adapter that also change the base, so that the adapter alone does not make the tuned model.
const CHANGE_THE_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];
const KEEP_THE_BASE: [&str; 4] = ["gaussian", "eva", "orthogonal", "default"];

/// Which biases an adapter holds in full.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SavedBias {
    /// None.
    None,
    /// Those of the modules it adapts.
    Adapted,
    /// All of the model's.
    All,
}

/// The config of a LoRA adapter, checked.
#[derive(Clone, Debug)]
pub struct LoraConfig {
    /// Rank, where no pattern says otherwise.
    pub r: u64,
    /// Numerator of the scaling, where no pattern says otherwise.
    pub alpha: f64,
    /// Whether the scaling is `alpha / sqrt(r)` instead of `alpha / r`.
    pub use_rslora: bool,
    /// Whether every row is brought to a learned magnitude.
    pub use_dora: bool,
    /// Whether weights are stored as `[d_in, d_out]`.
    pub fan_in_fan_out: bool,
    /// Which biases are there in full.
    pub bias: SavedBias,
    /// Whether the second factor has a bias of its own.
    pub lora_bias: bool,
    /// Ranks by module.
    pub rank_pattern: Patterns<u64>,
    /// Numerators by module.
    pub alpha_pattern: Patterns<f64>,
    /// Parameters that are targeted by their own name, such as `mlp.experts.down_proj`.
    pub target_parameters: Vec<String>,
    /// The major and minor version of PEFT that wrote the adapter, where the config names it.
    pub peft_version: Option<(u64, u64)>,
    /// The class of the model that the adapter was trained on, where the config names it.
    pub base_class: Option<String>,
    /// What the model is for, where the config says it: `CAUSAL_LM`, `SEQ_CLS` and so on.
    pub task_type: Option<String>,
    /// What the base was called where the adapter was made.
    pub base: Option<String>,
    /// Rows of embeddings that are replaced.
    pub(super) token_indices: TokenIndices,
}

impl LoraConfig {
    /// Reads what matters; what is not implemented is refused by name.
    ///
    /// # Errors
    /// [`PeftError::Unsupported`] for another method or variant, [`PeftError::Config`] for a value that cannot be.
    pub fn of(config: &PeftConfig) -> Result<Self, PeftError> {
        // Trainable tokens by themselves are an adapter of no modules.
        let is_of_tokens = *config.peft_type() == PeftType::TrainableTokens;
        if !is_of_tokens {
            config.expect_type(&PeftType::Lora)?;
        }
        for (key, name) in VARIANTS {
            let is_set = config.keys().get(*key).is_some_and(|value| match value {
                serde_json::Value::Bool(set) => *set,
                serde_json::Value::Array(list) => !list.is_empty(),
                serde_json::Value::Object(map) => !map.is_empty() || *key != "megatron_config",
                _ => true,
            });
            if is_set {
                return Err(PeftError::unsupported(config.path(), format!("`{key}`: {name} is not supported")));
            }
        }
        refuse_changed_base(config)?;
        let known: Vec<&str> = KNOWN.iter().copied().chain(VARIANTS.iter().map(|(key, _)| *key)).collect();
        config.refuse_unknown(if is_of_tokens { KNOWN_OF_TOKENS } else { &known })?;
        let ranks = config.entries("rank_pattern")?.into_iter().map(|(pattern, value)| {
            let rank = value.as_u64().filter(|&r| r > 0);
            rank.map(|rank| (pattern, rank)).ok_or_else(|| {
                let what = format!("\"{pattern}\": a whole number above 0 is expected, found {}", short(value));
                config.bad("rank_pattern", &what)
            })
        });
        let alphas = config.entries("alpha_pattern")?.into_iter().map(|(pattern, value)| {
            let alpha = value.as_f64().filter(|alpha| alpha.is_finite());
            alpha.map(|alpha| (pattern, alpha)).ok_or_else(|| {
                let what = format!("\"{pattern}\": a finite number is expected, found {}", short(value));
                config.bad("alpha_pattern", &what)
            })
        });
        let rank_pattern = Patterns::new(ranks.collect::<Result<Vec<_>, _>>()?);
        let alpha_pattern = Patterns::new(alphas.collect::<Result<Vec<_>, _>>()?);
        Ok(Self {
            r: config.positive("r")?.unwrap_or(8),
            alpha: config.number("lora_alpha")?.unwrap_or(8.0),
            use_rslora: config.flag("use_rslora")?,
            use_dora: config.flag("use_dora")?,
            fan_in_fan_out: config.flag("fan_in_fan_out")?,
            bias: match config.text("bias")? {
                None | Some("none") => SavedBias::None,
                Some("lora_only") => SavedBias::Adapted,
                Some("all") => SavedBias::All,
                Some(_) => return Err(config.bad("bias", "\"none\", \"all\" or \"lora_only\" is expected")),
            },
            lora_bias: config.flag("lora_bias")?,
            rank_pattern: rank_pattern.map_err(|what| config.bad("rank_pattern", &what))?,
            alpha_pattern: alpha_pattern.map_err(|what| config.bad("alpha_pattern", &what))?,
            target_parameters: config.words("target_parameters")?.into_iter().map(str::to_owned).collect(),
            peft_version: config.text("peft_version")?.and_then(version),
            base_class: config
                .entries("auto_mapping")?
                .into_iter()
                .find_map(|(key, value)| (key == "base_model_class").then(|| value.as_str().map(str::to_owned))?),
            task_type: config.text("task_type")?.map(str::to_owned),
            base: config.text("base_model_name_or_path")?.filter(|base| !base.is_empty()).map(str::to_owned),
            token_indices: TokenIndices::of(config)?,
        })
    }

    /// The rank of a module, or of a parameter that is targeted by its own name.
    pub fn rank(&self, name: &str) -> u64 {
        self.rank_pattern.get(name).copied().unwrap_or(self.r)
    }

    /// What the product of a module's factors is multiplied by.
    pub fn scaling(&self, name: &str) -> f64 {
        let alpha = self.alpha_pattern.get(name).copied().unwrap_or(self.alpha);
        let r = self.rank(name) as f64;
        if self.use_rslora { alpha / r.sqrt() } else { alpha / r }
    }
}

/// The first two numbers of a version, such as `0.19.1.dev0`.
fn version(text: &str) -> Option<(u64, u64)> {
    let mut numbers = text.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn refuse_changed_base(config: &PeftConfig) -> Result<(), PeftError> {
    let key = "init_lora_weights";
    match config.keys().get(key) {
        None | Some(serde_json::Value::Bool(_)) => Ok(()),
        Some(serde_json::Value::String(how)) => {
            let how = how.to_lowercase();
            if KEEP_THE_BASE.contains(&how.as_str()) {
                return Ok(());
            }
            let what = match CHANGE_THE_BASE.iter().find(|start| how.starts_with(*start)) {
                Some(start) => format!(
                    "`{key}` is {start}, which also changes the base; convert the adapter to plain LoRA when saving it \
                     (`path_initial_model_for_weight_conversion`)"
                ),
                None => format!("`{key}` is {}, which is not supported", crate::checkpoint::Printable(&how)),
            };
            Err(PeftError::unsupported(config.path(), what))
        }
        Some(_) => Err(config.bad(key, "true, false or a string is expected")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(keys: &str) -> Result<LoraConfig, String> {
        let json = format!("{{\"peft_type\":\"LORA\"{keys}}}");
        let config = PeftConfig::parse("c".as_ref(), json.as_bytes()).unwrap();
        LoraConfig::of(&config).map_err(|e| e.to_string())
    }

    #[test]
    fn patterns_choose_rank_and_scaling() {
        let keys = r#","r":4,"lora_alpha":8,"rank_pattern":{"q_proj":2},"alpha_pattern":{"v_proj":3}"#;
        let config = read(keys).unwrap();
        assert_eq!([config.scaling("a.q_proj"), config.scaling("a.v_proj"), config.scaling("o")], [4.0, 0.75, 2.0]);
        let config = read(&format!("{keys},\"use_rslora\":true")).unwrap();
        assert_eq!([config.rank("a.q_proj"), config.rank("o")], [2, 4]);
        assert_eq!(config.scaling("o"), 4.0);
    }

    #[test]
    fn variants_are_refused_by_name() {
        for (keys, said) in [
            (r#","use_qalora":true"#, "QALoRA"),
            (r#","alora_invocation_tokens":[1,2]"#, "aLoRA"),
            (r#","kasa_config":{}"#, "KaSA"),
            (r#","use_bdlora":{"nblocks":2}"#, "BD-LoRA"),
            (r#","layer_replication":[[0,4],[2,5]]"#, "layer replication"),
            (r#","trainable_token_indices":[3,3]"#, "`trainable_token_indices`: row 3 comes twice"),
            (r#","trainable_token_indices":{"wte":[-1]}"#, "a list of whole numbers from 0 up is expected, found [-1]"),
            (r#","init_lora_weights":"pissa_niter_16""#, "pissa, which also changes the base"),
            (r#","init_lora_weights":"mica""#, "mica, which is not supported"),
            (r#","bias":"some""#, "`bias`: \"none\""),
            (r#","r":-1"#, "`r`: a whole number above 0"),
            (r#","r":1e400"#, "malformed"),
            (r#","rank_pattern":{"q":0.5}"#, "`rank_pattern`: \"q\": a whole number"),
            (r#","alpha_pattern":{"(":1}"#, "`alpha_pattern`: the pattern \"(\" cannot be used"),
            (r#","new_trick":1"#, "`new_trick`"),
        ] {
            let json = format!("{{\"peft_type\":\"LORA\"{keys}}}");
            let parsed = PeftConfig::parse("c".as_ref(), json.as_bytes());
            let found = parsed.and_then(|config| LoraConfig::of(&config)).map_err(|e| e.to_string()).unwrap_err();
            assert!(found.contains(said), "{keys}: {found}");
        }
        read(r#","use_qalora":false,"arrow_config":null,"megatron_core":"megatron.core","qalora_group_size":16"#)
            .unwrap();
    }
}
