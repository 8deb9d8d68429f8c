//! A new checkpoint of the same layout: shards copied, examined and patched in one pass, side files brought along.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::{Path, PathBuf},
};

use super::{
    KeptOriginals, MergeError, MergeReport,
    added::{self, Texts, arrange, layout_after},
    card::{OldCard, write_card},
    change::{Change, Touched, Work},
    compute::Bound,
    examine::Examination,
    examine_tensor::TensorExamination,
    frame::{Frame, by_shard, marked_header},
    ledger::{GROUP_ROWS, LedgerDocument, LedgerWriter, TextEdit},
    mark::MarkedAdapter,
    new_checkpoint::{Destination, NewCheckpoint, RowBlocks, pieces},
    patch::patch,
    report::report,
    stack::{Remembered, Stack},
};
use crate::{
    checkpoint::{
        Checkpoint, Context, CopyMode, Header, Layout, OwnFolder, Patcher, Piece, Resume, Shard, Silent, StateFolder,
        remove_file, rename_into_place, rewrite_shard, share_file,
    },
    tensor::projection_kind,
};

/// Writes the checkpoint that a change makes; `document` is that of its ledger, without targets.
///
/// Shards are copied, examined and patched in one pass, and judged when all were: until then nothing has its name.
pub(super) fn apply(
    ctx: &Context<'_>,
    change: &Change<'_>,
    mut document: LedgerDocument,
    target: &Destination<'_>,
    allow_overflow: bool,
    plan_notes: &str,
) -> Result<MergeReport, MergeError> {
    let checkpoint = change.checkpoint;
    let touched = change.touched()?;
    let bounds = change.bounds_if(ctx, &touched, allow_overflow)?;
    added::check(ctx, change)?;
    refuse_early(ctx, change, &touched, &bounds, allow_overflow)?;
    let is_file = checkpoint.layout() == Layout::File;
    let what = || plan(change, plan_notes);
    let frame = Frame::of(checkpoint, change.before.ledger);
    let marks = marks_of(change, target.keep_ledger);
    document.marked = marked_shards(checkpoint, &marks);
    let arranged = arranged_headers(change, &frame, &marks, &mut document.headers)?;
    let bytes_written = bytes_of(change, &frame, &marks, &arranged)?;
    let texts = Texts::of(change)?;
    texts.record(&mut document);
    let output = NewCheckpoint::begin(checkpoint, target, what, state_bytes(change, &touched))?;
    let shard_names: Vec<String> = checkpoint.shards().iter().map(Shard::file_name).collect();
    let resume = match target.resume && !is_file {
        true => Some(Resume::begin(ctx, output.root(), &what(), &shard_names)?),
        false => None,
    };
    let state = output.state();
    state.create()?;

    let mut writer = LedgerWriter::create(state, StateFolder::LEDGER, document)?;
    let mut examination = Examination::new(change, &bounds, Some(&mut writer));
    ctx.observer.begin("merging", checkpoint.shards().iter().map(Shard::file_bytes).sum());
    let mut waiting = Vec::new();
    let mut touched_of: Vec<Vec<&Touched<'_>>> = vec![Vec::new(); checkpoint.shards().len()];
    touched.iter().for_each(|target| touched_of[target.tensor.shard_index].push(target));
    for (index, ((shard, mut of_shard), marks)) in checkpoint.shards().iter().zip(touched_of).zip(marks).enumerate() {
        of_shard.sort_by_key(|target| target.tensor.info.data.start);
        let path = output.shard_path(shard);
        let header = match arranged.get(&index) {
            // It gets another one when it is written once more.
            Some(_) => String::from_utf8_lossy(&shard.header_json()?).into_owned(),
            None => frame.header_naming(shard, marks)?,
        };
        if resume.as_ref().is_some_and(|resume| resume.has(&shard.file_name())) {
            of_shard.iter().try_for_each(|target| examination.on_disk(ctx, target))?;
            continue;
        }
        let part = path.with_extension("part");
        let keeps_header = header.as_bytes() == shard.header_json()?;
        let is_untouched = of_shard.iter().all(|target| matches!(target.work, Work::Nothing { .. }));
        let mode = if target.link && is_untouched { CopyMode::Link } else { CopyMode::Auto };
        let any_whole = of_shard.iter().any(|target| matches!(target.work, Work::Rows { .. }));
        // Blocks that are shared cost nothing, unless most of them are written over.
        if !any_whole && keeps_header && share_file(shard.path(), &part, mode)?.is_some() {
            of_shard.iter().try_for_each(|target| examination.on_disk(ctx, target))?;
            // Sharing once more costs less than proving: there is no record, and no name before the end.
            let data_start = shard.header().data_start();
            waiting.push(Waiting { index, later: of_shard, part, path, data_start, is_recorded: false });
            continue;
        }
        let mut written = resume.as_ref().map(|_| Vec::new());
        let to = (part.as_path(), header.as_bytes());
        let later = rewrite(ctx, change, shard, &of_shard, to, &mut examination, &mut written)?;
        if !later.is_empty() || arranged.contains_key(&index) {
            let data_start = 8 + header.len() as u64;
            waiting.push(Waiting { index, later, part, path, data_start, is_recorded: true });
            continue;
        }
        if let Some((resume, written)) = resume.as_ref().zip(written) {
            resume.record(&shard.file_name(), written)?;
        }
        rename_into_place(&part, &path)?;
    }
    let findings = examination.findings;
    if let Err(e) = findings.judge(change, allow_overflow) {
        output.discard();
        return Err(e);
    }
    let mut report = report(change, &touched, &findings);
    for source in &change.after.active {
        source.write_copy(ctx, state)?;
    }
    added::record(ctx, change, &mut writer)?;
    let ledger = writer.finish(ctx, change.record(ctx, state)?)?;
    let ledger_bytes = ledger.n_bytes();
    // What is trusted from here on is what lies on disk.
    let remembered = Remembered::of_ledger(ctx, state, ledger)?;
    let after = match waiting.iter().any(|shard| !shard.later.is_empty()) {
        true => Stack::of(&remembered, checkpoint, change.base)?,
        false => Stack::default(),
    };
    for Waiting { index, later, mut part, path, data_start, is_recorded } in waiting {
        if !later.is_empty() {
            let mut files: Vec<Option<Patcher>> = checkpoint.shards().iter().map(|_| None).collect();
            files[index] = Some(Patcher::open(ctx, &part, data_start)?);
            let patched = Change { after: &after, ..*change };
            let later: Vec<Touched<'_>> = later.into_iter().copied().collect();
            patch(ctx, &patched, &later, &files)?;
        }
        if let Some(header) = arranged.get(&index) {
            let second = path.with_extension("arranged");
            arrange(ctx, change, index, (&part, &second), header)?;
            remove_file(&part)?;
            part = second;
        }
        if let Some(resume) = resume.as_ref().filter(|_| is_recorded) {
            resume.record_file(ctx, &checkpoint.shards()[index].file_name(), &part)?;
        }
        rename_into_place(&part, &path)?;
    }
    report.left_out = output.copy_side_files(ctx)?;
    if checkpoint.index_name().is_some_and(|name| frame.is_own(name)) {
        output.restore_index()?;
    }
    texts.write(&OwnFolder::at(output.root())?)?;
    report.notes.extend(texts.notes);
    let needs_base = change.needs_base(&touched);
    if !target.keep_other_files && !is_file {
        let old = OldCard::of(checkpoint, &StateFolder::of(checkpoint)?)?;
        let remembers = target.keep_ledger && !needs_base;
        write_card(change, &OwnFolder::at(output.root())?, (state, target.keep_ledger), &old, remembers)?;
    }
    change.unchanged()?;

    report.bytes_written = bytes_written;
    let is_kept = target.keep_ledger && !change.after.active.is_empty();
    if is_kept {
        report.ledger_bytes = ledger_bytes;
        report.needs_base = needs_base;
    }
    drop(after);
    drop(remembered);
    output.finish_state(is_kept)?;
    if let Some(resume) = resume {
        report.notes.extend(resume.finish(&shard_names)?);
    }
    output.commit()?;
    Ok(report)
}

