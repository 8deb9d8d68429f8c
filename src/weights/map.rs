//! The map itself: made once per checkpoint, asked by name.

use std::{
    borrow::Cow,
    fmt,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde_json::{Map, Value};

use super::{
    Axes, KindAxes, Rename,
    axes::OwnWitnesses,
    config::Families,
    names::{Index, Rules, nearest},
    rules::{NOT_LINEAR, PARTS},
    ties::{TiedWeight, Ties},
};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, Layout, Printable, TensorRef, config_beside},
    tensor::module_of,
};

/// What the user said about what files leave open.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    /// Which way round kinds of weights are stored.
    pub axes: Vec<KindAxes>,
    /// Which way round all stacks of experts are stored, where `axes` does not say.
    pub expert_axes: Option<Axes>,
    /// What an adapter's keys are called in the checkpoint.
    pub renames: Vec<Rename>,
}

/// The weights of a checkpoint: their names, ties and order of dimensions, and the stored tensors behind them.
///
/// Made from headers and `config.json`; no tensor's data is read. Memory: the names of all tensors once more, when a name is first
/// looked up that no tensor has.
pub struct WeightMap<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) answers: Answers,
    pub(super) rules: Rules,
    pub(super) conv1d: OwnWitnesses,
    config: Cow<'a, Map<String, Value>>,
    ties: Ties<'a>,
    index: OnceLock<Index>,
    n_explained: AtomicUsize,
}

impl fmt::Debug for WeightMap<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeightMap").field("checkpoint", &self.checkpoint.root()).finish_non_exhaustive()
    }
}

/// A weight that a name stands for, and where it is stored. A plain one is one tensor; how the tensors of other layouts make a weight
/// is for this type to say, and for nobody else.
#[derive(Clone, Debug)]
pub struct Weight<'a> {
    /// The tensor that holds it.
    pub tensor: TensorRef<'a>,
    /// Others that hold the same weight: a tied one that is stored more than once.
    others: Vec<TensorRef<'a>>,
}

impl<'a> Weight<'a> {
    fn alone(tensor: TensorRef<'a>) -> Self {
        Self { tensor, others: Vec::new() }
    }
    /// All tensors that hold it.
    pub fn copies(&self) -> impl Iterator<Item = TensorRef<'a>> {
        std::iter::once(self.tensor).chain(self.others.iter().copied())
    }
}

/// Why a name of an adapter has no place in a checkpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Unplaced {
    /// There is no such weight.
    Missing {
        /// The name, after the user's renames.
        name: String,
    },
    /// Several weights may be meant.
    Ambiguous {
        /// Their names.
        names: Vec<String>,
    },
    /// The weight has another shape.
    Shape {
        /// Its name in the checkpoint.
        name: String,
        /// Its shape.
        found: Vec<u64>,
    },
    /// It is stored as codes.
    Coded(String),
    /// Nothing tells which way round it is stored.
    Axes {
        /// Its name in the checkpoint.
        name: String,
        /// The kind of weight, for `--axes KIND=`.
        kind: String,
        /// Why.
        what: String,
    },
    /// A layout that is known and not implemented.
    Unsupported {
        /// Its name in the checkpoint.
        name: String,
        /// What.
        what: String,
    },
}

impl Unplaced {
    pub(super) fn shape(tensor: TensorRef<'_>) -> Self {
        Self::Shape { name: tensor.info.name.clone(), found: tensor.info.shape.clone() }
    }
    pub(super) fn axes(tensor: TensorRef<'_>, kind: String, what: &str) -> Self {
        Self::Axes { name: tensor.info.name.clone(), kind, what: what.to_owned() }
    }
}

impl fmt::Display for Unplaced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { .. } => f.write_str("the base has no such tensor"),
            Self::Ambiguous { names } => write!(f, "several tensors of the base may be meant: {}", quoted(names)),
            Self::Shape { name, found } => write!(f, "the base has shape {found:?} (\"{}\")", Printable(name)),
            Self::Coded(why) => f.write_str(why),
            Self::Axes { what, .. } | Self::Unsupported { what, .. } => f.write_str(what),
        }
    }
}

fn quoted(names: &[String]) -> String {
    names.iter().map(|name| format!("\"{}\"", Printable(name))).collect::<Vec<_>>().join(", ")
}

