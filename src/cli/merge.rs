use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};

use super::{
    Answer,
    env::Env,
    failure::{CliError, CliResult, Hint},
    page::{Page, Table, bytes, count, number, percent},
    weights::{AxesArgs, RenameArgs, axes_hint},
};
use crate::{
    backend::{MergedWeights, Merger},
    checkpoint::{Checkpoint, Existing, Printable, probe},
    merge::{
        self, AdapterReading, ExpertOrder, KeptOriginals, KindReport, MergeError, MergeInput, MergeOptions,
        MergeOutput, MergeReport, Undecided,
    },
    weights::Axes,
};

/// Merge adapters into a checkpoint
///
/// Every weight becomes round(original + delta * scale + ...) over all of its adapters, summed in a fixed order, so the result does not
/// depend on the order of merges. Everything is checked before the result appears: each tensor of each adapter must match, and the base's
/// values must equal those that a sparse adapter was made from. A wrong base is found before anything is copied. The result keeps the
/// original bits in .neuroada/, so that unmerge can take any adapter out exactly.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
#[command(group = ArgGroup::new("where").args(["output", "in_place"]).required(true))]
pub(super) struct MergeArgs {
    /// Folder or .safetensors file of the base checkpoint
    base: PathBuf,
    /// Adapter made from that base: a file of this program, a PEFT folder (LoRA, SHiRA, Super-Tuning), or one of SpIEL or the published
    /// code; =SCALE replaces its own scale (for LoRA: 1); repeatable
    #[arg(short, long = "adapter", value_name = "FILE[=SCALE]", required = true)]
    adapters: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
    /// Write no ledger, and no adapter ids into the shards' headers: the merge cannot be undone
    #[arg(long, conflicts_with = "in_place")]
    no_ledger: bool,
    /// Merge even if finite weights become infinite or NaN; the report counts them
    #[arg(long)]
    allow_overflow: bool,
    #[command(flatten)]
    low_rank: LowRankArgs,
}

/// Options for low-rank adapters.
#[derive(Args)]
struct LowRankArgs {
    /// LoRA: store the originals of all changed tensors in the ledger, so that unmerge needs no base; takes the size of these tensors
    #[arg(long, conflicts_with = "no_ledger")]
    keep_originals: bool,
    /// LoRA in place, or on top of another LoRA: the unmodified base; the ledger then keeps hashes, and unmerge and recover need this
    /// base again
    #[arg(long = "base", value_name = "PATH", id = "originals_base")]
    originals: Option<PathBuf>,
    /// LoRA on stacks of experts: layout of the second factor, which the file does not record; PEFT writes rank-first
    #[arg(long, value_enum, value_name = "ORDER")]
    expert_order: Option<ExpertOrderArg>,
    #[command(flatten)]
    axes: AxesArgs,
    /// Axes of all stacks of experts
    #[arg(long, value_name = "AXES", hide = true, value_parser = |text: &str| text.parse::<Axes>())]
    expert_axes: Option<Axes>,
    #[command(flatten)]
    renames: RenameArgs,
    /// LoRA on one name of a tied weight, such as embedding and head: change the weight under all of its names
    #[arg(long = "tied-weights", alias = "tied-head")]
    tied: bool,
    /// LoRA with a new head or a resized vocabulary: add tensors, and replace tensors of another size; config.json is edited to match
    #[arg(long, requires = "output")]
    allow_new_tensors: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum ExpertOrderArg {
    /// [d_out, r, E]
    RankFirst,
    /// [d_out, E, r]
    ExpertFirst,
}

impl LowRankArgs {
    fn reading(&self) -> AdapterReading {
        let order = |order| match order {
            ExpertOrderArg::RankFirst => ExpertOrder::RankFirst,
            ExpertOrderArg::ExpertFirst => ExpertOrder::ExpertFirst,
        };
        AdapterReading {
            expert_order: self.expert_order.map(order),
            axes: self.axes.axes.clone(),
            expert_axes: self.expert_axes,
            renames: self.renames.renames.clone(),
            tied_head: self.tied,
            new_tensors: self.allow_new_tensors,
        }
    }
}

/// Options for the output.
#[derive(Args)]
pub(super) struct OutputArgs {
    /// Folder or file of the new checkpoint
    #[arg(short, long, value_name = "PATH", conflicts_with = "in_place")]
    output: Option<PathBuf>,
    /// Change the checkpoint itself, with a journal for crashes
    #[arg(long)]
    in_place: bool,
    /// In place: first copy files that other paths lead to as well
    #[arg(long, conflicts_with = "output")]
    break_links: bool,
    /// Replace an existing output; a folder only if it holds nothing but files of this program or files with the new names
    #[arg(long, requires = "output")]
    force: bool,
    /// Hard-link unchanged shards instead of copying them
    #[arg(long, requires = "output")]
    link: bool,
    /// Keep finished shards on interruption, and reuse those of an earlier run
    #[arg(long, requires = "output")]
    resume: bool,
    /// Also copy files that contradict the new weights: other copies of the old weights, the base's model card
    #[arg(long, requires = "output")]
    keep_other_files: bool,
    /// Check everything, write nothing
    #[arg(long)]
    dry_run: bool,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt merge llama --adapter adapter.safetensors -o merged
  neuroada-ckpt merge llama --adapter lora-folder=0.5 --adapter b.safetensors -o merged
  neuroada-ckpt merge llama --adapter adapter.safetensors --in-place";

impl OutputArgs {
    /// Whether the command changes the checkpoint itself.
    fn is_in_place(&self) -> bool {
        self.output.is_none() && !self.dry_run
    }

