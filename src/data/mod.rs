//! Training data: reads rows from a file into packed batches of token ids, and scores answers.
//!
//! [`read_dataset`] reads a JSON array or JSON lines, one row at a time (`rows`). A [`Template`] formats the fields of
//! a row as a prompt and a response, or the model's chat template formats a conversation (`form`, `chat`, `jinja`).
//! The model's own [`Tokenizer`] encodes the text. A [`Dataset`] holds the examples, in file order, with the
//! supervised tokens marked. An epoch is a list of [`Batches`]: packed examples without padding, in an order
//! determined by a seed and accessed by index, so that an interrupted epoch can resume. The trainer sees only
//! [`Batch`]es; nothing here knows a model's weights.
//!
//! [`read_questions`] reads the same files for evaluation, [`Task`] implements the published rules for scoring
//! answers, and [`loss_curve`] plots the training losses.

mod batch;
mod chat;
mod clock;
mod curve;
mod dataset;
mod error;
mod form;
mod jinja;
mod read;
mod rows;
mod task;
#[cfg(test)]
mod tests;
mod tokenizer;
mod watch;

pub use batch::{Batch, BatchLimits, Batches, IGNORE};
pub use clock::Clock;
pub use curve::loss_curve;
pub use dataset::{Dataset, Example};
pub use error::{DataError, RowLocation};
pub use form::Template;
pub use read::{DataReport, Loss, ReadOptions, read_dataset};
pub use rows::{MAX_ROW_BYTES, Row, RowReader};
pub use task::{Question, Task, candidates, commonsense_answer, math_letter, math_number, read_questions, task_of};
pub use tokenizer::Tokenizer;
