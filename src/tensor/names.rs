//! What a tensor's name reveals about its role in the model.

/// The module a parameter belongs to: its name without `.weight` or `.bias`.
pub fn module_of(name: &str) -> &str {
    name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias")).unwrap_or(name)
}

/// The kind of projection, for tables: the last part of the module's path, such as `q_proj`.
///
/// ```
/// use neuroada_ckpt::internals::tensor::projection_kind;
/// assert_eq!(projection_kind("model.layers.3.self_attn.q_proj.weight"), "q_proj");
/// assert_eq!(projection_kind("model.layers.3.mlp.experts.gate_up_proj"), "gate_up_proj");
/// ```
pub fn projection_kind(name: &str) -> &str {
    module_of(name).rsplit('.').next().unwrap_or(name)
}
