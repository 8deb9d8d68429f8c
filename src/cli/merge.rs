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
    checkpoint::{Checkpoint, Existing, probe},
    merge::{
        self, AdapterReading, ExpertOrder, KeptOriginals, KindReport, MergeError, MergeInput, MergeOptions,
        MergeOutput, MergeReport, Undecided,
    },
    weights::Axes,
};

/// Add adapters to a checkpoint
///
/// Every weight becomes round(original + delta * scale + …) over all adapters in it, in one fixed order, whatever the order they
/// were merged in. Everything is checked before the result appears: each tensor of each adapter must match, and the base's values must
/// be those that a sparse adapter was made from. A wrong base is found before anything is copied. The result remembers the
/// original bits (in .neuroada/), so that unmerge can take any adapter out again, exactly.
#[derive(Args)]
#[command(group = ArgGroup::new("where").args(["output", "in_place"]).required(true))]
pub(super) struct MergeArgs {
    /// Directory or .safetensors file of the base checkpoint
    base: PathBuf,
    /// Adapter made from that base; or a sparse one of PEFT, SpIEL or the published code, or the folder of a PEFT LoRA adapter; =SCALE
    /// replaces the scale it carries (of LoRA, 1); may be given several times
    #[arg(short, long = "adapter", value_name = "FILE[=SCALE]", required = true)]
    adapters: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
    /// Write no ledger, and no adapter's id into the shards' headers: the merge cannot be undone
    #[arg(long, conflicts_with = "in_place")]
    no_ledger: bool,
    /// Merge even where finite weights become infinite or NaN, and report how many
    #[arg(long)]
    allow_overflow: bool,
    #[command(flatten)]
    low_rank: LowRankArgs,
}

/// What only low-rank adapters need.
#[derive(Args)]
struct LowRankArgs {
    /// LoRA: keep the originals of all tensors that change in the ledger, so that undoing needs no base; as large as those tensors
    #[arg(long, conflicts_with = "no_ledger")]
    keep_originals: bool,
    /// LoRA in place, or on top of one: the checkpoint that everything is merged into, untouched; the ledger keeps hashes then, and
    /// undoing, or recovering from a crash, needs it again
    #[arg(long = "base", value_name = "PATH", id = "originals_base")]
    originals: Option<PathBuf>,
    /// LoRA on stacks of experts: how the second factor is laid out, which its file does not tell; PEFT writes rank-first
    #[arg(long, value_enum, value_name = "ORDER")]
    expert_order: Option<ExpertOrderArg>,
    #[command(flatten)]
    axes: AxesArgs,
    /// How all stacks of experts are stored
    #[arg(long, value_name = "AXES", hide = true, value_parser = |text: &str| text.parse::<Axes>())]
    expert_axes: Option<Axes>,
    #[command(flatten)]
    renames: RenameArgs,
    /// LoRA trained for some of the names of a weight that the model shares, such as embedding and head: change it for all of them
    #[arg(long = "tied-weights", alias = "tied-head")]
    tied: bool,
    /// LoRA with a new head or a resized vocabulary: add tensors that the base does not have, and replace those of another size; config.json
    /// is edited to match
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

/// Where the changed checkpoint goes.
#[derive(Args)]
pub(super) struct OutputArgs {
    /// Where to write the new checkpoint
    #[arg(short, long, value_name = "PATH", conflicts_with = "in_place")]
    output: Option<PathBuf>,
    /// Change the checkpoint itself, journaled
    #[arg(long)]
    in_place: bool,
    /// In place: files that other paths lead to as well get a copy of their own first
    #[arg(long, conflicts_with = "output")]
    break_links: bool,
    /// Replace an existing output; a folder only where nothing is in it but what this program wrote, or what has the new files' names
    #[arg(long, requires = "output")]
    force: bool,
    /// Hard-link shards that no delta touches instead of copying them
    #[arg(long, requires = "output")]
    link: bool,
    /// Keep finished shards when cut short, and go on from those of an earlier run
    #[arg(long, requires = "output")]
    resume: bool,
    /// Take along files that contradict the new weights: other copies of the old ones, the base's model card
    #[arg(long, requires = "output")]
    keep_other_files: bool,
    /// Check everything, say what would be written, write nothing
    #[arg(long)]
    dry_run: bool,
}

impl OutputArgs {
    /// Whether the checkpoint itself is going to change.
    fn is_in_place(&self) -> bool {
        self.output.is_none() && !self.dry_run
    }

