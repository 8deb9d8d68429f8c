//! Edge-case rows: bell-shaped, full of ties, all equal, signed zeros, subnormals, infinities.

use neuroada_ckpt::{
    Dtype,
    internals::tensor::{Accumulator, Float, with_float},
};

pub(crate) const DTYPES: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];

/// SplitMix64: the `i`-th number of a sequence.
pub(crate) fn random(i: u64) -> u64 {
    let z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Approximately normal, with mean 0 and standard deviation about 0.6.
pub(crate) fn bell(i: u64) -> f64 {
    (0..4).map(|j| (random(4 * i + j) % 10_007) as f64 / 10_007.0 - 0.5).sum()
}

pub(crate) fn bytes_of(dtype: Dtype, values: impl IntoIterator<Item = f64>) -> Vec<u8> {
    with_float!(dtype, T => {
        let mut bytes = Vec::new();
        let mut le = [0; 8];
        for value in values {
            T::from_acc(Accumulator::from_f64(value)).write_le(&mut le);
            bytes.extend_from_slice(&le[..T::BYTES]);
        }
        bytes
    }, else unreachable!())
}

/// The number of rows of [`rows`].
pub(crate) const N_ROWS: usize = 11;

/// `[N_ROWS, d_in]`; more rows than a block of eight warps.
pub(crate) fn rows(dtype: Dtype, d_in: usize, seed: u64) -> Vec<u8> {
    let n = d_in as u64;
    let at = |row: u64, i: u64| -> f64 {
        let r = random(seed ^ (row << 40 | i));
        match row {
            0..=3 => bell(seed.wrapping_add(row * n + i)),
            4 => (r % 5) as f64 - 2.0,
            5 => -0.25,
            6 => [0.0, -0.0][r as usize % 2],
            7 => [0.0, 6e-8, -6e-8, 1e-7, -1e-40, 1e-44][r as usize % 6],
            8 => [1.0, f64::INFINITY, f64::NEG_INFINITY, 0.5][r as usize % 4],
            9 => i as f64 / n as f64,
            _ => 1.0 - i as f64 / n as f64,
        }
    };
    bytes_of(dtype, (0..N_ROWS as u64).flat_map(|row| (0..n).map(move |i| at(row, i))))
}
