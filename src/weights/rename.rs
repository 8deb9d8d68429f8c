//! The user's word on what an adapter's key is called in the checkpoint: `--rename FROM=TO`.

use std::{fmt, str::FromStr};

use crate::checkpoint::Printable;

/// `FROM=TO`: a name of an adapter and the checkpoint's name for it. One `*` on each side stands for the same text, of any length.
/// Without it, `FROM` is a parameter's name or a module's.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rename {
    from: String,
    to: String,
}

impl Rename {
    /// What `name` is called in the checkpoint, where the rule is for it.
    pub fn apply(&self, name: &str) -> Option<String> {
        match (self.from.split_once('*'), self.to.split_once('*')) {
            (Some((before, after)), Some((to_before, to_after))) => {
                let carried = name.strip_prefix(before)?.strip_suffix(after)?;
                Some(format!("{to_before}{carried}{to_after}"))
            }
            _ => match name.strip_prefix(&self.from)? {
                "" => Some(self.to.clone()),
                // A module's parameter.
                rest if rest.starts_with('.') && !rest[1..].contains('.') => Some(format!("{}{rest}", self.to)),
                _ => None,
            },
        }
    }
}

impl FromStr for Rename {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = |what: &str| format!("{}: {what}", Printable(text));
        let (from, to) = text.split_once('=').ok_or_else(|| bad("expected FROM=TO"))?;
        if from.is_empty() || to.is_empty() {
            return Err(bad("expected FROM=TO, and one of them is empty"));
        }
        let [n_from, n_to] = [from, to].map(|side| side.matches('*').count());
        if n_from > 1 || n_from != n_to {
            return Err(bad("expected one `*` on each side, or none"));
        }
        Ok(Self { from: from.to_owned(), to: to.to_owned() })
    }
}

impl fmt::Display for Rename {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.from, self.to)
    }
}

impl TryFrom<String> for Rename {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Rename> for String {
    fn from(rename: Rename) -> Self {
        rename.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_star_carries_its_text_over() {
        let apply = |rule: &str, name: &str| rule.parse::<Rename>().unwrap().apply(name);
        let rule = "model.*=backbone.*";
        assert_eq!(apply(rule, "model.layers.0.q.weight").as_deref(), Some("backbone.layers.0.q.weight"));
        assert_eq!(apply(rule, "lm_head.weight"), None);
        assert_eq!(apply("a.*.q=b.*.r", "a.0.q").as_deref(), Some("b.0.r"));
        assert_eq!(apply("a*a=b*b", "a"), None, "both ends need text of their own");
        assert_eq!(apply("score=classifier", "score.weight").as_deref(), Some("classifier.weight"));
        assert_eq!(apply("score=classifier", "score.out.weight"), None);
        assert_eq!(apply("score.weight=head.weight", "score.weight").as_deref(), Some("head.weight"));
        for bad in ["a", "=b", "a=", "a*=b", "a=*", "a**=b**"] {
            assert!(bad.parse::<Rename>().is_err(), "{bad}");
        }
    }
}
