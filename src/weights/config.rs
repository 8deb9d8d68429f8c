//! What `config.json` says about the parts of a model: their families, and whether they tie head and embedding.

use serde_json::{Map, Value};

use super::rules::{HEADED_MODELS, HEADLESS_ARCHITECTURES, TIED_BY_DEFAULT};

/// Keys of `config.json` that hold the config of a part of the model.
const TEXT: [&str; 3] = ["text_config", "llm_config", "thinker_config"];
const VISION: [&str; 3] = ["vision_config", "vision_encoder_config", "vit_config"];
const AUDIO: [&str; 3] = ["audio_config", "audio_encoder_config", "speech_config"];
/// Configs nested deeper than this say nothing any more.
const MAX_DEPTH: usize = 6;

/// A model's config, and those of its parts.
#[derive(Clone, Copy)]
pub(super) struct Families<'a> {
    config: &'a Map<String, Value>,
}

impl<'a> Families<'a> {
    pub(super) fn new(config: &'a Map<String, Value>) -> Self {
        Self { config }
    }

    /// Every `model_type` in it.
    pub(super) fn model_types(self) -> Vec<String> {
        fn collect(config: &Map<String, Value>, depth: usize, found: &mut Vec<String>) {
            if let Some(Value::String(model_type)) = config.get("model_type")
                && !found.contains(model_type)
            {
                found.push(model_type.clone());
            }
            for part in config.values().filter_map(Value::as_object).filter(|_| depth < MAX_DEPTH) {
                collect(part, depth + 1, found);
            }
        }
        let mut found = Vec::new();
        collect(self.config, 0, &mut found);
        found
    }

    /// The `model_type` of the part that a weight of this canonical name belongs to.
    pub(super) fn model_type_of(self, canonical: &str) -> Option<&'a str> {
        let first = canonical.split('.').next().unwrap_or(canonical);
        let part = |keys: &[&str]| keys.iter().find_map(|key| self.config.get(*key)?.as_object());
        let of = |config: &'a Map<String, Value>| config.get("model_type")?.as_str();
        let own = self.config.get(first).or_else(|| self.config.get(&format!("{first}_config")));
        let config = if let Some(own) = own.and_then(Value::as_object) {
            Some(own)
        } else if ["vis", "image", "vit"].iter().any(|word| first.contains(word)) {
            part(&VISION)
        } else if ["audio", "speech"].iter().any(|word| first.contains(word)) {
            part(&AUDIO)
        } else {
            part(&TEXT)
        };
        config.and_then(of).or_else(|| of(self.config))
    }

    /// Whether the part called `prefix` (empty for the whole) ties its head to its embedding; `None` where nothing says.
    pub(super) fn is_tied(self, prefix: &str) -> Option<bool> {
        const KEY: &str = "tie_word_embeddings";
        let part = |key: &str| self.config.get(key)?.as_object();
        let own = part(prefix.trim_end_matches('.'));
        let parts = own.into_iter().chain([self.config]).chain(TEXT.iter().filter_map(|key| part(key)));
        for config in parts {
            if let Some(said) = config.get(KEY).and_then(Value::as_bool) {
                return Some(said);
            }
        }
        let model_type = own.unwrap_or(self.config).get("model_type")?.as_str()?;
        TIED_BY_DEFAULT.contains(&model_type).then_some(true)
    }

    /// Whether the model has a head over its vocabulary; `None` where nothing says.
    pub(super) fn has_head(self) -> Option<bool> {
        let names = self.config.get("architectures")?.as_array()?;
        let mut names = names.iter().filter_map(Value::as_str).peekable();
        names.peek()?;
        let is_bare = |name: &str| name.ends_with("Model") && !HEADED_MODELS.iter().any(|end| name.ends_with(end));
        let is_headless = |name: &str| is_bare(name) || HEADLESS_ARCHITECTURES.iter().any(|mark| name.contains(mark));
        Some(!names.all(is_headless))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn parts_have_their_own_families() {
        let config = json!({
            "model_type": "vision-encoder-decoder", "architectures": ["VisionEncoderDecoderModel"],
            "encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2", "tie_word_embeddings": true},
        });
        let families = Families::new(config.as_object().unwrap());
        assert_eq!(families.model_type_of("encoder.layers.0.attention.q_proj.weight"), Some("vit"));
        assert_eq!(families.model_type_of("decoder.h.0.attn.c_attn.weight"), Some("gpt2"));
        assert_eq!(families.is_tied("decoder."), Some(true));
        assert_eq!(families.has_head(), Some(true));
        let config = json!({
            "model_type": "llava", "text_config": {"model_type": "llama", "tie_word_embeddings": false},
            "vision_config": {"model_type": "clip_vision_model"},
        });
        let families = Families::new(config.as_object().unwrap());
        assert_eq!(families.model_type_of("layers.0.self_attn.q_proj.weight"), Some("llama"));
        assert_eq!(
            families.model_type_of("vision_tower.encoder.layers.0.self_attn.q_proj.weight"),
            Some("clip_vision_model")
        );
        assert_eq!((families.is_tied(""), families.has_head()), (Some(false), None));
        assert_eq!(families.model_types(), ["llava", "llama", "clip_vision_model"]);
        for (architecture, has_head) in [
            ("Qwen3ForCausalLM", true),
            ("GPT2LMHeadModel", true),
            ("SomebodysOwnChatModel", true),
            ("SomebodysOwnLM", true),
            ("BertModel", false),
            ("T5EncoderModel", false),
            ("Qwen3ForSequenceClassification", false),
        ] {
            let config = json!({"architectures": [architecture]});
            assert_eq!(Families::new(config.as_object().unwrap()).has_head(), Some(has_head), "{architecture}");
        }
    }
}
