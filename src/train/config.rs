//! Reads and checks `config.json`: the model shapes that the passes need.

use serde_json::{Map, Value};

use super::TrainError;
use crate::checkpoint::{Checkpoint, Printable};

/// The values of `model_type` that the passes support.
pub const ARCHITECTURES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// Upper limit of every size in the configuration.
const MAX_SIZE: u64 = 1 << 24;

/// The shape of a decoder of the Llama family.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelConfig {
    /// `model_type` of `config.json`, one of [`ARCHITECTURES`].
    pub model_type: String,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the feed-forward part.
    pub d_ff: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// How attention is split into heads.
    pub heads: Heads,
    /// Rows of the embedding table and of the head.
    pub n_vocab: usize,
    /// Added to the mean square in every RMS norm.
    pub norm_eps: f32,
    /// The rotary position embeddings.
    pub rope: Rope,
    /// Whether the head shares the embedding table.
    pub is_tied: bool,
    /// Whether queries and keys have their own norms (Qwen3).
    pub has_head_norms: bool,
    /// The maximum number of tokens in an example: the model's own limit, or its attention window if that is shorter.
    pub max_positions: usize,
}

/// How a token's queries, keys and values are laid out in one row: `[q | k | v]`, one head after another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heads {
    /// Query heads.
    pub n_q: usize,
    /// Key and value heads; each serves `n_q / n_kv` query heads.
    pub n_kv: usize,
    /// Width of a head.
    pub d_head: usize,
}

impl Heads {
    /// Width of the queries: `n_q * d_head`.
    pub fn d_q(&self) -> usize {
        self.n_q * self.d_head
    }
    /// Width of the keys, and of the values: `n_kv * d_head`.
    pub fn d_kv(&self) -> usize {
        self.n_kv * self.d_head
    }
    /// Width of a whole row.
    pub fn d_qkv(&self) -> usize {
        self.d_q() + 2 * self.d_kv()
    }
    /// Query heads for each key head.
    pub fn group(&self) -> usize {
        self.n_q / self.n_kv
    }
}

/// Rotary position embeddings.
#[derive(Clone, PartialEq, Debug)]
pub struct Rope {
    /// The base of the frequencies.
    pub theta: f64,
    /// How the frequencies are scaled for longer contexts.
    pub scaling: RopeScaling,
}

/// The scaling of a model's rotary frequencies for longer contexts.
#[derive(Clone, PartialEq, Debug)]
pub enum RopeScaling {
    /// No scaling.
    Default,
    /// All frequencies are divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies are divided by a factor, high ones are kept, those in between are interpolated.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Wavelengths above `original / low` are low frequencies.
        low: f64,
        /// Wavelengths below `original / high` are high frequencies.
        high: f64,
        /// The context length before scaling, in positions.
        original: f64,
    },
}

impl Rope {
    /// `[d_head / 2]` radians per position.
    ///
    /// Source: transformers, `modeling_rope_utils.py` (the meaning of the fields).
    pub fn frequencies(&self, d_head: usize) -> Vec<f32> {
        (0..d_head / 2)
            .map(|i| {
                let plain = self.theta.powf(-2.0 * i as f64 / d_head as f64);
                let scaled = match self.scaling {
                    RopeScaling::Default => plain,
                    RopeScaling::Linear { factor } => plain / factor,
                    RopeScaling::Llama3 { factor, low, high, original } => {
                        let rotations = original * plain / std::f64::consts::TAU;
                        let fraction = ((rotations - low) / (high - low)).clamp(0.0, 1.0);
                        (1.0 - fraction) * plain / factor + fraction * plain
                    }
                };
                scaled as f32
            })
            .collect()
    }
}

impl ModelConfig {
    /// Rows of all matrices inside the layers.
    pub fn n_rows(&self) -> usize {
        (self.heads.d_qkv() + 2 * self.d_ff + 2 * self.d_model) * self.n_layers
    }

