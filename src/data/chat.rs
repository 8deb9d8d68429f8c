//! Conversations through a model's own chat template.

use std::ops::Range;

use minijinja::value::Value;
use serde_json::{Map, Value as Json};

use super::{
    Clock, DataError, Loss, Tokenizer,
    jinja::{Jinja, Rendered, value},
    rows::kind,
};
use crate::checkpoint::CheckpointError;

/// A model's chat template.
pub(super) struct ChatTemplate {
    jinja: Jinja,
    specials: Vec<(String, String)>,
}

impl ChatTemplate {
    /// The template beside a tokenizer.
    pub(super) fn of(tokenizer: &Tokenizer, clock: Clock) -> Result<Self, DataError> {
        let Some((path, source)) = tokenizer.chat_template() else {
            let what = "the model has no chat template: neither chat_template.jinja nor one in tokenizer_config.json";
            return Err(CheckpointError::bad_file(tokenizer.path(), what).into());
        };
        let jinja = Jinja::new(source, clock).map_err(|what| CheckpointError::bad_file(path, what))?;
        Ok(Self { jinja, specials: tokenizer.specials().to_vec() })
    }

    /// A conversation as text, and the bytes of it that are learned: all, or what assistants say.
    ///
    /// A template that marks them with `{% generation %}` is believed. Else an assistant's turn is what rendering the
    /// conversation up to and with it adds to rendering what came before with a prompt for the assistant.
    pub(super) fn render(&self, row: &Map<String, Json>, loss: Loss) -> Result<Rendered, String> {
        let messages = messages(row)?;
        let values: Vec<Value> = messages.iter().map(|message| value(&Json::Object((*message).clone()))).collect();
        let whole = self.render_some(row, &values, false)?;
        if loss == Loss::All {
            let all = 0..whole.text.len();
            return Ok(Rendered { spans: vec![all], ..whole });
        }
        if self.jinja.has_generation {
            return Ok(whole);
        }
        let mut spans = Vec::new();
        for i in (0..messages.len()).filter(|&i| messages[i].get("role").and_then(Json::as_str) == Some("assistant")) {
            spans.push(self.turn(row, &values, i, &whole.text)?);
        }
        Ok(Rendered { text: whole.text, spans })
    }

    /// The bytes of turn `i` within the whole conversation.
    fn turn(&self, row: &Map<String, Json>, values: &[Value], i: usize, whole: &str) -> Result<Range<usize>, String> {
        let lost = || {
            format!(
                "field \"messages\": the template writes the turns before message {i} otherwise once it follows, so that \
                 its own text cannot be told; mark it with {{% generation %}} in the template, or learn all (--loss all)"
            )
        };
        let before = if i == 0 { String::new() } else { self.render_some(row, &values[..i], false)?.text };
        let prompted = if i == 0 { String::new() } else { self.render_some(row, &values[..i], true)?.text };
        if !whole.starts_with(&before) {
            return Err(lost());
        }
        // A prompt may open more than the answer keeps, such as a line for thoughts.
        let begin = common_prefix(&prompted, whole).max(before.len());
        if i + 1 == values.len() {
            return Ok(begin..whole.len());
        }
        let with = self.render_some(row, &values[..=i], false)?.text;
        if whole.starts_with(&with) && with.len() >= begin { Ok(begin..with.len()) } else { Err(lost()) }
    }

    fn render_some(&self, row: &Map<String, Json>, messages: &[Value], prompt: bool) -> Result<Rendered, String> {
        let field = |name: &str| row.get(name).map_or(Value::from(()), value);
        let mut values: Vec<(&str, Value)> = vec![
            ("messages", messages.iter().cloned().collect()),
            ("tools", field("tools")),
            ("documents", field("documents")),
            ("add_generation_prompt", Value::from(prompt)),
        ];
        values.extend(self.specials.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str()))));
        if let Some(Json::Object(more)) = row.get("chat_template_kwargs") {
            values.extend(more.iter().map(|(name, json)| (name.as_str(), value(json))));
        }
        self.jinja.render(Value::from_pairs(values))
    }
}

/// The messages of a row, each an object with a role.
fn messages(row: &Map<String, Json>) -> Result<Vec<&Map<String, Json>>, String> {
    let messages = match row.get("messages") {
        Some(Json::Array(messages)) if messages.is_empty() => return Err("field \"messages\": it is empty".to_owned()),
        Some(Json::Array(messages)) => messages,
        Some(other) => return Err(format!("field \"messages\": expected an array, found {}", kind(other))),
        None => return Err("field \"messages\" is missing".to_owned()),
    };
    let mut all = Vec::with_capacity(messages.len());
    for (i, message) in messages.iter().enumerate() {
        let Json::Object(message) = message else {
            return Err(format!("field \"messages\": message {i}: expected an object, found {}", kind(message)));
        };
        match message.get("role") {
            Some(Json::String(_)) => all.push(message),
            Some(other) => {
                let found = kind(other);
                return Err(format!("field \"messages\": message {i}: role: expected a string, found {found}"));
            }
            None => return Err(format!("field \"messages\": message {i}: it has no role")),
        }
    }
    Ok(all)
}

/// Bytes that two texts have in common from their start, whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    let mut n = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    while !a.is_char_boundary(n) {
        n -= 1;
    }
    n
}
