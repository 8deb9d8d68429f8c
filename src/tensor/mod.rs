//! Plain values: dtypes, shapes, rows.
//!
//! Nothing here reads a file or starts a thread. A linear weight is `[d_out, d_in]`, row-major, as stored; its rows
//! are neurons. [`Float`] defines the operations of each element type (order by magnitude, widen, round),
//! [`RowLayout`] how a stored tensor is read as rows. [`RowBlock`] borrows a run of rows, and [`RowColumns`] lists
//! chosen columns row by row.

mod float;
mod float8;
mod layout;
mod names;
mod rows;

pub use float::{Accumulator, Float, is_float, widened, with_float};
pub use float8::{F8E4M3, F8E5M2};
pub use layout::RowLayout;
pub use names::{module_of, projection_kind};
pub use rows::{RowBlock, RowColumns};
pub use safetensors::Dtype;

/// The name of a dtype in safetensors headers, such as `BF16`.
pub fn dtype_name(dtype: Dtype) -> String {
    // The crate's Debug form is the format's spelling.
    format!("{dtype:?}")
}

/// The dtype with this name in safetensors headers.
pub fn parse_dtype(name: &str) -> Option<Dtype> {
    serde_json::from_value(serde_json::Value::String(name.to_owned())).ok()
}

/// Bytes of `n` elements; `None` if that is not a whole number of bytes, or overflows.
pub fn checked_bytes(dtype: Dtype, n: u64) -> Option<u64> {
    let bits = n.checked_mul(dtype.bitsize() as u64)?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// Rounds to a dtype, nearest even, and widens again. Dtypes wider than 16 bits round to float32.
pub fn round_to(dtype: Dtype, x: f64) -> f32 {
    match dtype {
        Dtype::BF16 => half::bf16::from_f64(x).to_f32(),
        Dtype::F16 => half::f16::from_f64(x).to_f32(),
        _ => x as f32,
    }
}
