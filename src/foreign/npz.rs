//! Coordinates in a file of NumPy's `savez`: for each tensor `T`
//!
//! - `T.rows`, `T.cols`: integers `[n]`, where in the tensor as stored; of a stack of matrices, rows count through all of them
//! - `T.values`: floats `[n]`, what is added there
//! - `T.shape`: integers, the tensor's shape; may be missing
//!
//! so that `scipy.sparse.coo_array((z["T.values"], (z["T.rows"], z["T.cols"])), z["T.shape"])` is the delta.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use super::{
    Format,
    elements::Elements,
    input::Input,
    npy::Header,
    sparse::{ForeignAdapter, ForeignTarget, Positions, Rounding},
    zip::Zip,
};
use crate::checkpoint::{CheckpointError, Context, Printable};

/// The arrays of a tensor.
pub(crate) const PARTS: [&str; 4] = ["rows", "cols", "values", "shape"];

/// Opens a file of coordinates.
///
/// # Errors
/// Arrays that belong to no tensor, or are missing, all listed; what is wrong with the zip file or an array.
pub(super) fn open(ctx: &Context<'_>, path: &Path) -> Result<ForeignAdapter, CheckpointError> {
    let input = Arc::new(Input::open(path)?);
    let zip = Zip::open(&input)?;
    let mut problems = Vec::new();
    let mut arrays: BTreeMap<&str, [Option<Header>; 4]> = BTreeMap::new();
    for entry in zip.entries() {
        let split = entry.name.strip_suffix(".npy").and_then(|name| name.rsplit_once('.'));
        let part = split.and_then(|(_, part)| PARTS.iter().position(|known| *known == part));
        let (Some((tensor, _)), Some(part)) = (split, part) else {
            problems.push(format!("`{}` is none of T.rows, T.cols, T.values, T.shape", Printable(&entry.name)));
            continue;
        };
        zip.prove(ctx, &input, entry)?;
        let header = Header::read(&input, entry.data.clone())?;
        arrays.entry(tensor).or_default()[part] = Some(header);
    }
    let mut targets = Vec::new();
    for (name, [rows, columns, values, shape]) in arrays {
        match (rows, columns, values) {
            (Some(rows), Some(columns), Some(values)) => match target(&input, name, [rows, columns, values], shape) {
                Ok(target) => targets.push(target),
                Err(what) => problems.push(format!("\"{}\": {what}", Printable(name))),
            },
            _ => problems.push(format!("\"{}\": needs rows, cols and values", Printable(name))),
        }
    }
    if !problems.is_empty() {
        let what = "not a file of coordinates".to_owned();
        return Err(CheckpointError::Many { path: path.to_owned(), what, problems });
    }
    ForeignAdapter { path: path.to_owned(), format: Format::Npz, targets, inputs: vec![input], folder: None }.checked()
}

fn target(input: &Arc<Input>, name: &str, arrays: [Header; 3], shape: Option<Header>) -> Result<ForeignTarget, String> {
    let elements = |header: &Header| {
        let dtype = header.dtype.ok_or("an array's elements are no numbers that are read here")?;
        match header.shape[..] {
            [n] => Ok(Elements { input: Arc::clone(input), dtype, start: header.data_start, stride: 1, n }),
            _ => Err(format!("an array has shape {:?}, one dimension is needed", header.shape)),
        }
    };
    let [rows, columns, values] = &arrays;
    let shape = shape.map(|header| {
        let sizes = elements(&header)?;
        let mut shape = Vec::new();
        if !sizes.are_positions() || sizes.n > 8 {
            return Err("its shape is no list of sizes".to_owned());
        }
        sizes.positions(0..sizes.n, &mut shape).map_err(|e| e.to_string())?;
        Ok(shape)
    });
    Ok(ForeignTarget {
        name: name.to_owned(),
        positions: Positions::Pairs(elements(rows)?, elements(columns)?),
        values: elements(values)?,
        shape: shape.transpose()?,
        rounding: Rounding::None,
        has_padding: false,
    })
}
