//! `inspect`: describes a file or folder from its headers. This file counts plain tensors and those of PEFT adapters; [`sparse`] reads
//! the targets of masks and adapters.

mod sparse;
mod weights;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use clap::Args;
use globset::{Glob, GlobMatcher};
use serde::Serialize;
use serde_json::Value;

use self::{sparse::SparseFacts, weights::WeightFacts};
use super::{
    Answer, device,
    env::Env,
    failure::{CliError, CliResult},
    page::{Page, Table, bytes, count, percent},
};
use crate::{
    adapter::Adapter,
    checkpoint::{
        Checkpoint, CheckpointError, DOCUMENT_KEY, Layout, Printable, TensorInfo, TensorRef, probe, read_whole,
    },
    mask::{FileKind, MaskFile},
    merge::{ActiveAdapter, LedgerSummary, MergeError, NamedAdapter, ledger_summary, named_adapters},
    tensor::{dtype_name, projection_kind},
};

/// Maximum rows of a printed table; JSON has all rows.
const MAX_ROWS: usize = 200;

/// File names in a PEFT adapter's folder.
const PEFT_CONFIG: &str = "adapter_config.json";
const PEFT_TENSORS: &str = "adapter_model.safetensors";
const PEFT_KEYS: [&str; 6] =
    ["peft_type", "r", "lora_alpha", "use_rslora", "base_model_name_or_path", "target_modules"];
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Describe a checkpoint, mask or adapter
///
/// Shows tensors, dtypes, shapes, sizes and metadata, and the merges recorded in a checkpoint's ledger. Reads headers only, so large files
/// take no longer than small ones.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct InspectArgs {
    /// Folder or .safetensors file
    #[arg(required_unless_present = "devices")]
    path: Option<PathBuf>,
    /// List the machine's devices, and why a GPU cannot be used
    #[arg(long, conflicts_with_all = ["path", "tensors", "filter"])]
    devices: bool,
    /// List all tensors
    #[arg(short, long)]
    tensors: bool,
    /// Pattern of tensor names to count and list, such as '*.mlp.*' [default: all]
    #[arg(short, long, value_name = "GLOB")]
    filter: Option<String>,
}

/// The report of `inspect`, with the fields of its JSON document.
#[derive(Serialize)]
struct InspectReport {
    kind: Kind,
    /// The checkpoint with an interrupted change: its weights may be a mixture of two states.
    #[serde(skip_serializing_if = "Option::is_none")]
    interrupted: Option<String>,
    name: String,
    layout: &'static str,
    model_type: Option<String>,
    n_tensors: u64,
    n_parameters: u64,
    /// Of all files, headers included.
    n_bytes: u64,
    dtypes: Vec<DtypeCount>,
    kinds: Vec<KindCount>,
    shards: Vec<ShardFacts>,
    /// Weights that are stored as codes, by layout.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    quantized: Vec<QuantizedCount>,
    /// Of a checkpoint.
    #[serde(flatten)]
    weights: WeightFacts,
    /// Fields of `adapter_config.json` that determine how the adapter is applied.
    peft: Option<serde_json::Map<String, Value>>,
    /// Of a mask or an adapter.
    sparse: Option<SparseFacts>,
    /// The ledger of a merged checkpoint.
    merges: Option<LedgerSummary>,
    /// Adapters named by the files as merged, if there is no ledger.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    named: Vec<NamedAdapter>,
    /// Only with `--tensors`.
    tensors: Option<Vec<TensorFacts>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Checkpoint,
    Mask,
    Adapter,
    PackedAdapter,
    Ledger,
    PeftAdapter,
    /// A kind that this version does not know.
    Unknown,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::Mask => "mask",
            Self::Adapter => "adapter",
            Self::PackedAdapter => "packed adapter",
            Self::Ledger => "ledger",
            Self::PeftAdapter => "PEFT adapter",
            Self::Unknown => "unknown",
        }
    }

    /// The kind of an open checkpoint, by its document.
    fn of(checkpoint: &Checkpoint) -> CliResult<Self> {
        let [shard] = checkpoint.shards() else { return Ok(Self::Checkpoint) };
        if checkpoint.layout() != Layout::File {
            return Ok(Self::Checkpoint);
        }
        Ok(match FileKind::of(shard)? {
            FileKind::Plain => Self::Checkpoint,
            FileKind::Document(kind) => match kind.as_str() {
                "mask" => Self::Mask,
                "adapter" => Self::Adapter,
                "packed" => Self::PackedAdapter,
                "ledger" => Self::Ledger,
                _ => Self::Unknown,
            },
        })
    }
}

