//! The passes: forward, loss, backward.
//!
//! Activations that the backward pass needs are kept on a tape or recomputed from each layer's input; norms and SwiGLU
//! are always recomputed. `x` are activations, `dx` their gradients; `n` is the number of tokens of the batch.

use super::{
    DeviceError, TrainError,
    config::ModelConfig,
    device::{Device, DeviceResult, Spans},
    model::{Layer, Linear, Model},
};
use crate::data::{Batch, IGNORE};

/// What a forward pass keeps for the backward pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keep {
    /// Nothing: there is no backward pass.
    Nothing,
    /// Each layer's input; the other activations are recomputed in the backward pass, which costs a third more time.
    Inputs,
    /// All activations that cannot be recomputed without a matrix product.
    All,
}

/// A batch on a device.
pub struct DeviceBatch<D: Device> {
    ids: D::Ids,
    /// The boundaries of its examples.
    pub spans: Spans<D>,
    /// `[n_supervised]`: indices of the tokens that have a label, and the labels.
    rows: D::Ids,
    labels: D::Ids,
    /// Number of tokens that have a label.
    pub n_supervised: usize,
}

impl<D: Device> DeviceBatch<D> {
    /// Copies a batch to the device.
    ///
    /// # Errors
    /// Errors of the device; a token outside the model's vocabulary.
    pub fn new(device: &D, config: &ModelConfig, batch: &Batch) -> Result<Self, TrainError> {
        let supervised = batch.labels.iter().enumerate().filter(|(_, label)| **label != IGNORE);
        let (rows, labels): (Vec<u32>, Vec<u32>) = supervised.map(|(t, label)| (t as u32, *label)).unzip();
        if let Some(token) = batch.tokens.iter().chain(&labels).find(|&&token| token as usize >= config.n_vocab) {
            let n_vocab = config.n_vocab;
            let what = format!(
                "the data has token {token}, but the model's vocabulary has {n_vocab}: does the tokenizer belong to another model?"
            );
            return Err(TrainError::Usage(what));
        }
        Ok(Self {
            ids: device.ids(&batch.tokens)?,
            spans: Spans::new(device, &batch.starts, &[])?,
            n_supervised: rows.len(),
            rows: device.ids(&rows)?,
            labels: device.ids(&labels)?,
        })
    }

    fn n(&self) -> usize {
        self.spans.n_tokens()
    }
}

/// The activations of a layer that are kept for the backward pass.
struct Tape<D: Device> {
    /// `[n, d_qkv]`: before the head norms, if there are any.
    raw: Option<D::Act>,
    /// `[n, d_qkv]`: after the rotary embedding.
    qkv: D::Act,
    /// `[n, d_q]`.
    attended: D::Act,
    /// `[n, n_q]`.
    lse: D::F32,
    /// `[n, d_model]`: the residual stream between attention and feed-forward.
    middle: D::Act,
    /// `[n, 2 * d_ff]`.
    gate_up: D::Act,
}

impl<D: Device> Tape<D> {
    /// Number of activations and of float32 values per token.
    fn size(config: &ModelConfig) -> (usize, usize) {
        let heads = config.heads;
        let raw = if config.has_head_norms { heads.d_qkv() } else { 0 };
        (raw + heads.d_qkv() + heads.d_q() + config.d_model + 2 * config.d_ff, heads.n_q)
    }

    fn new(device: &D, config: &ModelConfig, n: usize) -> Result<Self, DeviceError> {
        let (heads, act) = (config.heads, |width: usize| device.act(n * width));
        Ok(Self {
            raw: if config.has_head_norms { Some(act(heads.d_qkv())?) } else { None },
            qkv: act(heads.d_qkv())?,
            attended: act(heads.d_q())?,
            lse: device.zeros(n * heads.n_q)?,
            middle: act(config.d_model)?,
            gate_up: act(2 * config.d_ff)?,
        })
    }
}

/// Buffers that only the backward pass needs.
struct BackwardBuffers<D: Device> {
    /// `[n, d_model]`: the gradient of the residual stream.
    dx: D::Act,
    /// `[n, d_model]`: the gradient of a norm's output.
    d_normed: D::Act,
    /// `[n, 2 * d_ff]`.
    d_gate_up: D::Act,
    /// `[n, d_q]`.
    d_attended: D::Act,
    /// `[n, d_qkv]`.
    dqkv: D::Act,
}

