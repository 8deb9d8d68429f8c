//! From an error to a message and an exit code.

use std::{error::Error, fmt, process::ExitCode};

use serde::Serialize;

use crate::error::{ErrorKind, Failure};

/// What commands return.
pub(super) type CliResult<T> = Result<T, CliError>;

/// An error on its way to the terminal: its message, its kind, advice.
#[derive(Debug)]
pub(super) struct CliError {
    kind: ErrorKind,
    message: String,
    hint: Option<String>,
    /// Whether the work was done, and what failed came after it.
    committed: bool,
}

impl<E: Failure> From<E> for CliError {
    fn from(error: E) -> Self {
        Self { kind: error.kind(), message: message_of(&error), hint: error.hint(), committed: error.is_committed() }
    }
}

/// The message of an error, and those of its sources.
fn message_of(error: &dyn Error) -> String {
    let mut message = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let words = source.to_string();
        // Transparent variants say the same twice.
        if !message.ends_with(&words) {
            message += ": ";
            message += &words;
        }
        next = source.source();
    }
    message
}

impl CliError {
    /// A request that makes no sense.
    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Usage, message: message.into(), hint: None, committed: false }
    }

    /// The same error; `context` says what was being done.
    pub(super) fn context(self, context: &str) -> Self {
        Self { message: format!("{context}: {}", self.message), ..self }
    }

    /// The same error, met after the work was done.
    pub(super) fn after_work(self) -> Self {
        Self { committed: true, ..self }
    }
}

/// Adds advice to what may fail: `open(path).hint("…")?`.
pub(super) trait Hint<T> {
    /// `hint` is one sentence, lower case, no full stop.
    fn hint(self, hint: &str) -> CliResult<T>;
}

impl<T, E: Into<CliError>> Hint<T> for Result<T, E> {
    fn hint(self, hint: &str) -> CliResult<T> {
        self.map_err(|error| CliError { hint: Some(hint.to_owned()), ..error.into() })
    }
}

/// A failure as `--json` prints it.
#[derive(Serialize)]
struct Document<'a> {
    error: &'a str,
    hint: Option<&'a str>,
    exit_code: u8,
    committed: bool,
}

impl CliError {
    /// Prints the failure to stderr, and with `json` as a document to stdout too.
    pub(super) fn print(&self, json: bool) -> ExitCode {
        use std::io::{self, Write};
        // With stderr gone there is nobody left to tell.
        let _nobody = write!(io::stderr().lock(), "{self}");
        let exit_code = self.kind.exit_code();
        if json {
            let document =
                Document { error: &self.message, hint: self.hint.as_deref(), exit_code, committed: self.committed };
            let document = serde_json::to_string_pretty(&document).expect("strings and numbers serialise");
            let _nobody = writeln!(io::stdout().lock(), "{document}");
        }
        ExitCode::from(exit_code)
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "error: {}", self.message)?;
        match &self.hint {
            Some(hint) => writeln!(f, "hint: {hint}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io, path::Path};

    use crate::{adapter::AdapterError, checkpoint::CheckpointError, mask::MaskError, merge::MergeError};

    use super::*;

    fn missing() -> CheckpointError {
        CheckpointError::io("open", Path::new("a"), io::Error::new(io::ErrorKind::NotFound, "no such file"))
    }

    fn told(error: CliError) -> (u8, String) {
        (error.kind.exit_code(), error.to_string())
    }

    #[test]
    fn sources_follow_on_the_same_line() {
        assert_eq!(told(missing().into()), (5, "error: cannot open `a`: no such file\n".to_owned()));
        assert_eq!(told(CliError::usage("--k and --budget")), (2, "error: --k and --budget\n".to_owned()));
        let wrapped = CliError::from(missing()).context("while merging");
        assert_eq!(told(wrapped), (5, "error: while merging: cannot open `a`: no such file\n".to_owned()));
    }

    #[test]
    fn hints_stand_on_their_own_line_and_keep_the_kind() {
        let hinted = Err::<(), _>(CheckpointError::bad_file(Path::new("a"), "broken")).hint("download it again");
        assert_eq!(told(hinted.unwrap_err()), (3, "error: a: broken\nhint: download it again\n".to_owned()));
        let within = Err::<(), _>(missing()).hint("look elsewhere").unwrap_err().context("while merging");
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
    fn errors_of_every_folder_name_the_file() {
        let missing: MergeError = AdapterError::from(MaskError::from(missing())).into();
        assert_eq!((missing.kind(), missing.file()), (ErrorKind::Io, Some(Path::new("a"))));
        let failed = || MergeError::Usage("no".to_owned());
        let stuck =
            MergeError::RollbackFailed { path: "b".into(), source: Box::new(missing), rollback: Box::new(failed()) };
        assert_eq!((stuck.kind(), stuck.file()), (ErrorKind::Interrupted, Some(Path::new("b"))));
        assert_eq!(stuck.hint().as_deref(), Some("neuroada-ckpt recover b"));
        assert_eq!((failed().kind(), failed().file()), (ErrorKind::Usage, None));
    }

    #[test]
    fn what_fails_after_the_work_says_that_it_is_done() {
        let late = || CheckpointError::Committed { path: "a".into(), what: "sync", source: io::Error::other("gone") };
        let committed = |error: CliError| error.committed;
        assert!(committed(late().into()) && committed(MergeError::from(AdapterError::from(late())).into()));
        assert!(!committed(missing().into()) && committed(CliError::from(missing()).after_work()));
    }

    #[test]
    fn interrupted_changes_are_advised_on() {
        let (code, words) = told(MergeError::from(CheckpointError::Interrupted { path: "a b".into() }).into());
        let expected =
            "error: a b: a change was interrupted and waits for `recover`\nhint: neuroada-ckpt recover a b\n";
        assert_eq!((code, words.as_str()), (6, expected));
    }
}
