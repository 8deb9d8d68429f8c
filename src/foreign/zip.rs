//! Zip files as torch and NumPy write them: entries stored as they are, one after the other.
//!
//! The directory at the end decides; every entry must lie where it says, under the same name, and none may overlap another.
//! Compressed and encrypted entries are refused, so no file can be larger inside than outside. 64-bit sizes are read and,
//! where needed, written.
//!
//! Source: APPNOTE.TXT of PKWARE, <https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT>.

use std::{collections::HashMap, fs::File, io, ops::Range, os::unix::fs::FileExt};

use super::input::{Cursor, Input};
use crate::checkpoint::{CheckpointError, Context, Printable};

const LOCAL: u64 = 0x0403_4b50;
const CENTRAL: u64 = 0x0201_4b50;
const END: u64 = 0x0605_4b50;
const END64: u64 = 0x0606_4b50;
const LOCATOR64: u64 = 0x0706_4b50;
/// The end record, and with the longest comment.
const END_BYTES: u64 = 22;
const MAX_COMMENT: u64 = 0xffff;
const MAX_ENTRIES: u64 = 1_000_000;
const MAX_DIRECTORY: u64 = 64 << 20;
/// Field 1 of extra data: 64-bit sizes and offset.
const EXTRA64: u64 = 1;

/// The directory of a zip file, every entry of it proven to lie where it says.
#[derive(Debug)]
pub(crate) struct Zip {
    entries: Vec<Entry>,
    by_name: HashMap<String, usize>,
}

/// One stored file.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    /// Where its bytes lie.
    pub(crate) data: Range<u64>,
    crc: u32,
}

impl Zip {
    /// Reads and checks the directory and every entry's own header.
    ///
    /// Memory: the directory, at most 64 MiB.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub(crate) fn open(input: &Input) -> Result<Self, CheckpointError> {
        let (directory, n_entries) = find_directory(input)?;
        let mut cursor = Cursor::new(input, directory.clone());
        let mut zip = Self { entries: Vec::new(), by_name: HashMap::new() };
        let mut extents = Vec::new();
        for _ in 0..n_entries {
            let at = cursor.at();
            let (entry, header_at) = read_entry(&mut cursor)?;
            let entry = locate(input, entry, header_at, directory.start)?;
            extents.push((header_at, entry.data.end));
            if zip.by_name.insert(entry.name.clone(), zip.entries.len()).is_some() {
                return Err(input.bad(at, format!("`{}` is there twice", Printable(&entry.name))));
            }
            zip.entries.push(entry);
        }
        if cursor.at() != directory.end {
            return Err(input.bad(cursor.at(), "the zip directory is longer than its entries"));
        }
        extents.sort_unstable();
        if let Some(pair) = extents.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            return Err(input.bad(pair[1].0, "two entries of the zip file overlap"));
        }
        Ok(zip)
    }

    /// All entries, as the directory lists them.
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry of this name.
    pub(crate) fn entry(&self, name: &str) -> Option<&Entry> {
        self.by_name.get(name).map(|&at| &self.entries[at])
    }

    /// Reads an entry and compares its checksum. Memory: one buffer.
    pub(crate) fn prove(&self, ctx: &Context<'_>, input: &Input, entry: &Entry) -> Result<(), CheckpointError> {
        let mut crc = crc32fast::Hasher::new();
        let mut buffer = vec![0; (1 << 20).min(entry.data.end - entry.data.start) as usize];
        let mut at = entry.data.start;
        while at < entry.data.end {
            ctx.check()?;
            let n = buffer.len().min((entry.data.end - at) as usize);
            input.read_at(&mut buffer[..n], at)?;
            crc.update(&buffer[..n]);
            at += n as u64;
        }
        if crc.finalize() == entry.crc {
            return Ok(());
        }
        Err(input
            .bad(entry.data.start, format!("`{}` is damaged: its checksum does not match", Printable(&entry.name))))
    }
}

