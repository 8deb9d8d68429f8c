//! How users name tensors.

use std::str::FromStr;

use globset::{Glob, GlobMatcher};

use crate::checkpoint::Printable;

/// The pattern for every linear layer but embeddings and the output head.
pub const ALL_LINEAR: &str = "all-linear";

/// A way to name tensors.
///
/// - with `*`, `?`, `[` or `{`: a glob on the whole name; `*` matches dots too
/// - else a tensor's name, a module's path, or the end of one: `q_proj` names `model.layers.0.self_attn.q_proj.weight`
#[derive(Clone, Debug)]
pub enum TargetPattern {
    /// On the whole name.
    Glob(GlobMatcher),
    /// A name, or the end of a module's path.
    Name(String),
}

impl TargetPattern {
    /// Whether it names the tensor called `name`.
    pub fn names(&self, name: &str) -> bool {
        match self {
            Self::Glob(glob) => glob.is_match(name),
            Self::Name(wanted) => {
                self.is_exact(name) || weight_module(name).is_some_and(|module| ends_with(module, wanted))
            }
        }
    }

    /// Whether the pattern is this very name, so that nothing else can be meant.
    pub fn is_exact(&self, name: &str) -> bool {
        matches!(self, Self::Name(wanted) if wanted == name)
    }
}

impl FromStr for TargetPattern {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if !text.contains(['*', '?', '[', '{']) {
            return Ok(Self::Name(text.to_owned()));
        }
        let glob = Glob::new(text).map_err(|e| format!("pattern \"{}\": {}", Printable(text), e.kind()))?;
        Ok(Self::Glob(glob.compile_matcher()))
    }
}

/// The module whose weight a tensor is; biases have none.
pub(crate) fn weight_module(name: &str) -> Option<&str> {
    match name.strip_suffix(".weight") {
        Some(module) => Some(module),
        None => (!name.ends_with(".bias")).then_some(name),
    }
}

/// Whether `module` is `wanted`, or ends with it behind a dot.
fn ends_with(module: &str, wanted: &str) -> bool {
    module.strip_suffix(wanted).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}