/// The buffers of the passes, for batches of a limited number of tokens.
pub struct Workspace<D: Device> {
    keep: Keep,
    max_tokens: usize,
    /// `[n, d_model]` each: the input of every layer and the output of the last. Without a backward pass, two buffers
    /// in alternation.
    inputs: Vec<D::Act>,
    tapes: Vec<Tape<D>>,
    /// `[n, d_model]`: the output of a norm.
    normed: D::Act,
    /// `[n, d_ff]`: the output of SwiGLU, then its gradient.
    hidden: D::Act,
    /// `[n, d_model]`: the final activations of the tokens that have labels.
    supervised: D::Act,
    /// `[n]`.
    losses: D::F32,
    back: Option<BackwardBuffers<D>>,
}

impl<D: Device> Workspace<D> {
    /// Buffers for `max_tokens` tokens.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn new(device: &D, config: &ModelConfig, max_tokens: usize, keep: Keep) -> Result<Self, DeviceError> {
        let act = |width: usize| device.act(max_tokens * width);
        let n_inputs = if keep == Keep::Nothing { 2 } else { config.n_layers + 1 };
        let n_tapes = if keep == Keep::All { config.n_layers } else { 1 };
        let back = if keep == Keep::Nothing {
            None
        } else {
            Some(BackwardBuffers {
                dx: act(config.d_model)?,
                d_normed: act(config.d_model)?,
                d_gate_up: act(2 * config.d_ff)?,
                d_attended: act(config.heads.d_q())?,
                dqkv: act(config.heads.d_qkv())?,
            })
        };
        Ok(Self {
            keep,
            max_tokens,
            inputs: (0..n_inputs).map(|_| act(config.d_model)).collect::<Result<_, _>>()?,
            tapes: (0..n_tapes).map(|_| Tape::new(device, config, max_tokens)).collect::<Result<_, _>>()?,
            normed: act(config.d_model)?,
            hidden: act(config.d_ff)?,
            supervised: act(config.d_model)?,
            losses: device.zeros(max_tokens)?,
            back,
        })
    }

    /// Bytes that [`Workspace::new`] allocates, with `act_bytes` per activation.
    pub fn n_bytes(config: &ModelConfig, max_tokens: usize, keep: Keep, act_bytes: usize) -> u64 {
        let (d, d_ff, heads) = (config.d_model, config.d_ff, config.heads);
        let n_inputs = if keep == Keep::Nothing { 2 } else { config.n_layers + 1 };
        let n_tapes = if keep == Keep::All { config.n_layers } else { 1 };
        let back = if keep == Keep::Nothing { 0 } else { 2 * d + 2 * d_ff + heads.d_q() + heads.d_qkv() };
        let (tape, tape_f32) = Tape::<D>::size(config);
        let acts = n_inputs * d + n_tapes * tape + 2 * d + d_ff + back;
        let numbers = n_tapes * tape_f32 + 1;
        (max_tokens * (acts * act_bytes + numbers * 4)) as u64
    }

    /// The maximum number of tokens in a batch.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    fn input(&self, layer: usize) -> usize {
        if self.keep == Keep::Nothing { layer % 2 } else { layer }
    }
}

/// One layer applied to one batch.
struct LayerPass<'a, D: Device> {
    device: &'a D,
    model: &'a Model<D>,
    layer: &'a Layer<D>,
    spans: &'a Spans<D>,
}

