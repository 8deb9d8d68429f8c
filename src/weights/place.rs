//! Where the rows of a weight lie, for an adapter that says what shape it expects.

use super::{
    Axes, Unplaced, WeightMap, Witness, Witnesses,
    map::Weight,
    names::is_number,
    rules::{FUSED, GATE_UP},
};
use crate::{checkpoint::TensorRef, tensor::projection_kind};

/// A run of rows of one matrix of an adapter's product, as stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Which matrix: the expert of a stack, or 0.
    pub matrix: u64,
    /// The first row.
    pub first_row: u64,
    /// How many.
    pub n_rows: u64,
}

/// The columns of a stored tensor that a product's columns belong to: `first + j * step`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Columns {
    /// The tensor's column of the product's first.
    pub first: u64,
    /// How far apart they are.
    pub step: u64,
    /// How many the product has.
    pub n: u64,
    /// How many the tensor has.
    pub of: u64,
}

impl Columns {
    /// All columns of a tensor.
    pub fn all(n: u64) -> Self {
        Self { first: 0, step: 1, n, of: n }
    }
    /// Whether the product has every column.
    pub fn is_all(self) -> bool {
        self.n == self.of
    }
    /// Whether two runs share a column.
    pub fn meets(self, other: Self) -> bool {
        let last = |columns: Self| columns.first + (columns.n.max(1) - 1) * columns.step;
        let apart = self.first > last(other) || other.first > last(self);
        let alternate = self.step == other.step && self.first % self.step != other.first % other.step;
        !apart && !alternate
    }
}

/// Rows of a stored tensor that belong to rows of an adapter's product.
#[derive(Clone, Copy, Debug)]
pub struct StoredRows<'a> {
    /// The tensor.
    pub tensor: TensorRef<'a>,
    /// The first of the tensor's rows, all dimensions but the last counted as rows.
    pub first_row: u64,
    /// Its columns.
    pub columns: Columns,
    /// Which rows, of which matrix of the product.
    pub part: Part,
}

/// A product's place in a checkpoint.
#[derive(Clone, Debug)]
pub struct Placement<'a> {
    /// Which way round the product is added: `out-in` as `B A`, `in-out` transposed.
    pub axes: Axes,
    /// The stored rows, those of equal copies of one weight included.
    pub places: Vec<StoredRows<'a>>,
}

/// What an adapter tells about itself that decides how its factors are read.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// What its non-square weights tell.
    pub witnesses: Witnesses,
    /// Whether its config says that a module it adapts is stored as `[d_in, d_out]`.
    pub fan_in_fan_out: bool,
    /// Whether all matrices that it adapts are of one kind.
    pub is_of_one_kind: bool,
    /// Whether PEFT exchanged the dimensions of stacks that are stored as `[E, d_out, d_in]`, as 0.19 and later do; `None` where
    /// the config does not name PEFT's version.
    pub exchanges_dimensions: Option<bool>,
}

type Placed<'a> = Result<Placement<'a>, Unplaced>;

impl<'a> WeightMap<'a> {
    /// What the non-square matrices among an adapter's modules (`(name, d_out, d_in)`) tell about their kinds.
    pub fn witnesses(&self, modules: impl Iterator<Item = (String, u64, u64)>) -> Witnesses {
        let mut witnesses = Witnesses::default();
        for (name, d_out, d_in) in modules.filter(|(_, d_out, d_in)| d_out != d_in) {
            let Ok(found) = self.find(&name, |tensor| fits(tensor, d_out, d_in).is_some()) else { continue };
            let tensor = found.tensor;
            if let (Some(axes), &[_, _]) = (fits(tensor, d_out, d_in), &tensor.info.shape[..]) {
                let name = &tensor.info.name;
                witnesses.add(self.kind_of(name), axes, name);
            }
        }
        witnesses
    }