/// A shard that gets its name when all were judged.
struct Waiting<'t> {
    index: usize,
    /// What is still to be patched.
    later: Vec<&'t Touched<'t>>,
    part: PathBuf,
    path: PathBuf,
    /// Where its tensor data begins.
    data_start: u64,
    /// Whether a run that is cut short leaves a record of it.
    is_recorded: bool,
}

/// The adapters that each shard's header names after a change: none without a ledger, when nothing of the merge is remembered.
fn marks_of(change: &Change<'_>, keep_ledger: bool) -> Vec<Vec<MarkedAdapter>> {
    let named = if keep_ledger { change.after } else { &Stack::default() };
    by_shard(named, change.checkpoint.shards().len())
}

/// Bytes of the shards of the checkpoint that a change makes.
///
/// # Errors
/// A header that cannot be read, or would be longer than readers accept.
pub(super) fn new_bytes(change: &Change<'_>, keep_ledger: bool) -> Result<u64, MergeError> {
    let frame = Frame::of(change.checkpoint, change.before.ledger);
    let marks = marks_of(change, keep_ledger);
    let arranged = arranged_headers(change, &frame, &marks, &mut BTreeMap::new())?;
    bytes_of(change, &frame, &marks, &arranged)
}

fn bytes_of(
    change: &Change<'_>,
    frame: &Frame<'_>,
    marks: &[Vec<MarkedAdapter>],
    arranged: &BTreeMap<usize, String>,
) -> Result<u64, MergeError> {
    let mut n_bytes = 0;
    for (index, (shard, marks)) in change.checkpoint.shards().iter().zip(marks).enumerate() {
        n_bytes += match arranged.get(&index) {
            Some(header) => Header::parse_text(shard.path(), header.as_bytes())?.file_bytes(),
            None => {
                let header = frame.header_naming(shard, marks.clone())?;
                8 + header.len() as u64 + shard.file_bytes() - shard.header().data_start()
            }
        };
    }
    Ok(n_bytes)
}

