//! From files to token ids, with the tokenizer of the tiny model: bytes, a few merges, `<s>` before every text.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::*;
use crate::{
    checkpoint::Context,
    error::{ErrorKind, Failure},
};

/// A folder with the tiny tokenizer, to which tests add files.
struct Workspace(tempfile::TempDir);

impl Workspace {
    fn new() -> Self {
        let workspace = Self(tempfile::tempdir().expect("a temporary folder"));
        for name in ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"] {
            fs::copy(fixtures().join("tiny-llama").join(name), workspace.path(name)).expect("copied");
        }
        workspace
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        fs::write(self.path(name), content).expect("written");
        self.path(name)
    }

    fn tokenizer(&self) -> Tokenizer {
        Tokenizer::open(self.0.path()).expect("the tiny tokenizer")
    }

    /// Reads rows; errors are messages without the folder's name.
    fn read(&self, rows: &str, options: &ReadOptions) -> Result<(Dataset, DataReport), String> {
        let path = self.write("rows", rows);
        read_dataset(&Context::default(), &path, &self.tokenizer(), options).map_err(|e| self.message(&e))
    }

    fn message(&self, error: &DataError) -> String {
        error.to_string().replace(&format!("{}/", self.0.path().display()), "")
    }

    /// Each example with `[` and `]` around the supervised tokens and special tokens written out.
    fn shown(&self, rows: &str, options: &ReadOptions) -> Result<Vec<String>, String> {
        let (dataset, _) = self.read(rows, options)?;
        let tokenizer = tokenizers::Tokenizer::from_file(self.path("tokenizer.json")).expect("a tokenizer");
        let text = |tokens: &[u32]| tokenizer.decode(tokens, false).expect("text");
        let show = |example: Example<'_>| {
            let (mut out, mut at) = (String::new(), 0);
            for &(begin, end) in example.spans {
                let (begin, end) = (begin as usize, end as usize);
                out += &format!("{}[{}]", text(&example.tokens[at..begin]), text(&example.tokens[begin..end]));
                at = end;
            }
            out + &text(&example.tokens[at..])
        };
        Ok(dataset.iter().map(show).collect())
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn options() -> ReadOptions {
    ReadOptions {
        template: Template::Auto,
        loss: Loss::Response,
        max_length: 4096,
        limit: None,
        clock: Clock::new(1_709_210_096),
    }
}

const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

const TALK: &str = r#"{"messages":[{"role":"user","content":"hé?"},{"role":"assistant","content":"in"},{"role":"user","content":"so"},{"role":"assistant","content":"the end"}]}"#;

#[test]
fn a_tokenizer_encodes_special_tokens() {
    let tokenizer = Workspace::new().tokenizer();
    assert_eq!((tokenizer.prefix(), tokenizer.eos(), tokenizer.stops()), (&[1][..], Some(2), &[2][..]));
    let the = tokenizer.encode(" the</s>").expect("tokens");
    assert_eq!(the, [261, 2], "special tokens in the text become themselves");
    assert_eq!(tokenizer.decode(&[1, 261, 263, 2]).expect("text"), " theer");
}

