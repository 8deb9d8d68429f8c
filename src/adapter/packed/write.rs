//! Packing: once over the adapter to learn the odds, once more to code it.

use std::{collections::BTreeMap, ops::Range, path::Path};

use serde::Serialize;

use super::{
    ColumnsKind, KIND, PackedDocument,
    block::{self, BLOCK, BlockShape, BlockValues},
    derive::DerivedColumns,
    index::{Index, TargetIndex},
    keep,
    lossy::{Differences, LossyError, MergedError, Shortened},
    subset::log2_binomial,
    values::{Counts, number_of},
};
use crate::{
    adapter::{
        Adapter, AdapterError, AdapterId,
        file::widen,
        id::{IdHasher, RowHasher, hash_positions},
    },
    backend::{ScaledDeltas, merged_values},
    checkpoint::{
        Checkpoint, CheckpointError, Context, DOCUMENT_KEY, Existing, TensorFileWriter, for_each_ordered, gather_cost,
        gather_rows, tensor_file_header,
    },
    mask::{Part, TargetInfo},
    tensor::{Dtype, RowColumns},
};

/// What becomes of the columns.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum ColumnsChoice {
    /// Left out where a base is given and the recipe chooses the same ones from it; else packed.
    #[default]
    Auto,
    /// Left out, or the adapter is not packed.
    Derived,
    /// In the file, so that it can be read without its base.
    Packed,
}

/// What becomes of the values.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum ValuesChoice {
    /// They stay as they are.
    #[default]
    Keep,
    /// Rounded to BF16.
    Bf16,
    /// Rounded to F16.
    F16,
    /// Whole numbers from -127 to 127 times a scale for every 128 of them.
    Int8,
    /// Whole numbers from -7 to 7 times a scale for every 128 of them.
    Int4,
}

impl ValuesChoice {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keep => "kept",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }
}

/// How to pack.
#[derive(Clone, Copy, Debug, Default)]
pub struct PackOptions<'a> {
    /// What becomes of the columns.
    pub columns: ColumnsChoice,
    /// What becomes of the values.
    pub values: ValuesChoice,
    /// The base, for derived columns and for what shortened values do to it.
    pub base: Option<&'a Checkpoint>,
}

/// What packing made of an adapter.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct PackReport {
    /// The base's name.
    pub base: String,
    /// The id of what was packed; with shortened values another than `source_id`.
    pub id: String,
    /// The id of the adapter that was given.
    pub source_id: String,
    /// Targets.
    pub n_tensors: usize,
    /// Deltas.
    pub n_deltas: u64,
    /// Whether columns are `derived` from the base or `packed`.
    pub columns: ColumnsKind,
    /// Why columns are not derived, where a base was given.
    pub columns_note: Option<String>,
    /// `kept`, `bf16`, `f16`, `int8` or `int4`.
    pub values: &'static str,
    /// Bytes of the adapter as a plain file.
    pub raw_bytes: u64,
    /// Bytes of the packed file.
    pub packed_bytes: u64,
    /// Of those, what tells the columns.
    pub columns_bytes: u64,
    /// What tells the values.
    pub values_bytes: u64,
    /// What tells the adapter's own header: names, shapes, hashes of the base, the recipe.
    pub header_bytes: u64,
    /// The information in the columns, `log2 C(d_in, k)` for each row, in bytes.
    pub columns_limit: f64,
    /// The information in the values, bit plane by bit plane, in bytes.
    pub values_limit: f64,
    /// What shortened values cost; none where they were kept.
    pub error: Option<LossyError>,
    /// What that makes of merged weights; none without a base.
    pub merged: Option<MergedError>,
}