/// The headers of the shards that tensors are added to or taken out of, by the shard's number; `edits` gets how to take them back.
fn arranged_headers(
    change: &Change<'_>,
    frame: &Frame<'_>,
    marks: &[Vec<MarkedAdapter>],
    edits: &mut BTreeMap<String, TextEdit>,
) -> Result<BTreeMap<usize, String>, MergeError> {
    *edits = change.before.ledger.map_or_else(BTreeMap::new, |ledger| ledger.document().headers.clone());
    let mut headers = BTreeMap::new();
    for (index, (shard, marks)) in change.checkpoint.shards().iter().zip(marks).enumerate() {
        if !added::rearranges(change, index) {
            continue;
        }
        let original = frame.original_header(shard)?.0;
        let layout = layout_after(change, shard, index, &original)?;
        match layout == original {
            true => _ = edits.remove(&shard.file_name()),
            false => _ = edits.insert(shard.file_name(), TextEdit::between(&original, &layout)),
        }
        headers.insert(index, marked_header(shard, &layout, marks.clone())?);
    }
    Ok(headers)
}

/// The names of the shards whose headers name adapters.
fn marked_shards(checkpoint: &Checkpoint, marks: &[Vec<MarkedAdapter>]) -> Vec<String> {
    let marked = checkpoint.shards().iter().zip(marks).filter(|(_, marks)| !marks.is_empty());
    marked.map(|(shard, _)| shard.file_name()).collect()
}

