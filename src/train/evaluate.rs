//! Evaluates a model on text: its mean loss, the likelihoods of given answers, and greedy generation.
//!
//! A [`Session`] caches keys and values: a prompt is processed once, however many tokens or candidates follow.

use super::{
    TrainError,
    device::{Device, Spans},
    memory::EvalSize,
    model::Model,
    pass::{DeviceBatch, Keep, Workspace, first_non_finite, forward, losses, losses_at, most_likely, run_layers},
};
use crate::{checkpoint::Context, data::Batch};

/// A mean over all tokens that have labels.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct MeanLoss {
    /// The mean, in nats per token.
    pub loss: f64,
    /// Tokens that have labels.
    pub n_supervised: u64,
}

/// The mean loss over batches, summed in order in float64.
///
/// # Errors
/// [`TrainError::NotANumber`] for the first batch whose loss is not finite; errors of the device;
/// [`crate::checkpoint::CheckpointError::Cancelled`].
///
/// # Panics
/// If a batch has more tokens than the workspace allows.
pub fn mean_loss<D: Device>(
    ctx: &Context<'_>,
    device: &D,
    model: &Model<D>,
    batches: impl Iterator<Item = Batch>,
    work: &mut Workspace<D>,
) -> Result<MeanLoss, TrainError> {
    let (mut sum, mut n_supervised) = (0.0, 0);
    for batch in batches {
        ctx.check()?;
        let batch = DeviceBatch::new(device, &model.config, &batch)?;
        forward(device, model, &batch, work)?;
        let losses = losses(device, model, &batch, work, None)?;
        let of_batch: f64 = losses.iter().map(|&loss| f64::from(loss)).sum();
        if !of_batch.is_finite() {
            return Err(not_a_number(device, model, &batch, of_batch / losses.len() as f64)?);
        }
        sum += of_batch;
        n_supervised += losses.len() as u64;
        ctx.observer.advance(batch.spans.n_tokens() as u64);
    }
    Ok(MeanLoss { loss: sum / n_supervised as f64, n_supervised })
}

/// The error for a batch whose loss is not finite: repeats the forward pass with all layer inputs kept, to find the
/// first such tensor.
fn not_a_number<D: Device>(
    device: &D,
    model: &Model<D>,
    batch: &DeviceBatch<D>,
    found: f64,
) -> Result<TrainError, TrainError> {
    let n_tokens = batch.spans.n_tokens();
    let mut work = Workspace::new(device, &model.config, n_tokens, Keep::Inputs)?;
    forward(device, model, batch, &mut work)?;
    let tensor = first_non_finite(device, model, n_tokens, &work)?;
    Ok(TrainError::NotANumber { what: "loss", found, tensor })
}

/// Sequences with their cached keys and values.
struct Session<'a, D: Device> {
    device: &'a D,
    model: &'a Model<D>,
    /// `[n_layers]`: `[n_sequences, capacity, 2 * d_kv]`.
    caches: Vec<D::Act>,
    capacity: usize,
    /// `[n_sequences]`: tokens processed so far.
    past: Vec<usize>,
}

impl<'a, D: Device> Session<'a, D> {
    fn new(device: &'a D, model: &'a Model<D>, n_sequences: usize, capacity: usize) -> Result<Self, TrainError> {
        let n = n_sequences * capacity * 2 * model.config.heads.d_kv();
        let caches = model.layers.iter().map(|_| device.act(n)).collect::<Result<_, _>>()?;
        Ok(Self { device, model, caches, capacity, past: vec![0; n_sequences] })
    }

    /// Processes the next tokens of every sequence, possibly none; returns where the tokens of each begin in the
    /// workspace.
    fn read<T: AsRef<[u32]>>(&mut self, tokens: &[T], work: &mut Workspace<D>) -> Result<Vec<usize>, TrainError> {
        let Self { device, model, caches, capacity, past } = self;
        let mut starts = vec![0];
        let mut ids = Vec::new();
        for tokens in tokens {
            ids.extend_from_slice(tokens.as_ref());
            starts.push(ids.len());
        }
        let (spans, heads) = (Spans::new(*device, &starts, past)?, model.config.heads);
        run_layers(*device, model, &device.ids(&ids)?, &spans, work, |layer, qkv, attended, _| {
            device.attention_cached(qkv, &spans, past, heads, &mut caches[layer], *capacity, attended)
        })?;
        for (past, tokens) in past.iter_mut().zip(tokens) {
            *past += tokens.as_ref().len();
        }
        Ok(starts)
    }