/// Where the directory lies, and how many entries it has.
fn find_directory(input: &Input) -> Result<(Range<u64>, u64), CheckpointError> {
    let n_bytes = input.n_bytes();
    let not_a_zip =
        || CheckpointError::bad_file(input.path(), "not a zip file, or not all of it: it has no end record");
    let tail_at = n_bytes.saturating_sub(END_BYTES + MAX_COMMENT);
    let tail = input.read(tail_at..n_bytes)?;
    let signature = (END as u32).to_le_bytes();
    // The last one whose comment ends with the file.
    let found = (0..tail.len().saturating_sub(END_BYTES as usize - 1)).rev().find(|&at| {
        let comment = || u16::from_le_bytes([tail[at + 20], tail[at + 21]]);
        tail[at..at + 4] == signature && at as u64 + END_BYTES + u64::from(comment()) == tail.len() as u64
    });
    let end_at = tail_at + found.ok_or_else(not_a_zip)? as u64;
    let mut cursor = Cursor::new(input, end_at + 4..n_bytes);
    let (disk, directory_disk) = (cursor.number::<2>()?, cursor.number::<2>()?);
    let (n_here, mut n_entries) = (cursor.number::<2>()?, cursor.number::<2>()?);
    let (mut directory_bytes, mut start) = (cursor.number::<4>()?, cursor.number::<4>()?);
    if (disk, directory_disk) != (0, 0) || n_here != n_entries {
        return Err(input.bad(end_at, "a zip file in several parts"));
    }
    let mut directory_end = end_at;
    if let Some(end64_at) = find_end64(input, end_at)? {
        let mut cursor = Cursor::new(input, end64_at..end_at);
        if cursor.number::<4>()? != END64 {
            return Err(input.bad(end64_at, "the 64-bit end record is not where the zip file says"));
        }
        cursor.skip(8 + 2 + 2)?;
        let disks = (cursor.number::<4>()?, cursor.number::<4>()?);
        let n_here = cursor.number::<8>()?;
        n_entries = cursor.number::<8>()?;
        if disks != (0, 0) || n_here != n_entries {
            return Err(input.bad(end64_at, "a zip file in several parts"));
        }
        directory_bytes = cursor.number::<8>()?;
        start = cursor.number::<8>()?;
        directory_end = end64_at;
    }
    if start.checked_add(directory_bytes) != Some(directory_end) {
        let what = format!("the zip directory is {directory_bytes} bytes at {start}, it should end at {directory_end}");
        return Err(input.bad(end_at, what));
    }
    if n_entries > MAX_ENTRIES || directory_bytes > MAX_DIRECTORY {
        let what = format!(
            "the zip directory has {n_entries} entries in {directory_bytes} bytes; at most {MAX_ENTRIES} in {MAX_DIRECTORY} are read"
        );
        return Err(input.bad(end_at, what));
    }
    Ok((start..directory_end, n_entries))
}

/// Where the 64-bit end record lies, where there is one.
fn find_end64(input: &Input, end_at: u64) -> Result<Option<u64>, CheckpointError> {
    const LOCATOR_BYTES: u64 = 20;
    let Some(locator_at) = end_at.checked_sub(LOCATOR_BYTES) else { return Ok(None) };
    let mut cursor = Cursor::new(input, locator_at..end_at);
    if cursor.number::<4>()? != LOCATOR64 {
        return Ok(None);
    }
    cursor.skip(4)?;
    let at = cursor.number::<8>()?;
    if at.checked_add(56).is_none_or(|end| end > locator_at) {
        return Err(input.bad(locator_at, format!("the 64-bit end record at {at} lies outside of the file")));
    }
    Ok(Some(at))
}

