//! The trainer: NeuroAda deltas on models of the Llama family.
//!
//! The forward pass runs on merged weights: before each step the chosen entries of every row hold `round(original + theta)`, so
//! the bypass costs nothing, and what is trained is bit for bit what a merge writes. The gradient of `theta[i, j]` is a dot
//! product of two gathered columns, `sum_t dY[t, i] * X[t, column[i, j]]`; no dense gradient of a weight ever exists, and the
//! optimizer's state is that of the deltas alone. Biases can be trained beside them, whole: they are deltas on matrices of one column.
//!
//! [`train()`] is the loop: batch, forward, backward, update, log; what an interrupted run needs to go on is saved in `state`.
//! Read [`Device`] first: the operations that everything is made of. `pass` writes the passes over them once, `model` puts a
//! checkpoint's weights on a device, `cpu` holds the operations' plain form; a GPU is a [`Device`] of its own, which nothing here knows.

mod apply;
mod attach;
pub mod config;
mod cpu;
mod device;
mod error;
mod evaluate;
mod memory;
mod model;
mod options;
mod pass;
mod run;
mod state;

pub use attach::biases;
pub use config::ModelConfig;
pub use cpu::{CpuDevice, CpuWeight};
pub use device::{AdamNumbers, AdamW, Deltas, Device, DeviceResult, Spans};
pub use error::{DeviceError, TrainError};
pub use evaluate::{GenerateOptions, MeanLoss, Question, generate, mean_loss, rank};
pub use memory::{EvalSize, MemoryEstimate, RunSize};
pub use model::{EMBEDDING, Layer, Linear, Model, Part, check_model};
pub use options::{RunLength, Schedule, TrainOptions, Warmup};
pub use pass::{DeviceBatch, Keep, Workspace, backward, first_not_finite, forward, logits, losses};
pub use run::{EvalRecord, StepRecord, TrainJob, TrainReport, Watcher, train};
pub use state::{Best, Progress};
