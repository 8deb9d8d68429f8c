//! Reports as text: lines, tables and readable numbers.

use std::{fmt, time::Duration};

use super::color::TITLE;
use crate::checkpoint::Printable;

/// Minimum width of a page, even on a narrower terminal.
pub(super) const MIN_WIDTH: usize = 80;
/// Maximum width of a page.
pub(super) const MAX_WIDTH: usize = 200;
/// Text columns do not shrink below this width.
const MIN_CELL: usize = 12;
/// Spaces between two columns.
const GAP: usize = 2;

/// How a page is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Layout {
    /// Columns that tables and facts must fit; `None` for no limit.
    pub(super) width: Option<usize>,
    pub(super) is_colored: bool,
}

/// A report as text for stdout.
#[derive(Default)]
pub(super) struct Page {
    parts: Vec<Part>,
    /// An empty line comes before the next part.
    is_section_over: bool,
}

enum Part {
    Blank,
    Line(String),
    Facts(Vec<(String, String)>),
    Table(Table),
}

impl Page {
    /// Adds a line. Text from files goes through [`Printable`] first.
    pub(super) fn line(&mut self, text: impl fmt::Display) {
        self.add(Part::Line(text.to_string()));
    }
    /// Adds an empty line before the next part, if there is one.
    pub(super) fn blank(&mut self) {
        self.is_section_over = !self.parts.is_empty();
    }
    /// Adds `name  value` lines, values aligned.
    pub(super) fn facts(&mut self, facts: &[(&str, String)]) {
        if !facts.is_empty() {
            let printable = |text: &str| Printable(text).to_string();
            self.add(Part::Facts(facts.iter().map(|(name, value)| (printable(name), printable(value))).collect()));
        }
    }
    /// Adds a table, unless it has no rows.
    pub(super) fn table(&mut self, table: Table) {
        if !table.rows.is_empty() {
            self.add(Part::Table(table));
        }
    }
    /// Adds a line that explains a word in the title of the table above.
    pub(super) fn legend(&mut self, text: &str) {
        self.line(format_args!("({text})"));
    }

    fn add(&mut self, part: Part) {
        if std::mem::take(&mut self.is_section_over) {
            self.parts.push(Part::Blank);
        }
        self.parts.push(part);
    }

    /// The whole text.
    pub(super) fn render(&self, layout: Layout) -> String {
        let mut text = String::new();
        for part in &self.parts {
            match part {
                Part::Blank => {}
                Part::Line(line) => text += line.trim_end(),
                Part::Facts(facts) => render_facts(facts, layout, &mut text),
                Part::Table(table) => table.render(layout, &mut text),
            }
            if matches!(part, Part::Blank | Part::Line(_)) {
                text.push('\n');
            }
        }
        text
    }
}

/// Writes facts; values that do not fit go on below themselves.
fn render_facts(facts: &[(String, String)], layout: Layout, text: &mut String) {
    let indent = facts.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0) + GAP;
    let room = layout.width.map_or(usize::MAX, |width| width.saturating_sub(indent).max(MIN_CELL));
    for (name, value) in facts {
        let mut column = 0;
        let mut line = format!("{name:<indent$}");
        for word in value.split(' ') {
            let length = word.chars().count();
            if column > 0 && column + 1 + length > room {
                *text += line.trim_end();
                text.push('\n');
                line = " ".repeat(indent);
                column = 0;
            } else if column > 0 || !line.ends_with("  ") {
                line.push(' ');
                column += 1;
            }
            line += word;
            column += length;
        }
        *text += line.trim_end();
        text.push('\n');
    }
}

