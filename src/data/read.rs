//! Reads a file of rows into a dataset.

use std::{ops::Range, path::Path};

use rayon::prelude::*;

use super::{
    Clock, DataError, Dataset, Template, Tokenizer,
    error::Failed,
    form::{Form, Text},
    jinja::Rendered,
    rows::{Row, RowReader},
};
use crate::checkpoint::Context;

/// Rows that are encoded at a time, and their bytes: the memory beyond the dataset.
const CHUNK_ROWS: usize = 1024;
const CHUNK_BYTES: usize = 4 << 20;

/// The supervised part of a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Loss {
    /// The response; in a conversation, the assistant messages.
    #[default]
    Response,
    /// Every token except the first.
    All,
}

/// Options for reading a dataset.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReadOptions {
    /// How rows are formatted as text.
    pub template: Template,
    /// The supervised part of a row.
    pub loss: Loss,
    /// Maximum number of tokens per example; the rest is cut off.
    pub max_length: usize,
    /// Maximum number of rows to read, from the start.
    pub limit: Option<u64>,
    /// The date that a chat template may use.
    pub clock: Clock,
}

/// Statistics of reading a file.
#[derive(Clone, PartialEq, Eq, Debug, Default, serde::Serialize)]
#[non_exhaustive]
pub struct DataReport {
    /// The file's name.
    pub name: String,
    /// The BLAKE3 of the whole file, as printed by `b3sum`.
    pub blake3: String,
    /// The format of the rows: `alpaca`, `commonsense`, `prompt/completion`, `messages`, `text`, or `file`.
    pub form: &'static str,
    /// Number of rows read.
    pub n_rows: u64,
    /// Number of resulting examples.
    pub n_examples: u64,
    /// Total number of tokens.
    pub n_tokens: u64,
    /// Number of supervised tokens.
    pub n_supervised: u64,
    /// Number of tokens of the longest example.
    pub longest: u64,
    /// Number of truncated rows.
    pub n_cut_rows: u64,
    /// Number of tokens removed from them.
    pub n_cut_tokens: u64,
    /// Rows left out because their response is empty, or because their messages exclude everything from supervision.
    pub n_empty: u64,
    /// Rows left out because no supervised token remains within the length limit.
    pub n_unsupervised: u64,
    /// Rows whose prompt would end inside a token if encoded with its response; prompt and response were encoded
    /// separately.
    pub n_apart: u64,
    /// Examples without a supervised end token. If this is all of them, the model does not learn to stop.
    pub n_without_stop: u64,
}

/// Reads a file of rows, a JSON array or JSON lines, as token ids.
///
/// Prompt and response are encoded together, as transformers users expect. If the result does not begin with the
/// tokens of the prompt alone, because a token would span both, they are encoded separately: at inference the model
/// sees the prompt alone, so it must be trained on exactly these tokens. The begin token is added if the tokenizer's
/// post-processor adds it; the end token is always added. A conversation is encoded as its chat template formats it.
/// If an answer has no supervised end token, a stop token right after it becomes supervised too; at the end of the
/// text, the end token is added.
///
/// Memory: the dataset, and a few megabytes of rows in flight. Threads: the current rayon pool; examples stay in file
/// order.
///
/// # Errors
/// [`DataError::BadRow`] for the first invalid row; [`DataError::Empty`] if none is left.
pub fn read_dataset(
    ctx: &Context<'_>,
    path: &Path,
    tokenizer: &Tokenizer,
    options: &ReadOptions,
) -> Result<(Dataset, DataReport), DataError> {
    if options.max_length < 2 {
        return Err(DataError::Usage(
            "an example needs at least two tokens: one for context and one to predict".to_owned(),
        ));
    }
    let (mut dataset, mut report) = (Dataset::new(), DataReport::default());
    let mut reader = FormReader::open(ctx, path, tokenizer, &options.template, options.clock, options.limit)?;
    while let Some(chunk) = reader.next_chunk()? {
        report.form = chunk.form.name();
        // One result per row, so that the first invalid row of the file is reported, whichever thread finishes first.
        let encoded: Vec<Result<Encoded, Failed>> =
            chunk.map(|form, row| encode(tokenizer, form.text(ctx, &row.fields, options.loss)?, options));
        for (row, encoded) in chunk.rows.iter().zip(encoded) {
            report.n_rows += 1;
            report.add(encoded.map_err(|failed| failed.at(path, row.place))?, &mut dataset);
        }
    }
    report.blake3 = reader.digest()?.to_hex().to_string();
    report.name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    report.n_examples = dataset.len() as u64;
    report.n_tokens = dataset.n_tokens();
    report.n_supervised = dataset.n_supervised();
    report.longest = dataset.longest() as u64;
    if dataset.is_empty() {
        let what = match report.n_rows {
            0 => "it contains no rows".to_owned(),
            n => format!(
                "none of its {n} rows has supervised tokens: {} have an empty or excluded response, {} have none within {} \
                 tokens",
                report.n_empty, report.n_unsupervised, options.max_length
            ),
        };
        return Err(DataError::Empty { path: path.to_owned(), what });
    }
    Ok((dataset, report))
}

