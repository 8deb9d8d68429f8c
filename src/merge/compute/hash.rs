//! Hashes of whole tensors: the BLAKE3 of the BLAKE3s of their rows, 16 at a time, so that blocks are hashed as they come, on all
//! threads.

use super::HASH_ROWS;

/// Hashes a tensor's rows as they come, in order.
#[derive(Default)]
pub(in crate::merge) struct RowsHasher(blake3::Hasher);

impl RowsHasher {
    /// The hashes of a block's groups of rows; blocks begin at multiples of [`HASH_ROWS`].
    pub(in crate::merge) fn groups(bytes: &[u8], row_bytes: u64) -> Vec<u8> {
        let group = (row_bytes * HASH_ROWS) as usize;
        bytes.chunks(group).flat_map(|rows| *blake3::hash(rows).as_bytes()).collect()
    }
    pub(in crate::merge) fn push(&mut self, groups: &[u8]) {
        self.0.update(groups);
    }
    /// The hash of all rows, in hexadecimal; the next row begins another tensor.
    pub(in crate::merge) fn finish(&mut self) -> String {
        let hash = self.0.finalize().to_hex().to_string();
        self.0.reset();
        hash
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_does_not_depend_on_blocks() {
        let bytes: Vec<u8> = (0..50 * 4u32).map(|i| i as u8).collect();
        let hash = |cuts: &[usize]| {
            let mut hasher = RowsHasher::default();
            for cut in cuts.windows(2) {
                hasher.push(&RowsHasher::groups(&bytes[cut[0] * 4..cut[1] * 4], 4));
            }
            hasher.finish()
        };
        assert_eq!(hash(&[0, 50]), hash(&[0, 16, 48, 50]));
    }
}
