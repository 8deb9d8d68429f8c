//! From the stored tensors of a quantized weight to its layout: every shape is checked against the others.

use std::path::Path;

use serde::Deserialize;

use super::{
    CodedLayout, Family, QuantizationConfig, Source, Stored,
    columns::{ColumnCodes, WordPacking},
    decoded_info,
    flat::{FlatCodes, FlatScales},
    grid::{Grid, ScaleType},
    rows::{Global, Packing, RowCodes, Zeros},
};
use crate::{
    checkpoint::{CheckpointError, CodedWeight, Context, Printable, Shard, TensorInfo, codes::Part},
    tensor::{CodeType, Dtype, RowLayout, dtype_name},
};
use Part::{ModuleSuffix, WeightSuffix};

/// What is resolved against: shards, and where in them a tensor of a name lies.
pub(in crate::checkpoint) struct Resolver<'a> {
    pub(in crate::checkpoint) shards: &'a [Shard],
    pub(in crate::checkpoint) find: &'a dyn Fn(&str) -> Option<(u32, u32)>,
    pub(in crate::checkpoint) config: &'a QuantizationConfig,
    pub(in crate::checkpoint) root: &'a Path,
}

/// Why a weight has no layout.
enum Failed {
    /// In words that follow the weight's name.
    Why(String),
    Error(CheckpointError),
}

impl From<String> for Failed {
    fn from(why: String) -> Self {
        Self::Why(why)
    }
}

impl From<CheckpointError> for Failed {
    fn from(error: CheckpointError) -> Self {
        Self::Error(error)
    }
}

fn why<T>(why: impl Into<String>) -> Result<T, Failed> {
    Err(Failed::Why(why.into()))
}

/// A stored tensor of the weight.
#[derive(Clone, Copy)]
struct Found<'a> {
    stored: Stored,
    info: &'a TensorInfo,
}

impl Found<'_> {
    fn named(&self) -> String {
        let TensorInfo { name, dtype, shape, .. } = self.info;
        format!("\"{}\" {} {shape:?}", Printable(name), dtype_name(*dtype))
    }
}

/// A layout before it has its name and its weight.
struct Resolved {
    name: String,
    shape: Vec<u64>,
    stored: Vec<Stored>,
    family: Family,
}

/// bitsandbytes' description of a 4-bit weight.
#[derive(Deserialize)]
struct QuantState {
    blocksize: u64,
    shape: Vec<u64>,
    #[serde(default)]
    nested_blocksize: u64,
    #[serde(default)]
    nested_offset: f32,
}

impl<'a> Resolver<'a> {
    /// The layout of `weight`.
    ///
    /// # Errors
    /// [`CheckpointError::Layout`] says why there is none; a failure to read.
    pub(in crate::checkpoint) fn resolve(&self, weight: &CodedWeight) -> Result<CodedLayout, CheckpointError> {
        let layout = self.resolve_any(weight).and_then(|resolved| {
            let Resolved { name, shape, stored, family } = resolved;
            let (info, _) = decoded_info(&weight.name, shape)?;
            let is_transposed_in_memory = self.part(weight, WeightSuffix("_blocks")).is_some();
            Ok(CodedLayout { info, name, stored, family, is_transposed_in_memory })
        });
        layout.map_err(|failed| match failed {
            Failed::Error(error) => error,
            Failed::Why(why) => CheckpointError::layout(self.root, weight, why),
        })
    }