    /// Reads the configuration of `checkpoint`, in the form that transformers 5 writes (`rope_parameters`) or in the
    /// older one (`rope_theta`, `rope_scaling`).
    ///
    /// # Errors
    /// [`TrainError::Architecture`] lists the supported model types; [`TrainError::Config`] names the field that is
    /// missing or whose value the passes do not support.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, TrainError> {
        let model_type = checkpoint.model_type().unwrap_or_default();
        if !ARCHITECTURES.contains(&model_type) {
            return Err(TrainError::Architecture { path: checkpoint.root().to_owned(), found: model_type.to_owned() });
        }
        Self::read(model_type, checkpoint.config())
            .map_err(|what| TrainError::Config { path: checkpoint.root().join("config.json"), what })
    }

    fn read(model_type: &str, config: &Map<String, Value>) -> Result<Self, String> {
        let fields = Fields(config);
        let (d_model, n_q) = (fields.size("hidden_size")?, fields.size("num_attention_heads")?);
        let n_kv = fields.size_or("num_key_value_heads", n_q)?;
        if fields.present("head_dim").is_none() && d_model % n_q != 0 {
            return Err(format!("`hidden_size` is {d_model}, expected a multiple of `num_attention_heads` ({n_q})"));
        }
        let d_head = fields.size_or("head_dim", d_model / n_q)?;
        if n_q % n_kv != 0 {
            return Err(format!(
                "`num_key_value_heads` is {n_kv}: {n_q} attention heads cannot share {n_kv} key heads evenly"
            ));
        }
        if d_head % 2 != 0 {
            return Err(format!("`head_dim` is {d_head}, expected an even number"));
        }
        fields.is("hidden_act", "silu", &["silu", "swish"])?;
        let max_positions = fields.size_or("max_position_embeddings", MAX_SIZE as usize)?;
        let window = match config.get("sliding_window") {
            Some(Value::Number(_)) if fields.flag("use_sliding_window", model_type == "mistral")? => {
                fields.size("sliding_window")?
            }
            _ => usize::MAX,
        };
        let rope = Rope::read(config)?;
        if rope.frequencies(d_head).iter().any(|frequency| !frequency.is_finite()) {
            return Err(format!("`rope_theta` is {}: some rotation frequencies are not finite", rope.theta));
        }
        Ok(Self {
            model_type: model_type.to_owned(),
            d_model,
            d_ff: fields.size("intermediate_size")?,
            n_layers: fields.size("num_hidden_layers")?,
            heads: Heads { n_q, n_kv, d_head },
            n_vocab: fields.size("vocab_size")?,
            norm_eps: fields.positive_or("rms_norm_eps", 1e-6)? as f32,
            rope,
            is_tied: fields.flag("tie_word_embeddings", false)?,
            has_head_norms: model_type == "qwen3",
            max_positions: max_positions.min(window),
        })
    }
}

impl Rope {
    fn read(config: &Map<String, Value>) -> Result<Self, String> {
        let object = |name: &str| match config.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(fields)),
            Some(other) => Err(format!("`{name}` is {other}, expected an object")),
        };
        let scaling = match object("rope_parameters")? {
            Some(parameters) => Some(parameters),
            None => object("rope_scaling")?,
        };
        let empty = Map::new();
        let fields = Fields(scaling.unwrap_or(&empty));
        let theta = match fields.0.contains_key("rope_theta") {
            true => fields.positive("rope_theta")?,
            false => Fields(config).positive_or("rope_theta", 10_000.0)?,
        };
        let partial = Fields(config).number_or("partial_rotary_factor", 1.0)?;
        if fields.number_or("partial_rotary_factor", partial)? != 1.0 {
            return Err("`partial_rotary_factor` is not 1: partly rotated heads are not supported".to_owned());
        }
        let kind = ["rope_type", "type"].iter().find_map(|name| fields.0.get(*name)?.as_str()).unwrap_or("default");
        let scaling = match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: fields.positive("factor")? },
            "llama3" => {
                let (low, high) = (fields.positive("low_freq_factor")?, fields.positive("high_freq_factor")?);
                if high <= low {
                    return Err(format!("`high_freq_factor` is {high}, expected more than `low_freq_factor` ({low})"));
                }
                let (factor, original) =
                    (fields.positive("factor")?, fields.positive("original_max_position_embeddings")?);
                RopeScaling::Llama3 { factor, low, high, original }
            }
            other => {
                let other = Printable(other);
                return Err(format!("rope scaling `{other}` is not supported; default, linear and llama3 are"));
            }
        };
        Ok(Self { theta, scaling })
    }
}

