//! `convert`: between this program's adapters and other tools' files. Formats of adapters are handled here, deltas of whole
//! checkpoints for inference servers in `weight_sync`.

mod weight_sync;

use std::path::PathBuf;

use anyhow::bail;
use clap::{Args, ValueEnum};
use neuroada_ckpt::{
    adapter::{ConvertReport, ConvertedTensor},
    checkpoint::{Checkpoint, Existing},
    convert::{self, ConvertError},
    foreign::Format,
    tensor::projection_kind,
    weights::WeightMap,
};

use super::{
    Answer,
    env::Env,
    failure::Hint,
    page::{Page, Table, bytes, count},
    weights::RenameArgs,
};

/// Read other tools' sparse adapters, and write them
///
/// What INPUT is shows in its content: an adapter of this program, a folder of the published NeuroAda code (positions.npy and
/// tunable_para/), of PEFT (SHiRA, Super-Tuning) or SpIEL (adapter_config.json), or coordinates in an .npz file. Pickles are
/// taken apart by a reader that knows saved tensors and nothing else; nothing in them is executed. Foreign formats do not
/// know their base, so --base says which it is: positions are checked against its shapes, and the adapter carries a hash of
/// its values from then on.
///
/// Two more targets are about whole checkpoints: weight-sync writes what INPUT makes of BASE as a folder that inference servers
/// fetch, and checkpoint applies such a folder to BASE.
#[derive(Args)]
pub(super) struct ConvertArgs {
    /// What to read
    input: PathBuf,
    /// Where to write
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    /// What to write
    #[arg(long, value_enum)]
    to: Target,
    /// The checkpoint that the deltas were trained on, or that servers have
    #[arg(long, value_name = "BASE")]
    base: Option<PathBuf>,
    #[command(flatten)]
    renames: RenameArgs,
    /// Weight sync: how changes are told [default: overwrite]
    #[arg(long, value_enum)]
    encoding: Option<EncodingArg>,
    /// Weight sync: what proves the new bytes [default: xxh3-128]
    #[arg(long, value_enum)]
    checksum: Option<ChecksumArg>,
    /// Weight sync: the version that the delta is applied to [default: the one before]
    #[arg(long, value_name = "N")]
    base_version: Option<u64>,
    /// List every tensor instead of a line per kind
    #[arg(long)]
    tensors: bool,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Target {
    /// An adapter of this program, one safetensors file
    Neuroada,
    /// A folder of the published NeuroAda code: positions.npy and tunable_para/
    Published,
    /// Coordinates in one file of numpy.savez
    Npz,
    /// A folder that PEFT loads as SHiRA
    Shira,
    /// A folder that PEFT loads as Super-Tuning
    Supertuning,
    /// A folder that SpIEL's fork of PEFT loads
    Spiel,
    /// A folder weight_vNNNNNN that SGLang's and slime's weight sync reads: what INPUT, a merged checkpoint or an adapter, makes of BASE
    WeightSync,
    /// A checkpoint: BASE with the weight_vNNNNNN folder INPUT applied
    Checkpoint,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum EncodingArg {
    /// Positions and new bytes; applying it twice does no harm
    Overwrite,
    /// Old and new bytes, one xor the other; to be applied exactly once
    Xor,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum ChecksumArg {
    #[value(name = "xxh3-128")]
    Xxh3,
    Blake3,
    Adler32,
}

pub(super) fn run(args: ConvertArgs, env: &Env) -> anyhow::Result<Answer> {
    let format = match args.to {
        Target::Neuroada => Format::NeuroAda,
        Target::Published => Format::Published,
        Target::Npz => Format::Npz,
        Target::Shira => Format::Shira,
        Target::Supertuning => Format::SuperTuning,
        Target::Spiel => Format::Spiel,
        Target::WeightSync => return weight_sync::export(&args, env),
        Target::Checkpoint => return weight_sync::apply(&args, env),
    };
    if args.encoding.is_some() || args.checksum.is_some() || args.base_version.is_some() {
        bail!("--encoding, --checksum and --base-version belong to --to weight-sync");
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
            Err(e).hint("--base BASE tells how its weights are stored")?
        }
        Err(e @ ConvertError::NotLinear { .. }) => Err(e).hint("--to npz holds every matrix, and merge adds it")?,
        report => report?,
    };
    env.report_work(&report, |report, page| print(report, args.tensors, page))?;
    Ok(Answer::Yes)
}

impl ConvertArgs {
    fn existing(&self) -> Existing {
        if self.force { Existing::Replace } else { Existing::Keep }
    }
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
        let words = match &of_kind[..] {
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
            words,
        ]);
    }
    page.table(&table);
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
