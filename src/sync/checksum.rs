//! Checksums of tensors, as their users spell them.

/// Which checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Checksum {
    /// The 128-bit hash of the xxHash family.
    Xxh3,
    /// BLAKE3.
    Blake3,
    /// Adler-32, as zlib computes it.
    Adler32,
}

impl Checksum {
    /// The word for it in the index.
    pub fn name(self) -> &'static str {
        match self {
            Self::Xxh3 => "xxh3-128",
            Self::Blake3 => "blake3",
            Self::Adler32 => "adler32",
        }
    }

    pub(super) fn of(name: &str) -> Option<Self> {
        [Self::Xxh3, Self::Blake3, Self::Adler32].into_iter().find(|checksum| checksum.name() == name)
    }

    pub(super) fn hasher(self) -> Hasher {
        match self {
            Self::Xxh3 => Hasher::Xxh3(Box::new(twox_hash::XxHash3_128::new())),
            Self::Blake3 => Hasher::Blake3(Box::default()),
            Self::Adler32 => Hasher::Adler32(adler2::Adler32::new()),
        }
    }
}

/// A checksum on its way.
pub(super) enum Hasher {
    Xxh3(Box<twox_hash::XxHash3_128>),
    Blake3(Box<blake3::Hasher>),
    Adler32(adler2::Adler32),
}

impl Hasher {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Xxh3(hasher) => hasher.write(bytes),
            Self::Blake3(hasher) => {
                hasher.update(bytes);
            }
            Self::Adler32(hasher) => hasher.write_slice(bytes),
        }
    }

    /// The digits, lower case.
    pub(super) fn finish(&self) -> String {
        match self {
            Self::Xxh3(hasher) => format!("{:032x}", hasher.finish_128()),
            Self::Blake3(hasher) => hasher.finalize().to_hex().to_string(),
            Self::Adler32(hasher) => format!("{:08x}", hasher.checksum()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_those_of_the_python_packages() {
        let digits = |checksum: Checksum| {
            let mut hasher = checksum.hasher();
            // In two pieces, as tensors come in windows.
            hasher.update(b"neuro");
            hasher.update(b"ada");
            hasher.finish()
        };
        assert_eq!(digits(Checksum::Xxh3), "14e7a4791c1fd6cbde0e6a490a5feb19");
        assert_eq!(digits(Checksum::Adler32), "0f3b0350");
        assert_eq!(digits(Checksum::Blake3), blake3::hash(b"neuroada").to_hex().as_str());
        for checksum in [Checksum::Xxh3, Checksum::Blake3, Checksum::Adler32] {
            assert_eq!(Checksum::of(checksum.name()), Some(checksum));
        }
    }
}
