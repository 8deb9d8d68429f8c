//! Where in a checkpoint the parameter of a module lies.
//!
//! An adapter names modules as the model has them in memory; a checkpoint names tensors as they were saved. Mostly that is the
//! same name. Where it is not, a rule of [`RENAMES`] is tried: the prefix that a model type adds or drops when it loads. And
//! experts may be one tensor each on disk and one stack in memory, or the other way round: [`ModuleNames::places`] says which
//! rows belong together. Nothing is taken that has not the shape the adapter needs.

use crate::checkpoint::{Checkpoint, TensorRef};

/// What a module's name may begin with in memory, and on disk instead; both may be empty. Tried in order.
const RENAMES: &[(&str, &str)] = &[
    // Models with vision towers, since transformers 4.52.
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
    ("language_model.", "model.language_model."),
    // Saved from the model without its head, or trained on it.
    ("transformer.", ""),
    ("model.", ""),
    ("bert.", ""),
    ("roberta.", ""),
    ("", "transformer."),
    ("", "model."),
];
/// Names of the three projections of one expert on disk: gate, up and down.
const EXPERT_NAMES: [[&str; 3]; 2] = [["gate_proj", "up_proj", "down_proj"], ["w1", "w3", "w2"]];
/// What holds the experts in memory, and on disk instead.
const EXPERT_FOLDERS: &[(&str, &str)] =
    &[(".mlp.experts", ".mlp.experts"), (".mlp.experts", ".block_sparse_moe.experts")];

/// Rows of a stored tensor that belong to rows of one matrix of an adapter's product.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The tensor.
    pub tensor: TensorRef<'a>,
    /// The first of the tensor's rows, all dimensions but the last counted as rows.
    pub first_row: u64,
    /// Which rows, of which matrix of the product.
    pub part: Part,
}

/// A run of rows of one matrix of an adapter's product.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Which matrix: the expert of a stack, or 0.
    pub matrix: u64,
    /// The first row.
    pub first_row: u64,
    /// How many.
    pub n_rows: u64,
}

/// Finds modules in a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct ModuleNames<'a> {
    checkpoint: &'a Checkpoint,
}