/// An entry of the directory, with its size where its place will be, and where its own header lies.
fn read_entry(cursor: &mut Cursor<'_>) -> Result<(Entry, u64), CheckpointError> {
    let (input, at) = (cursor.input(), cursor.at());
    if cursor.number::<4>()? != CENTRAL {
        return Err(input.bad(at, "an entry of the zip directory is needed here"));
    }
    cursor.skip(4)?;
    let (flags, method) = (cursor.number::<2>()?, cursor.number::<2>()?);
    cursor.skip(4)?;
    let crc = cursor.number::<4>()? as u32;
    let (mut packed, mut n_bytes) = (cursor.number::<4>()?, cursor.number::<4>()?);
    let (name_bytes, extra_bytes, comment_bytes) =
        (cursor.number::<2>()?, cursor.number::<2>()?, cursor.number::<2>()?);
    cursor.skip(2 + 2 + 4)?;
    let mut header_at = cursor.number::<4>()?;
    let name = String::from_utf8(cursor.take(name_bytes)?.to_vec())
        .map_err(|_| input.bad(at, "the name of an entry is not UTF-8"))?;
    let extra = cursor.skip(extra_bytes)?;
    cursor.skip(comment_bytes)?;
    let mut extra = Cursor::new(input, extra);
    while extra.end() - extra.at() >= 4 {
        let (kind, n) = (extra.number::<2>()?, extra.number::<2>()?);
        let field = extra.skip(n)?;
        if kind == EXTRA64 {
            let mut field = Cursor::new(input, field);
            for size in [&mut n_bytes, &mut packed, &mut header_at] {
                if *size == 0xffff_ffff {
                    *size = field.number::<8>()?;
                }
            }
        }
    }
    if flags & 1 != 0 {
        return Err(input.bad(at, format!("`{}` is encrypted", Printable(&name))));
    }
    if method != 0 || packed != n_bytes {
        let what = format!(
            "`{}` is compressed; only stored entries are read (numpy.savez and torch.save store, savez_compressed does not)",
            Printable(&name)
        );
        return Err(input.bad(at, what));
    }
    Ok((Entry { name, data: 0..n_bytes, crc }, header_at))
}

/// Finds an entry's bytes behind its own header, which must name it.
fn locate(input: &Input, entry: Entry, header_at: u64, directory_at: u64) -> Result<Entry, CheckpointError> {
    let name = Printable(&entry.name);
    let outside = || input.bad(header_at, format!("`{name}` lies outside of the zip file's entries"));
    if header_at.checked_add(30).is_none_or(|end| end > directory_at) {
        return Err(outside());
    }
    // No more is read than the header should have: there may be many, far apart.
    let header_end = directory_at.min(header_at + 30 + entry.name.len() as u64);
    let mut cursor = Cursor::new(input, header_at..header_end);
    if cursor.number::<4>()? != LOCAL {
        return Err(input.bad(header_at, format!("`{name}` has no header where the directory says")));
    }
    cursor.skip(22)?;
    let (name_bytes, extra_bytes) = (cursor.number::<2>()?, cursor.number::<2>()?);
    if cursor.end() - cursor.at() < name_bytes || cursor.take(name_bytes)? != entry.name.as_bytes() {
        return Err(input.bad(header_at, format!("`{name}` has another name in its own header")));
    }
    let start = cursor.at() + extra_bytes;
    let end = start.checked_add(entry.data.end).filter(|&end| end <= directory_at).ok_or_else(outside)?;
    Ok(Entry { data: start..end, ..entry })
}

/// Writes a zip file of stored entries to a file, from its beginning.
pub(crate) struct ZipWriter<'a> {
    file: &'a File,
    at: u64,
    directory: Vec<u8>,
    n_entries: u64,
    open: Option<Open>,
}

struct Open {
    name: String,
    header_at: u64,
    data_at: u64,
    crc: crc32fast::Hasher,
}

/// 1 January 1980, the first day that zip files know: the same input gives the same bytes.
const DOS_DATE: u16 = 0x21;
/// Readers must know 64-bit sizes.
const VERSION: u16 = 45;
/// Names are UTF-8.
const FLAGS: u16 = 0x800;
/// Data begins at multiples of this, so that it can be mapped.
const ALIGNMENT: u64 = 64;

impl<'a> ZipWriter<'a> {
    pub(crate) fn new(file: &'a File) -> Self {
        Self { file, at: 0, directory: Vec::new(), n_entries: 0, open: None }
    }

    /// Begins an entry.
    pub(crate) fn begin(&mut self, name: &str) -> io::Result<()> {
        assert!(self.open.is_none(), "one entry at a time");
        let header_at = self.at;
        // The extra field holds the sizes, and is as long as it must be for the data to be aligned.
        let fixed = 30 + name.len() as u64 + 20;
        let padding = (header_at + fixed + 4).next_multiple_of(ALIGNMENT) - (header_at + fixed + 4);
        self.at = header_at + fixed + 4 + padding;
        let open = Open { name: name.to_owned(), header_at, data_at: self.at, crc: crc32fast::Hasher::new() };
        self.open = Some(open);
        Ok(())
    }

