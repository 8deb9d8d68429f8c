use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::print;
use crate::cli::{
    Answer,
    env::Env,
    failure::{CliError, CliResult},
    weights::RenameArgs,
};
use crate::{
    checkpoint::{Checkpoint, DOCUMENT_KEY, Existing, OutputKind, Printable, Shard, WorkFolder, check_output, probe},
    merge::{self, AdapterReading, MergeInput, MergeOptions},
    sync::{self, Checksum, Encoding, ExportOptions},
};

/// Export the changes of a checkpoint as a weight update
///
/// INPUT is the new checkpoint, or an adapter, which is merged into BASE first.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::cli) struct ExportArgs {
    /// New weights: a checkpoint, or an adapter of BASE
    pub(in crate::cli) input: PathBuf,
    /// Checkpoint that the servers have
    #[arg(long, value_name = "BASE")]
    pub(in crate::cli) base: PathBuf,
    /// Folder of the update; its name is the version, as in weight_v000001
    #[arg(short, long, value_name = "PATH")]
    pub(in crate::cli) output: PathBuf,
    #[command(flatten)]
    pub(in crate::cli) renames: RenameArgs,
    /// Encoding of the changes
    #[arg(long, value_enum, default_value_t)]
    pub(in crate::cli) encoding: EncodingArg,
    /// Checksum of the new bytes
    #[arg(long, value_enum, default_value_t)]
    pub(in crate::cli) checksum: ChecksumArg,
    /// Version that the servers have [default: the version of the output minus 1]
    #[arg(long, value_name = "N")]
    pub(in crate::cli) base_version: Option<u64>,
    /// List all changed tensors
    #[arg(long)]
    pub(in crate::cli) tensors: bool,
    /// Replace an existing output
    #[arg(long)]
    pub(in crate::cli) force: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub(in crate::cli) enum EncodingArg {
    /// Positions and new bytes; applying it twice does no harm
    #[default]
    Overwrite,
    /// Old bytes xor new bytes; must be applied exactly once
    Xor,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub(in crate::cli) enum ChecksumArg {
    #[default]
    #[value(name = "xxh3-128")]
    Xxh3,
    Blake3,
    Adler32,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt sync export merged --base llama -o updates/weight_v000001
  neuroada-ckpt sync export adapter.safetensors --base llama -o weight_v000002 --base-version 0";

pub(in crate::cli) fn run(args: &ExportArgs, env: &Env) -> CliResult<Answer> {
    let options = args.options()?;
    let base = Checkpoint::open(&args.base)?;
    let existing = if args.force { Existing::Replace } else { Existing::Keep };
    check_output(&args.output, OutputKind::Folder, existing)?;
    // An adapter is merged first, beside the output.
    let (tuned, _merged) = match is_checkpoint(&args.input)? {
        true => (Checkpoint::open(&args.input)?, None),
        false => {
            let folder = WorkFolder::beside(&args.output)?;
            (merged(args, folder.path(), env)?, Some(folder))
        }
    };
    let report = sync::export(&env.context(), &base, &tuned, &options, &args.output, existing)?;
    env.report_work(&report, |report, page| print(report, args.tensors, page))?;
    Ok(Answer::Yes)
}

impl ExportArgs {
    fn options(&self) -> CliResult<ExportOptions> {
        let version = version(&self.output)?;
        let base_version = match (self.base_version, version.checked_sub(1)) {
            (Some(base), _) | (None, Some(base)) => base,
            (None, None) => {
                let advice = "there is no version before 0; name the folder weight_v000001, or give --base-version";
                return Err(CliError::usage(advice));
            }
        };
        let encoding = match self.encoding {
            EncodingArg::Overwrite => Encoding::Overwrite,
            EncodingArg::Xor => Encoding::Xor,
        };
        let checksum = match self.checksum {
            ChecksumArg::Xxh3 => Checksum::Xxh3,
            ChecksumArg::Blake3 => Checksum::Blake3,
            ChecksumArg::Adler32 => Checksum::Adler32,
        };
        Ok(ExportOptions { encoding, checksum, version, base_version })
    }
}

/// BASE with the adapter INPUT merged, below `folder`.
fn merged(args: &ExportArgs, folder: &Path, env: &Env) -> CliResult<Checkpoint> {
    let path = folder.join(args.base.file_name().unwrap_or("merged".as_ref()));
    let input = MergeInput { adapter: args.input.clone(), scale: None };
    let reading = AdapterReading { renames: args.renames.renames.clone(), ..AdapterReading::default() };
    let options = MergeOptions { reading, ..MergeOptions::new_checkpoint(&path) };
    let report = merge::merge(&env.context(), &args.base, &[input], &options)?;
    report.notes.iter().for_each(|note| env.note(note));
    Ok(Checkpoint::open(&path)?)
}

/// Whether the input is a checkpoint: a checkpoint's folder, or a safetensors file without a document of this program.
fn is_checkpoint(input: &Path) -> CliResult<bool> {
    if probe::is_folder(input)? {
        for name in ["model.safetensors", "model.safetensors.index.json"] {
            if probe::is_present(&input.join(name))? {
                return Ok(true);
            }
        }
        return Ok(false);
    }
    let opened = Shard::open(input);
    Ok(opened.is_ok_and(|shard| !shard.header().metadata().contains_key(DOCUMENT_KEY)))
}

/// The version in the output's name.
fn version(output: &Path) -> CliResult<u64> {
    let name = output.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let digits = name.strip_prefix("weight_v").filter(|digits| digits.len() >= 6);
    let version = digits.and_then(|digits| digits.parse().ok());
    version.ok_or_else(|| {
        let name = Printable(&name);
        CliError::usage(format!(
            "\"{name}\": servers read folders named weight_vNNNNNN, such as weight_v000001; the number is the version"
        ))
    })
}