impl<D: Device> LayerPass<'_, D> {
    /// From the layer's input to its rotated query, key and value heads: fills `tape.raw` and `tape.qkv`.
    fn heads(&self, x: &D::Act, normed: &mut D::Act, tape: &mut Tape<D>) -> DeviceResult {
        let Self { device, model, layer, spans } = self;
        let &ModelConfig { d_model, heads, norm_eps, .. } = &model.config;
        let n = spans.n_tokens();
        device.rms_norm(x, n, &layer.attention_gain, d_model, norm_eps, normed)?;
        layer.qkv.forward(*device, normed, n, false, &mut tape.qkv)?;
        if let (Some([q_gain, k_gain]), Some(raw)) = (&layer.head_gains, &mut tape.raw) {
            device.copy(&tape.qkv, 0, raw, 0, n * heads.d_qkv())?;
            device.head_norm(&mut tape.qkv, n, heads, q_gain, k_gain, norm_eps)?;
        }
        device.rope(&mut tape.qkv, &spans.positions, n, heads, &model.frequencies, false)
    }

    /// From the attention output to gate and up: fills `tape.middle` and `tape.gate_up`.
    fn gates(&self, x: &D::Act, normed: &mut D::Act, tape: &mut Tape<D>) -> DeviceResult {
        let Self { device, model, layer, spans } = self;
        let &ModelConfig { d_model, norm_eps, .. } = &model.config;
        let n = spans.n_tokens();
        device.copy(x, 0, &mut tape.middle, 0, n * d_model)?;
        layer.out.forward(*device, &tape.attended, n, true, &mut tape.middle)?;
        device.rms_norm(&tape.middle, n, &layer.mlp_gain, d_model, norm_eps, normed)?;
        layer.gate_up.forward(*device, normed, n, false, &mut tape.gate_up)
    }

    /// From gate and up to the layer's output.
    fn output(&self, tape: &Tape<D>, hidden: &mut D::Act, out: &mut D::Act) -> DeviceResult {
        let (n, &ModelConfig { d_model, d_ff, .. }) = (self.spans.n_tokens(), &self.model.config);
        self.device.swiglu(&tape.gate_up, n, d_ff, hidden)?;
        self.device.copy(&tape.middle, 0, out, 0, n * d_model)?;
        self.layer.down.forward(self.device, hidden, n, true, out)
    }
}

impl<D: Device> Linear<D> {
    fn forward(&self, device: &D, x: &D::Act, n: usize, accumulate: bool, y: &mut D::Act) -> DeviceResult {
        device.linear(x, n, &self.weight, self.bias.as_ref(), accumulate, y)
    }

    /// Accumulates the gradient of the deltas.
    fn accumulate_grad(&mut self, device: &D, dy: &D::Act, x: &D::Act, n: usize) -> DeviceResult {
        if let Some(deltas) = &mut self.deltas {
            device.gather_dot(dy, x, n, (self.d_out, self.d_in), deltas)?;
        }
        match &mut self.bias_deltas {
            Some(deltas) => device.bias_grad(dy, n, self.d_out, deltas),
            None => Ok(()),
        }
    }
}

/// Runs all layers; leaves the final activations in the workspace.
///
/// # Errors
/// Errors of the device.
///
/// # Panics
/// If the batch has more tokens than the workspace allows.
pub fn forward<D: Device>(
    device: &D,
    model: &Model<D>,
    batch: &DeviceBatch<D>,
    work: &mut Workspace<D>,
) -> DeviceResult {
    let heads = model.config.heads;
    run_layers(device, model, &batch.ids, &batch.spans, work, |_, qkv, attended, lse| {
        device.attention(qkv, &batch.spans, heads, attended, lse)
    })
}

/// Runs all layers with the caller's attention, which receives the layer index, the heads, and the buffers for its
/// output and the log-sum-exp.
pub(super) fn run_layers<D: Device>(
    device: &D,
    model: &Model<D>,
    ids: &D::Ids,
    spans: &Spans<D>,
    work: &mut Workspace<D>,
    mut attend: impl FnMut(usize, &D::Act, &mut D::Act, &mut D::F32) -> DeviceResult,
) -> DeviceResult {
    let n = spans.n_tokens();
    assert!(n <= work.max_tokens, "a batch of {n} tokens fits in {}", work.max_tokens);
    device.embed(ids, n, &model.embedding, &mut work.inputs[0])?;
    for (i, layer) in model.layers.iter().enumerate() {
        let (from, to) = (work.input(i), work.input(i + 1));
        let [x, out] = work.inputs.get_disjoint_mut([from, to]).expect("two buffers");
        let Workspace { tapes, normed, hidden, .. } = work;
        let i_tape = i % tapes.len();
        let tape = &mut tapes[i_tape];
        let layer_pass = LayerPass { device, model, layer, spans };
        layer_pass.heads(x, normed, tape)?;
        attend(i, &tape.qkv, &mut tape.attended, &mut tape.lse)?;
        layer_pass.gates(x, normed, tape)?;
        layer_pass.output(tape, hidden, out)?;
    }
    Ok(())
}

