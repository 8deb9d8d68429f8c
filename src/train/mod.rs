//! The trainer: NeuroAda deltas on models of the Llama family.
//!
//! The forward pass runs on merged weights: before each step the chosen entries of every row hold `round(original +
//! theta)`. The bypass therefore costs nothing, and the trained weights are bit for bit what a merge writes. The
//! gradient of `theta[i, j]` is a dot product of two gathered columns, `sum_t dY[t, i] * X[t, column[i, j]]`. No dense
//! weight gradient is ever computed, and optimizer state exists for the deltas alone. Biases can be trained too, as a
//! whole: they are deltas on matrices of one column.
//!
//! [`train()`] is the loop: batch, forward, backward, update, log. `state` saves what an interrupted run needs to
//! resume. Read [`Device`] first: it defines the operations. `pass` builds the passes from them once, `model` copies a
//! checkpoint's weights to a device, and `cpu` holds the plain form of the operations. A GPU is another [`Device`];
//! nothing in this folder depends on it.

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
pub use device::{AdamScalars, AdamW, Deltas, Device, DeviceResult, Spans};
pub use error::{DeviceError, TrainError};
pub use evaluate::{GenerateOptions, MeanLoss, Question, generate, mean_loss, rank};
pub use memory::{EvalSize, MemoryEstimate, RunSize};
pub use model::{EMBEDDING, Layer, Linear, Model, Part, check_model};
pub use options::{RunLength, Schedule, TrainOptions, Warmup};
pub use pass::{DeviceBatch, Keep, Workspace, backward, first_non_finite, forward, logits, losses};
pub use run::{EvalRecord, StepRecord, TrainJob, TrainReport, Watcher, train};
pub use state::{Best, Progress};