/// Alignment of the cells of a column.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// Columns as wide as their cells. Cells may hold text from files, which is escaped.
pub(super) struct Table {
    head: Vec<String>,
    align: Vec<Align>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column titles. A title that ends with `>` is that of a column of numbers, aligned right.
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
    /// If it has not one cell per column.
    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        assert_eq!(N, self.align.len(), "a row has a cell for every column");
        self.rows.push(cells.iter().map(|cell| Printable(cell).to_string()).collect());
    }

    /// The width of each column: that of its longest cell, less where the table must fit.
    fn widths(&self, layout: Layout) -> Vec<usize> {
        let lines = || (!self.head.is_empty()).then_some(&self.head).into_iter().chain(&self.rows);
        let width = |column: usize| lines().map(|cells| cells[column].chars().count()).max().unwrap_or(0);
        let mut widths: Vec<usize> = (0..self.align.len()).map(width).collect();
        let Some(room) = layout.width else { return widths };
        let gaps = GAP * widths.len().saturating_sub(1);
        while widths.iter().sum::<usize>() + gaps > room {
            let shrinks = |&(column, width): &(usize, &usize)| self.align[column] == Align::Left && *width > MIN_CELL;
            let Some((widest, _)) = widths.iter().enumerate().filter(shrinks).max_by_key(|(_, width)| **width) else {
                break;
            };
            widths[widest] -= 1;
        }
        widths
    }

    fn render(&self, layout: Layout, text: &mut String) {
        let widths = self.widths(layout);
        let line = |cells: &[String]| {
            let mut line = String::new();
            for ((cell, align), &width) in cells.iter().zip(&self.align).zip(&widths) {
                let cell = shortened(cell, width);
                line += &match align {
                    Align::Left => format!("{cell:<width$}  "),
                    Align::Right => format!("{cell:>width$}  "),
                };
            }
            line.trim_end().to_owned()
        };
        if !self.head.is_empty() {
            let head = line(&self.head);
            *text += &if layout.is_colored { format!("{TITLE}{head}{TITLE:#}\n") } else { format!("{head}\n") };
        }
        for cells in &self.rows {
            *text += &line(cells);
            text.push('\n');
        }
    }
}

/// A cell cut to `width` characters at its beginning, since the end of a tensor's name identifies it.
fn shortened(cell: &str, width: usize) -> String {
    let length = cell.chars().count();
    match length > width {
        true => std::iter::once('…').chain(cell.chars().skip(length - width + 1)).collect(),
        false => cell.to_owned(),
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

/// Bytes in decimal units, as disks and download pages use them: `16.1 GB`.
pub(super) fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if n < 1000 {
        return format!("{n} B");
    }
    let mut scaled = n as f64 / 1e3;
    let mut unit = 0;
    // A value that would be printed as 1000 is 1 of the next unit.
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

/// `part` of `whole` in percent, with three significant digits: `0.0171 %`. Never 0 or 100 unless exact.
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

/// A measured number with four significant digits: `0.01234`, `1.234e-9`.
pub(super) fn number(x: f64) -> String {
    if x == 0.0 || !x.is_finite() {
        return format!("{x}");
    }
    if (1e-4..1e6).contains(&x.abs()) { digits(x, 4) } else { format!("{x:.3e}") }
}

/// `x` with `n` significant digits, without an exponent.
fn digits(x: f64, n: usize) -> String {
    // The exponent after rounding: 9.996 becomes 10.0.
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
        let mut page = Page::default();
        page.table(table);
        let text = page.render(Layout::default());
        assert_eq!(text, "kind             n\nq_proj       1,000\na\\u{1b}[31m      7\n");
        let colored = page.render(Layout { is_colored: true, ..Layout::default() });
        assert!(colored.starts_with("\u{1b}[1mkind             n\u{1b}[0m\n"), "{colored}");
    }

    #[test]
    fn pages_fit_the_terminal() {
        let mut table = Table::new(["tensor", "n>"]);
        table.row([format!("model.{}.down_proj.weight", "layers.0.".repeat(18)), count(1_000_000)]);
        let mut page = Page::default();
        page.table(table);
        page.blank();
        page.facts(&[("targets", "q_proj ".repeat(25)), ("size", "1 B".to_owned())]);
        for width in [MIN_WIDTH, 120, MAX_WIDTH] {
            let text = page.render(Layout { width: Some(width), is_colored: false });
            assert!(text.lines().all(|line| line.chars().count() <= width), "{text}");
            assert!(text.contains(".down_proj.weight  1,000,000\n") && text.contains('…') == (width < MAX_WIDTH));
            assert_eq!(text.matches("q_proj").count(), 25, "{text}");
            assert_eq!(text.contains("\n         q_proj"), width < MAX_WIDTH, "{text}");
        }
    }
}
