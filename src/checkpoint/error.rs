//! Errors about files; each names the file.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use super::{CodedWeight, atomic_file::is_temporary_folder, markup::shell_path, other_format::OtherFormat};
use crate::error::{ErrorKind, Failure};

/// Errors of opening, reading or writing checkpoint files.
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
        /// The error of the system.
        source: io::Error,
    },
    /// A file is invalid.
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
    /// One tensor of a file is invalid.
    #[error("{}: tensor \"{}\": {what}", Printable::path(.path), Printable(.tensor))]
    BadTensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name as stored.
        tensor: String,
        /// What is wrong, found and expected.
        what: String,
    },
    /// Several problems, listed together.
    #[error("{}: {what}:{}", Printable::path(.path), indented_list(.problems))]
    Many {
        /// The file or directory.
        path: PathBuf,
        /// The subject of the list.
        what: String,
        /// One line per problem.
        problems: Vec<String>,
    },
    /// A file changed while it was being read.
    #[error("{}: {what}", Printable::path(.path))]
    Changed {
        /// The file.
        path: PathBuf,
        /// How it changed.
        what: String,
    },
    /// The output exists and must be kept unless the user overrides it.
    #[error("{} exists already", Printable::path(.path))]
    OutputExists {
        /// The output.
        path: PathBuf,
    },
    /// The output is, contains or lies inside an input.
    #[error("{}: {what}: {}", Printable::path(.path), Printable::path(.input))]
    OutputIsInput {
        /// The output.
        path: PathBuf,
        /// How they conflict.
        what: &'static str,
        /// The input.
        input: PathBuf,
    },
    /// A folder that would be replaced contains files that this program did not write.
    #[error(
        "{}: contains files that this program did not write; it will not be replaced:{}",
        Printable::path(.path),
        indented_list(.entries)
    )]
    ForeignEntries {
        /// The folder.
        path: PathBuf,
        /// The names of those files, sorted.
        entries: Vec<String>,
    },
    /// The output is complete and in place; a later step failed.
    #[error("{}: the work is done, but it was not possible to {what} it", Printable::path(.path))]
    Committed {
        /// The output.
        path: PathBuf,
        /// The failed step: a verb with its object.
        what: &'static str,
        /// The error of the system.
        source: io::Error,
    },
    /// A weight is stored as codes, which are not numbers by themselves.
    #[error(
        "{}: \"{}\" is stored as {layout}; codes are not numbers, and nothing can be added to them yet",
        Printable::path(.path),
        Printable(.weight)
    )]
    Coded {
        /// The file or checkpoint.
        path: PathBuf,
        /// The weight's name in the model.
        weight: String,
        /// Its layout.
        layout: String,
    },
    /// The stored tensors of a quantized weight cannot be decoded.
    #[error("{}: \"{}\" is stored as {layout} and cannot be decoded: {why}", Printable::path(.path), Printable(.weight))]
    Layout {
        /// The checkpoint.
        path: PathBuf,
        /// The weight's name in the model.
        weight: String,
        /// Its layout.
        layout: String,
        /// The stored tensor that does not fit, or the feature that is not supported.
        why: String,
    },
    /// A change in place was interrupted: the weights may be a mixture of two states.
    #[error("{}: a change was interrupted and waits for `recover`", Printable::path(.path))]
    Interrupted {
        /// The checkpoint.
        path: PathBuf,
    },
    /// The files are valid, but the operation would be wrong.
    #[error("{}: {what}", Printable::path(.path))]
    Refused {
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        what: String,
    },
    /// Not enough space for the output, found before the first write.
    #[error("{}: the output needs {needed} bytes, the file system has {free} free", Printable::path(.path))]
    NoSpace {
        /// The location of the output.
        path: PathBuf,
        /// Bytes that the output needs.
        needed: u64,
        /// Bytes available on the file system.
        free: u64,
    },
    /// The memory limit is too small for these rows; nothing was written.
    #[error("a memory limit of {limit} bytes is too small for this operation: it needs at least {} MiB", .needed >> 20)]
    MemoryLimit {
        /// The smallest sufficient limit, in bytes, whole MiB.
        needed: u64,
        /// The given limit, in bytes.
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
    /// An invalid file.
    pub fn bad_file(path: &Path, what: impl Into<String>) -> Self {
        Self::BadFile { path: path.to_owned(), what: what.into() }
    }
    /// A file or folder of another format; `expected` is a noun with its article.
    pub fn other_format(path: &Path, format: OtherFormat, expected: &'static str) -> Self {
        Self::OtherFormat { path: path.to_owned(), format, expected }
    }
    /// An invalid tensor.
    pub fn bad_tensor(path: &Path, tensor: &str, what: impl Into<String>) -> Self {
        Self::BadTensor { path: path.to_owned(), tensor: tensor.to_owned(), what: what.into() }
    }
    /// A weight that is stored as codes.
    pub(crate) fn coded(path: &Path, weight: &CodedWeight) -> Self {
        Self::Coded { path: path.to_owned(), weight: weight.name.clone(), layout: weight.layout.to_string() }
    }
    /// An error for a quantized weight that cannot be decoded.
    pub(crate) fn layout(path: &Path, weight: &CodedWeight, why: String) -> Self {
        let (path, layout) = (path.to_owned(), weight.layout.to_string());
        Self::Layout { path, weight: weight.name.clone(), layout, why }
    }
    /// An error for the first of several quantized weights with the number of the others; `Ok` if there are none.
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
    /// A failure after the output was complete; `what` is a verb with its object. In a folder with a temporary name
    /// nothing is complete yet: there it is an ordinary I/O error.
    pub fn committed(path: &Path, what: &'static str, source: io::Error) -> Self {
        match path.iter().any(is_temporary_folder) {
            true => Self::io(what, path, source),
            false => Self::Committed { path: path.to_owned(), what, source },
        }
    }
    /// Converts this error into a failure that happened after `output` was complete; `what` is a verb with its object.
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
            | Self::Layout { .. }
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
            | Self::Layout { path, .. }
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
                "choose another output path; with --in-place, merge and unmerge change the checkpoint itself"
            }
            Self::ForeignEntries { .. } => "move them away, or choose another output path",
            Self::Coded { .. } => {
                "use the 16-bit checkpoint it was quantized from, or decode it with `neuroada-ckpt cast --dtype bf16`"
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

/// Displays a name from a file with control characters escaped, truncated at 200 characters.
pub struct Printable<'a>(pub &'a str);

impl Printable<'_> {
    /// The same for a path.
    pub fn path(path: &Path) -> String {
        Printable(&path.to_string_lossy()).to_string()
    }
}

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MAX_CHARS: usize = 200;
        for (i, c) in self.0.chars().enumerate() {
            if i == MAX_CHARS {
                return write!(f, "… ({} bytes)", self.0.len());
            }
            // Bidirectional controls can make a terminal show a different name.
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
    fn control_bytes_are_escaped_and_long_names_truncated() {
        assert_eq!(Printable("a\u{1b}[31m\nb\0").to_string(), "a\\u{1b}[31m\\nb\\u{0}");
        let long = "x".repeat(1 << 20);
        assert!(Printable(&long).to_string().ends_with("… (1048576 bytes)"));
    }
}
