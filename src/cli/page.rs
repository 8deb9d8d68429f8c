//! Text for people: lines, tables, and numbers one can read.

use std::{fmt, time::Duration};

use crate::checkpoint::Printable;

/// What a report looks like on stdout.
#[derive(Default)]
pub(super) struct Page {
    text: String,
    /// An empty line comes before whatever comes next.
    is_section_over: bool,
}

impl Page {
    /// Adds a line; words from files go through [`Printable`] first.
    pub(super) fn line(&mut self, words: impl fmt::Display) {
        let words = words.to_string();
        self.add(words.trim_end());
        self.text.push('\n');
    }
    /// Adds an empty line before what comes next, if anything does.
    pub(super) fn blank(&mut self) {
        self.is_section_over = !self.text.is_empty();
    }
    /// Adds `name  value` lines, values aligned.
    pub(super) fn facts(&mut self, facts: &[(&str, String)]) {
        let mut table = Table::headless([Align::Left, Align::Left]);
        for (name, value) in facts {
            table.row([(*name).to_owned(), value.clone()]);
        }
        self.table(&table);
    }
    /// Adds a table; nothing for one without rows.
    pub(super) fn table(&mut self, table: &Table) {
        if !table.rows.is_empty() {
            self.add(&table.to_string());
        }
    }

    fn add(&mut self, text: &str) {
        if std::mem::take(&mut self.is_section_over) {
            self.text.push('\n');
        }
        self.text += text;
    }
}

impl fmt::Display for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Which side of a column its cells stand on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Columns as wide as they need to be. Cells may hold words from files: they are printed escaped.
pub(super) struct Table {
    head: Vec<String>,
    align: Vec<Align>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column titles; a title that ends with `>` is that of numbers, which stand on the right.
    pub(super) fn new<const N: usize>(titles: [&str; N]) -> Self {
        let align = titles.iter().map(|title| if title.ends_with('>') { Align::Right } else { Align::Left }).collect();
        let head = titles.iter().map(|title| title.trim_end_matches('>').to_owned()).collect();
        Self { head, align, rows: Vec::new() }
    }

    /// A table without titles.
    pub(super) fn headless<const N: usize>(align: [Align; N]) -> Self {
        Self { head: Vec::new(), align: align.to_vec(), rows: Vec::new() }
    }

    /// Adds a row.
    ///
    /// # Panics
    /// Where it has not as many cells as there are columns.
    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        assert_eq!(N, self.align.len(), "a row has a cell for every column");
        self.rows.push(cells.iter().map(|cell| Printable(cell).to_string()).collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = || (!self.head.is_empty()).then_some(&self.head).into_iter().chain(&self.rows);
        let width = |column: usize| lines().map(|cells| cells[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.align.len()).map(width).collect();
        for cells in lines() {
            let mut line = String::new();
            for ((cell, align), &width) in cells.iter().zip(&self.align).zip(&widths) {
                line += &match align {
                    Align::Left => format!("{cell:<width$}  "),
                    Align::Right => format!("{cell:>width$}  "),
                };
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// `1234567` as `1,234,567`.
pub(super) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut grouped = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Bytes in decimal units, as disks and download pages have them: `16.1 GB`.
pub(super) fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if n < 1000 {
        return format!("{n} B");
    }
    let mut scaled = n as f64 / 1e3;
    let mut unit = 0;
    // What would be printed as 1000 is 1 of the next unit.
    while scaled >= 999.5 {
        scaled /= 1e3;
        unit += 1;
    }
    format!("{} {}", digits(scaled, 3), UNITS[unit])
}

/// Bytes per second: `1.23 GB/s`.
pub(super) fn rate(n_bytes: u64, took: Duration) -> String {
    let per_second = n_bytes as f64 / took.as_secs_f64().max(1e-9);
    format!("{}/s", bytes(per_second as u64))
}

/// `0.41 s`, `2 min 3 s`, `1 h 2 min`.
pub(super) fn duration(took: Duration) -> String {
    let seconds = took.as_secs();
    match seconds {
        0..60 => format!("{:.2} s", took.as_secs_f64()),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// `part` of `whole` in percent, three digits that matter: `0.0171 %`. Never 0 or 100 unless it is.
pub(super) fn percent(part: u64, whole: u64) -> String {
    if part == 0 || whole == 0 {
        return "0 %".to_owned();
    }
    if part == whole {
        return "100 %".to_owned();
    }
    let percent = part as f64 / whole as f64 * 100.0;
    if (99.95..100.0).contains(&percent) { ">99.9 %".to_owned() } else { format!("{} %", digits(percent, 3)) }
}

/// A measured number, four digits that matter: `0.01234`, `1.234e-9`.
pub(super) fn number(x: f64) -> String {
    if x == 0.0 || !x.is_finite() {
        return format!("{x}");
    }
    if (1e-4..1e6).contains(&x.abs()) { digits(x, 4) } else { format!("{x:.3e}") }
}

/// `x` with `n` digits that matter, without an exponent.
fn digits(x: f64, n: usize) -> String {
    // The exponent after rounding: 9.996 has its third digit where 10.0 has it.
    let rounded = format!("{x:.*e}", n - 1);
    let exponent = rounded.split_once('e').and_then(|(_, exponent)| exponent.parse().ok()).unwrap_or(0i32);
    format!("{x:.*}", (n as i32 - 1 - exponent).max(0) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(8_030_261_248), "8,030,261,248");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1000), "1.00 kB");
        assert_eq!(bytes(999_999), "1.00 MB");
        assert_eq!(bytes(16_060_556_376), "16.1 GB");
        assert_eq!(bytes(u64::MAX), "18.4 EB");
        assert_eq!(duration(Duration::from_millis(412)), "0.41 s");
        assert_eq!(duration(Duration::from_secs(123)), "2 min 3 s");
        assert_eq!(duration(Duration::from_secs(3720)), "1 h 2 min");
        assert_eq!(rate(3_000_000_000, Duration::from_secs(2)), "1.50 GB/s");
        assert_eq!(number(0.0123456), "0.01235");
        assert_eq!(number(-1.23456e-9), "-1.235e-9");
    }

    #[test]
    fn shares_are_those_of_the_paper() {
        assert_eq!(percent(1_376_256, 8_030_261_248), "0.0171 %");
        assert_eq!(percent(20 * 1_376_256, 8_030_261_248), "0.343 %");
        assert_eq!(percent(0, 5), "0 %");
        assert_eq!(percent(5, 5), "100 %");
        assert_eq!(percent(99_999, 100_000), ">99.9 %");
        assert_eq!(percent(1, 3), "33.3 %");
    }

    #[test]
    fn tables_align_numbers_right_and_print_no_control_bytes() {
        let mut table = Table::new(["kind", "n>"]);
        table.row(["q_proj".to_owned(), count(1000)]);
        table.row(["a\u{1b}[31m".to_owned(), count(7)]);
        assert_eq!(table.to_string(), "kind             n\nq_proj       1,000\na\\u{1b}[31m      7\n");
    }
}
