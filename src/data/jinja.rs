//! Jinja, as Hugging Face renders chat templates.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use minijinja::{
    Environment, Error, ErrorKind,
    syntax::SyntaxConfig,
    value::{Kwargs, Value, ValueKind},
};
use serde_json::Value as Json;

use super::{
    DataError,
    clock::Clock,
    error::Failed,
    watch::{Abandoned, Limits, Watched},
};
use crate::checkpoint::{CheckpointError, Context, Printable};

/// Limit on the work of one rendering, in minijinja's fuel: about one instruction or 64 bytes per unit. A conversation
/// of a hundred turns needs 1 % of it, and an endless loop stops within a second. It limits instructions and most of
/// their output; [`LIMITS`] limits what a single instruction can still do.
const FUEL: u64 = 1_000_000;

/// Templates in use have at most 30 kB.
const MAX_SOURCE_BYTES: usize = 128 << 10;

/// Limits for compiling a template, or rendering one row with it. Templates in use take milliseconds and less than a
/// megabyte.
const LIMITS: Limits = Limits { time: Duration::from_secs(10), n_bytes: 512 << 20 };

/// Maximum number of lists and objects that a template may print: nested references to the same list are small in
/// memory, but exponentially large in print.
const MAX_PRINTED: usize = 1 << 18;
const MAX_PRINTED_DEPTH: usize = 128;
const MAX_JSON_BYTES: usize = 16 << 20;

/// Delimiters of a `generation` block's text during rendering: noncharacters, which no text may contain.
const BEGIN: char = '\u{fdd0}';
const END: char = '\u{fdd1}';

/// A compiled template.
pub(super) struct Jinja {
    /// The template file.
    path: PathBuf,
    env: Arc<Environment<'static>>,
    watched: Watched,
    limits: Limits,
    /// Whether it marks supervised text in `{% generation %}` blocks.
    pub has_generation: bool,
}

/// The text that a template rendered for a row.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Rendered {
    /// The text.
    pub text: String,
    /// The byte ranges that came from `{% generation %}` blocks.
    pub spans: Vec<Range<usize>>,
}

impl Jinja {
    /// Compiles a template; its `strftime_now` returns `clock`.
    pub(super) fn new(ctx: &Context<'_>, path: &Path, source: &str, clock: Clock) -> Result<Self, DataError> {
        Self::within(LIMITS, ctx, path, source, clock)
    }

    fn within(limits: Limits, ctx: &Context<'_>, path: &Path, source: &str, clock: Clock) -> Result<Self, DataError> {
        let bad = |what: String| DataError::from(CheckpointError::bad_file(path, what));
        if source.len() > MAX_SOURCE_BYTES {
            return Err(bad(format!("a template of {} bytes, at most {MAX_SOURCE_BYTES} are accepted", source.len())));
        }
        let watched = Watched::new(limits)?;
        let source = source.to_owned();
        let compiled = watched.run(ctx, move || compile(&source, clock));
        let compiled = compiled.map_err(|why| abandoned(path, limits, why))?;
        let (env, has_generation) = compiled.map_err(bad)?;
        Ok(Self { path: path.to_owned(), env: Arc::new(env), watched, limits, has_generation })
    }

    /// Renders a row's values, within [`LIMITS`].
    ///
    /// # Errors
    /// [`Failed::Row`] if the template rejects the row; otherwise the template is invalid, or the user stopped the
    /// command.
    pub(super) fn render(&self, ctx: &Context<'_>, values: Value) -> Result<Rendered, Failed> {
        let env = Arc::clone(&self.env);
        let rendered = self.watched.run(ctx, move || render(&env, values));
        Ok(rendered.map_err(|why| abandoned(&self.path, self.limits, why))??)
    }
}

/// The error for a template whose evaluation was abandoned.
fn abandoned(path: &Path, limits: Limits, why: Abandoned) -> DataError {
    let what = match why {
        Abandoned::Cancelled => return CheckpointError::Cancelled.into(),
        Abandoned::TooLong => format!("the template takes more than {} s for one row", limits.time.as_secs_f64()),
        Abandoned::TooLarge => {
            format!("the template takes more than {} MiB of memory for one row", limits.n_bytes >> 20)
        }
        Abandoned::Panicked => "the template engine fails on this template".to_owned(),
    };
    CheckpointError::bad_file(path, what).into()
}

/// The compiled template, and whether it has `{% generation %}` blocks.
fn compile(source: &str, clock: Clock) -> Result<(Environment<'static>, bool), String> {
    let mut env = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    env.set_syntax(syntax.build().map_err(message)?);
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_formatter(|out, state, value| {
        let mut budget = MAX_PRINTED;
        measure(value, 0, &mut budget)?;
        minijinja::escape_formatter(out, state, value)
    });
    env.add_filter("tojson", to_json);
    env.add_filter("generation", |text: String| format!("{BEGIN}{text}{END}"));
    env.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", move |format: String| clock.format(&format));
    let (source, has_generation) = generation_as_filter(source);
    env.add_template_owned("template", source).map_err(message)?;
    Ok((env, has_generation))
}