/// Accessors of a JSON object's fields; each error names its field.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn present(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn size(&self, name: &str) -> Result<usize, String> {
        let value = self.present(name).ok_or_else(|| format!("`{name}` is missing"))?;
        let size = value.as_u64().filter(|size| (1..=MAX_SIZE).contains(size));
        size.map(|size| size as usize)
            .ok_or_else(|| format!("`{name}` is {value}, expected a size from 1 to {MAX_SIZE}"))
    }

    fn size_or(&self, name: &str, default: usize) -> Result<usize, String> {
        if self.present(name).is_some() { self.size(name) } else { Ok(default) }
    }

    fn number(&self, name: &str) -> Result<f64, String> {
        let value = self.present(name).ok_or_else(|| format!("`{name}` is missing"))?;
        value.as_f64().ok_or_else(|| format!("`{name}` is {value}, expected a number"))
    }

    fn number_or(&self, name: &str, default: f64) -> Result<f64, String> {
        if self.present(name).is_some() { self.number(name) } else { Ok(default) }
    }

    /// A number that is positive and finite, also in float32, the precision of the passes.
    fn positive(&self, name: &str) -> Result<f64, String> {
        let number = self.number(name)?;
        let is_positive = number as f32 > 0.0 && (number as f32).is_finite();
        is_positive.then_some(number).ok_or_else(|| format!("`{name}` is {number}, expected a positive number"))
    }

    fn positive_or(&self, name: &str, default: f64) -> Result<f64, String> {
        if self.present(name).is_some() { self.positive(name) } else { Ok(default) }
    }

    fn flag(&self, name: &str, default: bool) -> Result<bool, String> {
        match self.present(name) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| format!("`{name}` is {value}, expected true or false")),
        }
    }

    fn is(&self, name: &str, default: &str, known: &[&str]) -> Result<(), String> {
        let found = self.present(name).map_or(Some(default), Value::as_str);
        if found.is_some_and(|found| known.contains(&found)) {
            return Ok(());
        }
        Err(format!("`{name}` is {}, only {} is supported", self.0[name], known[0]))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(more: Value) -> Result<ModelConfig, String> {
        let mut config = json!({
            "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 8,
            "num_key_value_heads": 2, "vocab_size": 320, "rms_norm_eps": 1e-5
        });
        for (name, value) in more.as_object().unwrap() {
            config[name] = value.clone();
        }
        ModelConfig::read("llama", config.as_object().unwrap())
    }

    #[test]
    fn old_and_new_forms_of_rope_mean_the_same() {
        let scaling = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192});
        let mut old = scaling.clone();
        old["type"] = json!("llama3");
        let mut new = scaling;
        (new["rope_type"], new["rope_theta"]) = (json!("llama3"), json!(500_000.0));
        let old = read(json!({"rope_theta": 500_000.0, "rope_scaling": old})).unwrap();
        assert_eq!(old, read(json!({"rope_parameters": new})).unwrap());
        assert!(matches!(old.rope.scaling, RopeScaling::Llama3 { .. }));
        assert_eq!(read(json!({"rope_scaling": null})).unwrap().rope.theta, 10_000.0);
    }

    #[test]
    fn llama3_scaling_slows_low_frequencies_alone() {
        let scaling = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 };
        let (plain, scaled) = (
            Rope { theta: 500_000.0, scaling: RopeScaling::Default }.frequencies(128),
            Rope { theta: 500_000.0, scaling }.frequencies(128),
        );
        assert_eq!(plain[0], 1.0);
        // 8192 positions make 1304 full rotations at the first frequency, 0.003 at the last.
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[63], plain[63] / 8.0);
        assert!(scaled.iter().zip(&plain).all(|(s, p)| *s <= *p && *s >= *p / 8.0));
    }

    #[test]
    fn heads_may_have_a_width_of_their_own() {
        assert_eq!(read(json!({})).unwrap().heads, Heads { n_q: 8, n_kv: 2, d_head: 8 });
        let heads = read(json!({"head_dim": 16})).unwrap().heads;
        assert_eq!((heads.d_q(), heads.d_kv(), heads.d_qkv(), heads.group()), (128, 32, 192, 4));
    }

    #[test]
    fn unsupported_configurations_name_the_field() {
        let message = |more: Value| read(more).unwrap_err();
        assert_eq!(message(json!({"hidden_act": "gelu"})), "`hidden_act` is \"gelu\", only silu is supported");
        assert_eq!(
            message(json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})),
            "rope scaling `yarn` is not supported; default, linear and llama3 are"
        );
        assert_eq!(message(json!({"rope_scaling": {"type": "linear"}})), "`factor` is missing");
        assert_eq!(message(json!({"vocab_size": null})), "`vocab_size` is missing");
        assert_eq!(message(json!({"vocab_size": 1.5})), "`vocab_size` is 1.5, expected a size from 1 to 16777216");
        assert_eq!(
            message(json!({"num_key_value_heads": 3})),
            "`num_key_value_heads` is 3: 8 attention heads cannot share 3 key heads evenly"
        );
        assert!(message(json!({"partial_rotary_factor": 0.5})).contains("partial_rotary_factor"));
    }

    #[test]
    fn invalid_values_name_the_field() {
        let linear = |factor: Value| json!({"rope_scaling": {"type": "linear", "factor": factor}});
        let llama3 = |name: &str, number: f64| {
            let mut scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192});
            scaling[name] = json!(number);
            json!({"rope_parameters": scaling})
        };
        for (more, key) in [
            (json!({"rms_norm_eps": -1.0}), "rms_norm_eps"),
            (json!({"rms_norm_eps": 0.0}), "rms_norm_eps"),
            (json!({"rms_norm_eps": 1e-60}), "rms_norm_eps"),
            (json!({"rms_norm_eps": 1e60}), "rms_norm_eps"),
            (json!({"rms_norm_eps": "1e-5"}), "rms_norm_eps"),
            (json!({"rope_theta": 0}), "rope_theta"),
            (json!({"rope_theta": -10_000.0}), "rope_theta"),
            (json!({"rope_parameters": {"rope_theta": 0}}), "rope_theta"),
            (linear(json!(0)), "factor"),
            (linear(json!(-2.0)), "factor"),
            (llama3("factor", 0.0), "factor"),
            (llama3("low_freq_factor", -1.0), "low_freq_factor"),
            (llama3("high_freq_factor", 1.0), "high_freq_factor"),
            (llama3("original_max_position_embeddings", 0.0), "original_max_position_embeddings"),
            (json!({"num_attention_heads": 0}), "num_attention_heads"),
            (json!({"num_key_value_heads": 0}), "num_key_value_heads"),
            (json!({"num_attention_heads": 7, "num_key_value_heads": 7}), "hidden_size"),
            (json!({"head_dim": 0}), "head_dim"),
            (json!({"head_dim": 7}), "head_dim"),
            (json!({"hidden_size": 0}), "hidden_size"),
            (json!({"num_hidden_layers": 0}), "num_hidden_layers"),
        ] {
            let message = read(more.clone()).expect_err("the value is invalid");
            assert!(message.starts_with(&format!("`{key}` is ")), "{more}: {message}");
        }
    }

    #[test]
    fn the_attention_window_limits_the_example_length() {
        let config = json!({
            "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 8,
            "vocab_size": 320, "max_position_embeddings": 32768, "sliding_window": 4096
        });
        let of = |model_type| ModelConfig::read(model_type, config.as_object().unwrap()).unwrap().max_positions;
        assert_eq!((of("mistral"), of("qwen2")), (4096, 32768));
    }
}
