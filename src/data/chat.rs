//! Conversations through a model's own chat template.

use std::ops::Range;

use minijinja::value::Value;
use serde_json::{Map, Value as Json};

use super::{
    Clock, DataError, Loss, Tokenizer,
    error::Failed,
    jinja::{Jinja, Rendered, value},
    rows::kind,
};
use crate::checkpoint::{CheckpointError, Context};

/// Fields of a message that say whether it is learned: 0 or false, 1 or true.
const WEIGHTS: [&str; 4] = ["weight", "train", "loss_mask", "trainable"];

/// A model's chat template.
pub(super) struct ChatTemplate {
    jinja: Jinja,
    specials: Vec<(String, String)>,
}

impl ChatTemplate {
    /// The template beside a tokenizer.
    pub(super) fn of(ctx: &Context<'_>, tokenizer: &Tokenizer, clock: Clock) -> Result<Self, DataError> {
        let Some((path, source)) = tokenizer.chat_template() else {
            let what = "the model has no chat template: neither chat_template.jinja nor one in tokenizer_config.json";
            return Err(CheckpointError::bad_file(tokenizer.path(), what).into());
        };
        Ok(Self { jinja: Jinja::new(ctx, path, source, clock)?, specials: tokenizer.specials().to_vec() })
    }

    /// A conversation as text, and the bytes of it that are learned: all, or what assistants say, without the messages that say
    /// themselves that they are not learned.
    ///
    /// A template that marks what assistants say with `{% generation %}` is believed. Else an assistant's turn is what rendering the
    /// conversation up to and with it adds to rendering what came before with a prompt for the assistant.
    pub(super) fn render(&self, ctx: &Context<'_>, row: &Map<String, Json>, loss: Loss) -> Result<Rendered, Failed> {
        let turns = turns(row, loss)?;
        let values = turns.iter().map(|turn| value(&Json::Object(turn.message.clone()))).collect();
        let conversation = Conversation { template: self, ctx, row, turns, values };
        let whole = conversation.some(conversation.turns.len(), false)?;
        let spans = match loss {
            Loss::All => conversation.all_but_ruled_out(&whole.text)?,
            Loss::Response if self.jinja.has_generation => marked(&conversation.turns, &whole.spans)?,
            Loss::Response => conversation.answers(&whole.text)?,
        };
        Ok(Rendered { text: whole.text, spans })
    }
}

/// A message, and what is learned of it.
struct Turn<'r> {
    message: &'r Map<String, Json>,
    is_assistant: bool,
    /// Whether it says itself that it is not learned.
    is_ruled_out: bool,
}

/// A row on its way through a template.
struct Conversation<'r> {
    template: &'r ChatTemplate,
    ctx: &'r Context<'r>,
    row: &'r Map<String, Json>,
    turns: Vec<Turn<'r>>,
    /// The messages.
    values: Vec<Value>,
}

impl Conversation<'_> {
    /// All of the text, without the turns that are ruled out.
    fn all_but_ruled_out(&self, whole: &str) -> Result<Vec<Range<usize>>, Failed> {
        let (mut spans, mut begin) = (Vec::new(), 0);
        for (i, _) in self.turns.iter().enumerate().filter(|(_, turn)| turn.is_ruled_out) {
            let ruled_out = self.turn(i, whole)?;
            spans.push(begin..ruled_out.start.max(begin));
            begin = ruled_out.end;
        }
        spans.push(begin..whole.len());
        Ok(spans)
    }

    /// What assistants say, without the turns that are ruled out.
    fn answers(&self, whole: &str) -> Result<Vec<Range<usize>>, Failed> {
        let learned = self.turns.iter().enumerate().filter(|(_, turn)| turn.is_assistant && !turn.is_ruled_out);
        learned.map(|(i, _)| self.turn(i, whole)).collect()
    }

    /// The bytes of turn `i` within the whole conversation.
    fn turn(&self, i: usize, whole: &str) -> Result<Range<usize>, Failed> {
        let lost = || {
            Failed::Row(format!(
                "field \"messages\": the template writes the turns before message {i} otherwise once it follows, so that \
                 its own text cannot be told; mark it with {{% generation %}} in the template, or learn all (--loss all)"
            ))
        };
        let before = if i == 0 { String::new() } else { self.some(i, false)?.text };
        if !whole.starts_with(&before) {
            return Err(lost());
        }
        // A prompt may open more than the answer keeps, such as a line for thoughts.
        let is_prompted = i > 0 && self.turns[i].is_assistant;
        let prompted = if is_prompted { self.some(i, true)?.text } else { String::new() };
        let begin = common_prefix(&prompted, whole).max(before.len());
        if i + 1 == self.turns.len() {
            return Ok(begin..whole.len());
        }
        let with = self.some(i + 1, false)?.text;
        if whole.starts_with(&with) && with.len() >= begin { Ok(begin..with.len()) } else { Err(lost()) }
    }

    /// The first `n` turns as text.
    fn some(&self, n: usize, prompt: bool) -> Result<Rendered, Failed> {
        let field = |name: &str| self.row.get(name).map_or(Value::from(()), value);
        let mut values: Vec<(&str, Value)> = vec![
            ("messages", self.values[..n].iter().cloned().collect()),
            ("tools", field("tools")),
            ("documents", field("documents")),
            ("add_generation_prompt", Value::from(prompt)),
        ];
        values.extend(self.template.specials.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str()))));
        if let Some(Json::Object(more)) = self.row.get("chat_template_kwargs") {
            values.extend(more.iter().map(|(name, json)| (name.as_str(), value(json))));
        }
        self.template.jinja.render(self.ctx, Value::from_pairs(values))
    }
}