/// The loss of each token that has a label, after [`forward`]. With a `grad_scale`, also starts the backward pass of
/// `grad_scale * sum(losses)`.
///
/// # Errors
/// Errors of the device.
pub fn losses<D: Device>(
    device: &D,
    model: &Model<D>,
    batch: &DeviceBatch<D>,
    work: &mut Workspace<D>,
    grad_scale: Option<f32>,
) -> Result<Vec<f32>, DeviceError> {
    let (d, eps, n) = (model.config.d_model, model.config.norm_eps, batch.n_supervised);
    let last = work.input(model.config.n_layers);
    let Workspace { inputs, normed, supervised, losses, back, .. } = work;
    device.take_rows(&inputs[last], &batch.rows, n, d, supervised)?;
    device.rms_norm(supervised, n, &model.gain, d, eps, normed)?;
    device.cross_entropy(normed, n, model.head(), &batch.labels, grad_scale, losses)?;
    if grad_scale.is_some() {
        let BackwardBuffers { dx, d_normed, .. } =
            back.as_mut().expect("a workspace that keeps inputs has backward buffers");
        // With zero rows this clears the whole buffer, for the addition below.
        device.put_rows(normed, &batch.rows, 0, d, n, d_normed)?;
        device.rms_norm_backward(normed, supervised, n, &model.gain, d, eps, d_normed)?;
        device.put_rows(d_normed, &batch.rows, n, d, batch.n(), dx)?;
    }
    device.read(losses, n)
}

/// `[rows.len(), n_vocab]` logits of the given tokens, after [`forward`].
///
/// # Errors
/// Errors of the device.
pub fn logits<D: Device>(
    device: &D,
    model: &Model<D>,
    rows: &[u32],
    work: &mut Workspace<D>,
) -> Result<Vec<f32>, DeviceError> {
    let n_vocab = model.config.n_vocab;
    let normed = last_rows(device, model, rows, work)?;
    let mut logits = device.act(rows.len() * n_vocab)?;
    device.linear(normed, rows.len(), model.head(), None, false, &mut logits)?;
    device.read_act(&logits, rows.len() * n_vocab)
}

/// The most likely next token after each of the given tokens, after [`forward`].
///
/// # Errors
/// Errors of the device.
pub(super) fn most_likely<D: Device>(
    device: &D,
    model: &Model<D>,
    rows: &[u32],
    work: &mut Workspace<D>,
) -> Result<Vec<u32>, DeviceError> {
    let normed = last_rows(device, model, rows, work)?;
    device.argmax(normed, rows.len(), model.head())
}

/// The loss of `labels[i]` as the token after `rows[i]`, after [`forward`].
///
/// # Errors
/// Errors of the device.
pub(super) fn losses_at<D: Device>(
    device: &D,
    model: &Model<D>,
    rows: &[u32],
    labels: &[u32],
    work: &mut Workspace<D>,
) -> Result<Vec<f32>, DeviceError> {
    last_rows(device, model, rows, work)?;
    let Workspace { normed, losses, .. } = work;
    device.cross_entropy(normed, rows.len(), model.head(), &device.ids(labels)?, None, losses)?;
    device.read(losses, rows.len())
}

/// The final norm's output for the given tokens, `[rows.len(), d_model]`.
fn last_rows<'w, D: Device>(
    device: &D,
    model: &Model<D>,
    rows: &[u32],
    work: &'w mut Workspace<D>,
) -> Result<&'w D::Act, DeviceError> {
    let (d, last) = (model.config.d_model, work.input(model.config.n_layers));
    let Workspace { inputs, normed, supervised, .. } = work;
    device.take_rows(&inputs[last], &device.ids(rows)?, rows.len(), d, supervised)?;
    device.rms_norm(supervised, rows.len(), &model.gain, d, model.config.norm_eps, normed)?;
    Ok(normed)
}

/// Adds the gradient of the loss to every delta, after [`forward`] and [`losses`] with a scale.
///
/// # Errors
/// Errors of the device.
pub fn backward<D: Device>(
    device: &D,
    model: &mut Model<D>,
    batch: &DeviceBatch<D>,
    work: &mut Workspace<D>,
) -> DeviceResult {
    let trains = |layer: &Layer<D>| layer.linears().iter().any(|linear| linear.trained().next().is_some());
    let Some(first) = model.layers.iter().position(trains) else { return Ok(()) };
    for i in (first..model.layers.len()).rev() {
        // The forward pass left the last layer's activations on the tape.
        if work.keep == Keep::Inputs && i + 1 < model.layers.len() {
            recompute_layer(device, model, batch, work, i)?;
        }
        layer_backward(device, model, batch, work, i, i > first)?;
    }
    Ok(())
}

