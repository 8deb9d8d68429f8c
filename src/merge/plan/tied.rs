//! Weights that the model shares under several names: one weight, which must not be changed for the sake of one of its names, nor
//! more than once.

use std::collections::{BTreeMap, BTreeSet};

use super::planner::{Lora, Planner, same_bytes, same_tensor};
use crate::{
    checkpoint::Printable,
    foreign::{FullTensor, LoraAdapter, LoraModule, LoraShape},
    merge::{MergeError, Undecided, factors::Matrix},
    weights::TiedWeight,
};

/// Parts of an adapter that are for one tied weight.
#[derive(Default)]
struct Sharers<'a> {
    modules: Vec<&'a LoraModule>,
    full: Vec<&'a FullTensor>,
}

impl Sharers<'_> {
    fn names(&self) -> Vec<String> {
        self.modules
            .iter()
            .map(|module| module.target())
            .chain(self.full.iter().map(|full| full.name.clone()))
            .collect()
    }
}

impl<'a> Planner<'_, 'a> {
    /// Adds what an adapter has for tied weights, each once, and returns the names of all of it: what is the base's own included.
    pub(super) fn add_tied(&mut self, lora: &Lora<'a>) -> Result<BTreeSet<String>, MergeError> {
        let mut names = BTreeSet::new();
        let mut by_weight: BTreeMap<&'a str, Sharers<'a>> = BTreeMap::new();
        for full in lora.adapter.full() {
            let Some(tie) = self.map.tie(&full.name) else { continue };
            names.insert(full.name.clone());
            if !self.is_unchanged_copy(lora.adapter, full)? {
                by_weight.entry(&tie.stored[0].info.name).or_default().full.push(full);
            }
        }
        for module in lora.adapter.modules() {
            if let Some(tie) = self.map.tie(&module.target()) {
                by_weight.entry(&tie.stored[0].info.name).or_default().modules.push(module);
            }
        }
        for sharers in by_weight.into_values() {
            let of_this = sharers.names();
            let tie = self.map.tie(&of_this[0]).expect("they were found by it");
            self.check_tied(lora, tie, &sharers)?;
            match (sharers.full.first(), sharers.modules.first()) {
                (Some(full), _) => self.add_full(lora, full)?,
                (None, Some(module)) => self.add_module(lora, module)?,
                (None, None) => {}
            }
            names.extend(of_this);
        }
        Ok(names)
    }

    /// Fails where parts of an adapter want different things of one weight, or where what they want would change more than they are
    /// for.
    fn check_tied(&mut self, lora: &Lora<'a>, tie: &TiedWeight<'a>, sharers: &Sharers<'a>) -> Result<(), MergeError> {
        let names = sharers.names();
        let stored = tie.stored[0];
        for copy in &tie.stored[1..] {
            if !copy.info.is_like(stored.info) || !same_bytes((stored.shard, stored.info), (copy.shard, copy.info))? {
                return Err(self.refused(format!(
                    "\"{}\": config.json says that it is one weight with \"{}\" (`tie_word_embeddings`), and the two differ: which one \
                     a loader takes depends on its version; set it to false, or remove one of them",
                    Printable(&copy.info.name),
                    Printable(&stored.info.name)
                )));
            }
        }
        let same_full = |pair: &[&FullTensor]| {
            same_tensor(lora.adapter.tensor(&pair[0].tensor), lora.adapter.tensor(&pair[1].tensor))
        };
        let mut is_same = sharers.full.is_empty() || sharers.modules.is_empty();
        for pair in sharers.full.windows(2) {
            is_same &= same_full(pair)?;
        }
        for pair in sharers.modules.windows(2) {
            is_same &= is_same_product(lora.adapter, pair[0], pair[1])?;
        }
        if let (Some(full), Some(module)) = (sharers.full.first(), sharers.modules.first()) {
            return Err(self.refused(format!(
                "\"{}\": the adapter adds to \"{}\", which is the same weight, and holds it in full besides, with other values than the base \
                 has: it was trained on another base, or on a model with a head of its own",
                Printable(&full.name),
                Printable(&module.target())
            )));
        }
        if !is_same {
            return Err(self.refused(format!(
                "\"{}\" and \"{}\" are one weight (`tie_word_embeddings`), and the adapter has different matrices for the two; \
                 untie them in the base first",
                Printable(&names[0]),
                Printable(&names[1])
            )));
        }
        if names.len() > 1 {
            self.note_once(format!(
                "{} are one weight, and so is what the adapter has for them: merged once",
                listed(&names)
            ));
        }
        if self.map.is_covered(tie, &names) {
            return Ok(());
        }
        self.ask_tied(&names, tie)
    }

    /// Fails unless the user said that all that share a weight may change with `names`; tells that they do.
    pub(super) fn ask_tied(&mut self, names: &[String], tie: &TiedWeight<'a>) -> Result<(), MergeError> {
        if !self.reading.tied_head {
            let what = format!(
                "the model shares this weight under several names ({}), and the adapter was trained for {} alone: merged, it would \
                 change the others too",
                tie.uses(),
                if names.len() == 1 { "this one" } else { "some of them" }
            );
            return Err(self.undecided(&names[0], Undecided::TiedHead, what));
        }
        self.note_once(format!(
            "{} is shared ({}): what is merged into one changes the others",
            Printable(&names[0]),
            tie.uses()
        ));
        Ok(())
    }

    fn note_once(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// Whether the adapter's full tensor is the base's own, byte for byte: PEFT saves embeddings that it adapts.
    pub(super) fn is_unchanged_copy(&self, lora: &LoraAdapter, full: &FullTensor) -> Result<bool, MergeError> {
        let (shard, info) = lora.tensor(&full.tensor);
        match self.map.find(&full.name, |tensor| tensor.info.is_like(info)) {
            Ok(found) => (self.is_original)(found.tensor, (shard, info)),
            Err(_) => Ok(false),
        }
    }
}

