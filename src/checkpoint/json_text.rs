//! Small edits of JSON text that leave every other byte unchanged.

use std::{borrow::Cow, fmt, ops::Range};

use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The byte ranges of `object.key` in the text of a JSON object.
struct Found {
    /// The value of `object`, braces included; `None` if there is no such object.
    object: Option<Range<usize>>,
    /// The value of `key` in it.
    value: Option<Range<usize>>,
}

/// Sets `object.key` to the string `value`: replaces an existing value, else inserts the key as the first member.
/// Creates `object` if it is missing or null. No other byte changes.
///
/// # Errors
/// Text that is not a JSON object, or whose `object` is neither an object nor null.
pub(crate) fn with_string(text: &str, object: &str, key: &str, value: &str) -> serde_json::Result<String> {
    let found = find(text, object, key)?;
    let value = serde_json::to_string(value)?;
    if let Some(range) = found.value {
        return Ok(replaced(text, range, &value));
    }
    let member = format!("{}:{value}", serde_json::to_string(key)?);
    match found.object {
        Some(range) if text[range.clone()].starts_with('{') => Ok(with_first_member(text, range.start, &member)),
        Some(range) => Ok(replaced(text, range, &format!("{{{member}}}"))),
        None => {
            let member = format!("{}:{{{member}}}", serde_json::to_string(object)?);
            Ok(with_first_member(text, text.len() - text.trim_start().len(), &member))
        }
    }
}

/// The string `object.key` of a JSON object's text; `None` if there is none.
///
/// # Errors
/// As [`with_string`]; a value that is not a string.
pub(crate) fn string_at(text: &str, object: &str, key: &str) -> serde_json::Result<Option<String>> {
    find(text, object, key)?.value.map(|range| serde_json::from_str(&text[range])).transpose()
}

/// The texts from which [`with_string`] may have made this one when `key` was absent: without the member and, if it is
/// the only member, without `object` or with null in its place. Empty if the member is not the first.
pub(crate) fn without_string(text: &str, object: &str, key: &str) -> Vec<String> {
    let Ok(Found { object: Some(outer), value: Some(value) }) = find(text, object, key) else { return Vec::new() };
    let Ok(name) = serde_json::to_string(key) else { return Vec::new() };
    let member = outer.start + 1..value.end;
    if text[member.clone()] != format!("{name}:{}", &text[value]) {
        return Vec::new();
    }
    let mut candidates = vec![without_member(text, member.clone())];
    if text[outer.clone()] == format!("{{{}}}", &text[member]) {
        candidates.push(replaced(text, outer.clone(), "null"));
        let start = outer.start - serde_json::to_string(object).map_or(0, |name| name.len() + 1);
        candidates.push(without_member(text, start..outer.end));
    }
    candidates
}

/// Removes a member that is its object's first, with the comma after it.
fn without_member(text: &str, member: Range<usize>) -> String {
    let comma = text[member.end..].starts_with(',') as usize;
    replaced(text, member.start..member.end + comma, "")
}

fn replaced(text: &str, range: Range<usize>, with: &str) -> String {
    [&text[..range.start], with, &text[range.end..]].concat()
}

/// Inserts `member` as the first member of the object that begins at `brace`.
fn with_first_member(text: &str, brace: usize, member: &str) -> String {
    let (before, after) = text.split_at(brace + 1);
    let comma = if after.trim_start().starts_with('}') { "" } else { "," };
    [before, member, comma, after].concat()
}

fn find(text: &str, object: &str, key: &str) -> serde_json::Result<Found> {
    let at = |part: &str| {
        let start = part.as_ptr() as usize - text.as_ptr() as usize;
        start..start + part.len()
    };
    let Some(inner) = member(text, object)? else { return Ok(Found { object: None, value: None }) };
    let value = if inner.get() == "null" { None } else { member(inner.get(), key)? };
    Ok(Found { object: Some(at(inner.get())), value: value.map(|value| at(value.get())) })
}

/// The last member of this name as it appears in the text, if there is one.
fn member<'t>(text: &'t str, name: &str) -> serde_json::Result<Option<&'t RawValue>> {
    struct Members<'n>(&'n str);

    impl<'de> Visitor<'de> for Members<'_> {
        type Value = Option<&'de RawValue>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut found = None;
            while let Some(Name(name)) = map.next_key()? {
                if name == self.0 {
                    found = Some(map.next_value()?);
                } else {
                    map.next_value::<IgnoredAny>()?;
                }
            }
            Ok(found)
        }
    }

    let mut deserializer = serde_json::Deserializer::from_str(text);
    let found = deserializer.deserialize_map(Members(name))?;
    deserializer.end()?;
    Ok(found)
}

/// A key, borrowed unless it has escapes.
#[derive(serde::Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_string_is_set_and_nothing_else_changes() {
        for (text, expected) in [
            (r#"{}"#, r#"{"m":{"k":"v"}}"#),
            ("{ }  ", "{\"m\":{\"k\":\"v\"} }  "),
            (r#" {"a":1}"#, r#" {"m":{"k":"v"},"a":1}"#),
            (r#"{"a": 1, "m": { } }"#, r#"{"a": 1, "m": {"k":"v" } }"#),
            (r#"{"a": {"k": "x"}, "m":{"x" : "}"}}"#, r#"{"a": {"k": "x"}, "m":{"k":"v","x" : "}"}}"#),
            (r#"{"m":{"x":1,"k" : "old" }}  "#, r#"{"m":{"x":1,"k" : "v" }}  "#),
            (r#"{"\u006d":{"\u006b":"old"}}"#, r#"{"\u006d":{"\u006b":"v"}}"#),
            (r#"{"m":null}"#, r#"{"m":{"k":"v"}}"#),
        ] {
            let edited = with_string(text, "m", "k", "v").unwrap();
            assert_eq!(edited, expected);
            assert_eq!(string_at(&edited, "m", "k").unwrap().as_deref(), Some("v"));
            if string_at(text, "m", "k").unwrap().is_none() {
                assert!(without_string(&edited, "m", "k").iter().any(|back| back == text), "{text}");
            }
        }
        assert_eq!(string_at(r#"{"m":{"j":"v"}}"#, "m", "k").unwrap(), None);
    }

    #[test]
    fn a_value_is_escaped() {
        let edited = with_string("{}", "m", "k", "\"{}\\\n").unwrap();
        assert_eq!(string_at(&edited, "m", "k").unwrap().as_deref(), Some("\"{}\\\n"));
    }

    #[test]
    fn anything_but_an_object_is_an_error() {
        for text in ["", "[]", "{", r#"{"m":1}"#, r#"{"m":[]}"#, "{} x"] {
            assert!(with_string(text, "m", "k", "v").is_err(), "{text}");
        }
        assert!(string_at(r#"{"m":{"k":1}}"#, "m", "k").is_err());
    }
}
