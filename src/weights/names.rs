//! The canonical form of names, and how a name that an adapter uses is found among those of a checkpoint.
//!
//! A model's modules have other names in memory than on disk, in another version of transformers, or as a part of a larger model.
//! All these names of one weight have the same canonical form: words that only wrap are dropped from the front, and of several
//! names for the same thing one stands for all ([`super::rules`]). Two names mean the same weight where their canonical forms are
//! equal, or where one is the end of the other and no second weight ends like that.

use super::rules::{NameRule, RENAMES, WRAPPERS};
use crate::checkpoint::Checkpoint;

/// The nearest names that a message offers.
const N_NEAREST: usize = 3;

/// The rules that apply to one model.
pub(super) struct Rules {
    renames: Vec<(Vec<&'static str>, Vec<&'static str>)>,
}

impl Rules {
    /// The rules for these model types, and those for all.
    pub(super) fn of(model_types: &[String]) -> Self {
        let applies = |rule: &&NameRule| {
            rule.model_types.is_empty() || rule.model_types.iter().any(|of| model_types.iter().any(|found| found == of))
        };
        let words = |rule: &NameRule| (rule.from.split('.').collect(), rule.to.split('.').collect());
        Self { renames: RENAMES.iter().filter(applies).map(words).collect() }
    }

    /// The canonical form of a tensor's name.
    pub(super) fn canonical(&self, name: &str) -> String {
        self.words(name).join(".")
    }

    /// Its words.
    fn words<'n>(&self, name: &'n str) -> Vec<&'n str> {
        let mut words = without_wrappers(name.split('.').collect());
        for (from, to) in &self.renames {
            let mut at = 0;
            while at + from.len() <= words.len() {
                if !fits(&words[at..], from) {
                    at += 1;
                    continue;
                }
                let mut numbers = words[at..at + from.len()].iter().filter(|word| is_number(word)).copied();
                let new: Vec<&str> =
                    to.iter().map(|&word| if word == "#" { numbers.next().unwrap_or(word) } else { word }).collect();
                // A rule whose result begins as it does would apply to its own result.
                let after = at + new.len();
                words.splice(at..at + from.len(), new);
                at = after;
            }
        }
        words
    }

    /// Whether the canonical form drops words from the front of a name.
    fn is_wrapped(name: &str) -> bool {
        let words: Vec<&str> = name.split('.').collect();
        let n = words.len();
        without_wrappers(words).len() < n
    }
}

/// Drops wrappers before the first number; the module and its parameter stay.
fn without_wrappers(words: Vec<&str>) -> Vec<&str> {
    let front = words.iter().position(|word| is_number(word)).unwrap_or(words.len()).min(words.len().saturating_sub(2));
    let stays = |(at, word): &(usize, &str)| *at >= front || !WRAPPERS.contains(word);
    words.into_iter().enumerate().filter(stays).map(|(_, word)| word).collect()
}

pub(super) fn is_number(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit())
}

fn fits(words: &[&str], pattern: &[&str]) -> bool {
    words.iter().zip(pattern).all(|(word, pattern)| if *pattern == "#" { is_number(word) } else { word == pattern })
}

/// A checkpoint's tensors by their canonical names, read backwards: names that end alike lie side by side.
pub(super) struct Index {
    /// Canonical name with its words in reverse order, and the tensor's place among all.
    entries: Vec<(String, u32)>,
}

/// Tensors that a name may mean, by their places among the checkpoint's.
#[derive(Default)]
pub(super) struct Candidates {
    /// The same canonical name.
    pub(super) same: Vec<u32>,
    /// A canonical name that ends with it.
    pub(super) longer: Vec<u32>,
    /// Whether the name says that it is inside of a model: what only it ends with is then less likely than what it equals.
    pub(super) is_wrapped: bool,
}

impl Index {
    pub(super) fn new(rules: &Rules, checkpoint: &Checkpoint) -> Self {
        let entry = |(at, name): (u32, &str)| (backwards(&rules.words(name)), at);
        let names = checkpoint.tensors().map(|tensor| tensor.info.name.as_str());
        let mut entries: Vec<_> = (0..).zip(names).map(entry).collect();
        entries.sort_unstable();
        Self { entries }
    }

