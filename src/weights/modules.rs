//! What a weight's name and its model's type tell about its module, for those who have no checkpoint at hand.

use super::{
    Axes,
    rules::{CONV1D_KINDS, CONV1D_MODELS, EMBEDDINGS, LINEAR_MODELS},
};
use crate::tensor::projection_kind;

/// Whether a weight of this name belongs to an embedding, which looks rows up and multiplies nothing.
pub fn is_embedding(name: &str) -> bool {
    EMBEDDINGS.contains(&projection_kind(name))
}

/// The order in which a matrix of this name is stored, by convention or by its model's type; `None` where only the checkpoint tells.
///
/// ```
/// use neuroada_ckpt::{Axes, internals::weights::family_axes};
/// assert_eq!(family_axes(Some("gpt2"), "h.0.attn.c_attn.weight"), Some(Axes::InOut));
/// assert_eq!(family_axes(None, "model.layers.0.self_attn.q_proj.weight"), Some(Axes::OutIn));
/// assert_eq!(family_axes(None, "h.0.attn.c_attn.weight"), None);
/// ```
pub fn family_axes(model_type: Option<&str>, name: &str) -> Option<Axes> {
    if !CONV1D_KINDS.contains(&projection_kind(name)) {
        return Some(Axes::OutIn);
    }
    let model_type = model_type?;
    let is_in_out = CONV1D_MODELS.contains(&model_type).then_some(Axes::InOut);
    is_in_out.or_else(|| LINEAR_MODELS.contains(&model_type).then_some(Axes::OutIn))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embeddings_are_told_from_heads_and_projections() {
        for name in ["model.embed_tokens.weight", "transformer.wte.weight", "bert.embeddings.word_embeddings.weight"] {
            assert!(is_embedding(name), "{name}");
        }
        for name in ["lm_head.weight", "model.layers.0.mlp.shared_expert.up_proj.weight", "model.norm.weight"] {
            assert!(!is_embedding(name), "{name}");
        }
    }
}
