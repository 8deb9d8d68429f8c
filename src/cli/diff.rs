use std::path::{Path, PathBuf};

use clap::Args;

use super::{
    Answer,
    env::Env,
    failure::{CliError, CliResult},
    page::{Page, Table, bytes, count, number, percent},
    unpack::open_adapter,
};
use crate::{
    checkpoint::{Checkpoint, Printable, Shard, probe},
    diff::{self, AdapterDiff, CheckpointDiff, Overlap},
    mask::{FileKind, MaskFile},
    tensor::projection_kind,
};

/// Compare two adapters, two masks or two checkpoints
///
/// For adapters the report has the positions only in A, only in B and in both, sign conflicts, cosine and norms. For checkpoints it has the
/// tensors that were added, removed, changed in dtype or shape, or changed in value, and by how much. The exit code is 1 if they differ.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct DiffArgs {
    /// Adapter, mask or checkpoint
    a: PathBuf,
    /// Adapter, mask or checkpoint to compare with A, of the same kind
    b: PathBuf,
    /// Base of the adapters; required for packed adapters with derived columns
    #[arg(long, value_name = "PATH")]
    base: Option<PathBuf>,
    /// Print one line per tensor instead of one per kind
    #[arg(long)]
    tensors: bool,
}

/// The kind of a path to compare.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Adapter,
    Mask,
    Checkpoint,
}

impl Kind {
    fn of(path: &Path) -> CliResult<Self> {
        if probe::is_folder(path)? {
            return Ok(Self::Checkpoint);
        }
        Ok(match FileKind::of(&Shard::open(path)?)? {
            FileKind::Document(kind) if kind == "adapter" || kind == "packed" => Self::Adapter,
            FileKind::Document(kind) if kind == "mask" => Self::Mask,
            _ => Self::Checkpoint,
        })
    }
    fn noun(self) -> &'static str {
        match self {
            Self::Adapter => "an adapter",
            Self::Mask => "a mask",
            Self::Checkpoint => "a checkpoint",
        }
    }
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt diff llama merged
  neuroada-ckpt diff llama merged --tensors
  neuroada-ckpt diff a.safetensors b.safetensors";

pub(super) fn run(args: DiffArgs, env: &Env) -> CliResult<Answer> {
    let (kind_a, kind_b) = (Kind::of(&args.a)?, Kind::of(&args.b)?);
    if kind_a != kind_b {
        let (a, b) = (Printable::path(&args.a), Printable::path(&args.b));
        return Err(CliError::usage(format!(
            "{a} is {} and {b} is {}: both must be of one kind",
            kind_a.noun(),
            kind_b.noun()
        )));
    }
    let ctx = env.context();
    let equal = match kind_a {
        Kind::Checkpoint => {
            let report = diff::diff_checkpoints(&ctx, &Checkpoint::open(&args.a)?, &Checkpoint::open(&args.b)?)?;
            env.report(&report, |report, page| print_checkpoints(report, args.tensors, page))?;
            report.equal
        }
        Kind::Adapter => {
            let open = |path: &Path| open_adapter(path, args.base.as_deref(), env);
            let report = diff::diff_adapters(&ctx, &open(&args.a)?, &open(&args.b)?)?;
            env.report(&report, |report, page| print_adapters(report, args.tensors, true, page))?;
            report.equal
        }
        Kind::Mask => {
            let report = diff::diff_masks(&ctx, &MaskFile::open(&args.a)?, &MaskFile::open(&args.b)?)?;
            env.report(&report, |report, page| print_adapters(report, args.tensors, false, page))?;
            report.equal
        }
    };
    Ok(if equal { Answer::Yes } else { Answer::No })
}

fn print_adapters(report: &AdapterDiff, tensors: bool, with_values: bool, page: &mut Page) {
    let mut table = Table::new(["tensor", "only A>", "only B>", "shared>", "Jaccard>", "sign conflicts>", "cosine>"]);
    let mut row = |name: &str, overlap: &Overlap| {
        let (conflicts, cosine) = match (with_values, overlap.cosine) {
            (false, _) => (String::new(), String::new()),
            (true, cosine) => (count(overlap.n_sign_conflicts), cosine.map_or("-".to_owned(), number)),
        };
        let [a, b, shared] = [overlap.n_only_a, overlap.n_only_b, overlap.n_shared].map(count);
        table.row([name.to_owned(), a, b, shared, number(overlap.jaccard), conflicts, cosine]);
    };
    for tensor in report.tensors.iter().filter(|tensor| tensors || tensor.status != "both") {
        let note = if tensor.status == "unlike" { " (made for another tensor)" } else { "" };
        row(&format!("{}{note}", tensor.tensor), &tensor.overlap);
    }
    row("total", &report.total);
    page.table(table);
    page.legend("Jaccard: shared positions over all positions of A and B");
    page.blank();
    let mut facts = Vec::new();
    if with_values {
        facts.push(("norm of A", number(report.total.norm_a)));
        facts.push(("norm of B", number(report.total.norm_b)));
        facts.push(("largest difference", number(report.total.largest_difference)));
    }
    facts.push(("verdict", if report.equal { "equal".to_owned() } else { "different".to_owned() }));
    page.facts(&facts);
}

fn print_checkpoints(report: &CheckpointDiff, tensors: bool, page: &mut Page) {
    for name in &report.removed {
        page.line(format_args!("- {}", Printable(name)));
    }
    for name in &report.added {
        page.line(format_args!("+ {}", Printable(name)));
    }
    for tensor in &report.retyped {
        let (name, a, b) = (Printable(&tensor.tensor), &tensor.shape_a, &tensor.shape_b);
        page.line(format_args!("! {name}: {} {a:?} became {} {b:?}", tensor.dtype_a, tensor.dtype_b));
    }
    page.blank();
    let mut table =
        Table::new([if tensors { "tensor" } else { "kind" }, "changed>", "of>", "share>", "largest>", "norm>"]);
    if tensors {
        for tensor in &report.changed {
            let measure = |x: Option<f64>| x.map_or("-".to_owned(), number);
            let (changed, all) = (tensor.n_changed, tensor.n_elements);
            let (largest, norm) = (measure(tensor.largest_change), measure(tensor.change_norm));
            table.row([tensor.tensor.clone(), count(changed), count(all), percent(changed, all), largest, norm]);
        }
    } else {
        let mut kinds: Vec<&str> = report.changed.iter().map(|tensor| projection_kind(&tensor.tensor)).collect();
        kinds.sort_unstable();
        kinds.dedup();
        for kind in kinds {
            let of_kind = || report.changed.iter().filter(|tensor| projection_kind(&tensor.tensor) == kind);
            let changed = of_kind().map(|tensor| tensor.n_changed).sum();
            let all = of_kind().map(|tensor| tensor.n_elements).sum();
            let largest = of_kind().filter_map(|tensor| tensor.largest_change).fold(0.0, f64::max);
            let norm = of_kind().filter_map(|tensor| tensor.change_norm).map(|norm| norm * norm).sum::<f64>().sqrt();
            table.row([
                kind.to_owned(),
                count(changed),
                count(all),
                percent(changed, all),
                number(largest),
                number(norm),
            ]);
        }
    }
    page.table(table);
    page.blank();
    page.facts(&[
        ("tensors", format!("{} changed, {} the same", count(report.changed.len() as u64), count(report.n_same))),
        ("elements", format!("{} of {} changed", count(report.n_changed_elements), count(report.n_elements))),
        ("compared", bytes(report.bytes_compared)),
        ("verdict", if report.equal { "equal".to_owned() } else { "different".to_owned() }),
    ]);
}
