//! Which way round a weight is stored, and how that is known.

use std::{collections::BTreeMap, fmt, str::FromStr, sync::OnceLock};

use super::{
    TargetPattern, WeightMap,
    names::is_number,
    rules::{CONV1D_KINDS, CONV1D_MODELS, GATE_UP, LINEAR_KINDS, LINEAR_MODELS, STACKS, Stacks},
};
use crate::{
    checkpoint::{Printable, TensorRef},
    tensor::{is_float, projection_kind},
};

/// The order in which the dimensions of a matrix, or of each matrix of a stack, are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Axes {
    /// `[d_out, d_in]`, as `nn.Linear` has it.
    OutIn,
    /// `[d_in, d_out]`, as GPT-2's `Conv1D` and the experts of gpt-oss have it.
    InOut,
}

impl Axes {
    /// Both orders, in which they are tried.
    pub(super) const BOTH: [Self; 2] = [Self::OutIn, Self::InOut];

    /// Rows and columns, as stored, of a matrix that turns `d_in` inputs into `d_out` outputs.
    pub(super) fn stored(self, d_out: u64, d_in: u64) -> (u64, u64) {
        match self {
            Self::OutIn => (d_out, d_in),
            Self::InOut => (d_in, d_out),
        }
    }
}

impl fmt::Display for Axes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutIn => "out-in",
            Self::InOut => "in-out",
        })
    }
}

impl FromStr for Axes {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "out-in" => Ok(Self::OutIn),
            "in-out" => Ok(Self::InOut),
            _ => Err("expected out-in or in-out".to_owned()),
        }
    }
}

/// The user's word on a kind of weight, such as `c_proj=in-out`.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KindAxes {
    text: String,
    pattern: TargetPattern,
    axes: Axes,
}

impl KindAxes {
    pub(super) fn matches(&self, name: &str) -> bool {
        self.pattern.names(name)
    }
}

impl FromStr for KindAxes {
    type Err = String;
    /// Reads `KIND=out-in` or `KIND=in-out`; `KIND` is a module's last words, or a glob on the tensor's name.
    fn from_str(text: &str) -> Result<Self, String> {
        let what = |what: String| format!("expected KIND=out-in or KIND=in-out: {what}");
        let (kind, axes) = text.rsplit_once('=').ok_or_else(|| what("there is no `=`".to_owned()))?;
        let axes = axes.parse().map_err(what)?;
        if kind.is_empty() {
            return Err(what("the kind is missing".to_owned()));
        }
        let pattern = kind.parse().map_err(what)?;
        Ok(Self { text: text.to_owned(), pattern, axes })
    }
}

impl PartialEq for KindAxes {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl TryFrom<String> for KindAxes {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<KindAxes> for String {
    fn from(answer: KindAxes) -> Self {
        answer.text
    }
}

/// How the order of a weight's dimensions is known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Witness {
    /// The user said so.
    Option,
    /// The family of models stores such weights in one order.
    Family(String),
    /// Another weight of the same kind, which is not square.
    Sibling(String),
    /// `nn.Linear`, which every module is unless its family has `Conv1D`.
    Convention,
}

impl fmt::Display for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Option => f.write_str("told by option"),
            Self::Family(model_type) => write!(f, "model type {}", Printable(model_type)),
            Self::Sibling(name) => write!(f, "shape of {}", Printable(name)),
            Self::Convention => f.write_str("nn.Linear"),
        }
    }
}

/// The order of one weight's dimensions, or the kind that the user has to be asked about.
pub(super) type Settled = Result<(Axes, Witness), String>;

/// What the non-square weights of an adapter tell about their kinds, by part of the model and kind.
#[derive(Clone, Debug, Default)]
pub struct Witnesses(BTreeMap<String, (Option<String>, Option<String>)>);

impl Witnesses {
    fn get(&self, kind: &str) -> Settled {
        match self.0.get(kind) {
            Some((Some(name), None)) => Ok((Axes::OutIn, Witness::Sibling(name.clone()))),
            Some((None, Some(name))) => Ok((Axes::InOut, Witness::Sibling(name.clone()))),
            _ => Err(kind.to_owned()),
        }
    }

    /// Whether one of them is stored as `[d_in, d_out]`.
    pub(super) fn any_in_out(&self) -> bool {
        self.0.values().any(|(_, in_out)| in_out.is_some())
    }

    pub(super) fn add(&mut self, kind: String, axes: Axes, name: &str) {
        let (out_in, in_out) = self.0.entry(kind).or_default();
        let seen = if axes == Axes::OutIn { out_in } else { in_out };
        seen.get_or_insert_with(|| name.to_owned());
    }
}

/// What the checkpoint's own non-square `Conv1D` weights tell, found when it is first asked for.
#[derive(Debug, Default)]
pub(super) struct OwnWitnesses(OnceLock<Witnesses>);