impl DataReport {
    fn add(&mut self, encoded: Encoded, dataset: &mut Dataset) {
        self.n_apart += u64::from(encoded.is_apart);
        if encoded.n_cut > 0 {
            self.n_cut_rows += 1;
            self.n_cut_tokens += encoded.n_cut as u64;
        }
        if encoded.is_empty {
            self.n_empty += 1;
        } else if encoded.spans.iter().all(|span| span.end.min(encoded.tokens.len()) <= span.start.max(1)) {
            self.n_unsupervised += 1;
        } else {
            self.n_without_stop += u64::from(!encoded.has_stop);
            dataset.push_spans(&encoded.tokens, &encoded.spans);
        }
    }
}

/// Rows that are processed together.
pub(super) struct Chunk<'r> {
    /// Their form.
    pub form: &'r Form,
    /// The rows.
    pub rows: Vec<Row>,
}

impl Chunk<'_> {
    /// Maps each row, in order.
    pub(super) fn map<T: Send>(&self, make: impl Fn(&Form, &Row) -> T + Send + Sync) -> Vec<T> {
        self.rows.par_iter().map(|row| make(self.form, row)).collect()
    }
}

/// Reads rows in chunks; the first row determines their form.
pub(super) struct FormReader<'a> {
    ctx: &'a Context<'a>,
    path: &'a Path,
    rows: RowReader,
    left: u64,
    template: &'a Template,
    tokenizer: &'a Tokenizer,
    clock: Clock,
    form: Option<Form>,
    n_reported: u64,
}

impl<'a> FormReader<'a> {
    pub(super) fn open(
        ctx: &'a Context<'a>,
        path: &'a Path,
        tokenizer: &'a Tokenizer,
        template: &'a Template,
        clock: Clock,
        limit: Option<u64>,
    ) -> Result<Self, DataError> {
        let rows = RowReader::open(path)?;
        ctx.observer.begin("read data", rows.n_bytes());
        Ok(Self {
            ctx,
            path,
            rows,
            left: limit.unwrap_or(u64::MAX),
            template,
            tokenizer,
            clock,
            form: None,
            n_reported: 0,
        })
    }

    /// The next rows, at most [`CHUNK_ROWS`] and about [`CHUNK_BYTES`].
    pub(super) fn next_chunk(&mut self) -> Result<Option<Chunk<'_>>, DataError> {
        self.ctx.check()?;
        let (mut chunk, mut n_bytes) = (Vec::new(), 0);
        while chunk.len() < CHUNK_ROWS && n_bytes < CHUNK_BYTES && self.left > 0 {
            let Some(row) = self.rows.next_row()? else { break };
            self.left -= 1;
            n_bytes += row.n_bytes;
            chunk.push(row);
        }
        self.ctx.observer.advance(self.rows.n_bytes_read() - self.n_reported);
        self.n_reported = self.rows.n_bytes_read();
        let Some(first) = chunk.first() else { return Ok(None) };
        if self.form.is_none() {
            let form = Form::of(self.ctx, self.template, &first.fields, self.tokenizer, self.clock)?;
            let bad = |what| DataError::BadRow { path: self.path.to_owned(), place: first.place, what };
            self.form = Some(form.map_err(bad)?);
        }
        Ok(self.form.as_ref().map(|form| Chunk { form, rows: chunk }))
    }

    /// The BLAKE3 of the whole file, including what a row limit left unread.
    pub(super) fn digest(&mut self) -> Result<blake3::Hash, DataError> {
        self.rows.drain()?;
        Ok(self.rows.digest())
    }
}

/// A row as token ids.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Encoded {
    tokens: Vec<u32>,
    spans: Vec<Range<usize>>,
    n_cut: usize,
    is_apart: bool,
    is_empty: bool,
    /// Whether a supervised token is an end token.
    has_stop: bool,
}

