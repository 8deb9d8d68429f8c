//! What the published NeuroAda code leaves on disk.
//!
//! A folder with `positions.npy`, a pickled dictionary of `[nnz, 2]` positions (row, column) by the names of weights, and
//! `tunable_para/state_dict_tunable.pt`, the trained values in the same order under `NAME_new`. Neither knows its base.
//!
//! Source: <https://github.com/FightingFighting/NeuroAda>, `train_our.py` and `utils/select_para.py`.

use std::{collections::HashMap, path::Path, sync::Arc};

use super::{
    Format,
    input::Input,
    sparse::{ForeignAdapter, ForeignTarget, Positions, Rounding},
    torch::{open_pickled_array, open_saved},
};
use crate::checkpoint::{CheckpointError, Context, Printable};

/// Names in the folder.
pub(crate) const POSITIONS: &str = "positions.npy";
pub(crate) const VALUES: &str = "tunable_para/state_dict_tunable.pt";

/// Opens a folder of the published code.
///
/// # Errors
/// What is wrong with either pickle; positions without values and values without positions, all listed: whole tensors that
/// were tuned beside the chosen entries (heads, biases) are no deltas.
pub(super) fn open(ctx: &Context<'_>, folder: &Path) -> Result<ForeignAdapter, CheckpointError> {
    let positions_file = Arc::new(Input::open(&folder.join(POSITIONS))?);
    let values_file = Arc::new(Input::open(&folder.join(VALUES))?);
    let positions = open_pickled_array(Arc::clone(&positions_file))?;
    let values = open_saved(ctx, Arc::clone(&values_file))?;
    let mut values: HashMap<_, _> = values.into_iter().collect();
    let (mut targets, mut problems) = (Vec::new(), Vec::new());
    for (name, positions) in positions {
        let mut problem = |what: String| problems.push(format!("\"{}\": {what}", Printable(&name)));
        let Some(values) = values.remove(format!("{name}_new").as_str()) else {
            problem(format!("has positions and no values: `{VALUES}` has no \"{}_new\"", Printable(&name)));
            continue;
        };
        if positions.shape.len() != 2 || positions.shape[1] != 2 || values.shape.len() != 1 {
            let (a, b) = (&positions.shape, &values.shape);
            problem(format!("positions are {a:?} and values {b:?}; [n, 2] and [n] are needed"));
            continue;
        }
        targets.push(ForeignTarget {
            name: name.to_string(),
            positions: Positions::Pairs(positions.along(0), positions.along(1)),
            values: values.along(0),
            shape: None,
            rounding: Rounding::ToWeight,
            has_padding: false,
        });
    }
    let mut left: Vec<String> = values
        .keys()
        .map(|name| {
            let what = "was tuned as a whole: it has values and no positions, so it is no delta on chosen entries";
            format!("\"{}\": {what}", Printable(name))
        })
        .collect();
    left.sort_unstable();
    problems.extend(left);
    if !problems.is_empty() {
        let what = "positions and values do not belong together".to_owned();
        return Err(CheckpointError::Many { path: folder.to_owned(), what, problems });
    }
    let inputs = vec![positions_file, values_file];
    ForeignAdapter { path: folder.to_owned(), format: Format::Published, targets, inputs, folder: None }.checked()
}