#[test]
fn the_form_is_detected_from_the_fields() {
    let workspace = Workspace::new();
    let shown = |rows: &str| workspace.shown(rows, &options()).expect("good rows").remove(0);
    assert_eq!(
        shown(r#"{"instruction":"Q?","input":"","output":"the correct answer is true","answer":"true"}"#),
        "<s>Q?\n[the correct answer is true</s>]"
    );
    assert_eq!(
        shown(r#"{"instruction":"Q?","input":"","output":"It is 5.","answer":5}"#),
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### \
         Instruction:\nQ?\n\n### Response:\n[It is 5.</s>]"
    );
    assert!(shown(r#"{"instruction":"Q?","input":"I","output":"O"}"#).ends_with(
        "paired with an input that provides further context. Write a response that appropriately completes the \
                 request.\n\n### Instruction:\nQ?\n\n### Input:\nI\n\n### Response:\n[O</s>]"
    ));
    assert_eq!(shown(r#"{"prompt":"a","completion":" b"}"#), "<s>a[ b</s>]");
    assert_eq!(shown(r#"{"text":"so it is"}"#), "<s>[so it is</s>]");
}

#[test]
fn loss_all_supervises_the_whole_row() {
    let workspace = Workspace::new();
    let all = ReadOptions { loss: Loss::All, ..options() };
    assert_eq!(workspace.shown(r#"{"prompt":"a","completion":"b"}"#, &all).expect("good"), ["<s>[ab</s>]"]);
    workspace.write("chat_template.jinja", CHATML);
    let shown = workspace.shown(TALK, &all).expect("good").remove(0);
    assert!(shown.starts_with("<[|im_start|>user\nh") && shown.ends_with("the end<|im_end|>\n</s>]"), "{shown}");
}

#[test]
fn assistant_messages_are_supervised() {
    let workspace = Workspace::new();
    workspace.write("chat_template.jinja", CHATML);
    let expected = "<|im_start|>user\nhé?<|im_end|>\n<|im_start|>assistant\n[in<|im_end|>\n]<|im_start|>user\nso<|im_end|>\n\
                    <|im_start|>assistant\n[the end<|im_end|>\n</s>]";
    assert_eq!(workspace.shown(TALK, &options()).expect("good"), [expected]);
}

/// Two answers; the first has the given field.
fn weighed(field: &str) -> String {
    TALK.replacen("\"content\":\"in\"", &format!("\"content\":\"in\",{field}"), 1)
}

#[test]
fn an_excluded_message_is_not_supervised() {
    let workspace = Workspace::new();
    let marking = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\
                   {% else %}({{ m.content }}){% endif %}{% endfor %}";
    for field in ["weight", "train", "loss_mask", "trainable"] {
        for (value, is_supervised) in
            [("0", false), ("false", false), ("0.0", false), ("1", true), ("true", true), ("null", true)]
        {
            let row = weighed(&format!("\"{field}\":{value}"));
            let answer = if is_supervised { "[in<|im_end|>\n]" } else { "in<|im_end|>\n" };
            workspace.write("chat_template.jinja", CHATML);
            let shown = workspace.shown(&row, &options()).expect("good").remove(0);
            assert!(shown.contains(&format!("assistant\n{answer}<|im_start|>")), "{field}: {value}: {shown}");
            assert!(shown.ends_with("[the end<|im_end|>\n</s>]"), "{shown}");
            workspace.write("chat_template.jinja", marking);
            let answer = if is_supervised { "[in</s>]" } else { "in</s>" };
            let expected = format!("(hé?){answer}(so)[the end</s>]");
            assert_eq!(workspace.shown(&row, &options()).expect("good"), [expected], "{field}: {value}");
        }
    }
    workspace.write("chat_template.jinja", CHATML);
    let all = ReadOptions { loss: Loss::All, ..options() };
    let shown = workspace.shown(&weighed("\"weight\":0"), &all).expect("good").remove(0);
    assert!(shown.contains("assistant\n]in<|im_end|>\n[<|im_start|>"), "also with loss all: {shown}");
    let (_, report) = workspace
        .read(&format!("{TALK}\n{}", weighed("\"weight\":0").replace("\"the end\"", "\"x\",\"weight\":0")), &options())
        .expect("good");
    assert_eq!(
        (report.n_rows, report.n_examples, report.n_empty),
        (2, 1, 1),
        "the second row has no supervised tokens"
    );
}

#[test]
fn a_template_file_respects_excluded_messages() {
    let workspace = Workspace::new();
    let marking = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\
                   {% else %}({{ m.content }}){% endif %}{% endfor %}";
    let template = Template::File(workspace.write("my.jinja", marking));
    let options = ReadOptions { template, ..options() };
    let shown = workspace.shown(&weighed("\"weight\":0"), &options).expect("good");
    assert_eq!(shown, ["(hé?)in</s>(so)[the end</s>]"]);
    assert_eq!(workspace.shown(&weighed("\"weight\":1"), &options).expect("good"), ["(hé?)[in</s>](so)[the end</s>]"]);
    let message = workspace.shown(&weighed("\"weight\":0.5"), &options).expect_err("unclear");
    assert_eq!(message, "rows: line 1: field \"messages\": message 1: weight: expected 0 or 1, found 0.5");
    let all = ReadOptions { loss: Loss::All, ..options.clone() };
    let message = workspace.shown(&weighed("\"train\":false"), &all).expect_err("where is it");
    assert!(message.contains("some messages are excluded"), "{message}");
    // Rows of other forms may use the name messages for anything.
    assert!(workspace.shown("{\"messages\":[{\"role\":\"assistant\",\"content\":\"x\"}]}", &options).is_ok());
}

#[test]
fn an_ambiguous_weight_names_the_field() {
    let workspace = Workspace::new();
    workspace.write("chat_template.jinja", CHATML);
    for (field, expected) in [
        ("\"weight\":0.5", "message 1: weight: expected 0 or 1, found 0.5"),
        ("\"weight\":2", "message 1: weight: expected 0 or 1, found 2"),
        ("\"train\":\"no\"", "message 1: train: expected 0 or 1, true or false, found a string"),
        ("\"loss_mask\":[1]", "message 1: loss_mask: expected 0 or 1, true or false, found an array"),
        ("\"weight\":1,\"trainable\":false", "message 1: trainable: it contradicts weight"),
    ] {
        let message = workspace.shown(&weighed(field), &options()).expect_err("unclear");
        assert_eq!(message, format!("rows: line 1: field \"messages\": {expected}"));
    }
    let row = TALK.replacen("\"role\":\"user\"", "\"role\":\"user\",\"train\":true", 1);
    let message = workspace.shown(&row, &options()).expect_err("not supervised");
    assert!(
        message.starts_with("rows: line 1: field \"messages\": message 0: train: it includes a message"),
        "{message}"
    );
    assert!(workspace.shown(&row, &ReadOptions { loss: Loss::All, ..options() }).is_ok());
    workspace.write(
        "chat_template.jinja",
        "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
    );
    let message = workspace.shown(&weighed("\"weight\":0"), &options()).expect_err("which is it");
    assert!(message.contains("marks 1 answers with {% generation %}, but there are 2 assistant messages"), "{message}");
}

#[test]
fn an_answer_ends_with_an_end_token() {
    let workspace = Workspace::new();
    let shown = |template: &str| {
        workspace.write("chat_template.jinja", template);
        let shown = workspace.shown(TALK, &options()).expect("good").remove(0);
        (shown, workspace.read(TALK, &options()).expect("good").1.n_without_stop)
    };
    let marks_content = "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}\
                         {% else %}{{ m.content }}{% endif %}{{ eos_token }}\n{% endfor %}";
    let expected = "u:hé?</s>\na:[in</s>]\nu:so</s>\na:[the end</s>]\n";
    assert_eq!(shown(marks_content), (expected.to_owned(), 0), "the token right after the marked text");
    let roles_alone = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}";
    let expected = "<u>hé?<a>[in]<u>so<a>[the end</s>]";
    assert_eq!(shown(roles_alone), (expected.to_owned(), 0), "added at the end of the text");
    let no_end = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}";
    assert_eq!(shown(no_end).1, 1, "the template's text is kept, and reported");
}

#[test]
fn a_template_may_mark_supervised_text() {
    let workspace = Workspace::new();
    let config = fs::read_to_string(workspace.path("tokenizer_config.json")).expect("there");
    let template = r#""chat_template": [{"name": "other", "template": "x"}, {"name": "default", "template": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}({{ m.content }}){% endif %}{% endfor %}"}],"#;
    workspace.write("tokenizer_config.json", config.replacen('{', &format!("{{{template}"), 1));
    assert_eq!(workspace.shown(TALK, &options()).expect("good"), ["<s>(hé?)[in</s>](so)[the end</s>]"]);
}

#[test]
fn a_template_that_rewrites_earlier_turns_is_refused() {
    let workspace = Workspace::new();
    workspace.write(
        "chat_template.jinja",
        "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last else m.content[:1] }};{% endfor %}",
    );
    let message = workspace.shown(TALK, &options()).expect_err("cannot be located");
    assert!(
        message.starts_with("rows: line 1: field \"messages\": the template changes the turns before message"),
        "{message}"
    );
    assert!(workspace.shown(TALK, &ReadOptions { loss: Loss::All, ..options() }).is_ok());
}

#[test]
fn a_template_file_gives_the_prompt_or_the_whole_text() {
    let workspace = Workspace::new();
    let row = r#"{"question":"Q","output":"O"}"#;
    let of = |source: &str| {
        let template = Template::File(workspace.write("my.jinja", source));
        workspace.shown(row, &ReadOptions { template, ..options() })
    };
    assert_eq!(of("ask {{ question }}: "), Ok(vec!["<s>ask Q: [O</s>]".to_owned()]));
    assert_eq!(
        of("{{ bos_token }}{{ question }}{% generation %}{{ output }}{{ eos_token }}{% endgeneration %}"),
        Ok(vec!["<s>Q[O</s>]".to_owned()])
    );
    assert_eq!(
        of("{{ question.x.y }}"),
        Err("rows: line 1: template line 1: undefined value: `question.x` is undefined".to_owned())
    );
    let message = of("{% if %}").expect_err("broken");
    assert!(message.starts_with("my.jinja: template line 1: syntax error"), "{message}");
    let message =
        of("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}").expect_err("endless");
    assert_eq!(message, "rows: line 1: template line 1: the template runs for too long");
}

#[test]
fn dates_come_from_the_clock() {
    let workspace = Workspace::new();
    workspace.write(
        "chat_template.jinja",
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %} {{ m.content }}{% endfor %}",
    );
    let row = r#"{"messages":[{"role":"assistant","content":"a"}]}"#;
    assert_eq!(
        workspace.shown(row, &ReadOptions { loss: Loss::All, ..options() }).expect("good"),
        ["2[9 Feb 2024 a</s>]"]
    );
}

#[test]
fn a_prompt_that_ends_inside_a_token_is_encoded_separately() {
    let workspace = Workspace::new();
    let (dataset, report) = workspace.read("{\"prompt\":\"x t\",\"completion\":\"he\"}", &options()).expect("good");
    // Together, " t" and "he" would be " the".
    assert_eq!(dataset.example(0).tokens, [1, 90, 259, 260, 2]);
    assert_eq!((report.n_apart, dataset.example(0).n_prompt()), (1, 3));
    let (dataset, report) = workspace.read("{\"prompt\":\"x\",\"completion\":\" the\"}", &options()).expect("good");
    assert_eq!((dataset.example(0).tokens, report.n_apart), (&[1, 90, 261, 2][..], 0));
}

#[test]
fn long_rows_are_truncated_and_counted() {
    let workspace = Workspace::new();
    let rows = r#"[{"prompt":"ab","completion":"cd"},{"prompt":"abcdef","completion":"gh"},{"prompt":"a","completion":" \n"},
        {"prompt":"a","completion":"b"}]"#;
    let short = ReadOptions { max_length: 4, ..options() };
    assert_eq!(workspace.shown(rows, &short).expect("good"), ["<s>ab[c]", "<s>a[b</s>]"]);
    let (_, report) = workspace.read(rows, &short).expect("good");
    assert_eq!((report.n_rows, report.n_examples, report.n_cut_rows, report.n_cut_tokens), (4, 2, 2, 2 + 6));
    assert_eq!((report.n_empty, report.n_unsupervised, report.longest, report.n_tokens), (1, 1, 4, 8));
    assert_eq!(report.blake3, blake3::hash(rows.as_bytes()).to_hex().as_str());
    let message = workspace.read(rows, &ReadOptions { max_length: 2, ..options() }).expect_err("nothing is left");
    assert_eq!(
        message,
        "rows: none of its 4 rows has supervised tokens: 1 have an empty or excluded response, 3 have none within 2 tokens"
    );
}

#[test]
fn a_limit_reads_the_first_rows_and_hashes_the_whole_file() {
    let workspace = Workspace::new();
    let rows = "{\"text\":\"a\"}\n{\"text\":\"b\"}\n{\"text\":\n";
    let (_, report) = workspace.read(rows, &ReadOptions { limit: Some(2), ..options() }).expect("good");
    assert_eq!((report.n_rows, report.blake3.as_str()), (2, blake3::hash(rows.as_bytes()).to_hex().as_str()));
}

#[test]
fn invalid_rows_name_line_and_field() {
    let workspace = Workspace::new();
    let good = r#"{"prompt":"a","completion":"b"}"#;
    for (row, expected) in [
        (r#"{"prompt":"a"}"#, "rows: line 3: field \"completion\" is missing"),
        (r#"{"prompt":["a"],"completion":"b"}"#, "rows: line 3: field \"prompt\": expected a string, found an array"),
        (r#"{"prompt":"a","completion":null}"#, "rows: line 3: field \"completion\": expected a string, found null"),
    ] {
        let many = format!("{good}\n{good}\n{row}\n{good}\n{{}}\n");
        assert_eq!(workspace.read(&many, &options()).expect_err("a bad row"), expected);
    }
    workspace.write("chat_template.jinja", "{{ raise_exception('roles must alternate') }}");
    for (row, expected) in [
        (
            r#"{"a":1,"b":2}"#,
            "its fields [a, b] match none of: messages; prompt and completion; instruction and output; text",
        ),
        (r#"{"messages":"x"}"#, "field \"messages\": expected an array, found a string"),
        (r#"{"messages":[]}"#, "field \"messages\": it is empty"),
        (r#"{"messages":[{"role":"user"},1]}"#, "field \"messages\": message 1: expected an object, found a number"),
        (r#"{"messages":[{"content":"x"}]}"#, "field \"messages\": message 0: role is missing"),
        (r#"{"messages":[{"role":"user","content":"x"}]}"#, "template line 1: roles must alternate"),
    ] {
        assert_eq!(workspace.read(row, &options()).expect_err("a bad row"), format!("rows: line 1: {expected}"));
    }
    let commonsense = ReadOptions { template: Template::Commonsense, ..options() };
    let row = r#"[{"instruction":"Q","input":"I","answer":"true"}]"#;
    let expected = "rows: row [0] (line 1): field \"input\": the commonsense template does not use it";
    assert_eq!(workspace.read(row, &commonsense).expect_err("a bad row"), expected);
    assert_eq!(workspace.read("[]", &options()).expect_err("no row"), "rows: it contains no rows");
}

#[test]
fn the_first_invalid_row_is_reported_for_any_number_of_threads() {
    let workspace = Workspace::new();
    let mut rows = "{\"text\":\"a\"}\n".repeat(500);
    rows += &"{\"text\":1}\n".repeat(1500);
    for n_threads in [1, 3, 8] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().expect("threads");
        let message = pool.install(|| workspace.read(&rows, &options()).expect_err("bad rows"));
        assert_eq!(message, "rows: line 501: field \"text\": expected a string, found a number");
    }
}

#[test]
fn an_invalid_tokenizer_is_reported() {
    let workspace = Workspace::new();
    let open = || Tokenizer::open(workspace.0.path()).map(|_| ()).expect_err("no tokenizer");
    for broken in ["", "{}", "[1]", "not json", "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":-1},\"merges\":[]}}"] {
        workspace.write("tokenizer.json", broken);
        let error = open();
        assert_eq!(error.kind(), ErrorKind::BadInput);
        assert!(workspace.message(&error).starts_with("tokenizer.json: not a tokenizer: "), "{error}");
    }
    let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
    workspace.write("tokenizer.json", deep);
    assert_eq!(open().kind(), ErrorKind::BadInput);
    fs::remove_file(workspace.path("tokenizer.json")).expect("removed");
    assert_eq!(open().kind(), ErrorKind::Io);
}

#[test]
fn a_tokenizer_that_makes_its_library_panic_is_an_invalid_file() {
    let workspace = Workspace::new();
    let text = fs::read_to_string(workspace.path("tokenizer.json")).expect("there");
    let mut json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    json["decoder"] = serde_json::json!({"type": "DECODER"});
    // A lone surrogate, which the library does not expect.
    workspace.write("tokenizer.json", json.to_string().replace("DECODER", "\\ud800"));
    let error = Tokenizer::open(workspace.0.path()).map(|_| ()).expect_err("broken");
    assert_eq!(error.kind(), ErrorKind::BadInput);
    assert!(workspace.message(&error).starts_with("tokenizer.json: not a tokenizer: "), "{error}");
}

#[test]
fn a_tokenizer_that_adds_an_undefined_token_is_refused() {
    let workspace = Workspace::new();
    let text = fs::read_to_string(workspace.path("tokenizer.json")).expect("there");
    let mut json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    json["post_processor"]["special_tokens"] = serde_json::json!({});
    workspace.write("tokenizer.json", json.to_string());
    let error = Tokenizer::open(workspace.0.path()).map(|_| ()).expect_err("broken");
    assert_eq!(workspace.message(&error), "tokenizer.json: its post-processor adds \"<s>\", which is not defined");
}

#[test]
fn hostile_templates_fail_with_a_message() {
    let workspace = Workspace::new();
    let grown =
        "{% set ns = namespace(x=['x' * 1000]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
    let deep = "{% set ns = namespace(x=[1]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}";
    for (source, expected) in [
        (format!("{{{{ 1{} }}}}", "+1".repeat(60_000)), None),
        (format!("{{{{ {}1 }}}}", "not ".repeat(30_000)), None),
        ("x".repeat(200_000), Some("a template of 200000 bytes, at most 131072 are accepted")),
        (format!("{grown}{{{{ ns.x }}}}"), Some("too large to be printed")),
        (format!("{grown}{{{{ ns.x | tojson }}}}"), Some("too large for tojson")),
        (format!("{deep}ok"), None),
        (format!("{deep}{{{{ ns.x }}}}"), Some("too large to be printed")),
        ("{{ range(9999) | list | tojson(separators=['x' * 10000, ':']) }}".to_owned(), Some("too large for tojson")),
    ] {
        let template = Template::File(workspace.write("my.jinja", &source));
        let read = workspace.read("{\"output\":\"O\"}", &ReadOptions { template, ..options() });
        if let Some(expected) = expected {
            let message = read.map(|_| ()).expect_err("hostile");
            assert!(message.contains(expected), "{message}");
        }
    }
}

#[test]
fn tokens_beyond_the_model_are_refused() {
    let workspace = Workspace::new();
    workspace.write("config.json", r#"{"vocab_size":261}"#);
    let message = workspace.read(r#"{"text":"a"}"#, &options()).map(|_| ());
    assert_eq!(message, Ok(()));
    let message = workspace.read(r#"{"text":"all the rest"}"#, &options()).expect_err("beyond");
    assert_eq!(message, "tokenizer.json: token 261 \"Ġthe\" is outside the model's vocab_size of 261");
}

#[test]
fn a_conversation_needs_a_chat_template() {
    let message = Workspace::new().read(TALK, &options()).expect_err("none");
    let expected =
        "tokenizer.json: the model has no chat template: neither chat_template.jinja nor one in tokenizer_config.json";
    assert_eq!(message, expected);
}

#[test]
fn real_rows_are_read_as_questions() {
    let (workspace, ctx) = (Workspace::new(), Context::default());
    let tokenizer = workspace.tokenizer();
    let path = fixtures().join("data/commonsense.jsonl");
    assert_eq!(task_of(&path).expect("rows"), Some(Task::Commonsense));
    let questions = read_questions(&ctx, &path, &tokenizer, Task::Commonsense, &options()).expect("good rows");
    assert_eq!(questions.len(), 18);
    let candidates: usize = questions.iter().map(|question| question.candidates.len()).sum();
    assert_eq!(candidates, 3 * (2 + 4 + 2 + 2 + 3 + 4));
    let first = &questions[0];
    assert_eq!(first.prompt[0], 1);
    let (name, tokens) = &first.candidates[1];
    assert_eq!(tokenizer.decode(tokens).expect("text"), format!("the correct answer is {name}"));

    let path = fixtures().join("data/math.json");
    assert_eq!(task_of(&path).expect("rows"), Some(Task::Math));
    let questions = read_questions(&ctx, &path, &tokenizer, Task::Math, &ReadOptions { limit: Some(7), ..options() });
    let questions = questions.expect("good rows");
    assert_eq!((questions.len(), questions[1].answer.as_str()), (7, "120.0"));
    assert!(tokenizer.decode(&questions[0].prompt).expect("text").ends_with("\n\n### Response:\n"));
}

#[test]
fn the_template_s_text_for_each_answer_is_ranked() {
    let (workspace, ctx) = (Workspace::new(), Context::default());
    let (tokenizer, data) = (workspace.tokenizer(), fixtures().join("data"));
    let template = Template::File(data.join("commonsense-options.jinja"));
    let (path, options) = (data.join("commonsense.jsonl"), ReadOptions { template, ..options() });
    let questions = read_questions(&ctx, &path, &tokenizer, Task::Commonsense, &options).expect("good rows");
    let text = |tokens: &[u32]| tokenizer.decode_all(tokens).expect("text");
    let shown = |kind: &str| {
        let question = questions.iter().find(|question| question.candidates[0].0 == kind).expect("a row");
        let mut out = text(&question.prompt);
        for (name, tokens) in &question.candidates {
            out += &format!("\n{name}{}[{}]", if *name == question.answer { "*" } else { "" }, text(tokens));
        }
        out
    };
    for (kind, expected) in [
        ("true", "Question: is a game of thrones the first book?\nAnswer:\ntrue*[ yes</s>]\nfalse[ no</s>]"),
        (
            "solution1",
            "Question: How to drive in a school zone?\nAnswer:\nsolution1*[ One should drive slowly and carefully.</s>]\n\
             solution2[ One should drive fast so that they can pass the school zone quickly.</s>]",
        ),
        (
            "option1",
            "Betty reads what Monica writes all the time, because\noption1*[ Betty is a fast and great reader.</s>]\n\
             option2[ Monica is a fast and great reader.</s>]",
        ),
        (
            "answer1",
            "Question: From smallest to largest, the levels of organization in living things are\nAnswer:\n\
             answer1[ tissues, cells, organs, organ systems.</s>]\nanswer2[ tissues, cells, organ systems, organs.</s>]\n\
             answer3*[ cells, tissues, organs, organ systems.</s>]\nanswer4[ cells, tissues, organ systems, organs.</s>]",
        ),
        (
            "ending1",
            "Roof shingle removal: Some windows of a house are covered with planks. men\n\
             ending1[ are moving the floorboards of the house.</s>]\n\
             ending2[ are shown inside a house, and then are discussing.</s>]\n\
             ending3*[ are remodeling the roof of the house.</s>]\nending4[ are cleaning them with rag.</s>]",
        ),
    ] {
        assert_eq!(shown(kind), expected);
    }
    // The text ranked for the correct answer is the supervised text.
    let (dataset, _) = read_dataset(&ctx, &path, &tokenizer, &options).expect("good rows");
    for (example, question) in dataset.iter().zip(&questions) {
        let (_, right) = question.candidates.iter().find(|(name, _)| *name == question.answer).expect("it is named");
        assert_eq!(example.tokens, [&question.prompt[..], right].concat());
        let text = tokenizer.decode(right).expect("text");
        assert!(question.is_right(Task::Commonsense, &format!("{} ", text.trim())), "{text}");
        assert!(!question.is_right(Task::Commonsense, &format!("the correct answer is {}", question.answer)));
        assert_eq!(example.spans, [(question.prompt.len() as u32, example.tokens.len() as u32)]);
    }
}

#[test]
fn templates_that_cannot_be_ranked_are_refused() {
    let (workspace, ctx) = (Workspace::new(), Context::default());
    let read = |source: &str, row: &str, task| {
        let template = Template::File(workspace.write("my.jinja", source));
        let path = workspace.write("rows", row);
        let options = ReadOptions { template, ..options() };
        read_questions(&ctx, &path, &workspace.tokenizer(), task, &options).map_err(|e| workspace.message(&e))
    };
    let row = r#"{"instruction":"Q\n\nAnswer format: a/b","answer":"b"}"#;
    for (source, expected) in [
        (
            "{{ answer }}{% generation %}{{ answer }}{% endgeneration %}",
            "its prompts for the answers \"b\" and \"a\" differ",
        ),
        (
            "Q{% generation %}{{ 'yes' if answer == 'a' }}{% endgeneration %}",
            "its template writes nothing for the answer \"b\"",
        ),
        (
            "Q{% generation %}{{ answer }}{% endgeneration %}.{% generation %}{{ answer }}{% endgeneration %}",
            "its template marks 2 answers, expected one",
        ),
        ("{% generation %}{{ answer }}{% endgeneration %}", "its prompt has no tokens"),
        ("Q{% generation %}{{ 1 // 0 }}{% endgeneration %}", "template line 1: unable to calculate 1 // 0"),
    ] {
        let error = read(source, row, Task::Commonsense).expect_err("it cannot be ranked");
        assert!(error.starts_with(&format!("rows: line 1: {expected}")), "{error}");
    }
    // Math tasks rank nothing; the prompt is the text before the answer.
    let row = r#"{"instruction":"Q","answer":7}"#;
    let source = "{{ instruction }} is{% generation %} {{ answer }}{% endgeneration %}";
    let questions = read(source, row, Task::Math).expect("a good row");
    assert_eq!((questions[0].prompt.len(), questions[0].candidates.len()), ("Q is".len(), 0));
}

#[test]
fn published_outputs_are_scored_by_the_published_rules() {
    let mut rows = RowReader::open(&fixtures().join("data/math.json")).expect("rows");
    let mut right = Vec::new();
    while let Some(row) = rows.next_row().expect("good rows") {
        let field = |name: &str| row.fields[name].as_str().expect("a string").to_owned();
        right.push(Task::Math.is_right(&field("output"), &field("answer")));
    }
    // The published outputs contain errors: 60 for 120, 32 for 8, 8 for 8 …; if the answer is a letter, the first of A
    // to E in the text counts.
    let expected = [true, false, true, true, false, true, true, true, true, true, true];
    assert_eq!(right[..11], expected);
    assert!(!right[14], "an empty output is wrong");
}

#[test]
fn questions_that_cannot_be_scored_are_refused() {
    let (workspace, ctx) = (Workspace::new(), Context::default());
    let read = |row: &str, task| {
        let path = workspace.write("rows", row);
        let questions = read_questions(&ctx, &path, &workspace.tokenizer(), task, &options());
        workspace.message(&questions.map(|_| ()).expect_err("a bad row"))
    };
    for (row, task, expected) in [
        (
            r#"{"instruction":"Q","answer":"x"}"#,
            Task::Math,
            "field \"answer\": \"x\" is neither a number nor a letter from A to E",
        ),
        (
            r#"{"instruction":"Q","answer":"a"}"#,
            Task::Commonsense,
            "field \"instruction\": it has no \"Answer format: a/b/…\" with the answers",
        ),
        (
            r#"{"instruction":"Q\n\nAnswer format: a/b","answer":"c"}"#,
            Task::Commonsense,
            "field \"answer\": \"c\" is not among the answers in the instruction: a/b",
        ),
        (r#"{"instruction":"Q"}"#, Task::Math, "field \"answer\" is missing"),
    ] {
        assert_eq!(read(row, task), format!("rows: line 1: {expected}"));
    }
}
