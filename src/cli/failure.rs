//! From an error to words and an exit code.

use std::{error::Error, fmt, io, process::ExitCode};

#[cfg(feature = "train")]
use neuroada_ckpt::data::DataError;
#[cfg(feature = "train")]
use neuroada_ckpt::train::TrainError;
use neuroada_ckpt::{
    adapter::AdapterError,
    checkpoint::{CheckpointError, ErrorKind, Printable},
    combine::CombineError,
    convert::ConvertError,
    diff::DiffError,
    extract::ExtractError,
    foreign::PeftError,
    mask::MaskError,
    merge::MergeError,
    sync::SyncError,
};
use serde::Serialize;

use super::{env::ReportLost, gpu};

/// An error with advice, which is printed on a line of its own.
#[derive(Debug)]
struct Hinted {
    error: anyhow::Error,
    hint: String,
}

impl fmt::Display for Hinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl Error for Hinted {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.error.chain().nth(1)
    }
}

/// Adds advice to what may fail: `open(path).hint("…")?`.
pub(super) trait Hint<T> {
    /// `hint` is one sentence, lower case, no full stop.
    fn hint(self, hint: &str) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> Hint<T> for Result<T, E> {
    fn hint(self, hint: &str) -> anyhow::Result<T> {
        self.map_err(|error| Hinted { error: error.into(), hint: hint.to_owned() }.into())
    }
}

/// What is told about an error, and the exit code.
pub(super) struct Failure {
    kind: ErrorKind,
    message: String,
    hint: Option<String>,
    /// Whether the work was done, and what failed came after it.
    committed: bool,
}

/// A failure as `--json` prints it.
#[derive(Serialize)]
struct Document<'a> {
    error: &'a str,
    hint: Option<&'a str>,
    exit_code: u8,
    committed: bool,
}

impl Failure {
    /// Reads an error: its words and those of its sources, its kind, its advice.
    pub(super) fn of(error: &anyhow::Error) -> Self {
        let mut message = error.to_string();
        for source in error.chain().skip(1) {
            let words = source.to_string();
            // Transparent variants say the same twice.
            if !message.ends_with(&words) {
                message += ": ";
                message += &words;
            }
        }
        let hint = error.downcast_ref::<Hinted>().map(|hinted| hinted.hint.clone());
        Self {
            kind: kind_of(error),
            hint: hint.or_else(|| advice(error)),
            message,
            committed: error.downcast_ref::<ReportLost>().is_some() || error.chain().any(is_committed),
        }
    }

    /// Prints the failure to stderr, and with `json` as a document to stdout too.
    pub(super) fn tell(&self, json: bool) -> ExitCode {
        use io::Write;
        // With stderr gone there is nobody left to tell.
        let _nobody = write!(io::stderr().lock(), "{self}");
        if json {
            let document = Document {
                error: &self.message,
                hint: self.hint.as_deref(),
                exit_code: self.exit_code(),
                committed: self.committed,
            };
            let document = serde_json::to_string_pretty(&document).expect("strings and numbers serialise");
            let _nobody = writeln!(io::stdout().lock(), "{document}");
        }
        ExitCode::from(self.exit_code())
    }

    fn exit_code(&self) -> u8 {
        match self.kind {
            ErrorKind::Usage => 2,
            ErrorKind::BadInput => 3,
            ErrorKind::Refused => 4,
            ErrorKind::Io => 5,
            ErrorKind::Interrupted => 6,
            ErrorKind::Cancelled => 130,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "error: {}", self.message)?;
        match &self.hint {
            Some(hint) => writeln!(f, "hint: {hint}"),
            None => Ok(()),
        }
    }
}