#[derive(Serialize, Default)]
struct Count {
    n_tensors: u64,
    n_parameters: u64,
    n_bytes: u64,
}

#[derive(Serialize)]
struct DtypeCount {
    dtype: String,
    #[serde(flatten)]
    count: Count,
}

/// Quantized weights of one layout.
#[derive(Serialize)]
struct QuantizedCount {
    layout: String,
    n_weights: u64,
    /// What they are decoded to.
    n_parameters: u64,
    /// The first of them, by name.
    example: String,
    /// Why they cannot be decoded.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// Tensors of one kind, type and shape.
#[derive(Serialize)]
struct KindCount {
    kind: String,
    dtype: String,
    shape: Vec<u64>,
    #[serde(flatten)]
    count: Count,
}

#[derive(Serialize)]
struct ShardFacts {
    name: String,
    n_tensors: u64,
    n_bytes: u64,
    header_bytes: u64,
    metadata: BTreeMap<String, String>,
}

#[derive(Serialize)]
struct TensorFacts {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    n_parameters: u64,
    n_bytes: u64,
    shard: String,
    /// Where the data begins, in bytes from the start of the shard.
    offset: u64,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt inspect llama
  neuroada-ckpt inspect adapter.safetensors --tensors --filter '*.mlp.*'
  neuroada-ckpt inspect --devices";

pub(super) fn run(args: InspectArgs, env: &Env) -> CliResult<Answer> {
    let Some(path) = args.path else {
        env.report(&device::devices(), device::print)?;
        return Ok(Answer::Yes);
    };
    let filter = args.filter.as_deref().map(parse_filter).transpose()?;
    let report = inspect(&path, filter.as_ref(), args.tensors)?;
    env.report(&report, write_page)?;
    Ok(Answer::Yes)
}

fn parse_filter(glob: &str) -> CliResult<GlobMatcher> {
    let glob = Glob::new(glob).map_err(|e| CliError::usage(format!("--filter: {e}")))?;
    Ok(glob.compile_matcher())
}

fn inspect(path: &Path, filter: Option<&GlobMatcher>, list_tensors: bool) -> CliResult<InspectReport> {
    let peft = read_peft_config(path)?;
    let checkpoint = match &peft {
        Some(_) => Checkpoint::open(&path.join(PEFT_TENSORS))?,
        None => Checkpoint::open_interrupted(path)?,
    };
    let kind = if peft.is_some() { Kind::PeftAdapter } else { Kind::of(&checkpoint)? };
    let sparse = match kind {
        Kind::Adapter | Kind::PackedAdapter => {
            Some(SparseFacts::of_adapter(&Adapter::open(path)?, filter, list_tensors))
        }
        Kind::Mask => Some(SparseFacts::of_mask(&MaskFile::open(path)?, filter, list_tensors)),
        _ => None,
    };
    let merges = match kind {
        Kind::Checkpoint => merges_of(&checkpoint)?,
        _ => None,
    };
    let named = match (kind, &merges) {
        (Kind::Checkpoint, None) => named_adapters(&checkpoint),
        _ => Vec::new(),
    };
    let weights = checkpoint.weights()?;
    let chosen = || weights.iter().copied().filter(|tensor| filter.is_none_or(|f| f.is_match(&tensor.info.name)));
    let total = Count::of(chosen());
    Ok(InspectReport {
        kind,
        interrupted: checkpoint.interrupted()?.map(|path| Printable::path(&path)),
        name: if peft.is_some() { folder_name(path) } else { checkpoint.name() },
        layout: match checkpoint.layout() {
            Layout::File => "file",
            Layout::Folder => "folder",
            Layout::Sharded => "sharded",
        },
        model_type: checkpoint.model_type().map(str::to_owned),
        n_tensors: total.n_tensors,
        n_parameters: total.n_parameters,
        n_bytes: checkpoint.n_bytes(),
        dtypes: count_dtypes(chosen()),
        kinds: count_kinds(chosen()),
        quantized: count_quantized(&checkpoint)?,
        weights: if kind == Kind::Checkpoint { WeightFacts::of(&checkpoint)? } else { WeightFacts::default() },
        shards: shard_facts(&checkpoint),
        peft,
        sparse,
        merges,
        named,
        tensors: list_tensors.then(|| chosen().map(TensorFacts::of).collect()),
    })
}

fn merges_of(checkpoint: &Checkpoint) -> CliResult<Option<LedgerSummary>> {
    match ledger_summary(checkpoint) {
        // One shard of a merged checkpoint, whose ledger belongs to the whole; or a folder and one of its files with a ledger each.
        Err(MergeError::Refused { .. }) => Ok(None),
        summary => Ok(summary?),
    }
}

/// Fields of a PEFT adapter's config, or `None` if `path` is something else.
fn read_peft_config(path: &Path) -> CliResult<Option<serde_json::Map<String, Value>>> {
    let config = path.join(PEFT_CONFIG);
    if !probe::is_folder(path)? || !probe::is_file(&config)? || !probe::is_file(&path.join(PEFT_TENSORS))? {
        return Ok(None);
    }
    let mut keys: serde_json::Map<String, Value> = serde_json::from_slice(&read_whole(&config, MAX_CONFIG_BYTES)?)
        .map_err(|e| CheckpointError::bad_file(&config, format!("malformed: {}", Printable(&e.to_string()))))?;
    keys.retain(|key, value| PEFT_KEYS.contains(&key.as_str()) && !value.is_null());
    Ok(Some(keys))
}

/// The name of a folder, for people; never a whole path.
fn folder_name(path: &Path) -> String {
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    real.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

impl Count {
    fn of<'a>(tensors: impl Iterator<Item = TensorRef<'a>>) -> Self {
        tensors.fold(Self::default(), |mut count, tensor| {
            count.add(&tensor);
            count
        })
    }

    fn add(&mut self, tensor: &TensorRef<'_>) {
        self.n_tensors += 1;
        // Sizes of a file fit 64 bits, and so do their sums over shards that exist.
        self.n_parameters = self.n_parameters.saturating_add(tensor.info.n_elements());
        self.n_bytes += tensor.stored_bytes();
    }
}

impl TensorFacts {
    fn of(tensor: TensorRef<'_>) -> Self {
        Self {
            name: tensor.info.name.clone(),
            dtype: stored_as(tensor),
            shape: tensor.info.shape.clone(),
            n_parameters: tensor.info.n_elements(),
            n_bytes: tensor.stored_bytes(),
            shard: tensor.shard.file_name(),
            offset: tensor.stored().next().map_or(0, |(shard, info)| shard.file_range(info).start),
        }
    }
}

/// Largest first, then by name.
fn count_dtypes<'a>(tensors: impl Iterator<Item = TensorRef<'a>>) -> Vec<DtypeCount> {
    let mut counts: BTreeMap<String, Count> = BTreeMap::new();
    for tensor in tensors {
        counts.entry(stored_as(tensor)).or_default().add(&tensor);
    }
    let mut counts: Vec<_> = counts.into_iter().map(|(dtype, count)| DtypeCount { dtype, count }).collect();
    counts.sort_by_key(|dtype| std::cmp::Reverse(dtype.count.n_bytes));
    counts
}

/// Largest first, then by name.
fn count_kinds<'a>(tensors: impl Iterator<Item = TensorRef<'a>>) -> Vec<KindCount> {
    let mut counts: BTreeMap<(&str, String, &[u64]), Count> = BTreeMap::new();
    for tensor in tensors {
        let TensorInfo { name, shape, .. } = tensor.info;
        counts.entry((projection_kind(name), stored_as(tensor), &shape[..])).or_default().add(&tensor);
    }
    let kind_count = |((kind, dtype, shape), count): ((&str, _, &[u64]), _)| KindCount {
        kind: kind.to_owned(),
        dtype,
        shape: shape.to_owned(),
        count,
    };
    let mut counts: Vec<_> = counts.into_iter().map(kind_count).collect();
    counts.sort_by_key(|kind| std::cmp::Reverse(kind.count.n_bytes));
    counts
}