fn render(env: &Environment<'static>, values: Value) -> Result<Rendered, String> {
    let template = env.get_template("template").map_err(message)?;
    let marked = template.render(values).map_err(message)?;
    let (mut text, mut spans, mut begin) = (String::with_capacity(marked.len()), Vec::new(), None);
    for c in marked.chars() {
        match (c, begin) {
            (BEGIN, None) => begin = Some(text.len()),
            (END, Some(start)) => {
                spans.push(start..text.len());
                begin = None;
            }
            (BEGIN | END, _) => return Err("nested generation blocks, or U+FDD0 in the text".to_owned()),
            _ => text.push(c),
        }
    }
    Ok(Rendered { text, spans })
}

/// Checks that a value is small enough to be printed.
fn measure(value: &Value, depth: usize, budget: &mut usize) -> Result<(), Error> {
    let is_map = value.kind() == ValueKind::Map;
    if !is_map && value.kind() != ValueKind::Seq {
        return Ok(());
    }
    let too_large = || Error::new(ErrorKind::InvalidOperation, "a list or an object is too large to be printed");
    if depth > MAX_PRINTED_DEPTH {
        return Err(too_large());
    }
    for item in value.try_iter()? {
        *budget = budget.checked_sub(1).ok_or_else(too_large)?;
        let item = if is_map { value.get_item(&item)? } else { item };
        measure(&item, depth + 1, budget)?;
    }
    Ok(())
}

/// minijinja's error as one line.
fn message(error: Error) -> String {
    let place = error.line().map_or(String::new(), |line| format!("template line {line}: "));
    // The detail comes from the template, for instance through `raise_exception`, and may contain anything.
    let detail = error.detail().map(|detail| Printable(detail).to_string());
    match (error.kind(), detail) {
        (ErrorKind::OutOfFuel, _) => format!("{place}the template runs for too long"),
        (ErrorKind::InvalidOperation, Some(detail)) => format!("{place}{detail}"),
        (kind, Some(detail)) => format!("{place}{kind}: {detail}"),
        (kind, None) => format!("{place}{kind}"),
    }
}

/// Rewrites `{% generation %}`, Hugging Face's own tag, as a filter block, which has the same syntax and whitespace
/// rules.
fn generation_as_filter(source: &str) -> (String, bool) {
    let (mut out, mut rest, mut found) = (String::with_capacity(source.len()), source, false);
    while let Some(at) = rest.find("{%") {
        let after = &rest[at + 2..];
        let body = after.trim_start_matches(['-', '+']).trim_start();
        let (word, replacement) = match body {
            body if body.starts_with("generation") => ("generation", "filter generation"),
            body if body.starts_with("endgeneration") => ("endgeneration", "endfilter"),
            _ => {
                out += &rest[..at + 2];
                rest = after;
                continue;
            }
        };
        let tail = &body[word.len()..];
        out += &rest[..rest.len() - body.len()];
        rest = tail;
        if tail.trim_start().trim_start_matches(['-', '+']).starts_with("%}") {
            out += replacement;
            found = true;
        } else {
            out += word;
        }
    }
    (out + rest, found)
}

/// Converts JSON to a template value.
pub(super) fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => Value::from(n),
            (None, Some(n)) => Value::from(n),
            (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(value).collect(),
        Json::Object(fields) => Value::from_pairs(fields.iter().map(|(name, field)| (name.as_str(), value(field)))),
    }
}

/// Python's `json.dumps`, with the options that Hugging Face exposes to templates.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson takes two separators")),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let style = Style {
        indent,
        item,
        key,
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorted: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let mut out = String::new();
    style.write(value, 0, &mut out)?;
    Ok(Value::from(out))
}

struct Style {
    indent: Option<usize>,
    item: String,
    key: String,
    ascii: bool,
    sorted: bool,
}

impl Style {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        if depth > MAX_PRINTED_DEPTH || out.len() > MAX_JSON_BYTES {
            return Err(Error::new(ErrorKind::InvalidOperation, "too large for tojson"));
        }
        match value.kind() {
            ValueKind::None => *out += "null",
            ValueKind::Bool => *out += if value.is_true() { "true" } else { "false" },
            ValueKind::Number if value.is_integer() => *out += &value.to_string(),
            ValueKind::Number => *out += &python_float(f64::try_from(value.clone())?),
            ValueKind::String => self.write_text(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.map(|item| ("".to_owned(), item));
                self.write_all(['[', ']'], items, depth, out)?;
            }
            ValueKind::Map => {
                let mut fields = Vec::new();
                for key in value.try_iter()? {
                    let field = value.get_item(&key)?;
                    let mut name = String::new();
                    self.write_text(&key.to_string(), &mut name);
                    fields.push((name + &self.key, field));
                }
                if self.sorted {
                    fields.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.write_all(['{', '}'], fields.into_iter(), depth, out)?;
            }
            kind => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson cannot write {kind}"))),
        }
        Ok(())
    }

