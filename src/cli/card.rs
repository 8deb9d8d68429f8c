//! The model card that goes beside a packed adapter: front matter for the Hugging Face Hub, then words.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

use super::page::{bytes, count, percent};
use crate::{
    adapter::{Adapter, ColumnsKind, PackReport},
    checkpoint::{
        CheckpointError, Existing, OutputKind, check_output, folder_of, markdown_code, markdown_text, shell_word,
        write_atomic, yaml_string,
    },
    tensor::projection_kind,
};

/// Where the card of a file lies.
fn place(packed: &Path) -> PathBuf {
    folder_of(packed).join("README.md")
}

/// Fails where no card may be written.
pub(super) fn check_place(packed: &Path, existing: Existing) -> Result<(), CheckpointError> {
    check_output(&place(packed), OutputKind::File, existing).map(|_| ())
}

/// Writes the card of the packed adapter at `packed`.
pub(super) fn write(
    packed: &Path,
    adapter: &Adapter,
    report: &PackReport,
    base_model: Option<&str>,
    existing: Existing,
) -> Result<(), CheckpointError> {
    let file = packed.file_name().unwrap_or_default().to_string_lossy();
    write_atomic(&place(packed), existing, text(&file, adapter, report, base_model).as_bytes())
}

fn text(file: &str, adapter: &Adapter, report: &PackReport, base_model: Option<&str>) -> String {
    let base = base_model.unwrap_or(&adapter.base().name);
    let notes = adapter.notes();
    let mut card = String::from("---\n");
    let mut line = |words: std::fmt::Arguments<'_>| {
        // Writing to a string does not fail.
        let _infallible = writeln!(card, "{words}");
    };
    line(format_args!("base_model: {}", yaml_string(base)));
    line(format_args!("base_model_relation: adapter"));
    line(format_args!("library_name: neuroada-ckpt"));
    if let Some(license) = &notes.license {
        line(format_args!("license: {}", yaml_string(&license.to_lowercase())));
    }
    line(format_args!("tags:\n- neuroada\n- sparse-adapter\n- safetensors\n---\n"));
    line(format_args!("# A sparse adapter for {}\n", markdown_text(base)));
    if let Some(description) = &notes.description {
        line(format_args!("{}\n", markdown_text(description)));
    }
    if let Some(author) = &notes.author {
        line(format_args!("Made by {}.\n", markdown_text(author)));
    }
    line(format_args!("## What it changes\n"));
    line(format_args!("It adds a delta to {} weights of {} tensors:\n", count(report.n_deltas), report.n_tensors));
    line(format_args!("| projection | tensors | weights changed | of | share |\n| --- | ---: | ---: | ---: | ---: |"));
    let mut kinds = std::collections::BTreeMap::<&str, (u64, u64, u64)>::new();
    for target in adapter.targets() {
        let kind = kinds.entry(projection_kind(&target.name)).or_default();
        *kind = (kind.0 + 1, kind.1 + target.nnz, kind.2.saturating_add(target.layout.n_elements()));
    }
    for (kind, (n, nnz, of)) in kinds {
        line(format_args!("| {} | {n} | {} | {} | {} |", markdown_text(kind), count(nnz), count(of), percent(nnz, of)));
    }
    line(format_args!("\n## Files\n"));
    let per_delta = report.packed_bytes as f64 / report.n_deltas.max(1) as f64;
    let (packed, raw) = (bytes(report.packed_bytes), bytes(report.raw_bytes));
    line(format_args!("{}: {packed}, {per_delta:.2} bytes per delta ({raw} unpacked).", markdown_code(file)));
    if report.columns == ColumnsKind::Derived {
        line(format_args!("Which weights it changes is derived from the base model, and proven by a digest."));
    }
    if let Some(error) = &report.error {
        line(format_args!(
            "Its values were rounded to {}: the difference is {:.3} % of the deltas in norm.",
            report.values,
            error.relative * 100.0
        ));
    }
    line(format_args!("Its id is `{}`.\n", report.id));
    line(format_args!("## How to merge it\n"));
    let folder = base.rsplit('/').next().unwrap_or(base);
    line(format_args!("```sh"));
    if base.contains('/') {
        line(format_args!("hf download {} --local-dir {}", shell_word(base), shell_word(folder)));
    }
    line(format_args!("neuroada-ckpt merge {} --adapter {} -o merged\n```\n", shell_word(folder), shell_word(file)));
    line(format_args!(
        "The result is an ordinary checkpoint; `neuroada-ckpt unmerge merged` gives the base's bytes back. The adapter fits the \
         base it was made from and no other: it carries a hash of the base's weights where it changes them."
    ));
    card
}