/// Copies a shard under another header, patching and examining on the way the tensors whose rows lie in one piece; returns the others, examined.
/// `written` gets the hashes of what was written, where they are wanted.
fn rewrite<'t>(
    ctx: &Context<'_>,
    change: &Change<'t>,
    shard: &Shard,
    of_shard: &[&'t Touched<'t>],
    (part, header): (&Path, &[u8]),
    examination: &mut Examination<'t, '_>,
    written: &mut Option<Vec<Piece>>,
) -> Result<Vec<&'t Touched<'t>>, MergeError> {
    let hashes = written.is_some();
    if let Some(written) = written {
        let prefix = [&(header.len() as u64).to_le_bytes(), header].concat();
        written.push(Piece::new(prefix.len() as u64, blake3::hash(&prefix)));
    }
    let (old_start, new_start) = (shard.header().data_start(), 8 + header.len() as u64);
    let is_later = |touched: &&Touched<'_>| match touched.work {
        // Blocks of very long rows would not fit into memory whole.
        Work::Positions(layout) => layout.transposed || ctx.pass_bytes() / 8 < GROUP_ROWS * touched.row_bytes(),
        Work::Rows { .. } | Work::Nothing { .. } => false,
    };
    let (later, at_once): (Vec<&Touched<'_>>, Vec<&Touched<'_>>) = of_shard.iter().copied().partition(is_later);
    let examinations = at_once
        .iter()
        .map(|touched| examination.examine(ctx, touched))
        .collect::<Result<Vec<TensorExamination<'_>>, _>>()?;
    let row_blocks_of = |of_tensor: &TensorExamination<'_>| RowBlocks {
        tensor: shard.file_range(of_tensor.touched.tensor.info),
        row_bytes: of_tensor.touched.row_bytes(),
        rows: change.blocks(ctx, of_tensor.touched),
    };
    let examinations = &examinations;
    rewrite_shard(
        ctx,
        shard,
        (part, header),
        pieces(ctx, shard, examinations.iter().map(row_blocks_of)).map(|(range, rows)| {
            let rows: Option<(&TensorExamination<'_>, Range<u64>)> =
                rows.map(|(number, rows)| (&examinations[number], rows));
            (range.clone(), (range.end, rows))
        }),
        |(_, rows)| rows.as_ref().map_or(0, |(of_tensor, rows)| of_tensor.block_bytes(ctx, rows)),
        |(_, rows), bytes| {
            let block = match rows {
                Some((of_tensor, rows)) => Some(of_tensor.in_memory(ctx, rows, bytes)?),
                None => None,
            };
            Ok((block, hashes.then(|| blake3::hash(bytes))))
        },
        |(end, rows), (block, hash)| {
            if let (Some(written), Some(hash)) = (&mut *written, hash) {
                written.push(Piece::new(end - old_start + new_start, hash));
            }
            match (rows, block) {
                (Some((of_tensor, rows)), Some(block)) => examination.push(ctx, of_tensor, &rows, block),
                _ => Ok(()),
            }
        },
    )?;
    examination.finish(ctx, &at_once)?;
    later.iter().try_for_each(|target| examination.on_disk(ctx, target))?;
    Ok(later)
}

