//! What users say about a checkpoint's weights where the files leave it open.

use clap::Args;

use super::failure::{CliResult, Hint};
use crate::{
    mask::MaskError,
    weights::{Answers, KindAxes, Rename},
};

/// Which way round weights are stored.
#[derive(Args, Clone)]
pub(super) struct AxesArgs {
    /// How weights of a kind are stored, where neither shapes nor the model's type tell, as in c_proj=in-out; may be given several times
    #[arg(long, value_name = "KIND=out-in|in-out", value_parser = |text: &str| text.parse::<KindAxes>())]
    pub(super) axes: Vec<KindAxes>,
}

/// What an adapter's names are in the base.
#[derive(Args, Clone)]
pub(super) struct RenameArgs {
    /// A name in the adapter and the base's name for it, as in 'model.*=backbone.*'; * stands for the same text on both sides; may be
    /// given several times
    #[arg(long = "rename", value_name = "FROM=TO", value_parser = |text: &str| text.parse::<Rename>())]
    pub(super) renames: Vec<Rename>,
}

impl RenameArgs {
    /// What a conversion of another tool's adapter asks: its positions are those of the stored tensor, whichever way round that is.
    pub(super) fn answers(&self) -> Answers {
        Answers { renames: self.renames.clone(), ..Answers::default() }
    }
}

/// The option that answers which way round a kind of weight is stored.
pub(super) fn axes_hint(kind: &str) -> String {
    format!("--axes {kind}=out-in or --axes {kind}=in-out says it")
}

/// Names that option where a mask's error asks for it.
pub(super) fn with_axes_hint<T>(result: Result<T, MaskError>) -> CliResult<T> {
    match &result {
        Err(MaskError::Axes { kind, .. }) => {
            let hint = axes_hint(kind);
            result.hint(&hint)
        }
        _ => Ok(result?),
    }
}
