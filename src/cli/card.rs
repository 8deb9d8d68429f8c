//! The model card beside a packed adapter: front matter for the Hugging Face Hub, then text.

use std::{
    collections::BTreeMap,
    fmt::{Arguments, Write},
    path::{Path, PathBuf},
};

use super::page::{bytes, count, percent};
use crate::{
    adapter::{Adapter, ColumnsKind, PackReport},
    checkpoint::{
        CheckpointError, Existing, OutputKind, check_output, folder_of, is_repository, markdown_code, markdown_text,
        shell_word, write_atomic, yaml_string,
    },
    tensor::projection_kind,
};

/// Options of the card.
#[derive(Default)]
pub(super) struct CardNotes {
    /// The base's repository on the Hub; the recorded name of the base if not given.
    pub(super) base_name: Option<String>,
    /// The license; that of the adapter if not given.
    pub(super) license: Option<String>,
}

/// The path of the card of a file.
fn path_beside(packed: &Path) -> PathBuf {
    folder_of(packed).join("README.md")
}

/// Fails if no card may be written beside the file.
pub(super) fn check_path(packed: &Path, existing: Existing) -> Result<(), CheckpointError> {
    check_output(&path_beside(packed), OutputKind::File, existing).map(|_| ())
}

/// Writes the card of the packed adapter at `packed`.
pub(super) fn write(
    packed: &Path,
    adapter: &Adapter,
    report: &PackReport,
    notes: &CardNotes,
    existing: Existing,
) -> Result<(), CheckpointError> {
    let file = packed.file_name().unwrap_or_default().to_string_lossy();
    write_atomic(&path_beside(packed), existing, text(&file, adapter, report, notes).as_bytes())
}

/// The warning for a base name that is no repository: readers of the card cannot download it.
pub(super) fn warning(adapter: &Adapter, notes: &CardNotes) -> Option<String> {
    let base = notes.base(adapter);
    (!is_repository(base)).then(|| {
        format!(
            "warning: the card names the base \"{base}\", a local folder; --base-name ORG/NAME names its repository on the Hub"
        )
    })
}

impl CardNotes {
    fn base<'a>(&'a self, adapter: &'a Adapter) -> &'a str {
        self.base_name.as_deref().unwrap_or(&adapter.base().name)
    }
}

fn text(file: &str, adapter: &Adapter, report: &PackReport, notes: &CardNotes) -> String {
    let base = notes.base(adapter);
    let of_adapter = adapter.notes();
    let mut card = String::from("---\n");
    let mut line = |text: Arguments<'_>| {
        // Writing to a string does not fail.
        let _infallible = writeln!(card, "{text}");
    };
    if is_repository(base) {
        line(format_args!("base_model: {}", yaml_string(base)));
        line(format_args!("base_model_relation: adapter"));
    }
    line(format_args!("library_name: neuroada-ckpt"));
    if let Some(license) = notes.license.as_ref().or(of_adapter.license.as_ref()) {
        line(format_args!("license: {}", yaml_string(&license.to_lowercase())));
    }
    line(format_args!("tags:\n- neuroada\n- sparse-adapter\n- safetensors\n---\n"));
    line(format_args!("# A sparse adapter for {}\n", markdown_text(base)));
    if let Some(description) = &of_adapter.description {
        line(format_args!("{}\n", markdown_text(description)));
    }
    if let Some(author) = &of_adapter.author {
        line(format_args!("Made by {}.\n", markdown_text(author)));
    }
    line(format_args!("## What it changes\n"));
    line(format_args!("It adds a delta to {} weights of {} tensors:\n", count(report.n_deltas), report.n_tensors));
    line(format_args!("| projection | tensors | weights changed | of | share |\n| --- | ---: | ---: | ---: | ---: |"));
    let mut kinds = BTreeMap::<&str, (u64, u64, u64)>::new();
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
        line(format_args!(
            "The positions of the changed weights are derived from the base model; a digest proves them."
        ));
    }
    if let Some(error) = &report.error {
        line(format_args!(
            "The values were rounded to {}; the L2 norm of the difference is {:.3} % of that of the deltas.",
            report.values,
            error.relative * 100.0
        ));
    }
    line(format_args!("The adapter's id is `{}`, the BLAKE3 of its content.\n", report.id));
    how_to_use(&mut line, base, file);
    card
}

/// Commands: install, merge, verify, undo.
fn how_to_use(line: &mut impl FnMut(Arguments<'_>), base: &str, file: &str) {
    let folder = shell_word(base.rsplit('/').next().unwrap_or(base));
    let file = shell_word(file);
    line(format_args!("## How to install the program\n"));
    line(format_args!("```sh\ncargo install --locked neuroada-ckpt\n```\n"));
    line(format_args!("## How to merge it\n"));
    line(format_args!("```sh"));
    if is_repository(base) {
        line(format_args!("hf download {} --local-dir {folder}", shell_word(base)));
    }
    line(format_args!("neuroada-ckpt merge {folder} --adapter {file} -o merged\n```\n"));
    line(format_args!(
        "The result is an ordinary checkpoint. The adapter fits the base it was made from and no other: it has a hash of the \
         base's weights at the changed positions, and a merge into another base is refused.\n"
    ));
    line(format_args!("## How to verify it\n"));
    line(format_args!("```sh\nneuroada-ckpt inspect {file}\nneuroada-ckpt verify merged --base {folder}\n```\n"));
    line(format_args!("`inspect` prints the id, and `verify` computes every changed weight again.\n"));
    line(format_args!("## How to undo it\n"));
    line(format_args!("```sh\nneuroada-ckpt unmerge merged\n```\n"));
    line(format_args!("This restores the base's weights, bit for bit."));
}
