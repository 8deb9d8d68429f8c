//! Deltas of checkpoints for inference servers.

use super::{ChecksumArg, ConvertArgs, EncodingArg};
use crate::cli::{
    Answer,
    env::Env,
    page::{Page, Table, bytes, count, percent},
};
use anyhow::{anyhow, bail};
use neuroada_ckpt::{
    checkpoint::{Checkpoint, DOCUMENT_KEY, Printable, WorkFolder, probe},
    convert::{self, Checksum, Encoding, WeightSyncOptions, WeightSyncReport},
    merge::{self, AdapterReading, MergeInput, MergeOptions},
};

/// Writes what INPUT makes of BASE as a `weight_vNNNNNN` folder.
pub(super) fn export(args: &ConvertArgs, env: &Env) -> anyhow::Result<Answer> {
    let ctx = env.context();
    let base_path =
        args.base.as_ref().ok_or_else(|| anyhow!("--to weight-sync needs --base: what the servers have now"))?;
    let version = version(args)?;
    let base_version = match (args.base_version, version.checked_sub(1)) {
        (Some(base), _) | (None, Some(base)) => base,
        (None, None) => bail!("there is no version before 0; name the folder weight_v000001, or say --base-version"),
    };
    let options = WeightSyncOptions {
        encoding: match args.encoding {
            Some(EncodingArg::Xor) => Encoding::Xor,
            Some(EncodingArg::Overwrite) | None => Encoding::Overwrite,
        },
        checksum: match args.checksum {
            Some(ChecksumArg::Blake3) => Checksum::Blake3,
            Some(ChecksumArg::Adler32) => Checksum::Adler32,
            Some(ChecksumArg::Xxh3) | None => Checksum::Xxh3,
        },
        version,
        base_version,
    };
    let base = Checkpoint::open(base_path)?;
    // What is a checkpoint is taken as it is; what is an adapter is merged first, beside the output.
    let (tuned, _merged) = match is_checkpoint(args)? {
        true => (Checkpoint::open(&args.input)?, None),
        false => {
            let folder = WorkFolder::beside(&args.output)?;
            let path = folder.path().join(base_path.file_name().unwrap_or("merged".as_ref()));
            let input = MergeInput { adapter: args.input.clone(), scale: None };
            let reading = AdapterReading { renames: args.renames.renames.clone(), ..AdapterReading::default() };
            let options = MergeOptions { reading, ..MergeOptions::new_checkpoint(&path) };
            let merged = merge::merge(&ctx, base_path, &[input], &options)?;
            merged.notes.iter().for_each(|note| env.note(note));
            (Checkpoint::open(&path)?, Some(folder))
        }
    };
    let report = convert::export_weight_sync(&ctx, &base, &tuned, &options, &args.output, args.existing())?;
    env.report_work(&report, |report, page| print(report, args.tensors, page))?;
    Ok(Answer::Yes)
}

/// Whether INPUT is a checkpoint: a folder of one, or a safetensors file without a document of this program.
fn is_checkpoint(args: &ConvertArgs) -> anyhow::Result<bool> {
    if probe::is_folder(&args.input)? {
        for name in ["model.safetensors", "model.safetensors.index.json"] {
            if probe::is_present(&args.input.join(name))? {
                return Ok(true);
            }
        }
        return Ok(false);
    }
    let opened = neuroada_ckpt::checkpoint::Shard::open(&args.input);
    Ok(opened.is_ok_and(|shard| !shard.header().metadata().contains_key(DOCUMENT_KEY)))
}

/// The version that the output's name says.
fn version(args: &ConvertArgs) -> anyhow::Result<u64> {
    let name = args.output.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let digits = name.strip_prefix("weight_v").filter(|digits| digits.len() >= 6);
    let version = digits.and_then(|digits| digits.parse().ok());
    version.ok_or_else(|| {
        let name = Printable(&name);
        anyhow!("\"{name}\": servers look for weight_vNNNNNN, such as weight_v000001; the number is the version")
    })
}

/// Writes BASE with the delta INPUT applied.
pub(super) fn apply(args: &ConvertArgs, env: &Env) -> anyhow::Result<Answer> {
    let base =
        args.base.as_ref().ok_or_else(|| anyhow!("--to checkpoint needs --base: what the delta is applied to"))?;
    if args.encoding.is_some() || args.checksum.is_some() || args.base_version.is_some() {
        bail!("the delta itself says its encoding, its checksum and its versions");
    }
    let (ctx, base) = (env.context(), Checkpoint::open(base)?);
    let report = convert::apply_weight_sync(&ctx, &base, &args.input, &args.output, args.existing())?;
    env.report_work(&report, |report, page| print(report, args.tensors, page))?;
    Ok(Answer::Yes)
}

fn print(report: &WeightSyncReport, tensors: bool, page: &mut Page) {
    if tensors {
        let mut table = Table::new(["tensor", "changed bytes>", "of>", "delta bytes>", "checksum"]);
        for tensor in &report.tensors {
            table.row([
                tensor.tensor.clone(),
                count(tensor.n_changed),
                count(tensor.n_bytes),
                count(tensor.n_delta_bytes),
                tensor.checksum.clone(),
            ]);
        }
        page.table(&table);
        page.blank();
    }
    let n_bytes = report.tensors.iter().map(|tensor| tensor.n_bytes).sum();
    page.facts(&[
        ("version", format!("{}, from {} ({})", report.version, report.base_version, report.base)),
        (
            "changed",
            format!("{} tensors, {} others are the same", count(report.tensors.len() as u64), count(report.n_same)),
        ),
        (
            "bytes",
            format!(
                "{} changed, {} of those tensors",
                count(report.n_changed_bytes),
                percent(report.n_changed_bytes, n_bytes)
            ),
        ),
        ("encoding", format!("{}, zstd, {}", report.encoding, report.checksum)),
        ("wrote", bytes(report.n_bytes)),
    ]);
    report.left_out.iter().for_each(|left_out| page.line(format_args!("left out: {left_out}")));
}