/// Fails before anything is written where one tensor of each kind in each shard shows that the base is another, or where a finite weight
/// would become infinite: tensors whose deltas are large enough for that are examined, which are none in most merges.
fn refuse_early(
    ctx: &Context<'_>,
    change: &Change<'_>,
    touched: &[Touched<'_>],
    bounds: &BTreeMap<String, Bound>,
    allow_overflow: bool,
) -> Result<(), MergeError> {
    let can_overflow = |target: &Touched<'_>| !allow_overflow && change.may_overflow(target, bounds);
    let mut seen = BTreeSet::new();
    let mut by_size: Vec<&Touched<'_>> = touched.iter().filter(|target| change.tells(target)).collect();
    by_size.sort_by_key(|target| target.tensor.info.n_bytes());
    by_size.retain(|target| seen.insert((target.tensor.shard_index, projection_kind(target.name()))));
    let (whole, telling): (Vec<&Touched<'_>>, Vec<&Touched<'_>>) =
        by_size.into_iter().partition(|target| matches!(target.work, Work::Rows { .. }) && target.before.is_none());
    // Of a tensor that only now comes to be changed as a whole, the elements that sparse adapters were made for tell, without the products.
    let sparse = Stack {
        active: change.after.active.clone(),
        targets: whole.iter().filter_map(|target| Some((target.name(), target.after?.sparse_alone()))).collect(),
        ..Stack::default()
    };
    let at_elements = Change { after: &sparse, before: &Stack::default(), ..*change };
    let telling: BTreeSet<&str> = telling.iter().map(|target| target.name()).collect();
    let any_overflow = touched.iter().any(can_overflow);
    let first: Vec<Touched<'_>> =
        touched.iter().filter(|target| telling.contains(target.name()) || can_overflow(target)).copied().collect();
    let quiet = Context { observer: &Silent, ..*ctx };
    let observed = if any_overflow { ctx } else { &quiet };
    let none = BTreeMap::new();
    let judged = at_elements
        .examine(&quiet, &at_elements.touched()?, &none, None)?
        .judge_inputs(&at_elements)
        .and_then(|()| change.examine(observed, &first, bounds, None)?.judge(change, allow_overflow));
    match judged {
        Ok(()) => Ok(()),
        // Told with all that is wrong.
        Err(_) => change.examine(ctx, touched, bounds, None)?.judge(change, allow_overflow),
    }
}

impl Change<'_> {
    /// Bytes of tensors in the ledger after the change, at most.
    pub(super) fn kept_bytes(&self, touched: &[Touched<'_>]) -> u64 {
        let originals = |target: &Touched<'_>| match self.keeps(target) {
            Some(KeptOriginals::Whole) => target.tensor.info.n_bytes(),
            Some(KeptOriginals::Hashes) => 0,
            None => {
                let width = target.tensor.info.dtype.bitsize() as u64 / 8;
                self.after.nnz(target.name()) * width + target.n_rows() / 4
            }
        };
        touched.iter().map(originals).sum::<u64>() + added::kept_bytes(self)
    }

    /// Whether the ledger after the change has hashes alone of some tensor.
    pub(super) fn needs_base(&self, touched: &[Touched<'_>]) -> bool {
        touched.iter().any(|target| self.keeps(target) == Some(KeptOriginals::Hashes)) || added::needs_base(self)
    }

    /// Whether looking at a tensor can tell that the base is another, or that somebody changed it.
    fn tells(&self, touched: &Touched<'_>) -> bool {
        touched.before.is_some() || touched.after.is_some_and(|target| target.sparse().next().is_some())
    }
}

/// Bytes that the ledger and the adapters beside it take at most, while the ledger is being written.
pub(super) fn state_bytes(change: &Change<'_>, touched: &[Touched<'_>]) -> u64 {
    let adapters: u64 = change.after.active.iter().map(|source| source.copy_bytes()).sum();
    adapters + 2 * change.kept_bytes(touched)
}

/// Everything that the output's bytes depend on: the input's files as they are, and the adapters before and after.
fn plan(change: &Change<'_>, notes: &str) -> String {
    let mut plan = String::new();
    let of_checkpoint = |what: &str, checkpoint: &Checkpoint| -> String {
        let of = |shard: &Shard| format!("{what} {:?}: {}\n", shard.file_name(), shard.stamp());
        checkpoint.shards().iter().map(of).collect()
    };
    plan += &of_checkpoint("shard", change.checkpoint);
    if let Some(base) = change.base {
        plan += &of_checkpoint("base", base);
    }
    for (when, stack) in [("before", change.before), ("after", change.after)] {
        for source in &stack.active {
            plan += &format!("{when} {} {:016x}\n", source.id, source.scale.to_bits());
        }
    }
    plan + notes
}