/// The type of a plain tensor, or the layout of a quantized weight.
fn stored_as(tensor: TensorRef<'_>) -> String {
    tensor.layout().map_or_else(|| dtype_name(tensor.info.dtype), |layout| layout.name().to_owned())
}

/// By layout, the weights by name. Of weights that cannot be decoded, why.
fn count_quantized(checkpoint: &Checkpoint) -> CliResult<Vec<QuantizedCount>> {
    let mut counts: BTreeMap<String, QuantizedCount> = BTreeMap::new();
    for weight in checkpoint.codes().weights() {
        let (layout, n_parameters, problem) = match checkpoint.decoded(weight) {
            Ok(tensor) => (stored_as(tensor), tensor.info.n_elements(), None),
            // The location of the scales differs from weight to weight.
            Err(CheckpointError::Layout { layout, why, .. }) => {
                (layout.split(" in \"").next().unwrap_or_default().to_owned(), 0, Some(why))
            }
            Err(other) => return Err(other.into()),
        };
        let example = weight.name.clone();
        let new = || QuantizedCount { layout: layout.clone(), n_weights: 0, n_parameters: 0, example, problem };
        let count = counts.entry(layout.clone()).or_insert_with(new);
        count.n_weights += 1;
        count.n_parameters += n_parameters;
    }
    Ok(counts.into_values().collect())
}

