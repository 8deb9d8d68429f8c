//! Questions with known answers, and the published rules for scoring a model's answers.

use std::path::Path;

use serde_json::{Map, Value as Json};

use super::{
    DataError, Loss, ReadOptions, Template, Tokenizer,
    error::Failed,
    form::{COMMONSENSE_ANSWER, Form, Text, field, text_or_number},
    read::{FormReader, encode_marked, encode_pair},
};
use crate::checkpoint::Context;

/// The rules by which answers are scored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Task {
    /// The answer is one of those listed in the instruction.
    Commonsense,
    /// The answer is a number, or a letter from A to E.
    Math,
}

impl Task {
    /// Maximum number of tokens of a generated answer.
    pub fn max_new_tokens(self) -> usize {
        match self {
            Self::Commonsense => 32,
            Self::Math => 512,
        }
    }

    /// Whether a generated text gives the correct answer.
    pub fn is_right(self, generated: &str, answer: &str) -> bool {
        match self {
            Self::Commonsense => commonsense_answer(generated) == Some(answer),
            Self::Math => is_right_number(generated, answer),
        }
    }
}

/// A row to be answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Question {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// The correct answer.
    pub answer: String,
    /// For [`Task::Commonsense`], the answer choices, each with the token ids that follow the prompt.
    pub candidates: Vec<(String, Vec<u32>)>,
    /// If a template writes the answer choices, its text for the correct one.
    pub text: Option<String>,
}

impl Question {
    /// Whether a generated text is correct, by the task's rule or by equality with the template's text.
    pub fn is_right(&self, task: Task, generated: &str) -> bool {
        match &self.text {
            Some(text) => generated.trim() == text.trim(),
            None => task.is_right(generated, &self.answer),
        }
    }
}

/// Reads the questions of a file; prompts are not truncated, whatever the length option.
///
/// The ranked continuation is `the correct answer is …`. For a template that writes answers itself
/// (`{% generation %}`), it is the template's text for a row with that `answer`, for instance the text of an option
/// instead of its label.
///
/// # Errors
/// As [`super::read_dataset`]; also [`DataError::BadRow`] if the task does not allow the answer.
pub fn read_questions(
    ctx: &Context<'_>,
    path: &Path,
    tokenizer: &Tokenizer,
    task: Task,
    options: &ReadOptions,
) -> Result<Vec<Question>, DataError> {
    let template = match (&options.template, task) {
        (Template::Auto, Task::Commonsense) => &Template::Commonsense,
        (Template::Auto, Task::Math) => &Template::Alpaca,
        (other, _) => other,
    };
    let mut questions = Vec::new();
    let mut reader = FormReader::open(ctx, path, tokenizer, template, options.clock, options.limit)?;
    while let Some(chunk) = reader.next_chunk()? {
        let made = chunk.map(|form, row| question(ctx, tokenizer, form, task, &row.fields));
        for (row, question) in chunk.rows.iter().zip(made) {
            questions.push(question.map_err(|failed| failed.at(path, row.place))?);
        }
    }
    if questions.is_empty() {
        return Err(DataError::Empty { path: path.to_owned(), what: "it contains no rows".to_owned() });
    }
    Ok(questions)
}

fn question(
    ctx: &Context<'_>,
    tokenizer: &Tokenizer,
    form: &Form,
    task: Task,
    row: &Map<String, Json>,
) -> Result<Question, Failed> {
    let (answer, named) = answers(task, row)?;
    let mut question = Question { prompt: Vec::new(), answer, candidates: Vec::new(), text: None };
    if form.writes_answers() {
        if named.is_empty() {
            (question.prompt, _) = written(ctx, tokenizer, form, row, &question.answer)?;
        }
        for candidate in named {
            let (prompt, tokens) = written(ctx, tokenizer, form, row, &candidate)?;
            match question.candidates.first() {
                Some((first, _)) if prompt != question.prompt => {
                    let what = format!("its prompts for the answers \"{candidate}\" and \"{first}\" differ");
                    return Err(Failed::Row(what));
                }
                _ => question.prompt = prompt,
            }
            if candidate == question.answer {
                question.text = Some(tokenizer.decode(&tokens)?);
            }
            question.candidates.push((candidate, tokens));
        }
    } else {
        let prompt = form.prompt(ctx, row)?;
        question.prompt = [tokenizer.prefix(), &tokenizer.encode(&prompt)?].concat();
        for candidate in named {
            let pair = encode_pair(tokenizer, &prompt, &format!("{COMMONSENSE_ANSWER}{candidate}"))?;
            question.candidates.push((candidate, pair.tokens[pair.n_prompt..].to_vec()));
        }
    }
    if question.prompt.is_empty() {
        return Err(Failed::Row("its prompt has no tokens".to_owned()));
    }
    Ok(question)
}

