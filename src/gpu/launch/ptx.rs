//! The kernels' PTX in `ptx.tar.zst`, which `.ci/kernels.py` writes; unpacked when the first kernel is used.
//!
//! A tar archive is a sequence of files: a block of 512 bytes with the file's name at byte 0 and its length in octal
//! at byte 124, then its content, padded to whole blocks. A block of zeros ends it.

use std::sync::OnceLock;

/// All files, compressed with zstd.
const ARCHIVE: &[u8] = include_bytes!("../kernels/ptx.tar.zst");
/// The block size of a tar archive.
const BLOCK: usize = 512;

/// The PTX of `kernels/{file}.cu`.
///
/// # Panics
/// If there is no such file.
pub(super) fn ptx_of(file: &str) -> &'static str {
    static TAR: OnceLock<Vec<u8>> = OnceLock::new();
    let tar = TAR.get_or_init(|| zstd::decode_all(ARCHIVE).expect("the archive is whole"));
    let content = find(tar, &format!("{file}.ptx")).expect("the archive has a file for each .cu");
    std::str::from_utf8(content).expect("PTX is ASCII")
}

/// The content of the file called `name`.
fn find<'a>(mut tar: &'a [u8], name: &str) -> Option<&'a [u8]> {
    while let Some((header, rest)) = tar.split_at_checked(BLOCK) {
        // The zeros at the end do not parse as a number.
        let n_bytes = usize::from_str_radix(text(&header[124..136])?, 8).ok()?;
        if text(&header[..100])? == name {
            return rest.get(..n_bytes);
        }
        tar = rest.get(n_bytes.next_multiple_of(BLOCK)..)?;
    }
    None
}

/// A header field up to its first zero byte.
fn text(field: &[u8]) -> Option<&str> {
    std::str::from_utf8(field.split(|&byte| byte == 0).next()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file in archive format.
    fn file(name: &str, content: &str) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        bytes[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
        bytes.extend_from_slice(content.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }

    #[test]
    fn files_are_found_by_their_full_name() {
        let long = "x".repeat(BLOCK + 1);
        let tar =
            [file("a.ptx", &long), file("b.ptx", ""), file("b.ptx2", "no"), file("c.ptx", "c"), vec![0; 2 * BLOCK]]
                .concat();
        let found = |name| find(&tar, name).map(<[u8]>::len);
        assert_eq!([found("a.ptx"), found("b.ptx"), found("c.ptx")], [Some(BLOCK + 1), Some(0), Some(1)]);
        assert_eq!([found("b"), found(".ptx"), found("")], [None; 3]);
    }

    #[test]
    fn truncated_archives_have_no_such_file() {
        let tar = [file("a.ptx", "abc"), file("b.ptx", "def")].concat();
        for n_bytes in 0..3 * BLOCK + 3 {
            assert_eq!(find(&tar[..n_bytes], "b.ptx"), None, "{n_bytes}");
        }
    }
}
