//! Trainable tokens: rows of an embedding that were trained and replace those of the base.
//!
//! PEFT saves them as `M.trainable_tokens_delta` `[n, d]`, or within LoRA as `M.token_adapter.trainable_tokens_delta`: in spite of the name,
//! the new rows themselves. Which rows they are the config alone says, in the order of the tensor.
//!
//! Source: PEFT 0.21, `peft/tuners/trainable_tokens/layer.py` (`weight.index_copy(0, token_indices, trainable_tokens_delta)`).

use std::collections::BTreeSet;

use serde_json::Value;

use super::{PeftConfig, PeftError, PeftName, PeftType, config::short};
use crate::checkpoint::TensorInfo;

/// The part of names that marks the new rows.
const PART: &str = "trainable_tokens_delta";
/// What LoRA's wrapper adds to the module's name.
const WRAPPER: &str = ".token_adapter";

/// Rows of a weight that an adapter replaces.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplacedRows {
    /// The parameter as the model names it.
    pub name: String,
    /// The name of the tensor in the file, `[rows.len(), d]`.
    pub tensor: String,
    /// Row `rows[i]` of the weight becomes row `i` of the tensor; each row once, in the tensor's order.
    pub rows: Vec<u64>,
}

/// What a config says about which rows were trained.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct TokenIndices {
    /// For every module, or for those whose name ends so.
    by_module: Vec<(Option<String>, Vec<u64>)>,
}

impl TokenIndices {
    /// Reads `token_indices`, or of LoRA `trainable_token_indices`: a list, or lists by the ends of modules' names.
    ///
    /// # Errors
    /// Indices that are no whole numbers from 0 up, or come twice: which of two rows would remain is not defined.
    pub(super) fn of(config: &PeftConfig) -> Result<Self, PeftError> {
        let key = match config.peft_type() {
            PeftType::TrainableTokens => "token_indices",
            _ => "trainable_token_indices",
        };
        let list = |value: &Value| {
            let indices: Option<Vec<u64>> = value.as_array().and_then(|list| list.iter().map(Value::as_u64).collect());
            let bad = |what: &str| config.bad(key, &format!("{what}, found {}", short(value)));
            let indices = indices.ok_or_else(|| bad("a list of whole numbers from 0 up is expected"))?;
            let mut seen = BTreeSet::new();
            match indices.iter().find(|&index| !seen.insert(index)) {
                None => Ok(indices),
                Some(index) => Err(config.bad(key, &format!("row {index} comes twice"))),
            }
        };
        let by_module = match config.keys().get(key) {
            None => Vec::new(),
            Some(Value::Object(lists)) => lists
                .iter()
                .map(|(module, value)| Ok((Some(module.clone()), list(value)?)))
                .collect::<Result<_, PeftError>>()?,
            Some(value) => vec![(None, list(value)?)],
        };
        Ok(Self { by_module: by_module.into_iter().filter(|(_, rows)| !rows.is_empty()).collect() })
    }

    /// Whether the config names no rows.
    pub(super) fn is_empty(&self) -> bool {
        self.by_module.is_empty()
    }

    /// The rows of `module`.
    fn rows(&self, module: &str) -> Result<&[u64], String> {
        let ends = |key: &Option<String>| key.as_ref().is_none_or(|key| module.ends_with(key.as_str()));
        let mut fitting = self.by_module.iter().filter(|(key, _)| ends(key)).map(|(_, rows)| rows);
        let rows = fitting.next().ok_or("has new rows, and the config does not say which rows they are for")?;
        match fitting.all(|other| other == rows) {
            true => Ok(rows),
            false => Err("the config names different rows for it, under several keys".to_owned()),
        }
    }

    /// Reads a tensor of new rows; `None` where it is another one.
    ///
    /// # Errors
    /// Another number of rows than the config names.
    pub(super) fn read(&self, info: &TensorInfo) -> Option<Result<ReplacedRows, String>> {
        let name = PeftName::parse(&info.name, PART).filter(|name| name.part == PART)?;
        let module = name.module.strip_suffix(WRAPPER).unwrap_or(&name.module);
        Some(self.rows(module).and_then(|rows| {
            if info.shape.len() != 2 || info.shape[0] != rows.len() as u64 {
                return Err(format!("shape is {:?}, the config needs [{}, d]", info.shape, rows.len()));
            }
            Ok(ReplacedRows { name: format!("{module}.weight"), tensor: info.name.clone(), rows: rows.to_vec() })
        }))
    }
}