    /// A session whose sequence `i` continues from this session's sequence `from[i]`, with capacity for `more` tokens.
    fn fork(&self, from: &[usize], more: usize) -> Result<Self, TrainError> {
        let longest = from.iter().map(|&i| self.past[i]).max().unwrap_or(0);
        let mut fork = Self::new(self.device, self.model, from.len(), longest + more)?;
        let width = 2 * self.model.config.heads.d_kv();
        for (cache, to) in self.caches.iter().zip(&mut fork.caches) {
            for (i, &from) in from.iter().enumerate() {
                let (at, to_at) = (from * self.capacity * width, i * fork.capacity * width);
                self.device.copy(cache, at, to, to_at, self.past[from] * width)?;
            }
        }
        fork.past = from.iter().map(|&i| self.past[i]).collect();
        Ok(fork)
    }
}

/// A prompt, and the candidate answers to compare.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Question {
    /// The tokens before the answer, at least one.
    pub prompt: Vec<u32>,
    /// The answers, each at least one token.
    pub candidates: Vec<Vec<u32>>,
}

impl Question {
    /// Tokens of the prompt and of all candidates.
    fn n_tokens(&self) -> usize {
        self.prompt.len() + self.candidates.iter().map(Vec::len).sum::<usize>()
    }

    /// Length of the common prefix of all candidates, leaving each at least one token of its own.
    fn n_shared(&self) -> usize {
        let Some((first, others)) = self.candidates.split_first() else { return 0 };
        let same = |i: usize| others.iter().all(|other| other.get(i) == first.get(i));
        let shortest = self.candidates.iter().map(Vec::len).min().unwrap_or(0);
        (0..shortest.saturating_sub(1)).take_while(|&i| same(i)).count()
    }
}

/// Groups consecutive items whose sizes add up to at most `most`; an item that is larger is a group of its own.
fn group_by_size(sizes: &[usize], most: usize) -> Vec<std::ops::Range<usize>> {
    let mut groups: Vec<std::ops::Range<usize>> = Vec::new();
    let mut remaining = 0;
    for (i, &size) in sizes.iter().enumerate() {
        match groups.last_mut().filter(|_| size <= remaining) {
            Some(run) => (run.end, remaining) = (i + 1, remaining - size),
            None => {
                groups.push(i..i + 1);
                remaining = most.saturating_sub(size);
            }
        }
    }
    groups
}

/// The log-likelihood of each candidate of each question given its prompt, summed over its tokens.
///
/// Memory: keys and values of about `max_tokens` tokens, once for the prompts and once for each candidate.
///
/// # Errors
/// [`TrainError::NotANumber`] if a likelihood is not finite; errors of the device;
/// [`crate::checkpoint::CheckpointError::Cancelled`].
///
/// # Panics
/// If a prompt or a candidate is empty.
pub fn rank<D: Device>(
    ctx: &Context<'_>,
    device: &D,
    model: &Model<D>,
    questions: &[Question],
    max_tokens: usize,
) -> Result<Vec<Vec<f64>>, TrainError> {
    let sizes: Vec<usize> = questions.iter().map(Question::n_tokens).collect();
    let most = sizes.iter().copied().max().unwrap_or(0).max(max_tokens);
    let mut work = Workspace::new(device, &model.config, most, Keep::Nothing)?;
    let mut ranked = Vec::with_capacity(questions.len());
    for run in group_by_size(&sizes, max_tokens) {
        ctx.check()?;
        let likelihoods = rank_together(device, model, &questions[run.clone()], &mut work)?;
        if let Some(&found) = likelihoods.iter().flatten().find(|likelihood| !likelihood.is_finite()) {
            let tensor = "the logits (lm_head)".to_owned();
            return Err(TrainError::NotANumber { what: "likelihood of an answer", found, tensor });
        }
        ranked.extend(likelihoods);
        ctx.observer.advance(run.len() as u64);
    }
    Ok(ranked)
}

