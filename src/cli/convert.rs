use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{
    Answer,
    env::Env,
    failure::{CliError, CliResult, Hint},
    page::{Page, Table, bytes, count},
    sync::{self, ApplyArgs, ChecksumArg, EncodingArg, ExportArgs},
    weights::RenameArgs,
};
use crate::{
    adapter::{ConvertReport, ConvertedTensor},
    checkpoint::{Checkpoint, Existing},
    convert::{self, ConvertError},
    foreign::Format,
    tensor::projection_kind,
    weights::WeightMap,
};

/// Convert a sparse adapter from one format to another
///
/// The format of INPUT is recognized by its content: an adapter of this program, a folder of the published NeuroAda code (positions.npy
/// and tunable_para/), of PEFT (SHiRA, Super-Tuning) or SpIEL (adapter_config.json), or coordinates in an .npz file. Pickles are parsed by
/// a reader that knows saved tensors only; nothing in them is executed. Other formats do not record their base, so --base names it: the
/// positions are checked against its shapes, and the new adapter records a hash of its values.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ConvertArgs {
    /// Adapter to convert: a file or a folder
    input: PathBuf,
    /// File or folder of the converted adapter
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    /// Format of the output
    #[arg(long, value_enum)]
    to: TargetFormat,
    /// Checkpoint that the deltas were trained on; required for other formats than neuroada
    #[arg(long, value_name = "BASE")]
    base: Option<PathBuf>,
    #[command(flatten)]
    renames: RenameArgs,
    /// See `sync export`
    #[arg(long, value_enum, hide = true)]
    encoding: Option<EncodingArg>,
    /// See `sync export`
    #[arg(long, value_enum, hide = true)]
    checksum: Option<ChecksumArg>,
    /// See `sync export`
    #[arg(long, value_name = "N", hide = true)]
    base_version: Option<u64>,
    /// Print one line per tensor instead of one per kind
    #[arg(long)]
    tensors: bool,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum TargetFormat {
    /// Adapter of this program, one safetensors file
    Neuroada,
    /// Folder of the published NeuroAda code: positions.npy and tunable_para/
    Published,
    /// Coordinates in one file of numpy.savez
    Npz,
    /// Folder that PEFT loads as SHiRA
    Shira,
    /// Folder that PEFT loads as Super-Tuning
    Supertuning,
    /// Folder that SpIEL's fork of PEFT loads
    Spiel,
    /// Old name of `sync export`
    #[value(hide = true)]
    WeightSync,
    /// Old name of `sync apply`
    #[value(hide = true)]
    Checkpoint,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt convert shira-folder --base llama --to neuroada -o adapter.safetensors
  neuroada-ckpt convert adapter.safetensors --to shira -o shira-folder
  neuroada-ckpt convert adapter.safetensors --to npz -o adapter.npz";

pub(super) fn run(args: ConvertArgs, env: &Env) -> CliResult<Answer> {
    let format = match args.to {
        TargetFormat::Neuroada => Format::NeuroAda,
        TargetFormat::Published => Format::Published,
        TargetFormat::Npz => Format::Npz,
        TargetFormat::Shira => Format::Shira,
        TargetFormat::Supertuning => Format::SuperTuning,
        TargetFormat::Spiel => Format::Spiel,
        TargetFormat::WeightSync => return export(args, env),
        TargetFormat::Checkpoint => return apply(args, env),
    };
    if args.has_export_options() {
        return Err(CliError::usage("--encoding, --checksum and --base-version belong to `sync export`"));
    }
    let base = args.base.as_deref().map(Checkpoint::open).transpose()?;
    let existing = args.existing();
    let answers = args.renames.answers();
    let base = base.as_ref().map(|base| WeightMap::new(base, answers)).transpose()?;
    let report = match convert::convert(&env.context(), &args.input, base.as_ref(), format, &args.output, existing) {
        Err(e @ ConvertError::NoBase { .. }) => {
            Err(e).hint("--base BASE names the checkpoint that the deltas were trained on")?
        }
        Err(e @ ConvertError::NotLinear { needs_base: true, .. }) => {
            Err(e).hint("--base BASE shows how the weights are stored")?
        }
        Err(e @ ConvertError::NotLinear { .. }) => Err(e).hint("--to npz stores any matrix, and merge reads it")?,
        report => report?,
    };
    env.report_work(&report, |report, page| print(report, args.tensors, page))?;
    Ok(Answer::Yes)
}

impl ConvertArgs {
    fn existing(&self) -> Existing {
        if self.force { Existing::Replace } else { Existing::Keep }
    }

    /// Whether an option of `sync export` was given.
    fn has_export_options(&self) -> bool {
        self.encoding.is_some() || self.checksum.is_some() || self.base_version.is_some()
    }
}

/// `convert --to weight-sync`, the old name of `sync export`.
fn export(args: ConvertArgs, env: &Env) -> CliResult<Answer> {
    env.note("warning: `convert --to weight-sync` is deprecated, and the next release removes it: use `sync export`");
    let base = args
        .base
        .ok_or_else(|| CliError::usage("--to weight-sync needs --base, the checkpoint that the servers have"))?;
    let args = ExportArgs {
        input: args.input,
        base,
        output: args.output,
        renames: args.renames,
        encoding: args.encoding.unwrap_or_default(),
        checksum: args.checksum.unwrap_or_default(),
        base_version: args.base_version,
        tensors: args.tensors,
        force: args.force,
    };
    sync::export(&args, env)
}

/// `convert --to checkpoint`, the old name of `sync apply`.
fn apply(args: ConvertArgs, env: &Env) -> CliResult<Answer> {
    env.note("warning: `convert --to checkpoint` is deprecated, and the next release removes it: use `sync apply`");
    let has_options = args.has_export_options();
    let base = args
        .base
        .ok_or_else(|| CliError::usage("--to checkpoint needs --base, the checkpoint that the update is applied to"))?;
    if has_options {
        return Err(CliError::usage(
            "--to checkpoint reads the encoding, the checksum and the versions from the update itself",
        ));
    }
    let (input, output, tensors, force) = (args.input, args.output, args.tensors, args.force);
    sync::apply(&ApplyArgs { input, base, output, tensors, force }, env)
}

fn print(report: &ConvertReport, tensors: bool, page: &mut Page) {
    let title = if tensors { "tensor" } else { "kind" };
    let mut table = Table::new([title, "tensors>", "read>", "written>", "padding>", "summed>", "rounded>", "result"]);
    let mut kinds: Vec<(String, Vec<&ConvertedTensor>)> = Vec::new();
    for tensor in &report.tensors {
        let kind = if tensors { tensor.tensor.clone() } else { projection_kind(&tensor.tensor).to_owned() };
        match kinds.iter_mut().find(|(name, _)| *name == kind) {
            Some((_, of_kind)) => of_kind.push(tensor),
            None => kinds.push((kind, vec![tensor])),
        }
    }
    kinds.sort_by(|a, b| a.0.cmp(&b.0));
    for (kind, of_kind) in kinds {
        let sum = |of: fn(&ConvertedTensor) -> u64| count(of_kind.iter().map(|tensor| of(tensor)).sum());
        let result = match &of_kind[..] {
            [tensor] => tensor.exactness(),
            all if all.iter().all(|tensor| tensor.n_rounded == 0) => "exact".to_owned(),
            _ => "rounded".to_owned(),
        };
        table.row([
            kind,
            count(of_kind.len() as u64),
            sum(|tensor| tensor.n_entries),
            sum(|tensor| tensor.n_written),
            sum(|tensor| tensor.n_padding),
            sum(|tensor| tensor.n_summed),
            sum(|tensor| tensor.n_rounded),
            result,
        ]);
    }
    if !report.tensors.is_empty() {
        page.table(table);
        page.legend(
            "padding: neutral entries that a format adds for a fixed number; summed: deltas of one position added up",
        );
    }
    page.blank();
    for remark in &report.remarks {
        page.line(remark.as_str());
    }
    page.blank();
    let mut facts = vec![("from", report.from.clone()), ("to", report.to.clone())];
    if let Some(base) = &report.base {
        facts.push(("made for", base.clone()));
    }
    if let Some(id) = &report.id {
        facts.push(("adapter", id[..12].to_owned()));
    }
    facts.push(("size", bytes(report.n_bytes)));
    let verdict = match report.n_rounded {
        0 => "exact: every delta is the same".to_owned(),
        n => format!("{} of {} deltas are rounded", count(n), count(report.n_entries)),
    };
    facts.push(("verdict", verdict));
    page.facts(&facts);
}
