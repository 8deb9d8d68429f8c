//! From a file of rows to a dataset.

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

/// Rows that are encoded at a time, and their bytes: what is in memory beside the dataset.
const CHUNK_ROWS: usize = 1024;
const CHUNK_BYTES: usize = 4 << 20;

/// What is learned of a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Loss {
    /// The response alone; of a conversation, what assistants say.
    #[default]
    Response,
    /// Every token but the first.
    All,
}

/// How a file becomes a dataset.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReadOptions {
    /// How rows become text.
    pub template: Template,
    /// What is learned of a row.
    pub loss: Loss,
    /// Tokens that an example may have; what follows is cut.
    pub max_length: usize,
    /// Rows to read at most, from the start.
    pub limit: Option<u64>,
    /// The date that a chat template may ask for.
    pub clock: Clock,
}

/// What became of a file's rows.
#[derive(Clone, PartialEq, Eq, Debug, Default, serde::Serialize)]
#[non_exhaustive]
pub struct DataReport {
    /// The file's name.
    pub name: String,
    /// The BLAKE3 of the whole file, as `b3sum` prints it.
    pub blake3: String,
    /// How rows became text: `alpaca`, `commonsense`, `prompt/completion`, `messages`, `text`, or `file`.
    pub form: &'static str,
    /// Rows read.
    pub n_rows: u64,
    /// Examples made of them.
    pub n_examples: u64,
    /// Tokens of all examples.
    pub n_tokens: u64,
    /// Tokens that are learned.
    pub n_supervised: u64,
    /// Tokens of the longest example.
    pub longest: u64,
    /// Rows that were cut, and the tokens cut from them.
    pub n_cut_rows: u64,
    /// Tokens cut.
    pub n_cut_tokens: u64,
    /// Rows left out: their response is empty, or their messages say that nothing of it is learned.
    pub n_empty: u64,
    /// Rows left out: nothing that is learned is left within the length.
    pub n_unsupervised: u64,
    /// Rows whose prompt would end within a token, had it been encoded with its response: the two were encoded apart.
    pub n_apart: u64,
    /// Examples of which no token that ends a text is learned. Where that is every example, the model does not learn to stop.
    pub n_without_stop: u64,
}

