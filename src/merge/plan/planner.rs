//! From adapters and a checkpoint to a [`MergePlan`].

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use super::{
    added::{Added, AddedTensors},
    term::{Does, Magnitude, MergeTarget, Product, ReplacedRows, Term},
};
use crate::{
    adapter::Adapter,
    checkpoint::{Checkpoint, Printable, Shard, TensorInfo, TensorRef},
    foreign::{self, FullTensor, LoraAdapter, LoraModule, LoraShape},
    mask::TargetInfo,
    merge::{
        AdapterReading, ExpertOrder, MergeError, Undecided,
        factors::Matrix,
        source::{AnyAdapter, Source},
    },
    tensor::{Dtype, dtype_name, projection_kind},
    weights::{Axes, Placement, Reading, Unplaced, WeightMap},
};

/// Whether a tensor of an adapter is what a stored tensor was before anything was merged into it, byte for byte.
pub(super) type IsOriginal<'m, 'a> = dyn Fn(TensorRef<'a>, (&Shard, &TensorInfo)) -> Result<bool, MergeError> + 'm;

pub(super) struct Planner<'m, 'a> {
    pub(super) map: &'m WeightMap<'a>,
    pub(super) reading: &'m AdapterReading,
    pub(super) is_original: &'m IsOriginal<'m, 'a>,
    /// By the tensor's name.
    pub(super) targets: BTreeMap<&'a str, MergeTarget<'a>>,
    pub(super) added: AddedTensors<'a>,
    pub(super) notes: Vec<String>,
    /// Of the current adapter.
    pub(super) problems: Vec<String>,
}

impl<'m, 'a> Planner<'m, 'a> {
    pub(super) fn new(
        map: &'m WeightMap<'a>,
        reading: &'m AdapterReading,
        is_original: &'m IsOriginal<'m, 'a>,
    ) -> Self {
        let (targets, added) = (BTreeMap::new(), AddedTensors::new());
        Self { map, reading, is_original, targets, added, notes: Vec::new(), problems: Vec::new() }
    }

    /// Finds the place of everything that an adapter holds.
    ///
    /// # Errors
    /// [`MergeError::Unmatched`] lists everything that the checkpoint does not have as the adapter needs it.
    pub(super) fn add(&mut self, source: &'a Source) -> Result<(), MergeError> {
        self.problems.clear();
        let n_targets = match &source.adapter {
            AnyAdapter::Sparse(sparse) => self.add_sparse(sparse, source),
            AnyAdapter::Lora(lora) => self.add_lora(lora, source)?,
            AnyAdapter::Kept(_) => unreachable!("the places of copies are recorded"),
        };
        if self.problems.is_empty() {
            return Ok(());
        }
        Err(MergeError::Unmatched {
            adapter: source.path().to_owned(),
            base: self.map.checkpoint().name(),
            n_targets,
            problems: std::mem::take(&mut self.problems),
        })
    }

    pub(super) fn problem(&mut self, name: &str, what: impl std::fmt::Display) {
        self.problems.push(format!("\"{}\": {what}", Printable(name)));
    }

    pub(super) fn refused(&self, what: impl Into<String>) -> MergeError {
        MergeError::Refused { path: self.map.checkpoint().root().to_owned(), what: what.into() }
    }

    pub(super) fn undecided(&self, tensor: &str, open: Undecided, what: impl Into<String>) -> MergeError {
        let path = self.map.checkpoint().root().to_owned();
        MergeError::Undecided { path, tensor: tensor.to_owned(), open, what: what.into() }
    }

    /// The target of a tensor, as a matrix of `n_columns` columns.
    fn target(&mut self, tensor: TensorRef<'a>, n_columns: u64) -> Result<&mut MergeTarget<'a>, String> {
        if let Some(weight) = tensor.coded() {
            return Err(weight.refusal());
        }
        let n_elements = tensor.info.n_elements();
        if n_columns == 0 || n_elements == 0 || !n_elements.is_multiple_of(n_columns) {
            return Err(format!("the base has shape {:?}, rows of {n_columns} are needed", tensor.info.shape));
        }
        let n_rows = n_elements / n_columns;
        let new = || MergeTarget { tensor, n_rows, n_columns, terms: Vec::new() };
        let target = self.targets.entry(&tensor.info.name).or_insert_with(new);
        if target.n_columns != n_columns {
            return Err("two adapters read it as different matrices".to_owned());
        }
        Ok(target)
    }

    /// The same for what changes whole tensors.
    fn whole_target(&mut self, tensor: TensorRef<'a>, n_columns: u64) -> Result<&mut MergeTarget<'a>, String> {
        let dtype = tensor.info.dtype;
        if tensor.coded().is_none() && !matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            let why = match dtype {
                Dtype::F8_E4M3 | Dtype::F8_E5M2 => ": 8-bit weights mean nothing without the scales beside them",
                _ => "",
            };
            return Err(format!("the base has {}, F64, F32, F16 or BF16 is needed{why}", dtype_name(dtype)));
        }
        self.target(tensor, n_columns)
    }

    fn add_whole(&mut self, tensor: TensorRef<'a>, n_columns: u64, source: &'a Source, does: Does<'a>) {
        match self.whole_target(tensor, n_columns) {
            Err(what) => self.problem(&tensor.info.name, what),
            Ok(target) => target.terms.push(Term { source, does }),
        }
    }

    // --- sparse adapters

    fn add_sparse(&mut self, adapter: &'a Adapter, source: &'a Source) -> usize {
        for target in adapter.targets() {
            let same = |tensor: TensorRef<'_>| tensor.info.shape == target.shape && tensor.info.dtype == target.dtype;
            let found = match self.map.find(&target.name, same) {
                Ok(found) => found,
                Err(unplaced) => {
                    self.problem(&target.name, self.unplaced_sparse(target, &unplaced));
                    continue;
                }
            };
            for tensor in found.copies() {
                self.note_renamed(&target.name, &tensor.info.name);
                let n_columns =
                    if tensor.info.shape.len() > 1 { *tensor.info.shape.last().expect("not empty") } else { 1 };
                match self.target(tensor, n_columns) {
                    Err(what) => self.problem(&target.name, what),
                    Ok(found) => {
                        let is_there = |term: &Term<'_>| term.source.id == source.id;
                        match found.terms.iter().any(is_there) {
                            true => self.problem(&target.name, "two of its targets lead to one tensor"),
                            false => found.terms.push(Term { source, does: Does::Sparse { adapter, target } }),
                        }
                    }
                }
            }
        }
        adapter.targets().len()
    }

    /// Why a sparse target has no place.
    fn unplaced_sparse(&self, target: &TargetInfo, unplaced: &Unplaced) -> String {
        let Unplaced::Shape { name, .. } = unplaced else { return self.map.explain(&target.name, unplaced) };
        let found = self.map.checkpoint().tensor(name).expect("the map names stored tensors").info;
        if *name != target.name {
            return format!("the base has no such tensor; the nearest is \"{}\"", Printable(name));
        }
        match found.shape == target.shape {
            true => format!("adapter was made for {}, base has {}", dtype_name(target.dtype), dtype_name(found.dtype)),
            false => format!("adapter was made for {:?}, base has {:?}", target.shape, found.shape),
        }
    }

    // --- low-rank adapters

    fn add_lora(&mut self, lora: &'a LoraAdapter, source: &'a Source) -> Result<usize, MergeError> {
        let lora = Lora { adapter: lora, reading: self.reading_of(lora), source };
        let tied = self.add_tied(&lora)?;
        for full in lora.adapter.full() {
            if !tied.contains(full.name.as_str()) && !self.is_unchanged_copy(lora.adapter, full)? {
                self.add_full(&lora, full)?;
            }
        }
        for module in lora.adapter.modules() {
            if !tied.contains(module.target().as_str()) {
                self.add_module(&lora, module)?;
            }
        }
        for rows in lora.adapter.rows() {
            self.add_rows(&lora, rows)?;
        }
        Ok(lora.adapter.modules().len() + lora.adapter.full().len() + lora.adapter.rows().len())
    }

    /// What the adapter tells about how its factors are to be read.
    fn reading_of(&self, lora: &LoraAdapter) -> Reading {
        let linear = lora.modules().iter().filter_map(|module| match module.shape {
            LoraShape::Linear { d_out, d_in } => Some((module.target(), d_out, d_in)),
            _ => None,
        });
        let kinds: BTreeSet<String> = linear.clone().map(|(name, ..)| projection_kind(&name).to_owned()).collect();
        Reading {
            witnesses: self.map.witnesses(linear),
            is_of_one_kind: kinds.len() == 1,
            fan_in_fan_out: lora.config().fan_in_fan_out,
            exchanges_dimensions: lora.config().peft_version.map(|version| version >= (0, 19)),
        }
    }

    /// A parameter's name in the whole model, where the adapter was trained on a part of it and its config says which.
    fn within_part<'n>(&self, lora: &Lora<'_>, name: &'n str) -> Cow<'n, str> {
        let class = lora.adapter.config().base_class.as_deref();
        class.map_or(Cow::Borrowed(name), |class| self.map.within_part(name, class))
    }

    pub(super) fn add_full(&mut self, lora: &Lora<'a>, full: &'a FullTensor) -> Result<(), MergeError> {
        let (shard, info) = lora.adapter.tensor(&full.tensor);
        let name = self.within_part(lora, &full.name);
        let found = match self.map.find(&name, |tensor| tensor.info.shape == info.shape) {
            Ok(found) => found,
            Err(unplaced) => return self.add_new(lora, full, unplaced),
        };
        if lora.source.scale != 1.0 {
            let name = Printable(&full.name);
            return Err(self.refused(format!(
                "\"{name}\": the adapter holds it in full, and a scale of {} has no meaning for it",
                lora.source.scale
            )));
        }
        let n_columns = if info.shape.len() > 1 { *info.shape.last().expect("not empty") } else { 1 };
        for tensor in found.copies() {
            self.note_renamed(&full.name, &tensor.info.name);
            let before = match self.whole_target(tensor, n_columns) {
                Err(what) => {
                    self.problem(&full.name, what);
                    continue;
                }
                Ok(target) => {
                    let before = target.terms.iter().find_map(|term| match term.does {
                        Does::Full { shard, info } => Some(((shard, info), term.source)),
                        _ => None,
                    });
                    if before.is_none() {
                        let does = Does::Full { shard, info };
                        target.terms.push(Term { source: lora.source, does });
                    }
                    before
                }
            };
            let Some((other, source)) = before else { continue };
            if source.id != lora.source.id {
                self.problem(&full.name, "two adapters hold it in full");
            } else if !same_tensor((shard, info), other)? {
                let other = Printable(&other.1.name);
                self.problem(
                    &full.name,
                    format!("it is one tensor with \"{other}\", and the adapter has two different ones for it"),
                );
            }
        }
        Ok(())
    }

    /// Adds a tensor that the base has not, or has in another size, where the user allows it.
    fn add_new(&mut self, lora: &Lora<'a>, full: &'a FullTensor, unplaced: Unplaced) -> Result<(), MergeError> {
        let (shard, info) = lora.adapter.tensor(&full.tensor);
        let checkpoint = self.map.checkpoint();
        let (name, replaced) = match &unplaced {
            Unplaced::Missing { name } if self.reading.new_tensors => (name, None),
            Unplaced::Shape { name, .. } if self.reading.new_tensors && info.shape.len() == 2 => {
                (name, checkpoint.tensor(name))
            }
            Unplaced::Missing { .. } => {
                let what = self.map.explain(&full.name, &unplaced);
                self.problem(&full.name, format!("{what} (--allow-new-tensors adds it)"));
                return Ok(());
            }
            Unplaced::Shape { found, .. } => {
                let what = format!(
                    "adapter has {:?}, base has {found:?}; --allow-new-tensors puts the adapter's in its place",
                    info.shape
                );
                self.problem(&full.name, what);
                return Ok(());
            }
            unplaced => {
                self.problem(&full.name, self.map.explain(&full.name, unplaced));
                return Ok(());
            }
        };
        if let Some(other) = self.added.get(name.as_str()) {
            if other.source.id != lora.source.id || !same_tensor(other.from, (shard, info))? {
                self.problem(&full.name, "two adapters hold it in full, or one holds two different ones");
            }
            return Ok(());
        }
        let fits = replaced.is_none_or(|tensor| tensor.info.shape.len() == 2 && tensor.info.shape[1] == info.shape[1]);
        let is_float = |dtype| matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        let dtype = replaced.map_or_else(|| main_dtype(checkpoint), |tensor| tensor.info.dtype);
        if !fits || !is_float(dtype) || !is_float(info.dtype) || replaced.is_some_and(|tensor| tensor.coded().is_some())
        {
            let what = format!("adapter has {} {:?}, which cannot be added", dtype_name(info.dtype), info.shape);
            self.problem(&full.name, what);
            return Ok(());
        }
        let shard_index = replaced.map_or(checkpoint.shards().len() - 1, |tensor| tensor.shard_index);
        let added = Added {
            source: lora.source,
            from: (shard, info),
            dtype,
            shard_index,
            task: lora.adapter.config().task_type.clone(),
            replaces: replaced.map(|tensor| (tensor.info.dtype, tensor.info.shape.clone())),
        };
        self.added.insert(name.clone(), added);
        Ok(())
    }

    fn add_rows(&mut self, lora: &Lora<'a>, rows: &'a foreign::ReplacedRows) -> Result<(), MergeError> {
        let (shard, info) = lora.adapter.tensor(&rows.tensor);
        let name = self.within_part(lora, &rows.name);
        let n_columns = info.shape[1];
        let found =
            match self.map.find(&name, |tensor| tensor.info.shape.len() == 2 && tensor.info.shape[1] == n_columns) {
                Ok(found) => found,
                Err(Unplaced::Shape { found, .. }) => {
                    self.problem(&rows.name, format!("adapter has rows of {n_columns}, base has {found:?}"));
                    return Ok(());
                }
                Err(unplaced) => {
                    self.problem(&rows.name, self.map.explain(&rows.name, &unplaced));
                    return Ok(());
                }
            };
        if lora.source.scale != 1.0 {
            let (name, scale) = (Printable(&rows.name), lora.source.scale);
            return Err(self.refused(format!(
                "\"{name}\": the adapter replaces rows of it, and a scale of {scale} has no meaning for them"
            )));
        }
        if let Some(tie) = self.map.tie(&name)
            && !self.map.is_covered(tie, &[name.to_string()])
            && !self.map.rows_are_tied(tie, &name)
        {
            self.ask_tied(std::slice::from_ref(&rows.name), tie)?;
        }
        let mut places: Vec<(u64, u64)> = rows.rows.iter().copied().zip(0..).collect();
        places.sort_unstable();
        for tensor in found.copies() {
            let n_rows = tensor.info.shape[0];
            if let Some((row, _)) = places.last().filter(|(row, _)| *row >= n_rows) {
                self.problem(
                    &rows.name,
                    format!("the adapter replaces row {row}, base has {n_rows}; resize the base first"),
                );
                continue;
            }
            self.note_renamed(&rows.name, &tensor.info.name);
            let replaced = ReplacedRows { shard, info, places: places.as_slice().into() };
            self.add_whole(tensor, n_columns, lora.source, Does::Rows(replaced));
        }
        Ok(())
    }

    pub(super) fn add_module(&mut self, lora: &Lora<'a>, module: &'a LoraModule) -> Result<(), MergeError> {
        let name = self.within_part(lora, &module.target()).into_owned();
        let placed = match module.shape {
            LoraShape::Linear { d_out, d_in } => self.map.place_linear(&name, d_out, d_in, &lora.reading),
            LoraShape::Embedding { vocabulary, d_out } => self.map.place_embedding(&name, vocabulary, d_out),
            LoraShape::Experts { n_experts, d_out, d_in } => {
                self.map.place_stack(&name, n_experts, d_out, d_in, &lora.reading)
            }
        };
        let placement = match placed {
            Ok(placement) => placement,
            Err(Unplaced::Axes { kind, what, .. }) => {
                return Err(self.undecided(&name, Undecided::Axes { kind }, what));
            }
            Err(Unplaced::Shape { found, .. }) => {
                let needed = match module.shape {
                    LoraShape::Linear { d_out, d_in } => format!("[{d_out}, {d_in}]"),
                    LoraShape::Embedding { vocabulary, d_out } => format!("[{vocabulary}, {d_out}]"),
                    LoraShape::Experts { n_experts, d_out, d_in } => {
                        format!("{n_experts} experts of [{d_out}, {d_in}]")
                    }
                };
                self.problem(&name, format!("adapter was made for {needed}, base has {found:?}"));
                return Ok(());
            }
            Err(unplaced) => {
                self.problem(&name, self.map.explain(&name, &unplaced));
                return Ok(());
            }
        };
        let products = self.products(lora.adapter, module, placement.axes)?;
        let magnitude = module.magnitude.as_ref().map(|tensor| {
            let (shard, info) = lora.adapter.tensor(tensor);
            Magnitude { shard, info, of_columns: placement.axes == Axes::InOut, start: 0 }
        });
        self.add_products(lora, module, &placement, &products, magnitude);
        if let Some(bias) = &module.bias {
            self.add_bias(lora, module, lora.adapter.tensor(bias));
        }
        Ok(())
    }

    /// The two factors of each matrix of a module, the way round in which the weight is stored.
    fn products(
        &self,
        lora: &'a LoraAdapter,
        module: &LoraModule,
        axes: Axes,
    ) -> Result<Vec<(Matrix<'a>, Matrix<'a>)>, MergeError> {
        let ((shard_a, info_a), (shard_b, info_b)) = (lora.tensor(&module.a), lora.tensor(&module.b));
        let stored = |a: Matrix<'a>, b: Matrix<'a>| match axes {
            Axes::OutIn => (b, a),
            Axes::InOut => (a.transposed(), b.transposed()),
        };
        let (row_len, n_experts) = match module.shape {
            LoraShape::Linear { d_in, .. } => (d_in, 1),
            LoraShape::Embedding { vocabulary, .. } => (vocabulary, 1),
            LoraShape::Experts { d_in, n_experts, .. } => (d_in, n_experts),
        };
        let rank = module.rank;
        let (row_stride, column_stride, step) = match self.reading.expert_order {
            // Both orders are the same.
            _ if n_experts == 1 || rank == 1 => (rank * n_experts, 1, 1),
            Some(ExpertOrder::RankFirst) => (rank * n_experts, n_experts, 1),
            Some(ExpertOrder::ExpertFirst) => (rank * n_experts, 1, rank),
            None => {
                let what = format!(
                    "the second factor of its {n_experts} experts may be [d_out, r, E], as PEFT has it, or [d_out, E, r], as some \
                     trainers had it; the file looks the same, and the wrong one gives a broken model"
                );
                return Err(self.undecided(&module.target(), Undecided::ExpertOrder, what));
            }
        };
        let a = Matrix::rows(shard_a, info_a, row_len);
        let b = Matrix { shard: shard_b, info: info_b, start: 0, row_stride, column_stride };
        let product = |expert: u64| stored(a.from(expert * rank, 0), Matrix { start: expert * step, ..b });
        Ok((0..n_experts).map(product).collect())
    }

    /// The bias of a module's second factor.
    fn add_bias(&mut self, lora: &Lora<'a>, module: &LoraModule, (shard, info): (&'a Shard, &'a TensorInfo)) {
        let name = self.within_part(lora, &format!("{}.bias", module.module)).into_owned();
        match self.map.find(&name, |tensor| tensor.info.shape == [info.n_elements()]) {
            Err(_) => self.problem(&name, "the adapter adds to a bias that the base has not"),
            Ok(found) => {
                let scale = lora.scale_of(module);
                let does = Does::Bias { shard, info, scale };
                self.add_whole(found.tensor, 1, lora.source, does);
            }
        }
    }

    fn add_products(
        &mut self,
        lora: &Lora<'a>,
        module: &LoraModule,
        placement: &Placement<'a>,
        products: &[(Matrix<'a>, Matrix<'a>)],
        magnitude: Option<Magnitude<'a>>,
    ) {
        let name = module.target();
        for place in &placement.places {
            self.note_renamed(&name, &place.tensor.info.name);
            let (u, v) = products[place.part.matrix as usize];
            let product = Product {
                first_row: place.first_row,
                n_rows: place.part.n_rows,
                columns: place.columns,
                u: u.from(place.part.first_row, 0),
                v,
                rank: module.rank,
                scale: lora.scale_of(module),
                magnitude: magnitude.map(|m| Magnitude { start: m.start + place.part.first_row, ..m }),
            };
            self.add_whole(place.tensor, place.columns.of, lora.source, Does::LowRank(product));
        }
    }

    /// Tells of the first module that has another name on disk.
    fn note_renamed(&mut self, in_memory: &str, on_disk: &str) {
        const WHAT: &str = "modules were found under other names, such as";
        let is_renamed = on_disk != in_memory && projection_kind(on_disk) == projection_kind(in_memory);
        if is_renamed && !self.notes.iter().any(|note| note.starts_with(WHAT)) {
            self.notes.push(format!("{WHAT} {} for {}", Printable(on_disk), Printable(in_memory)));
        }
    }
}

/// A low-rank adapter whose turn it is.
pub(super) struct Lora<'a> {
    pub(super) adapter: &'a LoraAdapter,
    pub(super) reading: Reading,
    pub(super) source: &'a Source,
}

impl Lora<'_> {
    fn scale_of(&self, module: &LoraModule) -> f32 {
        (module.scaling * self.source.scale) as f32
    }
}

