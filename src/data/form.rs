//! Formats the fields of a row as a prompt and a response.

use std::path::PathBuf;

use minijinja::value::Value;
use serde_json::{Map, Value as Json};

use super::{
    Clock, DataError, Loss, Tokenizer,
    chat::{ChatTemplate, supervised_of},
    error::Failed,
    jinja::{Jinja, Rendered, value},
    rows::kind,
};
use crate::checkpoint::{CheckpointError, Context, read_whole};

/// Maximum size of a template file.
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;

/// The prefix of every commonsense answer.
pub(super) const COMMONSENSE_ANSWER: &str = "the correct answer is ";

/// How rows are formatted as text.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Template {
    /// Chosen by the fields of the first row: `messages`, `prompt` and `completion`, `text`, or `instruction`. The
    /// last is `commonsense` if the output is `the correct answer is {answer}`, otherwise `alpaca`.
    #[default]
    Auto,
    /// The Stanford Alpaca prompt with `instruction` and `input`; followed by `output`.
    Alpaca,
    /// `instruction` and a line break; followed by `the correct answer is {answer}`.
    Commonsense,
    /// A Jinja file with access to the row's fields and the special tokens. Text in `{% generation %}` is supervised.
    /// Without such a block, the template gives the prompt, followed by `output` or `completion`.
    File(PathBuf),
}

/// A formatted row.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Text {
    /// A prompt, then a response and an end token.
    EncodedPair { prompt: String, response: String },
    /// A complete text, special tokens included.
    Marked(Rendered),
}

/// Formats rows of one form.
pub(super) enum Form {
    Alpaca,
    Commonsense,
    EncodedPair,
    Plain,
    Chat(ChatTemplate),
    File { jinja: Jinja, specials: Vec<(String, String)> },
}

impl Form {
    /// The form of a file, chosen by its first row.
    pub(super) fn of(
        ctx: &Context<'_>,
        template: &Template,
        first: &Map<String, Json>,
        tokenizer: &Tokenizer,
        clock: Clock,
    ) -> Result<Result<Self, String>, DataError> {
        let has = |name: &str| first.contains_key(name);
        Ok(Ok(match template {
            Template::Alpaca => Self::Alpaca,
            Template::Commonsense => Self::Commonsense,
            Template::File(path) => {
                let source = String::from_utf8(read_whole(path, MAX_TEMPLATE_BYTES)?).map_err(|e| {
                    CheckpointError::bad_file(path, format!("not UTF-8, at byte {}", e.utf8_error().valid_up_to()))
                })?;
                let specials = tokenizer.specials().to_vec();
                Self::File { jinja: Jinja::new(ctx, path, &source, clock)?, specials }
            }
            Template::Auto if has("messages") => Self::Chat(ChatTemplate::of(ctx, tokenizer, clock)?),
            Template::Auto if has("prompt") && has("completion") => Self::EncodedPair,
            Template::Auto if has("instruction") => {
                let answer = text_or_number(first, "answer").unwrap_or_default();
                let output = first.get("output").and_then(Json::as_str).unwrap_or_default();
                let is_commonsense = output.strip_prefix(COMMONSENSE_ANSWER) == Some(&*answer);
                if is_commonsense { Self::Commonsense } else { Self::Alpaca }
            }
            Template::Auto if has("text") => Self::Plain,
            Template::Auto => {
                let names: Vec<&str> = first.keys().map(String::as_str).collect();
                return Ok(Err(format!(
                    "its fields [{}] match none of: messages; prompt and completion; instruction and output; text",
                    names.join(", ")
                )));
            }
        }))
    }

    /// Whether the template itself writes and marks the answers.
    pub(super) fn writes_answers(&self) -> bool {
        matches!(self, Self::File { jinja, .. } if jinja.has_generation)
    }

    /// Its name in reports.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Alpaca => "alpaca",
            Self::Commonsense => "commonsense",
            Self::EncodedPair => "prompt/completion",
            Self::Plain => "text",
            Self::Chat(_) => "messages",
            Self::File { .. } => "file",
        }
    }

    /// The formatted text of a row; the error names the field.
    pub(super) fn text(&self, ctx: &Context<'_>, row: &Map<String, Json>, loss: Loss) -> Result<Text, Failed> {
        let response = match self {
            Self::Chat(template) => return Ok(Text::Marked(template.render(ctx, row, loss)?)),
            Self::File { jinja, specials } if jinja.has_generation => {
                let mut rendered = jinja.render(ctx, values(row, specials))?;
                rendered.spans = supervised_of(row, loss, &rendered)?;
                return Ok(Text::Marked(rendered));
            }
            Self::Alpaca => field(row, "output")?.to_owned(),
            Self::Commonsense => format!("{COMMONSENSE_ANSWER}{}", text_or_number(row, "answer")?),
            Self::EncodedPair => field(row, "completion")?.to_owned(),
            Self::Plain => field(row, "text")?.to_owned(),
            Self::File { .. } if row.contains_key("completion") => field(row, "completion")?.to_owned(),
            Self::File { .. } => field(row, "output")?.to_owned(),
        };
        Ok(Text::EncodedPair { prompt: self.prompt(ctx, row)?, response })
    }

    /// Only the prompt of a row, for generation.
    pub(super) fn prompt(&self, ctx: &Context<'_>, row: &Map<String, Json>) -> Result<String, Failed> {
        Ok(match self {
            Self::Alpaca => alpaca(field(row, "instruction")?, optional(row, "input")?),
            Self::Commonsense => match optional(row, "input")? {
                "" => format!("{}\n", field(row, "instruction")?),
                _ => return Err("field \"input\": the commonsense template does not use it".to_owned().into()),
            },
            Self::EncodedPair => field(row, "prompt")?.to_owned(),
            Self::Plain => String::new(),
            Self::File { jinja, specials } if !jinja.has_generation => jinja.render(ctx, values(row, specials))?.text,
            Self::Chat(_) | Self::File { .. } => {
                return Err("this form of rows has no prompt of its own".to_owned().into());
            }
        })
    }
}

/// The Stanford Alpaca prompt.
fn alpaca(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        return format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Response:\n"
        );
    }
    format!(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response \
         that appropriately completes the request.\n\n\
         ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    )
}

fn values(row: &Map<String, Json>, specials: &[(String, String)]) -> Value {
    let specials = specials.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str())));
    Value::from_pairs(specials.chain(row.iter().map(|(name, json)| (name.as_str(), value(json)))))
}

/// A string field.
pub(super) fn field<'a>(row: &'a Map<String, Json>, name: &str) -> Result<&'a str, String> {
    match row.get(name) {
        Some(Json::String(text)) => Ok(text),
        Some(other) => Err(format!("field \"{name}\": expected a string, found {}", kind(other))),
        None => Err(format!("field \"{name}\" is missing")),
    }
}

/// A string field that may be missing or null.
fn optional<'a>(row: &'a Map<String, Json>, name: &str) -> Result<&'a str, String> {
    if matches!(row.get(name), None | Some(Json::Null)) { Ok("") } else { field(row, name) }
}

/// A string field, or a number as it is written.
pub(super) fn text_or_number(row: &Map<String, Json>, name: &str) -> Result<String, String> {
    match row.get(name) {
        Some(Json::Number(number)) => Ok(number.to_string()),
        _ => field(row, name).map(str::to_owned),
    }
}
