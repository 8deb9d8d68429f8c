//! The facts that a mask or an adapter records about itself.

use std::collections::BTreeMap;

use globset::GlobMatcher;
use serde::Serialize;
use serde_json::Value;

use super::super::page::{Page, Table, bytes, count, number, percent};
use crate::{
    adapter::{Adapter, AdapterNotes, ColumnsKind},
    mask::{BaseInfo, MaskFile, Recipe, TargetInfo},
    tensor::{dtype_name, projection_kind},
};

/// Chosen connections, and the deltas on them.
#[derive(Serialize)]
pub(super) struct SparseFacts {
    /// The base's name.
    base: BaseInfo,
    /// How the connections were chosen.
    recipe: Recipe,
    n_targets: u64,
    n_rows: u64,
    /// Chosen connections.
    nnz: u64,
    /// Elements of the targets in the base.
    n_elements: u64,
    kinds: Vec<SparseKind>,
    /// Of an adapter: the factor of its deltas.
    scale: Option<f64>,
    /// Of an adapter: license, description, author, training.
    notes: Option<AdapterNotes>,
    /// Of a packed adapter.
    packed: Option<PackedFacts>,
    /// Only with `--tensors`.
    targets: Option<Vec<TargetFacts>>,
}

/// The facts that a packed adapter records about itself.
#[derive(Serialize)]
struct PackedFacts {
    /// The adapter's id; only reading the whole file proves it.
    id: String,
    columns: ColumnsKind,
    /// Bytes of the adapter when unpacked.
    plain_bytes: u64,
}

/// Targets of one kind, with the same number of connections in every row or none fixed.
#[derive(Serialize)]
struct SparseKind {
    kind: String,
    /// The base's type.
    dtype: String,
    /// The type of an adapter's values.
    values_dtype: Option<String>,
    /// Connections per row; `null` where rows differ.
    k: Option<u64>,
    n_targets: u64,
    n_rows: u64,
    nnz: u64,
    n_elements: u64,
}

#[derive(Serialize)]
struct TargetFacts {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    /// How the base stores a quantized weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    quantized: Option<String>,
    transposed: bool,
    k: Option<u64>,
    nnz: u64,
    /// BLAKE3 of the base's values at the chosen positions.
    anchor: String,
    /// BLAKE3 of the base's whole tensor, if it was recorded.
    blake3: Option<String>,
}

impl SparseFacts {
    pub(super) fn of_mask(mask: &MaskFile, filter: Option<&GlobMatcher>, list: bool) -> Self {
        Self::new(mask.base(), mask.recipe(), mask.targets(), |_| None, filter, list)
    }

    pub(super) fn of_adapter(adapter: &Adapter, filter: Option<&GlobMatcher>, list: bool) -> Self {
        let values_dtype = |target: &TargetInfo| Some(dtype_name(adapter.values_dtype(target)));
        let facts = Self::new(adapter.base(), adapter.recipe(), adapter.targets(), values_dtype, filter, list);
        let packed = adapter.packed_columns().zip(adapter.claimed_id()).map(|(columns, id)| PackedFacts {
            id: id.to_string(),
            columns,
            plain_bytes: adapter.plain_bytes(),
        });
        Self { scale: Some(adapter.scale()), notes: Some(adapter.notes().clone()), packed, ..facts }
    }

    fn new(
        base: &BaseInfo,
        recipe: &Recipe,
        targets: &[TargetInfo],
        values_dtype: impl Fn(&TargetInfo) -> Option<String>,
        filter: Option<&GlobMatcher>,
        list: bool,
    ) -> Self {
        let chosen = || targets.iter().filter(|target| filter.is_none_or(|filter| filter.is_match(&target.name)));
        let mut kinds: BTreeMap<_, SparseKind> = BTreeMap::new();
        for target in chosen() {
            let dtype = target.quantized.clone().unwrap_or_else(|| dtype_name(target.dtype));
            let k = target.uniform_k;
            let of = if target.shape.len() == 1 && target.name.ends_with(".bias") { ".bias" } else { "" };
            let kind = format!("{}{of}", projection_kind(&target.name));
            let values_dtype = values_dtype(target);
            let key = (kind.clone(), dtype.clone(), values_dtype.clone(), k);
            let entry = kinds.entry(key).or_insert_with(|| SparseKind {
                kind,
                dtype,
                values_dtype,
                k,
                n_targets: 0,
                n_rows: 0,
                nnz: 0,
                n_elements: 0,
            });
            entry.n_targets += 1;
            entry.n_rows = entry.n_rows.saturating_add(target.layout.n_rows());
            entry.nnz += target.nnz;
            entry.n_elements = entry.n_elements.saturating_add(target.layout.n_elements());
        }
        let kinds: Vec<SparseKind> = kinds.into_values().collect();
        let sum = |field: fn(&SparseKind) -> u64| kinds.iter().map(field).fold(0, u64::saturating_add);
        Self {
            base: base.clone(),
            recipe: recipe.clone(),
            n_targets: sum(|kind| kind.n_targets),
            n_rows: sum(|kind| kind.n_rows),
            nnz: sum(|kind| kind.nnz),
            n_elements: sum(|kind| kind.n_elements),
            kinds,
            scale: None,
            notes: None,
            packed: None,
            targets: list.then(|| chosen().map(TargetFacts::of).collect()),
        }
    }