/// A row's answer, and the answer choices to rank.
fn answers(task: Task, row: &Map<String, Json>) -> Result<(String, Vec<String>), String> {
    let answer = text_or_number(row, "answer")?;
    if task == Task::Math {
        if !is_letter(&answer) && number(&answer).is_none() {
            return Err(format!("field \"answer\": \"{answer}\" is neither a number nor a letter from A to E"));
        }
        return Ok((answer, Vec::new()));
    }
    let named = candidates(field(row, "instruction")?);
    let named = named.ok_or("field \"instruction\": it has no \"Answer format: a/b/…\" with the answers")?;
    if !named.contains(&answer.as_str()) {
        let named = named.join("/");
        return Err(format!("field \"answer\": \"{answer}\" is not among the answers in the instruction: {named}"));
    }
    Ok((answer, named.into_iter().map(str::to_owned).collect()))
}

/// The prompt, and the tokens of the template's `{% generation %}` block for an answer.
fn written(
    ctx: &Context<'_>,
    tokenizer: &Tokenizer,
    form: &Form,
    row: &Map<String, Json>,
    answer: &str,
) -> Result<(Vec<u32>, Vec<u32>), Failed> {
    let mut row = row.clone();
    row.insert("answer".to_owned(), answer.into());
    row.insert("output".to_owned(), format!("{COMMONSENSE_ANSWER}{answer}").into());
    let Text::Marked(rendered) = form.text(ctx, &row, Loss::Response)? else {
        unreachable!("such a template marks its answers")
    };
    let (tokens, spans) = encode_marked(tokenizer, &rendered)?;
    match &spans[..] {
        [span] if span.is_empty() => {
            Err(Failed::Row(format!("its template writes nothing for the answer \"{answer}\"")))
        }
        [span] => Ok((tokens[..span.start].to_vec(), tokens[span.clone()].to_vec())),
        spans => Err(Failed::Row(format!("its template marks {} answers, expected one", spans.len()))),
    }
}

/// The task that a file's first row matches; `None` if it has no answer that a task knows.
pub fn task_of(path: &Path) -> Result<Option<Task>, DataError> {
    let Some(row) = super::rows::RowReader::open(path)?.next_row()? else { return Ok(None) };
    let Ok(answer) = text_or_number(&row.fields, "answer") else { return Ok(None) };
    let Ok(instruction) = field(&row.fields, "instruction") else { return Ok(None) };
    let named = candidates(instruction);
    if named.is_some_and(|named| named.contains(&answer.as_str())) {
        return Ok(Some(Task::Commonsense));
    }
    Ok((is_letter(&answer) || number(&answer).is_some()).then_some(Task::Math))
}

/// The answer choices at the end of an instruction: `Answer format: a/b/…`.
pub fn candidates(instruction: &str) -> Option<Vec<&str>> {
    let (_, list) = instruction.rsplit_once("Answer format: ")?;
    let named: Vec<&str> = list.lines().next()?.trim().split('/').map(str::trim).collect();
    (named.len() > 1 && named.iter().all(|name| !name.is_empty())).then_some(named)
}

/// The answer in a generated text: what follows the first `the correct answer is `.
pub fn commonsense_answer(generated: &str) -> Option<&str> {
    generated.split_once(COMMONSENSE_ANSWER).map(|(_, answer)| answer.trim())
}

/// Whether a generated text ends with the correct number, or contains the correct letter first.
fn is_right_number(generated: &str, answer: &str) -> bool {
    if is_letter(answer) {
        return math_letter(generated) == answer.chars().next();
    }
    let (Some(found), Some(expected)) = (math_number(generated), number(answer)) else { return false };
    (found - expected).abs() <= 0.001
}

