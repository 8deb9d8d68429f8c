use serde_json::Value;

use super::{
    Workspace,
    adapters::{PROJECTIONS, write_adapter},
};

const DOCUMENTATION: &str = include_str!("../../src/cli/json.md");

/// Fields whose value is free in form: what other tools wrote.
const FREE: [&str; 4] = ["metadata", "peft", "training", "extra"];

/// The part of the documentation under a heading that names `command`.
fn section(command: &str) -> &'static str {
    let mut sections = DOCUMENTATION.split("\n## ");
    let names_it = |section: &&str| section.lines().next().unwrap().split(", ").any(|name| name == command);
    sections.find(names_it).unwrap_or_else(|| panic!("json.md has no section on {command}"))
}

fn collect_fields<'a>(value: &'a Value, fields: &mut Vec<&'a str>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                fields.push(name);
                if !FREE.contains(&name.as_str()) {
                    collect_fields(value, fields);
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| collect_fields(value, fields)),
        _ => {}
    }
}

/// Fails where the document has a field that the section on `command` does not name.
fn is_documented(command: &str, document: &Value) {
    let mut fields = Vec::new();
    collect_fields(document, &mut fields);
    assert!(!fields.is_empty(), "{command} printed {document}");
    let section = section(command);
    fields.retain(|field| !section.contains(&format!("`{field}`")));
    fields.dedup();
    assert!(fields.is_empty(), "json.md does not say what {fields:?} of {command} are");
}

#[test]
fn every_field_of_json_is_documented() {
    let workspace = Workspace::new();
    write_adapter(&workspace, "a.safetensors", PROJECTIONS, 0, 0.01);
    is_documented("mask", &workspace.json("mask [FIXTURES]/tiny-llama --k 70 --targets *layers.0* -o m.safetensors"));
    workspace.stdout("mask [FIXTURES]/tiny-llama --k 1 --partition 1/1 -o p.safetensors");
    is_documented("inspect", &workspace.json("inspect p.safetensors"));
    is_documented("mask-join", &workspace.json("mask-join p.safetensors -o j.safetensors"));
    #[cfg(feature = "train")]
    {
        let line =
            "eval [FIXTURES]/tiny-llama --adapter a.safetensors --data [FIXTURES]/data/commonsense.jsonl --limit 2";
        is_documented("eval", &workspace.json(&format!("{line} --generate --max-new-tokens 2 --answers")));
        is_documented("eval", &workspace.json("eval [FIXTURES]/tiny-llama --data [FIXTURES]/data/math.json --show 1"));
    }
    is_documented("init", &workspace.json("init [FIXTURES]/tiny-llama --mask m.safetensors -o z.safetensors"));
    is_documented("diff", &workspace.json("diff a.safetensors z.safetensors"));
    #[cfg(feature = "train")]
    for more in ["", " --dry-run"] {
        let data = "--data [FIXTURES]/data/commonsense.jsonl --epochs 1";
        let line = format!("train [FIXTURES]/tiny-llama -k 1 {data} -o t.safetensors -q{more}");
        is_documented("train", &workspace.json(&line));
    }
    is_documented("merge", &workspace.json("merge [FIXTURES]/tiny-llama --adapter a.safetensors -o out"));
    is_documented("diff", &workspace.json("diff [FIXTURES]/tiny-llama out"));
    is_documented(
        "extract",
        &workspace.json("extract [FIXTURES]/tiny-llama out -o x.safetensors --targets *layers.0*"),
    );
    is_documented("diff", &workspace.json("diff [FIXTURES]/accepted/odd-header.safetensors out"));
    is_documented("inspect", &workspace.json("inspect out --tensors"));
    is_documented("inspect", &workspace.json("inspect [FIXTURES]/accepted/adapter.safetensors --tensors"));
    is_documented("verify", &workspace.json("verify out --base [FIXTURES]/tiny-llama"));
    is_documented("sync", &workspace.json("sync export out --base [FIXTURES]/tiny-llama -o weight_v000001"));
    is_documented("sync", &workspace.json("sync apply weight_v000001 --base [FIXTURES]/tiny-llama -o synced"));
    is_documented("unmerge", &workspace.json("unmerge out --in-place"));
    is_documented("recover", &workspace.json("recover out"));
}
