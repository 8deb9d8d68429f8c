//! Names of an adapter's tensors: `base_model.model.MODULE.PART`.

/// The first words of the names that PEFT writes; names without them are taken as they are.
const PREFIXES: [&str; 2] = ["base_model.model.", "base_model."];
/// What wrappers leave in names: of PEFT itself, of `torch.compile`, of sharded training.
const WRAPPERS: [&str; 4] = ["base_layer", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// A tensor's name, taken apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeftName {
    /// The module as the model names it, without what wrappers left.
    pub module: String,
    /// How many `base_layer` stood right before the part: of two parameters of one module, the inner one has more.
    pub depth: usize,
    /// What the tensor is, such as `lora_A.weight` or `shira_indices`.
    pub part: String,
}

impl PeftName {
    /// Takes `name` apart where one of its segments begins with `part_prefix` (such as `lora_`); `None` for a plain parameter.
    ///
    /// The adapter's own name, which some writers leave behind the part, is dropped: `lora_A.default.weight` is `lora_A.weight`.
    pub fn parse(name: &str, part_prefix: &str) -> Option<Self> {
        let segments: Vec<&str> = without_prefix(name).split('.').collect();
        let at = segments.iter().rposition(|segment| segment.starts_with(part_prefix)).filter(|&at| at > 0)?;
        let depth = segments[..at].iter().rev().take_while(|&&segment| segment == "base_layer").count();
        let module = join(&segments[..at]);
        let mut part = segments[at].to_owned();
        let rest: Vec<&str> = segments[at + 1..].iter().filter(|&&segment| segment != "default").copied().collect();
        if !rest.is_empty() {
            part = format!("{part}.{}", rest.join("."));
        }
        (!module.is_empty()).then_some(Self { module, depth, part })
    }
}

/// A plain parameter's name in the model: without PEFT's prefix and without what wrappers left.
///
/// ```
/// use neuroada_ckpt::internals::foreign::base_name;
/// assert_eq!(base_name("base_model.model.model.embed_tokens.base_layer.weight"), "model.embed_tokens.weight");
/// assert_eq!(base_name("base_model.model.lm_head.modules_to_save.default.weight"), "lm_head.weight");
/// ```
pub fn base_name(name: &str) -> String {
    let segments: Vec<&str> = without_prefix(name).split('.').collect();
    match segments.iter().position(|&segment| segment == "modules_to_save") {
        Some(at) => {
            let rest = &segments[at + 1..];
            let rest = if rest.first() == Some(&"default") { &rest[1..] } else { rest };
            join(&[&segments[..at], rest].concat())
        }
        None => join(&segments),
    }
}

fn without_prefix(name: &str) -> &str {
    PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name)
}

fn join(segments: &[&str]) -> String {
    let kept: Vec<&str> = segments.iter().filter(|segment| !WRAPPERS.contains(segment)).copied().collect();
    kept.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(name: &str) -> (String, usize, String) {
        let PeftName { module, depth, part } = PeftName::parse(name, "lora_").unwrap();
        (module, depth, part)
    }

    #[test]
    fn names_are_taken_apart_whatever_wrappers_left_in_them() {
        for (name, module, depth, part) in [
            ("base_model.model.model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj", 0, "lora_A.weight"),
            (
                "base_model.model.model.layers.0.q_proj.lora_A.default.weight",
                "model.layers.0.q_proj",
                0,
                "lora_A.weight",
            ),
            ("base_model.model.x.lora_magnitude_vector", "x", 0, "lora_magnitude_vector"),
            ("base_model.model.x.lora_embedding_A.default", "x", 0, "lora_embedding_A"),
            ("base_model.model.mlp.experts.base_layer.lora_B.weight", "mlp.experts", 1, "lora_B.weight"),
            ("base_model.model._orig_mod.a.base_layer.b.lora_B.bias", "a.b", 0, "lora_B.bias"),
            ("q_proj.lora_A.weight", "q_proj", 0, "lora_A.weight"),
        ] {
            assert_eq!(parsed(name), (module.to_owned(), depth, part.to_owned()), "{name}");
        }
        for name in ["base_model.model.lm_head.weight", "lora_A.weight", "base_model.model.lora_A.weight", ""] {
            assert_eq!(PeftName::parse(name, "lora_"), None, "{name}");
        }
    }
}