    /// The place of the product of a linear layer or a convolution: `B` has `d_out` rows, `A` has rows of `d_in`.
    ///
    /// # Errors
    /// [`Unplaced`]: the checkpoint has no such weight, or another shape, or the files do not tell which way round it is.
    pub fn place_linear(&self, name: &str, d_out: u64, d_in: u64, reading: &Reading) -> Placed<'a> {
        let name = &*self.renamed(name);
        let missing = match self.find_renamed(name, |tensor| fits(tensor, d_out, d_in).is_some()) {
            Ok(found) => {
                let axes = self.linear_axes(&found, d_out, d_in, reading)?;
                let (n_rows, n_columns) = axes.stored(d_out, d_in);
                return Ok(Placement { axes, places: copies(&found, (0, n_rows), Columns::all(n_columns)) });
            }
            Err(missing) => missing,
        };
        let elsewhere = match self.place_in_a_stack(name, d_out, d_in) {
            Err(None) => self.place_in_fused(name, d_out, d_in),
            found => found,
        };
        elsewhere.map_err(|unplaced| unplaced.unwrap_or(missing))
    }

    fn linear_axes(&self, found: &Weight<'a>, d_out: u64, d_in: u64, reading: &Reading) -> Result<Axes, Unplaced> {
        let tensor = found.tensor;
        if tensor.info.shape.len() != 2 {
            return Ok(Axes::OutIn);
        }
        if d_out != d_in {
            let axes = fits(tensor, d_out, d_in).expect("it was found by its shape");
            return match self.told_axes(&tensor.info.name) {
                Some(told) if told != axes => Err(Unplaced::shape(tensor)),
                _ => Ok(axes),
            };
        }
        let (axes, witness) =
            self.matrix_axes(tensor, &reading.witnesses).map_err(|kind| Unplaced::axes(tensor, kind, SQUARE))?;
        // The adapter shows that this model has modules which are no `nn.Linear`, and this may be one.
        let has_in_out = reading.fan_in_fan_out || reading.witnesses.any_in_out();
        if witness != Witness::Convention || !has_in_out || self.is_surely_linear(&tensor.info.name) {
            return Ok(axes);
        }
        match reading.is_of_one_kind {
            // PEFT writes the key for the last module that it adapts.
            true => Ok(if reading.fan_in_fan_out { Axes::InOut } else { Axes::OutIn }),
            false => {
                let kind = projection_kind(&tensor.info.name).to_owned();
                Err(Unplaced::axes(tensor, kind, SQUARE))
            }
        }
    }

    /// The place of an embedding's product: the weight is `[vocabulary, d_out]`.
    ///
    /// # Errors
    /// As [`Self::place_linear`].
    pub fn place_embedding(&self, name: &str, vocabulary: u64, d_out: u64) -> Placed<'a> {
        let found = self.find(name, |tensor| tensor.info.shape == [vocabulary, d_out])?;
        Ok(Placement { axes: Axes::InOut, places: copies(&found, (0, vocabulary), Columns::all(d_out)) })
    }

    /// The place of the products of a stack of experts, `n` of `[d_out, d_in]`, that is targeted as a parameter.
    ///
    /// # Errors
    /// As [`Self::place_linear`].
    pub fn place_stack(&self, name: &str, n: u64, d_out: u64, d_in: u64, reading: &Reading) -> Placed<'a> {
        let name = &*self.renamed(name);
        let told = self.told_stack_axes(name);
        let both = Axes::BOTH.into_iter().filter(|axes| told.is_none_or(|told| told == *axes));
        let as_stored = |axes: Axes| axes.stored(d_out, d_in);
        let stacked = |tensor: TensorRef<'_>, axes: Axes| {
            let (rows, columns) = as_stored(axes);
            tensor.info.shape == [n, rows, columns] || (n == 1 && tensor.info.shape == [rows, columns])
        };
        let missing = match self.find_renamed(name, |tensor| both.clone().any(|axes| stacked(tensor, axes))) {
            Ok(found) => {
                let fitting: Vec<Axes> = both.filter(|&axes| stacked(found.tensor, axes)).collect();
                let axes = self.factor_axes(name, found.tensor, &fitting, reading)?;
                let (n_rows, n_columns) = as_stored(axes);
                let place = |matrix| StoredRows {
                    tensor: found.tensor,
                    first_row: matrix * n_rows,
                    columns: Columns::all(n_columns),
                    part: Part { matrix, first_row: 0, n_rows },
                };
                return Ok(Placement { axes, places: (0..n).map(place).collect() });
            }
            Err(missing) => missing,
        };
        let apart = |axes: Axes| {
            let (n_rows, n_columns) = as_stored(axes);
            Some((axes, self.place_apart(name, n, n_rows, n_columns)?))
        };
        let mut found: Vec<(Axes, Vec<StoredRows<'a>>)> = both.filter_map(apart).collect();
        match found.len() {
            0 => Err(missing),
            _ => {
                let fitting: Vec<Axes> = found.iter().map(|(axes, _)| *axes).collect();
                let axes = self.factor_axes(name, found[0].1[0].tensor, &fitting, reading)?;
                let at = fitting.iter().position(|fits| *fits == axes).expect("one of them was chosen");
                Ok(Placement { axes, places: found.swap_remove(at).1 })
            }
        }
    }

    /// How the factors of a whole stack meet what is stored, where both ways fit.
    fn factor_axes(
        &self,
        stack: &str,
        tensor: TensorRef<'_>,
        fitting: &[Axes],
        reading: &Reading,
    ) -> Result<Axes, Unplaced> {
        if let [only] = fitting {
            return Ok(*only);
        }
        let name = &tensor.info.name;
        let kind = || projection_kind(stack).to_owned();
        let stacks = self.stacks_of(name);
        if let Some((row, _)) = stacks.as_ref().filter(|(row, _)| row.factors == row.old_factors) {
            return Ok(row.factors);
        }
        let Some(exchanges) = reading.exchanges_dimensions else {
            return Err(Unplaced::axes(tensor, kind(), NO_VERSION));
        };
        match stacks {
            Some((row, _)) if exchanges => Ok(row.factors),
            Some((row, _)) => Ok(row.old_factors),
            // Experts that lie apart are `nn.Linear`s, which transformers stacks as they are.
            None if tensor.info.shape.len() == 2 => Ok(if exchanges { Axes::OutIn } else { Axes::InOut }),
            None => Err(Unplaced::axes(tensor, kind(), SQUARE_EXPERTS)),
        }
    }

    /// One stack in memory, one tensor per expert on disk; the stack's matrices are `[n_rows, n_columns]` as stored.
    fn place_apart(&self, name: &str, n: u64, n_rows: u64, n_columns: u64) -> Option<Vec<StoredRows<'a>>> {
        let (module, parameter) = name.rsplit_once('.')?;
        let (gate_up, halves) = GATE_UP;
        let names: &[&str] = if parameter == gate_up { &halves } else { &[parameter] };
        let share = n_rows / names.len() as u64;
        if share == 0 || share * names.len() as u64 != n_rows {
            return None;
        }
        let mut places = Vec::new();
        for matrix in 0..n {
            for (first_row, name) in (0..).step_by(share as usize).zip(names) {
                let name = format!("{module}.{matrix}.{name}.weight");
                let found = self.find_renamed(&name, |tensor| tensor.info.shape == [share, n_columns]).ok()?;
                places.push(StoredRows {
                    tensor: found.tensor,
                    first_row: 0,
                    columns: Columns::all(n_columns),
                    part: Part { matrix, first_row, n_rows: share },
                });
            }
        }
        Some(places)
    }

    /// One module per expert in memory, one stack on disk: `EXPERTS.3.up_proj.weight` is a part of `EXPERTS.gate_up_proj`, and
    /// `EXPERTS.gate_up_projs.3.weight` one matrix of it. `Err(None)` where there is no such stack.
    fn place_in_a_stack(&self, name: &str, d_out: u64, d_in: u64) -> Result<Placement<'a>, Option<Unplaced>> {
        let canonical = self.rules.canonical(name);
        let words: Vec<&str> = canonical.strip_suffix(".weight").ok_or(None)?.split('.').collect();
        let (module, expert, projection) = match words[..] {
            [ref module @ .., expert, projection] if is_number(expert) => (module, expert, projection),
            [ref module @ .., projections, expert] if is_number(expert) => {
                (module, expert, projections.strip_suffix('s').ok_or(None)?)
            }
            _ => return Err(None),
        };
        let expert: u64 = expert.parse().map_err(|_| None)?;
        let module = module.join(".");
        let (gate_up, halves) = GATE_UP;
        let whole = self.find_renamed(&format!("{module}.{projection}"), |tensor| tensor.info.shape.len() == 3);
        let half = halves.iter().position(|half| *half == projection);
        let (found, half) = match (whole, half) {
            (Ok(found), _) => (found, None),
            (Err(_), Some(half)) => {
                let found = self.find_renamed(&format!("{module}.{gate_up}"), |tensor| tensor.info.shape.len() == 3);
                (found.map_err(|_| None)?, Some(half as u64))
            }
            (Err(_), None) => return Err(None),
        };
        let tensor = found.tensor;
        let [n_experts, rows, columns] = tensor.info.shape[..] else { return Err(None) };
        if expert >= n_experts {
            return Err(None);
        }
        let share = if half.is_some() { 2 } else { 1 };
        let needed = |axes: Axes| axes.stored(d_out.saturating_mul(share), d_in);
        let fitting: Vec<Axes> = Axes::BOTH.into_iter().filter(|&axes| needed(axes) == (rows, columns)).collect();
        let axes = match fitting[..] {
            [] => return Err(Some(Unplaced::shape(tensor))),
            [only] => only,
            _ => self.stack_axes(tensor).map_err(|kind| Unplaced::axes(tensor, kind, SQUARE_EXPERTS))?.0,
        };
        let is_interleaved = self.stacks_of(&tensor.info.name).is_some_and(|(row, _)| row.is_interleaved);
        let (n_rows, n_columns) = axes.stored(d_out, d_in);
        let all = Columns::all(n_columns);
        let (first_row, columns) = match (half, axes) {
            (None, _) => (0, all),
            (Some(_), Axes::OutIn) if is_interleaved => {
                let what = "gate and up alternate in the rows of the stack, which is not supported";
                return Err(Some(Unplaced::Unsupported { name: tensor.info.name.clone(), what: what.to_owned() }));
            }
            (Some(half), Axes::OutIn) => (half * d_out, all),
            (Some(half), Axes::InOut) if is_interleaved => (0, Columns { first: half, step: 2, n: d_out, of: columns }),
            (Some(half), Axes::InOut) => (0, Columns { first: half * d_out, step: 1, n: d_out, of: columns }),
        };
        let part = Part { matrix: 0, first_row: 0, n_rows };
        let place = StoredRows { tensor, first_row: expert * rows + first_row, columns, part };
        Ok(Placement { axes, places: vec![place] })
    }

    /// Modules apart in memory and fused on disk, or the other way round. `Err(None)` where there is no such weight.
    fn place_in_fused(&self, name: &str, d_out: u64, d_in: u64) -> Result<Placement<'a>, Option<Unplaced>> {
        let canonical = self.rules.canonical(name);
        let module = canonical.strip_suffix(".weight").ok_or(None)?;
        let before = |end: &str| module.strip_suffix(end).filter(|before| before.ends_with('.'));
        for fused in FUSED {
            let n = fused.parts.len() as u64;
            if let Some(before) = before(fused.whole) {
                let share = d_out / n;
                if share * n != d_out || share == 0 {
                    continue;
                }
                let part = |(matrix, part): (u64, &&str)| {
                    let found =
                        self.find_renamed(&format!("{before}{part}.weight"), |t| t.info.shape == [share, d_in]).ok()?;
                    let part = Part { matrix: 0, first_row: matrix * share, n_rows: share };
                    Some(StoredRows { tensor: found.tensor, first_row: 0, columns: Columns::all(d_in), part })
                };
                if let Some(places) = (0..).zip(fused.parts).map(part).collect() {
                    return Ok(Placement { axes: Axes::OutIn, places });
                }
            }
            for (at, part) in (0..).zip(fused.parts) {
                let Some(before) = before(part) else { continue };
                let shape = [d_out.saturating_mul(n), d_in];
                let Ok(found) =
                    self.find_renamed(&format!("{before}{}.weight", fused.whole), |t| t.info.shape == shape)
                else {
                    continue;
                };
                let part = Part { matrix: 0, first_row: 0, n_rows: d_out };
                let place =
                    StoredRows { tensor: found.tensor, first_row: at * d_out, columns: Columns::all(d_in), part };
                return Ok(Placement { axes: Axes::OutIn, places: vec![place] });
            }
        }
        Err(None)
    }
}