fn shard_facts(checkpoint: &Checkpoint) -> Vec<ShardFacts> {
    let facts = checkpoint.shards().iter().map(|shard| ShardFacts {
        name: shard.file_name(),
        n_tensors: shard.header().tensors().len() as u64,
        n_bytes: shard.file_bytes(),
        header_bytes: shard.header().header_bytes(),
        metadata: shard.header().metadata().clone(),
    });
    facts.collect()
}

fn write_page(report: &InspectReport, page: &mut Page) {
    let model_type = report.model_type.as_deref().map_or_else(String::new, |model_type| format!(" ({model_type})"));
    let layout = match report.layout {
        "file" => "one file".to_owned(),
        "folder" => "a folder with one shard".to_owned(),
        _ if report.shards.len() == 1 => "1 shard".to_owned(),
        _ => format!("{} shards", report.shards.len()),
    };
    let mut facts = vec![(report.kind.word(), format!("{}{model_type}, {layout}", report.name))];
    match &report.sparse {
        Some(sparse) => facts.extend(sparse.facts()),
        None => facts.extend([("tensors", count(report.n_tensors)), ("parameters", count(report.n_parameters))]),
    }
    facts.push(("size", bytes(report.n_bytes)));
    for QuantizedCount { layout, n_weights, example, problem, .. } in &report.quantized {
        let (n_weights, example) = (count(*n_weights), Printable(example));
        facts.push((
            "quantized",
            match problem {
                None => format!("{n_weights} weights as {layout}, such as {example}"),
                Some(why) => {
                    format!("{n_weights} weights as {layout}, such as {example}, cannot be decoded: {}", Printable(why))
                }
            },
        ));
    }
    facts.extend(report.weights.facts());
    if let Some(peft) = &report.peft {
        facts.extend(peft.iter().map(|(key, value)| ("config", format!("{key}={}", value_text(value)))));
    }
    facts.extend(shared_metadata(&report.shards));
    if let Some(merges) = &report.merges {
        facts.extend(merge_facts(merges));
    }
    let named =
        |adapter: &NamedAdapter| ("merged", format!("{} scale {}, its ledger is gone", adapter.id, adapter.scale));
    facts.extend(report.named.iter().map(named));
    if let Some(path) = &report.interrupted {
        page.line(format_args!(
            "INTERRUPTED: a change was interrupted and the weights may be a mixture of two states; run: neuroada-ckpt recover {path}"
        ));
        page.blank();
    }
    page.facts(&facts);
    match &report.sparse {
        Some(sparse) => sparse.write_tables(page),
        None => write_tables(report, page),
    }
}

