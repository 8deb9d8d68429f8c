//! Mask files: the chosen columns of each row.

use std::{ops::Range, path::Path};

use super::{
    BaseInfo, MaskError, POSITION_BYTES, ROW_BYTES, Recipe, SparseFile, SparseWriter, TargetInfo,
    document::{MaskDocument, parse_document},
};
use crate::{
    checkpoint::{Context, Existing, Shard},
    tensor::{Dtype, RowColumns},
};

/// The kind of a mask's document.
const KIND: &str = "mask";

/// An open mask: header in memory, columns on disk.
#[derive(Debug)]
pub struct MaskFile {
    pub(super) file: SparseFile,
    recipe: Recipe,
    base: BaseInfo,
}

impl MaskFile {
    /// Opens a mask file and validates everything its header contains. Reads the header only.
    ///
    /// # Errors
    /// [`MaskError::WrongKind`] and [`MaskError::NewerVersion`]; otherwise a list of all inconsistencies.
    pub fn open(path: &Path) -> Result<Self, MaskError> {
        let shard = Shard::open(path)?;
        let MaskDocument { recipe, base, targets, .. } = parse_document(&shard, KIND)?;
        Ok(Self { file: SparseFile::check(shard, targets, false)?, recipe, base })
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        self.file.shard().path()
    }
    /// The open file, for its header and for detecting changes.
    pub fn shard(&self) -> &Shard {
        self.file.shard()
    }
    /// How the columns were chosen.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }
    /// The name of the base.
    pub fn base(&self) -> &BaseInfo {
        &self.base
    }
    /// All targets, sorted by name.
    pub fn targets(&self) -> &[TargetInfo] {
        self.file.targets()
    }
    /// The target of this name.
    pub fn target(&self, name: &str) -> Option<&TargetInfo> {
        self.file.target(name)
    }
    /// Total number of chosen positions.
    pub fn nnz(&self) -> u64 {
        self.targets().iter().map(|target| target.nnz).sum()
    }

    /// Splits a target's rows into runs of at most about `max_len` positions and rows, to be read one at a time.
    ///
    /// # Errors
    /// Row offsets that do not ascend from 0 to the number of columns.
    pub fn row_ranges(
        &self,
        ctx: &Context<'_>,
        target: &TargetInfo,
        max_len: u64,
    ) -> Result<Vec<Range<u64>>, MaskError> {
        Ok(self.file.row_ranges(ctx, target, max_len)?)
    }

    /// Maximum bytes of memory to process `rows` of a target.
    pub(crate) fn rows_bytes(&self, ctx: &Context<'_>, target: &TargetInfo, rows: &Range<u64>) -> u64 {
        self.file.n_positions(ctx, target, rows) * POSITION_BYTES + (rows.end - rows.start) * ROW_BYTES
    }

    /// Reads the columns of `rows` of a target and checks that they ascend within each row and are in range.
    ///
    /// Memory: about 4 bytes per position and 16 per row, and one window.
    ///
    /// # Errors
    /// Columns that are out of range, duplicate or unsorted, with the row.
    ///
    /// # Panics
    /// If the target is not in this file or has no such rows.
    pub fn read_columns(
        &self,
        ctx: &Context<'_>,
        target: &TargetInfo,
        rows: Range<u64>,
    ) -> Result<RowColumns, MaskError> {
        Ok(self.file.read_columns(ctx, target, rows)?)
    }
}

/// Writes a mask file in one pass over the rows.
///
/// Targets may come in any order; the rows of each must come in order. The file is written atomically by
/// [`MaskWriter::finish`]. The same content gives the same bytes, however the rows are split into runs.
///
/// Memory: one buffer, and about 300 bytes per target.
pub struct MaskWriter(pub(super) SparseWriter);

impl MaskWriter {
    /// Starts a mask that will appear at `path`.
    ///
    /// # Errors
    /// The file exists and must be kept.
    pub fn create(path: &Path, existing: Existing) -> Result<Self, MaskError> {
        Ok(Self(SparseWriter::create(path, existing, None)?))
    }

