//! Rules for modules by pattern: `rank_pattern`, `alpha_pattern`.
//!
//! A pattern matches a module where `(.*\.)?(PATTERN)$` matches its name from the start, as Python's `re.match` has it; of
//! several that match, the first in the file's order counts. Nearly all patterns are plain names: those are compared byte by
//! byte, a dot standing for any character. The others are compiled by the `regex` crate, whose time is linear in the name.

use regex::{Regex, RegexBuilder};

/// Memory of one compiled pattern, and how deep its groups may nest.
const MAX_COMPILED_BYTES: usize = 1 << 20;
const MAX_NESTING: u32 = 50;
/// Patterns that are no plain names, at most.
const MAX_EXPRESSIONS: usize = 256;

/// Rules in their order, each with a value.
#[derive(Clone, Debug, Default)]
pub struct Patterns<V> {
    rules: Vec<(Rule, V)>,
}

#[derive(Clone, Debug)]
enum Rule {
    /// Letters, digits, `_` and `-` stand for themselves, `.` for any character.
    Plain(String),
    Expression(Regex),
}

impl<V> Patterns<V> {
    /// Compiles rules.
    ///
    /// # Errors
    /// What is wrong with a pattern; patterns that need look-around or back-references are refused.
    pub fn new<'a>(rules: impl IntoIterator<Item = (&'a str, V)>) -> Result<Self, String> {
        let mut compiled = Vec::new();
        let mut n_expressions = 0;
        for (pattern, value) in rules {
            let rule = Rule::new(pattern)?;
            n_expressions += usize::from(matches!(rule, Rule::Expression(_)));
            if n_expressions > MAX_EXPRESSIONS {
                return Err(format!("more than {MAX_EXPRESSIONS} regular expressions"));
            }
            compiled.push((rule, value));
        }
        Ok(Self { rules: compiled })
    }

    /// The value of the first rule that matches the module `name`.
    pub fn get(&self, name: &str) -> Option<&V> {
        self.rules.iter().find(|(rule, _)| rule.matches(name)).map(|(_, value)| value)
    }
}

impl Rule {
    fn new(pattern: &str) -> Result<Self, String> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if !pattern.is_empty() && pattern.chars().all(is_plain) {
            return Ok(Self::Plain(pattern.to_owned()));
        }
        // Parsed alone first, so that a stray parenthesis cannot reach into the frame around it.
        let options =
            |text: &str| RegexBuilder::new(text).size_limit(MAX_COMPILED_BYTES).nest_limit(MAX_NESTING).build();
        let shown = crate::checkpoint::Printable(pattern);
        let reason = |e: regex::Error| {
            let text = e.to_string();
            let last = text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
            format!("the pattern \"{shown}\" cannot be used: {}", crate::checkpoint::Printable(&last))
        };
        options(pattern).map_err(reason)?;
        options(&format!(r"^(?:.*\.)?(?:{pattern})$")).map(Self::Expression).map_err(reason)
    }

    fn matches(&self, name: &str) -> bool {
        match self {
            Self::Expression(regex) => regex.is_match(name),
            Self::Plain(pattern) => {
                let (name, pattern) = (name.as_bytes(), pattern.as_bytes());
                let Some(start) = name.len().checked_sub(pattern.len()) else { return false };
                let same = |(&p, &n): (&u8, &u8)| p == n || p == b'.';
                pattern.iter().zip(&name[start..]).rev().all(same) && (start == 0 || name[start - 1] == b'.')
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first<'a>(patterns: &[&'a str], name: &str) -> Option<&'a str> {
        Patterns::new(patterns.iter().map(|&p| (p, p))).unwrap().get(name).copied()
    }

    #[test]
    fn a_pattern_matches_the_end_of_a_name_after_a_dot() {
        let name = "model.layers.1.mlp.up_proj";
        for pattern in [
            "up_proj",
            "mlp.up_proj",
            "1.mlp.up_proj",
            name,
            r"layers\.\d+\.mlp\.(up|down)_proj",
            ".*up_proj",
            "^model.*",
        ] {
            assert_eq!(first(&[pattern], name), Some(pattern), "{pattern}");
        }
        // `(.*\.)?` eats the name up to a dot, so an anchor inside the pattern still means the start of the name.
        for pattern in ["p_proj", "up_pro", "lp.up_proj", "x.model.layers.1.mlp.up_proj", r"layers\.2\..*", "^mlp.*"] {
            assert_eq!(first(&[pattern], name), None, "{pattern}");
        }
        assert_eq!(first(&["q_proj", "mlp.up_proj", "up_proj"], name), Some("mlp.up_proj"));
        assert_eq!(first(&["mlp.up.proj"], name), Some("mlp.up.proj"));
    }

    #[test]
    fn patterns_that_could_hang_or_escape_are_refused_or_harmless() {
        assert_eq!(first(&["(a+)+b"], &"a".repeat(50_000)), None);
        for pattern in ["a{1000000}", "(?=x)y", r"(a)\1", "x)|(y", "(", &"(".repeat(100)] {
            let said = Patterns::new([(pattern, ())]).unwrap_err();
            assert!(said.contains("cannot be used"), "{pattern}: {said}");
        }
    }
}