fn merge_facts(merges: &LedgerSummary) -> Vec<(&'static str, String)> {
    let merged = |adapter: &ActiveAdapter| ("merged", format!("{} scale {}", adapter.id, adapter.scale));
    let mut facts: Vec<_> = merges.active.iter().map(merged).collect();
    let (touched, tensors) = (count(merges.n_touched), count(merges.n_tensors as u64));
    facts.push(match merges.needs_base {
        true => (
            "ledger",
            format!("{touched} weights of {tensors} tensors changed, no originals kept: unmerge needs the base"),
        ),
        false => ("ledger", format!("{touched} originals of {tensors} tensors, {}", bytes(merges.ledger_bytes))),
    });
    if merges.interrupted {
        facts.push(("state", "a change was interrupted; run recover".to_owned()));
    }
    facts
}

fn write_tables(report: &InspectReport, page: &mut Page) {
    let mut dtypes = Table::new(["type", "tensors>", "parameters>", "size>", "share>"]);
    for DtypeCount { dtype, count: of } in &report.dtypes {
        let share = percent(of.n_parameters, report.n_parameters);
        dtypes.row([dtype.clone(), count(of.n_tensors), count(of.n_parameters), bytes(of.n_bytes), share]);
    }
    if report.dtypes.len() > 1 {
        page.blank();
        page.table(dtypes);
    }

    let mut kinds = Table::new(["kind", "type", "shape", "tensors>", "parameters>", "size>", "share>"]);
    for KindCount { kind, dtype, shape, count: of } in report.kinds.iter().take(MAX_ROWS) {
        let share = percent(of.n_parameters, report.n_parameters);
        let (n_tensors, n_parameters) = (count(of.n_tensors), count(of.n_parameters));
        kinds.row([kind.clone(), dtype.clone(), shape_text(shape), n_tensors, n_parameters, bytes(of.n_bytes), share]);
    }
    page.blank();
    page.table(kinds);
    and_more(page, report.kinds.len());

    if report.layout == "sharded" {
        let mut shards = Table::new(["shard", "tensors>", "size>"]);
        for shard in report.shards.iter().take(MAX_ROWS) {
            shards.row([shard.name.clone(), count(shard.n_tensors), bytes(shard.n_bytes)]);
        }
        page.blank();
        page.table(shards);
        and_more(page, report.shards.len());
    }

    if let Some(list) = &report.tensors {
        let mut tensors = Table::new(["tensor", "type", "shape", "parameters>", "size>", "shard"]);
        for tensor in list {
            tensors.row([
                tensor.name.clone(),
                tensor.dtype.clone(),
                shape_text(&tensor.shape),
                count(tensor.n_parameters),
                bytes(tensor.n_bytes),
                tensor.shard.clone(),
            ]);
        }
        page.blank();
        page.table(tensors);
    }
}

/// Metadata that all shards share, without this program's own keys, which the report shows elsewhere.
fn shared_metadata(shards: &[ShardFacts]) -> Vec<(&'static str, String)> {
    let Some((first, others)) = shards.split_first() else { return Vec::new() };
    let is_shared =
        |(key, value): &(&String, &String)| others.iter().all(|shard| shard.metadata.get(*key) == Some(*value));
    let is_foreign = |(key, _): &(&String, &String)| key.as_str() != DOCUMENT_KEY && !key.starts_with("neuroada.");
    let shared = first.metadata.iter().filter(is_foreign).filter(is_shared).take(MAX_ROWS);
    shared.map(|(key, value)| ("metadata", format!("{key}={value}"))).collect()
}

/// JSON as text: strings without quotes.
fn value_text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn and_more(page: &mut Page, n: usize) {
    if n > MAX_ROWS {
        page.line(format!("… and {} more; --json lists all", count((n - MAX_ROWS) as u64)));
    }
}

/// `[4096, 4096]`; the middle of very long ones is left out.
fn shape_text(shape: &[u64]) -> String {
    if shape.len() > 8 { format!("[{} sizes]", shape.len()) } else { format!("{shape:?}") }
}
