//! Escapes text from files for model cards: YAML, Markdown, and shell examples.

use std::path::Path;

/// A double-quoted YAML string. Any content stays one string, and nothing in it is invisible.
pub fn yaml_string(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted += "\\n",
            '\r' => quoted += "\\r",
            '\t' => quoted += "\\t",
            // YAML allows control characters only in this form, and has two more line breaks than JSON.
            c if c.is_control()
                || is_invisible(c)
                || matches!(c, '\u{2028}' | '\u{2029}' | '\u{fffe}' | '\u{ffff}') =>
            {
                quoted += &format!("\\u{:04X}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted + "\""
}

/// Plain Markdown text on one line: nothing in it acts as markup or ends a table cell.
pub fn markdown_text(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.trim().chars() {
        match c {
            '\n' | '\r' | '\t' | '\u{2028}' | '\u{2029}' => escaped.push(' '),
            c if c.is_control() || is_invisible(c) => {}
            '\\' | '`' | '*' | '_' | '[' | ']' | '<' | '>' | '#' | '|' | '!' | '&' | '$' | '~' => {
                escaped.extend(['\\', c]);
            }
            // At the start of a line they would begin a list or underline a heading.
            '-' | '+' | '=' if escaped.is_empty() => escaped.extend(['\\', c]),
            '.' | ')' if !escaped.is_empty() && escaped.bytes().all(|byte| byte.is_ascii_digit()) => {
                escaped.extend(['\\', c]);
            }
            c => escaped.push(c),
        }
    }
    escaped
}

/// Inline code in Markdown, also inside a table.
pub fn markdown_code(text: &str) -> String {
    let plain = text.trim().chars().filter(|c| !c.is_control() && !is_invisible(*c));
    let plain: String = plain.map(|c| if c == '`' { '\'' } else { c }).collect();
    // An empty pair of backticks would not be code.
    if plain.is_empty() { String::new() } else { format!("`{}`", plain.replace('|', "\\|")) }
}

/// A single word for a POSIX shell, in single quotes, on one line.
pub fn shell_word(text: &str) -> String {
    let plain: String = text.chars().filter(|c| !c.is_control() && !is_invisible(*c)).collect();
    format!("'{}'", plain.replace('\'', r"'\''"))
}

/// A path as one word for a POSIX shell, in quotes only where it needs them.
pub fn shell_path(path: &Path) -> String {
    let text = path.to_string_lossy();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._/+=:@%-".contains(c);
    let is_option = text.starts_with('-');
    if !text.is_empty() && !is_option && text.chars().all(is_plain) { text.into_owned() } else { shell_word(&text) }
}

/// Whether a name is that of a repository on the Hub: `ORG/NAME`.
pub fn is_repository(name: &str) -> bool {
    let is_part = |part: &str| {
        let is_inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.chars().all(is_inner)
            && !part.contains("..")
            && !part.contains("--")
    };
    name.len() <= 96 && name.split_once('/').is_some_and(|(org, name)| is_part(org) && is_part(name))
}

/// Characters that are invisible, or change the display order of others.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_files_is_not_markup() {
        assert_eq!(markdown_text("a\n# b <img> `x`\u{1b}"), "a \\# b \\<img\\> \\`x\\`");
        assert_eq!(markdown_text(" - a | b\u{202e}c"), "\\- a \\| bc");
        assert_eq!(markdown_text("12. a.b $x$"), "12\\. a.b \\$x\\$");
        assert_eq!(markdown_code("a`b|c\n\u{1b}"), "`a'b\\|c`");
        assert_eq!(markdown_code("\u{7}"), "");
    }

    #[test]
    fn strings_stay_strings() {
        assert_eq!(yaml_string("a\": b\n"), r#""a\": b\n""#);
        assert_eq!(yaml_string("no # \\ \u{1b}\u{85}\u{2028}\u{feff}ü"), r#""no # \\ \u001B\u0085\u2028\uFEFFü""#);
        // A double-quoted YAML string without these escapes is also valid JSON.
        let back: String = serde_json::from_str(&yaml_string("x\u{7f} 'y'\t\"z\"")).unwrap();
        assert_eq!(back, "x\u{7f} 'y'\t\"z\"");
        assert_eq!(shell_word("it's\n"), r"'it'\''s'");
    }
}