/// The type that most elements of a checkpoint have, among those that numbers are rounded to.
fn main_dtype(checkpoint: &Checkpoint) -> Dtype {
    let mut n_elements: BTreeMap<String, (u64, Dtype)> = BTreeMap::new();
    let floats = checkpoint.tensors().filter(|tensor| {
        tensor.coded().is_none() && matches!(tensor.info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
    });
    for tensor in floats {
        let dtype = tensor.info.dtype;
        n_elements.entry(dtype_name(dtype)).or_insert((0, dtype)).0 += tensor.info.n_elements();
    }
    n_elements.into_values().max_by_key(|(n, _)| *n).map_or(Dtype::F32, |(_, dtype)| dtype)
}

/// Whether two tensors are equal: type, shape and every byte.
pub(super) fn same_tensor(a: (&Shard, &TensorInfo), b: (&Shard, &TensorInfo)) -> Result<bool, MergeError> {
    Ok(a.1.is_like(b.1) && same_bytes(a, b)?)
}

/// Whether two tensors of one size have the same bytes. Memory: 2 MiB.
pub(in crate::merge) fn same_bytes(
    (a_shard, a): (&Shard, &TensorInfo),
    (b_shard, b): (&Shard, &TensorInfo),
) -> Result<bool, MergeError> {
    let (mut a_bytes, mut b_bytes) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for start in (0..a.n_bytes()).step_by(1 << 20) {
        let n = (a.n_bytes() - start).min(1 << 20) as usize;
        a_shard.read_at(&mut a_bytes[..n], a_shard.file_range(a).start + start)?;
        b_shard.read_at(&mut b_bytes[..n], b_shard.file_range(b).start + start)?;
        if a_bytes[..n] != b_bytes[..n] {
            return Ok(false);
        }
    }
    Ok(true)
}