impl WeightMap<'_> {
    /// What the user said about this weight.
    pub(super) fn told_axes(&self, name: &str) -> Option<Axes> {
        self.answers.axes.iter().find(|answer| answer.matches(name)).map(|answer| answer.axes)
    }

    /// Whether the user said that this weight is stored as `[d_out, d_in]`.
    pub fn is_told_out_in(&self, name: &str) -> bool {
        self.told_axes(name) == Some(Axes::OutIn)
    }

    /// The part of the model that a name tells, and the kind of module as the file has it: `decoder.h.c_proj`.
    pub(super) fn kind_of(&self, name: &str) -> String {
        let canonical = self.rules.canonical(name);
        let words: Vec<&str> = canonical.split('.').collect();
        let module = words.len().saturating_sub(2);
        let part = words.iter().take_while(|word| !is_number(word)).count().min(module);
        words[..part].iter().copied().chain([projection_kind(name)]).collect::<Vec<_>>().join(".")
    }

    /// Fails where what the user said about orders contradicts itself or what is known, or is about no weight. `keys` are an adapter's
    /// names, which may be those of stacks that lie apart.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check_axes<'n>(&self, mut keys: impl Iterator<Item = &'n str>) -> Result<(), String> {
        let answers = &self.answers.axes;
        if answers.is_empty() {
            return Ok(());
        }
        let mut is_used = vec![false; answers.len()];
        let mut check = |name: &str, known: &dyn Fn() -> Settled| {
            let mut hits = answers.iter().enumerate().filter(|(_, answer)| answer.matches(name));
            let Some((first, answer)) = hits.next() else { return Ok(()) };
            is_used[first] = true;
            for (at, other) in hits {
                is_used[at] = true;
                if other.axes != answer.axes {
                    let [a, b] = [&answer.text, &other.text].map(|text| Printable(text));
                    return Err(format!("\"{}\": --axes {a} and --axes {b} contradict each other", Printable(name)));
                }
            }
            match known() {
                Ok((axes, witness @ (Witness::Family(_) | Witness::Sibling(_)))) if axes != answer.axes => {
                    Err(format!(
                        "--axes {}: \"{}\" is stored as {axes}, as is known from the {witness}",
                        Printable(&answer.text),
                        Printable(name)
                    ))
                }
                _ => Ok(()),
            }
        };
        for tensor in self.checkpoint.tensors().filter(|tensor| matches!(tensor.info.shape.len(), 2 | 3)) {
            let is_stack = tensor.info.shape.len() == 3;
            check(&tensor.info.name, &|| match is_stack {
                true => self.known_stack_axes(tensor),
                false => self.known_matrix_axes(tensor, &Witnesses::default()),
            })?;
        }
        keys.try_for_each(|key| check(key, &|| Err(String::new())))?;
        match is_used.iter().position(|used| !used) {
            None => Ok(()),
            Some(idle) => Err(format!("--axes {}: no weight is of this kind", Printable(&answers[idle].text))),
        }
    }

    /// The order of the dimensions of a matrix, where its shape leaves it open. `others` are an adapter's other weights.
    pub(super) fn matrix_axes(&self, tensor: TensorRef<'_>, others: &Witnesses) -> Settled {
        match self.told_axes(&tensor.info.name) {
            Some(axes) => Ok((axes, Witness::Option)),
            None => self.known_matrix_axes(tensor, others),
        }
    }

    fn known_matrix_axes(&self, tensor: TensorRef<'_>, others: &Witnesses) -> Settled {
        let name = &tensor.info.name;
        let last = projection_kind(name);
        if !CONV1D_KINDS.contains(&last) {
            return Ok((Axes::OutIn, Witness::Convention));
        }
        let (kind, canonical) = (self.kind_of(name), self.rules.canonical(name));
        if let Some(model_type) = self.families().model_type_of(&canonical) {
            if CONV1D_MODELS.contains(&model_type) {
                return Ok((Axes::InOut, Witness::Family(model_type.to_owned())));
            }
            if LINEAR_MODELS.contains(&model_type) {
                return Ok((Axes::OutIn, Witness::Family(model_type.to_owned())));
            }
        }
        others
            .get(&kind)
            .or_else(|_| self.conv1d.0.get_or_init(|| self.find_conv1d()).get(&kind))
            .map_err(|_| last.to_owned())
    }

    /// Whether a module of this name is an `nn.Linear` whatever else the model has.
    pub(super) fn is_surely_linear(&self, name: &str) -> bool {
        let canonical = self.rules.canonical(name);
        let kind = projection_kind(name);
        let is_known = |model_type: &str| CONV1D_MODELS.contains(&model_type) || LINEAR_MODELS.contains(&model_type);
        LINEAR_KINDS.contains(&kind)
            || LINEAR_KINDS.contains(&projection_kind(&canonical))
            || self.families().model_type_of(&canonical).is_some_and(is_known)
    }

    /// The order that matrices beside a bias have: the bias is as long as `d_out`.
    fn find_conv1d(&self) -> Witnesses {
        let mut found = Witnesses::default();
        for tensor in self.checkpoint.tensors() {
            let name = &tensor.info.name;
            let Some(module) = name.strip_suffix(".weight") else { continue };
            let (&[first, second], true) = (&tensor.info.shape[..], CONV1D_KINDS.contains(&projection_kind(name)))
            else {
                continue;
            };
            let bias = self.checkpoint.tensor(&format!("{module}.bias")).map(|bias| &bias.info.shape[..]);
            if first != second && (bias == Some(&[first]) || bias == Some(&[second])) {
                let axes = if bias == Some(&[first]) { Axes::OutIn } else { Axes::InOut };
                found.add(self.kind_of(name), axes, name);
            }
        }
        found
    }

    /// The row of the table of stacks for the part of the model that a weight belongs to.
    pub(super) fn stacks_of(&self, name: &str) -> Option<(&'static Stacks, String)> {
        let model_type = self.families().model_type_of(&self.rules.canonical(name))?.to_owned();
        let row = STACKS.iter().find(|row| row.model_types.contains(&&*model_type))?;
        Some((row, model_type))
    }

    /// What the user said about this stack of experts.
    pub(super) fn told_stack_axes(&self, name: &str) -> Option<Axes> {
        self.told_axes(name).or(self.answers.expert_axes)
    }

    /// The order in which each expert of a stack is stored.
    pub(super) fn stack_axes(&self, tensor: TensorRef<'_>) -> Settled {
        match self.told_stack_axes(&tensor.info.name) {
            Some(axes) => Ok((axes, Witness::Option)),
            None => self.known_stack_axes(tensor),
        }
    }

    fn known_stack_axes(&self, tensor: TensorRef<'_>) -> Settled {
        let name = &tensor.info.name;
        // What hidden and intermediate size are is clear where both stacks of a layer are there.
        if let Some((axes, sibling)) = self.axes_beside(name) {
            return Ok((axes, Witness::Sibling(sibling)));
        }
        match self.stacks_of(name) {
            Some((row, model_type)) => Ok((row.stored, Witness::Family(model_type))),
            None => Err(projection_kind(name).to_owned()),
        }
    }

    /// The order of `gate_up_proj` `[E, 2I, H]` beside `down_proj` `[E, H, I]`: of both orders one alone makes sense.
    fn axes_beside(&self, name: &str) -> Option<(Axes, String)> {
        let (module, parameter) = name.rsplit_once('.')?;
        let (gate_up, down) = (format!("{module}.{}", GATE_UP.0), format!("{module}.down_proj"));
        let sibling = match parameter {
            "gate_up_proj" => &down,
            "down_proj" => &gate_up,
            _ => return None,
        };
        let shape = |name: &str| match self.checkpoint.tensor(name)?.info.shape[..] {
            [_, rows, columns] => Some((rows, columns)),
            _ => None,
        };
        let ((a, b), (c, d)) = (shape(&gate_up)?, shape(&down)?);
        let out_in = Some(a) == d.checked_mul(2) && b == c;
        let in_out = Some(b) == c.checked_mul(2) && a == d;
        match (out_in, in_out) {
            (true, false) => Some((Axes::OutIn, sibling.clone())),
            (false, true) => Some((Axes::InOut, sibling.clone())),
            _ => None,
        }
    }

    /// The kinds of weights that are stored as `[d_in, d_out]`, each with how that is known.
    pub fn stored_in_out(&self) -> BTreeMap<String, Witness> {
        let mut found = BTreeMap::new();
        for tensor in self.checkpoint.tensors() {
            let (name, n_dimensions) = (&tensor.info.name, tensor.info.shape.len());
            let kind = projection_kind(name);
            let is_stack = n_dimensions == 3 && !name.ends_with(".weight");
            let is_open = is_stack || (n_dimensions == 2 && CONV1D_KINDS.contains(&kind));
            if !is_open || !is_float(tensor.info.dtype) || tensor.coded().is_some() || found.contains_key(kind) {
                continue;
            }
            if let Ok((Axes::InOut, witness)) = self.axes(tensor) {
                found.insert(kind.to_owned(), witness);
            }
        }
        found
    }

    /// The order in which a weight is stored whose rows are the neurons: for those who choose among the weights of each.
    ///
    /// # Errors
    /// The kind that the user has to be asked about, where neither the shapes nor the family settle it.
    pub fn axes(&self, tensor: TensorRef<'_>) -> Result<(Axes, Witness), String> {
        match tensor.info.shape.len() {
            // A parameter of its own, which its model multiplies as it likes; modules called `weight` are kernels.
            3 if !tensor.info.name.ends_with(".weight") => self.stack_axes(tensor),
            2 => self.matrix_axes(tensor, &Witnesses::default()),
            _ => Ok((self.told_axes(&tensor.info.name).unwrap_or(Axes::OutIn), Witness::Convention)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_names_a_kind_and_an_order() {
        let answer: KindAxes = "c_proj=in-out".parse().unwrap();
        assert!(answer.matches("h.0.attn.c_proj.weight") && !answer.matches("h.0.attn.c_attn.weight"));
        assert!("*=in-out".parse::<KindAxes>().unwrap().matches("anything"));
        for bad in ["in-out", "c_proj", "c_proj=", "=in-out", "c_proj=out", "a[b=in-out"] {
            assert!(bad.parse::<KindAxes>().is_err(), "{bad}");
        }
    }
}