/// Refills a layer's tape from its input.
fn recompute_layer<D: Device>(
    device: &D,
    model: &Model<D>,
    batch: &DeviceBatch<D>,
    work: &mut Workspace<D>,
    i: usize,
) -> DeviceResult {
    let Workspace { inputs, tapes, normed, .. } = work;
    let (x, tape) = (&inputs[i], &mut tapes[0]);
    let layer_pass = LayerPass { device, model, layer: &model.layers[i], spans: &batch.spans };
    layer_pass.heads(x, normed, tape)?;
    device.attention(&tape.qkv, &batch.spans, model.config.heads, &mut tape.attended, &mut tape.lse)?;
    layer_pass.gates(x, normed, tape)
}

/// The backward pass of one layer: `back.dx` is the gradient of its output, then of its input if `needs_input_grad`.
fn layer_backward<D: Device>(
    device: &D,
    model: &mut Model<D>,
    batch: &DeviceBatch<D>,
    work: &mut Workspace<D>,
    i: usize,
    needs_input_grad: bool,
) -> DeviceResult {
    let Model { config, layers, frequencies, .. } = model;
    let &mut ModelConfig { d_model, d_ff, heads, norm_eps, .. } = config;
    let (layer, n) = (&mut layers[i], batch.n());
    let Workspace { inputs, tapes, normed, hidden, back, .. } = work;
    let i_tape = i % tapes.len();
    let (x, tape) = (&inputs[i], &tapes[i_tape]);
    let BackwardBuffers { dx, d_normed, d_gate_up, d_attended, dqkv } =
        back.as_mut().expect("a workspace that keeps inputs has backward buffers");

    // Feed-forward: out = middle + down(swiglu(gate_up(norm(middle)))).
    device.swiglu(&tape.gate_up, n, d_ff, hidden)?;
    layer.down.accumulate_grad(device, dx, hidden, n)?;
    device.linear_backward(dx, n, &layer.down.weight, hidden)?;
    device.swiglu_backward(hidden, &tape.gate_up, n, d_ff, d_gate_up)?;
    device.rms_norm(&tape.middle, n, &layer.mlp_gain, d_model, norm_eps, normed)?;
    layer.gate_up.accumulate_grad(device, d_gate_up, normed, n)?;
    device.linear_backward(d_gate_up, n, &layer.gate_up.weight, d_normed)?;
    device.rms_norm_backward(d_normed, &tape.middle, n, &layer.mlp_gain, d_model, norm_eps, dx)?;

    // Attention: middle = x + out(attention(rope(qkv(norm(x))))).
    layer.out.accumulate_grad(device, dx, &tape.attended, n)?;
    device.linear_backward(dx, n, &layer.out.weight, d_attended)?;
    device.attention_backward(d_attended, &tape.qkv, &tape.attended, &tape.lse, &batch.spans, heads, dqkv)?;
    device.rope(dqkv, &batch.spans.positions, n, heads, frequencies, true)?;
    if let (Some([q_gain, k_gain]), Some(raw)) = (&layer.head_gains, &tape.raw) {
        device.head_norm_backward(dqkv, raw, n, heads, q_gain, k_gain, norm_eps)?;
    }
    device.rms_norm(x, n, &layer.attention_gain, d_model, norm_eps, normed)?;
    layer.qkv.accumulate_grad(device, dqkv, normed, n)?;
    if needs_input_grad {
        device.linear_backward(dqkv, n, &layer.qkv.weight, d_normed)?;
        device.rms_norm_backward(d_normed, x, n, &layer.attention_gain, d_model, norm_eps, dx)?;
    }
    Ok(())
}

/// Describes the first tensor of the last forward pass that is not finite.
///
/// # Errors
/// Errors of the device.
pub fn first_non_finite<D: Device>(
    device: &D,
    model: &Model<D>,
    n: usize,
    work: &Workspace<D>,
) -> Result<String, DeviceError> {
    let d = model.config.d_model;
    let is_finite = |x: &D::Act| Ok::<_, DeviceError>(device.read_act(x, n * d)?.iter().all(|x| x.is_finite()));
    if work.keep != Keep::Nothing {
        for (i, x) in work.inputs.iter().enumerate() {
            if !is_finite(x)? {
                return Ok(match i.checked_sub(1) {
                    None => "the embedding of its tokens".to_owned(),
                    Some(layer) => format!("the output of model.layers.{layer}"),
                });
            }
        }
    }
    Ok("the logits (lm_head)".to_owned())
}
