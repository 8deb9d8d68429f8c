//! Color of what is printed: labels of messages and titles of tables, nothing else.

use std::env;

use clap::{
    ValueEnum,
    builder::styling::{AnsiColor, Style},
};

/// When to color.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum ColorChoice {
    /// On terminals, unless NO_COLOR is set
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

impl ColorChoice {
    /// Whether output is colored that goes to a terminal, or elsewhere.
    pub(super) fn applies_to(self, is_terminal: bool) -> bool {
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Auto => {
                let is_set = |name: &str| env::var_os(name).is_some_and(|value| !value.is_empty());
                is_terminal && !is_set("NO_COLOR") && env::var_os("TERM").is_none_or(|term| term != "dumb")
            }
        }
    }

    /// The choice for clap's own messages.
    pub(super) fn for_clap(self) -> clap::ColorChoice {
        match self {
            Self::Auto => clap::ColorChoice::Auto,
            Self::Always => clap::ColorChoice::Always,
            Self::Never => clap::ColorChoice::Never,
        }
    }
}

/// Titles of tables.
pub(super) const TITLE: Style = Style::new().bold();

const LABELS: [(&str, Style); 4] = [
    ("error:", AnsiColor::Red.on_default().bold()),
    ("warning:", AnsiColor::Yellow.on_default().bold()),
    ("note:", AnsiColor::Cyan.on_default()),
    ("hint:", AnsiColor::Cyan.on_default()),
];

/// The message, with its label in color where `is_colored`.
pub(super) fn label(message: &str, is_colored: bool) -> String {
    let found = LABELS.iter().find_map(|(label, style)| Some((label, style, message.strip_prefix(label)?)));
    match found.filter(|_| is_colored) {
        Some((label, style, rest)) => format!("{style}{label}{style:#}{rest}"),
        None => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_colored_and_nothing_else() {
        assert_eq!(label("error: a", true), "\u{1b}[1m\u{1b}[31merror:\u{1b}[0m a");
        assert_eq!(label("error: a", false), "error: a");
        assert_eq!(label("no error: a", true), "no error: a");
        assert!(!ColorChoice::Auto.applies_to(false) && ColorChoice::Always.applies_to(false));
    }
}