/// Packs an adapter into a file at `output`; see the format in the documentation of the source folder.
///
/// Reads the adapter twice, and the base as often as its recipe needs where columns may be derived. With kept values the id stays
/// the same and [`Adapter::write_plain`] gives the same bytes back. Memory: a few blocks of rows per thread.
///
/// ```
/// use neuroada_ckpt::{Adapter, Context, Existing, PackOptions, pack_adapter};
/// # let dir = tempfile::tempdir()?;
/// # let (packed, plain) = (dir.path().join("packed.safetensors"), dir.path().join("plain.safetensors"));
/// let (ctx, path) = (Context::default(), "fixtures/tiny-llama-adapter.safetensors".as_ref());
/// let adapter = Adapter::open(path)?;
/// pack_adapter(&ctx, &adapter, &PackOptions::default(), &packed, Existing::Keep)?;
/// let again = Adapter::open(&packed)?;
/// assert_eq!(again.id(&ctx)?, adapter.id(&ctx)?);
/// again.write_plain(&ctx, &plain, Existing::Keep)?;
/// assert!(std::fs::read(&plain)? == std::fs::read(path)?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// An adapter that is not what it should be, another base, columns that should be derived and cannot, values that the chosen type
/// does not hold. Nothing was written.
pub fn pack_adapter(
    ctx: &Context<'_>,
    adapter: &Adapter,
    options: &PackOptions<'_>,
    output: &Path,
    existing: Existing,
) -> Result<PackReport, AdapterError> {
    let mut file = TensorFileWriter::create(output, existing)?;
    let (derived, columns_note) = choose_columns(ctx, adapter, options)?;
    let survey = Survey::of(ctx, adapter, options)?;
    let columns = if derived.is_some() { ColumnsKind::Derived } else { ColumnsKind::Packed };

    let blocks = file.add_tensor("blocks".to_owned(), Dtype::U8);
    let mut index = Index { odds: survey.odds(), targets: Vec::new() };
    let (mut at, mut columns_bytes) = (0, 0);
    ctx.observer.begin("packing", adapter.nnz());
    for target in adapter.targets() {
        index.targets.push(TargetIndex::new(options.values.kind(adapter.values_dtype(target)), 0));
    }
    let Index { odds, targets: of_targets } = &mut index;
    for_each_ordered(
        ctx,
        all_blocks(ctx, adapter)?,
        |(place, rows)| adapter.rows_bytes(ctx, &adapter.targets()[*place], rows) + block::CODE_BYTES,
        |(place, rows)| {
            let target = &adapter.targets()[*place];
            let kind = options.values.kind(adapter.values_dtype(target));
            let (columns, stored) = adapter.read_stored(ctx, target, rows.clone())?;
            let values = shorten(adapter, target, rows.start, &columns, stored, options.values)?;
            let shape = BlockShape {
                n_rows: columns.n_rows(),
                n_positions: columns.nnz() as u64,
                uniform_k: target.uniform_k,
                d_in: target.layout.d_in,
                kind,
            };
            let values = match kind.quantised() {
                Some(_) => BlockValues::Quantised(&values.groups),
                None => BlockValues::Stored(&values.stored),
            };
            let code = block::encode(shape, &columns, derived.is_none(), &values, &odds[&kind]);
            ctx.observer.advance(columns.nnz() as u64);
            Ok::<_, AdapterError>((columns.nnz() as u64, code))
        },
        |(place, rows), (n_positions, (code, n_column_bytes))| {
            let of_target = &mut of_targets[place];
            if rows.start == 0 {
                of_target.begin_at(at);
            }
            of_target.push(rows.end - rows.start, n_positions, code.len() as u64);
            at += code.len() as u64;
            columns_bytes += n_column_bytes as u64;
            Ok(file.append(blocks, &code)?)
        },
    )?;
    adapter.shard().unchanged()?;
    file.finish_tensor(blocks, vec![at]);

    let (header_json, adapter_bytes) = plain_header(adapter, options.values, output)?;
    let header = keep(&header_json);
    let kept_index = keep(&index.write(adapter.targets()));
    for (name, bytes) in [("header", &header), ("index", &kept_index)] {
        let id = file.add_tensor(name.to_owned(), Dtype::U8);
        file.append(id, bytes)?;
        file.finish_tensor(id, vec![bytes.len() as u64]);
    }
    let document = PackedDocument {
        kind: KIND.to_owned(),
        version: if adapter.targets().iter().any(|target| target.quantized.is_some()) { 2 } else { 1 },
        id: survey.ids.1.to_string(),
        adapter_bytes,
        columns,
        columns_digest: match &derived {
            Some(derived) => Some(derived.digest(ctx, adapter.targets())?.to_hex().to_string()),
            None => None,
        },
    };
    let json = serde_json::to_string(&document)
        .map_err(|e| CheckpointError::bad_file(output, format!("its document cannot be written: {e}")))?;
    file.finish(ctx, &BTreeMap::from([(DOCUMENT_KEY.to_owned(), json)]))?;
    Ok(PackReport {
        base: adapter.base().name.clone(),
        id: survey.ids.1.to_string(),
        source_id: survey.ids.0.to_string(),
        n_tensors: adapter.targets().len(),
        n_deltas: adapter.nnz(),
        columns,
        columns_note,
        values: options.values.name(),
        raw_bytes: adapter.plain_bytes(),
        packed_bytes: Adapter::open(output).map_err(|e| e.after_commit(output))?.n_bytes(),
        columns_bytes,
        values_bytes: at - columns_bytes,
        header_bytes: header.len() as u64,
        columns_limit: survey.sums.column_bits / 8.0,
        values_limit: survey.value_bits() / 8.0,
        error: (options.values != ValuesChoice::Keep).then(|| survey.sums.deltas.lossy()),
        merged: survey.sums.merged.map(|merged| merged.merged()),
    })
}

