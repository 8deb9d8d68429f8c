//! What every error of the library says about itself.
//!
//! Each folder has one error enum, which can be matched. [`Failure`] is what they have in common: the kind of failure,
//! the file, advice. Whoever reports errors asks the trait and need not know the enums.

use std::{error::Error, io, path::Path};

/// The kind of a failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request itself makes no sense.
    Usage,
    /// A file is not what it should be.
    BadInput,
    /// The files are fine, but doing this would be wrong.
    Refused,
    /// The system failed to read or write.
    Io,
    /// An interrupted change waits for `recover`.
    Interrupted,
    /// Stopped by the user.
    Cancelled,
}

impl ErrorKind {
    /// The exit code of the command line for failures of this kind.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Usage => 2,
            Self::BadInput => 3,
            Self::Refused => 4,
            Self::Io => 5,
            Self::Interrupted => 6,
            Self::Cancelled => 130,
        }
    }
}

/// What every error of the library says about itself, beside its message.
pub trait Failure: Error {
    /// The kind of failure; [`ErrorKind::exit_code`] makes it an exit code.
    fn kind(&self) -> ErrorKind;

    /// The error that this one passes on, of a folder below.
    fn inner(&self) -> Option<&dyn Failure> {
        None
    }

    /// The file or folder that the error is about, where it is about one.
    fn file(&self) -> Option<&Path> {
        self.inner()?.file()
    }

    /// What may help, in the words of the command line: one sentence, lower case, no full stop.
    fn hint(&self) -> Option<String> {
        self.inner()?.hint()
    }

    /// Whether the work was done all the same, and what failed came after it.
    fn is_committed(&self) -> bool {
        self.inner().is_some_and(Failure::is_committed)
    }
}

impl Failure for io::Error {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Io
    }
}