    /// Starts a target: the base's tensor `name` with its dtype and shape as stored. With `uniform_k` every row has
    /// that many columns; without it, rows may differ.
    ///
    /// # Errors
    /// A dtype or shape without rows of floats; a `k` that is out of range.
    ///
    /// # Panics
    /// If the previous target was not ended.
    pub fn begin_target(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[u64],
        transposed: bool,
        uniform_k: Option<u64>,
    ) -> Result<(), MaskError> {
        Ok(self.0.begin_target(name, dtype, shape, transposed, uniform_k)?)
    }

    /// Says how the base stores the open target, a quantized weight, before its first rows come: by its layout's name, such as
    /// `fp8-block`. Type and shape are then those of what it is decoded to.
    ///
    /// # Panics
    /// Where no target is open, or rows came.
    pub fn quantized_as(&mut self, layout: Option<&str>) {
        self.0.quantized_as(layout);
    }

    /// Appends rows to the open target. `base_values` are the base's bytes at their columns, in the same order.
    ///
    /// # Panics
    /// If a row does not match the target, or `base_values` is not one element per column.
    pub fn push_rows(&mut self, columns: &RowColumns, base_values: &[u8]) -> Result<(), MaskError> {
        Ok(self.0.push_rows(columns, &[], base_values)?)
    }

    /// Ends the open target; `whole` is the BLAKE3 of all of the base's bytes, if requested. Returns the number of
    /// chosen positions and the anchor.
    ///
    /// # Panics
    /// If rows are missing.
    pub fn end_target(&mut self, whole: Option<blake3::Hash>) -> (u64, blake3::Hash) {
        self.0.end_target(whole)
    }

    /// Writes the document and commits the file.
    ///
    /// # Errors
    /// A failure to write; a mask without targets; two targets of the same name; an output that appeared in the
    /// meantime.
    ///
    /// # Panics
    /// If the last target was not ended.
    pub fn finish(self, ctx: &Context<'_>, recipe: &Recipe, base: &BaseInfo) -> Result<(), MaskError> {
        let (recipe, base) = (recipe.clone(), base.clone());
        Ok(self.0.finish(ctx, |targets| {
            let kind = KIND.to_owned();
            serde_json::to_string(&MaskDocument { kind, version: targets.version(), recipe, base, targets })
        })?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        checkpoint::TensorFileWriter,
        error::{ErrorKind, Failure},
        mask::samples::{Sample, sample},
    };

    const ANCHOR: &str = "0000000000000000000000000000000000000000000000000000000000000000";

    fn write(path: &Path, samples: &[Sample], step: usize) {
        let mut writer = MaskWriter::create(path, Existing::Replace).unwrap();
        for (i, sample) in samples.iter().enumerate() {
            let Sample { dtype, shape, transposed, uniform_k, .. } = sample;
            writer.begin_target(&format!("t{i}"), *dtype, shape, *transposed, *uniform_k).unwrap();
            for (columns, at) in sample.runs(step) {
                let base = &sample.base_values[at.start * sample.width()..at.end * sample.width()];
                writer.push_rows(&columns, base).unwrap();
            }
            writer.end_target((i == 0).then(|| blake3::hash(b"whole")));
        }
        let base = BaseInfo { name: "b".to_owned(), model_type: Some("llama".to_owned()) };
        writer.finish(&Context::default(), &Recipe::custom(), &base).unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn a_mask_reads_back_as_it_was_written(samples in prop::collection::vec(sample(), 1..4), step in 1usize..6) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("mask.safetensors");
            write(&path, &samples, step);
            let bytes = std::fs::read(&path).unwrap();
            write(&path, &samples, usize::MAX / 2);
            prop_assert_eq!(&bytes, &std::fs::read(&path).unwrap(), "however the rows were split");
            safetensors::SafeTensors::deserialize(&bytes).unwrap();

            let (mask, ctx) = (MaskFile::open(&path).unwrap(), Context::default());
            prop_assert_eq!(mask.base().model_type.as_deref(), Some("llama"));
            prop_assert_eq!(mask.recipe(), &Recipe::custom());
            for (i, sample) in samples.iter().enumerate() {
                let target = mask.target(&format!("t{i}")).unwrap();
                prop_assert_eq!((target.dtype, &target.shape, target.layout), (sample.dtype, &sample.shape, sample.layout));
                prop_assert_eq!(target.anchor, blake3::hash(&sample.base_values));
                prop_assert_eq!(target.blake3, (i == 0).then(|| blake3::hash(b"whole")));
                prop_assert_eq!((target.nnz, target.uniform_k), (sample.columns.nnz() as u64, sample.uniform_k));
                let mut rows = 0..target.layout.n_rows();
                prop_assert_eq!(&mask.read_columns(&ctx, target, rows.clone()).unwrap(), &sample.columns);
                for range in mask.row_ranges(&ctx, target, step as u64).unwrap() {
                    prop_assert_eq!(range.start, rows.start);
                    prop_assert!(range.end > range.start);
                    let columns = mask.read_columns(&ctx, target, range.clone()).unwrap();
                    prop_assert!(columns.nnz() <= step || columns.n_rows() == 1);
                    for row in range.clone() {
                        let (i, j) = ((row - range.start) as usize, row as usize);
                        prop_assert_eq!(columns.row(i), sample.columns.row(j));
                    }
                    rows.start = range.end;
                }
                prop_assert!(rows.is_empty());
            }
        }
    }