    fn write_all(
        &self,
        brackets: [char; 2],
        items: impl Iterator<Item = (String, Value)>,
        depth: usize,
        out: &mut String,
    ) -> Result<(), Error> {
        let line = |depth: usize| self.indent.map_or(String::new(), |n| format!("\n{}", " ".repeat(n.min(64) * depth)));
        out.push(brackets[0]);
        let mut is_empty = true;
        for (key, item) in items {
            if !std::mem::take(&mut is_empty) {
                *out += &self.item;
            }
            *out += &line(depth + 1);
            *out += &key;
            self.write(&item, depth + 1, out)?;
        }
        if !is_empty {
            *out += &line(depth);
        }
        out.push(brackets[1]);
        Ok(())
    }

    fn write_text(&self, text: &str, out: &mut String) {
        let quoted = Json::from(text).to_string();
        if !self.ascii {
            *out += &quoted;
            return;
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                out.push(c);
            } else {
                out.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
            }
        }
    }
}

/// Formats a float like Python: `1.0`, `1e-05`, `1e+16`.
fn python_float(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() {
            "NaN"
        } else if x > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_owned();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = x.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, json: Json) -> Result<Rendered, String> {
        let ctx = Context::default();
        let message = |e: DataError| e.to_string().replace("my.jinja: ", "");
        let template = Jinja::new(&ctx, Path::new("my.jinja"), source, Clock::new(0)).map_err(message)?;
        template.render(&ctx, value(&json)).map_err(|failed| match failed {
            Failed::Row(what) => what,
            Failed::Other(error) => message(error),
        })
    }

    fn text(source: &str, json: Json) -> String {
        render(source, json).expect("a good template").text
    }

    #[test]
    fn blocks_take_their_lines_with_them() {
        assert_eq!(
            text("{% if true %}\n  {% for x in xs %}\n{{ x }}\n  {% endfor %}\n{% endif %}\n", json!({"xs": [1, 2]})),
            "1\n2\n"
        );
        assert_eq!(
            text(
                "{%- for x in xs %}{% if loop.first %}{% continue %}{% endif %}{{ x }}{% endfor %}\n",
                json!({"xs": [1, 2]})
            ),
            "2"
        );
    }

    #[test]
    fn python_methods_are_available() {
        let values = json!({"m": {"content": " <think>x</think>\nyes ", "n": null}});
        let source = "{{ m.get('z', 'd') }}{{ m.content.split('</think>')[-1].strip() }}{{ m.content.startswith(' <') }}{{ m.n is none }}";
        assert_eq!(text(source, values), "dyesTrueTrue");
    }

    #[test]
    fn json_is_written_as_by_python() {
        let values = json!({"x": {"b": ["é<\"\n", 1, 1.0, 1e16, 0.00001, true, null], "a": {}, "c": []}});
        assert_eq!(
            text("{{ x | tojson }}", values.clone()),
            r#"{"b": ["é<\"\n", 1, 1.0, 1e+16, 1e-05, true, null], "a": {}, "c": []}"#
        );
        assert_eq!(
            text("{{ x.b[:2] | tojson(indent=2) }}{{ x.b[0] | tojson(ensure_ascii=true) }}", values.clone()),
            "[\n  \"é<\\\"\\n\",\n  1\n]\"\\u00e9<\\\"\\n\""
        );
        assert_eq!(
            text("{{ x | tojson(sort_keys=true, separators=(',', ':')) }}", values),
            r#"{"a":{},"b":["é<\"\n",1,1.0,1e+16,1e-05,true,null],"c":[]}"#
        );
    }

    #[test]
    fn generation_blocks_mark_supervised_text() {
        let source = "{% for m in ms %}<{{ m.r }}>{% if m.r == 'a' %}{% generation %}{{ m.c }}!{% endgeneration %}\n\n{% else %}{{ m.c }}{%- endif %}{% endfor %}";
        let rendered =
            render(source, json!({"ms": [{"r": "u", "c": "hé"}, {"r": "a", "c": "yes"}, {"r": "a", "c": ""}]}));
        let rendered = rendered.expect("a good template");
        assert_eq!(rendered.text, "<u>hé<a>yes!\n<a>!\n");
        let supervised: Vec<&str> = rendered.spans.iter().map(|span| &rendered.text[span.clone()]).collect();
        assert_eq!(supervised, ["yes!", "!"]);
        assert!(!generation_as_filter("{% set generation = 1 %}{{ generation }}").1);
    }

    #[test]
    fn templates_fail_with_a_message() {
        for (source, expected) in [
            ("a\n{{ raise_exception('roles must alternate') }}", "template line 2: roles must alternate"),
            ("{% if %}", "template line 1: syntax error: "),
            ("{{ x.y.z }}", "template line 1: undefined value"),
            ("{{ none.foo() }}", "template line 1: unknown method"),
            ("{{ raise_exception('x\u{1b}[31m\nhint: y') }}", "template line 1: x\\u{1b}[31m\\nhint: y"),
        ] {
            let found = render(source, json!({})).expect_err("a bad template");
            assert!(found.starts_with(expected), "{found}");
        }
    }

    #[test]
    fn a_template_that_loops_forever_is_stopped() {
        for source in [
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "{{ 'x' * 99999999999 }}",
        ] {
            assert!(render(source, json!({})).is_err(), "{source}");
        }
    }
}
