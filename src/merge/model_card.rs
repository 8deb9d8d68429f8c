//! The model card of a merged checkpoint: front matter for the Hugging Face Hub, then words.
//!
//! It says what the checkpoint was made from and how that is undone. It holds no time and no path, so the same merge writes the same
//! card. Of the base's own card only the licence comes along.

use std::fmt::Write;

use crate::checkpoint::{is_repository, markdown_code, markdown_text, shell_word, yaml_string};

/// Characters of an id that tell adapters apart, as everywhere in this program.
const SHORT_ID: usize = 12;
/// Longer licence lines are not carried over.
const MAX_LICENSE_CHARS: usize = 2000;

/// What a card tells.
pub(super) struct CardFacts {
    /// The base's name; `ORG/NAME` where it is known by its name on the Hub.
    pub(super) base: String,
    /// The text of the base's own card, for its licence.
    pub(super) base_readme: Option<String>,
    /// The adapters that are in the checkpoint, in any order.
    pub(super) adapters: Vec<CardAdapter>,
    /// Whether the checkpoint remembers what its weights were, so that it can be undone by itself.
    pub(super) remembers: bool,
}

/// One merged adapter.
pub(super) struct CardAdapter {
    /// 64 hexadecimal digits.
    pub(super) id: String,
    /// Such as `neuroada` or `lora`.
    pub(super) kind: String,
    /// The scale it was merged with.
    pub(super) scale: f64,
    /// The base that it names.
    pub(super) base: Option<String>,
    /// What it is called.
    pub(super) name: Option<String>,
}

/// The card, to be written as `README.md`.
pub(super) fn model_card(facts: &CardFacts) -> String {
    let mut adapters: Vec<&CardAdapter> = facts.adapters.iter().collect();
    adapters.sort_by(|a, b| a.id.cmp(&b.id));
    let mut card = front_matter(facts);
    let mut line = |words: std::fmt::Arguments<'_>| {
        // Writing to a string does not fail.
        let _infallible = writeln!(card, "{words}");
    };
    let base = markdown_text(&facts.base);
    let n = match adapters.len() {
        1 => "one adapter".to_owned(),
        n => format!("{n} adapters"),
    };
    line(format_args!("# {base} with {n} merged\n"));
    let of = match is_repository(&facts.base) {
        true => format!("[{base}](https://huggingface.co/{})", facts.base),
        false => base,
    };
    line(format_args!("The weights are those of {of} with the deltas of {n} added to them by `neuroada-ckpt`."));
    line(format_args!("It is an ordinary checkpoint: what loads the base loads it.\n"));
    line(format_args!("## Merged adapters\n"));
    line(format_args!("| adapter | kind | scale | made for | id |\n| --- | --- | ---: | --- | --- |"));
    for adapter in &adapters {
        let short = short(&adapter.id);
        let name = adapter.name.as_deref().map(markdown_text).filter(|name| !name.is_empty());
        let name = name.unwrap_or_else(|| markdown_code(short));
        let made_for = markdown_text(adapter.base.as_deref().unwrap_or("not said"));
        let (kind, id) = (markdown_text(&adapter.kind), markdown_code(&adapter.id));
        line(format_args!("| {name} | {kind} | {} | {made_for} | {id} |", adapter.scale));
    }
    line(format_args!("\nThe id is the BLAKE3 of an adapter's content: whoever has the adapter can compare it.\n"));
    line(format_args!("## How to undo it\n"));
    match (facts.remembers, adapters.first()) {
        (true, Some(first)) => {
            line(format_args!("The folder `.neuroada/` remembers the original weights. In the checkpoint's folder:\n"));
            line(format_args!("```sh"));
            line(format_args!("neuroada-ckpt unmerge . -o ../base"));
            if adapters.len() > 1 {
                let id = shell_word(short(&first.id));
                line(format_args!("neuroada-ckpt unmerge . --adapter {id} -o ../without   # one of them"));
            }
            line(format_args!("```\n\nThe result has the base's weights back, bit for bit.\n"));
        }
        _ => line(format_args!(
            "This checkpoint does not remember the original weights: the way back is the base itself.\n"
        )),
    }
    line(format_args!("## How to verify it\n"));
    let folder = facts.base.rsplit('/').next().unwrap_or(&facts.base);
    let folder = shell_word(&format!("../{folder}"));
    line(format_args!("```sh"));
    if is_repository(&facts.base) {
        line(format_args!("hf download {} --local-dir {folder}", shell_word(&facts.base)));
    }
    match facts.remembers {
        true => line(format_args!("neuroada-ckpt verify . --base {folder}\n```")),
        false => line(format_args!("neuroada-ckpt verify . --base {folder} --adapter ADAPTER=SCALE\n```")),
    }
    card
}

