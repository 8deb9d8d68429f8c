//! What can go wrong with files, each error naming the file.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use super::{CodedWeight, atomic_file::is_temporary_folder, markup::shell_path, other_format::OtherFormat};
use crate::error::{ErrorKind, Failure};

/// What can go wrong while opening, reading or writing checkpoint files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The system failed to do `what` with a file.
    #[error("cannot {what} `{}`", Printable::path(.path))]
    Io {
        /// A verb: `read`, `write`, `create`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not what its name promises.
    #[error("{}: {what}", Printable::path(.path))]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, found and expected.
        what: String,
    },
    /// A file or folder has another format than the one that is needed.
    #[error("{}: {format}, not {expected}", Printable::path(.path))]
    OtherFormat {
        /// The file or folder.
        path: PathBuf,
        /// What it is.
        format: OtherFormat,
        /// What is needed.
        expected: &'static str,
    },
    /// The folder for an output does not exist.
    #[error("the folder {} does not exist", Printable::path(.path))]
    NoFolder {
        /// The folder.
        path: PathBuf,
    },
    /// One tensor of a file is not what it should be.
    #[error("{}: tensor \"{}\": {what}", Printable::path(.path), Printable(.tensor))]
    BadTensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name as stored.
        tensor: String,
        /// What is wrong, found and expected.
        what: String,
    },
    /// Several things are wrong at once; all are listed.
    #[error("{}: {what}:{}", Printable::path(.path), indented_list(.problems))]
    Many {
        /// The file or directory.
        path: PathBuf,
        /// What the list is about.
        what: String,
        /// One line each.
        problems: Vec<String>,
    },
    /// A file changed under the reader's eyes.
    #[error("{}: {what}", Printable::path(.path))]
    Changed {
        /// The file.
        path: PathBuf,
        /// How it changed.
        what: String,
    },
    /// Existing output is kept unless the user says otherwise.
    #[error("{} exists already", Printable::path(.path))]
    OutputExists {
        /// The output.
        path: PathBuf,
    },
    /// The output would be, hold or lie in an input.
    #[error("{}: {what}: {}", Printable::path(.path), Printable::path(.input))]
    OutputIsInput {
        /// The output.
        path: PathBuf,
        /// How they conflict.
        what: &'static str,
        /// The input.
        input: PathBuf,
    },
    /// A folder that would be replaced holds what this program did not write.
    #[error(
        "{}: holds what this program did not write; it will not be replaced:{}",
        Printable::path(.path),
        indented_list(.entries)
    )]
    ForeignEntries {
        /// The folder.
        path: PathBuf,
        /// Names in it, sorted.
        entries: Vec<String>,
    },
    /// The work is done and in place; what failed came after it.
    #[error("{}: the work is done, but it was not possible to {what} it", Printable::path(.path))]
    Committed {
        /// The output.
        path: PathBuf,
        /// What failed: a verb, with what it applies to.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A weight is stored as codes, which are no numbers by themselves.
    #[error(
        "{}: \"{}\" is stored as {layout}; codes are not numbers, and this layout is not supported yet",
        Printable::path(.path),
        Printable(.weight)
    )]
    Coded {
        /// The file or checkpoint.
        path: PathBuf,
        /// The weight as the model names it.
        weight: String,
        /// How it is stored.
        layout: String,
    },
    /// A change in place was interrupted: the weights may be a mixture of two states.
    #[error("{}: a change was interrupted and waits for `recover`", Printable::path(.path))]
    Interrupted {
        /// The checkpoint.
        path: PathBuf,
    },
    /// The files are fine, but doing this would be wrong.
    #[error("{}: {what}", Printable::path(.path))]
    Refused {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// Too little room for the output, seen before the first write.
    #[error("{}: the output needs {needed} bytes, the file system has {free} free", Printable::path(.path))]
    NoSpace {
        /// Where the output was to go.
        path: PathBuf,
        /// Bytes the output needs.
        needed: u64,
        /// Bytes the file system has for us.
        free: u64,
    },
    /// The limit on memory is too small for the rows at hand; nothing was written.
    #[error("a memory limit of {limit} bytes is too small for this work: at least {} MiB are needed", .needed >> 20)]
    MemoryLimit {
        /// The smallest limit that would do, in bytes, whole MiB.
        needed: u64,
        /// The limit that was given, in bytes.
        limit: u64,
    },
    /// The user stopped the command.
    #[error("stopped")]
    Cancelled,
}

