//! Formats of adapters.

/// What an adapter can lie on disk as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Format {
    /// A safetensors file of this program.
    NeuroAda,
    /// A folder of the published NeuroAda code.
    Published,
    /// Coordinates in a file of `numpy.savez`.
    Npz,
    /// PEFT's SHiRA.
    Shira,
    /// PEFT's Super-Tuning.
    SuperTuning,
    /// SpIEL, as its fork of PEFT saves it.
    Spiel,
}

impl Format {
    /// The word for it on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::NeuroAda => "neuroada",
            Self::Published => "published",
            Self::Npz => "npz",
            Self::Shira => "shira",
            Self::SuperTuning => "supertuning",
            Self::Spiel => "spiel",
        }
    }
}
