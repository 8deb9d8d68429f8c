//! Likely mistakes of a new user, and what the program says: paths and formats.
//!
//! Mistakes on the command line itself are in `wrong_lines.rs`.

use std::fs;

use insta::assert_snapshot;

use super::{
    Workspace,
    adapters::{PROJECTIONS, write_adapter},
    harness::fixtures,
};

/// A folder with the tiny model and an adapter of it.
fn workspace() -> Workspace {
    let workspace = Workspace::new();
    workspace.copy_fixture("tiny-llama");
    write_adapter(&workspace, "adapter.safetensors", PROJECTIONS, 0, 0.01);
    workspace
}

/// A folder with empty files of these names.
fn with_files(names: &[&str]) -> Workspace {
    let workspace = Workspace::new();
    for name in names {
        workspace.write(name, "");
    }
    workspace
}

/// What the program says on stderr, the exit code before it.
fn told(workspace: &Workspace, arguments: &[&str]) -> String {
    let mut command = workspace.command("");
    let output = command.args(arguments).output().unwrap();
    let told = workspace.told(&output);
    let (exit, stderr) = (told.lines().next().unwrap(), told.split_once("--- stderr\n").unwrap().1);
    format!("{exit}\n{stderr}")
}

#[test]
fn a_misspelled_name_is_met_with_names_like_it() {
    let workspace = workspace();
    assert_snapshot!(told(&workspace, &["inspect", "tiny_lama"]), @r"
    exit: 5
    error: cannot open `tiny_lama`: No such file or directory (os error 2)
    hint: there is tiny-llama
    ");
    assert_snapshot!(told(&workspace, &["merge", "tiny-llama", "--adapter", "adapter", "-o", "out"]), @r"
    exit: 5
    error: cannot open `adapter`: No such file or directory (os error 2)
    hint: there is adapter.safetensors
    ");
    assert_snapshot!(told(&workspace, &["inspect", "Adapter.safetensors"]), @r"
    exit: 5
    error: cannot open `Adapter.safetensors`: No such file or directory (os error 2)
    hint: there is adapter.safetensors
    ");
}

#[test]
fn a_hub_id_is_looked_up_in_the_local_cache() {
    let workspace = Workspace::new();
    assert_snapshot!(told(&workspace, &["inspect", "meta-llama/Llama-3.1-8B"]), @r"
    exit: 5
    error: cannot open `meta-llama/Llama-3.1-8B`: No such file or directory (os error 2)
    hint: hf download meta-llama/Llama-3.1-8B --local-dir Llama-3.1-8B
    ");
    assert_snapshot!(told(&workspace, &["inspect", "https://huggingface.co/org/name/tree/main"]), @r"
    exit: 5
    error: cannot open `https://huggingface.co/org/name/tree/main`: No such file or directory (os error 2)
    hint: hf download org/name --local-dir name
    ");
    let repository = ".cache/huggingface/hub/models--org--name";
    workspace.write(&format!("{repository}/refs/main"), "0123abcd\n");
    fs::create_dir_all(workspace.path(&format!("{repository}/snapshots/0123abcd"))).unwrap();
    assert_snapshot!(told(&workspace, &["inspect", "org/name"]), @r"
    exit: 5
    error: cannot open `org/name`: No such file or directory (os error 2)
    hint: the Hugging Face cache has it: [DIR]/.cache/huggingface/hub/models--org--name/snapshots/0123abcd
    ");
    // Another cache, and one in which the repository is not.
    let elsewhere = |name: &str, value: &str| {
        let mut command = workspace.command("inspect org/name");
        let output = command.env(name, workspace.path(value)).output().unwrap();
        String::from_utf8(output.stderr).unwrap().lines().last().unwrap().to_owned()
    };
    assert_eq!(elsewhere("HF_HUB_CACHE", "nowhere"), "hint: hf download org/name --local-dir name");
    assert!(elsewhere("HF_HUB_CACHE", ".cache/huggingface/hub").contains("snapshots/0123abcd"));
    assert!(elsewhere("HF_HOME", ".cache/huggingface").contains("snapshots/0123abcd"));
}

#[cfg(feature = "train")]
#[test]
fn commands_that_read_a_tokenizer_name_the_missing_checkpoint() {
    let workspace = Workspace::new();
    let expected = "error: cannot open `org/name`: No such file or directory (os error 2)\n\
                    hint: hf download org/name --local-dir name\n";
    for line in ["eval org/name --data rows.json", "train org/name -k 1 --data rows.json -o a.safetensors"] {
        let said = told(&workspace, &line.split(' ').collect::<Vec<_>>());
        assert_eq!(said, format!("exit: 5\n{expected}"), "{line}");
    }
    workspace.copy_fixture("tiny-llama");
    fs::remove_file(workspace.path("tiny-llama/tokenizer.json")).unwrap();
    let said = told(&workspace, &["train", "tiny-llama", "-k", "1", "--data", "rows.json", "-o", "a.safetensors"]);
    let expected = "error: cannot read `tiny-llama/tokenizer.json`: No such file or directory (os error 2)\n\
                    hint: copy tokenizer.json from the model's repository into the folder\n";
    assert_eq!(said, format!("exit: 5\n{expected}"));
    let said =
        told(&workspace, &["train", "org/name", "-k", "1", "--data", "rows.json", "-o", "no/such/a.safetensors"]);
    assert_eq!(said, "exit: 5\nerror: the folder no/such does not exist\nhint: mkdir -p no/such\n");
}

#[test]
fn a_folder_of_the_cache_is_not_its_snapshot() {
    let workspace = Workspace::new();
    workspace.write("models--org--name/refs/main", "0123abcd");
    workspace.write("models--org--name/snapshots/0123abcd/config.json", "{}");
    assert_snapshot!(told(&workspace, &["inspect", "models--org--name"]), @r"
    exit: 3
    error: models--org--name: is a repository's folder in the Hugging Face cache, not a safetensors checkpoint
    hint: name the snapshot: models--org--name/snapshots/0123abcd
    ");
}

#[test]
fn what_a_shell_or_a_file_left_in_a_path_is_named() {
    let workspace = workspace();
    assert_snapshot!(told(&workspace, &["inspect", "~/tiny-llama"]), @r"
    exit: 5
    error: cannot open `~/tiny-llama`: No such file or directory (os error 2)
    hint: the shell expands ~ only at the start of a word without quotes; write [DIR]/tiny-llama
    ");
    assert_snapshot!(told(&workspace, &["inspect", "tiny-llama\r"]), @r"
    exit: 5
    error: cannot open `tiny-llama\r`: No such file or directory (os error 2)
    hint: the path ends with a carriage return (\r), as lines of Windows text files do; without it: tiny-llama
    ");
    assert_snapshot!(told(&workspace, &["inspect", "tiny-llama "]), @r"
    exit: 5
    error: cannot open `tiny-llama `: No such file or directory (os error 2)
    hint: the path ends with a space; without it: tiny-llama
    ");
}

#[test]
fn the_folder_of_an_output_must_exist() {
    let workspace = workspace();
    for line in [
        "mask tiny-llama --k 1 -o no/such/m.safetensors",
        "merge tiny-llama --adapter adapter.safetensors -o no/such/out",
        "pack adapter.safetensors --card -o no/such/p.safetensors",
        "convert adapter.safetensors --to published -o no/such/out",
        "sync export adapter.safetensors --base tiny-llama -o no/such/weight_v000001",
        "extract tiny-llama tiny-llama -o no/such/a.safetensors",
    ] {
        let said = told(&workspace, &line.split(' ').collect::<Vec<_>>());
        assert_eq!(said, "exit: 5\nerror: the folder no/such does not exist\nhint: mkdir -p no/such\n", "{line}");
    }
    assert!(!workspace.path("no").exists());
}

#[test]
fn an_input_in_a_missing_folder_names_the_folder() {
    assert_snapshot!(told(&workspace(), &["inspect", "models/llama/model.safetensors"]), @r"
    exit: 5
    error: cannot open `models/llama/model.safetensors`: No such file or directory (os error 2)
    hint: the folder models/llama does not exist
    ");
}

#[test]
fn shards_of_fsdp_are_named() {
    let workspace = with_files(&["a/.metadata", "a/__0_0.distcp", "b/pytorch_model_fsdp_0/__0_0.distcp"]);
    assert_snapshot!(told(&workspace, &["inspect", "a"]), @r"
    exit: 3
    error: a: holds FSDP shards (.distcp), not a safetensors checkpoint
    hint: accelerate merge-weights a merged-weights
    ");
    assert_snapshot!(told(&workspace, &["inspect", "b"]), @r"
    exit: 3
    error: b: holds FSDP shards (.distcp), not a safetensors checkpoint
    hint: accelerate merge-weights b/pytorch_model_fsdp_0 merged-weights
    ");
}

#[test]
fn shards_of_deepspeed_are_named() {
    let workspace = with_files(&["a/zero_to_fp32.py", "a/latest", "a/global_step500/mp_rank_00_model_states.pt"]);
    assert_snapshot!(told(&workspace, &["mask", "a", "--k", "1", "-o", "m.safetensors"]), @r"
    exit: 3
    error: a: holds DeepSpeed ZeRO shards, not a safetensors checkpoint
    hint: python a/zero_to_fp32.py a merged-weights --safe_serialization
    ");
}

#[test]
fn folders_of_other_formats_are_named() {
    let workspace = with_files(&["gguf/model-Q4_K_M.gguf", "bin/pytorch_model-00001-of-00002.bin", "bin/config.json"]);
    assert_snapshot!(told(&workspace, &["inspect", "gguf"]), @r"
    exit: 3
    error: gguf: holds GGUF files, not a safetensors checkpoint
    hint: use the safetensors checkpoint that the GGUF file was converted from: hf download ORG/NAME --local-dir NAME
    ");
    assert_snapshot!(told(&workspace, &["inspect", "bin"]), @r#"
    exit: 3
    error: bin: holds PyTorch pickles (pytorch_model*.bin), not a safetensors checkpoint
    hint: python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('bin', torch_dtype='auto').save_pretrained('safetensors')"
    "#);
}

#[test]
fn the_folder_of_a_training_run_has_checkpoints_in_it() {
    let workspace = with_files(&["run/checkpoint-500/x", "run/checkpoint-1000/x", "run/runs/x"]);
    assert_snapshot!(told(&workspace, &["inspect", "run"]), @r"
    exit: 3
    error: run: is the folder of a training run, not a safetensors checkpoint
    hint: name one of its checkpoints: run/checkpoint-1000
    ");
}

#[test]
fn a_folder_of_nothing_known_says_what_it_has() {
    let workspace = with_files(&["a/config.json", "a/vocab.txt"]);
    fs::create_dir(workspace.path("empty")).unwrap();
    assert_snapshot!(told(&workspace, &["inspect", "a"]), @r"
    exit: 3
    error: a: has neither model.safetensors nor model.safetensors.index.json; it has config.json, vocab.txt
    ");
    assert_snapshot!(told(&workspace, &["inspect", "empty"]), @r"
    exit: 3
    error: empty: has neither model.safetensors nor model.safetensors.index.json; it is empty
    ");
}

#[test]
fn files_of_other_formats_are_named() {
    let workspace = workspace();
    workspace.write("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c");
    workspace.write("model.gguf", b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00");
    workspace.write("model.bin", b"PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00");
    workspace.write("old.pt", b"\x80\x02}q\x00(X\x00\x00\x00");
    workspace.write("train.parquet", b"PAR1\x15\x04\x15\x10");
    assert_snapshot!(told(&workspace, &["inspect", "tiny-llama/config.json"]), @r"
    exit: 3
    error: tiny-llama/config.json: is a JSON file, not a safetensors file
    hint: name the folder of the checkpoint or adapter: tiny-llama
    ");
    assert_snapshot!(told(&workspace, &["inspect", "tokenizer.model"]), @r"
    exit: 3
    error: tokenizer.model: is a SentencePiece tokenizer, not a safetensors file
    hint: name the folder of the checkpoint or adapter: .
    ");
    assert_snapshot!(told(&workspace, &["inspect", "model.gguf"]), @r"
    exit: 3
    error: model.gguf: is a GGUF file, not a safetensors file
    hint: use the safetensors checkpoint that the GGUF file was converted from: hf download ORG/NAME --local-dir NAME
    ");
    assert_snapshot!(told(&workspace, &["inspect", "model.bin"]), @r#"
    exit: 3
    error: model.bin: is a zip archive (PyTorch .pt or .bin, NumPy .npz), not a safetensors file
    hint: python -c "import torch, safetensors.torch as s; s.save_file({k: v.clone() for k, v in torch.load('model.bin', map_location='cpu', weights_only=True).items()}, 'model.safetensors')"
    "#);
    assert_snapshot!(told(&workspace, &["inspect", "old.pt"]), @r#"
    exit: 3
    error: old.pt: is a Python pickle, not a safetensors file
    hint: python -c "import torch, safetensors.torch as s; s.save_file({k: v.clone() for k, v in torch.load('old.pt', map_location='cpu', weights_only=True).items()}, 'model.safetensors')"
    "#);
    assert_snapshot!(told(&workspace, &["inspect", "train.parquet"]), @r#"
    exit: 3
    error: train.parquet: is a Parquet file, not a safetensors file
    hint: python -c "import pandas; pandas.read_parquet('train.parquet').to_json('rows.jsonl', orient='records', lines=True)"
    "#);
}

#[cfg(feature = "train")]
#[test]
fn rows_in_other_formats_are_named() {
    let workspace = workspace();
    workspace.write("rows.csv", "instruction,output\nAdd 1 and 1,2\n");
    workspace.write("rows.parquet", b"PAR1\x15\x04\x15\x10");
    let train =
        |data: &str| told(&workspace, &["train", "tiny-llama", "-k", "1", "--data", data, "-o", "t.safetensors"]);
    assert_snapshot!(train("rows.csv"), @r#"
    exit: 3
    error: rows.csv: is a CSV file, not rows as a JSON array or JSON lines
    hint: python -c "import pandas; pandas.read_csv('rows.csv').to_json('rows.jsonl', orient='records', lines=True)"
    "#);
    assert_snapshot!(train("rows.parquet"), @r#"
    exit: 3
    error: rows.parquet: is a Parquet file, not rows as a JSON array or JSON lines
    hint: python -c "import pandas; pandas.read_parquet('rows.parquet').to_json('rows.jsonl', orient='records', lines=True)"
    "#);
}

#[test]
fn base_and_adapter_in_each_others_place() {
    let workspace = workspace();
    assert_snapshot!(
        told(&workspace, &["merge", "adapter.safetensors", "--adapter", "tiny-llama", "-o", "out"]), @r"
        exit: 3
        error: tiny-llama: is a checkpoint, not an adapter
        hint: the base is the first argument, an adapter follows --adapter
        ");
    assert_snapshot!(told(&workspace, &["mask", "adapter.safetensors", "--k", "1", "-o", "m.safetensors"]), @r"
    exit: 3
    error: adapter.safetensors: is a file of this program (kind: adapter), not a checkpoint
    hint: the base is the first argument; adapters and masks follow their options
    ");
    workspace.write("lora/adapter_config.json", r#"{"peft_type":"LORA","r":2}"#);
    assert_snapshot!(told(&workspace, &["mask", "lora", "--k", "1", "-o", "m.safetensors"]), @r"
    exit: 3
    error: lora: is a PEFT adapter, not a safetensors checkpoint
    hint: merge takes it with --adapter; inspect reads it if adapter_model.safetensors is in it
    ");
}

#[test]
fn an_adapter_of_another_model_shows_five_tensors_and_all_of_them_with_v() {
    let workspace = workspace();
    let other = fixtures().join("accepted/adapter-base.safetensors");
    let other = other.to_str().unwrap();
    assert_snapshot!(told(&workspace, &["merge", other, "--adapter", "adapter.safetensors", "-o", "out"]), @r#"
    exit: 4
    error: adapter.safetensors: 14 of 14 tensors do not match the base adapter-base:
      "model.layers.0.mlp.down_proj.weight": the base has no such tensor
      "model.layers.0.mlp.gate_proj.weight": the base has no such tensor
      "model.layers.0.mlp.up_proj.weight": the base has no such tensor
      "model.layers.0.self_attn.k_proj.weight": the base has no such tensor
      "model.layers.0.self_attn.o_proj.weight": the base has no such tensor
      … and 9 more; -v lists them
    hint: the adapter was made for another model; compare names and shapes with `neuroada-ckpt inspect --tensors`
    "#);
    let all = told(&workspace, &["merge", other, "--adapter", "adapter.safetensors", "-o", "out", "-v"]);
    assert_eq!(all.matches("the base has no such tensor").count(), 14, "{all}");
    let last = all.lines().rfind(|line| line.starts_with("error: ")).unwrap();
    assert!(last.ends_with("14 of 14 tensors do not match the base adapter-base"), "{all}");
}