    /// A mask with one [2, 4] target "w", this document and the columns 0 and 1.
    fn mask_of(document: Option<&str>) -> MaskError {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let mut file = TensorFileWriter::create(&path, Existing::Keep).unwrap();
        let columns = file.add_tensor("w.columns".to_owned(), Dtype::U16);
        file.append(columns, &[0, 0, 1, 0]).unwrap();
        file.finish_tensor(columns, vec![2, 1]);
        let metadata = document.map(|document| ("neuroada".to_owned(), document.to_owned()));
        file.finish(&Context::default(), &BTreeMap::from_iter(metadata)).unwrap();
        MaskFile::open(&path).unwrap_err()
    }

    fn message(error: &MaskError) -> String {
        let error = error.to_string();
        error[error.find("m.safetensors: ").unwrap() + 15..].to_owned()
    }

    #[test]
    fn files_of_another_kind_are_described() {
        let plain = mask_of(None);
        assert_eq!(message(&plain), "this is a plain checkpoint file; expected a mask");
        assert_eq!(plain.kind(), ErrorKind::BadInput);
        let adapter = mask_of(Some(r#"{"kind":"adapter","version":7,"scale":1}"#));
        assert_eq!(message(&adapter), "this is an adapter; expected a mask");
        let unknown = mask_of(Some(r#"{"kind":"mosk\u001b","version":1}"#));
        assert_eq!(message(&unknown), "this is a file of the unknown kind \"mosk\\u{1b}\"; expected a mask");
        let newer = mask_of(Some(r#"{"kind":"mask","version":3,"colour":"red"}"#));
        assert_eq!(
            message(&newer),
            "its format is version 3, at most 2 is supported: was it made by a newer neuroada-ckpt?"
        );
    }

    #[test]
    fn documents_are_strict() {
        let with = |more: &str, target: &str| {
            let json = format!(
                r#"{{"kind":"mask","version":1,"recipe":{{"score":"magnitude"}},"base":{{"name":"b"}},
                    "targets":{{"w":{{"dtype":"F32","shape":[2,4],"anchor":"{ANCHOR}"{target}}}}}{more}}}"#
            );
            message(&mask_of(Some(&json)))
        };
        let malformed = "the `neuroada` document in its metadata is malformed: ";
        assert!(with(r#","scale":1"#, "").starts_with(&format!("{malformed}unknown field `scale`")));
        assert!(with(r#","base":{"name":"c"}"#, "").starts_with(&format!("{malformed}duplicate field `base`")));
        assert!(with("", r#","blake3":"00""#).starts_with(&format!("{malformed}target \"w\": anchor and blake3 are")));
        assert!(with("", r#","transposed":1"#).starts_with(&format!("{malformed}target \"w\": invalid type")));
        assert_eq!(with("", r#","transposed":true"#), "tensor \"w.columns\": 2 rows, but the target [2, 4] has 4");
    }

    #[test]
    fn a_mask_without_targets_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let writer = MaskWriter::create(&path, Existing::Keep).unwrap();
        let error = writer.finish(&Context::default(), &Recipe::custom(), &BaseInfo::default()).unwrap_err();
        assert_eq!(message(&error), "it would have no targets");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
