use std::{
    fs,
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use insta::assert_snapshot;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{
    Workspace,
    adapters::{PROJECTIONS, write_adapter},
};

const COMMONSENSE: &str = "eval [FIXTURES]/tiny-llama --data [FIXTURES]/data/commonsense.jsonl --limit 6";

#[test]
fn loss_and_ranked_answers_are_told() {
    let workspace = Workspace::new();
    let report = workspace.json(COMMONSENSE);
    let loss = report["loss"].as_f64().unwrap();
    // An untrained model guesses among 264 tokens: ln 264 = 5.58.
    assert!((5.0..6.2).contains(&loss), "{loss}");
    assert_eq!(report["task"], "commonsense");
    assert_eq!(report["ranked"]["n_questions"], 6);
    assert_eq!(
        (&report["generated"], &report["answers"], &report["adapter"]),
        (&Value::Null, &Value::Null, &Value::Null)
    );
    let ranked = &report["ranked"];
    // Three questions with two options, two with four, one with two.
    assert_eq!(ranked["chance"], (4.0 / 2.0 + 2.0 / 4.0) / 6.0);
    let of =
        |field: &str| ranked["kinds"].as_array().unwrap().iter().map(|kind| kind[field].clone()).collect::<Vec<_>>();
    assert_eq!(of("answers"), ["option1/option2", "answer1/answer2/answer3/answer4", "solution1/solution2"]);
    assert_eq!(of("n_questions"), [3, 2, 1]);
    assert_eq!(of("chance"), [0.5, 0.25, 0.5]);
    let n_right: u64 = of("n_right").iter().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(ranked["n_right"], n_right);
    let text = String::from_utf8(workspace.stdout(COMMONSENSE)).unwrap();
    let table = text.rsplit_once("\n\n").unwrap().1;
    assert!(table.starts_with("answers ") && table.lines().count() == 4 && table.contains(" 25.0 %"), "{text}");
    assert!(text.starts_with("model   tiny-llama\nrows    6 of commonsense.jsonl, as commonsense\ntokens  "), "{text}");
}

#[test]
fn a_template_that_writes_the_answer_is_asked_for_each() {
    let workspace = Workspace::new();
    // An untrained model finds every token as likely as any other: what is shortest is the likeliest.
    let source = "{{ instruction }}\n{% generation %}{{ answer if answer[-1:] in '2e' and answer != 'true' else answer * 9 }}{% endgeneration %}";
    workspace.write("shortest.jinja", source);
    let report = workspace.json(&format!("{COMMONSENSE} --answers --template shortest.jinja"));
    let ranked = report["answers"].as_array().unwrap().iter().map(|answer| answer["ranked"].as_str().unwrap());
    let expected = ["option2", "answer2", "option2", "solution2", "answer2", "option2"];
    assert_eq!(ranked.collect::<Vec<_>>(), expected);
    assert_eq!(report["data"]["form"], "file");

    workspace.write("shortest.jinja", "{{ instruction }}{% generation %}same{% endgeneration %}{{ answer }}");
    let report = workspace.json(&format!("{COMMONSENSE} --answers --template shortest.jinja"));
    assert_eq!(report["answers"][0]["ranked"], "option1", "of equals the first");
    workspace.write("shortest.jinja", "{{ answer }}{% generation %}same{% endgeneration %}");
    let refused = workspace.run(&format!("{COMMONSENSE} --template shortest.jinja"));
    let line = "commonsense.jsonl: line 1: its prompts for the answers \"option2\" and \"option1\" differ";
    assert!(refused.starts_with("exit: 3") && refused.contains(line), "{refused}");
}

#[test]
fn an_adapter_gives_what_its_merge_gives_bit_for_bit() {
    let workspace = Workspace::new();
    write_adapter(&workspace, "a.safetensors", PROJECTIONS, 0, 0.05);
    workspace.stdout("merge [FIXTURES]/tiny-llama --adapter a.safetensors=-0.3 -o merged");
    let of = |base: &str, more: &str| {
        workspace.json(&format!("eval {base} --data [FIXTURES]/data/commonsense.jsonl --limit 5 --answers {more}"))
    };
    let (base, adapted, merged) = (
        of("[FIXTURES]/tiny-llama", ""),
        of("[FIXTURES]/tiny-llama", "--adapter a.safetensors=-0.3"),
        of("merged", ""),
    );
    assert_eq!(adapted["loss"], merged["loss"]);
    assert_eq!(adapted["answers"], merged["answers"]);
    assert_ne!(adapted["loss"], base["loss"]);
    assert_eq!(adapted["adapter"]["scale"], -0.3);
}

#[test]
fn batches_and_threads_do_not_change_the_answer() {
    let workspace = Workspace::new();
    let whole = workspace.json(COMMONSENSE);
    for more in ["--batch-tokens 100", "--batch-tokens 100000 --threads 1", "--threads 3"] {
        let report = workspace.json(&format!("{COMMONSENSE} {more}"));
        let (a, b) = (whole["loss"].as_f64().unwrap(), report["loss"].as_f64().unwrap());
        assert!((a - b).abs() < 1e-5, "{more}: {a} and {b}");
        assert_eq!(whole["ranked"], report["ranked"], "{more}");
    }
    assert_eq!(whole, workspace.json(&format!("{COMMONSENSE} --threads 1")), "threads alone change no bit");
}

#[test]
fn written_answers_are_judged() {
    let workspace = Workspace::new();
    let line =
        "eval [FIXTURES]/tiny-llama --data [FIXTURES]/data/math.json --limit 3 --generate --max-new-tokens 5 --answers";
    let report = workspace.json(line);
    assert_eq!((&report["task"], &report["ranked"]), (&"math".into(), &Value::Null));
    assert_eq!(report["generated"]["n_questions"], 3);
    let answers = report["answers"].as_array().unwrap();
    assert_eq!(answers[1]["expected"], "120.0");
    assert!(answers.iter().all(|answer| answer["generated"].is_string() && answer["is_right"].is_boolean()));
}

#[test]
fn rows_can_be_looked_at() {
    let workspace = Workspace::new();
    workspace.write("rows.json", r#"[{"prompt":"2 + 2 =","completion":" 4"},{"prompt":"a\u001b[31m\n","completion":"b"},{"prompt":"x","completion":""}]"#);
    assert_snapshot!(workspace.run("eval [FIXTURES]/tiny-llama --data rows.json --show"), @r"
    exit: 0
    --- stdout
    11 tokens, 3 of them learned:
      <s>2 + 2 =⟦ 4</s>⟧

    10 tokens, 2 of them learned:
      <s>a\u{1b}[31m
      ⟦b</s>⟧
    --- stderr
    rows.json: 1 row is left out: the response is empty or has a weight of 0
    ");
    let report = workspace.json("eval [FIXTURES]/tiny-llama --data rows.json --show 1 --max-length 9 -q");
    assert_eq!(report["examples"][0]["learned"], serde_json::json!([[8, 9]]));
    assert_eq!(report["data"]["n_cut_tokens"], 2);
}

#[test]
fn a_packed_adapter_with_derived_columns_is_evaluated_with_its_base() {
    let workspace = Workspace::new();
    let plain = "[FIXTURES]/tiny-llama-adapter.safetensors";
    workspace.stdout(&format!("pack {plain} --base [FIXTURES]/tiny-llama --columns derived -o packed.safetensors"));
    let loss = |adapter: &str| {
        let data = "--data [FIXTURES]/data/commonsense.jsonl --limit 2 --task loss";
        workspace.json(&format!("eval [FIXTURES]/tiny-llama --adapter {adapter} {data}"))["loss"].clone()
    };
    assert!(loss(plain).is_f64());
    assert_eq!(loss("packed.safetensors"), loss(plain));
    assert_eq!(loss("packed.safetensors=0.5"), loss(&format!("{plain}=0.5")));
}

#[test]
fn what_cannot_be_evaluated_is_said() {
    let workspace = Workspace::new();
    workspace.write("rows.jsonl", "{\"text\":\"a\"}\n{\"txt\":\"b\"}\n");
    workspace.write("empty.jsonl", "");
    workspace.write("parquet", "PAR1\u{0}");
    write_adapter(&workspace, "other.safetensors", PROJECTIONS, 1, 0.05);
    let of = |more: &str| workspace.run(&format!("eval [FIXTURES]/tiny-llama {more}"));
    assert_snapshot!(of("--data rows.jsonl"), @r#"
    exit: 3
    --- stdout
    --- stderr
    error: rows.jsonl: line 2: field "text" is missing
    "#);
    assert_snapshot!(of("--data empty.jsonl"), @r"
    exit: 3
    --- stdout
    --- stderr
    error: empty.jsonl: it contains no rows
    ");
    assert_snapshot!(of("--data parquet"), @r#"
    exit: 3
    --- stdout
    --- stderr
    error: parquet: is a Parquet file, not rows as a JSON array or JSON lines
    hint: python -c "import pandas; pandas.read_parquet('parquet').to_json('rows.jsonl', orient='records', lines=True)"
    "#);
    assert_snapshot!(of("--data rows.jsonl --template none"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: --template none: is not auto, alpaca, commonsense or an existing file
    ");
    assert_snapshot!(of("--data rows.jsonl --generate"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: --generate and --answers need rows with answers; --task commonsense or math
    ");
    assert_snapshot!(of("--data missing.jsonl"), @r"
    exit: 5
    --- stdout
    --- stderr
    error: cannot read `missing.jsonl`: No such file or directory (os error 2)
    ");
    workspace.stdout("merge [FIXTURES]/tiny-llama --adapter other.safetensors -o merged");
    let refused =
        workspace.run("eval merged --adapter other.safetensors --data [FIXTURES]/data/commonsense.jsonl --limit 1");
    assert!(refused.starts_with("exit: 4\n") && refused.contains("the adapter was made from tiny-llama"), "{refused}");
    workspace.write("alone/config.json", "{}");
    assert_snapshot!(workspace.run("eval alone --data rows.jsonl"), @r"
    exit: 5
    --- stdout
    --- stderr
    error: cannot read `alone/tokenizer.json`: No such file or directory (os error 2)
    hint: eval reads tokenizer.json in the checkpoint's folder
    ");
}

/// Templates that are small and ask for more than there is. Fuel stops some; what a single instruction does is watched.
const HOSTILE: [&str; 9] = [
    // Lists: added to themselves, compared, joined, printed, counted.
    "{% set ns = namespace(l=[1,2,3,4,5,6,7,8]) %}{% for i in range(40) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l|length }}",
    "{% set ns = namespace(l=[1,2]) %}{% for i in range(30) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l ~ 'x' }}",
    "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
    "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ [ns.a]|join('x') }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(28) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l|tojson }}",
    // Texts.
    "{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{{ ('x' * 9000000).replace('x', 'y' * 9000000) }}",
    // Loops and macros.
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
];

#[test]
fn a_hostile_template_ends_as_a_bad_file() {
    let workspace = Workspace::new();
    workspace.write("rows.jsonl", r#"{"output":"O"}"#);
    thread::scope(|scope| {
        for (i, source) in HOSTILE.into_iter().enumerate() {
            let workspace = &workspace;
            scope.spawn(move || {
                workspace.write(&format!("{i}.jinja"), source);
                let line = format!("eval [FIXTURES]/tiny-llama --data rows.jsonl --template {i}.jinja --show");
                let told = workspace.run(&line);
                assert!(told.starts_with("exit: 3\n--- stdout\n--- stderr\nerror: "), "{source}\n{told}");
                assert!(!told.contains("panicked"), "{told}");
            });
        }
    });
}

#[test]
fn signals_stop_a_command_while_a_template_is_rendered() {
    let workspace = Workspace::new();
    workspace.write("rows.jsonl", r#"{"output":"O"}"#);
    workspace.write("slow.jinja", HOSTILE[2]);
    for signal in [Signal::INT, Signal::TERM] {
        let mut command =
            workspace.command("eval [FIXTURES]/tiny-llama --data rows.jsonl --template slow.jinja --show");
        let child: Child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        thread::sleep(Duration::from_millis(1500));
        kill_process(Pid::from_child(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(workspace.told(&output), "exit: 130\n--- stdout\n--- stderr\nerror: stopped\n", "{signal:?}");
    }
}

#[test]
fn a_message_of_weight_0_is_context_alone() {
    let workspace = Workspace::new();
    workspace.copy_fixture("tiny-llama");
    workspace.write("tiny-llama/chat_template.jinja", "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}");
    let row = |weight: &str| {
        format!(
            r#"{{"messages":[{{"role":"user","content":"p"}},{{"role":"assistant","content":"no","weight":{weight}}},
            {{"role":"user","content":"q"}},{{"role":"assistant","content":"yes","weight":1}}]}}"#
        )
        .replace('\n', " ")
    };
    workspace.write("rows.jsonl", row("0"));
    let told = workspace.run("eval tiny-llama --data rows.jsonl --show 1");
    assert!(told.contains("u:p</s>a:no</s>u:q</s>a:⟦yes</s>⟧"), "{told}");
    let loss = workspace.json("eval tiny-llama --data rows.jsonl")["data"]["n_supervised"].clone();
    workspace.write("rows.jsonl", row("1"));
    assert!(loss.as_u64() < workspace.json("eval tiny-llama --data rows.jsonl")["data"]["n_supervised"].as_u64());
    workspace.write("rows.jsonl", row("0.5"));
    for line in ["eval tiny-llama --data rows.jsonl", "train tiny-llama -k 1 --data rows.jsonl -o a.safetensors"] {
        let expected = "error: rows.jsonl: line 1: field \"messages\": message 1: weight: expected 0 or 1, found 0.5\n";
        assert_eq!(workspace.run(line), format!("exit: 3\n--- stdout\n--- stderr\n{expected}"));
    }
}

#[test]
fn rows_that_teach_no_model_to_stop_are_warned_about() {
    let workspace = Workspace::new();
    workspace.copy_fixture("tiny-llama");
    workspace.write(
        "tiny-llama/chat_template.jinja",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
    );
    workspace
        .write("rows.jsonl", r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"yes"}]}"#);
    let warning =
        "rows.jsonl: warning: no row teaches the model to stop: no learned response ends with an end-of-text token\n";
    assert!(workspace.run("eval tiny-llama --data rows.jsonl --show 1").contains(warning));
}

#[test]
fn a_model_that_computes_no_numbers_is_no_success() {
    let workspace = Workspace::new();
    let shard = workspace.copy_fixture("tiny-llama").join("model-00001-of-00003.safetensors");
    // All of the first shard's values become NaN.
    let mut bytes = fs::read(&shard).unwrap();
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header_bytes..].fill(0xff);
    fs::write(&shard, bytes).unwrap();
    let told = workspace.run("eval tiny-llama --data [FIXTURES]/data/commonsense.jsonl --limit 2");
    assert!(
        told.starts_with(
            "exit: 3\n--- stdout\n--- stderr\nerror: the loss is NaN; the first tensor that is not finite is "
        ),
        "{told}"
    );
}

#[test]
fn a_config_that_makes_no_sense_is_refused_by_file_and_key() {
    let workspace = Workspace::new();
    let path = workspace.copy_fixture("tiny-llama").join("config.json");
    let config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, value) in [
        ("rms_norm_eps", json!(-1)),
        ("head_dim", json!(0)),
        ("rope_parameters", json!({"rope_type": "linear", "factor": 0, "rope_theta": 10_000})),
    ] {
        let mut broken = config.clone();
        broken[key] = value;
        fs::write(&path, broken.to_string()).unwrap();
        let named = if key == "rope_parameters" { "factor" } else { key };
        for line in ["eval tiny-llama", "train tiny-llama -k 1 -o a.safetensors"] {
            let told = workspace.run(&format!("{line} --data [FIXTURES]/data/commonsense.jsonl --limit 2 -q"));
            assert!(
                told.starts_with(&format!(
                    "exit: 3\n--- stdout\n--- stderr\nerror: tiny-llama/config.json: `{named}` is "
                )),
                "{told}"
            );
        }
    }
}

#[test]
fn more_memory_than_was_given_is_refused() {
    let workspace = Workspace::new();
    let data = "--data [FIXTURES]/data/commonsense.jsonl --limit 4 -q";
    let eval = format!("eval [FIXTURES]/tiny-llama {data}");
    let told = workspace.run(&format!("{eval} --batch-tokens 60000 --max-memory 16M"));
    assert!(
        told.starts_with("exit: 4\n--- stdout\n--- stderr\nerror: [FIXTURES]/tiny-llama: evaluation needs "),
        "{told}"
    );
    assert!(told.contains(" of memory, --max-memory allows 16.8 MB\nhint: --max-memory "), "{told}");
    let enough = told.split("hint: --max-memory ").nth(1).unwrap().split(' ').next().unwrap();
    assert!(workspace.run(&format!("{eval} --batch-tokens 60000 --max-memory {enough}")).starts_with("exit: 0\n"));
    let train = "train [FIXTURES]/tiny-llama -k 1 --data [FIXTURES]/data/commonsense.jsonl --batch-tokens 100000 --batch-size 100 -q";
    for more in ["--max-memory 16M", "--max-memory 16M --dry-run"] {
        let told = workspace.run(&format!("{train} -o a.safetensors {more}"));
        assert!(
            told.starts_with("exit: 4\n--- stdout\n--- stderr\nerror: [FIXTURES]/tiny-llama: training needs "),
            "{told}"
        );
    }
    assert!(workspace.run(&format!("{train} -o a.safetensors --dry-run")).starts_with("exit: 0\n"));
}