    fn resolve_any(&self, weight: &CodedWeight) -> Result<Resolved, Failed> {
        if let Some(part) = self.part(weight, ModuleSuffix(".svdquant_lora_a")) {
            return why(format!("NVFP4 with a low-rank part ({}) is not supported", part.named()));
        }
        if let Some(codes) = self.part(weight, ModuleSuffix("._weight_qdata")) {
            return why(format!("torchao's layouts ({}) are not supported", codes.named()));
        }
        if let Some(codes) = self.part(weight, ModuleSuffix(".weight_packed")) {
            return self.compressed_tensors(weight, codes);
        }
        if let Some(codes) = self.part(weight, ModuleSuffix(".qweight")) {
            return self.gptq_or_awq(weight, codes);
        }
        if let Some(codes) = self.part(weight, WeightSuffix("_blocks")) {
            return self.gpt_oss(weight, codes);
        }
        let Some(codes) = self.part(weight, WeightSuffix("")) else {
            return why("its codes lie in another file of the model; give the folder instead of one file");
        };
        match codes.info.dtype {
            Dtype::F8_E4M3 => self.bytes(weight, codes, CodeType::E4M3),
            Dtype::F8_E5M2 => self.bytes(weight, codes, CodeType::E5M2),
            Dtype::I8 | Dtype::U8 => self.integers(weight, codes),
            other => why(format!("codes of type {} are not supported", dtype_name(other))),
        }
    }