impl<'a> WeightMap<'a> {
    /// The map of `checkpoint`. Of a single file, `config.json` beside it is read too.
    ///
    /// # Errors
    /// A config that cannot be read.
    pub fn new(checkpoint: &'a Checkpoint, answers: Answers) -> Result<Self, CheckpointError> {
        let config = match checkpoint.layout() {
            Layout::File => Cow::Owned(config_beside(checkpoint.root())?),
            _ => Cow::Borrowed(checkpoint.config()),
        };
        let families = Families::new(&config);
        let rules = Rules::of(&families.model_types());
        let ties = Ties::find(checkpoint, &rules, families);
        let (conv1d, index, n_explained) = (OwnWitnesses::default(), OnceLock::new(), AtomicUsize::new(0));
        Ok(Self { checkpoint, answers, rules, conv1d, config, ties, index, n_explained })
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    pub(super) fn families(&self) -> Families<'_> {
        Families::new(&self.config)
    }

    /// The weights that the model shares under several names.
    pub fn ties(&self) -> &[TiedWeight<'a>] {
        &self.ties.weights
    }

    /// The tied weight that a name stands for, of a model in memory or of the checkpoint.
    pub fn tie(&self, name: &str) -> Option<&TiedWeight<'a>> {
        self.ties.get(&self.rules.canonical(&self.renamed(name)))
    }

    /// Whether modules of these names are all that share a weight, so that nothing else changes with it.
    pub fn is_covered(&self, tie: &TiedWeight<'_>, names: &[String]) -> bool {
        let given: Vec<String> = names.iter().map(|name| module_of(&self.rules.canonical(name)).to_owned()).collect();
        tie.is_covered_by(&given)
    }

    /// Whether rows of a tied weight that PEFT trained under `name` were trained for all that share it: it ties them where `name` is the input
    /// embedding and the model's own config, not that of a part, ties embedding and head.
    ///
    /// Source: `_get_module_names_tied_with_embedding` of PEFT 0.21.
    pub fn rows_are_tied(&self, tie: &TiedWeight<'_>, name: &str) -> bool {
        let canonical = self.rules.canonical(&self.renamed(name));
        let is_off = self.checkpoint.config().get("tie_word_embeddings") == Some(&serde_json::Value::Bool(false));
        tie.is_embedding(module_of(&canonical)) && !is_off
    }

    /// The name that an adapter's key has after the user's renames.
    pub(super) fn renamed<'n>(&self, name: &'n str) -> Cow<'n, str> {
        self.answers.renames.iter().find_map(|rename| rename.apply(name)).map_or(Cow::Borrowed(name), Cow::Owned)
    }

    /// Fails where several of the user's renames are for one of `names`, or one of them is for none.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check_renames<'n>(&self, names: impl Iterator<Item = &'n str>) -> Result<(), String> {
        let renames = &self.answers.renames;
        let mut is_used = vec![false; renames.len()];
        for name in names {
            let mut hits = renames.iter().enumerate().filter(|(_, rename)| rename.apply(name).is_some());
            let Some((first, _)) = hits.next() else { continue };
            is_used[first] = true;
            if let Some((second, _)) = hits.next() {
                let [a, b] = [first, second].map(|at| Printable(&renames[at].to_string()).to_string());
                return Err(format!("\"{}\": both {a} and {b} rename it", Printable(name)));
            }
        }
        match is_used.iter().position(|used| !used) {
            None => Ok(()),
            Some(idle) => Err(format!("{}: no key of an adapter is called so", Printable(&renames[idle].to_string()))),
        }
    }

    /// The weight that `name` stands for, among those that `fits` takes: the tensor of this name, one of the same canonical name, or
    /// the only one whose name ends like that.
    ///
    /// # Errors
    /// [`Unplaced`].
    pub fn find(&self, name: &str, fits: impl Fn(TensorRef<'a>) -> bool) -> Result<Weight<'a>, Unplaced> {
        self.find_renamed(&self.renamed(name), fits)
    }

    /// The same of a name that the user's renames were applied to.
    pub(super) fn find_renamed(
        &self,
        name: &str,
        fits: impl Fn(TensorRef<'a>) -> bool,
    ) -> Result<Weight<'a>, Unplaced> {
        let exact = self.checkpoint.tensor(name);
        if let Some(weight) = self.checkpoint.codes().find_for(name, exact) {
            return Err(Unplaced::Coded(weight.refusal()));
        }
        let tied = || Some(self.ties.get(&self.rules.canonical(name))?.stored[0]);
        if let Some(tensor) = exact.or_else(tied) {
            return if fits(tensor) { Ok(self.with_copies(tensor)) } else { Err(Unplaced::shape(tensor)) };
        }
        let mut unfit = None;
        let index = self.index.get_or_init(|| Index::new(&self.rules, self.checkpoint));
        let candidates = index.candidates(&self.rules, name);
        let mut among = |places: &[u32]| -> Vec<TensorRef<'a>> {
            let all = places.iter().filter_map(|&at| self.checkpoint.tensor_at(at as usize));
            all.filter(|tensor| {
                let fits = tensor.coded().is_none() && fits(*tensor);
                if !fits {
                    unfit.get_or_insert(*tensor);
                }
                fits
            })
            .collect()
        };
        let (same, longer) = (among(&candidates.same), among(&candidates.longer));
        match (&same[..], &longer[..]) {
            (&[tensor], []) | ([], &[tensor]) => Ok(self.with_copies(tensor)),
            // `model.layers.0` means the text model's, though a vision tower has layers too; a bare `layers.0` may mean either.
            (&[tensor], _) if candidates.is_wrapped => Ok(self.with_copies(tensor)),
            ([], []) => Err(self.missing(name, unfit)),
            _ => {
                let names = same.iter().chain(&longer).take(3).map(|tensor| tensor.info.name.clone());
                Err(Unplaced::Ambiguous { names: names.collect() })
            }
        }
    }

    /// What `name` is called in the whole model, for a name that was given in the part of it that `class` is, such as
    /// `CLIPTextModel`; as it is where it is clear by itself, or where the class does not tell.
    pub fn within_part<'n>(&self, name: &'n str, class: &str) -> Cow<'n, str> {
        if !matches!(self.find(name, |_| true), Err(Unplaced::Ambiguous { .. })) {
            return Cow::Borrowed(name);
        }
        let parts = PARTS.iter().filter(|(word, _)| class.contains(word)).flat_map(|(_, prefixes)| *prefixes);
        let candidates = parts.map(|prefix| format!("{prefix}.{name}"));
        let found: Vec<String> = candidates.filter(|name| self.find(name, |_| true).is_ok()).collect();
        match <[String; 1]>::try_from(found) {
            Ok([only]) => Cow::Owned(only),
            Err(_) => Cow::Borrowed(name),
        }
    }

    fn missing(&self, name: &str, unfit: Option<TensorRef<'a>>) -> Unplaced {
        let weight = unfit.and_then(|tensor| tensor.coded()).or_else(|| self.checkpoint.codes().find(name));
        match (weight, unfit) {
            (Some(weight), _) => Unplaced::Coded(weight.refusal()),
            (None, Some(tensor)) => Unplaced::shape(tensor),
            (None, None) => Unplaced::Missing { name: name.to_owned() },
        }
    }

    /// Why an adapter's key has no place, for a list of problems; for the first few with the names that are most like it.
    pub fn explain(&self, key: &str, unplaced: &Unplaced) -> String {
        /// Each takes a comparison with all names.
        const MAX_EXPLAINED: usize = 8;
        let Unplaced::Missing { name } = unplaced else { return unplaced.to_string() };
        if name != key && *self.renamed(key) == *name {
            return format!("the base has no tensor \"{}\", which a rename made of it", Printable(name));
        }
        if self.n_explained.fetch_add(1, Ordering::Relaxed) >= MAX_EXPLAINED {
            return unplaced.to_string();
        }
        match &nearest(self.checkpoint.tensors().map(|tensor| tensor.info.name.as_str()), name)[..] {
            [] => unplaced.to_string(),
            [one] => format!("{unplaced}; the nearest is \"{}\"", Printable(one)),
            several => format!("{unplaced}; the nearest are {}", quoted(several)),
        }
    }

    fn with_copies(&self, tensor: TensorRef<'a>) -> Weight<'a> {
        let mut found = Weight::alone(tensor);
        if let Some(tie) = self.ties.get(&self.rules.canonical(&tensor.info.name)) {
            found.others.extend(tie.stored.iter().filter(|other| other.info.name != tensor.info.name));
        }
        found
    }

    /// Whether a weight of this name belongs to a linear layer that is neither embedding, nor head, nor norm.
    pub fn is_linear(&self, name: &str) -> bool {
        let is_other = |part: &str| NOT_LINEAR.contains(&part) || part.ends_with("norm");
        let module = super::pattern::weight_module(name);
        module.is_some_and(|module| !module.split('.').any(is_other))
            && self.ties.get(&self.rules.canonical(name)).is_none()
    }
}