fn rank_together<D: Device>(
    device: &D,
    model: &Model<D>,
    questions: &[Question],
    work: &mut Workspace<D>,
) -> Result<Vec<Vec<f64>>, TrainError> {
    // The common prefix of a question's candidates is read with its prompt, except for the last token.
    let mut known = Vec::new();
    for question in questions {
        let shared = question.candidates.first().map_or(&[][..], |first| &first[..question.n_shared()]);
        known.push([&question.prompt, shared].concat());
    }
    let longest = known.iter().map(Vec::len).max().unwrap_or(0);
    let mut prompts = Session::new(device, model, questions.len(), longest)?;
    let heads: Vec<&[u32]> = known.iter().map(|known| &known[..known.len() - 1]).collect();
    let starts = prompts.read(&heads, work)?;
    let (mut rows, mut labels, mut of) = (Vec::new(), Vec::new(), Vec::new());
    for (i, (question, known)) in questions.iter().zip(&known).enumerate() {
        for (at, &label) in known.iter().enumerate().skip(question.prompt.len()) {
            rows.push((starts[i] + at - 1) as u32);
            labels.push(label);
            of.push(i);
        }
    }
    let mut shared = vec![0.0; questions.len()];
    for (i, loss) in of.into_iter().zip(losses_at(device, model, &rows, &labels, work)?) {
        shared[i] -= f64::from(loss);
    }

    // Each candidate continues in its own sequence.
    let (mut from, mut tails, mut rests) = (Vec::new(), Vec::new(), Vec::new());
    for (i, (question, known)) in questions.iter().zip(&known).enumerate() {
        for candidate in &question.candidates {
            let rest = &candidate[question.n_shared()..];
            from.push(i);
            tails.push([&known[known.len() - 1..], &rest[..rest.len() - 1]].concat());
            rests.push(rest);
        }
    }
    let more = tails.iter().map(Vec::len).max().unwrap_or(0);
    prompts.fork(&from, more)?.read(&tails, work)?;
    let rows: Vec<u32> = (0..tails.iter().map(Vec::len).sum::<usize>() as u32).collect();
    let losses = losses_at(device, model, &rows, &rests.concat(), work)?;
    let mut ranked: Vec<Vec<f64>> = questions.iter().map(|_| Vec::new()).collect();
    let mut first = 0;
    for (i, rest) in from.into_iter().zip(rests) {
        let losses = &losses[first..first + rest.len()];
        ranked[i].push(shared[i] - losses.iter().map(|&loss| f64::from(loss)).sum::<f64>());
        first += rest.len();
    }
    Ok(ranked)
}

impl EvalSize {
    /// The size of [`rank`].
    pub fn of_ranking(questions: &[Question], max_tokens: usize) -> Self {
        let sizes: Vec<usize> = questions.iter().map(Question::n_tokens).collect();
        let max_tokens_of_all = sizes.iter().copied().max().unwrap_or(0).max(max_tokens);
        let cached = |run: std::ops::Range<usize>| {
            let run = &questions[run];
            let longest = run.iter().map(|question| question.prompt.len() + question.n_shared()).max().unwrap_or(0);
            let candidates = run.iter().flat_map(|question| &question.candidates);
            let more = candidates.clone().map(Vec::len).max().unwrap_or(0);
            run.len() * longest + candidates.count() * (longest + more)
        };
        let n_cached = group_by_size(&sizes, max_tokens).into_iter().map(cached).max().unwrap_or(0);
        Self { max_tokens: max_tokens_of_all, max_supervised: max_tokens_of_all, n_cached }
    }

