//! From adapters and a checkpoint to a [`Plan`].

use std::{collections::BTreeMap, ops::Range};

use super::{
    ExpertAxes, ExpertOrder, LowRankReading,
    factors::Matrix,
    plan::{Magnitude, Plan, Product, Step, Target},
    sources::Source,
};
use crate::{
    adapter::Adapter,
    checkpoint::{Checkpoint, Printable, TensorRef},
    merge::{MergeError, Undecided},
    peft::{FullTensor, LoraAdapter, LoraModule, LoraShape, ModuleNames, Place},
    tensor::{Dtype, dtype_name, projection_kind},
};

pub(super) struct Planner<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) originals: &'a Checkpoint,
    pub(super) names: ModuleNames<'a>,
    pub(super) reading: LowRankReading,
    targets: BTreeMap<&'a str, Target<'a>>,
    pub(super) notes: Vec<String>,
    /// Of the current adapter.
    pub(super) problems: Vec<String>,
}

/// Which way a weight is stored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Orientation {
    OutIn,
    InOut,
}

impl<'a> Planner<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, originals: &'a Checkpoint, reading: LowRankReading) -> Self {
        let names = ModuleNames::new(checkpoint);
        Self {
            checkpoint,
            originals,
            names,
            reading,
            targets: BTreeMap::new(),
            notes: Vec::new(),
            problems: Vec::new(),
        }
    }

    fn problem(&mut self, name: &str, what: impl std::fmt::Display) {
        self.problems.push(format!("\"{}\": {what}", Printable(name)));
    }

    pub(super) fn refused(&self, what: impl Into<String>) -> MergeError {
        MergeError::Refused { path: self.checkpoint.root().to_owned(), what: what.into() }
    }

    pub(super) fn undecided(&self, tensor: &str, open: Undecided, what: impl Into<String>) -> MergeError {
        let path = self.checkpoint.root().to_owned();
        MergeError::Undecided { path, tensor: tensor.to_owned(), open, what: what.into() }
    }

    /// The target of a tensor, as a matrix of `n_columns` columns.
    fn target(&mut self, tensor: TensorRef<'a>, n_columns: u64) -> Result<&mut Target<'a>, String> {
        if let Some(weight) = tensor.coded() {
            return Err(weight.refusal());
        }
        let dtype = tensor.info.dtype;
        if !matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            let why = match dtype {
                Dtype::F8_E4M3 | Dtype::F8_E5M2 => ": 8-bit weights mean nothing without the scales beside them",
                _ => "",
            };
            return Err(format!("the base has {}, F64, F32, F16 or BF16 is needed{why}", dtype_name(dtype)));
        }
        let n_elements = tensor.info.n_elements();
        if n_columns == 0 || n_elements == 0 || !n_elements.is_multiple_of(n_columns) {
            return Err(format!("the base has shape {:?}, rows of {n_columns} are needed", tensor.info.shape));
        }
        let n_rows = n_elements / n_columns;
        let new = || Target::untouched(tensor, n_rows, n_columns);
        let target = self.targets.entry(&tensor.info.name).or_insert_with(new);
        if target.n_columns != n_columns {
            return Err("two adapters read it as different matrices".to_owned());
        }
        Ok(target)
    }

    fn add_step(&mut self, tensor: TensorRef<'a>, n_columns: u64, step: Step<'a>, source: usize) {
        match self.target(tensor, n_columns) {
            Err(what) => self.problem(&tensor.info.name, what),
            Ok(target) => {
                target.steps.push(step);
                target.step_sources.push(source);
            }
        }
    }

    // --- sparse adapters

    pub(super) fn add_sparse(&mut self, adapter: &'a Adapter, scale: f64, source: usize) -> usize {
        for target in adapter.targets() {
            let tensor = match self.checkpoint.numbers(&target.name) {
                Ok(tensor) => tensor,
                Err(what) => {
                    self.problem(&target.name, what);
                    continue;
                }
            };
            if tensor.info.shape != target.shape || tensor.info.dtype != target.dtype {
                let (found, dtype) = (&tensor.info.shape, dtype_name(tensor.info.dtype));
                let made_for = format!("{:?} {}", target.shape, dtype_name(target.dtype));
                self.problem(&target.name, format!("adapter was made for {made_for}, base has {found:?} {dtype}"));
                continue;
            }
            if target.transposed {
                self.problem(&target.name, "a transposed target cannot be merged together with a low-rank adapter");
                continue;
            }
            let step = Step::Sparse { adapter, target, scale, source };
            self.add_step(tensor, target.layout.d_in, step, source);
        }
        adapter.targets().len()
    }

    // --- low-rank adapters

    pub(super) fn add_lora(
        &mut self,
        lora: &'a LoraAdapter,
        source: &'a Source,
        index: usize,
    ) -> Result<usize, MergeError> {
        for full in lora.full() {
            self.add_full(lora, full, source, index)?;
        }
        let square = self.orientation_of_squares(lora)?;
        for module in lora.modules() {
            if self.is_tied_head_done_with(lora, module)? {
                continue;
            }
            self.refuse_tied(lora, &module.target())?;
            match module.shape {
                LoraShape::Experts { .. } => self.add_experts(lora, module, source, index)?,
                LoraShape::Linear { .. } => self.add_linear(lora, module, source, index, square),
                LoraShape::Embedding { .. } => self.add_embedding(lora, module, source, index),
            }
        }
        Ok(lora.modules().len() + lora.full().len())
    }

    fn add_full(
        &mut self,
        lora: &'a LoraAdapter,
        full: &'a FullTensor,
        source: &'a Source,
        index: usize,
    ) -> Result<(), MergeError> {
        let info = lora.tensor(&full.tensor);
        // PEFT saves embeddings that it adapts; there is nothing to merge in those.
        if self.is_unchanged_copy(lora, &full.name)? {
            return Ok(());
        }
        self.refuse_tied(lora, &full.name)?;
        let found = self.names.find(&full.name).or_else(|| self.tied_tensor(&full.name));
        let Some(tensor) = found.filter(|tensor| tensor.coded().is_none()) else {
            self.problem(&full.name, self.what_is_there(&full.name, ""));
            return Ok(());
        };
        if tensor.info.shape != info.shape {
            let what = format!(
                "adapter has {:?}, base has {:?}; a merge keeps the base's shapes, so resize the base first",
                info.shape, tensor.info.shape
            );
            self.problem(&full.name, what);
            return Ok(());
        }
        if source.scale != 1.0 {
            let name = Printable(&full.name);
            return Err(self.refused(format!(
                "\"{name}\": the adapter holds it in full, and a scale of {} has no meaning for it",
                source.scale
            )));
        }
        let n_columns = if info.shape.len() > 1 { *info.shape.last().expect("not empty") } else { 1 };
        match self.target(tensor, n_columns) {
            Err(what) => self.problem(&full.name, what),
            Ok(target) if target.full_source.is_some() => {
                self.problem(&full.name, "two adapters hold it in full");
            }
            Ok(target) => {
                target.full = Some((lora.shard(), info));
                target.full_source = Some(index);
            }
        }
        Ok(())
    }

    fn add_linear(
        &mut self,
        lora: &'a LoraAdapter,
        module: &'a LoraModule,
        source: &'a Source,
        index: usize,
        square: Orientation,
    ) {
        let LoraShape::Linear { d_out, d_in } = module.shape else { unreachable!("called for linear layers") };
        let name = module.target();
        let as_stored = |orientation| match orientation {
            Orientation::OutIn => self.places(&name, 1, d_out, d_in),
            Orientation::InOut => self.places(&name, 1, d_in, d_out),
        };
        // A shape that fits both ways is read as the config says.
        let order = match square {
            Orientation::InOut if d_out == d_in => [Orientation::InOut, Orientation::OutIn],
            _ => [Orientation::OutIn, Orientation::InOut],
        };
        let found = order.into_iter().find_map(|orientation| Some((orientation, as_stored(orientation)?)));
        let Some((orientation, places)) = found else {
            let what = self.what_is_there(&name, &format!("[{d_out}, {d_in}]"));
            return self.problem(&name, what);
        };
        let a = Matrix::rows(lora.shard(), lora.tensor(&module.a), d_in);
        let b = Matrix::rows(lora.shard(), lora.tensor(&module.b), module.rank);
        let (u, v, n_columns) = match orientation {
            Orientation::OutIn => (b, a, d_in),
            Orientation::InOut => (a.transposed(), b.transposed(), d_out),
        };
        let magnitude = self.magnitude(lora, module, orientation == Orientation::InOut);
        self.add_products(&places, &[(u, v)], n_columns, (module, magnitude), source, index);
        if let Some(bias) = &module.bias {
            let name = format!("{}.bias", module.module);
            let info = lora.tensor(bias);
            match self.names.find(&name).filter(|tensor| tensor.info.shape == [d_out]) {
                None => self.problem(&name, "the adapter adds to a bias that the base has not"),
                Some(tensor) => {
                    let scale = scale_of(module, source);
                    self.add_step(tensor, 1, Step::Bias { shard: lora.shard(), info, scale }, index);
                }
            }
        }
    }

    fn add_embedding(&mut self, lora: &'a LoraAdapter, module: &'a LoraModule, source: &'a Source, index: usize) {
        let LoraShape::Embedding { vocabulary, d_out } = module.shape else { unreachable!("called for embeddings") };
        let name = module.target();
        let Some(places) = self.places(&name, 1, vocabulary, d_out) else {
            let what = self.what_is_there(&name, &format!("[{vocabulary}, {d_out}]"));
            return self.problem(&name, what);
        };
        let a = Matrix::rows(lora.shard(), lora.tensor(&module.a), vocabulary);
        let b = Matrix::rows(lora.shard(), lora.tensor(&module.b), module.rank);
        let magnitude = self.magnitude(lora, module, true);
        let product = (a.transposed(), b.transposed());
        self.add_products(&places, &[product], d_out, (module, magnitude), source, index);
    }

    fn add_experts(
        &mut self,
        lora: &'a LoraAdapter,
        module: &'a LoraModule,
        source: &'a Source,
        index: usize,
    ) -> Result<(), MergeError> {
        let LoraShape::Experts { n_experts, d_out, d_in } = module.shape else { unreachable!("called for experts") };
        let name = module.target();
        let out_in = self.places(&name, n_experts, d_out, d_in);
        let in_out = self.places(&name, n_experts, d_in, d_out);
        let (axes, places) = match (out_in, in_out, self.reading.expert_axes) {
            (Some(places), None, None | Some(ExpertAxes::OutIn)) => (ExpertAxes::OutIn, places),
            (None, Some(places), None | Some(ExpertAxes::InOut)) => (ExpertAxes::InOut, places),
            (Some(places), Some(_), Some(ExpertAxes::OutIn)) => (ExpertAxes::OutIn, places),
            (Some(_), Some(places), Some(ExpertAxes::InOut)) => (ExpertAxes::InOut, places),
            (Some(_), Some(_), None) => {
                let what = "its experts are square, and whether they are stored as [d_out, d_in] or as [d_in, d_out] cannot be told \
                            from the files; it depends on the model and on the version of PEFT";
                return Err(self.undecided(&name, Undecided::ExpertAxes, what));
            }
            _ => {
                let what = self.what_is_there(&name, &format!("{n_experts} experts of [{d_out}, {d_in}]"));
                self.problem(&name, what);
                return Ok(());
            }
        };
        let rank = module.rank;
        let (row_stride, column_stride, step) = match self.reading.expert_order {
            Some(ExpertOrder::RankFirst) => (rank * n_experts, n_experts, 1),
            Some(ExpertOrder::ExpertFirst) => (rank * n_experts, 1, rank),
            // Both orders are the same.
            None if n_experts == 1 || rank == 1 => (rank * n_experts, 1, 1),
            None => {
                let what = format!(
                    "the second factor of its {n_experts} experts may be [d_out, r, E], as PEFT has it, or [d_out, E, r], as some \
                     trainers had it; the file looks the same, and the wrong one gives a broken model"
                );
                return Err(self.undecided(&name, Undecided::ExpertOrder, what));
            }
        };
        let a = Matrix::rows(lora.shard(), lora.tensor(&module.a), d_in);
        let b = Matrix { shard: lora.shard(), info: lora.tensor(&module.b), start: 0, row_stride, column_stride };
        let products: Vec<_> = (0..n_experts)
            .map(|expert| {
                let a = a.from(expert * rank, 0);
                let b = Matrix { start: expert * step, ..b };
                match axes {
                    ExpertAxes::OutIn => (b, a),
                    ExpertAxes::InOut => (a.transposed(), b.transposed()),
                }
            })
            .collect();
        let n_columns = if axes == ExpertAxes::OutIn { d_in } else { d_out };
        self.add_products(&places, &products, n_columns, (module, None), source, index);
        Ok(())
    }

    fn add_products(
        &mut self,
        places: &[Place<'a>],
        products: &[(Matrix<'a>, Matrix<'a>)],
        n_columns: u64,
        (module, magnitude): (&LoraModule, Option<Magnitude<'a>>),
        source: &Source,
        index: usize,
    ) {
        let name = module.target();
        for place in places {
            if place.tensor.info.name != name && projection_kind(&place.tensor.info.name) == projection_kind(&name) {
                self.note_renamed(&name, &place.tensor.info.name);
            }
            let (u, v) = products[place.part.matrix as usize];
            let product = Product {
                first_row: place.first_row,
                n_rows: place.part.n_rows,
                u: u.from(place.part.first_row, 0),
                v,
                rank: module.rank,
                scale: scale_of(module, source),
                magnitude: magnitude.map(|m| Magnitude { start: m.start + place.part.first_row, ..m }),
            };
            self.add_step(place.tensor, n_columns, Step::LowRank(product), index);
        }
    }

    /// Tells of the first module that has another name on disk.
    fn note_renamed(&mut self, in_memory: &str, on_disk: &str) {
        const WHAT: &str = "modules were found under other names, such as";
        if !self.notes.iter().any(|note| note.starts_with(WHAT)) {
            self.notes.push(format!("{WHAT} {} for {}", Printable(on_disk), Printable(in_memory)));
        }
    }

    fn magnitude(&self, lora: &'a LoraAdapter, module: &'a LoraModule, of_columns: bool) -> Option<Magnitude<'a>> {
        let info = lora.tensor(module.magnitude.as_ref()?);
        Some(Magnitude { shard: lora.shard(), info, of_columns, start: 0 })
    }

    fn places(&self, name: &str, n_matrices: u64, n_rows: u64, n_columns: u64) -> Option<Vec<Place<'a>>> {
        self.names.places(name, n_matrices, n_rows, n_columns).or_else(|| {
            let tied = self.tied_tensor(name)?;
            self.names.places(&tied.info.name, n_matrices, n_rows, n_columns)
        })
    }

    fn what_is_there(&self, name: &str, needed: &str) -> String {
        let found = self.names.find(name);
        if let Some(weight) = self.checkpoint.codes().find_for(name, found) {
            return weight.refusal();
        }
        match found {
            None => "the base has no such tensor".to_owned(),
            Some(tensor) => format!("adapter was made for {needed}, base has {:?}", tensor.info.shape),
        }
    }

    /// How a square weight is stored, which its shape cannot tell: as the config says, unless all others say otherwise.
    fn orientation_of_squares(&self, lora: &LoraAdapter) -> Result<Orientation, MergeError> {
        let said = if lora.config().fan_in_fan_out { Orientation::InOut } else { Orientation::OutIn };
        let (mut n_out_in, mut n_in_out, mut first_square) = (0, 0, None);
        for module in lora.modules() {
            let LoraShape::Linear { d_out, d_in } = module.shape else { continue };
            if d_out == d_in {
                first_square.get_or_insert_with(|| module.target());
            } else if self.names.places(&module.target(), 1, d_out, d_in).is_some() {
                n_out_in += 1;
            } else if self.names.places(&module.target(), 1, d_in, d_out).is_some() {
                n_in_out += 1;
            }
        }
        let (agree, disagree, other) = match said {
            Orientation::OutIn => (n_out_in, n_in_out, Orientation::InOut),
            Orientation::InOut => (n_in_out, n_out_in, Orientation::OutIn),
        };
        match (agree, disagree, first_square) {
            (_, 0, _) | (_, _, None) => Ok(said),
            (0, _, Some(_)) => Ok(other),
            (_, _, Some(name)) => Err(self.refused(format!(
                "\"{}\": it is square, and the adapter's other weights are stored in both directions, so which is its own cannot be \
                 told",
                Printable(&name)
            ))),
        }
    }

    // --- the whole

    pub(super) fn finish(self, n_sources: usize) -> Result<Plan<'a>, MergeError> {
        let mut n_tensors = vec![0; n_sources];
        let mut targets = Vec::new();
        for (name, target) in self.targets {
            let mut sources: Vec<usize> = target.step_sources.iter().copied().chain(target.full_source).collect();
            sources.sort_unstable();
            sources.dedup();
            sources.iter().for_each(|&source| n_tensors[source] += 1);
            let refused = |what: &str| MergeError::Refused {
                path: self.checkpoint.root().to_owned(),
                what: format!("\"{}\": {what}", Printable(name)),
            };
            if target.full_source.is_some() && sources.len() > 1 {
                return Err(refused("one adapter holds it in full, another adds to it; merge one of them"));
            }
            if target.has_magnitudes() && sources.len() > 1 {
                return Err(refused(
                    "an adapter with magnitudes (DoRA) cannot share a weight with another; merge one of them",
                ));
            }
            refuse_overlaps(&target).map_err(|what| refused(&what))?;
            let is_product = |step: &Step<'_>| matches!(step, Step::LowRank(product) if product.magnitude.is_none());
            // Products of one adapter lie on different rows.
            let is_simple = target.full.is_none() && sources.len() <= 1 && target.steps.iter().all(is_product);
            targets.push(Target { is_simple, ..target });
        }
        Ok(Plan { targets, notes: self.notes, n_tensors })
    }
}

/// Of one adapter, no two modules may lie on the same rows.
fn refuse_overlaps(target: &Target<'_>) -> Result<(), String> {
    let mut rows: Vec<(usize, Range<u64>)> = Vec::new();
    for (step, &source) in target.steps.iter().zip(&target.step_sources) {
        let of_columns = matches!(step, Step::LowRank(p) if p.magnitude.is_some_and(|m| m.of_columns));
        match step {
            Step::LowRank(product) if of_columns && product.n_rows != target.n_rows => {
                return Err("magnitudes of columns need the whole weight".to_owned());
            }
            Step::LowRank(product) => rows.push((source, product.rows())),
            Step::Sparse { .. } => {}
            Step::Bias { .. } => rows.push((source, 0..target.n_rows)),
        }
    }
    rows.sort_by_key(|(source, rows)| (*source, rows.start));
    match rows.windows(2).any(|pair| pair[0].0 == pair[1].0 && pair[0].1.end > pair[1].1.start) {
        true => Err("two modules of one adapter lead to it".to_owned()),
        false => Ok(()),
    }
}

fn scale_of(module: &LoraModule, source: &Source) -> f32 {
    (module.scaling * source.scale) as f32
}
