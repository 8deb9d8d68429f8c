//! Facts from the map of weights: tied weights, and weights stored as `[d_in, d_out]`.

use serde::Serialize;

use crate::{
    checkpoint::{Checkpoint, CheckpointError, Printable},
    weights::{Answers, TiedWeight, WeightMap, Witness},
};

/// Notable facts about a checkpoint's weights.
#[derive(Serialize, Default)]
pub(super) struct WeightFacts {
    /// Weights with several names in the model.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tied: Vec<TiedFacts>,
    /// Kinds of weights that are stored as `[d_in, d_out]`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stored_in_out: Vec<KindFacts>,
    /// Harmless oddities of the files.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
}

#[derive(Serialize)]
struct TiedFacts {
    /// The tensors that hold it.
    tensors: Vec<String>,
    /// The modules that share it, as text.
    shared_by: String,
}

#[derive(Serialize)]
struct KindFacts {
    kind: String,
    /// The evidence.
    witness: String,
}

impl WeightFacts {
    /// Of a model's checkpoint; headers and `config.json` alone are read.
    pub(super) fn of(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let map = WeightMap::new(checkpoint, Answers::default())?;
        let tied = |tie: &TiedWeight<'_>| TiedFacts {
            tensors: tie.stored.iter().map(|tensor| tensor.info.name.clone()).collect(),
            shared_by: tie.uses(),
        };
        let kind = |(kind, witness): (String, Witness)| KindFacts { kind, witness: witness.to_string() };
        Ok(Self {
            tied: map.ties().iter().map(tied).collect(),
            stored_in_out: map.stored_in_out().into_iter().map(kind).collect(),
            notes: checkpoint.notes(),
        })
    }

    pub(super) fn facts(&self) -> Vec<(&'static str, String)> {
        let tied = self.tied.iter().map(|TiedFacts { tensors, shared_by }| {
            let tensors: Vec<String> = tensors.iter().map(|name| Printable(name).to_string()).collect();
            ("tied", format!("{shared_by}: one weight, stored as {}", tensors.join(" and ")))
        });
        let kinds = self
            .stored_in_out
            .iter()
            .map(|KindFacts { kind, witness }| ("[d_in, d_out]", format!("{} ({witness})", Printable(kind))));
        let notes = self.notes.iter().map(|note| ("note", note.clone()));
        tied.chain(kinds).chain(notes).collect()
    }
}