const SQUARE: &str = "it is square, and neither its shape nor the model's type nor another weight of its kind tells whether it is \
                      stored as [d_out, d_in] or as [d_in, d_out]";
const SQUARE_EXPERTS: &str = "its experts are square, and neither the model's type nor the weights beside it tell whether they are \
                              stored as [d_out, d_in] or as [d_in, d_out]";
const NO_VERSION: &str = "its experts are square, and how the factors lie depends on the version of PEFT, which the adapter's config \
                          does not name";

/// How a matrix or a convolution's kernel of this shape fits, `out-in` first.
fn fits(tensor: TensorRef<'_>, d_out: u64, d_in: u64) -> Option<Axes> {
    let shape = &tensor.info.shape[..];
    // Of a convolution, all dimensions but the first belong to a row.
    let is_kernel = shape.len() > 2 && shape[0] == d_out && d_out.checked_mul(d_in) == Some(tensor.info.n_elements());
    match shape {
        [rows, columns] if (*rows, *columns) == (d_out, d_in) => Some(Axes::OutIn),
        [rows, columns] if (*rows, *columns) == (d_in, d_out) => Some(Axes::InOut),
        _ => is_kernel.then_some(Axes::OutIn),
    }
}

/// The same rows of every copy of a weight.
fn copies<'a>(found: &Weight<'a>, (first_row, n_rows): (u64, u64), columns: Columns) -> Vec<StoredRows<'a>> {
    let part = Part { matrix: 0, first_row: 0, n_rows };
    found.copies().map(|tensor| StoredRows { tensor, first_row, columns, part }).collect()
}