fn encode(tokenizer: &Tokenizer, text: Text, options: &ReadOptions) -> Result<Encoded, Failed> {
    let mut encoded = match text {
        Text::EncodedPair { response, .. } if response.trim().is_empty() => {
            return Ok(Encoded { is_empty: true, ..Encoded::default() });
        }
        Text::EncodedPair { prompt, response } => {
            let EncodedPair { mut tokens, n_prompt, is_apart } = encode_pair(tokenizer, &prompt, &response)?;
            if !tokens.ends_with(tokenizer.ending()) {
                tokens.extend_from_slice(tokenizer.ending());
            }
            let supervised = if options.loss == Loss::All { 0..tokens.len() } else { n_prompt..tokens.len() };
            Encoded { tokens, spans: vec![supervised], is_apart, ..Encoded::default() }
        }
        Text::Marked(rendered) => {
            let (tokens, spans) = encode_marked(tokenizer, &rendered)?;
            let is_empty = rendered.spans.iter().all(Range::is_empty);
            Encoded { tokens, spans, is_empty, ..Encoded::default() }
        }
    };
    encoded.n_cut = encoded.tokens.len().saturating_sub(options.max_length);
    encoded.tokens.truncate(options.max_length);
    let supervised = encoded.spans.iter().map(|span| span.start..span.end.min(encoded.tokens.len()));
    encoded.has_stop =
        supervised.filter(|span| !span.is_empty()).any(|span| has_stop(tokenizer, &encoded.tokens[span]));
    Ok(encoded)
}

/// Encodes a complete text and converts its spans to token ranges, including the ends of answers (see
/// [`learn_to_stop`]).
pub(super) fn encode_marked(
    tokenizer: &Tokenizer,
    rendered: &Rendered,
) -> Result<(Vec<u32>, Vec<Range<usize>>), DataError> {
    let (mut tokens, places) = tokenizer.encode_with_offsets(&rendered.text)?;
    // A token that spans the start of a range belongs to the text before it.
    let index = |byte: usize| places.partition_point(|place| place.start < byte);
    let mut spans: Vec<Range<usize>> = rendered.spans.iter().map(|span| index(span.start)..index(span.end)).collect();
    learn_to_stop(tokenizer, &mut tokens, &mut spans);
    Ok((tokens, spans))
}

/// Extends the supervised spans so that every answer ends with an end token, if possible.
///
/// Some templates mark only an answer's content and write the end token after it: it becomes supervised too. Others
/// write none, because the next turn's marker ends an answer: after the last answer, at the end of the text, the end
/// token is added. If any other token follows, the template is left as it is.
fn learn_to_stop(tokenizer: &Tokenizer, tokens: &mut Vec<u32>, spans: &mut [Range<usize>]) {
    for i in 0..spans.len() {
        let Range { start, end } = spans[i];
        let follows_at_once = spans.get(i + 1).is_some_and(|next| next.start <= end);
        if start >= end || follows_at_once || has_stop(tokenizer, &tokens[start..end]) {
            continue;
        }
        match tokens.get(end) {
            Some(&next) if has_stop(tokenizer, &[next]) => spans[i].end += 1,
            Some(_) => {}
            None => {
                tokens.extend_from_slice(tokenizer.ending());
                spans[i].end = tokens.len();
            }
        }
    }
}

/// Whether one of these tokens is an end token.
fn has_stop(tokenizer: &Tokenizer, tokens: &[u32]) -> bool {
    tokens.iter().any(|token| tokenizer.stops().contains(token) || tokenizer.ending().contains(token))
}

/// A prompt and its continuation as token ids.
pub(super) struct EncodedPair {
    /// The prompt's tokens, with the tokenizer's prefix, then the response's tokens.
    pub tokens: Vec<u32>,
    pub n_prompt: usize,
    pub is_apart: bool,
}

/// Encodes a prompt and a response, such that the result begins with the tokens of the prompt alone.
pub(super) fn encode_pair(tokenizer: &Tokenizer, prompt: &str, response: &str) -> Result<EncodedPair, DataError> {
    let mut tokens = tokenizer.prefix().to_vec();
    if prompt.is_empty() {
        let n_prompt = tokens.len();
        tokens.extend(tokenizer.encode(response)?);
        return Ok(EncodedPair { tokens, n_prompt, is_apart: false });
    }
    let of_prompt = tokenizer.encode(prompt)?;
    let of_both = tokenizer.encode(&[prompt, response].concat())?;
    let n_prompt = tokens.len() + of_prompt.len();
    let is_apart = !of_both.starts_with(&of_prompt);
    if is_apart {
        tokens.extend(of_prompt);
        tokens.extend(tokenizer.encode(response)?);
    } else {
        tokens.extend(of_both);
    }
    Ok(EncodedPair { tokens, n_prompt, is_apart })
}