/// The last number of a text, without commas: the last match of `-?\d+\.?\d*`.
pub fn math_number(generated: &str) -> Option<f64> {
    let text: Vec<u8> = generated.bytes().filter(|&byte| byte != b',').collect();
    let digits = |from: usize| text[from.min(text.len())..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (mut at, mut last) = (0, None);
    while at < text.len() {
        let sign = usize::from(text[at] == b'-');
        let whole = digits(at + sign);
        if whole == 0 {
            at += 1;
            continue;
        }
        let mut end = at + sign + whole;
        if text.get(end) == Some(&b'.') {
            end += 1 + digits(end + 1);
        }
        last = Some(at..end);
        at = end;
    }
    std::str::from_utf8(&text[last?]).ok()?.parse().ok()
}

/// The first letter of a text that is one of A to E.
pub fn math_letter(generated: &str) -> Option<char> {
    generated.chars().find(|c| ('A'..='E').contains(c))
}

fn is_letter(answer: &str) -> bool {
    matches!(answer, "A" | "B" | "C" | "D" | "E")
}

fn number(answer: &str) -> Option<f64> {
    answer.replace(',', "").trim().parse().ok().filter(|x: &f64| x.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_listed_in_the_instruction() {
        let of = |instruction| candidates(instruction).unwrap_or_default();
        assert_eq!(
            of("Please answer the following question with true or false, question: x?\n\nAnswer format: true/false"),
            ["true", "false"]
        );
        assert_eq!(
            of("y and/or z\n\nAnswer format: ending1/ending2/ending3/ending4"),
            ["ending1", "ending2", "ending3", "ending4"]
        );
        assert_eq!(of("What is the Answer format: of a/b?\n\nAnswer format: a/b \nmore"), ["a", "b"]);
        assert_eq!(candidates("Which of true/false?"), None);
        assert_eq!(candidates("Answer format: number"), None);
        assert_eq!(candidates("Answer format: a//b"), None);
    }

    #[test]
    fn commonsense_answers_follow_the_first_phrase() {
        for (generated, answer, is_right) in [
            ("the correct answer is solution1", "solution1", true),
            ("Well, the correct answer is true\n", "true", true),
            ("the correct answer is answer1", "answer2", false),
            ("the correct answer is answer1 because the correct answer is answer1", "answer1", false),
            ("the correct answer is answer12", "answer1", false),
            ("The correct answer is true", "true", false),
            ("true", "true", false),
            ("", "true", false),
        ] {
            assert_eq!(Task::Commonsense.is_right(generated, answer), is_right, "{generated}");
        }
    }

    #[test]
    fn the_last_number_counts() {
        // Shortened outputs of real rows of gsm8k, svamp and math_10k.
        for (generated, expected) in [
            ("\nA: He needs 24 tiles. 24 * 24 = 576 tiles. The answer is 576.", Some(576.0)),
            ("5 tickets and 10 more. The answer in Arabic numerals is:\n\n16", Some(16.0)),
            ("it costs $1,234,567.89 in all", Some(1_234_567.89)),
            ("10-5", Some(-5.0)),
            ("from 3 to -.5", Some(5.0)),
            ("3.14.15", Some(15.0)),
            ("7.", Some(7.0)),
            ("- 7 -", Some(7.0)),
            ("é9é", Some(9.0)),
            ("none", None),
            ("", None),
        ] {
            assert_eq!(math_number(generated), expected, "{generated}");
        }
        assert_eq!(math_number(&"9".repeat(400)), Some(f64::INFINITY));
    }

    #[test]
    fn numbers_are_correct_within_a_thousandth() {
        for (generated, answer, is_right) in [
            ("so 576.", "576.0", true),
            ("so 0.3333", "0.33333", true),
            ("so 16.002", "16.0", false),
            ("1,000", "1000.0", true),
            ("none", "0", false),
            ("The answer is B", "B", true),
            ("A is wrong, B", "B", false),
            ("Because C", "B", true),
            ("nothing", "B", false),
        ] {
            assert_eq!(Task::Math.is_right(generated, answer), is_right, "{generated}");
        }
    }
}