    fn part(&self, weight: &CodedWeight, part: Part) -> Option<Found<'a>> {
        let (shard, tensor) = (self.find)(&part.of(&weight.name)?)?;
        let stored = Stored { shard, tensor };
        Some(Found { stored, info: stored.info(self.shards) })
    }

    /// The first of these parts that is stored.
    fn first_of(&self, weight: &CodedWeight, parts: &[Part]) -> Option<Found<'a>> {
        parts.iter().find_map(|part| self.part(weight, *part))
    }

    fn need(&self, weight: &CodedWeight, part: Part) -> Result<Found<'a>, Failed> {
        self.part(weight, part).ok_or_else(|| {
            let name = part.of(&weight.name).unwrap_or_default();
            Failed::Why(format!("its part \"{}\" is missing", Printable(&name)))
        })
    }

    /// All bytes of a small stored tensor.
    fn read(&self, found: Found<'_>) -> Result<Vec<u8>, Failed> {
        const MAX_BYTES: u64 = 64 << 20;
        if found.info.n_bytes() > MAX_BYTES {
            return why(format!("{} is too large for what it is", found.named()));
        }
        let ctx = Context::default();
        Ok(found.stored.read(Source { ctx: &ctx, shards: self.shards }, 0..found.info.n_bytes())?)
    }

    /// The numbers of a small stored tensor of floats.
    fn floats(&self, found: Found<'_>) -> Result<Vec<f32>, Failed> {
        let dtype = match found.info.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => ScaleType::of(found.info.dtype)?,
            _ => return why(format!("{} is no tensor of floats", found.named())),
        };
        Ok(dtype.numbers(&self.read(found)?))
    }

    /// The one number of a stored tensor.
    fn scalar(&self, found: Found<'_>) -> Result<f32, Failed> {
        match self.floats(found)?[..] {
            [number] => Ok(number),
            _ => why(format!("{} holds more than one number", found.named())),
        }
    }

    /// The integers of a small stored tensor.
    fn integers_of(&self, found: Found<'_>) -> Result<Vec<i64>, Failed> {
        let bytes = self.read(found)?;
        match found.info.dtype {
            Dtype::I64 => {
                Ok(bytes.chunks_exact(8).map(|le| i64::from_le_bytes(le.try_into().expect("8 bytes"))).collect())
            }
            Dtype::I32 => {
                let number = |le: &[u8]| i32::from_le_bytes(le.try_into().expect("4 bytes"));
                Ok(bytes.chunks_exact(4).map(|le| number(le).into()).collect())
            }
            _ => why(format!("{} is no tensor of I32 or I64", found.named())),
        }
    }

    /// The group of each column, where `found` reorders columns; all are -1 in files that do not.
    fn group_of(&self, found: Option<Found<'_>>, d_in: u64, n_groups: u64) -> Result<Option<Vec<u32>>, Failed> {
        let Some(found) = found else { return Ok(None) };
        let groups = self.integers_of(found)?;
        if groups.len() as u64 != d_in {
            return why(format!("{} has not one entry for each of {d_in} columns", found.named()));
        }
        if groups.iter().all(|&group| group == -1) {
            return Ok(None);
        }
        let group = |(column, &group): (usize, &i64)| {
            let fits = u32::try_from(group).ok().filter(|group| u64::from(*group) < n_groups);
            fits.ok_or_else(|| {
                Failed::Why(format!("{}: entry {column} is {group}, there are {n_groups} groups", found.named()))
            })
        };
        groups.iter().enumerate().map(group).collect::<Result<Vec<_>, _>>().map(Some)
    }

    /// FP8 and MXFP8: a code in each byte.
    fn bytes(&self, weight: &CodedWeight, codes: Found<'a>, code_type: CodeType) -> Result<Resolved, Failed> {
        let forms = [
            WeightSuffix("_scale_inv"),
            WeightSuffix("_scale"),
            ModuleSuffix(".scale"),
            ModuleSuffix(".scale_weight"),
            ModuleSuffix(".qscale_weight"),
        ];
        let Some(scales) = self.first_of(weight, &forms) else {
            return why("its scales are missing");
        };
        let layout = matrix(codes)?;
        let grid = Grid::new(scales.stored, scales.info, &layout, self.block_for(scales, &layout))?;
        let is_single = grid.is_single() && self.config.block().is_none();
        let name = match (is_single, grid.is_by_rows(), grid.group()) {
            (true, ..) => "fp8-tensor",
            (_, true, _) => "fp8-channel",
            (.., Some(32)) if grid.dtype() == ScaleType::E8M0 => "mxfp8",
            (.., Some(_)) => "fp8-group",
            _ => "fp8-block",
        };
        let row_bytes = layout.d_in;
        let stored = vec![codes.stored, scales.stored];
        let shape = codes.info.shape.clone();
        let codes =
            RowCodes { codes: codes.stored, code_type, row_bytes, ..RowCodes::plain(layout, grid, codes.stored) };
        Ok(Resolved { name: name.to_owned(), shape, stored, family: Family::Rows(codes) })
    }

    /// The block of the config, unless the scales are finer than it: those of MX formats are for groups of columns.
    fn block_for(&self, scales: Found<'_>, layout: &RowLayout) -> Option<[u64; 2]> {
        let [rows, columns] = self.config.block()?;
        let n = scales.info.shape.last().copied().unwrap_or(1);
        (n <= layout.d_in.div_ceil(columns)).then_some([rows, columns])
    }

    /// I8 and U8 under the weight's own name.
    fn integers(&self, weight: &CodedWeight, codes: Found<'a>) -> Result<Resolved, Failed> {
        if let Some(scb) = self.part(weight, ModuleSuffix(".SCB")) {
            return self.int8(codes, scb, Global::Over127, "bnb-int8");
        }
        if let Some(absmax) = self.part(weight, WeightSuffix(".absmax")) {
            return self.bitsandbytes(weight, codes, absmax);
        }
        let Some(scales) =
            self.first_of(weight, &[WeightSuffix("_scale"), WeightSuffix("_scale_inv"), ModuleSuffix(".scale")])
        else {
            return why("its scales are missing");
        };
        let global = match self.part(weight, WeightSuffix("_scale_2")) {
            Some(global) => Global::Times(self.scalar(global)?),
            None => Global::None,
        };
        let parts: Vec<Stored> = [Some(codes), Some(scales), self.part(weight, WeightSuffix("_scale_2"))]
            .into_iter()
            .flatten()
            .map(|it| it.stored)
            .collect();
        let (n, last) = (codes.info.shape.len(), codes.info.shape.last().copied().unwrap_or(0));
        let rows_of = |found: Found<'_>| found.info.shape.first().copied().unwrap_or(1);
        let n_scales = scales.info.shape.last().copied().unwrap_or(1);
        if codes.info.dtype == Dtype::U8 && n == 2 && rows_of(scales) == 2 * rows_of(codes) {
            return self.row_pairs(weight, codes, scales, parts);
        }
        // Two 4-bit floats share a byte where each scale is for 16 or 32 of them.
        let is_fp4 = n_scales > 0
            && matches!((2 * last).checked_div(n_scales), Some(16 | 32))
            && (2 * last).is_multiple_of(n_scales)
            && matches!(scales.info.dtype, Dtype::F8_E4M3 | Dtype::F8_E8M0 | Dtype::U8);
        if is_fp4 {
            return self.fp4(codes, scales, global, parts);
        }
        if codes.info.dtype == Dtype::I8 {
            return self.int8(codes, scales, Global::None, "int8");
        }
        why(format!("{} with scales {} is not supported", codes.named(), scales.named()))
    }

    /// INT8 with scales of rows or blocks.
    fn int8(&self, codes: Found<'a>, scales: Found<'a>, global: Global, name: &str) -> Result<Resolved, Failed> {
        if codes.info.dtype != Dtype::I8 {
            return why(format!("{} is not of type I8", codes.named()));
        }
        let layout = matrix(codes)?;
        let grid = Grid::new(scales.stored, scales.info, &layout, self.block_for(scales, &layout))?;
        let plain = RowCodes::plain(layout, grid, codes.stored);
        let family = RowCodes { code_type: CodeType::I8, row_bytes: layout.d_in, global, ..plain };
        let (shape, stored) = (codes.info.shape.clone(), vec![codes.stored, scales.stored]);
        Ok(Resolved { name: name.to_owned(), shape, stored, family: Family::Rows(family) })
    }

    /// Two 4-bit floats in a byte: MXFP4 or NVFP4.
    fn fp4(
        &self,
        codes: Found<'a>,
        scales: Found<'a>,
        global: Global,
        stored: Vec<Stored>,
    ) -> Result<Resolved, Failed> {
        let shape = widened(codes, 2, 1)?;
        let layout = matrix_of(&shape)?;
        let grid = Grid::new(scales.stored, scales.info, &layout, None)?;
        let (name, group) = match grid.dtype() {
            ScaleType::E8M0 => ("mxfp4", 32),
            ScaleType::E4M3 => ("nvfp4", 16),
            _ => return why(format!("4-bit floats with scales {} are not supported", scales.named())),
        };
        if grid.group() != Some(group) && !(grid.is_by_rows() && layout.d_in == group) {
            return why(format!(
                "{} does not hold a scale for each {group} elements of {}",
                scales.named(),
                codes.named()
            ));
        }
        let plain = RowCodes::plain(layout, grid, codes.stored);
        let family = RowCodes { code_type: CodeType::E2M1, row_bytes: layout.d_in / 2, global, ..plain };
        Ok(Resolved { name: name.to_owned(), shape, stored, family: Family::Rows(family) })
    }

    /// ModelOpt's INT4: two rows share their bytes, and columns may have factors.
    fn row_pairs(
        &self,
        weight: &CodedWeight,
        codes: Found<'a>,
        scales: Found<'a>,
        mut stored: Vec<Stored>,
    ) -> Result<Resolved, Failed> {
        let [rows, d_in] = codes.info.shape[..] else { return why(format!("{} is no matrix", codes.named())) };
        let Some(d_out) = rows.checked_mul(2) else { return why(format!("{} is too large", codes.named())) };
        let shape = vec![d_out, d_in];
        let layout = matrix_of(&shape)?;
        let grid = Grid::new(scales.stored, scales.info, &layout, None)?;
        let factors = match self.part(weight, ModuleSuffix(".pre_quant_scale")) {
            Some(found) => {
                let factors = self.floats(found)?;
                if factors.len() as u64 != d_in {
                    return why(format!("{} has not one factor for each of {d_in} columns", found.named()));
                }
                stored.push(found.stored);
                Some(factors)
            }
            None => None,
        };
        let plain = RowCodes::plain(layout, grid, codes.stored);
        let family = RowCodes { packing: Packing::RowPairs, row_bytes: d_in, factors, ..plain };
        Ok(Resolved { name: "modelopt-int4".to_owned(), shape, stored, family: Family::Rows(family) })
    }

    /// gpt-oss: `[.., d_out, n_groups, 16]` bytes of two 4-bit floats.
    fn gpt_oss(&self, weight: &CodedWeight, codes: Found<'a>) -> Result<Resolved, Failed> {
        let scales = self.need(weight, WeightSuffix("_scales"))?;
        let (shape, n_groups) = match codes.info.shape[..] {
            [ref outer @ .., n_groups, 16] if codes.info.dtype == Dtype::U8 && !outer.is_empty() => {
                let d_in = n_groups.checked_mul(32).ok_or_else(|| format!("{} is too large", codes.named()))?;
                ([outer, &[d_in]].concat(), n_groups)
            }
            _ => return why(format!("{} is not U8 [.., n_groups, 16]", codes.named())),
        };
        if ScaleType::of(scales.info.dtype)? != ScaleType::E8M0 || scales.info.shape.last() != Some(&n_groups) {
            return why(format!("{} does not hold an exponent for each group of {}", scales.named(), codes.named()));
        }
        let layout = matrix_of(&shape)?;
        let grid = Grid::new(scales.stored, scales.info, &layout, None)?;
        let plain = RowCodes::plain(layout, grid, codes.stored);
        let family = RowCodes { code_type: CodeType::E2M1, row_bytes: 16 * n_groups, ..plain };
        let stored = vec![codes.stored, scales.stored];
        Ok(Resolved { name: "mxfp4".to_owned(), shape, stored, family: Family::Rows(family) })
    }

    /// compressed-tensors' packed forms.
    fn compressed_tensors(&self, weight: &CodedWeight, codes: Found<'a>) -> Result<Resolved, Failed> {
        let scales = self.need(weight, WeightSuffix("_scale"))?;
        let mut stored = vec![codes.stored, scales.stored];
        if codes.info.dtype == Dtype::U8 {
            let global = self.part(weight, WeightSuffix("_global_scale"));
            stored.extend(global.map(|global| global.stored));
            let global = match global {
                Some(found) => Global::Over(self.scalar(found)?),
                None => Global::None,
            };
            let [columns, n_scales] = [codes, scales].map(|found| found.info.shape.last().copied().unwrap_or(0));
            // 24 bytes hold 32 elements of six bits, 16 bytes those of four.
            if global == Global::None && n_scales > 0 && columns == 24 * n_scales {
                return self.mxfp6(codes, scales, stored);
            }
            return self.fp4(codes, scales, global, stored);
        }
        if codes.info.dtype != Dtype::I32 {
            return why(format!("{} is not of type I32 or U8", codes.named()));
        }
        self.packed_integers(weight, codes, scales, stored)
    }

    fn mxfp6(&self, codes: Found<'a>, scales: Found<'a>, stored: Vec<Stored>) -> Result<Resolved, Failed> {
        let shape = widened(codes, 4, 3)?;
        let layout = matrix_of(&shape)?;
        let grid = Grid::new(scales.stored, scales.info, &layout, None)?;
        if grid.dtype() != ScaleType::E8M0 {
            return why(format!("6-bit floats with scales {} are not supported", scales.named()));
        }
        let plain = RowCodes::plain(layout, grid, codes.stored);
        let family = RowCodes { code_type: CodeType::E2M3, row_bytes: layout.d_in / 4 * 3, ..plain };
        Ok(Resolved { name: "mxfp6".to_owned(), shape, stored, family: Family::Rows(family) })
    }

    fn packed_integers(
        &self,
        weight: &CodedWeight,
        codes: Found<'a>,
        scales: Found<'a>,
        mut stored: Vec<Stored>,
    ) -> Result<Resolved, Failed> {
        let told = self.need(weight, WeightSuffix("_shape"))?;
        let shape: Vec<u64> = self.integers_of(told)?.iter().map(|&size| u64::try_from(size).unwrap_or(0)).collect();
        let layout = matrix_of(&shape).map_err(|_| format!("{} says {shape:?}, which is no matrix", told.named()))?;
        let words = match codes.info.shape[..] {
            [ref outer @ .., words] if outer == &shape[..shape.len() - 1] => words,
            _ => return why(format!("{} does not hold the rows of a weight {shape:?}", codes.named())),
        };
        let n_bits = self.n_bits(codes, layout.d_in, words)?;
        let grid = self.integer_grid(scales, &layout)?;
        let group_of = self.part(weight, WeightSuffix("_g_idx"));
        stored.extend(group_of.map(|found| found.stored));
        let group_of = self.group_of(group_of, layout.d_in, grid.n_columns)?;
        let zeros = self.part(weight, WeightSuffix("_zero_point"));
        stored.extend(zeros.map(|found| found.stored));
        let zeros = match zeros {
            Some(found) => {
                let n_words = Zeros::n_words(n_bits, layout.d_out);
                let expected = [&shape[..shape.len() - 2], &[n_words, grid.n_columns]].concat();
                if found.info.shape != expected || found.info.dtype != Dtype::I32 {
                    return why(format!("{} is not I32 {expected:?}", found.named()));
                }
                Some(Zeros { stored: found.stored, n_bits })
            }
            None => None,
        };
        let plain = RowCodes::plain(layout, grid, codes.stored);
        let code_type = CodeType::Int(n_bits);
        let family = RowCodes { code_type, row_bytes: words * 4, zeros, group_of, ..plain };
        Ok(Resolved { name: format!("ct-int{n_bits}"), shape, stored, family: Family::Rows(family) })
    }

    /// The width of packed integers: the one that makes these words of a row, among those that the config names where several would.
    fn n_bits(&self, codes: Found<'_>, d_in: u64, words: u64) -> Result<u32, Failed> {
        let fits: Vec<u64> = (1..=8).filter(|n_bits| (d_in * n_bits).div_ceil(32) == words).collect();
        let named = self.config.bit_widths();
        let of_config: Vec<u64> = fits.iter().copied().filter(|n_bits| named.contains(n_bits)).collect();
        match (&fits[..], &of_config[..]) {
            (&[n_bits], _) | (_, &[n_bits]) => Ok(n_bits as u32),
            ([], _) => {
                let older = (1..=8).find(|n_bits| d_in.div_ceil(32 / n_bits) == words);
                let hint = older.map_or_else(String::new, |n_bits| {
                    format!("; it may hold {n_bits}-bit integers as compressed-tensors before 0.20 packed them")
                });
                why(format!("{} does not hold rows of {d_in} integers{hint}", codes.named()))
            }
            _ => {
                why(format!("{} may hold integers of {fits:?} bits, and the config does not say which", codes.named()))
            }
        }
    }

    /// Scales for groups of columns; of groups that do not divide a row the config says how long they are.
    fn integer_grid(&self, scales: Found<'_>, layout: &RowLayout) -> Result<Grid, Failed> {
        let n = scales.info.shape.last().copied().unwrap_or(1);
        let fits = |size: &u64| *size > 0 && n > 1 && layout.d_in.div_ceil(*size) == n;
        let size = self.config.group_sizes().into_iter().find(fits);
        Ok(Grid::new(scales.stored, scales.info, layout, size.map(|size| [1, size]))?)
    }

    /// bitsandbytes' 4-bit weights.
    fn bitsandbytes(&self, weight: &CodedWeight, codes: Found<'a>, absmax: Found<'a>) -> Result<Resolved, Failed> {
        let (nf4, fp4) =
            (WeightSuffix(".quant_state.bitsandbytes__nf4"), WeightSuffix(".quant_state.bitsandbytes__fp4"));
        let (told, name) = match (self.part(weight, nf4), self.part(weight, fp4)) {
            (Some(told), _) => (told, "bnb-nf4"),
            (None, Some(told)) => (told, "bnb-fp4"),
            (None, None) => return why("its part \".quant_state.bitsandbytes__nf4\" is missing"),
        };
        let state: QuantState =
            serde_json::from_slice(&self.read(told)?).map_err(|e| format!("{} is malformed: {e}", told.named()))?;
        let layout = matrix_of(&state.shape)
            .map_err(|_| format!("{} says {:?}, which is no matrix", told.named(), state.shape))?;
        let n = layout.n_elements();
        if state.blocksize == 0 || codes.info.n_bytes() != n.div_ceil(2) {
            return why(format!("{} does not hold {n} codes of four bits", codes.named()));
        }
        let map = self.need(weight, WeightSuffix(".quant_map"))?;
        let table: [f32; 16] =
            self.floats(map)?.try_into().map_err(|_| format!("{} has not 16 numbers", map.named()))?;
        let n_blocks = n.div_ceil(state.blocksize);
        if absmax.info.n_elements() != n_blocks {
            return why(format!("{} does not hold a scale for each of {n_blocks} blocks", absmax.named()));
        }
        let mut stored = vec![codes.stored, absmax.stored, map.stored];
        let scales = match self.part(weight, WeightSuffix(".nested_absmax")) {
            None if absmax.info.dtype == Dtype::F32 => FlatScales::Plain(absmax.stored),
            Some(nested) if absmax.info.dtype == Dtype::U8 && state.nested_blocksize > 0 => {
                let map = self.need(weight, WeightSuffix(".nested_quant_map"))?;
                stored.extend([nested.stored, map.stored]);
                let (table, scales) = (self.floats(map)?, self.floats(nested)?);
                if table.len() != 256 || scales.len() as u64 != n_blocks.div_ceil(state.nested_blocksize) {
                    return why(format!("{} and {} do not fit {}", nested.named(), map.named(), absmax.named()));
                }
                let (codes, block, offset) = (absmax.stored, state.nested_blocksize, state.nested_offset);
                FlatScales::Nested { codes, table, scales, block, offset }
            }
            _ => return why(format!("{} is neither F32, nor U8 with scales of its own", absmax.named())),
        };
        let family = Family::Flat(FlatCodes { codes: codes.stored, table, block: state.blocksize, scales });
        Ok(Resolved { name: name.to_owned(), shape: state.shape, stored, family })
    }

    fn gptq_or_awq(&self, weight: &CodedWeight, codes: Found<'a>) -> Result<Resolved, Failed> {
        let (zeros, scales) =
            (self.need(weight, ModuleSuffix(".qzeros"))?, self.need(weight, ModuleSuffix(".scales"))?);
        let ([lines, words], [n_groups, d_out], [zero_groups, zero_words]) = (two(codes)?, two(scales)?, two(zeros)?);
        if codes.info.dtype != Dtype::I32 || zeros.info.dtype != Dtype::I32 {
            return why(format!("{} and {} are not of type I32", codes.named(), zeros.named()));
        }
        let is_awq = match self.config.method() {
            "awq" => true,
            "gptq" | "auto-round" => false,
            _ => words != d_out,
        };
        let n_bits = self.config.count("bits").or_else(|| self.config.count("w_bit")).unwrap_or(4);
        if !(2..=8).contains(&n_bits) || (is_awq && n_bits != 4) {
            return why(format!("integers of {n_bits} bits are not supported in this layout"));
        }
        let version = self.config.text("version").unwrap_or("gemm");
        if is_awq && !version.eq_ignore_ascii_case("gemm") {
            return why(format!("AWQ's version \"{}\" is not supported, only gemm", Printable(version)));
        }
        let packing = if is_awq { WordPacking::Awq } else { WordPacking::Gptq };
        let d_in = if is_awq { lines } else { lines.saturating_mul(32) / n_bits };
        let fits = zero_groups == n_groups
            && n_groups > 0
            && d_out.checked_mul(n_bits).is_some_and(|bits| bits.is_multiple_of(32) && bits / 32 == zero_words)
            && if is_awq { words == zero_words } else { words == d_out && (lines * 32).is_multiple_of(n_bits) };
        if !fits {
            let [codes, zeros, scales] = [codes, zeros, scales].map(|found| found.named());
            return why(format!("{codes}, {zeros} and {scales} do not fit one another"));
        }
        let g_idx = self.part(weight, ModuleSuffix(".g_idx"));
        let group_size = match self.config.count("group_size").or_else(|| self.config.count("q_group_size")) {
            Some(size) if size > 0 => size,
            _ => d_in.div_ceil(n_groups),
        };
        let group_of = self.group_of(g_idx, d_in, n_groups)?;
        if group_of.is_none() && d_in.div_ceil(group_size) != n_groups {
            return why(format!(
                "{} does not have a row for each group of {group_size} of {d_in} inputs",
                scales.named()
            ));
        }
        let scale_type = match scales.info.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => ScaleType::of(scales.info.dtype)?,
            _ => return why(format!("{} is no tensor of floats", scales.named())),
        };
        // GPTQ's first version stores a zero point less one.
        let is_v2 = self.config.text("checkpoint_format").or_else(|| self.config.text("format")) == Some("gptq_v2");
        let zero_offset = u32::from(!is_awq && !is_v2);
        let shape = vec![d_out, d_in];
        let layout = matrix_of(&shape)?;
        let mut stored = vec![codes.stored, scales.stored, zeros.stored];
        stored.extend(g_idx.map(|found| found.stored));
        let name = format!("{}-int{n_bits}", if is_awq { "awq" } else { "gptq" });
        let (codes, zeros, scales) = (codes.stored, zeros.stored, scales.stored);
        let n_bits = n_bits as u32;
        let family = ColumnCodes {
            codes,
            zeros,
            scales,
            scale_type,
            packing,
            n_bits,
            layout,
            group_size,
            n_groups,
            zero_offset,
            group_of,
        };
        Ok(Resolved { name, shape, stored, family: Family::Columns(family) })
    }
}