    /// The tensors whose canonical name is, or ends with, that of `name`.
    pub(super) fn candidates(&self, rules: &Rules, name: &str) -> Candidates {
        let wanted = backwards(&rules.words(name));
        let mut found = Candidates { is_wrapped: Rules::is_wrapped(name), ..Candidates::default() };
        let first = self.entries.partition_point(|(entry, _)| *entry < wanted);
        for (entry, at) in &self.entries[first..] {
            match entry.strip_prefix(&wanted) {
                Some("") => found.same.push(*at),
                Some(rest) if rest.starts_with('.') => found.longer.push(*at),
                Some(_) => {}
                None => break,
            }
        }
        found
    }
}

fn backwards(words: &[&str]) -> String {
    words.iter().rev().copied().collect::<Vec<_>>().join(".")
}

/// The names among `names` that are most like `wanted`, for a message.
pub(super) fn nearest<'n>(names: impl Iterator<Item = &'n str>, wanted: &str) -> Vec<String> {
    let words: Vec<&str> = wanted.split('.').collect();
    let mut ranked: Vec<(usize, u32, &str)> = names
        .map(|name| {
            let others: Vec<&str> = name.split('.').collect();
            let same_end = words.iter().rev().zip(others.iter().rev()).take_while(|(a, b)| a == b).count();
            let likeness = (strsim::jaro_winkler(wanted, name) * 1e6) as u32;
            (same_end, likeness, name)
        })
        .collect();
    // What ends alike by a parameter's name alone is no candidate, unless it looks alike.
    ranked.retain(|(same_end, likeness, _)| *same_end > 1 || *likeness > 800_000);
    ranked.sort_by(|a, b| b.cmp(a));
    ranked.into_iter().take(N_NEAREST).map(|(_, _, name)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical(model_type: &str, name: &str) -> String {
        Rules::of(&[model_type.to_owned()]).canonical(name)
    }

    #[test]
    fn names_of_one_weight_have_one_form() {
        for (model_type, names) in [
            ("vit", &["vit.encoder.layer.3.attention.attention.query.weight", "layers.3.attention.q_proj.weight"][..]),
            ("vit", &["vit.encoder.layer.3.attention.output.dense.bias", "vit.layers.3.attention.o_proj.bias"]),
            ("vit", &["encoder.layer.3.output.dense.weight", "vit.layers.3.mlp.fc2.weight"]),
            ("bert", &["bert.encoder.layer.0.attention.self.key.weight", "encoder.layer.0.attention.self.key.weight"]),
            ("mixtral", &["model.layers.1.block_sparse_moe.gate.weight", "model.layers.1.mlp.gate.weight"]),
            (
                "mixtral",
                &["layers.1.block_sparse_moe.experts.7.w2.weight", "model.layers.1.mlp.experts.7.down_proj.weight"],
            ),
            (
                "llava",
                &[
                    "language_model.model.layers.0.mlp.up_proj.weight",
                    "model.language_model.layers.0.mlp.up_proj.weight",
                ],
            ),
            (
                "llava",
                &[
                    "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.weight",
                    "model.vision_tower.encoder.layers.0.self_attn.out_proj.weight",
                ],
            ),
            ("gpt_neox", &["embed_out.weight", "lm_head.weight"]),
            ("exaone", &["transformer.h.2.mlp.c_fc_0.weight", "model.layers.2.mlp.gate_proj.weight"]),
        ] {
            let forms: Vec<String> = names.iter().map(|name| canonical(model_type, name)).collect();
            assert!(forms.iter().all(|form| *form == forms[0]), "{forms:?}");
        }
        // Parts of a model stay apart, and modules keep their names.
        assert_eq!(canonical("llava", "vision_tower.layers.0.q.weight"), "vision_tower.layers.0.q.weight");
        assert_eq!(canonical("x", "transformer.model.weight"), "model.weight");
        assert_eq!(canonical("gpt2", "transformer.h.2.mlp.c_fc.weight"), "h.2.mlp.c_fc.weight");
    }

    #[test]
    fn the_nearest_names_end_alike_before_they_look_alike() {
        let names = [
            "proj.weight",
            "model.norm.weight",
            "a.layers.0.q_proj.weight",
            "a.layers.0.k_proj.weight",
            "a.layers.1.q_proj.weight",
        ];
        let found = nearest(names.into_iter(), "b.layers.0.q_proj.weight");
        assert_eq!(found, ["a.layers.0.q_proj.weight", "a.layers.1.q_proj.weight", "a.layers.0.k_proj.weight"]);
        assert!(nearest(["proj.weight"].into_iter(), "model.layers.0.q_proj.weight").is_empty());
    }
}