impl CheckpointError {
    /// An I/O error on `path`; `what` is a verb.
    pub fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { what, path: path.to_owned(), source }
    }
    /// A malformed file.
    pub fn bad_file(path: &Path, what: impl Into<String>) -> Self {
        Self::BadFile { path: path.to_owned(), what: what.into() }
    }
    /// A file or folder of another format; `expected` is a noun with its article.
    pub fn other_format(path: &Path, format: OtherFormat, expected: &'static str) -> Self {
        Self::OtherFormat { path: path.to_owned(), format, expected }
    }
    /// A malformed tensor.
    pub fn bad_tensor(path: &Path, tensor: &str, what: impl Into<String>) -> Self {
        Self::BadTensor { path: path.to_owned(), tensor: tensor.to_owned(), what: what.into() }
    }
    /// A weight that is stored as codes.
    pub(crate) fn coded(path: &Path, weight: &CodedWeight) -> Self {
        Self::Coded { path: path.to_owned(), weight: weight.name.clone(), layout: weight.layout.to_string() }
    }
    /// The first of several weights that are stored as codes, and how many more there are; nothing where there are none.
    pub(crate) fn coded_weights<'a>(
        path: &Path,
        mut weights: impl Iterator<Item = &'a CodedWeight>,
    ) -> Result<(), Self> {
        let Some(first) = weights.next() else { return Ok(()) };
        let layout = match weights.count() {
            0 => first.layout.to_string(),
            n => format!("{} (and {n} more)", first.layout),
        };
        Err(Self::Coded { path: path.to_owned(), weight: first.name.clone(), layout })
    }
    /// A failure after the work was done; `what` is a verb and what it applies to.
    /// Inside a folder under a temporary name nothing is done yet: there it is a failure like any other.
    pub fn committed(path: &Path, what: &'static str, source: io::Error) -> Self {
        match path.iter().any(is_temporary_folder) {
            true => Self::io(what, path, source),
            false => Self::Committed { path: path.to_owned(), what, source },
        }
    }
    /// This failure, met after the work on `output` was done; `what` is a verb and what it applies to.
    pub fn after_commit(self, output: &Path, what: &'static str) -> Self {
        let words = match &self {
            Self::Committed { .. } => return self,
            Self::Io { source, .. } => format!("{self}: {source}"),
            other => other.to_string(),
        };
        Self::committed(output, what, io::Error::other(words))
    }
}

impl Failure for CheckpointError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { .. }
            | Self::Changed { .. }
            | Self::NoFolder { .. }
            | Self::NoSpace { .. }
            | Self::Committed { .. } => ErrorKind::Io,
            Self::BadFile { .. } | Self::OtherFormat { .. } | Self::BadTensor { .. } | Self::Many { .. } => {
                ErrorKind::BadInput
            }
            Self::OutputExists { .. }
            | Self::OutputIsInput { .. }
            | Self::ForeignEntries { .. }
            | Self::Coded { .. }
            | Self::Refused { .. }
            | Self::MemoryLimit { .. } => ErrorKind::Refused,
            Self::Interrupted { .. } => ErrorKind::Interrupted,
            Self::Cancelled => ErrorKind::Cancelled,
        }
    }

    fn file(&self) -> Option<&Path> {
        match self {
            Self::Io { path, .. }
            | Self::BadFile { path, .. }
            | Self::OtherFormat { path, .. }
            | Self::NoFolder { path }
            | Self::BadTensor { path, .. }
            | Self::Many { path, .. }
            | Self::Changed { path, .. }
            | Self::OutputExists { path }
            | Self::OutputIsInput { path, .. }
            | Self::ForeignEntries { path, .. }
            | Self::Coded { path, .. }
            | Self::Committed { path, .. }
            | Self::Interrupted { path }
            | Self::Refused { path, .. }
            | Self::NoSpace { path, .. } => Some(path),
            Self::MemoryLimit { .. } | Self::Cancelled => None,
        }
    }

    fn hint(&self) -> Option<String> {
        let advice = match self {
            Self::OtherFormat { path, format, .. } => return format.hint(path),
            Self::NoFolder { path } => return Some(format!("mkdir -p {}", shell_path(path))),
            Self::OutputExists { .. } => "--force replaces it",
            Self::OutputIsInput { .. } => {
                "choose another place for the output; merge and unmerge change a checkpoint itself with --in-place"
            }
            Self::ForeignEntries { .. } => "move them away, or choose another place for the output",
            Self::Coded { .. } => {
                "use the 16-bit checkpoint that it was made from; its plain weights can be named by --targets"
            }
            Self::Interrupted { path } => return Some(format!("neuroada-ckpt recover {}", Printable::path(path))),
            _ => return None,
        };
        Some(advice.to_owned())
    }

    fn is_committed(&self) -> bool {
        matches!(self, Self::Committed { .. })
    }
}

/// Shows a name from a file without letting its control bytes reach the terminal, and cuts it at 200 characters.
pub struct Printable<'a>(pub &'a str);

impl Printable<'_> {
    /// The same for a path.
    pub fn path(path: &Path) -> String {
        Printable(&path.to_string_lossy()).to_string()
    }
}

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LONGEST: usize = 200;
        for (i, c) in self.0.chars().enumerate() {
            if i == LONGEST {
                return write!(f, "… ({} bytes)", self.0.len());
            }
            // Bidirectional controls can make a terminal show another name than the stored one.
            if c.is_control()
                || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
            {
                write!(f, "{}", c.escape_default())?;
            } else {
                write!(f, "{c}")?;
            }
        }
        Ok(())
    }
}

/// `problems` as indented lines, at most 10,000 of them. The command line shows the first few.
pub(crate) fn indented_list(problems: &[String]) -> String {
    const MAX_LISTED: usize = 10_000;
    let mut list: String = problems.iter().take(MAX_LISTED).map(|problem| format!("\n  {problem}")).collect();
    if problems.len() > MAX_LISTED {
        list += &format!("\n  … and {} more", problems.len() - MAX_LISTED);
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_bytes_are_escaped_and_long_names_cut() {
        assert_eq!(Printable("a\u{1b}[31m\nb\0").to_string(), "a\\u{1b}[31m\\nb\\u{0}");
        let long = "x".repeat(1 << 20);
        assert!(Printable(&long).to_string().ends_with("… (1048576 bytes)"));
    }
}