/// What a template marked, without the turns that are ruled out.
fn marked(turns: &[Turn<'_>], spans: &[Range<usize>]) -> Result<Vec<Range<usize>>, Failed> {
    let answers: Vec<&Turn<'_>> = turns.iter().filter(|turn| turn.is_assistant).collect();
    if answers.iter().all(|turn| !turn.is_ruled_out) {
        return Ok(spans.to_vec());
    }
    if answers.len() != spans.len() {
        return Err(Failed::Row(format!(
            "field \"messages\": the template marks {} answers with {{% generation %}} where {} assistant messages are, so \
             that those that are not to be learned cannot be told",
            spans.len(),
            answers.len()
        )));
    }
    let learned = answers.iter().zip(spans).filter(|(turn, _)| !turn.is_ruled_out);
    Ok(learned.map(|(_, span)| span.clone()).collect())
}

/// What is learned of a row that a template of the user's own rendered: what it marked, or all, without the messages that say themselves
/// that they are not learned. Rows whose messages say nothing of it may have any fields.
pub(super) fn learned_of(
    row: &Map<String, Json>,
    loss: Loss,
    rendered: &Rendered,
) -> Result<Vec<Range<usize>>, Failed> {
    let whole = 0..rendered.text.len();
    let says_so = |message: &Json| WEIGHTS.iter().any(|name| message.get(name).is_some());
    if !matches!(row.get("messages"), Some(Json::Array(messages)) if messages.iter().any(says_so)) {
        return Ok(if loss == Loss::All { vec![whole] } else { rendered.spans.clone() });
    }
    let turns = turns(row, loss)?;
    match loss {
        Loss::Response => marked(&turns, &rendered.spans),
        Loss::All if turns.iter().any(|turn| turn.is_ruled_out) => Err(Failed::Row(
            "field \"messages\": some are not to be learned, and with --loss all a template file does not tell where they are"
                .to_owned(),
        )),
        Loss::All => Ok(vec![whole]),
    }
}

/// The messages of a row, each an object with a role.
fn turns(row: &Map<String, Json>, loss: Loss) -> Result<Vec<Turn<'_>>, String> {
    let messages = match row.get("messages") {
        Some(Json::Array(messages)) if messages.is_empty() => return Err("field \"messages\": it is empty".to_owned()),
        Some(Json::Array(messages)) => messages,
        Some(other) => return Err(format!("field \"messages\": expected an array, found {}", kind(other))),
        None => return Err("field \"messages\" is missing".to_owned()),
    };
    let turn = |(i, message)| turn(message, loss).map_err(|what| format!("field \"messages\": message {i}: {what}"));
    messages.iter().enumerate().map(turn).collect()
}

fn turn(message: &Json, loss: Loss) -> Result<Turn<'_>, String> {
    let Json::Object(message) = message else { return Err(format!("expected an object, found {}", kind(message))) };
    let role = match message.get("role") {
        Some(Json::String(role)) => role.as_str(),
        Some(other) => return Err(format!("role: expected a string, found {}", kind(other))),
        None => return Err("it has no role".to_owned()),
    };
    let is_assistant = role == "assistant";
    let weight = weight(message)?;
    if let Some((name, true)) = weight
        && !is_assistant
        && loss == Loss::Response
    {
        return Err(format!(
            "{name}: it asks to learn what the {role:?} says; of a conversation what assistants say is learned, or all \
             (--loss all)"
        ));
    }
    Ok(Turn { message, is_assistant, is_ruled_out: matches!(weight, Some((_, false))) })
}

/// What a message says of whether it is learned, and the field that says so.
fn weight(message: &Map<String, Json>) -> Result<Option<(&'static str, bool)>, String> {
    let mut found: Option<(&'static str, bool)> = None;
    for name in WEIGHTS {
        let is_learned = match message.get(name) {
            None | Some(Json::Null) => continue,
            Some(Json::Bool(is_learned)) => *is_learned,
            Some(Json::Number(number)) if number.as_f64() == Some(0.0) => false,
            Some(Json::Number(number)) if number.as_f64() == Some(1.0) => true,
            Some(Json::Number(number)) => return Err(format!("{name}: expected 0 or 1, found {number}")),
            Some(other) => return Err(format!("{name}: expected 0 or 1, true or false, found {}", kind(other))),
        };
        match found {
            Some((other, was_learned)) if was_learned != is_learned => {
                return Err(format!("{name}: it contradicts {other}"));
            }
            Some(_) => {}
            None => found = Some((name, is_learned)),
        }
    }
    Ok(found)
}

/// Bytes that two texts have in common from their start, whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    let mut n = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    while !a.is_char_boundary(n) {
        n -= 1;
    }
    n
}
