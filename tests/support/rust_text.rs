//! Rust as text: comments, strings, tokens, nested modules and grouped imports, and no more of it than that.

/// A file's lines, with code and comments apart; the contents of strings are gone.
pub(crate) struct Text {
    pub(crate) code: Vec<String>,
    pub(crate) comments: Vec<String>,
}

impl Text {
    pub(crate) fn new(raw: &str) -> Self {
        let chars: Vec<char> = raw.chars().collect();
        let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
        let mut text = Self { code: vec![String::new()], comments: vec![String::new()] };
        let mut i = 0;
        while i < chars.len() {
            let end = match at(i) {
                '/' if at(i + 1) == '/' => i + chars[i..].iter().take_while(|&&c| c != '\n').count(),
                '/' if at(i + 1) == '*' => end_of_block_comment(&chars, i),
                '"' => end_of_string(&chars, i),
                'r' if i == 0 || !is_word(at(i - 1)) || starts_with_byte_prefix(&chars, i) => {
                    end_of_raw_string(&chars, i).unwrap_or(i)
                }
                // A quote followed by one character and no quote is a lifetime.
                '\'' if at(i + 1) == '\\' => i + 3 + chars[i + 3..].iter().take_while(|&&c| c != '\'').count() + 1,
                '\'' if at(i + 2) == '\'' => i + 3,
                _ => i,
            };
            if end == i {
                text.push(at(i), false);
                i += 1;
            } else {
                let is_comment = at(i) == '/';
                if !is_comment {
                    text.push(' ', false);
                }
                for &c in &chars[i..end.min(chars.len())] {
                    if is_comment || c == '\n' {
                        text.push(c, true);
                    }
                }
                i = end;
            }
        }
        text
    }

    fn push(&mut self, c: char, is_comment: bool) {
        if c == '\n' {
            self.code.push(String::new());
            self.comments.push(String::new());
        } else {
            let lines = if is_comment { &mut self.comments } else { &mut self.code };
            lines.last_mut().expect("there is always a line").push(c);
        }
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether the `r` at `i` is that of `br"` or `cr"`.
fn starts_with_byte_prefix(chars: &[char], i: usize) -> bool {
    i >= 1 && matches!(chars[i - 1], 'b' | 'c') && (i == 1 || !is_word(chars[i - 2]))
}

fn end_of_block_comment(chars: &[char], start: usize) -> usize {
    let (mut i, mut depth) = (start, 0);
    while i < chars.len() {
        match (chars[i], chars.get(i + 1)) {
            ('/', Some('*')) => (i, depth) = (i + 2, depth + 1),
            ('*', Some('/')) => (i, depth) = (i + 2, depth - 1),
            _ => i += 1,
        }
        if depth == 0 {
            break;
        }
    }
    i
}

fn end_of_string(chars: &[char], start: usize) -> usize {
    let mut i = start + 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

fn end_of_raw_string(chars: &[char], start: usize) -> Option<usize> {
    let hashes = chars[start + 1..].iter().take_while(|&&c| c == '#').count();
    let mut i = start + 1 + hashes;
    if chars.get(i) != Some(&'"') {
        return None;
    }
    loop {
        i += 1;
        let closes = *chars.get(i)? == '"' && chars[i + 1..].iter().take_while(|&&c| c == '#').count() >= hashes;
        if closes {
            return Some(i + 1 + hashes);
        }
    }
}

/// A word, `::`, or one character of anything else.
#[derive(PartialEq, Debug)]
pub(crate) struct Token {
    pub(crate) text: String,
    pub(crate) line: usize,
}

pub(crate) fn tokens(text: &Text) -> Vec<Token> {
    let mut tokens: Vec<Token> = Vec::new();
    for (line, code) in (1..).zip(&text.code) {
        let mut rest = code.trim_start();
        while let Some(first) = rest.chars().next() {
            let n_bytes = match first {
                _ if is_word(first) => rest.find(|c| !is_word(c)).unwrap_or(rest.len()),
                ':' if rest.starts_with("::") => 2,
                _ => first.len_utf8(),
            };
            tokens.push(Token { text: rest[..n_bytes].to_owned(), line });
            rest = rest[n_bytes..].trim_start();
        }
    }
    tokens
}

/// The text of the token at `i`, or nothing beyond either end.
pub(crate) fn text_at(tokens: &[Token], i: Option<usize>) -> &str {
    i.and_then(|i| tokens.get(i)).map_or("", |token| &token.text)
}

/// What a module `depth` below its crate's root imports from that root: line and first segment. `*` is the root itself.
pub(crate) fn imports(depth: usize, tokens: &[Token]) -> Vec<(usize, String)> {
    let word = |i: usize| text_at(tokens, Some(i));
    let before = |i: usize, n: usize| text_at(tokens, i.checked_sub(n));
    let mut found = Vec::new();
    // `mod name {` goes one deeper until its brace closes.
    let (mut braces, mut modules) = (0, Vec::new());
    for i in 0..tokens.len() {
        match word(i) {
            "{" => {
                braces += 1;
                if before(i, 2) == "mod" {
                    modules.push(braces);
                }
            }
            "}" => {
                modules.pop_if(|opened| *opened == braces);
                braces -= 1;
            }
            "self" if before(i, 1) == "crate" && before(i, 2) == "extern" => {
                found.push((tokens[i].line, "*".to_owned()));
            }
            root @ ("crate" | "neuroada_ckpt" | "super" | "self") => {
                let continues = before(i, 1) == "::" && root != "neuroada_ckpt";
                let is_visibility = before(i, 1) == "in" && before(i, 3) == "pub";
                if continues || is_visibility || !matches!(word(i + 1), "::" | "as") {
                    continue;
                }
                let mut above = match root {
                    "self" => depth + modules.len(),
                    "super" => (depth + modules.len()).saturating_sub(1),
                    _ => 0,
                };
                let mut next = i + 1;
                while word(next) == "::" && word(next + 1) == "super" {
                    above = above.saturating_sub(1);
                    next += 2;
                }
                if above == 0 {
                    found.extend(first_segments(tokens, next));
                }
            }
            _ => {}
        }
    }
    found
}

/// The segments that follow the root of a path, which ends before `next`: one, or those of a group.
fn first_segments(tokens: &[Token], next: usize) -> Vec<(usize, String)> {
    let segment = |i: usize| {
        let token = &tokens[i];
        let name = if is_word(token.text.chars().next()?) && token.text != "self" { &token.text } else { "*" };
        Some((token.line, name.to_owned()))
    };
    if text_at(tokens, Some(next)) != "::" {
        return vec![(tokens[next].line, "*".to_owned())]; // `use crate as name`
    }
    if text_at(tokens, Some(next + 1)) != "{" {
        return if next + 1 < tokens.len() { segment(next + 1).into_iter().collect() } else { Vec::new() };
    }
    let (mut found, mut depth) = (Vec::new(), 0);
    for i in next + 1..tokens.len() {
        match tokens[i].text.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            break;
        }
        let begins = i == next + 2 || tokens[i - 1].text == ",";
        if depth == 1 && begins && !matches!(tokens[i].text.as_str(), "," | "}") {
            found.extend(segment(i));
        }
    }
    found
}
