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

/// Fields of a message that set whether it is supervised: 0 or false, 1 or true.
const WEIGHTS: [&str; 4] = ["weight", "train", "loss_mask", "trainable"];

/// A model's chat template.
pub(super) struct ChatTemplate {
    jinja: Jinja,
    specials: Vec<(String, String)>,
}

impl ChatTemplate {
    /// The chat template of a tokenizer.
    pub(super) fn of(ctx: &Context<'_>, tokenizer: &Tokenizer, clock: Clock) -> Result<Self, DataError> {
        let Some((path, source)) = tokenizer.chat_template() else {
            let what = "the model has no chat template: neither chat_template.jinja nor one in tokenizer_config.json";
            return Err(CheckpointError::bad_file(tokenizer.path(), what).into());
        };
        Ok(Self { jinja: Jinja::new(ctx, path, source, clock)?, specials: tokenizer.specials().to_vec() })
    }

    /// Renders a conversation, with the byte ranges that are supervised: the whole text, or the assistant messages,
    /// without messages that exclude themselves.
    ///
    /// If the template marks assistant text with `{% generation %}`, the marks are used. Otherwise an assistant turn
    /// is the difference between rendering the conversation up to and including it, and rendering the earlier turns
    /// with a generation prompt.
    pub(super) fn render(&self, ctx: &Context<'_>, row: &Map<String, Json>, loss: Loss) -> Result<Rendered, Failed> {
        let turns = turns(row, loss)?;
        let values = turns.iter().map(|turn| value(&Json::Object(turn.message.clone()))).collect();
        let conversation = Conversation { template: self, ctx, row, turns, values };
        let whole = conversation.first_turns(conversation.turns.len(), false)?;
        let spans = match loss {
            Loss::All => conversation.all_but_excluded(&whole.text)?,
            Loss::Response if self.jinja.has_generation => marked(&conversation.turns, &whole.spans)?,
            Loss::Response => conversation.answers(&whole.text)?,
        };
        Ok(Rendered { text: whole.text, spans })
    }
}

/// A message, and whether it is supervised.
struct Turn<'r> {
    message: &'r Map<String, Json>,
    is_assistant: bool,
    /// Whether the message excludes itself from supervision.
    is_excluded: bool,
}

/// A row being rendered.
struct Conversation<'r> {
    template: &'r ChatTemplate,
    ctx: &'r Context<'r>,
    row: &'r Map<String, Json>,
    turns: Vec<Turn<'r>>,
    /// The messages as template values.
    values: Vec<Value>,
}

