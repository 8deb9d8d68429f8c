//! Weights that a model shares under several names: its embedding and its head above all.

use std::collections::HashMap;

use super::{
    config::Families,
    names::{Rules, is_number},
    rules::{TIES, Tie},
};
use crate::{
    checkpoint::{Checkpoint, TensorRef},
    tensor::module_of,
};

/// A weight with several names in the model, stored once, or more often than needed.
#[derive(Clone, Debug)]
pub struct TiedWeight<'a> {
    /// The tensors that hold it, the embedding first; equal copies of one weight where there are several.
    pub stored: Vec<TensorRef<'a>>,
    /// Canonical names of the modules that read it as an embedding.
    embeddings: Vec<String>,
    /// Canonical names that its head may have; empty where the model has none.
    heads: Vec<String>,
}

impl TiedWeight<'_> {
    /// Whether modules of these canonical names are all that share the weight.
    pub(super) fn is_covered_by(&self, given: &[String]) -> bool {
        let has = |name: &String| given.contains(name);
        // Where encoder and decoder have tables of their own, the shared one is a name and no more.
        let (shared, readers) = self.embeddings.split_first().expect("a tied weight is an embedding");
        let reads_all = if readers.is_empty() { has(shared) } else { readers.iter().all(has) };
        reads_all && (self.heads.is_empty() || self.heads.iter().any(has))
    }

    /// Whether a module of this canonical name reads it as an embedding.
    pub(super) fn is_embedding(&self, module: &str) -> bool {
        self.embeddings.iter().any(|embedding| embedding == module)
    }

    /// The modules that share the weight, for people.
    pub fn uses(&self) -> String {
        let mut words: Vec<&str> = self.embeddings.iter().map(String::as_str).collect();
        words.extend(self.is_head_tied().then_some("the head"));
        words.join(", ")
    }

    /// Whether this tensor holds the weight.
    pub fn holds(&self, tensor: &str) -> bool {
        self.stored.iter().any(|stored| stored.info.name == tensor)
    }

    /// Whether the model's head is this weight.
    pub fn is_head_tied(&self) -> bool {
        !self.heads.is_empty()
    }
}

/// The tied weights of a model, by the canonical names of the modules that share them.
#[derive(Debug, Default)]
pub(super) struct Ties<'a> {
    pub(super) weights: Vec<TiedWeight<'a>>,
    by_module: HashMap<String, usize>,
}

impl<'a> Ties<'a> {
    /// Finds them from names and config alone.
    pub(super) fn find(checkpoint: &'a Checkpoint, rules: &Rules, families: Families<'_>) -> Self {
        // A table of tokens is no part of a numbered layer.
        let outside = |tensor: &TensorRef<'_>| {
            tensor.info.name.ends_with(".weight") && !tensor.info.name.split('.').any(is_number)
        };
        let modules: Vec<(String, TensorRef<'a>)> = checkpoint
            .tensors()
            .filter(outside)
            .map(|tensor| (module_of(&rules.canonical(&tensor.info.name)).to_owned(), tensor))
            .collect();
        let mut ties = Self::default();
        for tie in TIES {
            for (module, tensor) in &modules {
                let is_taken = ties.by_module.contains_key(module);
                let Some(prefix) = module.strip_suffix(tie.embedding).filter(|before| !is_taken && ends_word(before))
                else {
                    continue;
                };
                ties.add(checkpoint, families, tie, (prefix, *tensor), &modules);
            }
        }
        ties
    }

    fn add(
        &mut self,
        checkpoint: &Checkpoint,
        families: Families<'_>,
        tie: &Tie,
        (prefix, tensor): (&str, TensorRef<'a>),
        modules: &[(String, TensorRef<'a>)],
    ) {
        let stored = |names: &[String]| -> Vec<TensorRef<'a>> {
            modules.iter().filter(|(module, _)| names.contains(module)).map(|(_, tensor)| *tensor).collect()
        };
        // Heads lie beside the embedding, or beside what holds it.
        let mut heads: Vec<String> = Vec::new();
        let mut place = prefix;
        loop {
            heads.extend(tie.heads.iter().map(|head| format!("{place}{head}")));
            let Some(up) = place.strip_suffix('.') else { break };
            place = up.rfind('.').map_or("", |dot| &up[..=dot]);
        }
        // Without a word about architectures there is a head, as there is one in most models.
        let (has_head, said) = (families.has_head().unwrap_or(true), families.is_tied(prefix));
        if !has_head || !said.unwrap_or_else(|| stored(&heads).is_empty()) {
            heads.clear();
        }
        let part_is_there = |name: &&&str| {
            let part = format!("{}.", name.split('.').next().unwrap_or(name));
            checkpoint.tensors().any(|tensor| tensor.info.name.contains(&part))
        };
        // An untied model may store a table for each of them.
        let is_own = |name: &String| said == Some(false) && modules.iter().any(|(module, _)| module == name);
        let readers = tie.also.iter().filter(part_is_there).map(|also| format!("{prefix}{also}"));
        let readers = readers.filter(|name| !is_own(name));
        let embeddings: Vec<String> = std::iter::once(format!("{prefix}{}", tie.embedding)).chain(readers).collect();
        if embeddings.len() == 1 && heads.is_empty() {
            return;
        }
        let mut tensors = vec![tensor];
        tensors.extend(stored(&embeddings[1..]));
        tensors.extend(stored(&heads));
        for name in embeddings.iter().chain(&heads) {
            self.by_module.entry(name.clone()).or_insert(self.weights.len());
        }
        self.weights.push(TiedWeight { stored: tensors, embeddings, heads });
    }

    /// The tied weight that a parameter's canonical name stands for.
    pub(super) fn get(&self, canonical: &str) -> Option<&TiedWeight<'a>> {
        let module = canonical.strip_suffix(".weight")?;
        Some(&self.weights[*self.by_module.get(module)?])
    }
}

/// Whether a name may begin behind this text.
fn ends_word(before: &str) -> bool {
    before.is_empty() || before.ends_with('.')
}
