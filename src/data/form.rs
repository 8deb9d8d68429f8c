//! From the fields of a row to a prompt and a response.

use std::path::PathBuf;

use minijinja::value::Value;
use serde_json::{Map, Value as Json};

use super::{
    Clock, DataError, Loss, Tokenizer,
    chat::{ChatTemplate, learned_of},
    error::Failed,
    jinja::{Jinja, Rendered, value},
    rows::kind,
};
use crate::checkpoint::{CheckpointError, Context, read_whole};

/// A template written by a person.
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;

/// What every commonsense answer begins with.
pub(super) const COMMONSENSE_ANSWER: &str = "the correct answer is ";

/// How rows become text.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Template {
    /// By the fields of the first row: `messages`, `prompt` and `completion`, `text`, or `instruction`, which is
    /// `commonsense` where the output is `the correct answer is {answer}` and else `alpaca`.
    #[default]
    Auto,
    /// The prompt of Stanford Alpaca around `instruction` and `input`; `output` follows.
    Alpaca,
    /// `instruction` and a line end; `the correct answer is {answer}` follows.
    Commonsense,
    /// A Jinja file that sees the row's fields and the special tokens. What it puts in `{% generation %}` is learned; without
    /// that, it makes the prompt, and `output` or `completion` follows.
    File(PathBuf),
}

/// A row as text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Text {
    /// A prompt, then a response and an end token.
    EncodedPair { prompt: String, response: String },
    /// A text that is complete, special tokens included.
    Marked(Rendered),
}

/// Makes text of rows, all of one form.
pub(super) enum Form {
    Alpaca,
    Commonsense,
    EncodedPair,
    Plain,
    Chat(ChatTemplate),
    File { jinja: Jinja, specials: Vec<(String, String)> },
}

impl Form {
    /// The form of a file, by its first row.
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
                    "its fields [{}] are none of: messages; prompt and completion; instruction and output; text",
                    names.join(", ")
                )));
            }
        }))
    }

    /// Whether rows go through a template that writes answers itself, and marks them.
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

    /// The text of a row; the error names the field.
    pub(super) fn text(&self, ctx: &Context<'_>, row: &Map<String, Json>, loss: Loss) -> Result<Text, Failed> {
        let response = match self {
            Self::Chat(template) => return Ok(Text::Marked(template.render(ctx, row, loss)?)),
            Self::File { jinja, specials } if jinja.has_generation => {
                let mut rendered = jinja.render(ctx, values(row, specials))?;
                rendered.spans = learned_of(row, loss, &rendered)?;
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

    /// The prompt of a row alone, for a model to go on from.
    pub(super) fn prompt(&self, ctx: &Context<'_>, row: &Map<String, Json>) -> Result<String, Failed> {
        Ok(match self {
            Self::Alpaca => alpaca(field(row, "instruction")?, optional(row, "input")?),
            Self::Commonsense => match optional(row, "input")? {
                "" => format!("{}\n", field(row, "instruction")?),
                _ => return Err("field \"input\": the commonsense template has no place for it".to_owned().into()),
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

/// The prompt of Stanford Alpaca.
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

/// A field that holds a string.
pub(super) fn field<'a>(row: &'a Map<String, Json>, name: &str) -> Result<&'a str, String> {
    match row.get(name) {
        Some(Json::String(text)) => Ok(text),
        Some(other) => Err(format!("field \"{name}\": expected a string, found {}", kind(other))),
        None => Err(format!("field \"{name}\" is missing")),
    }
}

/// A field that may be missing or null.
fn optional<'a>(row: &'a Map<String, Json>, name: &str) -> Result<&'a str, String> {
    if matches!(row.get(name), None | Some(Json::Null)) { Ok("") } else { field(row, name) }
}

/// A field that holds a string, or a number as it is written.
pub(super) fn text_or_number(row: &Map<String, Json>, name: &str) -> Result<String, String> {
    match row.get(name) {
        Some(Json::Number(number)) => Ok(number.to_string()),
        _ => field(row, name).map(str::to_owned),
    }
}
