//! Changes in place that are disturbed: their command lines, the states before and after them, and what must hold after recovery.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use neuroada_ckpt::{Context, Dtype, Existing, internals::checkpoint::TensorFileWriter};

use super::{copy_tree, run};
use crate::world::{self, Random, World, tree};

/// Kinds of changes that are tested: each gets the same share of a run's cycles. Two as soon as LoRA adapters are merged in place.
pub(crate) const N_KINDS: u64 = 2;

/// Which adapters are merged, and what undoing a change relies on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Sparse adapters; the originals are in the ledger.
    Sparse,
    /// LoRA adapters (0 and 1) and a sparse one (2); all originals are kept beside the weights.
    LoraOriginals,
    /// The same; the originals are those of the base, which lies elsewhere.
    LoraBase,
}

/// A change in place: which adapters of the kind are merged before it, and after it.
#[derive(Clone, Copy)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    before: &'static [usize],
    after: &'static [usize],
}

pub(crate) const SPARSE: [Scenario; 4] = [
    Scenario { name: "first merge", kind: Kind::Sparse, before: &[], after: &[0] },
    Scenario { name: "second merge", kind: Kind::Sparse, before: &[1], after: &[1, 3] },
    Scenario { name: "unmerge one", kind: Kind::Sparse, before: &[0, 1], after: &[1] },
    Scenario { name: "unmerge all", kind: Kind::Sparse, before: &[0, 2], after: &[] },
];

/// The changes of LoRA adapters: those that keep originals, then those that need the base.
pub(crate) fn lora() -> Vec<Scenario> {
    let of = |kind| {
        [
            Scenario { name: "first merge of LoRA", kind, before: &[], after: &[0] },
            Scenario { name: "merge of LoRA onto a sparse merge", kind, before: &[2], after: &[0, 2] },
            Scenario { name: "unmerge one LoRA", kind, before: &[0, 1], after: &[1] },
            Scenario { name: "unmerge LoRA and sparse", kind, before: &[0, 2], after: &[] },
        ]
    };
    [of(Kind::LoraOriginals), of(Kind::LoraBase)].concat()
}

/// The number of the sparse adapter beside the LoRAs.
const SPARSE_AMONG_LORA: usize = 2;

impl Kind {
    /// The checkpoint that the adapters were made for.
    pub(crate) fn base(self, world: &World) -> PathBuf {
        match self {
            Self::Sparse => world.base(),
            Self::LoraOriginals | Self::LoraBase => world.at("lora-base"),
        }
    }

    /// The i-th adapter, as `merge` is given it.
    fn adapter(self, world: &World, i: usize) -> String {
        if self == Self::Sparse {
            let input = world.input(i);
            let scale = input.scale.map_or(String::new(), |scale| format!("={scale}"));
            return format!("{}{scale}", input.adapter.display());
        }
        format!("{}{}", self.path(world, i), ["", "=0.3", "=-1.7"][i])
    }

    /// The i-th adapter, as `unmerge` is given it.
    fn merged_adapter(self, world: &World, i: usize) -> String {
        match self {
            Self::Sparse => world.ids[i].to_string(),
            Self::LoraOriginals | Self::LoraBase => self.path(world, i),
        }
    }

    fn path(self, world: &World, i: usize) -> String {
        world.at(["lora-0", "lora-1", "lora-2.safetensors"][i]).display().to_string()
    }

    /// `--base BASE`, where undoing needs it.
    fn base_words(self, world: &World) -> Vec<String> {
        match self {
            Self::LoraBase => vec!["--base".to_owned(), self.base(world).display().to_string()],
            Self::Sparse | Self::LoraOriginals => Vec::new(),
        }
    }

    /// Where originals come from, for a merge that adds these adapters.
    fn originals_words(self, world: &World, added: &[usize]) -> Vec<String> {
        match self {
            _ if added.iter().all(|&i| i == SPARSE_AMONG_LORA) => Vec::new(),
            Self::LoraOriginals => vec!["--keep-originals".to_owned()],
            Self::Sparse | Self::LoraBase => self.base_words(world),
        }
    }
}