impl<'a> ModuleNames<'a> {
    /// For the modules of `checkpoint`.
    pub fn new(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint }
    }

    /// The tensor of the parameter `name`, such as `model.layers.0.self_attn.q_proj.weight`, under its own name or renamed.
    pub fn find(&self, name: &str) -> Option<TensorRef<'a>> {
        self.checkpoint.tensor(name).or_else(|| {
            RENAMES.iter().find_map(|(in_memory, on_disk)| {
                let rest = name.strip_prefix(in_memory)?;
                self.checkpoint.tensor(&format!("{on_disk}{rest}"))
            })
        })
    }

    /// The places of a product of `n_matrices` matrices of `[n_rows, n_columns]` that is added to the parameter `name`, or `None`
    /// where the checkpoint has no such parameter, or in another shape. A stack on disk has as many matrices as the product.
    pub fn places(&self, name: &str, n_matrices: u64, n_rows: u64, n_columns: u64) -> Option<Vec<Place<'a>>> {
        let part = |matrix| Part { matrix, first_row: 0, n_rows };
        if let Some(tensor) = self.find(name) {
            let (&last, rest) = tensor.info.shape.split_last()?;
            let stored_rows: u64 = rest.iter().product();
            // Of a convolution, all dimensions but the first belong to a row.
            let as_matrix = (stored_rows, last) == (n_matrices.checked_mul(n_rows)?, n_columns);
            let n_elements = tensor.info.n_elements();
            let as_kernel = n_matrices == 1
                && tensor.info.shape.len() > 2
                && tensor.info.shape[0] == n_rows
                && n_rows.checked_mul(n_columns) == Some(n_elements);
            if !as_matrix && !as_kernel {
                return None;
            }
            let place = |matrix| Place { tensor, first_row: matrix * n_rows, part: part(matrix) };
            return Some((0..n_matrices).map(place).collect());
        }
        self.places_of_separate_experts(name, n_matrices, n_rows, n_columns)
            .or_else(|| self.places_in_a_stack(name, n_matrices, n_rows, n_columns))
    }

    /// One stack in memory, one tensor per expert on disk.
    fn places_of_separate_experts(&self, name: &str, n: u64, n_rows: u64, n_columns: u64) -> Option<Vec<Place<'a>>> {
        let (module, parameter) = name.rsplit_once('.')?;
        for (in_memory, on_disk) in EXPERT_FOLDERS {
            let Some(before) = module.strip_suffix(in_memory) else { continue };
            for [gate, up, down] in EXPERT_NAMES {
                let names: &[&str] = match parameter {
                    "gate_up_proj" => &[gate, up],
                    "down_proj" => &[down],
                    _ => return None,
                };
                let share = n_rows / names.len() as u64;
                if share == 0 || share * names.len() as u64 != n_rows {
                    return None;
                }
                let mut places = Vec::new();
                'experts: for matrix in 0..n {
                    for (first, name) in (0..).step_by(share as usize).zip(names) {
                        let tensor = self.find(&format!("{before}{on_disk}.{matrix}.{name}.weight"));
                        let Some(tensor) = tensor.filter(|t| t.info.shape == [share, n_columns]) else {
                            break 'experts;
                        };
                        places.push(Place {
                            tensor,
                            first_row: 0,
                            part: Part { matrix, first_row: first, n_rows: share },
                        });
                    }
                }
                if places.len() as u64 == n * names.len() as u64 {
                    return Some(places);
                }
            }
        }
        None
    }

    /// One module per expert in memory, one stack on disk: `EXPERTS.3.up_proj.weight` is a part of `EXPERTS.gate_up_proj`.
    fn places_in_a_stack(&self, name: &str, n: u64, n_rows: u64, n_columns: u64) -> Option<Vec<Place<'a>>> {
        let (rest, projection) = name.strip_suffix(".weight").filter(|_| n == 1)?.rsplit_once('.')?;
        let (module, expert) = rest.rsplit_once('.')?;
        let expert: u64 = expert.parse().ok()?;
        let module =
            module.strip_suffix(".block_sparse_moe.experts").map_or(module.to_owned(), |m| format!("{m}.mlp.experts"));
        let at = EXPERT_NAMES.iter().find_map(|names| names.iter().position(|name| *name == projection))?;
        let (parameter, per_expert) = if at == 2 { ("down_proj", n_rows) } else { ("gate_up_proj", 2 * n_rows) };
        let tensor = self.find(&format!("{module}.{parameter}"))?;
        let [n_experts, rows, columns] = tensor.info.shape[..] else { return None };
        if expert >= n_experts || (rows, columns) != (per_expert, n_columns) {
            return None;
        }
        let first_row = expert * rows + if at == 1 { n_rows } else { 0 };
        Some(vec![Place { tensor, first_row, part: Part { matrix: 0, first_row: 0, n_rows } }])
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        checkpoint::{Context, Existing, TensorFileWriter},
        tensor::Dtype,
    };

    fn checkpoint(folder: &std::path::Path, tensors: &[(&str, &[u64])]) -> Checkpoint {
        let path = folder.join("model.safetensors");
        let mut file = TensorFileWriter::create(&path, Existing::Replace).unwrap();
        for (name, shape) in tensors {
            let id = file.add_tensor((*name).to_owned(), Dtype::U8);
            file.append(id, &vec![0; shape.iter().product::<u64>() as usize]).unwrap();
            file.finish_tensor(id, shape.to_vec());
        }
        file.finish(&Context::default(), &BTreeMap::new()).unwrap();
        Checkpoint::open(&path).unwrap()
    }

    fn told(places: Option<Vec<Place<'_>>>) -> Vec<(String, u64, u64, u64, u64)> {
        let told =
            |p: &Place<'_>| (p.tensor.info.name.clone(), p.first_row, p.part.matrix, p.part.first_row, p.part.n_rows);
        places.unwrap_or_default().iter().map(told).collect()
    }

    #[test]
    fn names_are_found_as_they_are_or_by_the_first_rule_that_leads_somewhere() {
        let dir = tempfile::tempdir().unwrap();
        let names = ["model.layers.0.q.weight", "language_model.model.a.weight", "h.0.c.weight", "visual.v.weight"];
        let checkpoint = checkpoint(dir.path(), &names.map(|name| (name, &[2, 3][..])));
        let names = ModuleNames::new(&checkpoint);
        for (in_memory, on_disk) in [
            ("model.layers.0.q.weight", "model.layers.0.q.weight"),
            ("model.language_model.a.weight", "language_model.model.a.weight"),
            ("model.language_model.layers.0.q.weight", "model.layers.0.q.weight"),
            ("transformer.h.0.c.weight", "h.0.c.weight"),
            ("model.visual.v.weight", "visual.v.weight"),
            ("layers.0.q.weight", "model.layers.0.q.weight"),
        ] {
            assert_eq!(names.find(in_memory).unwrap().info.name, on_disk, "{in_memory}");
        }
        assert!(names.find("model.layers.1.q.weight").is_none());
        assert!(names.places("model.layers.0.q.weight", 1, 3, 2).is_none());
        assert_eq!(told(names.places("model.layers.0.q.weight", 1, 2, 3)).len(), 1);
    }

    #[test]
    fn experts_are_found_in_stacks_and_apart() {
        let dir = tempfile::tempdir().unwrap();
        let apart: Vec<String> = (0..2)
            .flat_map(|e| ["w1", "w2", "w3"].map(|w| format!("model.layers.0.block_sparse_moe.experts.{e}.{w}.weight")))
            .collect();
        let mut tensors: Vec<(&str, &[u64])> = Vec::new();
        for name in &apart {
            tensors.push((name, if name.contains("w2") { &[3, 4] } else { &[4, 3] }));
        }
        tensors.push(("model.layers.1.mlp.experts.gate_up_proj", &[2, 8, 3]));
        let checkpoint = checkpoint(dir.path(), &tensors);
        let names = ModuleNames::new(&checkpoint);
        let name = |e: u64, w: &str| format!("model.layers.0.block_sparse_moe.experts.{e}.{w}.weight");
        assert_eq!(
            told(names.places("model.layers.0.mlp.experts.gate_up_proj", 2, 8, 3)),
            [
                (name(0, "w1"), 0, 0, 0, 4),
                (name(0, "w3"), 0, 0, 4, 4),
                (name(1, "w1"), 0, 1, 0, 4),
                (name(1, "w3"), 0, 1, 4, 4)
            ]
        );
        assert_eq!(
            told(names.places("model.layers.0.mlp.experts.down_proj", 2, 3, 4)),
            [(name(0, "w2"), 0, 0, 0, 3), (name(1, "w2"), 0, 1, 0, 3)]
        );
        let stack = "model.layers.1.mlp.experts.gate_up_proj".to_owned();
        assert_eq!(told(names.places(&stack, 2, 8, 3)), [(stack.clone(), 0, 0, 0, 8), (stack.clone(), 8, 1, 0, 8)]);
        let up = "model.layers.1.mlp.experts.1.up_proj.weight";
        assert_eq!(told(names.places(up, 1, 4, 3)), [(stack, 12, 0, 0, 4)]);
        assert!(names.places("model.layers.1.mlp.experts.2.up_proj.weight", 1, 4, 3).is_none());
        assert!(names.places("model.layers.0.mlp.experts.gate_up_proj", 3, 8, 3).is_none());
    }
}