    /// Appends to the open entry.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let open = self.open.as_mut().expect("an entry is open");
        open.crc.update(bytes);
        self.file.write_all_at(bytes, self.at)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Ends the open entry, whose header is known now.
    pub(crate) fn end(&mut self) -> io::Result<()> {
        let Open { name, header_at, data_at, crc } = self.open.take().expect("an entry is open");
        let (crc, n_bytes) = (crc.finalize(), self.at - data_at);
        let padding = data_at - header_at - 30 - name.len() as u64 - 20 - 4;
        let mut header = Vec::with_capacity(128);
        header.extend((LOCAL as u32).to_le_bytes());
        let common = |bytes: &mut Vec<u8>| {
            bytes.extend(VERSION.to_le_bytes());
            bytes.extend(FLAGS.to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(DOS_DATE.to_le_bytes());
            bytes.extend(crc.to_le_bytes());
            bytes.extend([0xff; 8]);
            bytes.extend((name.len() as u16).to_le_bytes());
        };
        common(&mut header);
        header.extend((20 + 4 + padding as u16).to_le_bytes());
        header.extend(name.as_bytes());
        header.extend(1u16.to_le_bytes());
        header.extend(16u16.to_le_bytes());
        header.extend(n_bytes.to_le_bytes());
        header.extend(n_bytes.to_le_bytes());
        // "FB", as torch marks its padding.
        header.extend(b"FB");
        header.extend((padding as u16).to_le_bytes());
        header.resize(header.len() + padding as usize, b'Z');
        self.file.write_all_at(&header, header_at)?;

        let directory = &mut self.directory;
        directory.extend((CENTRAL as u32).to_le_bytes());
        directory.extend(VERSION.to_le_bytes());
        common(directory);
        directory.extend(28u16.to_le_bytes());
        directory.extend([0; 2 + 2 + 2 + 4]);
        directory.extend([0xff; 4]);
        directory.extend(name.as_bytes());
        directory.extend(1u16.to_le_bytes());
        directory.extend(24u16.to_le_bytes());
        for size in [n_bytes, n_bytes, header_at] {
            directory.extend(size.to_le_bytes());
        }
        self.n_entries += 1;
        Ok(())
    }

    /// Writes the directory; the zip file is whole.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        assert!(self.open.is_none(), "the last entry is ended");
        let (start, n_bytes, n) = (self.at, self.directory.len() as u64, self.n_entries);
        let mut end = std::mem::take(&mut self.directory);
        end.extend((END64 as u32).to_le_bytes());
        end.extend(44u64.to_le_bytes());
        end.extend([VERSION.to_le_bytes(), VERSION.to_le_bytes()].concat());
        end.extend([0; 8]);
        for number in [n, n, n_bytes, start] {
            end.extend(number.to_le_bytes());
        }
        end.extend((LOCATOR64 as u32).to_le_bytes());
        end.extend([0; 4]);
        end.extend((start + n_bytes).to_le_bytes());
        end.extend(1u32.to_le_bytes());
        end.extend((END as u32).to_le_bytes());
        end.extend([0; 4]);
        let few = (n.min(0xffff) as u16).to_le_bytes();
        end.extend([few, few].concat());
        end.extend((n_bytes.min(0xffff_ffff) as u32).to_le_bytes());
        end.extend((start.min(0xffff_ffff) as u32).to_le_bytes());
        end.extend([0; 2]);
        self.file.write_all_at(&end, start)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::input::test_input, *};

    fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let file = tempfile::tempfile().unwrap();
        let mut writer = ZipWriter::new(&file);
        for (name, bytes) in entries {
            writer.begin(name).unwrap();
            writer.write(bytes).unwrap();
            writer.end().unwrap();
        }
        writer.finish().unwrap();
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn open(bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>, String> {
        let (_dir, input) = test_input(bytes);
        let all = || {
            let zip = Zip::open(&input)?;
            let read = |entry: &Entry| {
                zip.prove(&Context::default(), &input, entry)?;
                Ok((entry.name.clone(), input.read(entry.data.clone())?))
            };
            zip.entries().iter().map(read).collect::<Result<Vec<_>, CheckpointError>>()
        };
        all().map_err(|e| e.to_string())
    }

    fn find(bytes: &[u8], signature: u64, nth: usize) -> usize {
        let signature = (signature as u32).to_le_bytes();
        (0..bytes.len() - 4).filter(|&at| bytes[at..at + 4] == signature).nth(nth).unwrap()
    }

    #[test]
    fn what_is_written_is_read_and_aligned() {
        let long = vec![7; 100_000];
        let entries = [("a", &b""[..]), ("folder/b", b"xyz"), ("c", &long)];
        let bytes = zip(&entries);
        let expected: Vec<_> = entries.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())).collect();
        assert_eq!(open(&bytes).unwrap(), expected);
        let (_dir, input) = test_input(&bytes);
        assert!(Zip::open(&input).unwrap().entries().iter().all(|entry| entry.data.start % ALIGNMENT == 0));
        assert_eq!(open(&zip(&[])), Ok(vec![]));
    }

    #[test]
    fn many_small_entries_cost_no_more_reading_than_they_have_bytes() {
        let names: Vec<String> = (0..3000).map(|i| format!("archive/data/{i}")).collect();
        let entries: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b"12345678"[..])).collect();
        let bytes = zip(&entries);
        let (_dir, input) = test_input(&bytes);
        assert_eq!(Zip::open(&input).unwrap().entries().len(), names.len());
        let n_read = input.n_read.load(std::sync::atomic::Ordering::Relaxed);
        assert!(n_read < 2 * bytes.len() as u64, "{n_read} bytes of {}", bytes.len());
    }

    #[test]
    fn every_lie_is_told() {
        let good = zip(&[("a", b"first"), ("b", b"second")]);
        let with = |at: usize, to: &[u8]| {
            let mut bytes = good.clone();
            bytes[at..at + to.len()].copy_from_slice(to);
            open(&bytes).unwrap_err()
        };
        let (first, second) = (find(&good, CENTRAL, 0), find(&good, CENTRAL, 1));
        assert!(with(first + 8, &[1, 8]).contains("`a` is encrypted"));
        assert!(with(first + 10, &[8]).contains("`a` is compressed"));
        assert!(with(first + 46, b"b").contains("another name in its own header"));
        // The 64-bit sizes and offset stand behind the name: unpacked, packed, header.
        let sizes = first + 46 + 1 + 4;
        assert!(with(sizes, &[4]).contains("`a` is compressed"), "sizes that differ");
        let both = |n: u64| [n.to_le_bytes(), n.to_le_bytes()].concat();
        assert!(with(sizes, &both(1000)).contains("`a` lies outside"));
        assert!(with(sizes, &both(u64::MAX)).contains("`a` lies outside"));
        assert!(with(sizes, &both(70)).contains("two entries of the zip file overlap"));
        let header_at = second + 46 + 1 + 4 + 16;
        assert!(with(header_at, &0u64.to_le_bytes()).contains("another name"));
        assert!(with(header_at, &u64::MAX.to_le_bytes()).contains("`b` lies outside"));
        assert!(with(header_at, &5u64.to_le_bytes()).contains("has no header where"));
        // The checksum is that of the bytes.
        assert!(with(first + 16, &[0, 0, 0, 0]).contains("its checksum does not match"));
        let end = find(&good, END64, 0);
        assert!(with(end + 24, &both(1)).contains("longer than its entries"));
        assert!(with(end + 24, &both(3)).contains("at byte"));
        assert!(with(end + 24, &both(u64::MAX)).contains("entries"));
        assert!(with(end + 48, &[1; 8]).contains("it should end at"));
        let twice = zip(&[("a", b"first"), ("a", b"second")]);
        assert!(open(&twice).unwrap_err().contains("`a` is there twice"));
    }

    #[test]
    fn a_zip_file_cut_short_or_changed_anywhere_is_refused_or_the_same() {
        let good = zip(&[("a", b"first"), ("b", b"second")]);
        for n in 0..good.len() {
            assert!(open(&good[..n]).is_err(), "{n}");
        }
        let whole = open(&good).unwrap();
        for at in 0..good.len() {
            for flip in [1, 0x80] {
                let mut bytes = good.clone();
                bytes[at] ^= flip;
                // Names, times and padding may change; contents may not.
                if let Ok(found) = open(&bytes) {
                    assert!(found.iter().zip(&whole).all(|(a, b)| a.1 == b.1), "byte {at}");
                }
            }
        }
    }
}