impl RowCodes {
    /// FP4 codes without anything special; what differs is set by the caller.
    fn plain(layout: RowLayout, scales: Grid, codes: Stored) -> Self {
        Self {
            codes,
            code_type: CodeType::E2M1,
            row_bytes: 0,
            packing: Packing::Within,
            layout,
            scales,
            zeros: None,
            global: Global::None,
            group_of: None,
            factors: None,
        }
    }
}

/// The codes as a matrix of elements of one byte.
fn matrix(codes: Found<'_>) -> Result<RowLayout, Failed> {
    matrix_of(&codes.info.shape)
        .map_err(|_| Failed::Why(format!("{} is no matrix and no stack of matrices", codes.named())))
}

fn matrix_of(shape: &[u64]) -> Result<RowLayout, String> {
    match shape.len() {
        2 | 3 => RowLayout::of(Dtype::F32, shape, false),
        _ => Err(format!("shape {shape:?} is no matrix and no stack of matrices")),
    }
}

/// The shape of elements of which `of` bytes hold `n`.
fn widened(codes: Found<'_>, n: u64, of: u64) -> Result<Vec<u64>, Failed> {
    let too_large = || Failed::Why(format!("{} is too large", codes.named()));
    let mut shape = codes.info.shape.clone();
    let last = shape.last_mut().ok_or_else(too_large)?;
    *last = (*last / of).checked_mul(n).ok_or_else(too_large)?;
    Ok(shape)
}

fn two(found: Found<'_>) -> Result<[u64; 2], Failed> {
    <[u64; 2]>::try_from(&found.info.shape[..]).map_err(|_| Failed::Why(format!("{} is no matrix", found.named())))
}
