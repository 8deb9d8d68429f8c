//! Small LoRA adapters and bases, made by hand.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use half::bf16;
use neuroada_ckpt::{
    AdapterReading, Checkpoint, Context, Dtype, Existing, MergeError, MergeInput, MergeOptions, MergeOutput,
    MergeReport,
    internals::{checkpoint::TensorFileWriter, merge},
};
use tempfile::TempDir;

/// Names, shapes and values.
pub type Tensors<'a> = &'a [(&'a str, &'a [u64], Vec<f32>)];

/// A safetensors file of these.
pub fn write_tensors(path: &Path, dtype: Dtype, tensors: Tensors<'_>) {
    let mut file = TensorFileWriter::create(path, Existing::Replace).unwrap();
    for (name, shape, values) in tensors {
        let id = file.add_tensor((*name).to_owned(), dtype);
        assert_eq!(values.len() as u64, shape.iter().product::<u64>(), "{name}");
        for &value in values {
            match dtype {
                Dtype::F32 => file.append(id, &value.to_le_bytes()).unwrap(),
                Dtype::BF16 => file.append(id, &bf16::from_f32(value).to_le_bytes()).unwrap(),
                Dtype::F64 => file.append(id, &f64::from(value).to_le_bytes()).unwrap(),
                _ => file.append(id, &[value as u8]).unwrap(),
            }
        }
        file.finish_tensor(id, shape.to_vec());
    }
    file.finish(&Context::default(), &BTreeMap::from([("format".to_owned(), "pt".to_owned())])).unwrap();
}

/// A folder with a base and LoRA adapters.
pub struct Workspace(TempDir);

impl Workspace {
    pub fn new() -> Self {
        Self(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
    /// Writes `base/`.
    pub fn base(&self, dtype: Dtype, config: &str, tensors: Tensors<'_>) -> PathBuf {
        let folder = self.path("base");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("config.json"), config).unwrap();
        write_tensors(&folder.join("model.safetensors"), dtype, tensors);
        folder
    }
    /// Writes a LoRA adapter; `config` is what its config has beside the type.
    pub fn lora(&self, name: &str, config: &str, tensors: Tensors<'_>) -> MergeInput {
        let folder = self.path(name);
        fs::create_dir_all(&folder).unwrap();
        let config = format!("{{\"peft_type\":\"LORA\",{config}}}");
        fs::write(folder.join("adapter_config.json"), config).unwrap();
        write_tensors(&folder.join("adapter_model.safetensors"), Dtype::F32, tensors);
        MergeInput { adapter: folder, scale: None }
    }
    /// Merges into `out`.
    pub fn merge(&self, adapters: &[MergeInput], reading: AdapterReading) -> Result<MergeReport, MergeError> {
        let options = MergeOptions { reading, ..replacing(&self.path("out")) };
        merge::merge(&Context::default(), &self.path("base"), adapters, &options)
    }
    /// The tensors after merging one adapter.
    pub fn merged(&self, adapter: MergeInput) -> BTreeMap<String, Vec<f32>> {
        self.merge(&[adapter], AdapterReading::default()).unwrap();
        read(&self.path("out"))
    }
}

/// A new checkpoint, with what is there replaced.
pub fn replacing(path: &Path) -> MergeOptions<'static> {
    let (path, existing) = (path.to_owned(), Existing::Replace);
    MergeOptions::to(MergeOutput::New { path, existing, ledger: true, link: false, resume: false })
}

/// All tensors of a checkpoint, as float32.
pub fn read(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let tensors = checkpoint.tensors().map(|tensor| {
        let bytes = tensor.window(&Context::default(), 0..tensor.info.n_bytes()).unwrap();
        let values = match tensor.info.dtype {
            Dtype::F32 => bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            Dtype::BF16 => bytes.chunks(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect(),
            Dtype::F64 => bytes.chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap()) as f32).collect(),
            other => unreachable!("{other:?}"),
        };
        (tensor.info.name.clone(), values)
    });
    tensors.collect()
}

/// What a merge was refused for.
pub fn said(result: Result<MergeReport, MergeError>) -> String {
    result.unwrap_err().to_string()
}
