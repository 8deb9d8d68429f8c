//! Errors of commands: messages, hints and exit codes.

use std::{
    error::Error,
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use serde::Serialize;

use super::{
    color::{self, ColorChoice},
    missing,
};
use crate::error::{ErrorKind, Failure};

/// The result of a command.
pub(super) type CliResult<T> = Result<T, CliError>;

/// An error with its message, its kind and a hint.
#[derive(Debug)]
pub(super) struct CliError {
    kind: ErrorKind,
    message: String,
    hint: Option<String>,
    /// Whether the work was done and the failure came after it.
    committed: bool,
}

impl<E: Failure> From<E> for CliError {
    fn from(error: E) -> Self {
        let missing = || error.file().filter(|_| error.kind() == ErrorKind::Io).and_then(missing::advice);
        let hint = error.hint().or_else(missing);
        Self { kind: error.kind(), message: message_of(&error), hint, committed: error.is_committed() }
    }
}

/// The message of an error, and those of its sources.
fn message_of(error: &dyn Error) -> String {
    let mut message = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let cause = source.to_string();
        // Transparent variants repeat the message of their source.
        if !message.ends_with(&cause) {
            message += ": ";
            message += &cause;
        }
        next = source.source();
    }
    message
}

impl CliError {
    /// An error in the request itself.
    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Usage, message: message.into(), hint: None, committed: false }
    }

    /// The same error with advice.
    pub(super) fn advise(self, hint: Option<&str>) -> Self {
        Self { hint: hint.map(str::to_owned).or(self.hint), ..self }
    }

    /// The same error; `context` names the step that failed.
    pub(super) fn context(self, context: &str) -> Self {
        Self { message: format!("{context}: {}", self.message), ..self }
    }

    /// The same error, after the work was done.
    pub(super) fn after_work(self) -> Self {
        Self { committed: true, ..self }
    }
}

/// Adds a hint to the error of a result: `open(path).hint("...")?`.
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

/// Lines of a list that are shown without `-v`.
const MAX_EXAMPLES: usize = 5;

impl CliError {
    /// Prints the failure to stderr, and with `json` as a document to stdout too; `verbose` prints lists in full.
    pub(super) fn print(&self, json: bool, verbose: bool, color: ColorChoice) -> ExitCode {
        let is_colored = color.applies_to(io::stderr().is_terminal());
        let text: String = self.text(verbose).lines().map(|line| color::label(line, is_colored) + "\n").collect();
        // A closed stderr is not an error.
        let _nobody = write!(io::stderr().lock(), "{text}");
        if json {
            self.print_document();
        }
        ExitCode::from(self.kind.exit_code())
    }

    /// Prints the failure as a JSON document to stdout.
    pub(super) fn print_document(&self) {
        let exit_code = self.kind.exit_code();
        let document =
            Document { error: &self.message, hint: self.hint.as_deref(), exit_code, committed: self.committed };
        let document = serde_json::to_string_pretty(&document).expect("strings and numbers serialize");
        let _nobody = writeln!(io::stdout().lock(), "{document}");
    }

    /// The message and its hint. Of a long list of problems the first are shown, or all and then the message once more:
    /// either way the last lines name the problem. The list of a usage error has the possible values and is printed in full.
    fn text(&self, verbose: bool) -> String {
        let mut lines = self.message.lines();
        let first = lines.next().unwrap_or_default();
        let listed: Vec<&str> = lines.collect();
        let mut text = format!("error: {first}\n");
        let is_long = listed.len() > MAX_EXAMPLES + 1 && self.kind != ErrorKind::Usage;
        let n_shown = if is_long && !verbose { MAX_EXAMPLES } else { listed.len() };
        for line in &listed[..n_shown] {
            text += &format!("{line}\n");
        }
        if n_shown < listed.len() {
            text += &format!("  … and {} more; -v lists them\n", listed.len() - n_shown);
        } else if is_long {
            text += &format!("error: {}\n", first.trim_end_matches(':'));
        }
        if let Some(hint) = &self.hint {
            text += &format!("hint: {hint}\n");
        }
        text
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

    fn shown(error: CliError) -> (u8, String) {
        (error.kind.exit_code(), error.text(false))
    }

    #[test]
    fn sources_follow_on_the_same_line() {
        assert_eq!(shown(missing().into()), (5, "error: cannot open `a`: no such file\n".to_owned()));
        assert_eq!(shown(CliError::usage("--k and --budget")), (2, "error: --k and --budget\n".to_owned()));
        let wrapped = CliError::from(missing()).context("while merging");
        assert_eq!(shown(wrapped), (5, "error: while merging: cannot open `a`: no such file\n".to_owned()));
    }

    #[test]
    fn hints_stand_on_their_own_line_and_keep_the_kind() {
        let hinted = Err::<(), _>(CheckpointError::bad_file(Path::new("a"), "broken")).hint("download it again");
        assert_eq!(shown(hinted.unwrap_err()), (3, "error: a: broken\nhint: download it again\n".to_owned()));
        let within = Err::<(), _>(missing()).hint("look elsewhere").unwrap_err().context("while merging");
        let expected = "error: while merging: cannot open `a`: no such file\nhint: look elsewhere\n";
        assert_eq!(shown(within), (5, expected.to_owned()));
    }

    #[test]
    fn of_long_lists_five_examples_are_shown() {
        let many = |n: usize| {
            let problems = (1..=n).map(|i| format!("problem {i}")).collect();
            CliError::from(CheckpointError::Many { path: "a".into(), what: "wrong".to_owned(), problems })
        };
        assert_eq!(many(6).text(false).lines().count(), 7);
        let short = many(9).text(false);
        assert!(short.starts_with("error: a: wrong:\n  problem 1\n"), "{short}");
        assert!(short.ends_with("  problem 5\n  … and 4 more; -v lists them\n"), "{short}");
        let long = many(9).text(true);
        assert!(long.ends_with("  problem 9\nerror: a: wrong\n"), "{long}");
    }

    #[test]
    fn existing_output_has_a_hint() {
        let exists = || CheckpointError::OutputExists { path: "a".into() };
        let on_every_floor = [
            exists().into(),
            MaskError::from(exists()).into(),
            AdapterError::from(MaskError::from(exists())).into(),
            MergeError::from(AdapterError::from(exists())).into(),
        ];
        for error in on_every_floor {
            let (code, text) = shown(error);
            assert_eq!((code, text.as_str()), (4, "error: a exists already\nhint: --force replaces it\n"));
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
    fn interrupted_changes_have_a_hint() {
        let (code, text) = shown(MergeError::from(CheckpointError::Interrupted { path: "a b".into() }).into());
        let expected =
            "error: a b: a change was interrupted and waits for `recover`\nhint: neuroada-ckpt recover a b\n";
        assert_eq!((code, text.as_str()), (6, expected));
    }
}
