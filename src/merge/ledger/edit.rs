//! How one text became another, so that it can be taken back.

use serde::{Deserialize, Serialize};

/// An edit of a text: what stood between a beginning and an end that both texts share.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextEdit {
    /// Bytes of the common beginning.
    at: u64,
    /// What stood there.
    before: String,
    /// Bytes that stand there now.
    n_after: u64,
    /// BLAKE3 of the text as it was.
    original: String,
}

impl TextEdit {
    /// The edit that makes `edited` of `original`.
    pub(in crate::merge) fn between(original: &str, edited: &str) -> Self {
        let same = |(a, b): &(u8, u8)| a == b;
        let mut at = original.bytes().zip(edited.bytes()).take_while(same).count();
        while !original.is_char_boundary(at) || !edited.is_char_boundary(at) {
            at -= 1;
        }
        let (old, new) = (&original[at..], &edited[at..]);
        let mut n_common = old.bytes().rev().zip(new.bytes().rev()).take_while(same).count();
        while !old.is_char_boundary(old.len() - n_common) || !new.is_char_boundary(new.len() - n_common) {
            n_common -= 1;
        }
        Self {
            at: at as u64,
            before: old[..old.len() - n_common].to_owned(),
            n_after: (new.len() - n_common) as u64,
            original: blake3::hash(original.as_bytes()).to_hex().to_string(),
        }
    }

    /// The original of `edited`; none where that is not what the edit made.
    pub(in crate::merge) fn undo(&self, edited: &str) -> Option<String> {
        let at = usize::try_from(self.at).ok()?;
        let end = at.checked_add(usize::try_from(self.n_after).ok()?)?;
        let original = [edited.get(..at)?, &self.before, edited.get(end..)?].concat();
        (blake3::hash(original.as_bytes()).to_hex().as_str() == self.original).then_some(original)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edit_is_taken_back() {
        for (original, edited) in [
            ("", ""),
            ("abc", "abc"),
            ("abc", "abXc"),
            ("abXc", "abc"),
            ("aaa", "aa"),
            ("", "x"),
            ("é", "è"),
            ("äö", "äü!"),
        ] {
            let edit = TextEdit::between(original, edited);
            assert_eq!(edit.undo(edited).as_deref(), Some(original), "{original} {edited}");
            assert_eq!(edit.undo(&format!("{edited}?")), None);
        }
    }

    #[test]
    fn hostile_edits_are_refused() {
        let edit = TextEdit { at: u64::MAX, before: String::new(), n_after: 5, original: String::new() };
        assert_eq!(edit.undo("text"), None);
        assert_eq!(TextEdit { at: 3, n_after: 9, ..edit.clone() }.undo("text"), None);
        assert_eq!(TextEdit { at: 1, n_after: 0, ..edit }.undo("é"), None);
    }
}
