//! Options that settle what the files of a checkpoint leave open about its weights.

use clap::Args;

use super::failure::{CliResult, Hint};
use crate::{
    mask::MaskError,
    weights::{Answers, KindAxes, Rename},
};

/// Axes of stored weights.
#[derive(Args, Clone)]
pub(super) struct AxesArgs {
    /// Order of the axes of a kind of weight, if neither shapes nor the model type show it, as in c_proj=in-out; repeatable
    #[arg(long, value_name = "KIND=out-in|in-out", value_parser = |text: &str| text.parse::<KindAxes>())]
    pub(super) axes: Vec<KindAxes>,
}

/// Names of an adapter's tensors in the base.
#[derive(Args, Clone)]
pub(super) struct RenameArgs {
    /// Name in the adapter and the base's name for it, as in 'model.*=backbone.*'; * is the same text on both sides; repeatable
    #[arg(long = "rename", value_name = "FROM=TO", value_parser = |text: &str| text.parse::<Rename>())]
    pub(super) renames: Vec<Rename>,
}

impl RenameArgs {
    /// The answers for a conversion: positions of another tool's adapter refer to the stored tensor, whatever its axes.
    pub(super) fn answers(&self) -> Answers {
        Answers { renames: self.renames.clone(), ..Answers::default() }
    }
}

/// The option that gives the axes of a kind of weight.
pub(super) fn axes_hint(kind: &str) -> String {
    format!("--axes {kind}=out-in or --axes {kind}=in-out settles it")
}

/// Adds that option as a hint to an error about axes.
pub(super) fn with_axes_hint<T>(result: Result<T, MaskError>) -> CliResult<T> {
    match &result {
        Err(MaskError::Axes { kind, .. }) => {
            let hint = axes_hint(kind);
            result.hint(&hint)
        }
        _ => Ok(result?),
    }
}