fn listed(names: &[String]) -> String {
    names.iter().map(|name| Printable(name).to_string()).collect::<Vec<_>>().join(" and ")
}

/// Whether two modules add the same to a table of `[vocabulary, d]`, one of them perhaps as an embedding and one as a linear layer.
fn is_same_product(lora: &LoraAdapter, a: &LoraModule, b: &LoraModule) -> Result<bool, MergeError> {
    /// The factors of the table, `[vocabulary, r]` and the transposed of `[r, d]`, and their numbers of rows.
    fn factors<'l>(lora: &'l LoraAdapter, module: &LoraModule) -> Option<[(u64, Matrix<'l>); 2]> {
        let matrix = |tensor: &str, row_len| {
            let (shard, info) = lora.tensor(tensor);
            Matrix::rows(shard, info, row_len)
        };
        let rank = module.rank;
        match module.shape {
            LoraShape::Linear { d_out, d_in } => {
                Some([(d_out, matrix(&module.b, rank)), (d_in, matrix(&module.a, d_in).transposed())])
            }
            LoraShape::Embedding { vocabulary, d_out } => {
                Some([(vocabulary, matrix(&module.a, vocabulary).transposed()), (d_out, matrix(&module.b, rank))])
            }
            LoraShape::Experts { .. } => None,
        }
    }
    let is_plain = |module: &LoraModule| module.magnitude.is_none() && module.bias.is_none();
    let (Some(of_a), Some(of_b)) = (factors(lora, a), factors(lora, b)) else { return Ok(false) };
    if (a.rank, a.scaling) != (b.rank, b.scaling) || !is_plain(a) || !is_plain(b) {
        return Ok(false);
    }
    for ((n_rows, a_rows), (n, b_rows)) in of_a.into_iter().zip(of_b) {
        if n_rows != n {
            return Ok(false);
        }
        for first in (0..n_rows).step_by(4096) {
            let part = first..n_rows.min(first + 4096);
            if a_rows.read(part.clone(), 0..a.rank)? != b_rows.read(part, 0..a.rank)? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}
