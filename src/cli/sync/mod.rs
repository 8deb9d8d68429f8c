//! `sync`: weight updates for inference servers, in the form that the servers fetch.
//!
//! `export` writes an update from two checkpoints, or from a checkpoint and an adapter; `apply` applies an update to the older checkpoint.
//! Both print the same report, which this file writes.

mod apply;
mod export;

use clap::{Args, Subcommand};

pub(super) use self::{
    apply::{ApplyArgs, run as apply},
    export::{ChecksumArg, EncodingArg, ExportArgs, run as export},
};
use super::{
    Answer,
    env::Env,
    failure::CliResult,
    page::{Page, Table, bytes, count, percent},
};
use crate::sync::SyncReport;

/// Write and apply weight updates for inference servers
///
/// Servers that sync weights from disk (SGLang, slime) read folders named weight_vNNNNNN. Each holds the bytes that changed since the
/// previous version, and a checksum of every changed tensor.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct SyncArgs {
    #[command(subcommand)]
    command: SyncCommand,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt sync export merged --base llama -o updates/weight_v000001
  neuroada-ckpt sync apply updates/weight_v000001 --base llama -o updated";

#[derive(Subcommand)]
enum SyncCommand {
    Export(ExportArgs),
    Apply(ApplyArgs),
}

pub(super) fn run(args: SyncArgs, env: &Env) -> CliResult<Answer> {
    match args.command {
        SyncCommand::Export(args) => export(&args, env),
        SyncCommand::Apply(args) => apply(&args, env),
    }
}

fn print(report: &SyncReport, tensors: bool, page: &mut Page) {
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
        page.table(table);
        page.blank();
    }
    let n_bytes = report.tensors.iter().map(|tensor| tensor.n_bytes).sum();
    page.facts(&[
        ("version", format!("{}, from {} ({})", report.version, report.base_version, report.base)),
        (
            "changed",
            format!("{} tensors, {} others are equal", count(report.tensors.len() as u64), count(report.n_same)),
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
    report.left_out.iter().for_each(|left_out| page.line(format_args!("not copied: {left_out}")));
}
