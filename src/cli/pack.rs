use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{
    Answer,
    card::{self, CardNotes},
    env::Env,
    failure::CliResult,
    page::{Page, Table, bytes, count, number},
};
use crate::{
    adapter::{Adapter, ColumnsChoice, ColumnsKind, PackOptions, PackReport, ValuesChoice, pack_adapter},
    checkpoint::{Checkpoint, Existing},
};

/// Pack an adapter into a small file for distribution
///
/// Lossless by default: `unpack` restores the same file, and the adapter's id stays. Every command that reads an adapter reads a packed
/// one. With --base, columns that the mask's recipe derives from the base are left out of the file; `diff`, `combine` and `unpack` then
/// need --base too.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct PackArgs {
    /// Adapter to pack
    adapter: PathBuf,
    /// File of the packed adapter
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Base that the adapter was made from [default: none]
    #[arg(short, long, value_name = "PATH")]
    base: Option<PathBuf>,
    /// Storage of the columns; auto: derived if --base is given and the recipe allows it, else packed
    #[arg(long, value_enum, default_value_t = Columns::Auto)]
    columns: Columns,
    /// Storage of the values; all but keep round them, and the report has the error
    #[arg(long, value_enum, default_value_t = Values::Keep)]
    values: Values,
    /// Write a model card, README.md, beside the file
    #[arg(long)]
    card: bool,
    /// Base's repository on the Hugging Face Hub, for the card, as in org/name [default: the base's recorded name]
    #[arg(long, alias = "base-model", value_name = "REPO", requires = "card")]
    base_name: Option<String>,
    /// License for the card, an SPDX expression such as MIT [default: the adapter's license]
    #[arg(long, value_name = "SPDX", requires = "card")]
    license: Option<String>,
    /// Replace an existing output and card
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Columns {
    Auto,
    Derived,
    Packed,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Values {
    Keep,
    Bf16,
    F16,
    Int8,
    Int4,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt pack adapter.safetensors -o packed.safetensors
  neuroada-ckpt pack adapter.safetensors --base llama -o packed.safetensors
  neuroada-ckpt pack a.safetensors --card --base-name org/name --license MIT -o p.safetensors";

pub(super) fn run(args: PackArgs, env: &Env) -> CliResult<Answer> {
    let existing = if args.force { Existing::Replace } else { Existing::Keep };
    let ctx = env.context();
    let base = args.base.as_deref().map(Checkpoint::open).transpose()?;
    let adapter = match &base {
        Some(base) => Adapter::open_with_base(&ctx, &args.adapter, base)?,
        None => Adapter::open(&args.adapter)?,
    };
    if args.card {
        card::check_path(&args.output, existing)?;
    }
    let columns = match args.columns {
        Columns::Auto => ColumnsChoice::Auto,
        Columns::Derived => ColumnsChoice::Derived,
        Columns::Packed => ColumnsChoice::Packed,
    };
    let values = match args.values {
        Values::Keep => ValuesChoice::Keep,
        Values::Bf16 => ValuesChoice::Bf16,
        Values::F16 => ValuesChoice::F16,
        Values::Int8 => ValuesChoice::Int8,
        Values::Int4 => ValuesChoice::Int4,
    };
    let options = PackOptions { columns, values, base: base.as_ref() };
    let report = pack_adapter(&ctx, &adapter, &options, &args.output, existing)?;
    if args.card {
        let notes = CardNotes { base_name: args.base_name, license: args.license };
        let written = card::write(&args.output, &adapter, &report, &notes, existing);
        written.map_err(|e| e.after_commit(&args.output, "write the model card beside"))?;
        if let Some(warning) = card::warning(&adapter, &notes) {
            env.note(&warning);
        }
    }
    env.report_work(&report, print)?;
    Ok(Answer::Yes)
}

fn print(report: &PackReport, page: &mut Page) {
    let n = report.n_deltas as f64;
    let mut table = Table::new(["", "size>", "bytes per delta>", "limit>"]);
    let per_delta = |n_bytes: u64| format!("{:.3}", n_bytes as f64 / n);
    let limit = |limit: f64| format!("{:.3}", limit / n);
    let derived = report.columns == ColumnsKind::Derived;
    let columns = if derived { "columns, derived from the base" } else { "columns" };
    let mut row = |name: &str, n_bytes: u64, limit: String| {
        table.row([name.to_owned(), bytes(n_bytes), per_delta(n_bytes), limit]);
    };
    row(columns, report.columns_bytes, limit(report.columns_limit));
    row("values", report.values_bytes, limit(report.values_limit));
    row("names and hashes", report.packed_bytes - report.columns_bytes - report.values_bytes, String::new());
    row("packed", report.packed_bytes, limit(report.columns_limit + report.values_limit));
    row("plain", report.raw_bytes, String::new());
    page.table(table);
    page.legend("limit: the information in the data, which no lossless packing can go below");
    page.blank();
    let mut facts = vec![
        ("adapter", report.id[..12].to_owned()),
        ("deltas", format!("{} in {} tensors", count(report.n_deltas), count(report.n_tensors as u64))),
    ];
    if let Some(note) = &report.columns_note {
        facts.push(("columns", format!("not derived: {note}")));
    }
    if let Some(error) = &report.error {
        facts.push(("rounded from", report.source_id[..12].to_owned()));
        let (changed, of) = (count(error.n_changed), count(report.n_deltas));
        let (largest, relative) = (number(error.largest), number(error.relative));
        facts.push((
            "deltas changed",
            format!("{changed} of {of}; largest difference {largest}, in norm {relative} of all"),
        ));
    }
    if let Some(merged) = &report.merged {
        let (changed, of) = (count(merged.n_changed), count(merged.n_touched));
        let (largest, relative) = (number(merged.largest), number(merged.relative));
        facts.push((
            "merged weights changed",
            format!("{changed} of {of}; largest difference {largest}, in norm {relative} of the changes of the merge"),
        ));
    }
    page.facts(&facts);
}
