//! Checkpoints with the shapes of real models and synthetic weights.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
};

use serde_json::{Map, Value, json};

/// The sizes of a Llama model.
#[derive(Clone, Copy)]
pub struct Shape {
    pub name: &'static str,
    hidden: u64,
    intermediate: u64,
    layers: u64,
    heads: u64,
    kv_heads: u64,
    vocab: u64,
}

pub const SHAPES: [Shape; 4] = [
    Shape { name: "135m", hidden: 576, intermediate: 1536, layers: 30, heads: 9, kv_heads: 3, vocab: 49_152 },
    Shape { name: "1b", hidden: 2048, intermediate: 5632, layers: 22, heads: 32, kv_heads: 4, vocab: 32_000 },
    Shape { name: "8b", hidden: 4096, intermediate: 14_336, layers: 32, heads: 32, kv_heads: 8, vocab: 128_256 },
    Shape { name: "70b", hidden: 8192, intermediate: 28_672, layers: 80, heads: 64, kv_heads: 8, vocab: 128_256 },
];

/// Approximate size of a shard in bytes.
const SHARD_BYTES: u64 = 5_000_000_000;
/// Elements of the noise from which all tensors are cut.
const NOISE: usize = 8 << 20;

impl Shape {
    /// Names and shapes of all tensors.
    fn tensors(&self) -> Vec<(String, Vec<u64>)> {
        let Self { hidden, intermediate, layers, heads, kv_heads, vocab, .. } = *self;
        let kv = hidden / heads * kv_heads;
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
        for layer in 0..layers {
            for (name, shape) in [
                ("input_layernorm", vec![hidden]),
                ("mlp.down_proj", vec![hidden, intermediate]),
                ("mlp.gate_proj", vec![intermediate, hidden]),
                ("mlp.up_proj", vec![intermediate, hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("self_attn.k_proj", vec![kv, hidden]),
                ("self_attn.o_proj", vec![hidden, hidden]),
                ("self_attn.q_proj", vec![hidden, hidden]),
                ("self_attn.v_proj", vec![kv, hidden]),
            ] {
                tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
            }
        }
        tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
        tensors.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
        tensors
    }

    /// Writes the checkpoint to `folder`, unless it exists.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        if folder.join("config.json").exists() {
            return Ok(());
        }
        fs::create_dir_all(folder)?;
        let noise = noise();
        let bytes_of = |shape: &[u64]| 2 * shape.iter().product::<u64>();
        let mut shards: Vec<Vec<(String, Vec<u64>)>> = vec![Vec::new()];
        let mut in_shard = 0;
        for (name, shape) in self.tensors() {
            if in_shard + bytes_of(&shape) > SHARD_BYTES && in_shard > 0 {
                shards.push(Vec::new());
                in_shard = 0;
            }
            in_shard += bytes_of(&shape);
            shards.last_mut().expect("there is one").push((name, shape));
        }
        let mut weight_map = Map::new();
        let mut total = 0;
        for (i, shard) in shards.iter().enumerate() {
            let file = match shards.len() {
                1 => "model.safetensors".to_owned(),
                n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
            };
            let mut header = Map::new();
            let mut at = 0;
            for (name, shape) in shard {
                let end = at + bytes_of(shape);
                header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}));
                weight_map.insert(name.clone(), json!(file));
                at = end;
            }
            total += at;
            let mut header = serde_json::to_string(&header)?;
            while header.len() % 8 != 0 {
                header.push(' ');
            }
            let mut out = BufWriter::new(File::create(folder.join(&file))?);
            out.write_all(&(header.len() as u64).to_le_bytes())?;
            out.write_all(header.as_bytes())?;
            for (i, (name, shape)) in shard.iter().enumerate() {
                // Every tensor begins at a different offset of the noise, so that no two are the same.
                let seed = name.bytes().fold(i, |seed, byte| seed.wrapping_mul(31).wrapping_add(usize::from(byte)));
                let (mut at, mut left) = (2 * (seed.wrapping_mul(0x9e37_79b1) % NOISE), bytes_of(shape) as usize);
                while left > 0 {
                    let n = left.min(noise.len() - at);
                    out.write_all(&noise[at..at + n])?;
                    (at, left) = (0, left - n);
                }
            }
            out.into_inner()?.sync_all()?;
        }
        if shards.len() > 1 {
            let index = json!({"metadata": {"total_size": total}, "weight_map": Value::Object(weight_map)});
            fs::write(folder.join("model.safetensors.index.json"), serde_json::to_vec(&index)?)?;
        }
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab,
        });
        // Written last: a checkpoint that has it is complete.
        fs::write(folder.join("config.json"), serde_json::to_vec_pretty(&config)?)
    }
}

/// Bell-shaped bf16 weights with a standard deviation of about 0.02.
fn noise() -> Vec<u8> {
    let mut state = 1u64;
    let mut even = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let mut weight = || half::bf16::from_f32(0.035 * (even() + even() + even() + even()));
    (0..NOISE).flat_map(|_| weight().to_le_bytes()).collect()
}