    /// Whether the result has the place of the input.
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

/// What is reported where there was something to recover.
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

/// Merges, when there is nothing to recover any more.
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
            Err(e).hint("take it out with unmerge first, to merge it with another scale")?
        }
        Err(e @ MergeError::MergedBefore { .. }) => {
            Err(e).hint("merge into the base that the adapter was made from, or bring its .neuroada folder back")?
        }
        Err(e @ MergeError::WrongBase { .. }) => Err(e).hint("merge into the checkpoint the adapter was made from")?,
        Err(e @ MergeError::Overflow { .. }) => {
            Err(e).hint("--allow-overflow merges all the same; is the scale right, and the adapter undamaged?")?
        }
        Err(e @ MergeError::Unmatched { .. }) if any_low_rank && is_about_names(&e) => Err(e).hint(RENAME_HINT)?,
        Err(e @ MergeError::NeedsBase { .. }) => Err(e).hint("--base names it")?,
        Err(e @ MergeError::KeepsNothing { .. }) => Err(e).hint(
            "--keep-originals keeps them in the ledger; --base PATH names a checkpoint that has them; -o writes a new checkpoint",
        )?,
        Err(MergeError::Undecided { ref open, .. }) => {
            let hint = match open {
                Undecided::ExpertOrder => "--expert-order rank-first for an adapter trained with PEFT".to_owned(),
                Undecided::Axes { kind } => axes_hint(kind),
                Undecided::TiedHead => {
                    "--tied-weights merges it for all of them; or untie them in the base first".to_owned()
                }
            };
            merged.hint(&hint)?
        }
        merged => merged?,
    };
    if recovered {
        report.notes.insert(0, RECOVERED.to_owned());
    }
    tell(&report, is_in_place, env)?;
    if let Some(gpu) = gpu {
        tell_of_gpu(&gpu.counts(), env);
    }
    if report.needs_base && any_low_rank {
        let size = bytes(report.bytes_checked);
        env.note(&format!("undoing needs the base; --keep-originals keeps what that takes, {size}, beside the result"));
    }
    Ok(Answer::Yes)
}

/// Says what was merged where; the report is the same wherever that was.
fn tell_of_gpu(weights: &MergedWeights, env: &Env) {
    let MergedWeights { on_gpu, on_cpu } = *weights;
    env.detail(&format!("{} weights merged on the GPU", count(on_gpu)));
    if on_cpu > 0 {
        let which = if on_gpu == 0 { "all".to_owned() } else { count(on_cpu) };
        let takes = "a GPU takes one LoRA product on bf16, f16 and f32 weights, no DoRA and no sparse deltas, and factors that \
                     --gpu-memory and --max-memory have room for";
        env.note(&format!("note: weights merged on the CPU: {which}; {takes}"));
    }
}

const RENAME_HINT: &str =
    "where names alone differ, --rename FROM=TO says which is which, as in --rename 'encoder.*=vision_model.encoder.*'";

/// Whether one of the problems is that a name was not found, or that it may mean several tensors.
fn is_about_names(error: &MergeError) -> bool {
    let MergeError::Unmatched { problems, .. } = error else { return false };
    problems.iter().any(|problem| problem.contains("no such tensor") || problem.contains("may be meant"))
}

/// Reads `FILE` or `FILE=SCALE`; what follows the last `=` is a scale if it is a number.
pub(super) fn parse_input(text: &str) -> CliResult<MergeInput> {
    let Some((file, scale)) = text.rsplit_once('=') else {
        return Ok(MergeInput { adapter: text.into(), scale: None });
    };
    match scale.parse::<f64>() {
        Ok(scale) if scale.is_finite() && !file.is_empty() => {
            Ok(MergeInput { adapter: file.into(), scale: Some(scale) })
        }
        // A file whose own name holds an equals sign.
        _ if probe::is_present(Path::new(text))? => Ok(MergeInput { adapter: text.into(), scale: None }),
        Ok(scale) if !scale.is_finite() => {
            Err(CliError::usage(format!("{text}: scale {scale} is not a finite number")))
        }
        _ => Err(CliError::usage(format!("{text}: expected FILE or FILE=SCALE, and {scale:?} is not a number"))),
    }
}

/// Prints the report of a merge or an unmerge.
pub(super) fn tell(report: &MergeReport, is_in_place: bool, env: &Env) -> CliResult<()> {
    match report.dry_run {
        true => env.report(report, print)?,
        false => env.report_work(report, print)?,
    }
    for note in &report.notes {
        env.note(note);
    }
    for file in &report.left_out {
        match is_in_place {
            true => env.note(&format!("stays beside the new weights: {file}")),
            false => env.note(&format!("left out: {file}")),
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
        page.line("no adapter is left: the base's bytes");
    } else {
        let mut table = Table::new(["kind", "tensors>", "touched>", "changed>", "absorbed>", "share>"]);
        for kind in report.kinds.iter().chain([&report.total]) {
            table.row(kind_cells(kind));
        }
        page.table(&table);
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
        page.table(&adapters);
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
