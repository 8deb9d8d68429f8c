use std::path::PathBuf;

use clap::Args;
use neuroada_ckpt::checkpoint::Checkpoint;

use super::{Answer, env::Env};

/// Say what a checkpoint, mask or adapter is
#[derive(Args)]
pub(super) struct InspectArgs {
    /// A checkpoint's directory, or a .safetensors file
    path: PathBuf,
}

pub(super) fn run(args: InspectArgs, env: &Env) -> anyhow::Result<Answer> {
    let checkpoint = Checkpoint::open(&args.path)?;
    let report = serde_json::json!({ "name": checkpoint.name(), "n_parameters": checkpoint.n_parameters() });
    env.report(&report, |_, page| {
        page.facts(&[
            ("name", checkpoint.name()),
            ("parameters", super::page::count(checkpoint.n_parameters())),
            ("bytes", super::page::bytes(checkpoint.n_bytes())),
        ]);
    })?;
    Ok(Answer::Yes)
}