    /// The size of [`generate`].
    pub fn of_answers(prompts: &[Vec<u32>], options: &GenerateOptions) -> Self {
        let mut sizes: Vec<usize> = prompts.iter().map(Vec::len).collect();
        sizes.sort_unstable();
        let max_tokens = sizes.last().copied().unwrap_or(0).max(options.max_tokens);
        let cached = |run: std::ops::Range<usize>| run.len() * (sizes[run.end - 1] + options.max_new_tokens);
        let all = group_by_size(&sizes, options.max_tokens);
        let max_supervised = all.iter().map(std::ops::Range::len).max().unwrap_or(0);
        Self { max_tokens, max_supervised, n_cached: all.into_iter().map(cached).max().unwrap_or(0) }
    }
}

/// When generation stops, and how prompts are batched.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GenerateOptions {
    /// The maximum number of tokens generated per prompt.
    pub max_new_tokens: usize,
    /// Tokens that end a sequence; they are not returned.
    pub stop: Vec<u32>,
    /// The maximum number of prompt tokens processed together.
    pub max_tokens: usize,
}

/// Greedy decoding: the tokens that the model generates after each prompt.
///
/// Memory: keys and values of about [`GenerateOptions::max_tokens`] prompt tokens, and of the tokens that follow them.
///
/// # Errors
/// Errors of the device, or [`crate::checkpoint::CheckpointError::Cancelled`].
///
/// # Panics
/// If a prompt is empty.
pub fn generate<D: Device>(
    ctx: &Context<'_>,
    device: &D,
    model: &Model<D>,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
) -> Result<Vec<Vec<u32>>, TrainError> {
    // Prompts of similar length share a batch: the cache is as wide as the longest of them.
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by_key(|&i| prompts[i].len());
    let sizes: Vec<usize> = order.iter().map(|&i| prompts[i].len()).collect();
    let most = sizes.last().copied().unwrap_or(0).max(options.max_tokens);
    let mut work = Workspace::new(device, &model.config, most, Keep::Nothing)?;
    let mut written = vec![Vec::new(); prompts.len()];
    for run in group_by_size(&sizes, options.max_tokens) {
        let run = &order[run];
        let capacity = run.iter().map(|&i| prompts[i].len()).max().unwrap_or(0) + options.max_new_tokens;
        let mut session = Session::new(device, model, run.len(), capacity)?;
        let mut next: Vec<Vec<u32>> = run.iter().map(|&i| prompts[i].clone()).collect();
        for _ in 0..options.max_new_tokens {
            ctx.check()?;
            let starts = session.read(&next, &mut work)?;
            let going: Vec<usize> = (0..run.len()).filter(|&i| !next[i].is_empty()).collect();
            let rows: Vec<u32> = going.iter().map(|&i| starts[i + 1] as u32 - 1).collect();
            let tokens = most_likely(device, model, &rows, &mut work)?;
            for (i, token) in going.into_iter().zip(tokens) {
                next[i].clear();
                if !options.stop.contains(&token) {
                    next[i].push(token);
                    written[run[i]].push(token);
                }
            }
            if next.iter().all(Vec::is_empty) {
                break;
            }
        }
        ctx.observer.advance(run.len() as u64);
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_common_prefix_of_all_candidates_is_shared() {
        let n_shared = |candidates: &[&[u32]]| {
            let candidates = candidates.iter().map(|candidate| candidate.to_vec()).collect();
            Question { prompt: vec![1], candidates }.n_shared()
        };
        assert_eq!(n_shared(&[&[1, 2, 3], &[1, 2, 4]]), 2);
        assert_eq!(n_shared(&[&[1, 2], &[1, 2]]), 1, "each keeps at least one token");
        assert_eq!(n_shared(&[&[1], &[1, 2]]), 0);
        assert_eq!(n_shared(&[&[5, 6, 7]]), 2);
        assert_eq!(n_shared(&[]), 0);
    }

    #[test]
    fn groups_respect_the_limit() {
        assert_eq!(group_by_size(&[3, 3, 9, 1, 4, 2], 6), [0..2, 2..3, 3..5, 5..6]);
    }
}