    /// Whether the result replaces the input.
    pub(super) fn is_changed_itself(&self) -> bool {
        self.output.is_none()
    }

    pub(super) fn options(self, ledger: bool) -> MergeOptions<'static> {
        let output = match self.output {
            Some(path) => {
                let existing = if self.force { Existing::Replace } else { Existing::Keep };
                MergeOutput::New { path, existing, ledger, link: self.link, resume: self.resume }
            }
            None => MergeOutput::InPlace { through_links: self.break_links },
        };
        let keep_other_files = self.keep_other_files;
        MergeOptions { dry_run: self.dry_run, keep_other_files, ..MergeOptions::to(output) }
    }
}

/// The note about an earlier change that was recovered.
const RECOVERED: &str = "an interrupted change was recovered first";

pub(super) fn run(args: MergeArgs, env: &Env) -> CliResult<Answer> {
    let inputs = args.adapters.iter().map(|text| parse_input(text)).collect::<CliResult<Vec<_>>>()?;
    let recovers = args.output.is_in_place() && Checkpoint::open_interrupted(&args.base)?.interrupted()?.is_some();
    if recovers {
        merge::recover(&env.context(), &args.base, args.low_rank.originals.as_deref())?;
    }
    let answer = merge_all(args, inputs, recovers, env);
    if recovers && answer.is_err() {
        env.note(RECOVERED);
    }
    answer
}

/// Merges into a checkpoint without an interrupted change.
fn merge_all(args: MergeArgs, inputs: Vec<MergeInput>, recovered: bool, env: &Env) -> CliResult<Answer> {
    let any_low_rank = inputs.iter().any(|input| merge::changes_whole_tensors(&input.adapter));
    let gpu = if any_low_rank { env.gpu_merger()? } else { None };
    let merger = gpu.as_deref().map_or_else(Merger::cpu, Merger::on);
    let is_in_place = args.output.is_changed_itself();
    let keep = if args.low_rank.keep_originals { KeptOriginals::Whole } else { KeptOriginals::Hashes };
    let reading = args.low_rank.reading();
    let options = MergeOptions {
        allow_overflow: args.allow_overflow,
        reading,
        keep,
        base: args.low_rank.originals,
        merger,
        ..args.output.options(!args.no_ledger)
    };
    let merged = merge::merge(&env.context(), &args.base, &inputs, &options);
    let mut report = match merged {
        Err(e @ MergeError::AlreadyMerged { .. }) => {
            Err(e).hint("to merge it with another scale, unmerge it first")?
        }
        Err(e @ MergeError::MergedBefore { .. }) => {
            Err(e).hint("merge into the original base, or restore the checkpoint's .neuroada folder")?
        }
        Err(e @ MergeError::WrongBase { .. }) => Err(e).hint("merge into the checkpoint that the adapter was made from")?,
        Err(e @ MergeError::Overflow { .. }) => {
            Err(e).hint("check the scale and the adapter; --allow-overflow merges anyway")?
        }
        Err(e @ MergeError::Unmatched { .. }) if any_low_rank && is_about_names(&e) => Err(e).hint(RENAME_HINT)?,
        Err(e @ MergeError::Unmatched { .. }) => Err(e).hint(OTHER_MODEL_HINT)?,
        Err(e @ MergeError::NeedsBase { .. }) => Err(e).hint("--base PATH names it")?,
        Err(e @ MergeError::KeepsNothing { .. }) => Err(e).hint(
            "--keep-originals stores them in the ledger, --base PATH names a checkpoint that has them, -o writes a new checkpoint",
        )?,
        Err(MergeError::Undecided { ref open, .. }) => {
            let hint = match open {
                Undecided::ExpertOrder => "adapters trained with PEFT need --expert-order rank-first".to_owned(),
                Undecided::Axes { kind } => axes_hint(kind),
                Undecided::TiedHead => {
                    "--tied-weights changes the weight under all of its names; or untie the weights in the base first".to_owned()
                }
            };
            merged.hint(&hint)?
        }
        merged => merged?,
    };
    if recovered {
        report.notes.insert(0, RECOVERED.to_owned());
    }
    print_report(&report, is_in_place, env)?;
    if let Some(gpu) = gpu {
        print_gpu_counts(&gpu.counts(), env);
    }
    if report.needs_base && any_low_rank {
        let size = bytes(report.bytes_checked);
        env.note(&format!(
            "note: unmerge will need the base; --keep-originals stores the originals ({size}) beside the result instead"
        ));
    }
    Ok(Answer::Yes)
}

/// Reports how many weights each device merged; the result does not depend on it.
fn print_gpu_counts(weights: &MergedWeights, env: &Env) {
    let MergedWeights { on_gpu, on_cpu } = *weights;
    env.detail(&format!("{} weights merged on the GPU", count(on_gpu)));
    if on_cpu > 0 {
        let which = if on_gpu == 0 { "all".to_owned() } else { count(on_cpu) };
        let limits = "the GPU path supports one LoRA product on bf16, f16 and f32 weights, no DoRA, no sparse deltas, and factors \
                      that fit --gpu-memory and --max-memory";
        env.note(&format!("note: weights merged on the CPU: {which}; {limits}"));
    }
}

const OTHER_MODEL_HINT: &str =
    "the adapter was made for another model; compare names and shapes with `neuroada-ckpt inspect --tensors`";

const RENAME_HINT: &str =
    "if only the names differ, map them with --rename FROM=TO, as in --rename 'encoder.*=vision_model.encoder.*'";

/// Whether one of the problems is a name that matches no tensor or several.
fn is_about_names(error: &MergeError) -> bool {
    let MergeError::Unmatched { problems, .. } = error else { return false };
    problems.iter().any(|problem| problem.contains("no such tensor") || problem.contains("may be meant"))
}

/// Reads `FILE` or `FILE=SCALE`; the text after the last `=` is a scale if it is a number.
pub(super) fn parse_input(text: &str) -> CliResult<MergeInput> {
    let Some((file, scale)) = text.rsplit_once('=') else {
        refuse_other_separators(text)?;
        return Ok(MergeInput { adapter: text.into(), scale: None });
    };
    match scale.parse::<f64>() {
        Ok(scale) if scale.is_finite() && !file.is_empty() => {
            Ok(MergeInput { adapter: file.into(), scale: Some(scale) })
        }
        // A file with an equals sign in its name.
        _ if probe::is_present(Path::new(text))? => Ok(MergeInput { adapter: text.into(), scale: None }),
        Ok(scale) if !scale.is_finite() => {
            Err(CliError::usage(format!("{text}: scale {scale} is not a finite number")))
        }
        _ => Err(CliError::usage(format!("{text}: expected FILE or FILE=SCALE, and {scale:?} is not a number"))),
    }
}

/// Fails if a scale follows another character than `=`, as in `FILE:0.5`, unless a file has that name.
fn refuse_other_separators(text: &str) -> CliResult<()> {
    let Some((file, scale)) = text.rsplit_once([':', '@', '*', ',']) else { return Ok(()) };
    if file.is_empty() || scale.parse::<f64>().is_err() || probe::is_present(Path::new(text))? {
        return Ok(());
    }
    Err(CliError::usage(format!("{}: the scale follows an equals sign", Printable(text))))
        .hint(&format!("{}={scale}", Printable(file)))
}

/// Prints the report of a merge or an unmerge.
pub(super) fn print_report(report: &MergeReport, is_in_place: bool, env: &Env) -> CliResult<()> {
    match report.dry_run {
        true => env.report(report, print)?,
        false => env.report_work(report, print)?,
    }
    for note in &report.notes {
        env.note(note);
    }
    for file in &report.left_out {
        match is_in_place {
            true => env.note(&format!("note: stays beside the new weights: {file}")),
            false => env.note(&format!("note: not copied: {file}")),
        }
    }
    if report.total.n_overflowed > 0 {
        env.note(&format!(
            "warning: {} finite weights overflowed to infinity or NaN",
            count(report.total.n_overflowed)
        ));
    }
    Ok(())
}

fn print(report: &MergeReport, page: &mut Page) {
    if report.kinds.is_empty() {
        page.line("no adapter is left; all bytes are the base's");
    } else {
        let mut table = Table::new(["kind", "tensors>", "touched>", "changed>", "absorbed>", "share>"]);
        for kind in report.kinds.iter().chain([&report.total]) {
            table.row(kind_cells(kind));
        }
        page.table(table);
        page.legend("absorbed: rounding swallowed the delta, and the weight kept its bits");
        page.blank();
        let mut adapters = Table::new(["adapter", "scale>", "tensors>", "deltas>", "made from"]);
        for entry in &report.active {
            let mark = if report.added.contains(&entry.id) { "+ " } else { "  " };
            let id = format!("{mark}{}", &entry.id[..12]);
            adapters.row([
                id,
                number(entry.scale),
                count(entry.n_tensors as u64),
                count(entry.n_deltas),
                entry.base.clone(),
            ]);
        }
        page.table(adapters);
    }
    page.blank();
    let verb = if report.dry_run { "would write" } else { "wrote" };
    let mut facts = Vec::new();
    if !report.removed.is_empty() {
        facts.push(("removed", report.removed.iter().map(|id| id[..12].to_owned()).collect::<Vec<_>>().join(" ")));
    }
    facts.push(("matched", format!("{} tensors, none unmatched", count(report.n_matched as u64))));
    facts.push(("shards", format!("{} of {} patched", report.n_shards_patched, report.n_shards)));
    facts.push((verb, bytes(report.bytes_written)));
    if report.ledger_bytes > 0 {
        facts.push(("ledger", bytes(report.ledger_bytes)));
    }
    facts.extend(report.new_tensors.iter().map(|line| ("new", line.clone())));
    page.facts(&facts);
}

fn kind_cells(kind: &KindReport) -> [String; 6] {
    [
        kind.kind.clone(),
        count(kind.n_tensors),
        count(kind.n_touched),
        count(kind.n_changed),
        count(kind.n_absorbed),
        percent(kind.n_absorbed, kind.n_nonzero),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_follows_the_last_equals_sign() {
        let input = |text: &str| parse_input(text).map(|input| (input.adapter, input.scale)).ok();
        assert_eq!(input("a.safetensors"), Some(("a.safetensors".into(), None)));
        assert_eq!(input("a=b=0.5"), Some(("a=b".into(), Some(0.5))));
        assert_eq!(input("a=-1"), Some(("a".into(), Some(-1.0))));
        for bad in ["a=half", "a=nan", "a=inf", "=1", "a="] {
            assert_eq!(input(bad), None, "{bad}");
        }
    }
}