/// All blocks of all targets, in order: the target's place, and rows of it.
fn all_blocks(ctx: &Context<'_>, adapter: &Adapter) -> Result<Vec<(usize, Range<u64>)>, AdapterError> {
    let mut blocks = Vec::new();
    for (place, target) in adapter.targets().iter().enumerate() {
        blocks.extend(adapter.row_ranges(ctx, target, BLOCK)?.into_iter().map(|rows| (place, rows)));
    }
    Ok(blocks)
}

/// Columns chosen again where they are the adapter's and that is wanted, or why not.
fn choose_columns(
    ctx: &Context<'_>,
    adapter: &Adapter,
    options: &PackOptions<'_>,
) -> Result<(Option<DerivedColumns>, Option<String>), AdapterError> {
    let cannot = |what: String| AdapterError::NotDerived { path: adapter.path().to_owned(), what };
    let Some(base) = options.base.filter(|_| options.columns != ColumnsChoice::Packed) else {
        return match options.columns {
            ColumnsChoice::Derived => Err(cannot("that takes the base".to_owned())),
            _ => Ok((None, None)),
        };
    };
    let found = match DerivedColumns::follow(ctx, adapter.recipe(), adapter.targets(), base)? {
        Ok(derived) => {
            let mut hasher = blake3::Hasher::new();
            for target in adapter.targets() {
                for rows in adapter.row_ranges(ctx, target, BLOCK)? {
                    hash_positions(&mut hasher, &adapter.read_stored(ctx, target, rows)?.0);
                }
            }
            match derived.digest(ctx, adapter.targets())? == hasher.finalize() {
                true => Ok(derived),
                false => Err("its columns are not those that its recipe chooses from this base".to_owned()),
            }
        }
        Err(why) => Err(why),
    };
    match found {
        Ok(derived) => {
            derived.check_anchors(ctx, adapter.path(), adapter.targets(), base)?;
            Ok((Some(derived), None))
        }
        Err(why) if options.columns == ColumnsChoice::Derived => Err(cannot(why)),
        Err(why) => Ok((None, Some(why))),
    }
}

/// The values of a block as they will be packed.
fn shorten(
    adapter: &Adapter,
    target: &TargetInfo,
    first_row: u64,
    columns: &RowColumns,
    stored: Vec<u8>,
    choice: ValuesChoice,
) -> Result<Shortened, AdapterError> {
    let shortened = choice.shorten(adapter.values_dtype(target), stored);
    shortened.map_err(|at| {
        let (row, column) = (first_row + columns.row_of(at) as u64, columns.columns()[at]);
        let what = format!("row {row}, column {column}: the delta does not fit {}", choice.name());
        CheckpointError::bad_tensor(adapter.path(), &target.name, what).into()
    })
}

/// The header of the adapter as a plain file, and the file's bytes.
fn plain_header(adapter: &Adapter, values: ValuesChoice, output: &Path) -> Result<(Vec<u8>, u64), AdapterError> {
    if values == ValuesChoice::Keep {
        return Ok((adapter.header_json()?, adapter.plain_bytes()));
    }
    let mut tensors = Vec::new();
    for target in adapter.targets() {
        for part in [Part::Columns, Part::RowOffsets, Part::Values] {
            if let Some(info) = adapter.tensor(target, part) {
                let dtype = if part == Part::Values { values.dtype(info.dtype) } else { info.dtype };
                tensors.push((info.name.clone(), dtype, info.shape.clone()));
            }
        }
    }
    Ok(tensor_file_header(output, tensors, adapter.metadata())?)
}

/// What the first pass learns.
struct Survey {
    /// Of the adapter as it is, and as it will be.
    ids: (AdapterId, AdapterId),
    sums: Sums,
}

/// What blocks add up to.
#[derive(Default)]
struct Sums {
    counts: BTreeMap<super::values::ValueKind, Counts>,
    n_groups: u64,
    column_bits: f64,
    deltas: Differences,
    merged: Option<Differences>,
}

/// What a block adds to it.
struct OfBlock {
    columns: RowColumns,
    source: Vec<u8>,
    values: Shortened,
    counts: Counts,
    column_bits: f64,
    deltas: Differences,
    /// The base's values, and what becomes of them either way.
    merged: Option<(Vec<u8>, Differences)>,
}

/// Of the target whose blocks are coming.
#[derive(Default)]
struct TargetHashers {
    /// As the adapter is.
    source: RowHasher,
    /// As it will be.
    packed: RowHasher,
    /// The base's values.
    anchor: blake3::Hasher,
}

