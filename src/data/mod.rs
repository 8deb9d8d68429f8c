//! Training data: from a file of rows to packed batches of token ids, and how answers are judged.
//!
//! [`read_dataset`] reads a JSON array or JSON lines, one row at a time (`rows`). The fields of a row become a prompt and a
//! response through a [`Template`], or a conversation through the model's chat template (`form`, `chat`, `jinja`), and
//! these token ids through the model's own [`Tokenizer`]. A [`Dataset`] holds the examples, in file order, and which tokens
//! the model is to learn. An epoch is a list of [`Batches`]: examples laid end to end, without padding, in an order that a
//! seed decides, each batch found by its number, so that an interrupted epoch goes on where it stopped. The trainer sees
//! [`Batch`]es alone; nothing here knows of a model's weights.
//!
//! [`read_questions`] reads the same files to be answered, [`Task`] holds the published rules by which answers are right,
//! and [`loss_curve`] draws what training made of it all.

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
