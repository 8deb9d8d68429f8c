//! Options of every command that writes an adapter.

use clap::{Args, ValueEnum};

use crate::{adapter::AdapterNotes, tensor::Dtype};

/// Notes for the people who use an adapter.
#[derive(Args)]
pub(super) struct NotesArgs {
    /// License of the adapter, an SPDX expression such as Apache-2.0 [default: none]
    #[arg(long, value_name = "SPDX")]
    license: Option<String>,
    /// Purpose of the adapter, in one sentence [default: none]
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// Author of the adapter [default: none]
    #[arg(long, value_name = "NAME")]
    author: Option<String>,
}

impl NotesArgs {
    pub(super) fn notes(self) -> AdapterNotes {
        let Self { license, description, author } = self;
        AdapterNotes { license, description, author, training: None }
    }
}

/// The dtype of stored deltas.
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