/// Whether an error says that the work was done all the same.
fn is_committed(error: &(dyn Error + 'static)) -> bool {
    if let Some(hinted) = error.downcast_ref::<Hinted>() {
        return hinted.error.chain().any(is_committed);
    }
    file_error(error).is_some_and(CheckpointError::is_committed)
}

/// The kind of the first error in the chain that has one. Words of the command line itself (`anyhow!`) are usage errors.
fn kind_of(error: &anyhow::Error) -> ErrorKind {
    error.chain().find_map(kind_of_one).unwrap_or(ErrorKind::Usage)
}

/// One line per error enum of the library.
fn kind_of_one(error: &(dyn Error + 'static)) -> Option<ErrorKind> {
    if let Some(hinted) = error.downcast_ref::<Hinted>() {
        return Some(kind_of(&hinted.error));
    }
    #[cfg(feature = "train")]
    let of_training = None
        .or_else(|| error.downcast_ref().map(DataError::kind))
        .or_else(|| error.downcast_ref().map(TrainError::kind));
    #[cfg(not(feature = "train"))]
    let of_training = None;
    of_training
        .or_else(|| error.downcast_ref().map(CheckpointError::kind))
        .or_else(|| error.downcast_ref().map(MaskError::kind))
        .or_else(|| error.downcast_ref().map(PeftError::kind))
        .or_else(|| error.downcast_ref().map(AdapterError::kind))
        .or_else(|| error.downcast_ref().map(DiffError::kind))
        .or_else(|| error.downcast_ref().map(ExtractError::kind))
        .or_else(|| error.downcast_ref().map(CombineError::kind))
        .or_else(|| error.downcast_ref().map(ConvertError::kind))
        .or_else(|| error.downcast_ref().map(SyncError::kind))
        .or_else(|| error.downcast_ref().map(MergeError::kind))
        .or_else(|| gpu::error_kind(error))
        .or_else(|| error.downcast_ref::<io::Error>().map(|_| ErrorKind::Io))
}

/// Advice that fits an error wherever it comes from.
fn advice(error: &anyhow::Error) -> Option<String> {
    error.chain().find_map(|error| {
        if let Some(MergeError::RollbackFailed { path, .. }) = error.downcast_ref() {
            return Some(format!("neuroada-ckpt recover {}", Printable::path(path)));
        }
        if matches!(error.downcast_ref(), Some(MaskError::Gpu(_)))
            || matches!(error.downcast_ref(), Some(MergeError::Gpu(_)))
        {
            return Some("--device cpu does the same without the GPU".to_owned());
        }
        if let Some(MergeError::Linked { .. }) = error.downcast_ref() {
            let advice = "--output makes a copy of all; --break-links copies the files that change, and leaves the others' as they are";
            return Some(advice.to_owned());
        }
        if let Some(CombineError::NeedsBase { .. }) = error.downcast_ref() {
            return Some("--base BASE proves every adapter against it".to_owned());
        }
        if let Some(AdapterError::NeedsBase { .. }) = adapter_error(error) {
            return Some("--base BASE derives them".to_owned());
        }
        match file_error(error)? {
            CheckpointError::OutputExists { .. } => Some("--force replaces it".to_owned()),
            CheckpointError::OutputIsInput { .. } => {
                let advice = "choose another place for the output; merge and unmerge change a checkpoint itself with --in-place";
                Some(advice.to_owned())
            },
            CheckpointError::ForeignEntries { .. } => {
                Some("move them away, or choose another place for the output".to_owned())
            }
            CheckpointError::Coded { .. } => Some(
                "use the 16-bit checkpoint that it was made from; its plain weights can be named by --targets".to_owned(),
            ),
            CheckpointError::Interrupted { path } => Some(format!("neuroada-ckpt recover {}", Printable::path(path))),
            _ => None,
        }
    })
}

/// The error about an adapter that an error of the library is.
fn adapter_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a AdapterError> {
    match (error.downcast_ref(), error.downcast_ref()) {
        (Some(DiffError::Adapter(error)), _) | (_, Some(CombineError::Adapter(error))) => Some(error),
        _ => error.downcast_ref(),
    }
}

/// The error about a file that an error of the library is, on whatever floor: transparent variants are no link of the chain.
fn file_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a CheckpointError> {
    if let Some(error) = error.downcast_ref() {
        return match error {
            MergeError::Checkpoint(error) => Some(error),
            MergeError::Adapter(error) => file_error(error),
            MergeError::Mask(error) => file_error(error),
            MergeError::Peft(PeftError::Checkpoint(error)) => Some(error),
            _ => None,
        };
    }
    #[cfg(feature = "train")]
    if let Some(error) = error.downcast_ref() {
        return match error {
            TrainError::Checkpoint(error) => Some(error),
            TrainError::Adapter(error) => file_error(error),
            TrainError::Mask(error) => file_error(error),
            _ => None,
        };
    }
    if let Some(error) = error.downcast_ref() {
        return match error {
            CombineError::Checkpoint(error) => Some(error),
            CombineError::Adapter(error) => file_error(error),
            _ => None,
        };
    }
    if let Some(error) = error.downcast_ref() {
        return match error {
            ExtractError::Checkpoint(error) => Some(error),
            ExtractError::Adapter(error) => file_error(error),
            ExtractError::Mask(error) => file_error(error),
            _ => None,
        };
    }
    if let Some(SyncError::Checkpoint(error)) = error.downcast_ref() {
        return Some(error);
    }
    if let Some(error) = error.downcast_ref() {
        return match error {
            ConvertError::Checkpoint(error) => Some(error),
            ConvertError::Adapter(error) => file_error(error),
            ConvertError::Mask(error) => file_error(error),
            _ => None,
        };
    }
    if let Some(error) = error.downcast_ref() {
        return match error {
            AdapterError::Checkpoint(error) => Some(error),
            AdapterError::Mask(error) => file_error(error),
            _ => None,
        };
    }
    if let Some(PeftError::Checkpoint(error)) = error.downcast_ref() {
        return Some(error);
    }
    match error.downcast_ref() {
        Some(MaskError::Checkpoint(error)) => Some(error),
        Some(_) => None,
        None => error.downcast_ref(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use anyhow::{Context, anyhow};

    use super::*;

    fn missing() -> CheckpointError {
        CheckpointError::io("open", Path::new("a"), io::Error::new(io::ErrorKind::NotFound, "no such file"))
    }

    fn told(error: anyhow::Error) -> (u8, String) {
        let failure = Failure::of(&error);
        (failure.exit_code(), failure.to_string())
    }

    #[test]
    fn sources_follow_on_the_same_line() {
        assert_eq!(told(missing().into()), (5, "error: cannot open `a`: no such file\n".to_owned()));
        assert_eq!(told(anyhow!("--k and --budget")), (2, "error: --k and --budget\n".to_owned()));
        let wrapped = Err::<(), _>(missing()).context("while merging").unwrap_err();
        assert_eq!(told(wrapped), (5, "error: while merging: cannot open `a`: no such file\n".to_owned()));
    }

    #[test]
    fn hints_stand_on_their_own_line_and_keep_the_kind() {
        let hinted = Err::<(), _>(CheckpointError::bad_file(Path::new("a"), "broken")).hint("download it again");
        assert_eq!(told(hinted.unwrap_err()), (3, "error: a: broken\nhint: download it again\n".to_owned()));
        let within = Err::<(), _>(missing()).hint("look elsewhere").context("while merging").unwrap_err();
        let expected = "error: while merging: cannot open `a`: no such file\nhint: look elsewhere\n";
        assert_eq!(told(within), (5, expected.to_owned()));
    }

    #[test]
    fn existing_output_is_advised_on() {
        let exists = || CheckpointError::OutputExists { path: "a".into() };
        let on_every_floor = [
            exists().into(),
            MaskError::from(exists()).into(),
            AdapterError::from(MaskError::from(exists())).into(),
            MergeError::from(AdapterError::from(exists())).into(),
        ];
        for error in on_every_floor {
            let (code, words) = told(error);
            assert_eq!((code, words.as_str()), (4, "error: a exists already\nhint: --force replaces it\n"));
        }
    }

    #[test]
    fn interrupted_changes_are_advised_on() {
        let (code, words) = told(MergeError::from(CheckpointError::Interrupted { path: "a b".into() }).into());
        let expected =
            "error: a b: a change was interrupted and waits for `recover`\nhint: neuroada-ckpt recover a b\n";
        assert_eq!((code, words.as_str()), (6, expected));
    }
}
