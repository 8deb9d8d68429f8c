//! How a path is recognised as a foreign adapter, and opened.

use std::path::Path;

use super::{
    Format, PEFT_CONFIG, PeftConfig, PeftError, PeftType, folder::peft_folder, input::Input, npz, peft_read, published,
    sparse::ForeignAdapter,
};
use crate::checkpoint::{Context, probe};

impl Format {
    /// Recognises a foreign adapter by its content; `None` for everything else.
    ///
    /// # Errors
    /// A path that is not there, or a PEFT adapter's config that cannot be read.
    pub fn of(path: &Path) -> Result<Option<Self>, PeftError> {
        let is_folder = probe::is_folder(path)?;
        if is_folder && probe::is_present(&path.join(published::POSITIONS))? {
            return Ok(Some(Self::Published));
        }
        if let Some(folder) = peft_folder(path)? {
            return Ok(match PeftConfig::open(&folder.join(PEFT_CONFIG))?.peft_type() {
                PeftType::Sparse(format) => Some(*format),
                _ => None,
            });
        }
        if is_folder {
            return Ok(None);
        }
        let input = Input::open(path)?;
        let mut first = [0; 4];
        let is_zip = input.n_bytes() >= 4 && input.read_at(&mut first, 0).is_ok() && first == *b"PK\x03\x04";
        Ok(is_zip.then_some(Self::Npz))
    }
}

impl ForeignAdapter {
    /// Opens a foreign adapter, whatever its format; `None` where `path` is none.
    ///
    /// # Errors
    /// What is wrong with its files.
    pub fn open(ctx: &Context<'_>, path: &Path) -> Result<Option<Self>, PeftError> {
        match Format::of(path)? {
            None | Some(Format::NeuroAda) => Ok(None),
            Some(Format::Npz) => Ok(Some(npz::open(ctx, path)?)),
            Some(Format::Shira | Format::SuperTuning | Format::Spiel) => Ok(Some(peft_read::open(ctx, path)?)),
            Some(Format::Published) => Ok(Some(published::open(ctx, path)?)),
        }
    }
}