impl Scenario {
    /// The command line that makes this change at `path`; its third word is `--in-workspace`.
    pub(crate) fn arguments(&self, world: &World, path: &Path) -> Vec<String> {
        let without = |all: &[usize], these: &[usize]| -> Vec<usize> {
            all.iter().copied().filter(|i| !these.contains(i)).collect()
        };
        let (added, removed) = (without(self.after, self.before), without(self.before, self.after));
        if !added.is_empty() {
            return self.merge_line(world, path, &added);
        }
        let mut arguments = vec!["unmerge".to_owned(), path.display().to_string(), "--in-place".to_owned()];
        arguments.extend(self.kind.base_words(world));
        for i in removed {
            arguments.extend(["--adapter".to_owned(), self.kind.merged_adapter(world, i)]);
        }
        arguments
    }

    fn merge_line(&self, world: &World, path: &Path, added: &[usize]) -> Vec<String> {
        let mut arguments = vec!["merge".to_owned(), path.display().to_string(), "--in-place".to_owned()];
        arguments.extend(self.kind.originals_words(world, added));
        for &i in added {
            arguments.extend(["--adapter".to_owned(), self.kind.adapter(world, i)]);
        }
        arguments
    }

    /// The command line that recovers `path`.
    pub(crate) fn recover_line(&self, world: &World, path: &Path) -> Vec<String> {
        let mut arguments = vec!["recover".to_owned(), path.display().to_string()];
        arguments.extend(self.kind.base_words(world));
        arguments
    }

    /// A checkpoint in the state before the change, at `path`.
    pub(crate) fn prepare(&self, world: &World, path: &Path) {
        copy_tree(&self.kind.base(world), path);
        self.merge(world, path, self.before);
    }

    fn merge(&self, world: &World, path: &Path, which: &[usize]) {
        if which.is_empty() {
            return;
        }
        let output = run(&self.merge_line(world, path, which));
        assert!(output.status.success(), "{}: {}", self.name, String::from_utf8_lossy(&output.stderr));
    }

    /// The shards before and after the change.
    pub(crate) fn states(&self, world: &World) -> [Shards; 2] {
        [self.before, self.after].map(|which| {
            let path = world.at("state");
            copy_tree(&self.kind.base(world), &path);
            self.merge(world, &path, which);
            let state = shards(&path);
            fs::remove_dir_all(&path).unwrap();
            state
        })
    }

    /// After whatever happened to `path`: recovery ends well, the shards are those of one state, and the ledger is that state's.
    /// Returns which state it is.
    pub(crate) fn check_recovers(&self, world: &World, path: &Path, states: &[Shards; 2], what: &str) -> usize {
        let arguments = |command: &str| vec![command.to_owned(), path.display().to_string()];
        if self.kind == Kind::LoraBase {
            // Where the base is needed and was not named, nothing changes.
            let before = tree(path);
            let output = run(&arguments("recover"));
            assert!(output.status.success() || tree(path) == before, "{what}: recovery without the base changed files");
        }
        let output = run(&self.recover_line(world, path));
        assert!(output.status.success(), "{what}: recover: {}", String::from_utf8_lossy(&output.stderr));
        let found = shards(path);
        let state = states.iter().position(|state| *state == found);
        let state =
            state.unwrap_or_else(|| panic!("{what}: the shards are neither those before nor those after the change"));
        let has_ledger = path.join(".neuroada/ledger").exists();
        if [self.before, self.after][state].is_empty() {
            let mut unmerge = arguments("unmerge");
            unmerge.push("--in-place".to_owned());
            unmerge.extend(self.kind.base_words(world));
            let output = run(&unmerge);
            assert!(
                !has_ledger || output.status.success() || output.status.code() == Some(4),
                "{what}: nothing is merged"
            );
        } else {
            assert!(has_ledger, "{what}: the ledger of state {state} is there");
            let output = run(&arguments("verify").into_iter().chain(self.kind.base_words(world)).collect::<Vec<_>>());
            assert!(output.status.success(), "{what}: verify: {}", String::from_utf8_lossy(&output.stdout));
        }
        state
    }
}