    /// Lines for the facts at the top.
    pub(super) fn facts(&self) -> Vec<(&'static str, String)> {
        let model_type = self.base.model_type.as_deref().map_or_else(String::new, |name| format!(" ({name})"));
        let share = percent(self.nnz, self.n_elements);
        let mut facts = vec![
            ("base", format!("{}{model_type}", self.base.name)),
            ("chosen by", recipe_text(&self.recipe)),
            ("targets", format!("{}, {} rows", count(self.n_targets), count(self.n_rows))),
            ("connections", format!("{}, {share} of the targets", count(self.nnz))),
        ];
        facts.extend(self.scale.map(|scale| ("scale", scale.to_string())));
        if let Some(PackedFacts { id, columns, plain_bytes }) = &self.packed {
            let columns = match columns {
                ColumnsKind::Derived => "derived from the base, which is needed to read them",
                ColumnsKind::Packed => "in the file",
            };
            facts.push(("packed", format!("from {}, columns {columns}", bytes(*plain_bytes))));
            facts.push(("id", id.clone()));
        }
        if let Some(AdapterNotes { license, description, author, training }) = &self.notes {
            let training = training.as_ref().map(training_text);
            let notes =
                [("license", license), ("description", description), ("author", author), ("training", &training)];
            facts.extend(notes.into_iter().filter_map(|(name, note)| Some((name, note.clone()?))));
        }
        facts
    }

    pub(super) fn write_tables(&self, page: &mut Page) {
        let k_text = |k: Option<u64>| k.map_or_else(|| "varies".to_owned(), count);
        let mut kinds =
            Table::new(["kind", "base type", "values", "targets>", "rows>", "per row>", "connections>", "share>"]);
        for kind in self.kinds.iter().take(super::MAX_ROWS) {
            kinds.row([
                kind.kind.clone(),
                kind.dtype.clone(),
                kind.values_dtype.clone().unwrap_or_else(|| "-".to_owned()),
                count(kind.n_targets),
                count(kind.n_rows),
                k_text(kind.k),
                count(kind.nnz),
                percent(kind.nnz, kind.n_elements),
            ]);
        }
        page.blank();
        page.table(kinds);
        super::and_more(page, self.kinds.len());
        let Some(list) = &self.targets else { return };
        let mut targets = Table::new(["target", "base type", "shape", "per row>", "connections>", "anchor", "whole"]);
        for target in list {
            targets.row([
                target.name.clone(),
                target.dtype.clone(),
                super::shape_text(&target.shape),
                k_text(target.k),
                count(target.nnz),
                target.anchor[..12].to_owned(),
                target.blake3.as_ref().map_or("-", |hash| &hash[..12]).to_owned(),
            ]);
        }
        page.blank();
        page.table(targets);
    }
}

impl TargetFacts {
    fn of(target: &TargetInfo) -> Self {
        Self {
            name: target.name.clone(),
            dtype: dtype_name(target.dtype),
            shape: target.shape.clone(),
            quantized: target.quantized.clone(),
            transposed: target.layout.transposed,
            k: target.uniform_k,
            nnz: target.nnz,
            anchor: target.anchor.to_string(),
            blake3: target.blake3.map(|hash| hash.to_string()),
        }
    }
}

/// The training summary of this program's trainer in one line; any other value as it is.
fn training_text(training: &Value) -> String {
    let trained = || {
        let (data, result) = (training["data"]["name"].as_str()?, training.get("result")?);
        let (n_steps, loss) = (result["n_steps"].as_u64()?, number(result["loss"].as_f64()?));
        let held_out = match (result["eval_loss"].as_f64(), result["first_eval_loss"].as_f64()) {
            (Some(last), Some(first)) => format!(", {} on held-out data ({} before)", number(last), number(first)),
            _ => String::new(),
        };
        Some(format!("{} steps on {data}, loss {loss}{held_out}", count(n_steps)))
    };
    trained().unwrap_or_else(|| super::value_text(training))
}

/// A recipe in one line: `magnitude, k 2, scope row`.
fn recipe_text(recipe: &Recipe) -> String {
    let mut parts = vec![recipe.score.clone()];
    let mut add = |name: &str, value: Option<String>| parts.extend(value.map(|value| format!("{name} {value}")));
    add("k", recipe.k.map(|k| k.to_string()));
    add("budget", recipe.budget.map(|share| format!("{} %", number(share * 100.0))));
    add("scope", (!recipe.scope.is_empty()).then(|| recipe.scope.clone()));
    add("seed", recipe.seed.map(|seed| seed.to_string()));
    add("neuron fraction", recipe.neuron_fraction.map(|share| share.to_string()));
    add("targets", (!recipe.targets.is_empty()).then(|| recipe.targets.join(" ")));
    parts.join(", ")
}