fn short(id: &str) -> &str {
    id.get(..SHORT_ID).unwrap_or(id)
}

/// The front matter, with an empty line behind it.
///
/// `base_model_relation` is one of `adapter`, `finetune`, `merge` and `quantized`. A model with adapters in its weights is a finetune of
/// its base; `merge` is for models made of several models.
///
/// Source: <https://huggingface.co/docs/hub/model-cards>.
fn front_matter(facts: &CardFacts) -> String {
    let mut yaml = String::from("---\n");
    if is_repository(&facts.base) {
        yaml += &format!("base_model: {}\nbase_model_relation: finetune\n", yaml_string(&facts.base));
    }
    yaml += "library_name: transformers\n";
    for (key, values) in licenses(facts.base_readme.as_deref().unwrap_or_default()) {
        match &values[..] {
            [one] => yaml += &format!("{key}: {}\n", yaml_string(one)),
            several => {
                yaml += &format!("{key}:\n");
                several.iter().for_each(|value| yaml += &format!("- {}\n", yaml_string(value)));
            }
        }
    }
    yaml + "tags:\n- neuroada-ckpt\n- safetensors\n---\n\n"
}

/// What the front matter of a card says of the licence: each key with its values, in this order.
fn licenses(readme: &str) -> Vec<(&'static str, Vec<String>)> {
    const KEYS: [&str; 3] = ["license", "license_name", "license_link"];
    let mut lines = readme.trim_start_matches('\u{feff}').lines();
    if lines.next().is_none_or(|line| line.trim_end() != "---") {
        return Vec::new();
    }
    let lines: Vec<&str> = lines.take_while(|line| line.trim_end() != "---").collect();
    let values = |key: &str| {
        let is_key = |line: &&str| line.strip_prefix(key).is_some_and(|rest| rest.starts_with(':'));
        let at = lines.iter().position(is_key)?;
        let value = lines[at][key.len() + 1..].trim();
        let listed = || lines[at + 1..].iter().map_while(|line| line.trim_start().strip_prefix("- "));
        let values: Vec<String> = match value.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(flow) => flow.split(',').filter_map(scalar).collect(),
            None if value.is_empty() => listed().filter_map(scalar).collect(),
            None => scalar(value).into_iter().collect(),
        };
        (!values.is_empty()).then_some(values)
    };
    KEYS.into_iter().filter_map(|key| Some((key, values(key)?))).collect()
}