impl Conversation<'_> {
    /// The whole text, without the excluded turns.
    fn all_but_excluded(&self, whole: &str) -> Result<Vec<Range<usize>>, Failed> {
        let (mut spans, mut begin) = (Vec::new(), 0);
        for (i, _) in self.turns.iter().enumerate().filter(|(_, turn)| turn.is_excluded) {
            let ruled_out = self.turn(i, whole)?;
            spans.push(begin..ruled_out.start.max(begin));
            begin = ruled_out.end;
        }
        spans.push(begin..whole.len());
        Ok(spans)
    }

    /// The assistant turns, without the excluded ones.
    fn answers(&self, whole: &str) -> Result<Vec<Range<usize>>, Failed> {
        let supervised = self.turns.iter().enumerate().filter(|(_, turn)| turn.is_assistant && !turn.is_excluded);
        supervised.map(|(i, _)| self.turn(i, whole)).collect()
    }

    /// The byte range of turn `i` in the whole conversation.
    fn turn(&self, i: usize, whole: &str) -> Result<Range<usize>, Failed> {
        let lost = || {
            Failed::Row(format!(
                "field \"messages\": the template changes the turns before message {i} when it follows, so its text \
                 cannot be located; mark it with {{% generation %}} in the template, or use --loss all"
            ))
        };
        let before = if i == 0 { String::new() } else { self.first_turns(i, false)?.text };
        if !whole.starts_with(&before) {
            return Err(lost());
        }
        // The prompt may contain more than the final answer keeps, such as an opened thinking block.
        let is_prompted = i > 0 && self.turns[i].is_assistant;
        let prompted = if is_prompted { self.first_turns(i, true)?.text } else { String::new() };
        let begin = common_prefix(&prompted, whole).max(before.len());
        if i + 1 == self.turns.len() {
            return Ok(begin..whole.len());
        }
        let with = self.first_turns(i + 1, false)?.text;
        if whole.starts_with(&with) && with.len() >= begin { Ok(begin..with.len()) } else { Err(lost()) }
    }

    /// Renders the first `n` turns.
    fn first_turns(&self, n: usize, prompt: bool) -> Result<Rendered, Failed> {
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

/// The ranges that a template marked, without the excluded turns.
fn marked(turns: &[Turn<'_>], spans: &[Range<usize>]) -> Result<Vec<Range<usize>>, Failed> {
    let answers: Vec<&Turn<'_>> = turns.iter().filter(|turn| turn.is_assistant).collect();
    if answers.iter().all(|turn| !turn.is_excluded) {
        return Ok(spans.to_vec());
    }
    if answers.len() != spans.len() {
        return Err(Failed::Row(format!(
            "field \"messages\": the template marks {} answers with {{% generation %}}, but there are {} assistant \
             messages, so the excluded ones cannot be located",
            spans.len(),
            answers.len()
        )));
    }
    let supervised = answers.iter().zip(spans).filter(|(turn, _)| !turn.is_excluded);
    Ok(supervised.map(|(_, span)| span.clone()).collect())
}

/// The supervised ranges of a row rendered with the user's template file: the marked ranges or the whole text, without
/// the messages that exclude themselves. If no message has such a field, rows may have any fields.
pub(super) fn supervised_of(
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
        Loss::All if turns.iter().any(|turn| turn.is_excluded) => Err(Failed::Row(
            "field \"messages\": some messages are excluded, but with --loss all a template file does not mark where they are"
                .to_owned(),
        )),
        Loss::All => Ok(vec![whole]),
    }
}

/// The messages of a row; each is an object with a role.
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
        None => return Err("role is missing".to_owned()),
    };
    let is_assistant = role == "assistant";
    let weight = weight(message)?;
    if let Some((name, true)) = weight
        && !is_assistant
        && loss == Loss::Response
    {
        return Err(format!(
            "{name}: it includes a message of the {role:?}; only assistant messages are supervised, or all with \
             --loss all"
        ));
    }
    Ok(Turn { message, is_assistant, is_excluded: matches!(weight, Some((_, false))) })
}

/// The supervision of a message, if it sets it, and the name of the field.
fn weight(message: &Map<String, Json>) -> Result<Option<(&'static str, bool)>, String> {
    let mut found: Option<(&'static str, bool)> = None;
    for name in WEIGHTS {
        let is_supervised = match message.get(name) {
            None | Some(Json::Null) => continue,
            Some(Json::Bool(is_supervised)) => *is_supervised,
            Some(Json::Number(number)) if number.as_f64() == Some(0.0) => false,
            Some(Json::Number(number)) if number.as_f64() == Some(1.0) => true,
            Some(Json::Number(number)) => return Err(format!("{name}: expected 0 or 1, found {number}")),
            Some(other) => return Err(format!("{name}: expected 0 or 1, true or false, found {}", kind(other))),
        };
        match found {
            Some((other, was_supervised)) if was_supervised != is_supervised => {
                return Err(format!("{name}: it contradicts {other}"));
            }
            Some(_) => {}
            None => found = Some((name, is_supervised)),
        }
    }
    Ok(found)
}

/// Length in bytes of the common prefix of two texts, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    let mut n = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    while !a.is_char_boundary(n) {
        n -= 1;
    }
    n
}
