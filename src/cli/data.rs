//! Options of all commands that read rows, and notes on the rows that were cut or left out.

use std::{
    num::ParseIntError,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use clap::{Args, ValueEnum};

use super::{
    env::Env,
    failure::{CliError, CliResult, Hint},
    page::{bytes, count},
};
use crate::{
    checkpoint::{CheckpointError, probe},
    data::{self, Clock, DataReport, Dataset, Loss, ReadOptions, Template, Tokenizer},
};

/// How rows of a file become examples.
#[derive(Args)]
pub(super) struct DataArgs {
    /// Form of the text made from a row: auto, alpaca, commonsense, or a Jinja file
    ///
    /// With auto the fields of the first row decide: `messages` go through the model's own chat template; `prompt` and `completion`, or
    /// `text`, are used as they are; `instruction` is commonsense if the output is "the correct answer is {answer}", else alpaca. A Jinja
    /// file sees the fields and the special tokens (bos_token, eos_token). The text between {% generation %} and {% endgeneration %} is
    /// learned; a file without these marks writes the prompt, and `output` follows.
    #[arg(long, value_name = "NAME|FILE", default_value = "auto")]
    template: String,
    /// Part of a row that is learned
    #[arg(long, value_enum, default_value_t = LossChoice::Response)]
    loss: LossChoice,
    /// Length in tokens that longer examples are cut to
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_length: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum LossChoice {
    /// The response; in a conversation, the assistant's messages
    Response,
    /// Every token
    All,
}

impl DataArgs {
    /// The options for library functions.
    ///
    /// A chat template may use the date: that of SOURCE_DATE_EPOCH if it is set, so that a run can be repeated.
    pub(super) fn options(&self, limit: Option<u64>) -> CliResult<ReadOptions> {
        let template = match self.template.as_str() {
            "auto" => Template::Auto,
            "alpaca" => Template::Alpaca,
            "commonsense" => Template::Commonsense,
            file if probe::is_file(Path::new(file))? => Template::File(PathBuf::from(file)),
            other => {
                return Err(CliError::usage(format!(
                    "--template {other}: is not auto, alpaca, commonsense or an existing file"
                )));
            }
        };
        let seconds = match std::env::var("SOURCE_DATE_EPOCH") {
            Ok(text) => text.parse().map_err(|e: ParseIntError| {
                CliError::usage(format!("SOURCE_DATE_EPOCH={text}: expected seconds since 1970: {e}"))
            })?,
            Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        };
        let loss = match self.loss {
            LossChoice::Response => Loss::Response,
            LossChoice::All => Loss::All,
        };
        Ok(ReadOptions { template, loss, max_length: self.max_length, limit, clock: Clock::new(seconds) })
    }
}

/// Reads a file of rows, and reports rows that were cut or left out.
pub(super) fn read(
    env: &Env,
    path: &Path,
    tokenizer: &Tokenizer,
    options: &ReadOptions,
) -> CliResult<(Dataset, DataReport)> {
    let (dataset, report) = data::read_dataset(&env.context(), path, tokenizer, options)?;
    let (name, rows) =
        (&report.name, |n: u64| if n == 1 { "1 row is".to_owned() } else { format!("{} rows are", count(n)) });
    if report.n_cut_rows > 0 {
        let (n, tokens) = (rows(report.n_cut_rows), count(report.n_cut_tokens));
        env.note(&format!("{name}: {n} cut to {} tokens (--max-length), {tokens} tokens are lost", options.max_length));
    }
    if report.n_empty > 0 {
        env.note(&format!("{name}: {} left out: the response is empty or has a weight of 0", rows(report.n_empty)));
    }
    if report.n_unsupervised > 0 {
        let n = rows(report.n_unsupervised);
        env.note(&format!(
            "{name}: {n} left out: the response begins after {} tokens (--max-length)",
            options.max_length
        ));
    }
    if report.n_without_stop == report.n_examples {
        env.note(&format!(
            "{name}: warning: no row teaches the model to stop: no learned response ends with an end-of-text token"
        ));
    }
    if report.n_apart > 0 {
        let n = rows(report.n_apart);
        env.detail(&format!("{name}: {n} encoded in two parts, because a token would span prompt and response"));
    }
    Ok((dataset, report))
}

/// Refuses work on the CPU that needs more memory than `--max-memory` allows. Without the
/// option the limit of the container or the batch job holds.
pub(super) fn check_memory(env: &Env, base: &Path, what: &str, needed: u64) -> CliResult<()> {
    let (who, limit) = match (env.given_memory(), env.job_memory()) {
        (Some(given), _) => ("--max-memory", given),
        (None, Some(limit)) => ("the container or job", limit),
        (None, None) => return Ok(()),
    };
    if needed <= limit {
        return Ok(());
    }
    let what = format!("{what} needs {} of memory, {who} allows {}", bytes(needed), bytes(limit));
    let refused = Err(CheckpointError::Refused { path: base.to_owned(), what });
    refused.hint(&format!("--max-memory {}M is enough; a smaller --batch-tokens needs less", needed.div_ceil(1 << 20)))
}