/// A YAML scalar on one line; `None` where it is none, is null, or is written in another way.
fn scalar(text: &str) -> Option<String> {
    let text = text.trim();
    let value = if text.starts_with('"') {
        // Behind the string may be a comment.
        serde_json::Deserializer::from_str(text).into_iter::<String>().next()?.ok()?
    } else if let Some(rest) = text.strip_prefix('\'') {
        // Two quotes are one; a single one is the end.
        let inner = rest.replace("''", "\0");
        inner.split_once('\'')?.0.replace('\0', "'")
    } else {
        let plain = text.split(" #").next().unwrap_or_default().trim();
        let is_plain = !plain.starts_with(['|', '>', '&', '*', '!', '{', '[', '#', '%', '@', '`']);
        is_plain.then(|| plain.to_owned())?
    };
    let is_null = matches!(value.as_str(), "" | "~" | "null");
    let is_fine = value.chars().count() <= MAX_LICENSE_CHARS && !value.chars().any(char::is_control);
    (is_fine && !is_null).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(id: u8, name: Option<&str>) -> CardAdapter {
        CardAdapter {
            id: format!("{id:02x}").repeat(32),
            kind: "lora".to_owned(),
            scale: 0.5,
            base: Some("org/model".to_owned()),
            name: name.map(str::to_owned),
        }
    }

    fn facts(base: &str, readme: Option<&str>, adapters: Vec<CardAdapter>, remembers: bool) -> CardFacts {
        CardFacts { base: base.to_owned(), base_readme: readme.map(str::to_owned), adapters, remembers }
    }

    #[test]
    fn a_card_says_what_was_merged_and_how_to_undo_it() {
        let readme =
            "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE # below\ntags:\n- x\n---\n# Old card\n";
        let facts = facts("org/model", Some(readme), vec![adapter(2, None), adapter(1, Some("math"))], true);
        insta::assert_snapshot!(model_card(&facts), @r#"
        ---
        base_model: "org/model"
        base_model_relation: finetune
        library_name: transformers
        license: "other"
        license_name: "llama3"
        license_link: "LICENSE"
        tags:
        - neuroada-ckpt
        - safetensors
        ---

        # org/model with 2 adapters merged

        The weights are those of [org/model](https://huggingface.co/org/model) with the deltas of 2 adapters added to them by `neuroada-ckpt`.
        It is an ordinary checkpoint: what loads the base loads it.

        ## Merged adapters

        | adapter | kind | scale | made for | id |
        | --- | --- | ---: | --- | --- |
        | math | lora | 0.5 | org/model | `0101010101010101010101010101010101010101010101010101010101010101` |
        | `020202020202` | lora | 0.5 | org/model | `0202020202020202020202020202020202020202020202020202020202020202` |

        The id is the BLAKE3 of an adapter's content: whoever has the adapter can compare it.

        ## How to undo it

        The folder `.neuroada/` remembers the original weights. In the checkpoint's folder:

        ```sh
        neuroada-ckpt unmerge . -o ../base
        neuroada-ckpt unmerge . --adapter '010101010101' -o ../without   # one of them
        ```

        The result has the base's weights back, bit for bit.

        ## How to verify it

        ```sh
        hf download 'org/model' --local-dir '../model'
        neuroada-ckpt verify . --base '../model'
        ```
        "#);
    }

    #[test]
    fn without_a_memory_or_a_repository_the_card_says_so() {
        let card = model_card(&facts("tiny-llama", None, vec![adapter(1, None)], false));
        assert!(card.starts_with("---\nlibrary_name: transformers\ntags:\n- neuroada-ckpt\n- safetensors\n---\n\n# tiny-llama with one adapter merged\n"));
        assert!(card.contains("does not remember") && !card.contains("unmerge") && !card.contains("huggingface.co"));
        assert!(card.contains("verify . --base '../tiny-llama' --adapter ADAPTER=SCALE"));
    }

    #[test]
    fn names_from_files_are_neither_markup_nor_yaml_nor_commands() {
        let mut hostile = adapter(1, Some("a|b\n# c\u{202e}"));
        hostile.kind = "<script>".to_owned();
        hostile.base = Some("[x](http://y)\u{1b}[31m".to_owned());
        hostile.id = "!`|$(x)\n".to_owned();
        let card =
            model_card(&facts("a\n---\nlicense: mit\n'; rm -rf ~ #", None, vec![hostile, adapter(2, None)], true));
        assert_eq!(card.lines().filter(|line| *line == "---").count(), 2, "{card}");
        assert!(!card.contains("\nlicense:") && !card.contains('\u{1b}') && !card.contains('\u{202e}'), "{card}");
        let row = card.lines().find(|line| line.contains("script")).unwrap();
        assert_eq!(row, "| a\\|b \\# c | \\<script\\> | 0.5 | \\[x\\](http://y)\\[31m | `!'\\|$(x)` |");
        assert!(
            card.contains("--adapter '!`|$(x)'") && card.contains(r"--base '../a---license: mit'\''; rm -rf ~ #'"),
            "{card}"
        );
    }

    #[test]
    fn the_licence_comes_along_in_every_spelling() {
        for (yaml, expected) in [
            ("license: mit", &[("license", &["mit"][..])][..]),
            ("license: \"apache-2.0\"  # yes\r", &[("license", &["apache-2.0"])]),
            ("license: 'it''s mine'", &[("license", &["it's mine"])]),
            ("license: [mit, \"cc0-1.0\"]", &[("license", &["mit", "cc0-1.0"])]),
            ("license:\n- mit\n  - cc0-1.0\ntags:\n- x", &[("license", &["mit", "cc0-1.0"])]),
            (
                "license_link: https://a/b#c\nlicense: other",
                &[("license", &["other"]), ("license_link", &["https://a/b#c"])],
            ),
            ("license: null\nlicense_name: |\n  x", &[]),
            ("model:\n  license: mit", &[]),
            ("licenses: mit", &[]),
            ("", &[]),
        ] {
            let found = licenses(&format!("\u{feff}---\n{yaml}\n---\nlicense: late"));
            let found: Vec<(&str, Vec<&str>)> =
                found.iter().map(|(key, values)| (*key, values.iter().map(String::as_str).collect())).collect();
            let expected: Vec<(&str, Vec<&str>)> =
                expected.iter().map(|(key, values)| (*key, values.to_vec())).collect();
            assert_eq!(found, expected, "{yaml}");
        }
        assert!(licenses("# A card\n---\nlicense: mit\n---\n").is_empty());
    }

    #[test]
    fn repositories_have_an_owner_and_a_name() {
        for name in ["org/model", "meta-llama/Llama-3.1-8B", "a/_b"] {
            assert!(is_repository(name), "{name}");
        }
        for name in ["model", "a/b/c", "/a", "a/", "../model", "./model", "a/..", "a b/c", "a/b\n", "~/model", ""] {
            assert!(!is_repository(name), "{name:?}");
        }
    }
}
