//! What every command that makes an adapter asks alike.

use clap::{Args, ValueEnum};

use crate::{adapter::AdapterNotes, tensor::Dtype};

/// What people want to know of an adapter.
#[derive(Args)]
pub(super) struct NotesArgs {
    /// Under what terms it may be used, as an SPDX expression
    #[arg(long, value_name = "SPDX")]
    license: Option<String>,
    /// What it is for
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// Who made it
    #[arg(long, value_name = "NAME")]
    author: Option<String>,
}

impl NotesArgs {
    pub(super) fn notes(self) -> AdapterNotes {
        let Self { license, description, author } = self;
        AdapterNotes { license, description, author, training: None }
    }
}

/// The type that deltas are stored in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum DtypeChoice {
    F32,
    Bf16,
    F16,
}

impl DtypeChoice {
    pub(super) fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }
}