/// Reads a file of rows, a JSON array or JSON lines, as token ids.
///
/// Prompt and response are encoded together, as transformers users expect. Where the tokens of the prompt alone are not
/// how that begins, since a token would reach across, the two are encoded apart: a model that answers sees the prompt
/// alone, and is to have learned from just these tokens. The begin token is added where the tokenizer's post-processor
/// adds it, the end token always. A conversation is encoded as its chat template wrote it; where no token that ends a text is
/// learned of an answer, the stop token right behind it is learned too, or, at the end of the text, the end token is added.
///
/// Memory: the dataset, and some megabytes of rows under way. Threads: those of the current rayon pool; the order of
/// examples is the file's.
///
/// # Errors
/// [`DataError::BadRow`] for the first row that is not what it should be; [`DataError::Empty`] where none is left.
pub fn read_dataset(
    ctx: &Context<'_>,
    path: &Path,
    tokenizer: &Tokenizer,
    options: &ReadOptions,
) -> Result<(Dataset, DataReport), DataError> {
    if options.max_length < 2 {
        return Err(DataError::Usage("an example needs two tokens at least: one to see and one to learn".to_owned()));
    }
    let (mut dataset, mut report) = (Dataset::new(), DataReport::default());
    let mut reader = FormReader::open(ctx, path, tokenizer, &options.template, options.clock, options.limit)?;
    while let Some(chunk) = reader.next_chunk()? {
        report.form = chunk.form.name();
        // Each row's own result, so that the first bad row of the file is told, whichever thread ended first.
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
            0 => "it holds no row".to_owned(),
            n => format!(
                "nothing is left to learn from its {n} rows: {} have an empty response or one that is ruled out, {} have none \
                 within {} tokens",
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

/// Rows that are worked on together.
pub(super) struct Chunk<'r> {
    /// Their form.
    pub form: &'r Form,
    /// The rows.
    pub rows: Vec<Row>,
}

impl Chunk<'_> {
    /// Makes something of each row, in their order.
    pub(super) fn map<T: Send>(&self, make: impl Fn(&Form, &Row) -> T + Send + Sync) -> Vec<T> {
        self.rows.par_iter().map(|row| make(self.form, row)).collect()
    }
}

/// Reads rows in chunks, and knows their form from the first.
pub(super) struct FormReader<'a> {
    ctx: &'a Context<'a>,
    path: &'a Path,
    rows: RowReader,
    left: u64,
    template: &'a Template,
    tokenizer: &'a Tokenizer,
    clock: Clock,
    form: Option<Form>,
    n_told: u64,
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
        Ok(Self { ctx, path, rows, left: limit.unwrap_or(u64::MAX), template, tokenizer, clock, form: None, n_told: 0 })
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
        self.ctx.observer.advance(self.rows.n_bytes_read() - self.n_told);
        self.n_told = self.rows.n_bytes_read();
        let Some(first) = chunk.first() else { return Ok(None) };
        if self.form.is_none() {
            let form = Form::of(self.ctx, self.template, &first.fields, self.tokenizer, self.clock)?;
            let bad = |what| DataError::BadRow { path: self.path.to_owned(), place: first.place, what };
            self.form = Some(form.map_err(bad)?);
        }
        Ok(self.form.as_ref().map(|form| Chunk { form, rows: chunk }))
    }

    /// The BLAKE3 of the whole file, what a limit left unread included.
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
    /// Whether a token that ends a text is learned.
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
            let learned = if options.loss == Loss::All { 0..tokens.len() } else { n_prompt..tokens.len() };
            Encoded { tokens, spans: vec![learned], is_apart, ..Encoded::default() }
        }
        Text::Marked(rendered) => {
            let (tokens, spans) = encode_marked(tokenizer, &rendered)?;
            let is_empty = rendered.spans.iter().all(Range::is_empty);
            Encoded { tokens, spans, is_empty, ..Encoded::default() }
        }
    };
    encoded.n_cut = encoded.tokens.len().saturating_sub(options.max_length);
    encoded.tokens.truncate(options.max_length);
    let learned = encoded.spans.iter().map(|span| span.start..span.end.min(encoded.tokens.len()));
    encoded.has_stop = learned.filter(|span| !span.is_empty()).any(|span| has_stop(tokenizer, &encoded.tokens[span]));
    Ok(encoded)
}

/// Encodes a text that is complete; of its spans, which tokens they are, the end of an answer included (see [`learn_to_stop`]).
pub(super) fn encode_marked(
    tokenizer: &Tokenizer,
    rendered: &Rendered,
) -> Result<(Vec<u32>, Vec<Range<usize>>), DataError> {
    let (mut tokens, places) = tokenizer.encode_with_places(&rendered.text)?;
    // Where a token reaches across the begin of a span it belongs to what comes before.
    let index = |byte: usize| places.partition_point(|place| place.start < byte);
    let mut spans: Vec<Range<usize>> = rendered.spans.iter().map(|span| index(span.start)..index(span.end)).collect();
    learn_to_stop(tokenizer, &mut tokens, &mut spans);
    Ok((tokens, spans))
}

/// Lets every answer end with a token that ends a text, where that can be.
///
/// Some templates mark an answer's content alone and write the end token behind it: it is learned too. Others write none, since the next
/// turn's marker ends an answer: behind the last answer, where the text ends, the end token is added. Where anything else follows, the
/// template means what it writes.
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

/// Whether one of these tokens ends a text.
fn has_stop(tokenizer: &Tokenizer, tokens: &[u32]) -> bool {
    tokens.iter().any(|token| tokenizer.stops().contains(token) || tokenizer.ending().contains(token))
}

/// A prompt and what follows it as token ids.
pub(super) struct EncodedPair {
    /// The prompt's, with what the tokenizer puts before a text, then the response's.
    pub tokens: Vec<u32>,
    pub n_prompt: usize,
    pub is_apart: bool,
}

/// Encodes a prompt and a response, so that the tokens of the prompt alone are how the whole begins.
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