/// The bytes of every shard, by name.
pub(crate) type Shards = BTreeMap<PathBuf, Vec<u8>>;

pub(crate) fn shards(folder: &Path) -> Shards {
    tree(folder)
        .into_iter()
        .filter(|(path, _)| path.extension().is_some_and(|e| e == "safetensors") && path.components().count() == 1)
        .collect()
}

/// [`World::new`] with a second base, of weights that LoRA adapters fit, and its three adapters.
pub(crate) fn world_with_lora() -> World {
    let world = World::new();
    let base = world.at("lora-base");
    fs::create_dir(&base).unwrap();
    fs::write(base.join("config.json"), "{\"model_type\":\"llama\",\"tie_word_embeddings\":false}").unwrap();
    let mut random = Random(11);
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let first = [("m.a.weight", Dtype::BF16, [150, 37]), ("m.b.weight", Dtype::F32, [64, 70])];
    let second = [("m.c.weight", Dtype::F16, [190, 40]), ("m.other.weight", Dtype::BF16, [20, 20])];
    write_tensors(&base.join(one), &first, &mut random);
    write_tensors(&base.join(two), &second, &mut random);
    let shard_of = |tensors: &[(&str, Dtype, [u64; 2])], shard: &str| {
        tensors.iter().map(|(name, ..)| ((*name).to_owned(), shard.to_owned())).collect::<Vec<_>>()
    };
    let weight_map: BTreeMap<_, _> = [shard_of(&first, one), shard_of(&second, two)].concat().into_iter().collect();
    let index = serde_json::json!({ "metadata": {}, "weight_map": weight_map });
    fs::write(base.join("model.safetensors.index.json"), index.to_string()).unwrap();

    write_lora(&world.at("lora-0"), 3, &[("m.a", 150, 37), ("m.c", 190, 40)], &mut random);
    write_lora(&world.at("lora-1"), 2, &[("m.a", 150, 37), ("m.b", 64, 70)], &mut random);
    world::write_adapter(&base, &world.at("lora-2.safetensors"), 12, &["m.b.weight", "m.c.weight"], false);
    world
}

/// A PEFT folder; of each module its name, `d_out` and `d_in`.
fn write_lora(folder: &Path, rank: u64, modules: &[(&str, u64, u64)], random: &mut Random) {
    fs::create_dir(folder).unwrap();
    let config = format!("{{\"peft_type\":\"LORA\",\"r\":{rank},\"lora_alpha\":{rank}}}");
    fs::write(folder.join("adapter_config.json"), config).unwrap();
    let factors = modules.iter().flat_map(|(module, d_out, d_in)| {
        let name = |factor: &str| format!("base_model.model.{module}.{factor}.weight");
        [(name("lora_A"), Dtype::F32, [rank, *d_in]), (name("lora_B"), Dtype::F32, [*d_out, rank])]
    });
    let factors: Vec<_> = factors.collect();
    let factors: Vec<_> = factors.iter().map(|(name, dtype, shape)| (name.as_str(), *dtype, *shape)).collect();
    write_tensors(&folder.join("adapter_model.safetensors"), &factors, random);
}

/// A safetensors file of random numbers in F32, F16 or BF16.
fn write_tensors(path: &Path, tensors: &[(&str, Dtype, [u64; 2])], random: &mut Random) {
    let mut file = TensorFileWriter::create(path, Existing::Keep).unwrap();
    for (name, dtype, shape) in tensors {
        let id = file.add_tensor((*name).to_owned(), *dtype);
        let values = (0..shape[0] * shape[1]).map(|_| random.delta());
        let bytes: Vec<u8> = match dtype {
            Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
            Dtype::F16 => values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
            _ => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
        };
        file.append(id, &bytes).unwrap();
        file.finish_tensor(id, shape.to_vec());
    }
    file.finish(&Context::default(), &BTreeMap::from([("format".to_owned(), "pt".to_owned())])).unwrap();
}
