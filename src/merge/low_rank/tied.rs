//! Heads that are the embedding: one tensor, which must not be changed for the sake of one of the two, nor twice.

use super::{factors::Matrix, planner::Planner};
use crate::{
    checkpoint::{Printable, TensorRef},
    merge::{MergeError, Undecided},
    peft::{LoraAdapter, LoraModule, LoraShape},
    tensor::projection_kind,
};

/// Last words of modules that embed tokens, and of those that turn states into tokens.
const EMBEDDINGS: [&str; 5] = ["embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"];
const HEADS: [&str; 3] = ["lm_head", "embed_out", "output"];

impl<'a> Planner<'a> {
    /// Whether the head is the embedding.
    fn is_tied(&self) -> bool {
        let said = self.checkpoint.config().get("tie_word_embeddings").and_then(serde_json::Value::as_bool);
        let said = said.or_else(|| self.checkpoint.config().get("text_config")?.get("tie_word_embeddings")?.as_bool());
        let has_head = || HEADS.iter().any(|head| self.names.find(&format!("{head}.weight")).is_some());
        said.unwrap_or_else(|| !has_head() && self.embedding().is_some())
    }

    fn embedding(&self) -> Option<TensorRef<'a>> {
        let is_embedding = |tensor: &TensorRef<'_>| EMBEDDINGS.contains(&projection_kind(&tensor.info.name));
        let mut found = self.checkpoint.tensors().filter(is_embedding);
        found.next().filter(|_| found.next().is_none())
    }

    /// The embedding, where `name` is the head and there is no other.
    pub(super) fn tied_tensor(&self, name: &str) -> Option<TensorRef<'a>> {
        let is_head = name.ends_with(".weight") && HEADS.contains(&projection_kind(name));
        if is_head && self.is_tied() { self.embedding() } else { None }
    }

    /// Refuses to change a tensor that is embedding and head for the sake of one of them, unless told to.
    pub(super) fn refuse_tied(&mut self, lora: &LoraAdapter, name: &str) -> Result<(), MergeError> {
        let kind = projection_kind(name);
        let (is_head, is_embedding) = (HEADS.contains(&kind), EMBEDDINGS.contains(&kind));
        if !name.ends_with(".weight") || !(is_head || is_embedding) || !self.is_tied() {
            return Ok(());
        }
        let has_both = |kinds: &[&str]| lora.modules().iter().any(|m| kinds.contains(&projection_kind(&m.target())));
        if is_embedding && has_both(&HEADS) && has_both(&EMBEDDINGS) && self.names.find("lm_head.weight").is_none() {
            // Two adapters of the one tensor; that they are the same one is proven where the head's turn comes.
            return Ok(());
        }
        if is_head && self.names.find(name).is_some() {
            return Err(self.refused(format!(
                "\"{}\": config.json says that the head is the embedding (`tie_word_embeddings`), so nobody would read what is merged \
                 here; set it to false first",
                Printable(name)
            )));
        }
        if !self.reading.tied_head {
            let (this, other) = if is_head { ("head", "embedding") } else { ("embedding", "head") };
            let what = format!(
                "the head is the embedding, one tensor, and the adapter was trained on the {this} alone: merged, it would change the \
                 {other} too"
            );
            return Err(self.undecided(name, Undecided::TiedHead, what));
        }
        let note = format!("{} is head and embedding: what is merged into one changes the other", Printable(name));
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
        Ok(())
    }

    /// Whether the adapter's full tensor `name` is the base's own, byte for byte: PEFT saves embeddings that it adapts.
    pub(super) fn is_unchanged_copy(&self, lora: &LoraAdapter, name: &str) -> Result<bool, MergeError> {
        let Some(full) = lora.full().iter().find(|full| full.name == name) else { return Ok(false) };
        let info = lora.tensor(&full.tensor);
        let found = self.names.find(name).or_else(|| self.tied_tensor(name));
        let found = found.and_then(|tensor| self.originals.tensor(&tensor.info.name));
        let Some(tensor) = found.filter(|t| (t.info.dtype, &t.info.shape) == (info.dtype, &info.shape)) else {
            return Ok(false);
        };
        let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        for start in (0..info.n_bytes()).step_by(1 << 20) {
            let n = (info.n_bytes() - start).min(1 << 20) as usize;
            lora.shard().read_at(&mut a[..n], lora.shard().file_range(info).start + start)?;
            tensor.shard.read_at(&mut b[..n], tensor.shard.file_range(tensor.info).start + start)?;
            if a[..n] != b[..n] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether `module` is the head, tied, and its factors are those of the embedding: the product is added once.
    pub(super) fn is_tied_head_done_with(
        &mut self,
        lora: &LoraAdapter,
        module: &LoraModule,
    ) -> Result<bool, MergeError> {
        let name = module.target();
        if self.tied_tensor(&name).is_none() || self.names.find(&name).is_some() {
            return Ok(false);
        }
        let is_embedding = |other: &&LoraModule| {
            matches!(other.shape, LoraShape::Embedding { .. }) && EMBEDDINGS.contains(&projection_kind(&other.target()))
        };
        let (Some(embedding), LoraShape::Linear { d_out, d_in }) =
            (lora.modules().iter().find(is_embedding), module.shape)
        else {
            return Ok(false);
        };
        let same_shape = embedding.shape == LoraShape::Embedding { vocabulary: d_out, d_out: d_in };
        let matrix = |tensor: &str, row_len: u64| {
            let info = lora.tensor(tensor);
            (info.n_elements(), Matrix::rows(lora.shard(), info, row_len))
        };
        let same = |(n, a): (u64, Matrix<'_>), (_, b): (u64, Matrix<'_>)| -> Result<bool, MergeError> {
            let (rows, columns) = (n / module.rank, module.rank);
            for first in (0..rows).step_by(4096) {
                let part = first..rows.min(first + 4096);
                if a.read(part.clone(), 0..columns)? != b.transposed().read(part, 0..columns)? {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        let is_same = same_shape
            && embedding.rank == module.rank
            && embedding.scaling == module.scaling
            && embedding.magnitude.is_none()
            && module.magnitude.is_none()
            && same(matrix(&module.b, module.rank), matrix(&embedding.a, d_out))?
            && same(matrix(&embedding.b, module.rank), matrix(&module.a, d_in))?;
        if !is_same {
            return Err(self.refused(format!(
                "\"{}\": the head is the embedding, one tensor, and the adapter has different factors for the two",
                Printable(&name)
            )));
        }
        self.notes.push(format!("{} is the embedding, and so is its adapter: merged once", Printable(&name)));
        Ok(true)
    }
}