impl Survey {
    fn of(ctx: &Context<'_>, adapter: &Adapter, options: &PackOptions<'_>) -> Result<Self, AdapterError> {
        let choice = options.values;
        // Kept values merge into what they merged into.
        let base = options.base.filter(|_| choice != ValuesChoice::Keep);
        let new_id = || IdHasher::new(adapter.scale(), adapter.targets());
        let (mut source_id, mut id) = (new_id(), new_id());
        let mut sums = Sums { merged: base.map(|_| Differences::default()), ..Sums::default() };
        ctx.observer.begin("surveying", adapter.nnz());
        let mut hashers = TargetHashers::default();
        for_each_ordered(
            ctx,
            all_blocks(ctx, adapter)?,
            |(place, rows)| {
                adapter.rows_bytes(ctx, &adapter.targets()[*place], rows) + block::CODE_BYTES + gather_cost(ctx)
            },
            |(place, rows)| {
                ctx.observer.advance(rows.end - rows.start);
                survey_block(ctx, adapter, &adapter.targets()[*place], rows.clone(), choice, base)
            },
            |(place, rows), block: OfBlock| {
                let target = &adapter.targets()[place];
                if rows.start == 0 {
                    hashers = TargetHashers::default();
                }
                hashers.source.rows(&block.columns, &block.source);
                hashers.packed.rows(&block.columns, &block.values.stored);
                sums.n_groups += block.values.groups.len() as u64;
                sums.column_bits += block.column_bits;
                sums.deltas.add(&block.deltas);
                if let (Some(sum), Some((base_values, merged))) = (&mut sums.merged, &block.merged) {
                    hashers.anchor.update(base_values);
                    sum.add(merged);
                }
                let kind = block.values.kind;
                sums.counts.entry(kind).or_insert_with(|| Counts::new(kind)).add(&block.counts);
                if rows.end < target.layout.n_rows() {
                    return Ok(());
                }
                if let Some(base) = base.filter(|_| hashers.anchor.finalize() != target.anchor) {
                    return Err(AdapterError::other_base("it", adapter.path(), &target.name, adapter.base(), base));
                }
                let dtype = adapter.values_dtype(target);
                source_id.target(target, dtype, &hashers.source);
                id.target(target, choice.dtype(dtype), &hashers.packed);
                Ok(())
            },
        )?;
        let ids = (source_id.finish(), id.finish());
        adapter.expect_id(ids.0)?;
        Ok(Self { ids, sums })
    }

    fn odds(&self) -> BTreeMap<super::values::ValueKind, Vec<u16>> {
        self.sums.counts.iter().map(|(&kind, counts)| (kind, counts.odds())).collect()
    }

    fn value_bits(&self) -> f64 {
        self.sums.counts.values().map(Counts::entropy).sum::<f64>() + 16.0 * self.sums.n_groups as f64
    }
}

fn survey_block(
    ctx: &Context<'_>,
    adapter: &Adapter,
    target: &TargetInfo,
    rows: Range<u64>,
    choice: ValuesChoice,
    base: Option<&Checkpoint>,
) -> Result<OfBlock, AdapterError> {
    let dtype = adapter.values_dtype(target);
    let (columns, source) = adapter.read_stored(ctx, target, rows.clone())?;
    let before = adapter.widen_finite(target, rows.start, &columns, &source)?;
    let values = shorten(adapter, target, rows.start, &columns, source.clone(), choice)?;
    let mut counts = Counts::new(values.kind);
    if values.kind.quantised().is_some() {
        values.groups.iter().flat_map(|group| group.told(values.kind)).for_each(|number| counts.count(number));
    } else {
        values.stored.chunks_exact(values.kind.width()).for_each(|le| counts.count(number_of(le)));
    }
    let after = widen(choice.dtype(dtype), &values.stored);
    let merged = match base {
        None => None,
        Some(base) => {
            let tensor = target
                .find_in(base)?
                .ok_or_else(|| AdapterError::other_base("it", adapter.path(), &target.name, adapter.base(), base))?;
            let originals = gather_rows(ctx, tensor, target.layout, rows.start, &columns)?;
            let merge = |values: &[f32]| {
                let layer = ScaledDeltas { columns: &columns, values, scale: adapter.scale() };
                merged_values(target.dtype, &[layer], &columns, &originals).0
            };
            let differences = Differences::of_weights(target.dtype, &originals, &merge(&before), &merge(&after));
            Some((originals, differences))
        }
    };
    let mut bits = BTreeMap::new();
    let column_bits = (0..columns.n_rows())
        .map(|row| {
            let k = columns.row(row).len() as u64;
            *bits.entry(k).or_insert_with(|| log2_binomial(target.layout.d_in, k))
        })
        .sum();
    let deltas = Differences::of_deltas(&before, &after);
    Ok(OfBlock { columns, source, values, counts, column_bits, deltas, merged })
}
